"""Times the training input path against torchvision's and against bare decoding.

    python -m tests.benchmarks.input_path [--photos=FOLDER]

Reads JPEGs of 1024 x 768 pixels, and the same reduced to a short side of 256: decode,
random resized crop to 224 pixels, flip, batches of 256 uint8 images with labels in
slots; two threads. In both libraries, the crop covers at least 0.35 of the image. jaxii
reads the ArrayRecord shards that `prepare` makes from the files. Its peer is
torchvision's DataLoader with Pillow and two worker processes, which reads the files
themselves. Bare decoding is simplejpeg alone in two threads, from memory, each image at
the scale at which the path decodes it. They take turns, and each figure is the median
of the ratios of the rounds. The speed with jaxii's whole augmentation (also rotation,
shear, zoom and loss of quality), which is more work than the peer's, is printed too.
The aim is the speed of bare decoding. Takes about five minutes.

The images are noise with the spectrum of photographs and the file size of Open Images
(295 KB, 46 KB reduced). --photos uses JPEGs of a folder instead, reduced to a longest
side of 1024 (smaller images are skipped) and to a short side of 256.
"""

import argparse
import contextlib
import itertools
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

from jaxii.data.dataset import open_dataset
from jaxii.data.pipeline import LabelPolicy, ShardSpec, train_batches
from jaxii.data.transforms import CROP_MIN_AREA, Image, TrainTransform, read
from jaxii.prepare.kaggle import prepare
from jaxii.prepare.recode import SHORT_SIDE, recode, size
from tests.benchmarks import peers
from tests.benchmarks.images import jpeg, write_layout
from tests.benchmarks.table import Row, emit

SIZE = 224
BATCH = 256
WORKERS = 2
WARM_UP_BATCHES = 2
AFTER_SECONDS = 1.0
NUM_IMAGES = 32
LONG_SIDE = 1024
SMALL, LARGE = "short side 256", "1024 pixels"
# Kind -> files, images per round of jaxii and of its peer, and the bar against the
# peer.
# grain takes 16 us to shuffle one of 2,048 rows, and 3 to 5 for any number from 16,384.
KINDS = {
    SMALL: (16384, 8192, 2048, 2.5),
    LARGE: (2048, 2048, 1024, 4.0),
}


def jaxii(source, images: int, transform, workers: int = WORKERS) -> float:
    """Returns images per second of jaxii's training input path."""
    batches = train_batches(
        source,
        transform=transform,
        policy=LabelPolicy(num_slots=8),
        shard=ShardSpec(global_batch_size=BATCH, num_threads=workers),
        seed=0,
    )
    for _ in range(WARM_UP_BATCHES):
        next(batches)
    start = time.perf_counter()
    for _ in range(images // BATCH):
        batch = next(batches)
    passed = time.perf_counter() - start
    assert batch["images"].shape == (BATCH, SIZE, SIZE, 3)
    # Batches in preparation must not run during the next measurement.
    del batches
    time.sleep(AFTER_SECONDS)
    return images / passed


def decodes(source, images: int) -> list[tuple[bytes, int, int]]:
    """Returns images with the rows and columns to which the path decodes them."""
    transform = TrainTransform(size_pixels=SIZE)
    rng = np.random.default_rng(0)
    jobs = []
    original = Image.decode

    def watched(self: Image, height: float, width: float):
        pixels = original(self, height, width)
        jobs.append((self.encoded, *pixels.shape[:2]))
        return pixels

    Image.decode = watched
    try:
        for row in range(images):
            transform.crop(source[row % len(source)]["image"], rng)
    finally:
        Image.decode = original
    return jobs


def bare(jobs: list[tuple[bytes, int, int]], images: int) -> float:
    """Returns images per second of decoding alone."""
    shares = [
        list(itertools.islice(itertools.cycle(jobs[i::WORKERS]), images // WORKERS))
        for i in range(WORKERS)
    ]

    def work(share) -> None:
        for encoded, height, width in share:
            simplejpeg.decode_jpeg(encoded, "RGB", min_height=height, min_width=width)

    with ThreadPoolExecutor(WORKERS) as pool:
        start = time.perf_counter()
        list(pool.map(work, shares))
        passed = time.perf_counter() - start
    return images / passed


def measure(kind: str, root: Path, source, rounds: int) -> None:
    """Measures one kind of images and emits its rows."""
    _, images, peer_images, bar = KINDS[kind]
    jobs = decodes(source, 512)
    sizes = [height * width for _, height, width in jobs]
    whole = [read(encoded) for encoded, _, _ in jobs]
    share = sum(sizes) / sum(p.height * p.width for p in whole)
    transform = TrainTransform(size_pixels=SIZE)
    given = (str(root / "train"), peer_images, BATCH, WORKERS, CROP_MIN_AREA)
    ours, theirs, alone, augmented = [], [], [], []
    for _ in range(rounds):
        ours.append(jaxii(source, images, transform.crop))
        result = peers.run("input_path.py", *(str(word) for word in given))
        theirs.append(result["images_per_second"])
        alone.append(bare(jobs, images))
        augmented.append(jaxii(source, images, transform))
    rate = f"{statistics.median(ours):,.0f} images/s"
    against = [a / b for a, b in zip(ours, theirs, strict=True)]
    decoding = [a / b for a, b in zip(ours, alone, strict=True)]
    print(
        f"{kind}: jaxii {rate}, with its whole augmentation "
        f"{statistics.median(augmented):,.0f}; decodes {share:.2f} of the pixels; "
        f"ratios of the rounds {', '.join(f'{r:.2f}' for r in against)} to torchvision,"
        f" {', '.join(f'{r:.2f}' for r in decoding)} to bare decoding, which itself is "
        f"{statistics.median(alone) / statistics.median(theirs):.2f} of torchvision"
    )
    emit(
        Row(
            f"input path, JPEGs of {kind}",
            rate,
            f"torchvision DataLoader {statistics.median(theirs):,.0f}",
            statistics.median(against),
            ">=",
            bar,
        ),
        Row(
            f"input path against bare decoding, JPEGs of {kind}",
            rate,
            f"simplejpeg alone {statistics.median(alone):,.0f}",
            statistics.median(decoding),
            ">=",
            0.75,
        ),
    )


def rates(files: int, images: int, workers: int) -> dict[str, float]:
    """Returns images per second of "jaxii" and "torch" on small JPEGs, timed once."""
    with opened(images_of(SMALL, None), files) as (root, source):
        ours = jaxii(source, images, TrainTransform(size_pixels=SIZE).crop, workers)
        given = (root / "train", images, BATCH, workers, CROP_MIN_AREA)
        theirs = peers.run("input_path.py", *map(str, given))
    return {"jaxii": ours, "torch": theirs["images_per_second"]}


@contextlib.contextmanager
def opened(images: list[bytes], files: int):
    """Writes and prepares this many files; yields their folder and their records."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch, "files")
        layout = write_layout(root, images, files)
        # No image is reduced, so the records hold the bytes of the files.
        prepare(layout, Path(scratch, "out"), short_side=1024)
        yield root, open_dataset(Path(scratch, "out")).splits["train"].source


def images_of(kind: str, folder: str | None) -> list[bytes]:
    """Returns JPEGs of a kind: synthetic, or from a folder of larger ones."""
    if folder is None:
        rng = np.random.default_rng(0)
        large = [jpeg(rng) for _ in range(NUM_IMAGES)]
        return [recode(p) for p in large] if kind == SMALL else large
    files = [path.read_bytes() for path in sorted(Path(folder).glob("*.jpg"))]
    if kind == SMALL:
        return [recode(file) for file in files if min(size(file)) >= SHORT_SIDE]
    sides = [size(file) for file in files]
    return [
        recode(file, short_side=round(LONG_SIDE * min(n) / max(n)))
        for file, n in zip(files, sides, strict=True)
        if max(n) >= LONG_SIDE
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--photos", help="a folder of JPEGs")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    for kind in args.kinds:
        images = images_of(kind, args.photos)
        mean = np.mean([len(p) for p in images]) / 1e3
        print(f"{kind}: {len(images)} images of {mean:.0f} KB")
        with opened(images, KINDS[kind][0]) as (root, source):
            measure(kind, root, source, args.rounds)


if __name__ == "__main__":
    main()
