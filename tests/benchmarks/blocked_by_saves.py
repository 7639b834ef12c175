"""Measures how long a save blocks the loop, relative to the duration of the save.

    python -m tests.benchmarks.blocked_by_saves [--saves=7]

The state is that of a ResNet-50 with 7,178 classes, both heads and SGD with momentum,
in float32: 323 MB. `Checkpoints.save` is called as in the loop, between updates that
are given the buffers of the state (each adds 1 to every number). The loop is blocked
while `save` runs, and for the time that the update after it takes longer than the
update before it, because that update waits for the copy of the state on the devices. A
save lasts until `wait` returns, when the checkpoint is complete on disk. Not counted:
on CPUs, writing slows down all updates until the save is complete, because it uses the
same cores. The first save also creates the folders and is not counted; the figures are
medians of the other saves. Each checkpoint is restored and compared bit for bit with
the state at its save. Takes about half a minute.
"""

import argparse
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging as absl_logging

from jaxii.distributed.mesh import make_mesh, replicated
from jaxii.models.multitask import make_network
from jaxii.train.checkpoint import Checkpoints
from jaxii.train.optimizer import make_optimizer
from jaxii.train.stages import Saved
from jaxii.train.state import new_state
from tests.benchmarks.table import Row, emit
from tests.small_runs import metadata_of

STAGE = "only"
BAR = 0.05


def make_state():
    """Returns a state of random numbers on all devices."""
    network = make_network(depth=50, num_classes=7178, embedding_dim=1024)
    optimizer = make_optimizer(
        name="sgd", schedule=optax.constant_schedule(0.1), weight_decay=1e-4
    )

    def fresh(key):
        params, batch_stats = network.init(key)
        return new_state(
            params=params,
            batch_stats=batch_stats,
            optimizer=optimizer,
            step=0,
            with_average=False,
        )

    rng, whole = np.random.default_rng(0), replicated(make_mesh())

    def leaf(shape):
        values = 100 * rng.standard_normal(shape.shape, np.float32)
        return jax.device_put(values.astype(shape.dtype), whole)

    return jax.tree.map(leaf, jax.eval_shape(fresh, jax.random.key(0)))


def timed(update, state):
    start = time.monotonic()
    state = jax.block_until_ready(update(state))
    return time.monotonic() - start, state


def save_once(checkpoints, step, state, update):
    """Returns seconds of `save`, the updates after and before, and the whole save."""
    before, state = timed(update, state)
    expected = [np.array(leaf) for leaf in jax.tree.leaves(state)]
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    saved = Saved(stage=STAGE, step=step, first_step=0)
    start = time.monotonic()
    checkpoints.save(metadata_of(saved), state)
    in_save = time.monotonic() - start
    after, state = timed(update, state)
    checkpoints.wait()
    duration = time.monotonic() - start
    restored = jax.tree.leaves(checkpoints.restore_state(saved, shapes))
    for found, wanted in zip(restored, expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    return (in_save, after, before, duration), state


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--saves", type=int, default=7)
    args = parser.parse_args()
    # Orbax warns that a checkpoint has no metric.
    absl_logging.set_verbosity(absl_logging.ERROR)
    state = make_state()
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))

    def add_one(state):
        return jax.tree.map(lambda x: x + jnp.ones((), x.dtype), state)

    update = jax.jit(add_one, donate_argnums=0)
    _, state = timed(update, state)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(folder, [STAGE], "0123456789abcdef")
        for step in range(args.saves + 1):
            row, state = save_once(checkpoints, step, state, update)
            rows.append(row)
        checkpoints.close()
    in_save, after, before, duration = map(
        statistics.median, zip(*rows[1:], strict=True)
    )
    # The next update waits for the copy that `save` starts.
    blocked = [(save + later - usual) / whole for save, later, usual, whole in rows[1:]]
    emit(
        Row(
            what=f"loop blocked by a save of {num_bytes / 1e6:.0f} MB",
            ours=f"{1e3 * in_save:.0f} ms in it and {1e3 * (after - before):.0f} ms in "
            f"the update after it, of {duration:.2f} s",
            peer="",
            figure=100 * statistics.median(blocked),
            relation="<=",
            bar=100 * BAR,
            unit="%",
        )
    )


if __name__ == "__main__":
    main()
