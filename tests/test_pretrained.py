import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_torchvision_golden import (
    RECORDED,
    golden_file,
    golden_images,
    live_model,
    torchvision_weights,
)
from torch_files import save, save_legacy

from jaxii.errors import InputError
from jaxii.models.multitask import make_network
from jaxii.models.pretrained import check_stem_of_files, fit_trunk, load_trunk
from jaxii.models.weight_files import read_state_dict
from jaxii.train.initial_weights import PretrainedWeights


def zeros_of(network):
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def network_of(depth, num_classes=1000, embedding_dim=0, **kwargs):
    return make_network(
        depth=depth,
        num_classes=num_classes,
        embedding_dim=embedding_dim,
        dtype=jnp.float32,
        **kwargs,
    )


def our_logits(name, weights, **kwargs):
    """Returns the logits of our network with the file's classifier, [2, 1000]."""
    _, depth, variant = RECORDED[name]
    network = network_of(depth, variant=variant, **kwargs)
    params, batch_stats = zeros_of(network)
    trunk, statistics = fit_trunk(weights, params["trunk"], batch_stats["trunk"])
    classifier = {"kernel": weights["fc.weight"].T, "bias": weights["fc.bias"]}
    params = {"trunk": trunk, "classifier": classifier}
    apply = jax.jit(lambda p, s, x: network.apply(p, s, x, train=False)[0].logits)
    return np.asarray(apply(params, {"trunk": statistics}, golden_images()))


def relative_difference(ours, theirs):
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.fixture(scope="module")
def small():
    """A ResNet-18 state dict, and the result of `Network.init` for its trunk."""
    params, batch_stats = zeros_of(network_of(18))
    return torchvision_weights("resnet18"), params["trunk"], batch_stats["trunk"]


@pytest.mark.parametrize("name", RECORDED)
def test_loaded_weights_give_torchvisions_or_timms_recorded_logits(name):
    with np.load(golden_file(name)) as recorded:
        ours = our_logits(name, torchvision_weights(name))
        assert relative_difference(ours, recorded["logits"]) <= 1e-4


@pytest.mark.parametrize("name", ["resnet18"])
def test_the_forms_for_accelerators_give_the_same_logits(name):
    with np.load(golden_file(name)) as recorded:
        ours = our_logits(name, torchvision_weights(name), platform="tpu")
        assert relative_difference(ours, recorded["logits"]) <= 1e-4


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("name", RECORDED)
def test_a_file_of_the_installed_library_gives_its_logits(name, form, tmp_path):
    pytest.importorskip(RECORDED[name].library)
    state, logits = live_model(name)
    path = tmp_path / "weights"
    if form == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        zipped = form == "zip"
        pytest.importorskip("torch").save(
            state, path, _use_new_zipfile_serialization=zipped
        )
    ours = our_logits(name, read_state_dict(str(path)).arrays)
    assert relative_difference(ours, logits) <= 1e-4


def trunk_of(path, network):
    return load_trunk(str(path), *jax.eval_shape(network.init, jax.random.key(0)))


@pytest.mark.parametrize("write", [save, save_legacy])
def test_a_file_gives_the_trunk_and_its_origin(small, tmp_path, write):
    weights, params, batch_stats = small
    path = write(tmp_path / "resnet18.pth", weights)
    found = trunk_of(path, network_of(18, num_classes=7))
    expected = fit_trunk(weights, params, batch_stats)
    assert jax.tree.all(
        jax.tree.map(np.array_equal, (found.params, found.batch_stats), expected)
    )
    assert found.origin == f"resnet18.pth (sha256 {found.digest})"


def test_the_classifier_is_left_out_even_where_it_fits(small, tmp_path):
    """The labels of its rows are unknown."""
    path = save(tmp_path / "resnet18.pth", small[0])
    network = network_of(18, num_classes=1000, embedding_dim=3)
    found = trunk_of(path, network)
    assert found.left_out == "fc.weight [1000, 512] and fc.bias [1000]"
    params, batch_stats = zeros_of(network)
    weights = PretrainedWeights(
        source=found.origin,
        params={"trunk": found.params},
        batch_stats={"trunk": found.batch_stats},
    )
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    started, statistics = weights.load(
        lambda key: (params, batch_stats), jax.random.key(0), one
    )
    assert set(started) == {"trunk", "classifier", "embedding"}
    assert not started["classifier"]["kernel"].any()
    np.testing.assert_array_equal(
        statistics["trunk"]["stem_norm"]["var"], small[0]["bn1.running_var"]
    )
    assert not params["trunk"]["stem_conv"]["kernel"].any()  # inputs are unchanged


def test_a_file_without_a_classifier_is_a_start_too(small, tmp_path):
    weights = {k: v for k, v in small[0].items() if not k.startswith("fc.")}
    found = trunk_of(save(tmp_path / "resnet18.pth", weights), network_of(18))
    assert found.left_out == ""


def test_counters_are_passed_over(small):
    weights, params, batch_stats = small
    counters = {"bn1.num_batches_tracked": np.array(7), "n_averaged": np.array(3)}
    fit_trunk(weights | counters, params, batch_stats)


def test_loaded_trees_have_the_structure_and_types_of_the_initial_ones(small):
    weights, params, batch_stats = small
    found = fit_trunk(
        {k: v.astype(np.float16) for k, v in weights.items()}, params, batch_stats
    )
    describe = jax.tree_util.Partial(
        jax.tree.map, lambda leaf: (leaf.shape, leaf.dtype)
    )
    assert describe(found) == describe((params, batch_stats))


def test_missing_weights_are_named(small):
    weights, params, batch_stats = small
    weights = {k: v for k, v in weights.items() if k != "layer2.0.downsample.1.bias"}
    with pytest.raises(InputError, match=r"layer2\.0\.downsample\.1\.bias is missing"):
        fit_trunk(weights, params, batch_stats)


def test_weights_of_another_shape_are_named_with_both_shapes(small):
    weights, params, batch_stats = small
    weights = {**weights, "conv1.weight": np.zeros((64, 3, 3, 3), np.float32)}
    with pytest.raises(InputError, match=r"conv1.weight .* \(3, 3, 3, 64\), expected"):
        fit_trunk(weights, params, batch_stats)


def test_weights_without_a_place_are_named(small):
    weights, params, batch_stats = small
    weights = {**weights, "layer1.0.se.weight": np.zeros(1, np.float32)}
    with pytest.raises(InputError, match=r"layer1\.0\.se\.weight is not part"):
        fit_trunk(weights, params, batch_stats)


def test_weights_that_are_not_finite_are_refused(small):
    weights, params, batch_stats = small
    weights = {**weights, "bn1.bias": np.full(64, np.nan, np.float32)}
    with pytest.raises(InputError, match=r"bn1\.bias has non-finite"):
        fit_trunk(weights, params, batch_stats)


def test_weights_of_another_variant_are_refused():
    weights = torchvision_weights("seresnet50")
    params, batch_stats = (tree["trunk"] for tree in zeros_of(network_of(50)))
    with pytest.raises(InputError, match=r"se\.fc1\.bias is not part.*same variant"):
        fit_trunk(weights, params, batch_stats)


def test_files_have_the_other_stem_if_its_arrays_have_the_same_shapes():
    for variant, stem in (("resnet_d", "imagenet"), ("resnet", "small")):
        check_stem_of_files(variant, stem)
    with pytest.raises(InputError, match=r"stem='small' does not fit .*stem=imagenet"):
        check_stem_of_files("resnet_d", "small")


def test_weights_that_no_float32_can_hold_are_refused(small):
    weights, params, batch_stats = small
    weights = {**weights, "bn1.bias": np.full(64, 1e300)}
    with pytest.raises(InputError, match=r"bn1\.bias has non-finite"):
        fit_trunk(weights, params, batch_stats)


def test_weights_that_are_integers_are_refused(small):
    weights, params, batch_stats = small
    weights = {**weights, "bn1.bias": np.zeros(64, np.int8)}
    with pytest.raises(InputError, match=r"bn1\.bias has dtype int8"):
        fit_trunk(weights, params, batch_stats)


def test_weights_of_another_depth_give_one_short_line(small, tmp_path):
    path = save(tmp_path / "resnet18.pth", small[0])
    with pytest.raises(
        InputError, match=r"resnet18\.pth: .*do not fit this network"
    ) as caught:
        trunk_of(path, network_of(50))
    message = str(caught.value).removeprefix(str(path))
    assert "layer1.0.conv3.weight is missing" in message
    assert "\n" not in message
    assert len(message) < 600
