"""Fills batches of examples in threads and reuses the memory of discarded batches."""

import threading
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

# Most examples per task of a thread. grain needs 0.1 ms per task under the GIL: a task
# per example would cost half as much as decoding on two cores.
BLOCK_EXAMPLES = 16

# Arrays and NumPy scalars of one image, by name.
Example = dict[str, np.ndarray | np.generic]


def batches(
    example: Callable[[int], Example],
    *,
    num_batches: int,
    batch_size: int,
    num_threads: int,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches of the examples 0, 1, 2, ..., prefetched by threads.

    Args:
      example: Returns an example, given its number. Threads call it in any order;
        each field must have the same shape in all examples.
      num_batches: Number of batches.
      batch_size: Examples per batch.
      num_threads: Number of threads.
    """
    num_blocks = min(batch_size, max(num_threads, -(-batch_size // BLOCK_EXAMPLES)))
    borders = [batch_size * block // num_blocks for block in range(num_blocks + 1)]
    unfinished = _Unfinished(batch_size)

    def block(number: int) -> int:
        batch, place = divmod(number, num_blocks)
        for row in range(borders[place], borders[place + 1]):
            unfinished.write(batch, row, example(batch * batch_size + row))
        return batch

    def whole(numbers: Sequence[int]) -> dict[str, np.ndarray]:
        return unfinished.take(numbers[0])

    options = grain.ReadOptions(
        num_threads=num_threads,
        # Prefetches two batches, so that slow images do not delay the step.
        prefetch_buffer_size=2 * num_blocks,
    )
    blocks = grain.MapDataset.range(num_batches * num_blocks).map(block)
    rows = blocks.to_iter_dataset(options)
    return iter(rows.batch(num_blocks, drop_remainder=True, batch_fn=whole))


class _Unfinished:
    """Batches that threads are filling, by number."""

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._lock = threading.Lock()
        self._memory: dict[str, Memory] = {}
        self._batches: dict[int, dict[str, np.ndarray]] = {}

    def write(self, batch: int, row: int, example: Example) -> None:
        with self._lock:
            if batch not in self._batches:
                self._batches[batch] = {
                    name: self._array(name, np.asarray(value))
                    for name, value in example.items()
                }
            fields = self._batches[batch]
        # Writes every field: reused memory holds an earlier batch.
        for name, values in fields.items():
            value = example[name]
            # NumPy would broadcast a smaller value.
            if np.shape(value) != values.shape[1:]:
                raise ValueError(
                    f"{name} has shape {np.shape(value)}; other examples of the batch "
                    f"have shape {values.shape[1:]}"
                )
            values[row] = value

    def take(self, batch: int) -> dict[str, np.ndarray]:
        with self._lock:
            return self._batches.pop(batch)

    def _array(self, name: str, value: np.ndarray) -> np.ndarray:
        if name not in self._memory:
            shape = self._batch_size, *value.shape
            self._memory[name] = Memory(shape, value.dtype)
        return self._memory[name].array()


class Memory:
    """Allocates arrays of one shape and type, and reuses the memory of freed ones.

    A batch of 256 images takes 38 MB. Allocating new memory takes 60 of the 760
    microseconds per image; reusing memory takes 20 of 700.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype):
        self._shape = shape
        self._dtype = dtype
        self._free: list[np.ndarray] = []

    def array(self) -> np.ndarray:
        """Returns an array with undefined contents that nothing else refers to."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(self._shape, self._dtype)
        return np.asarray(_Lease(memory, self._free))


class _Lease:
    """Returns memory to the free list when the last view of it is deleted.

    NumPy shortens the chain of bases of a view only within arrays. The lease is not an
    array, so every view, and a jax.Array that shares the memory on CPU, keeps it alive.
    """

    def __init__(self, memory: np.ndarray, free: list[np.ndarray]):
        self.__array_interface__ = memory.__array_interface__
        self._memory = memory
        self._free = free

    def __del__(self) -> None:
        self._free.append(self._memory)
