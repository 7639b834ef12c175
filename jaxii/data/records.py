"""Access to stored records by position."""

from collections.abc import Callable
from typing import Protocol, SupportsIndex, runtime_checkable

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from google.protobuf.message import DecodeError
from jaxtyping import Int64, Shaped

from jaxii.data import schema
from jaxii.data.folder import PREPARE_AGAIN
from jaxii.data.schema import Record
from jaxii.errors import InputError


@runtime_checkable
class RandomAccess(Protocol):
    """Picklable, thread-safe access to records by position, as grain requires."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: SupportsIndex, /) -> Record: ...


class Selectable(RandomAccess, Protocol):
    """Records that can be selected by row."""

    def select(self, rows: Int64[np.ndarray, " chosen"]) -> "Selectable":
        """Returns the records of these rows, in the given order."""
        ...


class Records:
    """Records of a split by position; satisfies `RandomAccess`.

    Args:
      raw: The stored bytes of the split.
      decode: Turns parsed fields into a record; picklable.
      image_ids: Expected ids of all stored records. Reading another id raises
        InputError.
      name: Name of the split in error messages.
      rows: The stored rows in use, in order. None uses all.
    """

    def __init__(
        self,
        raw: ArrayRecordDataSource,
        decode: Callable[[schema.Fields], Record],
        image_ids: Shaped[np.ndarray, " stored"],
        name: str,
        rows: Int64[np.ndarray, " row"] | None = None,
    ):
        self._raw = raw
        self._decode = decode
        self._image_ids = image_ids
        self._name = name
        self._rows = rows

    def __len__(self) -> int:
        return len(self._raw) if self._rows is None else len(self._rows)

    def __getitem__(self, row: SupportsIndex, /) -> Record:
        position = row.__index__()
        if not 0 <= position < len(self):
            raise IndexError(
                f"record {position} is out of range for {len(self)} records"
            )
        stored = position if self._rows is None else int(self._rows[position])
        try:
            record = self._decode(schema.parse(self._raw[stored]))
        # Raised by ArrayRecord for wrong checksums and truncated files, and by the
        # parser for damaged messages.
        except (RuntimeError, ValueError, IndexError, OSError, DecodeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"{self._name}: record {stored} cannot be read ({reason}); "
                f"{PREPARE_AGAIN}"
            ) from error
        if record["image_id"] != self._image_ids[stored]:
            raise InputError(
                f"{self._name}: record {stored} holds image {record['image_id']}, but "
                f"the index lists {self._image_ids[stored]}; {PREPARE_AGAIN}"
            )
        return record

    def select(self, rows: Int64[np.ndarray, " chosen"]) -> "Records":
        """Returns the records of these rows, in the given order."""
        chosen = np.asarray(rows, np.int64) if self._rows is None else self._rows[rows]
        return Records(self._raw, self._decode, self._image_ids, self._name, chosen)

    def __repr__(self) -> str:
        return f"Records({self._name}, num_records={len(self)})"
