"""Reads a prepared copy of TFDS's `open_images_v4` in place.

Confidences are stored as 0 to 10, and labels as positions in a list of 7,186 codes.
Labels are mapped by code, as Kaggle's 7,178 classes are in another order.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import polars as pl
from array_record.python.array_record_data_source import ArrayRecordDataSource
from jaxtyping import Float, Int, UInt8

from jaxii.data import index, schema
from jaxii.data.labels import BOX, HUMAN, MACHINE, Vocabulary
from jaxii.errors import InputError

LABELS = "objects_trainable"
_SOURCES = {
    "verification": HUMAN,
    "crowdsource-verification": HUMAN,
    "machine": MACHINE,
    "freeform": BOX,
    "xclick": BOX,
    "activemil": BOX,
}
_CHUNK = 512


@dataclass(frozen=True)
class StoredLabels:
    """Maps stored labels and sources.

    Attributes:
      labels: Vocabulary index of each stored label; -1 if the vocabulary lacks it.
      sources: HUMAN, MACHINE or BOX of each stored source.
    """

    labels: Int[np.ndarray, " stored_label"]
    sources: UInt8[np.ndarray, " stored_source"]


def read_mapping(
    codes: Sequence[str], names: Sequence[str], vocabulary: Vocabulary | None
) -> tuple[StoredLabels, Vocabulary]:
    """Returns the mapping of stored numbers, and its vocabulary.

    Args:
      codes: Code of each stored label.
      names: Name of each stored source.
      vocabulary: The labels to map to; None takes all labels of the dataset.

    Raises:
      InputError: If the dataset has no code of the vocabulary, or an unknown source.
    """
    vocabulary = vocabulary or Vocabulary(tuple(codes), tuple(codes))
    position = vocabulary.index()
    labels = np.array([position.get(code, -1) for code in codes], np.int32)
    if not np.any(labels >= 0):
        raise InputError(
            f"none of the {len(vocabulary)} label codes (such as {vocabulary.codes[0]}"
            f") is among the dataset's (such as {codes[0]}); give a label file with "
            "Open Images codes"
        )
    unknown = [name for name in names if name not in _SOURCES]
    if unknown:
        raise InputError(
            f"the dataset has the label source {unknown[0]!r}; known: "
            f"{', '.join(_SOURCES)}"
        )
    sources = np.array([_SOURCES[name] for name in names], np.uint8)
    return StoredLabels(labels, sources), vocabulary


def image_id(fields: Mapping) -> str:
    """Returns the id of a stored record: its file name without the suffix."""
    return PurePosixPath(schema.text(fields, "image/filename")).stem


def labels(
    fields: Mapping, mapping: StoredLabels
) -> tuple[
    Int[np.ndarray, " label"], Float[np.ndarray, " label"], UInt8[np.ndarray, " label"]
]:
    """Returns vocabulary indices, confidences and sources of a stored record."""
    ids = mapping.labels[schema.integers(fields, f"{LABELS}/label")]
    confidences = schema.integers(fields, f"{LABELS}/confidence").astype(np.float32)
    sources = mapping.sources[schema.integers(fields, f"{LABELS}/source")]
    known = ids >= 0
    return ids[known], confidences[known] / np.float32(10.0), sources[known]


def decode(fields: Mapping, *, mapping: StoredLabels) -> dict[str, Any]:
    """Returns a stored record as `records.RandomAccess` describes it."""
    ids, confidences, sources = labels(fields, mapping)
    return {
        "image": fields["image"].bytes_list.value[0],
        "image_id": image_id(fields),
        "label_ids": ids,
        "label_confidences": confidences,
        "label_sources": sources,
        "slice_id": 0,
    }


def scan(
    records: ArrayRecordDataSource,
    mapping: StoredLabels,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> pl.DataFrame:
    """Reads every record once and returns the index table of a split.

    Args:
      records: The stored bytes; read by several threads.
      mapping: From `read_mapping`.
      on_progress: Called with (records done, records in all).
    """

    def chunk(start: int):
        rows = range(start, min(start + _CHUNK, len(records)))
        parsed = [schema.parse(records[row]) for row in rows]
        return [(image_id(fields), *labels(fields, mapping)) for fields in parsed]

    found = []
    with ThreadPoolExecutor(8) as pool:
        for part in pool.map(chunk, range(0, len(records), _CHUNK)):
            found.extend(part)
            if on_progress is not None:
                on_progress(len(found), len(records))
    ids = [row[0] for row in found]
    offsets = np.zeros(len(found) + 1, np.int64)
    np.cumsum([len(row[1]) for row in found], out=offsets[1:])
    return index.table(
        image_ids=ids,
        groups=ids,
        domains=["all"] * len(ids),
        slices=["all"] * len(ids),
        offsets=offsets,
        label_ids=np.concatenate([np.zeros(0, np.int32), *(row[1] for row in found)]),
        confidences=np.concatenate(
            [np.zeros(0, np.float32), *(row[2] for row in found)]
        ),
        label_sources=np.concatenate(
            [np.zeros(0, np.uint8), *(row[3] for row in found)]
        ),
    )
