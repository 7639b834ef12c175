import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxii.errors import InputError
from jaxii.objective.schedule import warmup_cosine
from jaxii.train.optimizer import OPTIMIZERS, decay_mask, make_optimizer

ALL = sorted(OPTIMIZERS)


def rate(step):
    return jnp.asarray(0.1, jnp.float32)


def tree(seed):
    rng = np.random.default_rng(seed)
    shapes = {
        "trunk": {"conv": (3, 3, 2, 4), "scale": (4,), "bias": (4,)},
        "classifier": {"kernel": (4, 5), "bias": (5,)},
    }
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def kernels(params):
    return {"conv": params["trunk"]["conv"], "kernel": params["classifier"]["kernel"]}


def run(optimizer, params, num_steps=3, grads=None):
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, grads, stage_step):
        updates, state = optimizer.update(grads, state, params, stage_step=stage_step)
        return optax.apply_updates(params, updates), state

    for index in range(num_steps):
        given = tree(100 + index) if grads is None else grads
        params, state = step(params, state, given, jnp.int32(index))
    return params


def build(name, **params):
    return make_optimizer(
        **({"name": name, "schedule": rate, "weight_decay": 0.0} | params)
    )


def assert_trees_close(actual, expected, rtol=1e-5):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=rtol, atol=1e-7),
        actual,
        expected,
    )


def test_decay_applies_to_kernels_and_not_to_biases_or_scales():
    assert decay_mask(tree(0)) == {
        "trunk": {"conv": True, "scale": False, "bias": False},
        "classifier": {"kernel": True, "bias": False},
    }


@pytest.mark.parametrize("name", ALL)
def test_with_zero_gradients_decay_shrinks_the_kernels_alone(name):
    params = tree(0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    after = run(build(name, weight_decay=0.1), params, grads=zeros)
    for part, leaf in (("trunk", "scale"), ("trunk", "bias"), ("classifier", "bias")):
        np.testing.assert_array_equal(after[part][leaf], params[part][leaf])
    for key, kernel in kernels(after).items():
        assert np.linalg.norm(kernel) < np.linalg.norm(kernels(params)[key])


@pytest.mark.parametrize("name", ALL)
def test_a_compiled_update_keeps_float32_params_finite(name):
    schedule = warmup_cosine(0.1, 2, 10)
    optimizer = build(name, schedule=schedule, weight_decay=1e-4, clip_norm=1.0)
    for leaf in jax.tree.leaves(run(optimizer, tree(0))):
        assert leaf.dtype == jnp.float32
        assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize("name", ALL)
def test_an_optimizer_state_keeps_its_types_so_that_nothing_compiles_again(name):
    optimizer, params = build(name, weight_decay=1e-4, clip_norm=1.0), tree(0)
    state = optimizer.init(params)
    update = functools.partial(optimizer.update, stage_step=jnp.int32(0))
    _, after = jax.eval_shape(update, tree(1), state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    kinds = [(leaf.dtype, leaf.shape) for leaf in jax.tree.leaves(state)]
    assert [(leaf.dtype, leaf.shape) for leaf in jax.tree.leaves(after)] == kinds


def test_sgd_adds_the_decay_before_nesterov_momentum():
    params = tree(0)
    after = run(build("sgd", weight_decay=0.01, momentum=0.8), params)
    for key, weight in kernels(params).items():
        weight, trace = np.asarray(weight, np.float64), 0.0
        for index in range(3):
            gradient = np.asarray(kernels(tree(100 + index))[key]) + 0.01 * weight
            trace = gradient + 0.8 * trace
            weight = weight - 0.1 * (gradient + 0.8 * trace)
        np.testing.assert_allclose(kernels(after)[key], weight, rtol=1e-5, atol=1e-6)


def test_lars_steps_a_share_of_the_kernels_length_along_decayed_gradient(monkeypatch):
    monkeypatch.setattr("jaxii.train.optimizer.TRUST_COEFFICIENT", 0.02)
    after = run(build("lars", weight_decay=0.01, momentum=0.8), tree(0))
    for key, weight in kernels(tree(0)).items():
        weight, trace = np.asarray(weight, np.float64), 0.0
        for index in range(3):
            gradient = np.asarray(kernels(tree(100 + index))[key]) + 0.01 * weight
            ratio = 0.02 * np.linalg.norm(weight) / np.linalg.norm(gradient)
            step = 0.1 * ratio * gradient
            trace = step + 0.8 * trace
            weight = weight - (step + 0.8 * trace)
        np.testing.assert_allclose(kernels(after)[key], weight, rtol=1e-5, atol=1e-6)


def test_lamb_steps_the_kernels_length_along_decayed_adam():
    after = run(build("lamb", weight_decay=0.01), tree(0))
    for key, weight in kernels(tree(0)).items():
        weight, mean, square = np.asarray(weight, np.float64), 0.0, 0.0
        for index in range(3):
            gradient = np.asarray(kernels(tree(100 + index))[key], np.float64)
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.999 * square + 0.001 * gradient**2
            direction = mean / (1 - 0.9 ** (index + 1))
            direction /= np.sqrt(square / (1 - 0.999 ** (index + 1))) + 1e-6
            direction += 0.01 * weight
            ratio = np.linalg.norm(weight) / np.linalg.norm(direction)
            weight = weight - 0.1 * ratio * direction
        np.testing.assert_allclose(kernels(after)[key], weight, rtol=1e-4, atol=1e-6)


def in_standard_promotion(make):
    """Runs optax itself, which mixes dtypes, on kernels only and without a mask."""
    with jax.numpy_dtype_promotion("standard"):
        params = kernels(tree(0))
        optimizer = make()
        state = optimizer.init(params)
        for index in range(3):
            updates, state = optimizer.update(kernels(tree(100 + index)), state, params)
            params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adamw", lambda: optax.adamw(0.1, weight_decay=0.01)),
        ("lars", lambda: optax.lars(0.1, weight_decay=0.01, nesterov=True)),
        ("lamb", lambda: optax.lamb(0.1, weight_decay=0.01)),
    ],
)
def test_kernels_move_as_with_the_unmasked_optax_optimizer(name, make):
    after = run(build(name, weight_decay=0.01), tree(0))
    assert_trees_close(kernels(after), in_standard_promotion(make))


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_trust_ratios_leave_biases_and_scales_alone(name):
    params = tree(0)
    # A trust ratio is proportional to the norm of the leaf: a bias ten times as large
    # would move ten times as far.
    larger = jax.tree.map(lambda leaf: 10.0 * leaf, params)
    moves = []
    for start in (params, larger):
        after = run(build(name), start, num_steps=1)
        moves.append(jax.tree.map(lambda a, b: a - b, after, start))
    small, large = (move["classifier"]["bias"] for move in moves)
    np.testing.assert_allclose(large, small, rtol=1e-4, atol=1e-6)
    small, large = (move["classifier"]["kernel"] for move in moves)
    np.testing.assert_allclose(large, 10 * small, rtol=1e-3, atol=1e-5)


def test_a_gradient_longer_than_clip_norm_is_cut_to_it():
    params, grads = tree(0), tree(1)
    after = run(build("sgd", momentum=0.0, clip_norm=0.5), params, 1, grads)
    moved = jax.tree.map(lambda a, b: (b - a) / 0.1, after, params)
    assert float(optax.tree.norm(moved)) == pytest.approx(0.5, rel=1e-4)


def test_a_gradient_shorter_than_clip_norm_is_left_alone():
    params, grads = tree(0), tree(1)
    clipped = run(build("sgd", clip_norm=1e4), params, 1, grads)
    assert_trees_close(clipped, run(build("sgd"), params, 1, grads))


def test_clipping_comes_before_weight_decay():
    params = tree(0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    clipped = run(build("sgd", weight_decay=10.0, clip_norm=1e-3), params, 1, zeros)
    assert_trees_close(clipped, run(build("sgd", weight_decay=10.0), params, 1, zeros))


@pytest.mark.parametrize("name", ALL)
def test_the_schedule_scales_each_update(name):
    params, grads = tree(0), tree(1)
    schedule = warmup_cosine(0.4, 3, 10)
    first = run(build(name, schedule=schedule), params, 1, grads)
    at_rate = run(build(name, schedule=lambda step: schedule(0)), params, 1, grads)
    assert float(schedule(0)) == pytest.approx(0.1)
    assert_trees_close(first, at_rate)


@pytest.mark.parametrize("name", ALL)
def test_the_learning_rate_is_that_of_the_stage_step_and_not_of_a_count(name):
    params, schedule = tree(0), warmup_cosine(0.4, 3, 10)
    optimizer = build(name, schedule=schedule)
    later = jax.jit(optimizer.update)(
        tree(1), optimizer.init(params), params, stage_step=jnp.int32(7)
    )[0]
    at_rate = run(build(name, schedule=lambda step: schedule(7)), params, 1, tree(1))
    assert_trees_close(optax.apply_updates(params, later), at_rate)


def test_the_optimizers_are_a_visible_table():
    assert ALL == ["adamw", "lamb", "lars", "sgd"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "adam"},
        {"weight_decay": -0.1},
        {"weight_decay": float("nan")},
        {"momentum": 1.0},
        {"clip_norm": 0.0},
        {"clip_norm": -1.0},
    ],
    ids=repr,
)
def test_a_setting_outside_its_range_is_refused_in_one_line(wrong):
    with pytest.raises(
        InputError, match=next(iter(wrong.keys())).replace("name", "opt")
    ) as e:
        build(**({"name": "sgd"} | wrong))
    assert "\n" not in str(e.value)
