"""Stored records by position, as grain asks for them.

`sources` makes one of these a split; `pipeline` hands it to grain, which pickles it to
its workers and reads it from many threads. Only the rows asked for are read.
"""

from typing import Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from google.protobuf.message import DecodeError
from jaxtyping import Int64, Shaped

from jaxii.data import open_images_v4, schema
from jaxii.data.folder import PREPARE_AGAIN
from jaxii.errors import InputError


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
      image_ids: of all stored records; one that has another id raises InputError.
      name: of the split, for errors.
      rows: which records, in which order; None: all.
    """

    def __init__(
        self,
        raw: ArrayRecordDataSource,
        slices: tuple[str, ...],
        image_ids: Shaped[np.ndarray, " stored"],
        name: str,
        rows: Int64[np.ndarray, " row"] | None = None,
    ):
        self._raw = raw
        self._slices = slices
        self._slice_ids = {name: i for i, name in enumerate(slices)}
        self._image_ids = image_ids
        self._name = name
        self._rows = rows

    def __len__(self) -> int:
        return len(self._raw) if self._rows is None else len(self._rows)

    def __getitem__(self, row: SupportsIndex, /) -> dict[str, Any]:
        stored = _stored(row, self._rows, len(self))
        fields = _fields(self._raw, stored, self._name)
        image_id = schema.text(fields, "image_id")
        _check_id(image_id, stored, self._image_ids, self._name)
        return {
            "image": fields["image"].bytes_list.value[0],
            "image_id": image_id,
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
        chosen = _select(self._rows, rows)
        return Records(self._raw, self._slices, self._image_ids, self._name, chosen)

    def __repr__(self) -> str:
        return f"Records({self._name}, num_records={len(self)})"


class OpenImagesV4Records:
    """Records of TFDS's `open_images_v4`, by position; satisfies `RandomAccess`.

    Args:
      raw: the stored bytes of a split.
      mapping: from the stored numbers to ours.
      image_ids: of all stored records; one that has another id raises InputError.
      name: of the split, for errors.
      rows: which records, in which order; None: all.
    """

    def __init__(
        self,
        raw: ArrayRecordDataSource,
        mapping: open_images_v4.StoredLabels,
        image_ids: Shaped[np.ndarray, " stored"],
        name: str,
        rows: Int64[np.ndarray, " row"] | None = None,
    ):
        self._raw = raw
        self._mapping = mapping
        self._image_ids = image_ids
        self._name = name
        self._rows = rows

    def __len__(self) -> int:
        return len(self._raw) if self._rows is None else len(self._rows)

    def __getitem__(self, row: SupportsIndex, /) -> dict[str, Any]:
        stored = _stored(row, self._rows, len(self))
        fields = _fields(self._raw, stored, self._name)
        image_id = open_images_v4.image_id(fields)
        _check_id(image_id, stored, self._image_ids, self._name)
        ids, confidences, label_sources = open_images_v4.labels(fields, self._mapping)
        return {
            "image": fields["image"].bytes_list.value[0],
            "image_id": image_id,
            "label_ids": ids,
            "label_confidences": confidences,
            "label_sources": label_sources,
            "slice_id": 0,
        }

    def select(self, rows: Int64[np.ndarray, " chosen"]) -> "OpenImagesV4Records":
        """Returns these records only, in this order."""
        return OpenImagesV4Records(
            self._raw,
            self._mapping,
            self._image_ids,
            self._name,
            _select(self._rows, rows),
        )

    def __repr__(self) -> str:
        return f"OpenImagesV4Records({self._name}, num_records={len(self)})"


def _stored(row: SupportsIndex, rows, length: int) -> int:
    position = row.__index__()
    if not 0 <= position < length:
        raise IndexError(f"record {position} of {length}")
    return position if rows is None else int(rows[position])


def _select(rows, chosen):
    return np.asarray(chosen, np.int64) if rows is None else rows[chosen]


def _fields(raw: ArrayRecordDataSource, stored: int, name: str) -> schema.Fields:
    try:
        return schema.parse(raw[stored])
    # Of ArrayRecord (a checksum that differs, a file cut short) and of the parser.
    except (RuntimeError, ValueError, IndexError, OSError, DecodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{name}: record {stored} cannot be read ({reason}); {PREPARE_AGAIN}"
        ) from error


def _check_id(image_id: str, stored: int, image_ids: np.ndarray, name: str) -> None:
    if image_id != image_ids[stored]:
        raise InputError(
            f"{name}: record {stored} is of image {image_id} and its index says "
            f"{image_ids[stored]}; {PREPARE_AGAIN}"
        )
