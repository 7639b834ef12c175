"""Measures the cost of manifests when preparing, saving and opening a run.

    python -m tests.benchmarks.manifest_cost [--images=2000] [--saves=7]

Prepare: JPEGs of 1024 x 768 pixels to a short side of 256, two threads. The cost is the
threads' time for hashing shards plus the time for writing the manifest, as a share of
the total.

Save: the state of `blocked_by_saves`, a ResNet-50 with 7,178 classes, 323 MB. The cost
is the time for reading, hashing and listing the finished files, as a share of the time
until the checkpoint is complete; meanwhile, the loop continues.

Opening: from a folder to the first 8 answers at 224 pixels, with the check of every
file and every byte of the weights. The start of Python and JAX is not timed, and
compiled programs of earlier starts are not used. The cost is also printed as a share of
restoring the weights alone.

All figures are medians. Takes two to three minutes.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging as absl_logging

from jaxii import manifest
from jaxii.distributed.mesh import make_mesh, replicated
from jaxii.models.multitask import make_network
from jaxii.prepare.kaggle import prepare
from jaxii.train import checkpoint_manager
from jaxii.train.checkpoint import Checkpoints
from jaxii.train.stages import Saved
from tests.benchmarks.blocked_by_saves import STAGE, make_state
from tests.benchmarks.images import jpeg, write_layout
from tests.benchmarks.table import Row, emit
from tests.small_runs import metadata_of

WORKERS = 2
NUM_IMAGES = 32
LABELS = "0123456789abcdef"
BAR = 2.0


@contextmanager
def timed(owner: Any, name: str) -> Iterator[list[float]]:
    """Adds up the wall-clock seconds of the calls of a function."""
    act: Callable[..., Any] = getattr(owner, name)
    spent: list[float] = []

    def timing(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return act(*args, **kwargs)
        finally:
            spent.append(time.perf_counter() - start)

    setattr(owner, name, timing)
    try:
        yield spent
    finally:
        setattr(owner, name, act)


def of_prepare(scratch: Path, num_images: int) -> Row:
    rng = np.random.default_rng(0)
    images = [jpeg(rng) for _ in range(NUM_IMAGES)]
    layout = write_layout(scratch / "kaggle", images, num_images)
    with (
        timed(manifest, "describe") as hashing,
        timed(manifest.Manifest, "save") as saving_it,
    ):
        start = time.perf_counter()
        prepare(layout, scratch / "out", num_workers=WORKERS)
        whole = time.perf_counter() - start
    spent = sum(hashing) / WORKERS + sum(saving_it)
    return row(f"manifest of {num_images:,} prepared images", spent, whole)


def of_save(folder: Path, num_saves: int) -> Row:
    state = make_state()
    checkpoints = Checkpoints(folder, [STAGE], LABELS)
    wholes = []
    with timed(checkpoint_manager, "_write_manifest") as writing:
        for step in range(num_saves + 1):
            start = time.perf_counter()
            checkpoints.save(
                metadata_of(Saved(stage=STAGE, step=step, first_step=0)), state
            )
            checkpoints.wait()
            wholes.append(time.perf_counter() - start)
    checkpoints.close()
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    what = f"manifest of a save of {num_bytes / 1e6:.0f} MB"
    return row(what, *map(statistics.median, (writing[1:], wholes[1:])))


def of_opening(folder: Path, rounds: int = 3) -> Row:
    network = make_network(depth=50, num_classes=7178, embedding_dim=1024)
    images = np.zeros((8, 224, 224, 3), np.uint8)
    shares, restores, wholes = [], [], []
    for _ in range(rounds):
        jax.clear_caches()
        checkpoints = Checkpoints(folder, [STAGE], LABELS, read_only=True)
        with timed(Checkpoints, "_check_files") as checking:
            start = time.perf_counter()
            model = checkpoints.restore_model(
                checkpoints.best_of(), replicated(make_mesh())
            )
            jax.block_until_ready(model)
            restores.append(time.perf_counter() - start)

            @jax.jit
            def answer(model, images):
                outputs, _ = network.apply(
                    model["params"], model["batch_stats"], images, train=False, key=None
                )
                return jax.nn.sigmoid(outputs.logits)

            jax.block_until_ready(answer(model, jnp.asarray(images)))
            wholes.append(time.perf_counter() - start)
        shares.append(sum(checking))
        checkpoints.close()
    spent = statistics.median(shares)
    print(f"checks: {spent / statistics.median(restores):.1%} of restoring the weights")
    return row("checks at opening a run", spent, statistics.median(wholes))


def row(what: str, spent: float, whole: float) -> Row:
    ours = f"{1e3 * spent:.0f} ms of {whole:.2f} s"
    return Row(what, ours, "", 100 * spent / whole, "<=", BAR, "%")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--saves", type=int, default=7)
    args = parser.parse_args()
    # Orbax warns that a checkpoint has no metric.
    absl_logging.set_verbosity(absl_logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        emit(of_prepare(Path(scratch), args.images))
        emit(of_save(Path(scratch, "run"), args.saves))
        emit(of_opening(Path(scratch, "run")))


if __name__ == "__main__":
    main()
