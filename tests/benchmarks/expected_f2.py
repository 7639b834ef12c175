"""Times the sets of largest expected F2 of 10,000 images with 7,178 labels.

    python -m tests.benchmarks.expected_f2

Three kinds of probabilities: those of a calibrated network (a long tail of labels, a
few of them probable, four an image in all), those of a hesitant one (twenty in all) and
those of one whose probabilities are far too high (a hundred in all, as a focal loss
leaves them). Prints the wall and the processor seconds of each.
"""

import argparse
import os
import time

import numpy as np

from jaxii.infer.expected_f2 import expected_f2_decoder

NUM_IMAGES = 10_000
NUM_CLASSES = 7_178
EXPECTED_COUNTS = {"calibrated": 4, "hesitant": 20, "far too high": 100}
BATCH = 1_000


def probabilities(
    rng: np.random.Generator, num_images: int, num_classes: int, expected_count: float
) -> np.ndarray:
    """Returns probabilities whose sum over the labels is as expected on average."""
    tail = -1.1 * np.log(np.arange(num_classes) + 3.0)
    seen = rng.random((num_images, num_classes)) < 4 / num_classes
    noise = rng.normal(0, 1.5, (num_images, num_classes))
    logits = tail + noise + seen * rng.normal(7, 2, (num_images, num_classes))
    low, high = -20.0, 20.0
    for _ in range(40):
        shift = (low + high) / 2
        count = (1 / (1 + np.exp(-logits[:100] - shift))).sum(axis=1).mean()
        low, high = (shift, high) if count < expected_count else (low, shift)
    return (1 / (1 + np.exp(-logits - low))).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_images", type=int, default=NUM_IMAGES)
    parser.add_argument("--num_classes", type=int, default=NUM_CLASSES)
    args = parser.parse_args()
    print(
        f"{args.num_images:,} images, {args.num_classes:,} labels, "
        f"{os.cpu_count()} cores"
    )
    for name, expected_count in EXPECTED_COUNTS.items():
        rng = np.random.default_rng(2018)
        wall = cpu = labels = 0.0
        for start in range(0, args.num_images, BATCH):
            size = min(BATCH, args.num_images - start)
            probs = probabilities(rng, size, args.num_classes, expected_count)
            begin = time.perf_counter(), time.process_time()
            labels += expected_f2_decoder(probs).sum()
            wall += time.perf_counter() - begin[0]
            cpu += time.process_time() - begin[1]
        print(
            f"{name:13} {expected_count:3} expected, {labels / args.num_images:5.1f} "
            f"chosen an image: {wall:.1f} s ({cpu:.1f} s of processors)"
        )


if __name__ == "__main__":
    main()
