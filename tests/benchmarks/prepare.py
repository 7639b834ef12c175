"""Times `prepare` against a Pillow loop: images per second, bytes before and after.

    python -m tests.benchmarks.prepare

5,000 images of 1024 x 768 pixels are made first, with the spectrum and the file size of
photographs (300 KB, as in Open Images); this is not timed. Then `prepare` reduces them
to records with a short side of 256 in two threads, and Pillow reduces them to files of
the same size and JPEG quality in a pool of two processes; they take turns. The figure
is the median of the ratios. `images/s per core` is the number of images divided by
processor time, so that other work on the machine hardly changes it; it involves no
network. The aim is the time of decoding and encoding alone. Takes three to four
minutes.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from jaxii.prepare.kaggle import prepare
from tests.benchmarks import peers
from tests.benchmarks.images import jpeg, write_layout
from tests.benchmarks.table import Row, emit

WORKERS = 2
NUM_IMAGES = 32
BAR = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--short_side", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    ours, theirs, used = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        files = Path(scratch, "kaggle")
        layout = write_layout(
            files, [jpeg(rng) for _ in range(NUM_IMAGES)], args.images
        )
        before = sum(path.stat().st_size for path in files.glob("train/*"))
        os.sync()  # flush writes, so that none run during the measurement
        for number in range(args.rounds):
            out, pillow = Path(scratch, f"out{number}"), Path(scratch, f"pil{number}")
            pillow.mkdir()
            processor, start = time.process_time(), time.perf_counter()
            prepare(layout, out, short_side=args.short_side, num_workers=WORKERS)
            ours.append(args.images / (time.perf_counter() - start))
            used.append(args.images / (time.process_time() - processor))
            given = (files / "train", pillow, args.short_side, WORKERS)
            result = peers.run("prepare.py", *map(str, given))
            theirs.append(args.images / result["seconds"])
        after = sum(path.stat().st_size for path in out.glob("*array_record*"))
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    print(f"{statistics.median(used):.0f} images/s per core (processor time)")
    print(f"{statistics.median(ours):.0f} images/s on this machine now")
    print(f"{before / args.images / 1e3:.0f} KB per image read, ", end="")
    print(f"{after / args.images / 1e3:.0f} KB written")
    print(f"ratios of the rounds: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    emit(
        Row(
            f"prepare, {args.images:,} JPEGs of 1024 pixels to short side "
            f"{args.short_side}",
            f"{statistics.median(ours):,.0f} images/s",
            f"Pillow, pool of {WORKERS}: {statistics.median(theirs):,.0f}",
            statistics.median(ratios),
            ">=",
            BAR,
        )
    )


if __name__ == "__main__":
    main()
