"""Threads write examples into batches, whose memory is reused.

A batch of 256 images takes 38 MB. The system clears new memory page by page, which took
60 of the 760 microseconds per image; with memory reused once nothing refers to a batch,
20 of 700.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

# Most examples per task of a thread. A task costs grain 0.1 ms under the interpreter
# lock: with one example per task, half of the decoding time on two cores.
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
      example: Returns the example of a number, with the same fields and shapes each
        time. Called in any thread and any order.
      num_batches: Number of batches.
      batch_size: Examples per batch.
      num_threads: Number of threads that call `example`.

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
    """Batches that are being filled, by number."""

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._lock = threading.Lock()
        self._memory: dict[str, Memory] = {}
        self._batches: dict[int, dict[str, np.ndarray]] = {}

    def write(self, batch: int, row: int, example: Example) -> None:
        """Writes a row of a batch."""
        with self._lock:
            if batch not in self._batches:
                self._batches[batch] = {
                    name: self._field(name, np.asarray(value)).array()
                    for name, value in example.items()
                }
            fields = self._batches[batch]
        # All fields are written, as the memory holds an earlier batch.
        for name, values in fields.items():
            value = example[name]
            # NumPy would broadcast a smaller value.
            if np.shape(value) != values.shape[1:]:
                raise ValueError(
                    f"{name} has shape {np.shape(value)}, in other examples of the "
                    f"batch {values.shape[1:]}"
                )
            values[row] = value

    def take(self, batch: int) -> dict[str, np.ndarray]:
        """Returns a complete batch."""
        with self._lock:
            return self._batches.pop(batch)

    def _field(self, name: str, value: np.ndarray) -> "Memory":
        if name not in self._memory:
            shape = self._batch_size, *value.shape
            self._memory[name] = Memory(shape, value.dtype)
        return self._memory[name]


class Memory:
    """Allocates arrays of one shape and dtype in the memory of deleted ones."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype):
        self._shape = shape
        self._dtype = dtype
        self._free: list[np.ndarray] = []

    def array(self) -> np.ndarray:
        """Returns an array with undefined contents."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(self._shape, self._dtype)
        return np.asarray(_Lease(memory, self._free))


class _Lease:
    """Kept alive by an array and all of its views; then returns the memory.

    A view of a view refers to the first *array* of the chain, but never to objects
    beyond it. The lease is no array, and so outlives all views, and a jax.Array on the
    CPU that shares their memory.
    """

    def __init__(self, memory: np.ndarray, free: list[np.ndarray]):
        self.__array_interface__ = memory.__array_interface__
        self._memory = memory
        self._free = free

    def __del__(self) -> None:
        self._free.append(self._memory)
