"""Turns records into batches: shuffles, shards, decodes, fills label slots and pads.

The examples of step n depend only on the configuration and n, for any number of
processes; evaluation yields each record once.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import SupportsIndex, cast

import cv2
import grain
import numpy as np
from jaxtyping import Bool, Float32, Int, Int32

from jaxii.data import batching
from jaxii.data.batching import Example
from jaxii.data.labels import resolve_labels
from jaxii.data.records import RandomAccess
from jaxii.data.schema import Record
from jaxii.data.transforms import EvalTransform, Pixels
from jaxii.errors import InputError

# Batch field: row of the split. The train step ignores it.
INDEX = "index"
# Batch field: position in the run, which seeds randomness on the device.
POSITIONS = "positions"
PADDING = -1


class DamagedImage(InputError, ValueError):
    """A stored image cannot be decoded."""


@dataclass(frozen=True, kw_only=True)
class LabelPolicy:
    """How labels of a record fill the slots of a batch; see `labels.resolve_labels`.

    An image with more labels than slots keeps the labels of highest confidence, and the
    lower ids among labels of equal confidence.
    """

    num_slots: int
    machine_labels: str = "ignored"
    machine_threshold: float = 0.5

    def slots(
        self, record: Record
    ) -> tuple[Int32[np.ndarray, " slot"], Float32[np.ndarray, " slot"]]:
        """Returns label ids, padded with -1, and their confidences."""
        ids, confidences = resolve_labels(
            record["label_ids"],
            record["label_confidences"],
            record["label_sources"],
            machine_labels=self.machine_labels,
            machine_threshold=self.machine_threshold,
        )
        if len(ids) > self.num_slots:
            kept = np.argsort(-confidences, kind="stable")[: self.num_slots]
            ids, confidences = ids[kept], confidences[kept]
        slots = np.full(self.num_slots, PADDING, np.int32)
        values = np.zeros(self.num_slots, np.float32)
        slots[: len(ids)] = ids
        values[: len(ids)] = confidences
        return slots, values


@dataclass(frozen=True, kw_only=True)
class ShardSpec:
    """This process's part of every global batch.

    Attributes:
      global_batch_size: Examples per step, over all processes.
      process_index: Number of this process.
      process_count: Number of processes; divides `global_batch_size`.
      num_threads: Threads that read and decode.
    """

    global_batch_size: int
    process_index: int = 0
    process_count: int = 1
    num_threads: int = 4

    @property
    def process_batch_size(self) -> int:
        return self.global_batch_size // self.process_count

    def position(self, example: int) -> int:
        """Returns the position of this process's example among those of all processes.

        A process takes a contiguous block of each global batch, so devices get the same
        examples for any number of processes.
        """
        batch, row = divmod(example, self.process_batch_size)
        first = self.process_index * self.process_batch_size
        return batch * self.global_batch_size + first + row


def train_batches(
    source: RandomAccess,
    *,
    transform: Callable[[bytes, np.random.Generator], Pixels],
    policy: LabelPolicy,
    shard: ShardSpec,
    seed: int,
    start_example: int = 0,
    name: str = "dataset",
) -> Iterator[dict[str, np.ndarray]]:
    """Yields shuffled, augmented batches without end, starting at any example.

    Args:
      source: The training split.
      transform: Makes pixels [size, size, 3] from an encoded image and an rng.
      policy: Fills the label slots.
      shard: This process's part.
      seed: Seed of the order of each epoch, and of the augmentation, which depends on
        (seed, position in the run).
      start_example: Number of examples that the run has used, over all processes.
      name: Name of the source in error messages.

    Yields:
      Batches of `process_batch_size` examples: images, label_ids, label_confidences,
      mask, slice_ids, index (row of the split) and positions (in the run).

    Raises:
      DamagedImage: While iterating, if an image cannot be decoded.
    """

    def example(item: tuple[int, int], rng: np.random.Generator) -> Example:
        position, index = item
        record = source[index]
        pixels = _pixels(name, record, transform, rng)
        # Wraps after 2^31 examples: accelerators count in int32.
        place = {POSITIONS: np.int32(position % 2**31)}
        return _example(index, record, pixels, policy) | place

    # Shuffles before sharding, or each process would see the same part of the data in
    # every epoch. Shuffles row numbers, because grain would count the bytes of records.
    rows = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    rows = rows.map_with_index(lambda position, row: (position, row))
    everything = rows.random_map(example)

    def own(number: int) -> Example:
        # The dataset is infinite.
        return cast(Example, everything[start_example + shard.position(number)])

    return _batches(own, sys.maxsize // shard.process_batch_size, shard)


def eval_batches(
    source: RandomAccess,
    *,
    transform: EvalTransform,
    policy: LabelPolicy,
    shard: ShardSpec,
    scored: Bool[np.ndarray, " row"] | None = None,
    mask_damaged: bool = False,
    name: str = "dataset",
) -> Iterator[dict[str, np.ndarray]]:
    """Yields every record once, in order; the last batch is padded.

    Args:
      source: The split.
      transform: Makes pixels from an encoded image.
      policy: Fills the label slots.
      shard: This process's part; all processes yield the same number of batches.
      scored: Whether each record counts in metrics; others get mask 0. None: all do.
      mask_damaged: Whether damaged images get mask 0 instead of raising DamagedImage.
      name: Name of the source in error messages.

    Yields:
      Batches like `train_batches`; padding has mask 0 and index -1.

    Raises:
      DamagedImage: While iterating, if an image cannot be decoded.
    """
    length = len(source)
    blank = _blank(transform.size_pixels, policy.num_slots)

    def example(number: int) -> Example:
        position = shard.position(number)
        if position >= length:
            return blank
        try:
            record = source[position]
            pixels = _pixels(name, record, transform)
        except ValueError:
            if not mask_damaged:
                raise
            return {**blank, INDEX: np.int32(position)}
        mask = np.float32(scored is None or scored[position])
        return _example(position, record, pixels, policy) | {"mask": mask}

    return _batches(example, -(-length // shard.global_batch_size), shard)


@dataclass(frozen=True)
class Reordered:
    """Some rows of a source, in the order of `rows`."""

    source: RandomAccess
    rows: Int[np.ndarray, " row"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: SupportsIndex, /) -> Record:
        return self.source[int(self.rows[row])]


def _pixels(
    name: str,
    record: Record,
    transform: Callable[..., Pixels],
    *args: np.random.Generator,
) -> Pixels:
    try:
        return transform(record["image"], *args)
    except ValueError as error:
        raise DamagedImage(
            f"{name}: image {record['image_id']} cannot be decoded ({error}); restore "
            "the dataset from a copy, or create it with `python -m jaxii.main prepare`,"
            " which leaves out damaged images."
        ) from error


def _example(index, record, pixels, policy) -> Example:
    label_ids, label_confidences = policy.slots(record)
    return {
        "images": pixels,
        "label_ids": label_ids,
        "label_confidences": label_confidences,
        "mask": np.float32(1.0),
        "slice_ids": np.int32(record["slice_id"]),
        INDEX: np.int32(index),
    }


def _blank(size_pixels: int, num_slots: int) -> Example:
    """Returns a padding example."""
    return {
        "images": np.zeros((size_pixels, size_pixels, 3), np.uint8),
        "label_ids": np.full(num_slots, PADDING, np.int32),
        "label_confidences": np.zeros(num_slots, np.float32),
        "mask": np.float32(0.0),
        "slice_ids": np.int32(0),
        INDEX: np.int32(PADDING),
    }


def _batches(
    example: Callable[[int], Example], num_batches: int, shard: ShardSpec
) -> Iterator[dict[str, np.ndarray]]:
    # OpenCV's threads would compete with grain's.
    cv2.setNumThreads(1)
    return batching.batches(
        example,
        num_batches=num_batches,
        batch_size=shard.process_batch_size,
        num_threads=shard.num_threads,
    )
