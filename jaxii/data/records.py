"""Stored records by position, as grain asks for them.

`sources` makes one of these a split; `pipeline` hands it to grain, which pickles it to
its workers and reads it from many threads. Only the rows asked for are read.
"""

from typing import Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from jaxtyping import Int64

from jaxii.data import open_images_v4, schema


@runtime_checkable
class RandomAccess(Protocol):
    """What grain asks of a source: records by position; picklable and thread-safe.

    A record is a dict: image (JPEG bytes), image_id (str), label_ids (int32 [n]),
    label_confidences (float32 [n]), label_sources (uint8 [n]), slice_id (int).
    """

    def __len__(self) -> int: ...

    def __getitem__(self, row: SupportsIndex, /) -> dict[str, Any]: ...


class Records:
    """Records of our own schema, by position; satisfies `RandomAccess`.

    Args:
      raw: the stored bytes of a split.
      slices: the dataset's slices, for `slice_id`.
      rows: which records, in which order; None: all.
    """

    def __init__(
        self,
        raw: ArrayRecordDataSource,
        slices: tuple[str, ...],
        rows: Int64[np.ndarray, " row"] | None = None,
    ):
        self._raw = raw
        self._slices = slices
        self._slice_ids = {name: i for i, name in enumerate(slices)}
        self._rows = rows

    def __len__(self) -> int:
        return len(self._raw) if self._rows is None else len(self._rows)

    def __getitem__(self, row: SupportsIndex, /) -> dict[str, Any]:
        fields = schema.parse(self._raw[_stored(row, self._rows, len(self))])
        return {
            "image": fields["image"].bytes_list.value[0],
            "image_id": schema.text(fields, "image_id"),
            "label_ids": np.array(fields["label_ids"].int64_list.value, np.int32),
            "label_confidences": np.array(
                fields["label_confidences"].float_list.value, np.float32
            ),
            "label_sources": np.array(
                fields["label_sources"].int64_list.value, np.uint8
            ),
            "slice_id": self._slice_ids[schema.text(fields, "slice")],
        }

    def select(self, rows: Int64[np.ndarray, " chosen"]) -> "Records":
        """Returns these records only, in this order."""
        return Records(self._raw, self._slices, _select(self._rows, rows))

    def __repr__(self) -> str:
        return f"Records({self._raw!r}, num_records={len(self)})"


class OpenImagesV4Records:
    """Records of TFDS's `open_images_v4`, by position; satisfies `RandomAccess`.

    Args:
      raw: the stored bytes of a split.
      mapping: from the stored numbers to ours.
      rows: which records, in which order; None: all.
    """

    def __init__(
        self,
        raw: ArrayRecordDataSource,
        mapping: open_images_v4.StoredLabels,
        rows: Int64[np.ndarray, " row"] | None = None,
    ):
        self._raw = raw
        self._mapping = mapping
        self._rows = rows

    def __len__(self) -> int:
        return len(self._raw) if self._rows is None else len(self._rows)

    def __getitem__(self, row: SupportsIndex, /) -> dict[str, Any]:
        fields = schema.parse(self._raw[_stored(row, self._rows, len(self))])
        ids, confidences, label_sources = open_images_v4.labels(fields, self._mapping)
        return {
            "image": fields["image"].bytes_list.value[0],
            "image_id": open_images_v4.image_id(fields),
            "label_ids": ids,
            "label_confidences": confidences,
            "label_sources": label_sources,
            "slice_id": 0,
        }

    def select(self, rows: Int64[np.ndarray, " chosen"]) -> "OpenImagesV4Records":
        """Returns these records only, in this order."""
        return OpenImagesV4Records(self._raw, self._mapping, _select(self._rows, rows))

    def __repr__(self) -> str:
        return f"OpenImagesV4Records({self._raw!r}, num_records={len(self)})"


def _stored(row: SupportsIndex, rows, length: int) -> int:
    position = row.__index__()
    if not 0 <= position < length:
        raise IndexError(f"record {position} of {length}")
    return position if rows is None else int(rows[position])


def _select(rows, chosen):
    return np.asarray(chosen, np.int64) if rows is None else rows[chosen]
