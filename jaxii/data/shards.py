"""Writes the ArrayRecord shards of a split: read, recode, serialize, one pass.

Threads share the work a shard at a time (decoding, resizing and encoding release the
interpreter lock). A finished shard is final: it appears under its name only when whole,
and a later run skips it. `open_images` plans the images and their labels, and completes
the dataset around the shards.
"""

import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from jaxii.data import schema
from jaxii.data.recode import recode
from jaxii.files import write_json

SHARD_IMAGES = 1024
MAX_SHARDS = 512
# Other I/O errors (a lost network disk) end the run, to be resumed: they are not the
# picture's fault.
_UNREADABLE = (FileNotFoundError, IsADirectoryError, PermissionError)
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Plan:
    """The images of a split, in the order of their records.

    Args:
      split: its name.
      image_ids: text; one an image, as are `paths`, `groups`, `domains` and `slices`.
      paths: where the picture is.
      sizes: bytes of its file.
      groups: see `schema`.
      domains: see `schema`.
      slices: see `schema`.
      offsets: int64; entries offsets[i]:offsets[i + 1] are the labels of image i.
      label_ids: int32.
      confidences: float32.
      label_sources: uint8.
    """

    split: str
    image_ids: Sequence[str]
    paths: Sequence[Path]
    sizes: Sequence[int]
    groups: Sequence[str]
    domains: Sequence[str]
    slices: Sequence[str]
    offsets: np.ndarray
    label_ids: np.ndarray
    confidences: np.ndarray
    label_sources: np.ndarray

    def __len__(self) -> int:
        return len(self.image_ids)

    def shards(self) -> list[range]:
        """Returns the rows of each shard: 1,024 images, more where there are many."""
        # Every open shard costs a file handle for as long as training runs.
        size = max(SHARD_IMAGES, -(-len(self) // MAX_SHARDS))
        rows = range(len(self))
        return [rows[i : i + size] for i in range(0, len(self), size)]


@dataclass(frozen=True)
class Written:
    """What became of a split.

    Args:
      rows: rows of the plan that became records, ascending.
      shard_lengths: records in each shard.
      num_bytes: of all shards.
      faults: row -> why its picture could not be used.
    """

    rows: np.ndarray
    shard_lengths: list[int]
    num_bytes: int
    faults: dict[int, str]


def shard_path(directory: Path, split: str, shard: int, num_shards: int) -> Path:
    """Returns where TFDS looks for a shard."""
    name = f"{schema.NAME}-{split}.array_record-{shard:05d}-of-{num_shards:05d}"
    return directory / name


def write(
    directory: Path,
    plan: Plan,
    *,
    short_side: int,
    num_workers: int | None = None,
    on_progress: Progress | None = None,
) -> Written:
    """Writes the shards of a split that are not there yet.

    Args:
      directory: exists; holds shards of the same plan or none.
      plan: the images.
      short_side: pixels, see `recode`.
      num_workers: threads; default: the processor cores this process may use.
      on_progress: called from this thread with (images done, images in all, split).

    Returns:
      What was written, now or before.
    """
    shards = plan.shards()
    workers = num_workers or _num_cores()
    done = _Counter()
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # one core a worker; OpenCV would start its own for each
    pool = ThreadPoolExecutor(max_workers=max(1, min(workers, len(shards))))
    try:
        futures = [
            pool.submit(_shard, directory, plan, rows, i, len(shards), short_side, done)
            for i, rows in enumerate(shards)
        ]
        pending = set(futures)
        while pending:
            finished, pending = wait(pending, timeout=0.2)
            for future in finished:
                future.result()
            if on_progress is not None:
                on_progress(done.value, len(plan), plan.split)
        parts = [future.result() for future in futures]
    finally:
        done.stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
        cv2.setNumThreads(threads)
    faults = {row: why for part in parts for row, why in part["faults"]}
    paths = [
        shard_path(directory, plan.split, i, len(shards)) for i in range(len(parts))
    ]
    return Written(
        rows=np.array([row for row in range(len(plan)) if row not in faults], np.int64),
        shard_lengths=[part["num_records"] for part in parts],
        num_bytes=sum(path.stat().st_size for path in paths),
        faults=faults,
    )


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Counter:
    """Images done, counted by all threads; and the sign to stop."""

    def __init__(self):
        self.value = 0
        self.lock = threading.Lock()
        self.stop = threading.Event()

    def add(self, number: int) -> None:
        with self.lock:
            self.value += number


class _Stopped(Exception):
    pass


def _shard(
    directory: Path,
    plan: Plan,
    rows: range,
    shard: int,
    num_shards: int,
    short_side: int,
    done: _Counter,
) -> dict:
    path = shard_path(directory, plan.split, shard, num_shards)
    account = path.with_name(path.name + ".json")
    if path.exists() and account.exists():
        done.add(len(rows))
        return json.loads(account.read_text())
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    faults: list[tuple[int, str]] = []
    # JPEG does not compress further: storing is faster to write and to read.
    writer = ArrayRecordWriter(os.fspath(part), "group_size:1,uncompressed")
    try:
        for row in rows:
            if done.stop.is_set():
                raise _Stopped
            try:
                data = recode(plan.paths[row].read_bytes(), short_side=short_side)
            except (ValueError, *_UNREADABLE) as error:
                faults.append((row, str(error)))
            else:
                writer.write(_record(plan, row, data))
            done.add(1)
    except BaseException:
        writer.close()
        part.unlink(missing_ok=True)
        raise
    writer.close()
    result = {"num_records": len(rows) - len(faults), "faults": faults}
    write_json(account, result)
    part.replace(path)
    return result


def _record(plan: Plan, row: int, image: bytes) -> bytes:
    labels = slice(plan.offsets[row], plan.offsets[row + 1])
    return schema.serialize(
        image=image,
        image_id=plan.image_ids[row],
        label_ids=plan.label_ids[labels],
        label_confidences=plan.confidences[labels],
        label_sources=plan.label_sources[labels],
        group=plan.groups[row],
        domain=plan.domains[row],
        slice_name=plan.slices[row],
    )
