"""Measures the memory of the training input path over 100,000 images.

    python -m tests.benchmarks.input_memory

20,000 JPEGs with a short side of 256 are prepared first. A fresh process then takes
batches of 256 augmented images of 224 pixels from two threads and drops them. Every
2,560 images, it records its resident memory and the use of /dev/shm. The slope is that
of a line fitted to the records after the first 10,000 images, when all buffers are
full. The process does not import JAX, so its memory is that of the input path. Takes
two to three minutes.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np

from jaxii.data.dataset import open_dataset
from jaxii.data.pipeline import LabelPolicy, ShardSpec, train_batches
from jaxii.data.transforms import TrainTransform
from jaxii.prepare.kaggle import prepare
from jaxii.prepare.recode import recode
from tests.benchmarks import apart
from tests.benchmarks.images import jpeg, write_layout
from tests.benchmarks.table import Row, emit

BATCH, SIZE, THREADS = 256, 224, 2
BATCHES_A_NOTE = 10
WARM_UP_IMAGES = 10_000
NUM_IMAGES = 32
SHARED = "/dev/shm"


def resident_mb(process: int | str = "self") -> float:
    """Returns the resident memory of a process, by default this one."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1e3
    raise OSError(f"no VmRSS in /proc/{process}/status")


def follow(directory: str, images: int) -> None:
    """Prints (images, resident MB, MB in /dev/shm) of every record, as JSON."""
    batches = train_batches(
        open_dataset(directory).splits["train"].source,
        transform=TrainTransform(size_pixels=SIZE),
        policy=LabelPolicy(num_slots=8),
        shard=ShardSpec(global_batch_size=BATCH, num_threads=THREADS),
        seed=0,
    )
    notes = []
    for number in range(1, -(-images // BATCH) + 1):
        next(batches)
        if number % BATCHES_A_NOTE == 0:
            shared = shutil.disk_usage(SHARED).used / 1e6
            notes.append((number * BATCH, resident_mb(), shared))
    print(json.dumps(notes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--follow", help="a prepared dataset, for the measured process")
    args = parser.parse_args()
    if args.follow:
        follow(args.follow, args.images)
        return
    rng = np.random.default_rng(0)
    before = shutil.disk_usage(SHARED).used / 1e6
    with tempfile.TemporaryDirectory() as scratch:
        images = [recode(jpeg(rng)) for _ in range(NUM_IMAGES)]
        layout = write_layout(Path(scratch, "files"), images, args.files)
        out = Path(scratch, "out")
        prepare(layout, out)
        given = (f"--follow={out}", f"--images={args.images}")
        notes = np.array(apart.run_module("input_memory", *given))
    seen, resident, shared = notes[notes[:, 0] >= WARM_UP_IMAGES].T
    slope = np.polyfit(seen, resident, 1)[0] * 1e4
    print("MB after images: ", end="")
    print(", ".join(f"{row[1]:.0f} ({row[0]:,.0f})" for row in notes[::4]))
    what = f"input path over {args.images:,} images"
    emit(
        Row(
            f"{what}: growth of resident memory",
            f"{resident[0]:.0f} to {resident[-1]:.0f} MB",
            "",
            float(slope),
            "<=",
            1.0,
            "MB per 10,000 images",
        ),
        Row(
            f"{what}: resident memory",
            f"{notes[:, 1].max():.0f} MB at most",
            "",
            float(notes[:, 1].max()),
            "<=",
            1500.0,
            "MB",
        ),
        Row(
            f"{what}: put into {SHARED}",
            "threads, no shared memory",
            "",
            float(shared.max() - before),
            "<=",
            1.0,
            "MB",
        ),
    )


if __name__ == "__main__":
    main()
