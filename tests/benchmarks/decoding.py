"""Times the decoders and the search for thresholds on 40,000 images with 7,178 labels.

    python -m tests.benchmarks.decoding                   # about 3 minutes
    python -m tests.benchmarks.decoding --num_images=1000

Each runs in its own process, and its peak memory includes everything: interpreter,
libraries and the batch of inputs. Making the inputs is not timed; they are made batch
by batch, as a network would produce them. Bars: 60 s and 4 GB for each.

`expected_f2`: the sets of largest expected F2, for three kinds of probabilities: of a
calibrated network (a long tail of labels, a few of them probable, sum 4 per image), of
an uncertain network (sum 20), and of a network whose probabilities are far too high
(sum 100, as after training with a focal loss).
`thresholds`: F2 at 99 thresholds and all other sums of `metrics`, in batches of 256,
then the choice of the threshold, of k, and of a threshold per label.
`embedding`: the five labels of highest cosine, in 1,024 dimensions.
"""

import argparse
import json
import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxii.decoding import thresholds
from jaxii.decoding.decoders import embedding_decoder, expected_f2_decoder
from jaxii.metrics import streaming
from tests.benchmarks import apart

NUM_IMAGES, NUM_CLASSES = 40_000, 7_178
EXPECTED_COUNTS = {"calibrated": 4, "hesitant": 20, "far too high": 100}
BATCH, DEVICE_BATCH = 1_000, 256
EMBEDDING_DIM, K = 1_024, 5
MAX_SECONDS, MAX_GIGABYTES = 60, 4


class Clock:
    """Adds up the wall-clock and processor time of its contexts."""

    def __init__(self):
        self.wall = self.processors = 0.0

    def __enter__(self):
        self._begin = time.perf_counter(), time.process_time()

    def __exit__(self, *_):
        self.wall += time.perf_counter() - self._begin[0]
        self.processors += time.process_time() - self._begin[1]


def probabilities(
    rng: np.random.Generator, num_images: int, num_classes: int, expected_count: float
) -> np.ndarray:
    """Returns probabilities with this mean sum over the labels."""
    logits = rng.standard_normal((num_images, num_classes), dtype=np.float32)
    logits *= 1.5
    logits -= np.float32(1.1) * np.log(np.arange(num_classes, dtype=np.float32) + 3)
    seen = rng.integers(num_classes, size=(num_images, 4))
    for column in seen.T:
        logits[np.arange(num_images), column] += rng.normal(7, 2, num_images)
    low, high = -20.0, 20.0
    for _ in range(40):
        shift = (low + high) / 2
        count = (1 / (1 + np.exp(-logits[:100] - shift))).sum(axis=1).mean()
        low, high = (shift, high) if count < expected_count else (low, shift)
    return 1 / (1 + np.exp(-logits - np.float32(low)))


def sizes(num_images: int, batch: int) -> list[int]:
    """Returns the sizes of the batches."""
    return [min(batch, num_images - start) for start in range(0, num_images, batch)]


def expected_f2(num_images: int, expected_count: float) -> tuple[Clock, str]:
    """Decodes by the largest expected F2."""
    rng, clock, labels = np.random.default_rng(2018), Clock(), 0
    for size in sizes(num_images, BATCH):
        probs = probabilities(rng, size, NUM_CLASSES, expected_count)
        with clock:
            chosen = expected_f2_decoder(probs)
        labels += int(chosen.sum())
    return clock, f"{labels / num_images:.1f} labels chosen per image"


def search(num_images: int) -> tuple[Clock, str]:
    """Sums the figures of a split and fits the decoders' parameters."""
    rng, clock = np.random.default_rng(2018), Clock()
    acc = streaming.empty(NUM_CLASSES, thresholds.DEFAULT_THRESHOLDS)
    update = jax.jit(streaming.update, donate_argnums=0)
    for size in sizes(num_images, DEVICE_BATCH):
        probs = np.zeros((DEVICE_BATCH, NUM_CLASSES), np.float32)
        probs[:size] = probabilities(rng, size, NUM_CLASSES, 4)
        present = rng.random(probs.shape, dtype=np.float32) < probs
        mask = (np.arange(DEVICE_BATCH) < size).astype(np.float32)
        with clock:
            arrays = map(jnp.asarray, (probs, present))
            acc = update(acc, *arrays, None, jnp.asarray(mask))
            jax.block_until_ready(acc)
    with clock:
        choice = thresholds.choose(acc)
        own = thresholds.class_thresholds(acc, choice.threshold)
    return clock, (
        f"threshold {choice.threshold:.2f}, k {choice.top_k}, the labels' own "
        f"{own.min():.2f} to {own.max():.2f}, the compilation counted"
    )


def embedding(num_images: int) -> tuple[Clock, str]:
    """Decodes by cosine similarity with the labels' embeddings."""
    rng, clock, right = np.random.default_rng(2018), Clock(), 0
    vectors = rng.standard_normal((NUM_CLASSES, EMBEDDING_DIM), dtype=np.float32)
    for size in sizes(num_images, BATCH):
        truth = rng.integers(NUM_CLASSES, size=(size, 3))
        noise = rng.standard_normal((size, EMBEDDING_DIM), dtype=np.float32)
        predicted = vectors[truth].sum(axis=1) + 6 * noise
        with clock:
            chosen = embedding_decoder(predicted, label_embeddings=vectors, k=K)
        right += int(np.take_along_axis(chosen, truth, axis=1).sum())
    return clock, f"{right / num_images:.2f} of 3 labels found per image"


WORK: dict[str, Callable[[int], tuple[Clock, str]]] = {
    **{
        f"expected_f2, {name} ({count} labels expected)": (
            lambda num_images, count=count: expected_f2(num_images, count)
        )
        for name, count in EXPECTED_COUNTS.items()
    },
    "thresholds": search,
    "embedding": embedding,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num_images", type=int, default=NUM_IMAGES)
    parser.add_argument("--work", choices=WORK, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        clock, note = WORK[args.work](args.num_images)
        found = {"wall": clock.wall, "processors": clock.processors, "note": note}
        print(json.dumps(found | {"gigabytes": apart.gigabytes()}))
        return
    print(f"{args.num_images:,} images, {NUM_CLASSES:,} labels, {os.cpu_count()} cores")
    for name in WORK:
        given = (f"--work={name}", f"--num_images={args.num_images}")
        found = apart.run_module("decoding", *given)
        print(f"{name}: {found['note']}; {found['processors']:.1f} s of processor time")
        what = f"{name}, {args.num_images:,} images"
        limits = (found["wall"], MAX_SECONDS, found["gigabytes"], MAX_GIGABYTES)
        apart.emit_limits(what, *limits)


if __name__ == "__main__":
    main()
