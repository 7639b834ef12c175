"""Tests re-estimated BatchNorm statistics against NumPy over all images at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_layers

from jaxii.distributed.mesh import make_mesh, replicated, to_devices
from jaxii.models.multitask import make_network
from jaxii.train import batch_norm
from jaxii.train.batch_norm import reestimate

SIZE, BATCH = 16, 16


@pytest.fixture(scope="module", autouse=True)
def few_blocks():
    with small_layers.few_blocks(1, 1, 0, 0):
        yield


def network(**more):
    return make_network(
        depth=18,
        width=8,
        num_classes=3,
        embedding_dim=2,
        stem="small",
        dtype=jnp.float32,
        **more,
    )


def images_of(number, seed=0):
    rng = np.random.default_rng(seed)
    shades = rng.integers(0, 200, (number, 1, 1, 3))
    return (shades + rng.integers(0, 56, (number, SIZE, SIZE, 3))).astype(np.uint8)


def batches_of(images):
    for start in range(0, len(images), BATCH):
        part = images[start : start + BATCH]
        padding = BATCH - len(part)
        yield {
            "images": np.pad(part, ((0, padding), (0, 0), (0, 0), (0, 0))),
            "mask": np.pad(np.ones(len(part), np.float32), (0, padding)),
        }


@pytest.fixture(scope="module", params=["device", "global"])
def parts(request):
    made = network(bn_axis="data" if request.param == "global" else None)
    # Drawn in NumPy, because compiling the initialisation takes longer than all the
    # rest.
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(made.init, jax.random.key(0))
    values = jax.tree.map(
        lambda leaf: rng.normal(0.0, 0.1, leaf.shape).astype(np.float32), shapes
    )
    return made.apply, *jax.device_put(values, replicated(make_mesh()))


def first_layer(params, images):
    """Returns the input of the first BatchNorm: one 3x3 convolution, in NumPy."""
    mean, deviation = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    pixels = (images / 255.0 - mean) / deviation
    padded = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = np.asarray(params["trunk"]["stem_conv"]["kernel"], np.float64)
    windows = [
        padded[:, i : i + SIZE, j : j + SIZE] @ kernel[i, j]
        for i in range(3)
        for j in range(3)
    ]
    return np.sum(windows, axis=0).reshape(-1, kernel.shape[-1])


def test_the_first_layer_gets_mean_and_variance_of_all_images(parts):
    apply, params, batch_stats = parts
    images = images_of(3 * BATCH)
    found = reestimate(apply, params, batch_stats, batches_of(images), make_mesh())
    seen = first_layer(params, images)
    stats = found["trunk"]["stem_norm"]
    np.testing.assert_allclose(stats["mean"], seen.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(stats["var"], seen.var(axis=0), rtol=1e-3)


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_large_statistics_are_as_accurate_as_small_ones(parts, scale):
    apply, params, batch_stats = parts
    kernel = params["trunk"]["stem_conv"]["kernel"] * scale
    trunk = params["trunk"] | {"stem_conv": {"kernel": kernel}}
    larger = params | {"trunk": trunk}
    images = images_of(BATCH)
    found = reestimate(apply, larger, batch_stats, batches_of(images), make_mesh())
    seen = first_layer(larger, images)
    variance = found["trunk"]["stem_norm"]["var"]
    np.testing.assert_allclose(variance, seen.var(axis=0), rtol=1e-3)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def test_what_the_statistics_were_does_not_matter(parts):
    apply, params, batch_stats = parts
    images = images_of(2 * BATCH)
    others = jax.tree.map(lambda x: x + 3.0, batch_stats)
    one, other = (
        reestimate(apply, params, stats, batches_of(images), make_mesh())
        for stats in (batch_stats, others)
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_padding_weighs_nothing_between_batches(parts):
    apply, params, batch_stats = parts
    images = images_of(BATCH)
    padded = {"images": np.zeros_like(images), "mask": np.zeros(BATCH, np.float32)}
    alone, with_padding = (
        reestimate(apply, params, batch_stats, batches, make_mesh())
        for batches in (batches_of(images), [*batches_of(images), padded])
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), alone, with_padding
    )


def test_a_batch_is_filled_with_its_own_images(parts):
    apply, params, batch_stats = parts
    half = images_of(BATCH // 2)
    doubled = np.concatenate([half, half])
    one, other = (
        reestimate(apply, params, batch_stats, batches_of(images), make_mesh())
        for images in (half, doubled)
    )
    # Devices get different images, but the first layer is linear.
    means = [stats["trunk"]["stem_norm"]["mean"] for stats in (one, other)]
    np.testing.assert_allclose(*means, atol=1e-4)


@pytest.mark.parametrize("number", [2, BATCH // 2, BATCH - 3])
def test_padding_of_one_process_is_replaced_by_images_of_all(
    parts, monkeypatch, number
):
    apply, params, batch_stats = parts
    (whole,) = batches_of(images_of(number))
    first, last = (
        {name: rows[part] for name, rows in whole.items()}
        for part in (slice(BATCH // 2), slice(BATCH // 2, None))
    )
    expected = reestimate(apply, params, batch_stats, [whole], make_mesh())
    # One process stands in for the second of two; JAX would add the other's rows.
    monkeypatch.setattr(
        batch_norm,
        "to_devices",
        lambda own, sharding: to_devices(
            {name: np.concatenate([first[name], own[name]]) for name in own}, sharding
        ),
    )
    found = reestimate(apply, params, batch_stats, [last], make_mesh())
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_padding_and_damaged_images_do_not_enter(parts):
    apply, params, batch_stats = parts
    (whole,) = batches_of(images_of(BATCH - 3))
    whole["mask"][1] = 0.0
    rows = np.arange(BATCH)
    rows[[1, -3, -2, -1]] = [0, 2, 3, 4]
    filled = {"images": whole["images"][rows], "mask": whole["mask"]}
    whole["images"][[1, -3, -2, -1]] = 255
    one, other = (
        reestimate(apply, params, batch_stats, [batch], make_mesh())
        for batch in (whole, filled)
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_without_an_image_the_statistics_stay(parts):
    apply, params, batch_stats = parts
    nothing = {
        "images": np.zeros((BATCH, SIZE, SIZE, 3), np.uint8),
        "mask": np.zeros(BATCH, np.float32),
    }
    for batches in ([], [nothing]):
        found = reestimate(apply, params, batch_stats, batches, make_mesh())
        jax.tree.map(np.testing.assert_array_equal, found, batch_stats)
