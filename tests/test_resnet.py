from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from jaxii.errors import InputError
from jaxii.model.multitask import make_network
from jaxii.model.resnet import BatchNorm, Block, Conv, ResNet, max_pool


def network_of(depth=18, *, width=4, dtype=jnp.float32, **kwargs):
    kwargs = {"num_classes": 5, "embedding_dim": 0, "stem": "small", **kwargs}
    return make_network(depth=depth, width=width, dtype=dtype, **kwargs)


def norm_of(num_channels=3, **kwargs):
    kwargs = {"momentum": 0.9, "axis_name": None, "dtype": jnp.float32, **kwargs}
    return BatchNorm(num_channels, **kwargs)


def conv_of(*sizes, **kwargs):
    kwargs = {"cpu_forms": False, "dtype": jnp.float32, **kwargs}
    return Conv(*sizes, rngs=nnx.Rngs(params=0), **kwargs)


def block_of(*, bottleneck=False, last_scale=1.0, axis_name=None):
    return Block(
        3,
        4,
        stride=2,
        bottleneck=bottleneck,
        last_scale=last_scale,
        conv=conv_of,
        norm=partial(norm_of, axis_name=axis_name),
    )


def activations(batch=8):
    rng = np.random.default_rng(0)
    return rng.normal(2.0, 3.0, (batch, 4, 4, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("depth", "num_params"),
    [
        (18, 11_689_512),
        (34, 21_797_672),
        (50, 25_557_032),
        (101, 44_549_160),
        (152, 60_192_808),
    ],
)
def test_parameters_are_as_many_as_torchvision_publishes(depth, num_params):
    network = network_of(depth, width=64, num_classes=1000, stem="imagenet")
    params, _ = jax.eval_shape(network.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == num_params


def test_depth_26_is_a_bottleneck_network():
    params, _ = jax.eval_shape(network_of(26).init, jax.random.key(0))
    assert params["classifier"]["kernel"].shape == (4 * 8 * 4, 5)


@pytest.mark.parametrize(("stem", "stage1_size"), [("imagenet", 8), ("small", 32)])
def test_the_stem_sets_the_first_stages_resolution(stem, stage1_size):
    def run_stem(images):
        network = ResNet(depth=18, width=4, stem=stem, rngs=nnx.Rngs(params=0))
        return network.run_stem(images, False)

    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    expected = (1, stage1_size, stage1_size, 4)
    assert jax.eval_shape(run_stem, images).shape == expected


def test_an_unknown_depth_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match=r"depth=20 .* 18, 26, 34, 50, 101, 152"):
        network_of(20)


def test_an_unknown_stem_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match=r"stem='patch' .* imagenet, small"):
        network_of(stem="patch")


def test_a_width_of_zero_is_refused():
    with pytest.raises(InputError, match="width=0"):
        network_of(width=0)


def test_kernels_are_kaiming_normal_by_fan_out():
    kernel = conv_of(64, 256, 3).kernel[...]
    assert kernel.shape == (3, 3, 64, 256)
    assert float(kernel.std()) == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.01)


@pytest.mark.parametrize(("bottleneck", "last"), [(False, "norm2"), (True, "norm3")])
def test_a_block_that_starts_at_scale_zero_is_its_shortcut(bottleneck, last):
    block = block_of(bottleneck=bottleneck, last_scale=0.0)
    scales = {name: getattr(block, name).scale[...] for name in ("norm1", last)}
    assert not scales[last].any()
    assert (scales["norm1"] == 1.0).all()
    x = jnp.asarray(activations())
    shortcut = block.shortcut_norm(block.shortcut_conv(x), True)
    np.testing.assert_allclose(block(x, True), jax.nn.relu(shortcut), atol=1e-6)


@pytest.mark.parametrize(("zero_init", "scale"), [(True, 0.0), (False, 1.0)])
def test_the_residual_start_is_an_option(zero_init, scale):
    def last_scale():
        rngs = nnx.Rngs(params=0)
        network = ResNet(depth=18, width=1, zero_init_residual=zero_init, rngs=rngs)
        return network.stage4_block2.norm2.scale[...]

    np.testing.assert_array_equal(jax.jit(last_scale)(), np.full(8, scale))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("kernel_size", "size"), [(1, 6), (1, 7), (3, 1), (3, 2), (3, 3)]
)
def test_the_cpu_form_is_the_convolution(kernel_size, size, stride):
    x = np.random.default_rng(0).normal(size=(2, size, size + 1, 5)).astype(np.float32)
    ours, expected = (
        conv_of(5, 7, kernel_size, stride=stride, cpu_forms=choice)(jnp.asarray(x))
        for choice in (True, False)
    )
    np.testing.assert_allclose(ours, expected, atol=1e-5)


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
    # Rounded to bfloat16, two pixels of a window may tie.
    if dtype == jnp.float32:
        np.testing.assert_array_equal(ours[0], expected[0])


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
    # The mean square less the squared mean can round to a negative number.
    norm = norm_of()
    y = norm(jnp.full((4, 3, 3, 3), 1234.567), True)
    assert np.isfinite(y).all()
    assert (np.asarray(norm.var[...]) >= 0).all()


def split(module):
    structure, *trees = nnx.split(module, nnx.Param, nnx.BatchStat)
    return structure, *map(nnx.to_pure_dict, trees)


def over_devices(function, *, out_specs):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    data, same = PartitionSpec("data"), PartitionSpec()
    return jax.jit(
        jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(same, same, data),
            out_specs=out_specs,
            check_vma=True,
        )
    )


def test_synced_statistics_and_gradients_over_8_devices_are_those_of_one():
    single, params, batch_stats = split(block_of())
    synced, _, _ = split(block_of(axis_name="data"))

    def loss(structure, params, batch_stats, images):
        block = nnx.merge(structure, params, batch_stats)
        total = jnp.sum(jnp.square(block(images, True)))
        return total, nnx.to_pure_dict(nnx.state(block, nnx.BatchStat))

    def global_loss(params, batch_stats, images):
        total, stats = loss(synced, params, batch_stats, images)
        return jax.lax.psum(total, "data"), stats

    same = PartitionSpec()
    sharded = over_devices(jax.grad(global_loss, has_aux=True), out_specs=(same, same))
    whole = jax.jit(jax.grad(partial(loss, single), has_aux=True))
    images = activations(16)
    ours = jax.tree.leaves(sharded(params, batch_stats, images))
    expected = jax.tree.leaves(whole(params, batch_stats, images))
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(abs(b).max()))


def test_unsynced_statistics_are_each_devices_own():
    structure, params, batch_stats = split(block_of())

    def step(params, batch_stats, images):
        block = nnx.merge(structure, params, batch_stats)
        block(images, True)
        return block.norm1.mean[...][None]

    means = over_devices(step, out_specs=PartitionSpec("data"))
    means = np.asarray(means(params, batch_stats, activations(16)))
    assert means.shape == (8, 4)
    assert len(np.unique(means[:, 0])) == 8


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_max_pool_sends_the_gradient_to_the_largest_pixel(dtype):
    x = jnp.zeros((1, 4, 4, 1), dtype).at[0, 1, 1, 0].set(2.0)
    gradient = jax.grad(lambda x: max_pool(x).astype(jnp.float32).sum())(x)
    # All four windows hold that pixel.
    assert gradient[0, 1, 1, 0] == 4.0
    assert gradient.sum() == 4.0
