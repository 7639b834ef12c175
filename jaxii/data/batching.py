"""Threads write examples into batches, whose memory is used again.

Inside `pipeline`, which says what example a number is. A batch of 256 images takes 38
MB. The system hands new memory over page by page, cleared, and that took 60 of the 760
microseconds of an image; it takes 20 of 700 now that pixels go to where those of an
earlier batch were, as soon as nothing refers to them any more.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

# What a thread makes in one go, at most. Handing over costs grain 0.1 ms with the
# interpreter locked: example by example, as much as half of the decoding on two cores.
BLOCK_EXAMPLES = 16

# One image of a batch: arrays and NumPy scalars by name.
Example = dict[str, Any]


def batches(
    example: Callable[[int], Example],
    *,
    num_batches: int,
    batch_size: int,
    num_threads: int,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches of the examples 0, 1, 2, ..., made ahead by threads.

    Args:
      example: from its number, in any thread and any order; the same fields of the
        same shapes each time.
      num_batches: how many batches.
      batch_size: examples each.
      num_threads: that call `example`, a block of numbers at a time.

    Yields:
      The fields of `batch_size` examples, one row each.
    """
    num_blocks = min(batch_size, max(num_threads, -(-batch_size // BLOCK_EXAMPLES)))
    borders = [batch_size * block // num_blocks for block in range(num_blocks + 1)]
    begun = _Begun(batch_size)

    def block(number: int) -> int:
        batch, place = divmod(number, num_blocks)
        for row in range(borders[place], borders[place + 1]):
            begun.write(batch, row, example(batch * batch_size + row))
        return batch

    def whole(numbers: Sequence[int]) -> dict[str, np.ndarray]:
        return begun.take(numbers[0])

    options = grain.ReadOptions(
        num_threads=num_threads,
        # Two batches ahead, so that slow images do not stop the step.
        prefetch_buffer_size=2 * num_blocks,
    )
    blocks = grain.MapDataset.range(num_batches * num_blocks).map(block)
    rows = blocks.to_iter_dataset(options)
    return iter(rows.batch(num_blocks, drop_remainder=True, batch_fn=whole))


class _Begun:
    """The batches that are being filled, by number."""

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._lock = threading.Lock()
        self._memory: dict[str, Memory] = {}
        self._batches: dict[int, dict[str, np.ndarray]] = {}

    def write(self, batch: int, row: int, example: Example) -> None:
        """Writes a row of a batch, which begins with the first of its rows."""
        with self._lock:
            if batch not in self._batches:
                self._batches[batch] = {
                    name: self._field(name, np.asarray(value)).array()
                    for name, value in example.items()
                }
            fields = self._batches[batch]
        # Every field: the memory still holds an earlier batch.
        for name, values in fields.items():
            value = example[name]
            # NumPy would repeat a smaller one until it fills the row.
            if np.shape(value) != values.shape[1:]:
                raise ValueError(
                    f"{name} has shape {np.shape(value)}, in other examples of the "
                    f"batch {values.shape[1:]}"
                )
            values[row] = value

    def take(self, batch: int) -> dict[str, np.ndarray]:
        """Returns a batch all of whose rows have been written."""
        with self._lock:
            return self._batches.pop(batch)

    def _field(self, name: str, value: np.ndarray) -> "Memory":
        if name not in self._memory:
            shape = self._batch_size, *value.shape
            self._memory[name] = Memory(shape, value.dtype)
        return self._memory[name]


class Memory:
    """Arrays of one shape, in the memory of those that are gone.

    Args:
      shape: of each array.
      dtype: of each array.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype):
        self._shape = shape
        self._dtype = dtype
        self._free: list[np.ndarray] = []

    def array(self) -> np.ndarray:
        """Returns an array that nothing else refers to; its contents are undefined."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(self._shape, self._dtype)
        return np.asarray(_Lease(memory, self._free))


class _Lease:
    """What an array and all of its views keep alive; gives the memory back.

    NumPy makes a view of a view refer to the first *array* of the chain, and stops at
    anything else: so a lease outlives them all, and whatever they were handed to (a
    jax.Array on the CPU may share the memory of the array it was made of).
    """

    def __init__(self, memory: np.ndarray, free: list[np.ndarray]):
        self.__array_interface__ = memory.__array_interface__
        self._memory = memory
        self._free = free

    def __del__(self) -> None:
        self._free.append(self._memory)
