"""Tests that a divided optimizer state gives the same run with less memory."""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from small_runs import metadata_of

from jaxii.distributed.mesh import divided, make_mesh, to_devices
from jaxii.models.multitask import make_network
from jaxii.objective.objective import make_objective
from jaxii.train.averaging import ema_rate
from jaxii.train.checkpoint import Checkpoints
from jaxii.train.optimizer import make_optimizer
from jaxii.train.sharding import (
    Shards,
    cut_axis,
    state_shapes,
    state_shardings,
    state_specs,
)
from jaxii.train.stages import Saved
from jaxii.train.state import new_state
from jaxii.train.step import StepSettings, make_train_step

NUM_CLASSES, BATCH, STEPS = 5, 16, 20
RATES = {"sgd": 0.1, "adamw": 0.01, "lars": 1.0, "lamb": 0.01}
COLLECTIVES = "all-reduce", "reduce-scatter", "all-gather"


class Outputs(NamedTuple):
    logits: jax.Array
    embedding: None = None


def apply(params, batch_stats, images, *, train, key):
    """A network with leaves that 8 divides along the first, middle, last or no axis."""
    pixels = images.astype(jnp.float32) / 255.0 - 0.5
    maps = jnp.einsum("bhwc,cd->bhwd", pixels, params["stem"][0, 0])
    features = jnp.tanh(jnp.mean(maps, axis=(1, 2)) @ params["block"][0])
    classifier = params["classifier"]
    features = features * params["gate"][0][None]
    logits = features @ classifier["kernel"] + classifier["bias"][None]
    mean = 0.9 * batch_stats["mean"] + 0.1 * jnp.mean(features, axis=0)
    return Outputs(logits), {"mean": mean}


def start():
    rng = np.random.default_rng(0)
    shapes = {
        "stem": (1, 1, 3, 16),
        "block": (1, 16, 24),
        "gate": (3, 24),
        "classifier": {"kernel": (24, NUM_CLASSES), "bias": (NUM_CLASSES,)},
    }
    params = jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    return params, {"mean": jnp.zeros(24)}


def batch_of(step):
    rng = np.random.default_rng(step)
    return {
        "images": rng.integers(0, 256, (BATCH, 4, 4, 3)).astype(np.uint8),
        "label_ids": rng.integers(0, NUM_CLASSES, (BATCH, 2)).astype(np.int32),
        "label_confidences": np.ones((BATCH, 2), np.float32),
        "mask": (np.arange(BATCH) < 13).astype(np.float32),
    }


def settings_of(name, shard_state, clip_norm=None, apply=apply):
    schedule = optax.constant_schedule(RATES[name])
    return StepSettings(
        apply=apply,
        objective=make_objective({"bce": 1.0}, num_steps=9, num_classes=NUM_CLASSES),
        optimizer=make_optimizer(
            name=name, schedule=schedule, weight_decay=1e-3, clip_norm=clip_norm
        ),
        learning_rate=lambda step: jnp.float32(RATES[name]),
        average_rate=ema_rate(0.9),
        shard_state=shard_state,
    )


def state_of(settings):
    params, batch_stats = start()
    return new_state(
        params=params,
        batch_stats=batch_stats,
        optimizer=settings.optimizer,
        step=0,
        with_average=True,
    )


def placed(settings, mesh):
    state = state_of(settings)
    return jax.device_put(state, state_shardings(state, mesh, settings.shard_state))


def run(settings, mesh, state, steps=range(STEPS)):
    train_step = make_train_step(settings, mesh)
    for step in steps:
        state, metrics = train_step(
            state, to_devices(batch_of(step), divided(mesh)), None
        )
    assert train_step._cache_size() == 1
    return state, metrics


@functools.cache
def end_of(name, shard_state, clip_norm):
    """State and metrics after all steps on all devices."""
    settings, mesh = settings_of(name, shard_state, clip_norm), make_mesh()
    return jax.device_get(run(settings, mesh, placed(settings, mesh)))


def assert_equal_runs(state, other):
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(np.abs(b).max(), 1e-6))


@pytest.mark.parametrize(
    ("name", "clip_norm"),
    [("sgd", 0.1), ("adamw", None), ("lars", None), ("lamb", 0.1)],
)
def test_twenty_steps_with_a_divided_state_are_those_with_a_whole_one(name, clip_norm):
    assert_equal_runs(end_of(name, True, clip_norm), end_of(name, False, clip_norm))


def test_a_device_holds_an_eighth_of_what_divides_before_and_after_a_step():
    mesh, settings = make_mesh(), settings_of("adamw", True)
    state = placed(settings, mesh)
    after, _ = run(settings, mesh, jax.tree.map(jnp.copy, state), range(1))
    for each in (state, after):
        for moments in each.opt_state[0][1:]:
            sizes = jax.tree.map(
                lambda leaf: leaf.size / leaf.addressable_shards[0].data.size, moments
            )
            assert sizes == {
                "stem": 8,
                "block": 8,
                "gate": 8,
                "classifier": {"kernel": 8, "bias": 1},
            }
        assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(each.params))
    assert [leaf.sharding for leaf in jax.tree.leaves(after)] == [
        leaf.sharding for leaf in jax.tree.leaves(state)
    ]


@pytest.mark.parametrize(("num_devices", "most"), [(8, 0.126), (256, 0.03)])
def test_a_device_holds_little_more_than_its_share_of_a_resnet_50(num_devices, most):
    network = make_network(depth=50, num_classes=7178, embedding_dim=1024)
    params, _ = jax.eval_shape(network.init, jax.random.key(0))
    optimizer = make_optimizer(
        name="lamb", schedule=optax.constant_schedule(0.1), weight_decay=0.1
    )
    leaves = jax.tree.leaves(jax.eval_shape(optimizer.init, params))
    total = sum(leaf.size for leaf in leaves)
    held = sum(
        leaf.size // (1 if cut_axis(leaf.shape, num_devices) is None else num_devices)
        for leaf in leaves
    )
    assert held / total < most


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((64,), 0), ((3, 3, 64, 512), 2), ((1, 1, 3, 64), 3), ((5, 3), None), ((), None)],
)
def test_the_largest_axis_that_divides_is_cut_but_the_last_last(shape, axis):
    assert cut_axis(shape, 8) == axis
    assert cut_axis(shape, 1) is None


def test_slices_put_together_are_the_whole():
    mesh, (params, _) = make_mesh(), start()

    def there_and_back(params):
        shards = Shards(params, 8)
        return shards.whole(shards.own(params))

    everywhere = PartitionSpec()
    compute = jax.jit(
        jax.shard_map(
            there_and_back, mesh=mesh, in_specs=everywhere, out_specs=everywhere
        )
    )
    jax.tree.map(np.testing.assert_array_equal, compute(params), params)


def test_a_gradient_that_is_not_finite_changes_no_slice():
    def explode(params, batch_stats, images, *, train, key):
        outputs, stats = apply(params, batch_stats, images, train=train, key=key)
        return outputs._replace(logits=outputs.logits / 0.0), stats

    settings, mesh = settings_of("lamb", True, apply=explode), make_mesh()
    before = jax.device_get(placed(settings, mesh))
    state, metrics = run(settings, mesh, placed(settings, mesh), range(1))
    assert int(metrics["skipped_steps"]) == 1
    for field in ("params", "opt_state"):
        jax.tree.map(
            np.testing.assert_array_equal, getattr(state, field), getattr(before, field)
        )


@pytest.mark.parametrize(
    ("num_devices", "shard_state"), [(4, True), (1, True), (8, False)]
)
def test_a_run_goes_on_over_other_devices_and_in_another_layout(
    half_way, num_devices, shard_state
):
    mesh = make_mesh(jax.devices()[:num_devices])
    settings = settings_of("adamw", shard_state)
    shapes = jax.eval_shape(lambda: state_of(settings))
    like = state_shapes(shapes, mesh, shard_state)
    (saved,) = half_way.saved()["only"]
    state = half_way.restore_state(saved, like)
    state, _ = run(settings, mesh, state, range(STEPS // 2, STEPS))
    assert_equal_runs(jax.device_get(state), end_of("adamw", False, None)[0])


@pytest.fixture(scope="module")
def half_way(tmp_path_factory):
    """A run over 8 devices with a divided state, saved in the middle."""
    settings, mesh = settings_of("adamw", True), make_mesh()
    state, _ = run(settings, mesh, placed(settings, mesh), range(STEPS // 2))
    checkpoints = Checkpoints(
        tmp_path_factory.mktemp("run"), ["only"], "0123456789abcdef"
    )
    checkpoints.save(metadata_of(Saved(stage="only", step=10, first_step=0)), state)
    checkpoints.wait()
    yield checkpoints
    checkpoints.close()


@pytest.mark.parametrize(
    ("name", "shard_state", "clip_norm", "expected"),
    [
        ("sgd", False, 1.0, (2, 0, 0)),
        ("sgd", True, 1.0, (2, 0, 1)),
        ("lamb", True, 1.0, (3, 0, 1)),
    ],
)
def test_an_update_has_few_collectives(name, shard_state, clip_norm, expected):
    settings, mesh = settings_of(name, shard_state, clip_norm), make_mesh()
    batch = to_devices(batch_of(0), divided(mesh))
    lowered = make_train_step(settings, mesh).lower(placed(settings, mesh), batch, None)
    text = lowered.compile().as_text()
    counts = [len(re.findall(rf"= .*{kind}(-start)?\(", text)) for kind in COLLECTIVES]
    assert tuple(counts) == expected


def test_only_the_optimizers_state_is_divided():
    state = state_of(settings_of("sgd", True))
    specs = state_specs(state, 8)
    assert specs.opt_state != state_specs(state, 1).opt_state
    others = (specs.params, specs.batch_stats, specs.average_params, specs.step)
    assert set(jax.tree.leaves(others)) == {PartitionSpec()}
