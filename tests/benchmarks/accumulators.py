"""Times the sums of evaluation against the forward pass and against scikit-learn.

    python -m tests.benchmarks.accumulators               # about 2 minutes

Times `metrics.update` of a batch of 256 images with 7,178 labels: F2 at 99 thresholds,
the histogram for average precision (which counts labels verified as absent separately),
calibration, recall and the best 100. The forward pass is that of ResNet-50 with the
classifier at 224 pixels, in bfloat16 or float32, whichever is faster here, with the
layer forms that jaxii selects on this machine; its time per image is that of a batch of
8. Runs take turns, and the figure is the median ratio. Bar: 3 % of the forward pass.

Memory is the sums plus what the update allocates beside its inputs, as the compiler
reports it. Bar: 200 MB.

The peer is a loop over the thresholds that calls scikit-learn's
`fbeta_score(average="samples", beta=2)`. It is timed on 3 of the 99 thresholds and
scaled to all, and computes only mean F2. Bar: all our sums are 50 times as fast.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.metrics import fbeta_score

from jaxii.decoding.thresholds import DEFAULT_THRESHOLDS, f2_by_threshold
from jaxii.metrics import streaming
from tests.benchmarks.decoding import probabilities
from tests.benchmarks.predict_step import our_steps
from tests.benchmarks.table import Row, emit

NUM_CLASSES, BATCH = 7_178, 256
FORWARD_BATCH, SIZE = 8, 224
MAX_SHARE, MAX_MEGABYTES, MIN_SPEED_UP = 0.03, 200, 50
TRIED_THRESHOLDS = (0.05, 0.5, 0.95)


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


class Update:
    """Adds one batch; compiled as evaluation compiles it."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.probs = probabilities(rng, BATCH, NUM_CLASSES, 4)
        self.present = rng.random(self.probs.shape, dtype=np.float32) < self.probs
        known = self.present | (rng.random(self.probs.shape, dtype=np.float32) < 1e-3)
        mask = np.ones(BATCH, np.float32)
        arrays = (self.probs, self.present, known, mask)
        self.inputs = jax.tree.map(jnp.asarray, arrays)
        self.sums = streaming.empty(NUM_CLASSES, DEFAULT_THRESHOLDS)
        jitted = jax.jit(streaming.update, donate_argnums=0)
        self.compiled = jitted.lower(self.sums, *self.inputs).compile()

    def __call__(self) -> None:
        self.sums = jax.block_until_ready(self.compiled(self.sums, *self.inputs))

    def megabytes(self) -> tuple[float, float]:
        """Returns the size of the sums, and the memory of an update beside them."""
        sums = sum(leaf.nbytes for leaf in jax.tree.leaves(self.sums))
        found = self.compiled.memory_analysis()
        new = found.output_size_in_bytes - found.alias_size_in_bytes
        return sums / 1e6, (found.temp_size_in_bytes + new) / 1e6

    def scikit_learn(self) -> tuple[float, float]:
        """Returns the time for all thresholds, and the largest difference of F2."""
        scores = f2_by_threshold(self.sums)
        begin, difference = time.perf_counter(), 0.0
        for threshold in TRIED_THRESHOLDS:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # labels that no image has
                want = fbeta_score(
                    self.present,
                    self.probs >= np.float32(threshold),
                    beta=2,
                    average="samples",
                    zero_division=0,
                )
            place = DEFAULT_THRESHOLDS.index(threshold)
            difference = max(difference, abs(want - scores[place]))
        passed = time.perf_counter() - begin
        return passed / len(TRIED_THRESHOLDS) * len(DEFAULT_THRESHOLDS), difference


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    update = Update()
    update()
    peer, difference = update.scikit_learn()
    forwards = {
        dtype: our_steps(dtype, FORWARD_BATCH, SIZE)
        for dtype in ("float32", "bfloat16")
    }
    for steps in forwards.values():
        steps(1)
    times: dict[str, list[float]] = {dtype: [] for dtype in forwards}
    ours: list[float] = []
    for _ in range(args.rounds):
        for dtype, steps in forwards.items():
            times[dtype].append(steps(1) / FORWARD_BATCH)
        ours.append(seconds(update) / BATCH)
    dtype = min(times, key=lambda name: statistics.median(times[name]))
    share = statistics.median(
        mine / its for mine, its in zip(ours, times[dtype], strict=True)
    )
    mine, its = statistics.median(ours), statistics.median(times[dtype])
    sums, beside = update.megabytes()
    print(f"sums {sums:.0f} MB, an update {beside:.0f} MB more, without its inputs")
    print(f"mean F2 differs from scikit-learn's by {difference:.1e} at most")
    what = f"sums of evaluation, {NUM_CLASSES:,} labels, 99 thresholds"
    forward_name = f"forward pass of ResNet-50, {dtype}: {its * 1e3:.1f} ms per image"
    speed_up = peer / BATCH / mine
    emit(
        Row(
            what, f"{mine * 1e3:.2f} ms per image", forward_name, share, "<=", MAX_SHARE
        ),
        Row(
            f"{what}: memory at batch {BATCH}",
            f"{sums + beside:.0f} MB",
            "",
            sums + beside,
            "<=",
            MAX_MEGABYTES,
            "MB",
        ),
        Row(
            f"{what}: times the speed of a loop over thresholds",
            f"{mine * BATCH:.3f} s per batch",
            f"scikit-learn, 3 thresholds scaled to 99: {peer:.1f} s",
            speed_up,
            ">=",
            MIN_SPEED_UP,
        ),
    )


if __name__ == "__main__":
    main()
