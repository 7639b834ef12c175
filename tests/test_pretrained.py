import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_torchvision_golden import (
    RECORDED,
    golden_file,
    golden_images,
    torchvision_logits,
    torchvision_weights,
)

from jaxii.errors import InputError
from jaxii.model.multitask import make_network
from jaxii.model.pretrained import from_torchvision, load_pretrained, read_weights


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


def our_logits(name, **kwargs):
    _, depth, variant = RECORDED[name]
    network = network_of(depth, variant=variant, **kwargs)
    loaded = from_torchvision(torchvision_weights(name), *zeros_of(network))
    apply = jax.jit(lambda p, s, x: network.apply(p, s, x, train=False)[0].logits)
    return np.asarray(apply(loaded.params, loaded.batch_stats, golden_images()))


def relative_difference(ours, theirs):
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.fixture(scope="module")
def small():
    """A ResNet-18 state dict, and what `Network.init` gives for 1000 classes."""
    return torchvision_weights("resnet18"), *zeros_of(network_of(18))


@pytest.mark.parametrize("name", RECORDED)
def test_loaded_weights_give_torchvisions_or_timms_recorded_logits(name):
    with np.load(golden_file(name)) as recorded:
        assert relative_difference(our_logits(name), recorded["logits"]) <= 1e-4


@pytest.mark.parametrize("name", ["resnet18"])
def test_the_forms_for_accelerators_give_the_same_logits(name):
    with np.load(golden_file(name)) as recorded:
        ours = our_logits(name, platform="tpu")
        assert relative_difference(ours, recorded["logits"]) <= 1e-4


@pytest.mark.parametrize("name", RECORDED)
def test_loaded_weights_give_the_installed_librarys_logits(name):
    pytest.importorskip(RECORDED[name].library)
    assert relative_difference(our_logits(name), torchvision_logits(name)) <= 1e-4


def test_a_fitting_classifier_is_loaded(small):
    weights, params, batch_stats = small
    loaded = from_torchvision(weights, params, batch_stats)
    assert loaded.not_loaded == ()
    np.testing.assert_array_equal(
        loaded.params["classifier"]["kernel"], weights["fc.weight"].T
    )


def test_a_classifier_of_other_labels_keeps_its_initial_values(small):
    weights, _, _ = small
    network = network_of(18, num_classes=7, embedding_dim=3)
    params, batch_stats = zeros_of(network)
    loaded = from_torchvision(weights, params, batch_stats)
    assert loaded.not_loaded == ("classifier", "embedding")
    assert not loaded.params["classifier"]["kernel"].any()


def test_the_trees_given_are_not_changed(small):
    weights, params, batch_stats = small
    from_torchvision(weights, params, batch_stats)
    assert not any(leaf.any() for leaf in jax.tree.leaves((params, batch_stats)))


def test_loaded_trees_have_the_structure_and_types_of_the_initial_ones(small):
    weights, params, batch_stats = small
    loaded = from_torchvision(weights, params, batch_stats)
    describe = jax.tree_util.Partial(
        jax.tree.map, lambda leaf: (leaf.shape, leaf.dtype)
    )
    assert describe(loaded.params) == describe(params)
    assert describe(loaded.batch_stats) == describe(batch_stats)


def test_missing_weights_are_named(small):
    weights, params, batch_stats = small
    weights = {k: v for k, v in weights.items() if k != "layer2.0.downsample.1.bias"}
    with pytest.raises(InputError, match=r"layer2\.0\.downsample\.1\.bias is missing"):
        from_torchvision(weights, params, batch_stats)


def test_weights_of_another_shape_are_named_with_both_shapes(small):
    weights, params, batch_stats = small
    weights = {**weights, "conv1.weight": np.zeros((64, 3, 3, 3), np.float32)}
    with pytest.raises(InputError, match=r"conv1.weight gives \(3, 3, 3, 64\), needed"):
        from_torchvision(weights, params, batch_stats)


def test_weights_without_a_place_are_named(small):
    weights, params, batch_stats = small
    weights = {**weights, "layer1.0.se.weight": np.zeros(1, np.float32)}
    with pytest.raises(InputError, match=r"layer1\.0\.se\.weight has no place"):
        from_torchvision(weights, params, batch_stats)


def test_weights_that_are_not_finite_are_refused(small):
    weights, params, batch_stats = small
    weights = {**weights, "bn1.bias": np.full(64, np.nan, np.float32)}
    with pytest.raises(InputError, match=r"bn1\.bias is not finite"):
        from_torchvision(weights, params, batch_stats)


def test_weights_of_another_variant_are_refused():
    weights = torchvision_weights("seresnet50")
    params, batch_stats = zeros_of(network_of(50))
    with pytest.raises(InputError, match=r"se\.fc1\.bias has no place.*same variant"):
        from_torchvision(weights, params, batch_stats)


def test_weights_of_another_depth_give_one_short_line(small):
    weights, _, _ = small
    with pytest.raises(InputError, match="not this network's") as caught:
        from_torchvision(weights, *zeros_of(network_of(50)))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600


def test_an_npz_file_is_loaded(small, tmp_path):
    weights, params, batch_stats = small
    np.savez(tmp_path / "weights.npz", **weights)
    loaded = load_pretrained(tmp_path / "weights.npz", params, batch_stats)
    np.testing.assert_array_equal(
        loaded.batch_stats["trunk"]["stem_norm"]["var"], weights["bn1.running_var"]
    )


def write_safetensors(path, header, data):
    header = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def entry(dtype, shape, start, stop):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_safetensors_arrays_keep_their_values_and_shapes(tmp_path):
    path = tmp_path / "weights.safetensors"
    a = np.arange(6, dtype="<f4").reshape(2, 3)
    count = np.array(7, "<i8")
    header = {
        "__metadata__": {"format": "pt"},
        "a": entry("F32", [2, 3], 0, 24),
        "n": entry("I64", [], 24, 32),
    }
    write_safetensors(path, header, a.tobytes() + count.tobytes())
    weights = read_weights(path)
    assert list(weights) == ["a", "n"]
    np.testing.assert_array_equal(weights["a"], a)
    assert weights["n"] == 7


def test_bfloat16_safetensors_are_widened_to_float32(tmp_path):
    path = tmp_path / "weights.safetensors"
    values = jnp.asarray([1.0, -2.5, 3e38, 1e-30], jnp.bfloat16)
    header = {"a": entry("BF16", [4], 0, 8)}
    write_safetensors(path, header, np.asarray(values).tobytes())
    np.testing.assert_array_equal(
        read_weights(path)["a"], np.asarray(values.astype(jnp.float32))
    )


@pytest.mark.parametrize(
    "bad",
    [
        entry("F32", [2], 0, 400),
        entry("F32", [2], -8, 0),
        entry("F32", [3], 0, 8),
        entry("F99", [2], 0, 8),
        {"dtype": "F32"},
        "text",
    ],
)
def test_a_safetensors_header_that_lies_is_refused(tmp_path, bad):
    path = tmp_path / "weights.safetensors"
    write_safetensors(path, {"a": bad}, bytes(8))
    with pytest.raises(InputError, match="cannot be read"):
        read_weights(path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 9, struct.pack("<Q", 2) + b"{]"])
@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_a_damaged_file_is_refused(tmp_path, suffix, content):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read"):
        read_weights(path)


def test_an_npz_file_with_pickles_is_refused(tmp_path):
    np.savez(tmp_path / "weights.npz", a=np.array([{}], object))
    with pytest.raises(InputError, match="cannot be read"):
        read_weights(tmp_path / "weights.npz")


def test_a_pth_file_is_refused_with_the_way_out():
    with pytest.raises(InputError, match=r"safetensors\.torch\.save_file"):
        read_weights("resnet50.pth")


def test_an_absent_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not a file"):
        read_weights(tmp_path / "weights.npz")
