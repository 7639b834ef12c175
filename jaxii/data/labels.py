"""The vocabulary of labels, and how an image's labels are resolved.

Label files and prepared datasets name labels by code; other modules use ids of a
`Vocabulary`. Labels of people, boxes and machines may contradict each other:
`resolve_labels` keeps one confidence per label of an image, and `resolve_rows` does the
same for many images.
"""

import functools
import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
from jaxtyping import Bool, Float, Int, UInt8

from jaxii.errors import InputError
from jaxii.storage import at, write_beside

HUMAN, MACHINE, BOX = 0, 1, 2
MACHINE_LABELS = ("ignored", "soft", "thresholded")


@dataclass(frozen=True)
class Vocabulary:
    """The labels of a model, in their official order.

    Attributes:
      codes: Unique codes such as "/m/01g317".
      descriptions: One readable name per code; the code itself if none is known.

    Raises:
      InputError: If a code is repeated.
    """

    codes: tuple[str, ...]
    descriptions: tuple[str, ...]

    def __post_init__(self):
        if len(set(self.codes)) != len(self.codes):
            twice = next(code for code in self.codes if self.codes.count(code) > 1)
            raise InputError(f"label code {twice} is listed twice; list each code once")

    def __len__(self) -> int:
        return len(self.codes)

    @functools.cached_property
    def index(self) -> Mapping[str, int]:
        """The id of each code."""
        return {code: i for i, code in enumerate(self.codes)}

    def content_hash(self) -> str:
        """Returns 16 hexadecimal digits that depend on the codes and their order."""
        return hashlib.sha256("\n".join(self.codes).encode()).hexdigest()[:16]

    def names(self, ids: Iterable[int] | Int[np.ndarray, " label"]) -> list[str]:
        """Returns the descriptions of label ids, without those of padding (-1)."""
        return [self.descriptions[i] for i in ids if i >= 0]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a CSV file with the columns label_code and description, atomically."""
        columns = {"label_code": self.codes, "description": self.descriptions}
        table = pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.String))
        write_beside(at(path), table.write_csv, binary=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Vocabulary":
        """Reads a file that `save` wrote.

        Raises:
          InputError: If the file is missing or has other columns.
        """
        try:
            table = pl.read_csv(at(path).read_bytes(), infer_schema=False).fill_null("")
            codes, names = table["label_code"], table["description"]
        except (OSError, pl.exceptions.PolarsError) as error:
            raise InputError(
                f"{path} is not a label file ({str(error).splitlines()[0]}); it needs "
                "the columns label_code,description"
            ) from error
        return cls(tuple(codes), tuple(names))


def resolve_labels(
    label_ids: Int[np.ndarray, " label"],
    confidences: Float[np.ndarray, " label"],
    sources: UInt8[np.ndarray, " label"],
    *,
    machine_labels: str,
    machine_threshold: float,
) -> tuple[Int[np.ndarray, " slot"], Float[np.ndarray, " slot"]]:
    """Returns one confidence for each label of one image.

    Labels of people and boxes overrule machine labels; otherwise the largest confidence
    of a label is used. Labels with only a machine confidence of 0 are left out.

    Args:
      label_ids: Label ids in any order, possibly repeated.
      confidences: In [0, 1]; 1 = present, 0 = verified absent.
      sources: HUMAN, MACHINE or BOX of each entry.
      machine_labels: "ignored"; "soft" keeps the confidence; "thresholded" makes labels
        of at least the threshold present and drops the others.
      machine_threshold: In [0, 1], for "thresholded".

    Returns:
      Ascending label ids, int32, and their confidences, float32.
    """
    verified: dict[int, float] = {}
    guessed: dict[int, float] = {}
    columns = label_ids.tolist(), confidences.tolist(), sources.tolist()
    for label, confidence, source in zip(*columns, strict=True):
        kind = guessed if source == MACHINE else verified
        if confidence >= kind.get(label, -1.0):
            kind[label] = confidence
    if machine_labels != "ignored":
        soft = machine_labels == "soft"
        # float32 like the columns: a stored 0.7 must reach a threshold of 0.7.
        threshold = float(np.float32(machine_threshold))
        for label, confidence in guessed.items():
            if label in verified or confidence <= 0.0:
                continue
            if soft:
                verified[label] = confidence
            elif confidence >= threshold:
                verified[label] = 1.0
    ids = sorted(verified)
    best = np.array([verified[i] for i in ids], np.float32)
    return np.array(ids, np.int32), best


def resolve_rows(
    offsets: Int[np.ndarray, " row_plus_1"],
    label_ids: Int[np.ndarray, " entry"],
    confidences: Float[np.ndarray, " entry"],
    sources: UInt8[np.ndarray, " entry"],
    *,
    machine_labels: str,
    machine_threshold: float,
) -> tuple[
    Int[np.ndarray, " row_plus_1"], Int[np.ndarray, " kept"], Float[np.ndarray, " kept"]
]:
    """Applies `resolve_labels` to many images at once. Cost: one sort of the entries.

    Image i has the entries offsets[i]:offsets[i + 1] of the columns.

    Returns:
      New offsets (int64), label ids (int32) and confidences (float32).
    """
    num_rows = len(offsets) - 1
    machine = sources == MACHINE
    keep = is_used(
        confidences,
        sources,
        machine_labels=machine_labels,
        machine_threshold=machine_threshold,
    )
    # Verified entries outrank machine labels; float64 holds confidence + 2 exactly.
    ranks = confidences.astype(np.float64)
    ranks[~machine] += 2.0
    if machine_labels == "thresholded":
        ranks[machine & keep] = 1.0
    rows = np.repeat(np.arange(num_rows, dtype=np.int64), np.diff(offsets))
    num_labels = int(label_ids.max(initial=0)) + 1
    keys = rows[keep] * num_labels + label_ids[keep]
    keys, ranks = largest_by_key(keys, ranks[keep])
    new_offsets = np.zeros(num_rows + 1, np.int64)
    counts = np.bincount(keys // num_labels, minlength=num_rows)
    np.cumsum(counts, out=new_offsets[1:])
    best = np.where(ranks >= 2.0, ranks - 2.0, ranks)
    ids = (keys % num_labels).astype(np.int32)
    return new_offsets, ids, best.astype(np.float32)


def is_used(
    confidences: Float[np.ndarray, " entry"],
    sources: UInt8[np.ndarray, " entry"],
    *,
    machine_labels: str,
    machine_threshold: float,
) -> Bool[np.ndarray, " entry"]:
    """Returns whether `resolve_rows` uses each entry.

    It uses all entries of people and boxes, and the machine's that the arguments allow.
    """
    machine = sources == MACHINE
    if machine_labels == "ignored":
        return ~machine
    sure = confidences > 0.0
    if machine_labels == "thresholded":
        # float32 like the column: a stored 0.7 must reach a threshold of 0.7.
        sure &= confidences >= np.float32(machine_threshold)
    return ~machine | sure


def largest_by_key(
    keys: Int[np.ndarray, " entry"], values: Float[np.ndarray, " entry"]
) -> tuple[Int[np.ndarray, " key"], Float[np.ndarray, " key"]]:
    """Returns the distinct keys, ascending, and the largest value of each.

    Cost: one sort, or none if the keys are ascending.
    """
    if not len(keys):
        return keys, values
    if np.any(keys[1:] < keys[:-1]):
        order = np.argsort(keys, kind="stable")
        keys, values = keys[order], values[order]
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[first], np.maximum.reduceat(values, first)
