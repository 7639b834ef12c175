"""Labels: the vocabulary (code, index, description) and what an image's labels mean.

Label files and prepared datasets name labels by code; everything after them counts by
index into a `Vocabulary`. An image's labels arrive from people, from boxes and from a
machine, and may contradict each other: `resolve_labels` leaves one confidence a label,
for one image in the pipeline, and `resolve_rows` does the same for whole columns, for
class counts and co-occurrences.
"""

import functools
import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from jaxtyping import Float, Int, UInt8

from jaxii.errors import InputError
from jaxii.storage import at, write_beside

HUMAN, MACHINE, BOX = 0, 1, 2
MACHINE_LABELS = ("ignored", "soft", "thresholded")


@dataclass(frozen=True)
class Vocabulary:
    """The labels a model tells apart, in their official order.

    Args:
      codes: one code a label, such as "/m/01g317"; all different.
      descriptions: as many readable names; the code itself where none is known.

    Raises:
      InputError: a code is there twice, or the lengths differ.
    """

    codes: tuple[str, ...]
    descriptions: tuple[str, ...]

    def __post_init__(self):
        if len(self.codes) != len(self.descriptions):
            raise InputError(
                f"{len(self.codes)} label codes and {len(self.descriptions)} "
                "descriptions; give one description a code"
            )
        if len(set(self.codes)) != len(self.codes):
            seen: set[str] = set()
            twice = next(c for c in self.codes if c in seen or seen.add(c))
            raise InputError(
                f"label code {twice} is listed twice; each code may be listed once"
            )

    def __len__(self) -> int:
        return len(self.codes)

    @functools.cached_property
    def _index(self) -> dict[str, int]:
        return {code: i for i, code in enumerate(self.codes)}

    def index(self) -> dict[str, int]:
        """Returns the position of each code; do not change the dictionary."""
        return self._index

    def content_hash(self) -> str:
        """Returns 16 hexadecimal digits that change with any code or their order."""
        return hashlib.sha256("\n".join(self.codes).encode()).hexdigest()[:16]

    def names(self, ids: Iterable[int] | Int[np.ndarray, " label"]) -> list[str]:
        """Returns the descriptions of label indices.

        Args:
          ids: indices in [0, len(self)); -1 (padding) is left out.
        """
        return [self.descriptions[i] for i in ids if i >= 0]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the CSV file "label_code,description", whole or not at all."""
        table = pl.DataFrame(
            {"label_code": self.codes, "description": self.descriptions},
            schema={"label_code": pl.String, "description": pl.String},
        )
        write_beside(at(path), table.write_csv, binary=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Vocabulary":
        """Reads what `save` wrote.

        Raises:
          InputError: the file is absent or has other columns.
        """
        try:
            table = pl.read_csv(
                io.BytesIO(at(path).read_bytes()), infer_schema=False
            ).fill_null("")
            codes, names = table["label_code"], table["description"]
        except (OSError, pl.exceptions.PolarsError) as error:
            raise InputError(
                f"{path} is not a label file ({str(error).splitlines()[0]}); it needs "
                "the columns label_code,description"
            ) from error
        return cls(tuple(codes), tuple(names))


def check_machine_labels(machine_labels: str, machine_threshold: float) -> None:
    """Refuses an unknown use of machine labels.

    Raises:
      InputError: `machine_labels` is none of `MACHINE_LABELS`, or the threshold is
        outside [0, 1].
    """
    if machine_labels not in MACHINE_LABELS:
        raise InputError(
            f"machine_labels={machine_labels!r}; allowed: {', '.join(MACHINE_LABELS)}"
        )
    if not 0.0 <= machine_threshold <= 1.0:
        raise InputError(
            f"machine_threshold={machine_threshold} is not a confidence; give a number "
            "from 0 to 1"
        )


def resolve_labels(
    label_ids: Int[np.ndarray, " label"] | Sequence[int],
    confidences: Float[np.ndarray, " label"] | Sequence[float],
    sources: UInt8[np.ndarray, " label"] | Sequence[int],
    *,
    machine_labels: str,
    machine_threshold: float,
) -> tuple[Int[np.ndarray, " slot"], Float[np.ndarray, " slot"]]:
    """Returns one confidence for each label of one image.

    People (and the boxes they drew) overrule the machine; equals are merged by the
    largest confidence. A label that nobody has looked at is unknown: it is left out,
    and so is a machine confidence of 0, which verifies nothing.

    Args:
      label_ids: label indices, any order, with repetitions.
      confidences: in [0, 1]; 1 = present, 0 = verified absent.
      sources: HUMAN, MACHINE or BOX for each entry.
      machine_labels: "ignored"; "soft" keeps the machine's confidence as the target;
        "thresholded" makes those of at least the threshold present, drops the others.
      machine_threshold: in [0, 1], used by "thresholded" only.

    Returns:
      Ascending label ids, int32, and their confidences, float32.
    """
    verified: dict[int, float] = {}
    guessed: dict[int, float] = {}
    entries = zip(_list(label_ids), _list(confidences), _list(sources), strict=True)
    for label, confidence, source in entries:
        kind = guessed if source == MACHINE else verified
        if confidence >= kind.get(label, -1.0):
            kind[label] = confidence
    if machine_labels != "ignored":
        soft = machine_labels == "soft"
        # float32, as the columns are: a stored 0.7 must reach a threshold of 0.7
        threshold = float(np.float32(machine_threshold))
        for label, confidence in guessed.items():
            if label in verified or confidence <= 0.0:
                continue
            if soft:
                verified[label] = confidence
            elif confidence >= threshold:
                verified[label] = 1.0
    ids = sorted(verified)
    return (
        np.array(ids, np.int32),
        np.array([verified[i] for i in ids], np.float32),
    )


def _list(values) -> list:
    return values.tolist() if isinstance(values, np.ndarray) else list(values)


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
    """Does what `resolve_labels` does, for many images at once.

    Args:
      offsets: entries offsets[i]:offsets[i + 1] belong to image i.
      label_ids: label indices of all entries.
      confidences: as in `resolve_labels`.
      sources: as in `resolve_labels`.
      machine_labels: as in `resolve_labels`.
      machine_threshold: as in `resolve_labels`.

    Returns:
      New offsets (int64), label ids (int32) and confidences (float32); for each image
      equal to what `resolve_labels` returns. Cost: one sort of the entries.
    """
    num_rows = len(offsets) - 1
    machine = sources == MACHINE
    # A verified entry outranks any guess; float64 holds confidence + 2 exactly.
    ranks = confidences.astype(np.float64)
    ranks[~machine] += 2.0
    if machine_labels == "ignored":
        keep = ~machine
    else:
        keep = ranks > 0.0
        if machine_labels == "thresholded":
            sure = machine & keep & (confidences >= np.float32(machine_threshold))
            keep = ~machine | sure
            ranks[sure] = 1.0
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


def largest_by_key(
    keys: Int[np.ndarray, " entry"], values: Float[np.ndarray, " entry"]
) -> tuple[Int[np.ndarray, " key"], Float[np.ndarray, " key"]]:
    """Returns the distinct keys, ascending, and the largest value of each.

    Cost: one sort, none where the keys are ascending already, as label files are.
    """
    if not len(keys):
        return keys, values
    if np.any(keys[1:] < keys[:-1]):
        order = np.argsort(keys, kind="stable")
        keys, values = keys[order], values[order]
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[first], np.maximum.reduceat(values, first)
