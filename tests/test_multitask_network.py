import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_layers

from jaxii.distributed.mesh import DATA_AXIS, make_mesh
from jaxii.models.cpu import compiler_options
from jaxii.models.multitask import (
    EMBEDDING_HEAD,
    make_network,
    normalise,
    with_bias,
)


@pytest.fixture(scope="module", autouse=True)
def few_blocks():
    with small_layers.few_blocks(1, 1, 1, 1):
        yield


def network_of(**kwargs):
    defaults = {
        "depth": 18,
        "num_classes": 5,
        "embedding_dim": 3,
        "width": 4,
        "stem": "small",
        "dtype": jnp.float32,
    }
    return make_network(**{**defaults, **kwargs})


def images_of(batch=4):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(batch, 8, 8, 3)), jnp.float32)


@pytest.fixture(scope="module")
def trained():
    """A network with its trees after one training pass, so that no value is trivial."""
    network = network_of(zero_init_residual=False)
    params, batch_stats = network.init(jax.random.key(0))
    _, batch_stats = jax.jit(network.apply, static_argnames="train")(
        params, batch_stats, images_of(), train=True, key=jax.random.key(1)
    )
    return network, params, batch_stats


def evaluate(network, params, batch_stats, images=None):
    apply = jax.jit(network.apply, static_argnames="train")
    images = images_of() if images is None else images
    return apply(params, batch_stats, images, train=False)[0]


def key_types(tree):
    for key, value in tree.items():
        yield type(key)
        if isinstance(value, dict):
            yield from key_types(value)


def test_trees_are_plain_dicts_with_string_keys(trained):
    _, params, batch_stats = trained
    assert set(params) == {"trunk", "classifier", "embedding"}
    assert set(key_types({"params": params, "batch_stats": batch_stats})) == {str}


def test_every_parameter_is_float32_under_bfloat16_compute():
    trees = jax.eval_shape(network_of(dtype=jnp.bfloat16).init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(trees)} == {jnp.dtype("float32")}


def test_init_depends_on_its_key_alone(trained):
    network, first, _ = trained
    again, other = (network.init(jax.random.key(seed))[0] for seed in (0, 1))
    assert jax.tree.all(jax.tree.map(np.array_equal, first, again))
    assert not np.array_equal(
        other["classifier"]["kernel"], again["classifier"]["kernel"]
    )


def test_no_two_kernels_start_alike(trained):
    _, params, _ = trained
    block = params["trunk"]["stage1_block1"]
    assert not np.array_equal(block["conv1"]["kernel"], block["conv2"]["kernel"])


def test_the_classifier_starts_at_the_given_bias_and_all_else_as_without(trained):
    init, key = trained[0].init, jax.random.key(0)
    bias = np.linspace(-6, 1, 5, dtype=np.float32)
    plain, (params, batch_stats) = init(key), with_bias(init, bias)(key)
    np.testing.assert_array_equal(params["classifier"]["bias"], bias)
    params["classifier"]["bias"] = plain[0]["classifier"]["bias"]
    jax.tree.map(np.testing.assert_array_equal, (params, batch_stats), plain)


def test_the_classifier_starts_at_zero_bias_by_default(trained):
    _, params, _ = trained
    assert not np.any(params["classifier"]["bias"])


def test_dropping_the_embedding_head_leaves_the_logits_identical(trained):
    network, params, batch_stats = trained
    kept = {key: value for key, value in params.items() if key != EMBEDDING_HEAD}
    pure = network_of(zero_init_residual=False, embedding_dim=0)
    dropped = evaluate(pure, kept, batch_stats)
    assert dropped.embedding is None
    np.testing.assert_array_equal(
        dropped.logits, evaluate(network, params, batch_stats).logits
    )


def test_outputs_have_one_row_an_image(trained):
    outputs = evaluate(*trained)
    assert outputs.logits.shape == (4, 5)
    assert outputs.embedding.shape == (4, 3)
    assert outputs.features.shape == (4, 32)


def test_bfloat16_compute_gives_float32_outputs_near_the_float32_ones(trained):
    _, params, batch_stats = trained
    exact = evaluate(*trained)
    half_network = network_of(zero_init_residual=False, dtype=jnp.bfloat16)
    half = evaluate(half_network, params, batch_stats)
    for a, b in zip(half, exact, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=0.05 * float(jnp.abs(b).max()))


def test_training_moves_every_batch_statistic(trained):
    network, _, after = trained
    _, before = network.init(jax.random.key(0))
    same = jax.tree.map(lambda a, b: bool(np.any(a == b)), before, after)
    assert not any(jax.tree.leaves(same))


def test_evaluation_returns_the_batch_statistics_unchanged(trained):
    network, params, batch_stats = trained
    _, after = network.apply(params, batch_stats, images_of(), train=False)
    assert after is batch_stats


def test_evaluation_of_an_image_does_not_depend_on_its_batch(trained):
    whole = evaluate(*trained)
    alone = evaluate(*trained, images=images_of()[:1])
    np.testing.assert_allclose(alone.logits, whole.logits[:1], atol=1e-5)


def test_dropout_changes_the_embedding_by_key_and_never_the_logits(trained):
    network, params, batch_stats = trained
    apply = jax.jit(network.apply, static_argnames="train")
    first, other = (
        apply(params, batch_stats, images_of(), train=True, key=jax.random.key(seed))[0]
        for seed in (0, 1)
    )
    np.testing.assert_array_equal(first.logits, other.logits)
    assert not np.array_equal(first.embedding, other.embedding)


def kept_features(trained, **kwargs):
    """Returns the features, and the embedding head's inputs in training."""
    _, params, batch_stats = trained
    network = network_of(zero_init_residual=False, embedding_dim=32, **kwargs)
    head = {"kernel": jnp.eye(32), "bias": jnp.zeros(32)}
    outputs, _ = jax.jit(network.apply, static_argnames="train")(
        {**params, EMBEDDING_HEAD: head},
        batch_stats,
        images_of(16),
        train=True,
        key=jax.random.key(2),
    )
    return np.asarray(outputs.features), np.asarray(outputs.embedding)


@pytest.mark.parametrize(("given", "rate"), [({}, 0.2), ({"dropout": 0.5}, 0.5)])
def test_dropout_drops_its_share_and_scales_the_rest_to_the_same_mean(
    trained, given, rate
):
    features, kept = kept_features(trained, **given)
    alive = features > 0
    dropped = alive & (kept == 0)
    assert dropped.sum() / alive.sum() == pytest.approx(rate, abs=0.1)
    rest = alive & ~dropped
    np.testing.assert_allclose(kept[rest], features[rest] / (1 - rate), rtol=1e-5)


def test_a_dropout_of_zero_needs_no_key(trained):
    _, params, batch_stats = trained
    network = network_of(dropout=0.0)
    outputs, _ = jax.eval_shape(
        lambda x: network.apply(params, batch_stats, x, train=True), images_of()
    )
    assert outputs.embedding.shape == (4, 3)


def test_uint8_images_are_normalised_by_the_constants_of_torchvision(trained):
    network, params, batch_stats = trained
    images = np.random.default_rng(3).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    # As `transforms.ToTensor` and `transforms.Normalize` in its reference training.
    mean, deviation = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    expected = (images / 255 - mean) / deviation
    np.testing.assert_allclose(normalise(jnp.asarray(images)), expected, atol=1e-5)
    found = evaluate(network, params, batch_stats, jnp.asarray(images))
    floats = jnp.asarray(expected, jnp.float32)
    same = evaluate(network, params, batch_stats, floats)
    np.testing.assert_allclose(found.logits, same.logits, atol=1e-5)


def test_heads_start_with_a_deviation_of_a_hundredth():
    params, _ = network_of(num_classes=300, embedding_dim=300).init(jax.random.key(0))
    for head in ("classifier", EMBEDDING_HEAD):
        kernel = np.asarray(params[head]["kernel"])
        assert kernel.shape == (32, 300)
        assert kernel.std() == pytest.approx(0.01, rel=0.05)
        assert abs(kernel.mean()) < 0.001


def test_the_trunk_is_of_the_variant():
    plain, squeezed = (
        jax.eval_shape(network_of(variant=variant).init, jax.random.key(0))[0]
        for variant in ("resnet", "se_resnet")
    )
    assert jax.tree.structure(plain) != jax.tree.structure(squeezed)


@pytest.mark.parametrize(("stem", "side"), [("imagenet", 7), ("small", 3)])
def test_the_trunk_has_the_stem(stem, side):
    params, _ = jax.eval_shape(network_of(stem=stem).init, jax.random.key(0))
    assert params["trunk"]["stem_conv"]["kernel"].shape == (side, side, 3, 4)


@pytest.mark.parametrize(
    ("given", "zero"), [({}, True), ({"zero_init_residual": False}, False)]
)
def test_residual_blocks_start_as_the_identity_by_default(given, zero):
    params, _ = network_of(**given).init(jax.random.key(0))
    scales = [
        leaf
        for path, leaf in jax.tree.leaves_with_path(params["trunk"])
        if "scale" in jax.tree_util.keystr(path)
    ]
    assert any(not np.any(scale) for scale in scales) == zero


def test_forms_and_options_for_cpus_are_those_of_the_platform():
    dtype = jnp.float32
    on_cpu, on_gpu = (network_of(platform=name, dtype=dtype) for name in ("cpu", "gpu"))
    assert on_cpu.compiler_options == compiler_options(dtype)
    assert on_gpu.compiler_options == ()
    programs = []
    for network in (on_cpu, on_gpu):
        variables = jax.eval_shape(network.init, jax.random.key(0))

        def objective(params, batch_stats, network=network):
            outputs, _ = network.apply(
                params, batch_stats, images_of(), train=False, key=None
            )
            return outputs.logits.sum()

        programs.append(str(jax.make_jaxpr(jax.grad(objective))(*variables)))
    # On CPUs, conditionals store the values that gradients read in memory.
    assert ["cond[" in program for program in programs] == [True, False]


def test_its_norms_share_statistics_in_the_group_of_devices():
    mesh = make_mesh(jax.devices()[:4])
    network = network_of(bn_axis=DATA_AXIS, bn_group=2, embedding_dim=0)
    params, batch_stats = network.init(jax.random.key(0))

    def statistics(images):
        return network.apply(params, batch_stats, images, train=True, key=None)[1]

    share = jax.sharding.PartitionSpec(DATA_AXIS)
    everywhere = jax.shard_map(
        statistics, mesh=mesh, in_specs=share, out_specs=share, check_vma=False
    )
    images = images_of(8)
    tracked = jax.jit(everywhere)(images)["trunk"]["stem_norm"]["mean"].reshape(4, -1)
    np.testing.assert_array_equal(tracked[0], tracked[1])
    np.testing.assert_array_equal(tracked[2], tracked[3])
    assert not np.allclose(tracked[0], tracked[2])


def test_by_default_it_is_the_standard_network_in_bfloat16():
    network = make_network(depth=18, num_classes=5, embedding_dim=0)
    params, batch_stats = jax.eval_shape(network.init, jax.random.key(0))
    assert params["trunk"]["stem_conv"]["kernel"].shape == (7, 7, 3, 64)
    assert params["classifier"]["kernel"].shape == (512, 5)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.uint8)
    text = jax.jit(network.apply, static_argnames="train").lower(
        params, batch_stats, images, train=False
    )
    assert "tensor<7x7x3x64xbf16>" in text.as_text()


def test_dropout_without_a_key_is_refused(trained):
    network, params, batch_stats = trained
    with pytest.raises(ValueError, match="key"):
        network.apply(params, batch_stats, images_of(), train=True)


def test_training_without_an_embedding_head_needs_no_key():
    network = network_of(embedding_dim=0)
    trees = jax.eval_shape(network.init, jax.random.key(0))
    outputs, _ = jax.eval_shape(
        lambda p, s, x: network.apply(p, s, x, train=True), *trees, images_of()
    )
    assert outputs.logits.shape == (4, 5)


def test_a_second_step_does_not_trace_again(trained):
    network, params, batch_stats = trained
    num_traces = 0

    @jax.jit
    def step(params, batch_stats, images, key):
        nonlocal num_traces
        num_traces += 1
        return network.apply(params, batch_stats, images, train=True, key=key)

    for seed in range(3):
        _, batch_stats = step(params, batch_stats, images_of(), jax.random.key(seed))
    assert num_traces == 1
