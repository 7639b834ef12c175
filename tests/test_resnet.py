from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from small_layers import conv_of, norm_of

from jaxii.errors import InputError
from jaxii.models.layers import SqueezeExcite, max_pool
from jaxii.models.multitask import make_network
from jaxii.models.resnet import VARIANTS, Block, ResNet


def network_of(depth=18, *, width=4, dtype=jnp.float32, **kwargs):
    kwargs = {"num_classes": 5, "embedding_dim": 0, "stem": "small", **kwargs}
    return make_network(depth=depth, width=width, dtype=dtype, **kwargs)


def block_of(*, bottleneck=False, variant="resnet", last_scale=1.0, axis_name=None):
    return Block(
        3,
        4,
        stride=2,
        bottleneck=bottleneck,
        variant=VARIANTS[variant],
        groups=2 if VARIANTS[variant].grouped else 1,
        last_scale=last_scale,
        conv=conv_of,
        norm=partial(norm_of, axis_name=axis_name),
        squeeze_excite=partial(SqueezeExcite, rngs=nnx.Rngs(params=0)),
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


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("variant", ["resnet", "resnet_d"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_stem_is_norm_relu_and_pool_whatever_the_sign_of_the_norms_scale(
    train, variant, dtype
):
    def stem_of():
        network = ResNet(
            depth=18, variant=variant, width=8, dtype=dtype, rngs=nnx.Rngs(params=0)
        )
        last = getattr(network, f"stem_norm{network.stem_names[-1]}")
        last.scale[...] = jnp.asarray([1, -1, 0, 2, -0.5, 1, -3, 1], jnp.float32)
        last.bias[...] = jnp.linspace(-0.5, 0.5, 8, dtype=jnp.float32)
        last.mean[...] = jnp.linspace(-0.1, 0.1, 8, dtype=jnp.float32)
        return network, last

    def written_out(network, x):
        for name in network.stem_names:
            x = getattr(network, f"stem_conv{name}")(x)
            x = jax.nn.relu(getattr(network, f"stem_norm{name}")(x, train))
        return max_pool(x)

    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(4, 20, 18, 3)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(4, 5, 5, 8)), jnp.float32)

    def found(run):
        network, last = stem_of()

        @nnx.value_and_grad(has_aux=True)
        def total(network):
            y = run(network)
            return jnp.sum(weights * y.astype(jnp.float32)), y

        (_, y), gradients = total(network)
        return y, nnx.to_pure_dict(gradients), (last.mean[...], last.var[...])

    got = found(lambda network: network.run_stem(images, train))
    expected = found(lambda network: written_out(network, images.astype(dtype)))
    np.testing.assert_array_equal(got[0], expected[0])
    jax.tree.map(np.testing.assert_array_equal, got[2], expected[2])
    tolerance = 1e-5 if dtype == jnp.float32 else 0.05
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(expected[1]), strict=True):
        scale = max(np.abs(b).max(), 1e-6)
        np.testing.assert_allclose(a / scale, b / scale, atol=tolerance)


def test_an_unknown_stem_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match=r"stem='patch' .* imagenet, small"):
        network_of(stem="patch")


def test_a_width_of_zero_is_refused():
    with pytest.raises(InputError, match="width=0"):
        network_of(width=0)


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


@pytest.mark.parametrize(
    ("variant", "depth", "num_params"),
    [
        ("resnext", 50, 25_028_904),
        ("wide_resnet", 50, 68_883_240),
        ("resnet_d", 50, 25_576_264),
        ("se_resnet", 50, 28_088_024),
    ],
)
def test_a_variants_parameters_are_as_many_as_torchvision_or_timm_publishes(
    variant, depth, num_params
):
    sizes = {"width": 64, "num_classes": 1000, "stem": "imagenet"}
    network = network_of(depth, variant=variant, **sizes)
    params, _ = jax.eval_shape(network.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == num_params


@pytest.mark.parametrize("depth", [18, 34])
@pytest.mark.parametrize("variant", ["resnext", "wide_resnet"])
def test_a_variant_of_the_bottleneck_refuses_depths_without_one(variant, depth):
    with pytest.raises(InputError, match=rf"depth={depth} .* 26, 50, 101, 152"):
        network_of(depth, variant=variant)


def test_resnext_refuses_an_odd_width():
    with pytest.raises(InputError, match=r"width=9 .* use an even width, such as 10"):
        network_of(26, variant="resnext", width=9)


def test_an_unknown_variant_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match=r"variant='vgg' .* resnet, resnet_d, se_resn"):
        network_of(variant="vgg")


@pytest.mark.parametrize(("width", "groups"), [(64, 32), (32, 16), (2, 1)])
def test_resnext_has_half_as_many_groups_as_channels_and_4_channels_each(width, groups):
    def group_channels():
        rngs = nnx.Rngs(params=0)
        network = ResNet(depth=26, variant="resnext", width=width, rngs=rngs)
        conv = network.stage1_block1.conv2
        assert conv.groups == groups
        return conv.kernel[...]

    kernel = jax.eval_shape(group_channels)
    assert kernel.shape == (3, 3, 4, 4 * groups)


@pytest.mark.parametrize("variant", ["resnet_d", "se_resnet", "resnext", "wide_resnet"])
def test_every_parameter_of_a_variants_block_is_trained(variant):
    structure, params, batch_stats = split(block_of(bottleneck=True, variant=variant))

    @jax.jit
    @jax.grad
    def gradients(params):
        block = nnx.merge(structure, params, batch_stats)
        return jnp.sum(jnp.sin(block(jnp.asarray(activations()), True)))

    for leaf in jax.tree.leaves(gradients(params)):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0


def test_a_strided_shortcut_of_resnet_d_averages_before_its_convolution():
    block = block_of(variant="resnet_d", last_scale=0.0)
    x = jnp.asarray(activations())
    means = x.reshape(8, 2, 2, 2, 2, 3).mean((2, 4))
    matrix = block.shortcut_conv.kernel[...][0, 0]
    shortcut = block.shortcut_norm(means @ matrix, True)
    np.testing.assert_allclose(block(x, True), jax.nn.relu(shortcut), atol=1e-5)
