"""Reads TFDS's `open_images_v4` in place: maps labels by code and builds an index.

Confidences are stored as integers from 0 to 10, labels as positions in a list of 7,186
codes. The order of that list differs from the order of Kaggle's 7,178 classes.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import polars as pl
from array_record.python.array_record_data_source import ArrayRecordDataSource
from jaxtyping import Float, Int, UInt8

from jaxii.data import index, schema
from jaxii.data.labels import BOX, HUMAN, MACHINE, Vocabulary
from jaxii.data.schema import Record
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
    """Maps stored label and source numbers to those of `labels`.

    Attributes:
      labels: Vocabulary id of each stored label, -1 if the vocabulary lacks it.
      sources: HUMAN, MACHINE or BOX of each stored source.
    """

    labels: Int[np.ndarray, " stored_label"]
    sources: UInt8[np.ndarray, " stored_source"]


def read_mapping(
    codes: Sequence[str], names: Sequence[str], vocabulary: Vocabulary | None
) -> tuple[StoredLabels, Vocabulary]:
    """Returns the mapping of stored numbers, and the vocabulary it maps to.

    Args:
      codes: Codes of the stored labels.
      names: Names of the stored sources.
      vocabulary: The requested labels; None uses all labels of the dataset.

    Raises:
      InputError: If the dataset has none of the labels, or an unknown source.
    """
    vocabulary = vocabulary or Vocabulary(tuple(codes), tuple(codes))
    position = vocabulary.index
    labels = np.array([position.get(code, -1) for code in codes], np.int32)
    if not np.any(labels >= 0):
        raise InputError(
            f"none of the {len(vocabulary)} label codes (such as {vocabulary.codes[0]}"
            f") is in the dataset, whose codes look like {codes[0]}; use a label file "
            "with Open Images codes"
        )
    unknown = [name for name in names if name not in _SOURCES]
    if unknown:
        raise InputError(
            f"the dataset has the unknown label source {unknown[0]!r}; supported "
            f"sources: {', '.join(_SOURCES)}"
        )
    sources = np.array([_SOURCES[name] for name in names], np.uint8)
    return StoredLabels(labels, sources), vocabulary


def image_id(fields: Mapping) -> str:
    return PurePosixPath(schema.text(fields, "image/filename")).stem


def labels(
    fields: Mapping, mapping: StoredLabels
) -> tuple[
    Int[np.ndarray, " label"], Float[np.ndarray, " label"], UInt8[np.ndarray, " label"]
]:
    """Returns vocabulary ids, confidences and sources of a stored record."""
    ids = mapping.labels[schema.integers(fields, f"{LABELS}/label")]
    confidences = schema.integers(fields, f"{LABELS}/confidence").astype(np.float32)
    sources = mapping.sources[schema.integers(fields, f"{LABELS}/source")]
    known = ids >= 0
    return ids[known], confidences[known] / np.float32(10.0), sources[known]


def decode(fields: Mapping, *, mapping: StoredLabels) -> Record:
    """Returns a record."""
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
    on_progress: Callable[[int, int], None],
) -> pl.DataFrame:
    """Returns the index table of a split after reading every record once."""

    def chunk(start: int):
        rows = range(start, min(start + _CHUNK, len(records)))
        parsed = [schema.parse(records[row]) for row in rows]
        return [(image_id(fields), *labels(fields, mapping)) for fields in parsed]

    found = []
    with ThreadPoolExecutor(8) as pool:
        for part in pool.map(chunk, range(0, len(records), _CHUNK)):
            found.extend(part)
            on_progress(len(found), len(records))
    ids, label_ids, confidences, sources = zip(*found, strict=True)
    offsets = np.cumsum([0, *map(len, label_ids)])
    return index.table(
        image_ids=ids,
        groups=ids,
        domains=["all"] * len(ids),
        slices=["all"] * len(ids),
        offsets=offsets,
        label_ids=np.concatenate(label_ids),
        confidences=np.concatenate(confidences),
        label_sources=np.concatenate(sources),
    )
