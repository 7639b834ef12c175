"""Throughput of the input pipeline on this machine."""

import time
from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np
import simplejpeg

from jaxii.data.labels import HUMAN
from jaxii.data.pipeline import LabelPolicy, ShardSpec, train_batches
from jaxii.data.records import RandomAccess
from jaxii.data.schema import Record
from jaxii.data.transforms import TrainTransform

# Photos as `prepare` stores them: short side 256, aspect ratio 4:3, quality 92.
HEIGHT, WIDTH, QUALITY = 256, 341, 92
NUM_IMAGES = 16


class Drawn:
    """In-memory records: noise with the power spectrum of photos."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self._encoded: Sequence[bytes] = [_image(rng) for _ in range(NUM_IMAGES)]

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, row: SupportsIndex, /) -> Record:
        return {
            "image": self._encoded[int(row) % NUM_IMAGES],
            "image_id": str(int(row)),
            "label_ids": np.array([0], np.int32),
            "label_confidences": np.array([1.0], np.float32),
            "label_sources": np.array([HUMAN], np.uint8),
            "slice_id": 0,
        }


def _image(rng: np.random.Generator) -> bytes:
    rows = np.fft.fftfreq(HEIGHT)[:, None] * HEIGHT
    columns = np.fft.rfftfreq(WIDTH)[None] * WIDTH
    fall = (np.hypot(rows, columns) + 1.0) ** -1.25
    phases = np.exp(2j * np.pi * rng.random((3, *fall.shape)))
    planes = np.fft.irfft2(phases * fall, s=(HEIGHT, WIDTH))
    image = np.clip(110 + 45 * planes / planes.std(), 0, 255).astype(np.uint8)
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(image.transpose(1, 2, 0)),
        quality=QUALITY,
        colorsubsampling="420",
    )


def input_speed(
    source: RandomAccess, transform: TrainTransform, num_threads: int, seconds: float
) -> float:
    """Returns images per second of the input pipeline in steady state.

    Args:
      source: Records to decode.
      transform: The training transform.
      num_threads: Threads that read and decode.
      seconds: Duration of the measurement.
    """
    size = 64
    batches = train_batches(
        source,
        transform=transform,
        policy=LabelPolicy(num_slots=8),
        shard=ShardSpec(global_batch_size=size, num_threads=num_threads),
        seed=0,
    )
    # Skip the batches that were prefetched before the clock starts.
    for _ in range(4):
        next(batches)
    done, start = 0, time.perf_counter()
    while (taken := time.perf_counter() - start) < seconds or not done:
        next(batches)
        done += size
    return done / taken
