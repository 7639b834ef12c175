"""Tests that fusing a convolution and its norm equals the separate layers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_layers
from flax import nnx
from small_layers import conv_of, norm_of

from jaxii.models.layers import can_fold, normalised_convolution
from jaxii.models.multitask import make_network


@pytest.fixture(scope="module", autouse=True)
def few_blocks():
    with small_layers.few_blocks(2, 1, 1, 1):
        yield


def activations(shape=(16, 7, 5, 6), seed=0):
    """Returns outputs of a ReLU: nothing negative, channels of different scale."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0.5, 1.0, shape) * rng.uniform(0.1, 10.0, shape[-1])
    return jnp.asarray(np.maximum(values, 0), jnp.float32)


def layers(dtype=jnp.float32):
    conv, norm = conv_of(6, 24, 1, dtype=dtype), norm_of(24, dtype=dtype)
    rng = np.random.default_rng(1)
    norm.scale[...] = jnp.asarray(rng.normal(1, 0.5, 24), jnp.float32)
    norm.bias[...] = jnp.asarray(rng.normal(0, 0.5, 24), jnp.float32)
    return conv, norm


def apart(conv, norm, x):
    return norm(conv(x), True)


def results(function, x, dtype=jnp.float32):
    """Returns output, running statistics and gradients, all as float32."""
    structure, params, stats = nnx.split(layers(dtype), nnx.Param, nnx.BatchStat)
    params, stats = nnx.to_pure_dict(params), nnx.to_pure_dict(stats)
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(*x.shape[:3], 24)))

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def run(params, x):
        conv, norm = nnx.merge(structure, params, stats)
        y = function(conv, norm, x.astype(dtype)).astype(jnp.float32)
        return jnp.sum(weights * y), (y, norm.mean[...], norm.var[...])

    (_, kept), gradients = run(params, x)
    return [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves((kept, gradients))]


def relative(one, other):
    return np.abs(one - other).max() / np.abs(other).max()


def test_output_statistics_and_gradients_are_those_of_both_apart():
    both = results(normalised_convolution, activations()), results(apart, activations())
    assert len(both[0]) == 7
    for ours, theirs in zip(*both, strict=True):
        assert relative(ours, theirs) <= 1e-5


def test_in_bfloat16_it_is_as_near_to_float32_as_both_apart():
    exact = results(apart, activations())
    errors = [
        [
            np.sqrt(np.mean((ours - want) ** 2))
            for ours, want in zip(
                results(function, activations(), jnp.bfloat16), exact, strict=True
            )
        ]
        for function in (normalised_convolution, apart)
    ]
    # The map before the norm is not rounded: usually more accurate, never much worse.
    assert np.all(np.array(errors[0]) <= 2 * np.array(errors[1]))


def test_constant_activations_stay_finite():
    for leaf in results(normalised_convolution, jnp.full((4, 3, 3, 6), 7.0)):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize(
    ("sizes", "more", "axis_name", "folds"),
    [
        ((6, 24, 1), {}, None, True),
        ((6, 24, 1), {}, "data", False),
        ((6, 24, 1), {"stride": 2}, None, False),
        ((6, 24, 3), {}, None, False),
        ((6, 24, 1), {"groups": 2}, None, False),
        ((24, 6, 1), {}, None, False),
    ],
)
def test_only_widening_matrices_with_a_devices_own_statistics_are_folded(
    sizes, more, axis_name, folds
):
    norm = norm_of(sizes[1], axis_name=axis_name)
    assert can_fold(conv_of(*sizes, **more), norm) is folds


@pytest.mark.parametrize("variant", ["resnet", "se_resnet"])
def test_the_network_for_tpus_trains_as_that_for_cpus(variant):
    images = jnp.asarray(np.random.default_rng(0).normal(size=(8, 32, 32, 3)))
    both = []
    for platform in ("tpu", "cpu"):
        network = make_network(
            depth=26,
            width=8,
            stem="small",
            variant=variant,
            num_classes=5,
            embedding_dim=0,
            zero_init_residual=False,
            dtype=jnp.float32,
            platform=platform,
        )
        params, stats = network.init(jax.random.key(0))

        @jax.jit
        @partial(jax.value_and_grad, has_aux=True)
        def run(params, stats=stats, network=network):
            outputs, stats = network.apply(params, stats, images, train=True)
            return jnp.sum(jnp.sin(outputs.logits)), (outputs.logits, stats)

        (_, kept), gradients = run(params)
        both.append((kept, gradients))
    # Rounding may turn a ReLU on or off, which changes the gradient a little.
    for part, bar in enumerate((1e-4, 0.1)):
        leaves = (jax.tree.leaves(parts[part]) for parts in both)
        for ours, theirs in zip(*leaves, strict=True):
            assert relative(np.asarray(ours), np.asarray(theirs)) <= bar
