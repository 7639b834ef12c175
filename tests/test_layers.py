import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from small_layers import conv_of, norm_of

from jaxii.models.layers import SqueezeExcite, average_pool, max_pool


def activations(batch=8):
    rng = np.random.default_rng(0)
    return rng.normal(2.0, 3.0, (batch, 4, 4, 3)).astype(np.float32)


def test_kernels_are_kaiming_normal_by_fan_out():
    kernel = conv_of(64, 256, 3).kernel[...]
    assert kernel.shape == (3, 3, 64, 256)
    assert float(kernel.std()) == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.01)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("kernel_size", "size"),
    [(1, 6), (1, 7), (3, 1), (3, 2), (3, 3), (7, 8), (7, 16), (7, 17)],
)
def test_the_cpu_form_is_the_convolution_and_its_gradient(kernel_size, size, stride):
    x = values(2, size, size + 2, 5)
    ours, expected = (
        with_gradients(conv_of(5, 7, kernel_size, stride=stride, cpu_forms=choice), x)
        for choice in (True, False)
    )
    for one, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize(
    ("height", "width"),
    [(2, 2), (2, 1), (3, 2), (4, 4), (5, 3), (6, 9), (8, 8), (16, 7)],
)
def test_many_channels_are_convolved_by_winograds_algorithm(height, width):
    x = values(2, height, width, 64)
    conv = conv_of(64, 80, 3, cpu_forms=True)
    jaxpr = str(jax.make_jaxpr(conv)(x))
    assert "conv_general_dilated" not in jaxpr
    # Of all forms, only Winograd's products are batched.
    assert ("([0], [0])" in jaxpr) == (min(height, width) > 1)
    ours = with_gradients(conv, x)
    expected = with_gradients(conv_of(64, 80, 3), x)
    for one, other in zip(ours, expected, strict=True):
        largest = np.abs(other).max()
        np.testing.assert_allclose(one, other, rtol=0, atol=3e-5 * largest)


@pytest.mark.parametrize(
    ("channels", "out_channels", "stride", "dtype"),
    [
        (64, 64, 2, jnp.float32),
        (63, 64, 1, jnp.float32),
        (64, 63, 1, jnp.float32),
        (64, 64, 1, jnp.bfloat16),
    ],
)
def test_other_convolutions_are_left_to_xla(channels, out_channels, stride, dtype):
    conv = conv_of(channels, out_channels, 3, stride=stride, cpu_forms=True)
    conv.dtype = dtype
    x = jax.ShapeDtypeStruct((2, 8, 8, channels), dtype)
    assert "conv_general_dilated" in str(jax.make_jaxpr(conv)(x))


def with_gradients(module, x):
    """Returns the gradients of the sum of sines, and the output, as leaves."""
    structure, kernel = nnx.split(module)

    def total(x, kernel):
        y = nnx.merge(structure, kernel)(x)
        return jnp.sum(jnp.sin(y)), y

    return jax.tree.leaves(jax.jit(jax.grad(total, (0, 1), has_aux=True))(x, kernel))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [7, 8])
def test_the_cpu_form_is_the_max_pool_and_its_gradient(size, dtype):
    x = np.random.default_rng(0).normal(size=(2, size, size, 3))
    x = jnp.asarray(x, dtype)

    def both(cpu_forms):
        def total(x):
            y = max_pool(x, cpu_forms)
            return jnp.sum(y.astype(jnp.float32)), y

        return jax.grad(total, has_aux=True)(x)

    ours, expected = both(True), both(False)
    np.testing.assert_array_equal(ours[1], expected[1])
    # After rounding to bfloat16, two pixels of a window may tie.
    if dtype == jnp.float32:
        np.testing.assert_array_equal(ours[0], expected[0])


@pytest.mark.parametrize("size", [4, 5])
def test_equal_pixels_of_a_window_share_its_gradient(size):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2, (2, size, size, 3)).astype(np.float32)
    gradient = rng.normal(size=(2, *2 * [math.ceil(size / 2)], 3)).astype(np.float32)
    expected = np.zeros_like(x)
    for at in np.ndindex(gradient.shape):
        image, row, column, channel = at
        rows, columns = (slice(max(0, 2 * i - 1), 2 * i + 2) for i in (row, column))
        window = x[image, rows, columns, channel]
        largest = window == window.max()
        share = gradient[at] / largest.sum()
        expected[image, rows, columns, channel] += share * largest
    _, pull = jax.vjp(partial(max_pool, cpu_forms=True), jnp.asarray(x))
    np.testing.assert_allclose(*pull(gradient), expected, atol=1e-6)


def test_strided_convolutions_pad_both_sides_alike():
    conv = conv_of(1, 1, 3, stride=2)
    conv.kernel[...] = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(conv(x)[0, :, :, 0], x[0, ::2, ::2, 0])


def test_max_pool_keeps_negative_values_at_the_border():
    x = jnp.full((1, 4, 4, 1), -3.0)
    np.testing.assert_array_equal(max_pool(x), np.full((1, 2, 2, 1), -3.0))


def test_training_normalises_with_the_batch():
    y = norm_of()(jnp.asarray(activations()), True)
    np.testing.assert_allclose(y.mean(axis=(0, 1, 2)), 0.0, atol=1e-5)
    np.testing.assert_allclose(y.std(axis=(0, 1, 2)), 1.0, atol=1e-4)


def test_running_statistics_average_the_biased_batch_moments():
    norm = norm_of()
    x = activations()
    norm(jnp.asarray(x), True)
    np.testing.assert_allclose(norm.mean[...], 0.1 * x.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * x.var((0, 1, 2)), rtol=1e-5)


def test_evaluation_normalises_with_the_running_statistics():
    norm = norm_of()
    norm.mean[...] = jnp.array([1.0, 2.0, 3.0])
    norm.var[...] = jnp.array([4.0, 4.0, 4.0])
    x = activations()
    expected = (x - np.array([1.0, 2.0, 3.0])) / np.sqrt(4.0 + 1e-5)
    np.testing.assert_allclose(norm(jnp.asarray(x), False), expected, rtol=1e-4)


def test_statistics_of_bfloat16_activations_are_float32():
    norm = norm_of(dtype=jnp.bfloat16)
    x = jnp.asarray(activations(), jnp.bfloat16)
    assert norm(x, True).dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(norm.mean[...], 0.1 * exact.mean((0, 1, 2)), rtol=1e-5)


def test_constant_activations_stay_finite():
    # The mean square minus the squared mean can round to a negative number.
    norm = norm_of()
    y = norm(jnp.full((4, 3, 3, 3), 1234.567), True)
    assert np.isfinite(y).all()
    assert (np.asarray(norm.var[...]) >= 0).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_max_pool_sends_the_gradient_to_the_largest_pixel(dtype):
    x = jnp.zeros((1, 4, 4, 1), dtype).at[0, 1, 1, 0].set(2.0)
    gradient = jax.grad(lambda x: max_pool(x).astype(jnp.float32).sum())(x)
    # All four windows contain that pixel.
    assert gradient[0, 1, 1, 0] == 4.0
    assert gradient.sum() == 4.0


def values(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("channels", "groups"), [(12, 3), (32, 8), (32, 1), (64, 2)])
@pytest.mark.parametrize("size", [2, 5])
def test_the_cpu_form_is_the_grouped_convolution_and_its_gradient(
    channels, groups, size, stride
):
    x = values(2, size, size + 1, channels)

    def of_form(cpu_forms):
        kwargs = {"stride": stride, "groups": groups, "cpu_forms": cpu_forms}
        return with_gradients(conv_of(channels, 2 * channels, 3, **kwargs), x)

    for ours, expected in zip(of_form(True), of_form(False), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_groups_are_convolutions_of_their_own():
    conv = conv_of(6, 4, 3, groups=2)
    x = values(2, 5, 5, 6)
    assert conv.kernel.shape == (3, 3, 3, 4)
    halves = []
    for half in range(2):
        alone = conv_of(3, 2, 3)
        alone.kernel[...] = conv.kernel[..., 2 * half : 2 * half + 2]
        halves.append(alone(x[..., 3 * half : 3 * half + 3]))
    np.testing.assert_allclose(conv(x), np.concatenate(halves, -1), atol=1e-5)


def test_squeeze_excite_scales_channels_by_a_gate_of_their_means():
    module = SqueezeExcite(32, rngs=nnx.Rngs(params=0))
    module.excite.bias[...] = values(32, seed=1)
    x = np.asarray(values(2, 3, 3, 32))
    squeeze, excite = (
        np.asarray(m.kernel[...]) for m in (module.squeeze, module.excite)
    )
    hidden = np.maximum(x.mean(axis=(1, 2)) @ squeeze, 0.0)
    logits = hidden @ excite + np.asarray(module.excite.bias[...])
    expected = x / (1.0 + np.exp(-logits))[:, None, None]
    np.testing.assert_allclose(module(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("channels", "squeezed"), [(256, 16), (64, 8)])
def test_squeeze_excite_reduces_to_a_sixteenth_and_at_least_8(channels, squeezed):
    module = SqueezeExcite(channels, rngs=nnx.Rngs(params=0))
    assert module.squeeze.kernel.shape == (channels, squeezed)


@pytest.mark.parametrize("size", [1, 4, 5])
def test_average_pool_leaves_what_is_over_the_edge_out_of_the_mean(size):
    x = np.asarray(values(2, size, size, 3))
    starts = range(0, size, 2)
    rows = [[x[:, i : i + 2, j : j + 2].mean((1, 2)) for j in starts] for i in starts]
    expected = np.stack([np.stack(row, 1) for row in rows], 1)
    np.testing.assert_allclose(average_pool(jnp.asarray(x)), expected, atol=1e-6)


def normalised(x, num_devices, **kwargs):
    """Returns output, new statistics and a gradient of a BatchNorm over devices."""
    mesh = jax.make_mesh(
        (num_devices,),
        ("data",),
        axis_types=(AxisType.Auto,),
        devices=jax.devices()[:num_devices],
    )

    def forward(x):
        norm = norm_of(**kwargs)
        y = norm(x, train=True)
        return y, norm.mean[...][None], norm.var[...][None]

    share = PartitionSpec("data")
    forward = jax.shard_map(forward, mesh=mesh, in_specs=share, out_specs=share)

    def total(x):
        y, mean, var = forward(x)
        return jnp.sum(jnp.sin(y)), (y, mean, var)

    gradient, outputs = jax.jit(jax.grad(total, has_aux=True))(x)
    return jax.device_get((*outputs, gradient))


@pytest.mark.parametrize(("group", "axis_name"), [(8, "data"), (1, None)])
def test_a_group_of_all_devices_is_the_whole_batch_and_of_one_is_its_own(
    group, axis_name
):
    x = activations()
    ours = normalised(x, 8, axis_name="data", group=group)
    expected = normalised(x, 8, axis_name=axis_name)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_each_group_of_devices_is_normalised_by_its_own_images():
    x = activations()
    y, mean, var, _ = normalised(x, 8, axis_name="data", group=4)
    for half in (slice(0, 4), slice(4, 8)):
        moments = x[half].mean(axis=(0, 1, 2)), x[half].var(axis=(0, 1, 2))
        expected = (x[half] - moments[0]) / np.sqrt(moments[1] + 1e-5)
        np.testing.assert_allclose(y[half], expected, atol=1e-5)
        rows = np.ones((4, 1))
        np.testing.assert_allclose(mean[half], 0.1 * moments[0] * rows, atol=1e-6)
        np.testing.assert_allclose(var[half], 0.9 + 0.1 * moments[1] * rows, rtol=1e-5)


def test_on_fewer_devices_than_a_group_all_of_them_are_one():
    x = activations()
    ours = normalised(x, 2, axis_name="data", group=4)
    expected = normalised(x, 2, axis_name="data")
    np.testing.assert_allclose(ours[0], expected[0], atol=1e-6)
