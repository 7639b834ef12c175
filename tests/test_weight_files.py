import hashlib
import json
import pickle
import random
import re
import struct
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from make_torchvision_golden import CHECKPOINT, TORCH_FILES
from test_torch_pickle import Runs, hostile
from torch_files import (
    Call,
    Code,
    Global,
    Written,
    legacy_file,
    ordered,
    pickled,
    save,
    save_legacy,
    storage,
    tensor,
    zip_file,
)

from jaxii.errors import InputError
from jaxii.models.weight_files import read_state_dict

ARRAYS = {
    "conv1.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2),
    "bn1.bias": np.array([-1.5, 2.0], np.float32),
    "bn1.num_batches_tracked": np.array(7),
}
SIX = storage("0", "FloatStorage", 6)
NUMBERS = {"0": np.arange(6, dtype=np.float32).tobytes()}


def read_content(folder, content, name="weights.pth"):
    (folder / name).write_bytes(content)
    return read_state_dict(str(folder / name))


def save_safetensors(path, arrays):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, array in arrays.items():
        kind = {"f": "F32", "i": "I64"}[array.dtype.kind]
        header[name] = entry(kind, array.shape, len(data), len(data) + array.nbytes)
        data += array.tobytes()
    write_safetensors(path, header, data)
    return path


def write_safetensors(path, header, data):
    header = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def entry(dtype, shape, start, stop):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


# Readable files.


@pytest.mark.parametrize("write", [save, save_legacy, save_safetensors])
def test_names_values_types_and_shapes_are_those_of_the_file(tmp_path, write):
    found = read_state_dict(str(write(tmp_path / "weights", ARRAYS))).arrays
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, strict=True)


@pytest.mark.parametrize("form", TORCH_FILES)
def test_a_training_checkpoint_that_torch_wrote_gives_its_averaged_weights(form):
    found = read_state_dict(str(TORCH_FILES[form]))
    assert found.origin.startswith(f"state_dict_ema of {TORCH_FILES[form].name} (sha")
    arrays = dict(found.arrays)
    arrays["0.weight"] = arrays["0.weight"].transpose(1, 0, 2, 3)
    assert arrays["1.weight"].dtype == np.float16
    for name, expected in CHECKPOINT.items():
        np.testing.assert_array_equal(arrays[name].astype(np.float32), expected)
    assert arrays["1.num_batches_tracked"] == 1


def test_the_origin_has_the_files_name_and_digest(tmp_path):
    path = save(tmp_path / "resnet50.pth", ARRAYS)
    found = read_state_dict(str(path))
    assert found.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.origin == f"resnet50.pth (sha256 {found.digest})"


@pytest.mark.parametrize(
    ("tree", "wrapper"),
    [
        ({"state_dict": "there", "epoch": 3, "optimizer": {"state": {}}}, "state_dict"),
        ({"model": "there", "lr_scheduler": {"last_epoch": 1}}, "model"),
        ({"model": "other", "model_ema": "there"}, "model_ema"),
        ({"state_dict": "other", "state_dict_ema": "there"}, "state_dict_ema"),
        ({"state_dict": "there", "state_dict_ema": None}, "state_dict"),
    ],
)
def test_the_state_dict_is_found_in_a_wrapper_the_averaged_one_first(
    tmp_path, tree, wrapper
):
    write = Written()
    known = {
        "there": ordered({"a": write(np.ones(2, np.float32))}),
        "other": ordered({"a": write(np.zeros(2, np.float32))}),
    }
    value = {
        key: known.get(part, part) if isinstance(part, str) else part
        for key, part in tree.items()
    }
    found = read_content(tmp_path, zip_file(value, write.data))
    assert found.origin.startswith(f"{wrapper} of weights.pth")
    np.testing.assert_array_equal(found.arrays["a"], 1.0)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrapped_models_are_taken_off(tmp_path, prefix):
    arrays = {prefix + name: array for name, array in ARRAYS.items()}
    for write in (save, save_safetensors):
        found = read_state_dict(str(write(tmp_path / "weights", arrays))).arrays
        assert list(found) == list(ARRAYS)


def test_a_name_with_and_without_a_prefix_is_refused(tmp_path):
    path = save(tmp_path / "a", {"a": np.ones(1), "module.a": np.zeros(1)})
    with pytest.raises(
        InputError, match="holds a more than once, with different prefixes"
    ):
        read_state_dict(str(path))


VALUES = np.asarray([1.0, -2.5, 3e38, 1e-30], np.float32)


def test_bfloat16_is_widened_to_float32(tmp_path):
    bits = np.asarray(jnp.asarray(VALUES, jnp.bfloat16)).view(np.uint16)
    expected = np.asarray(jnp.asarray(VALUES, jnp.bfloat16).astype(jnp.float32))
    found = read_state_dict(str(save(tmp_path / "a.pth", {"a": bits})))
    np.testing.assert_array_equal(found.arrays["a"], expected, strict=True)
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": entry("BF16", [4], 0, 8)}, bits.tobytes())
    found = read_state_dict(str(path))
    np.testing.assert_array_equal(found.arrays["a"], expected, strict=True)


def test_a_transposed_part_of_a_shared_storage_is_itself(tmp_path):
    value = {"a": tensor(SIX, (2, 2), (1, 3), 1), "b": tensor(SIX, (6,), (1,))}
    found = read_content(tmp_path, zip_file(value, NUMBERS)).arrays
    np.testing.assert_array_equal(found["a"], [[1, 4], [2, 5]])
    np.testing.assert_array_equal(found["b"], np.arange(6))
    assert not found["a"].flags.writeable


# Files that run code.


@pytest.mark.parametrize("name", hostile("marker"))
@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_a_malicious_file_is_refused_by_name_and_does_nothing(tmp_path, name, form):
    marker = tmp_path / "marker"
    value, pattern = hostile(marker)[name]
    evil = Code(pickle.dumps(value, 2)[2:-1])
    honest = tensor(SIX, (6,), (1,))
    contents = {
        "zip": lambda: zip_file({"a": honest, "b": evil}, NUMBERS),
        "legacy": lambda: legacy_file({"a": honest, "b": evil}, NUMBERS, {"0": 6}),
        "bare": lambda: pickled(evil),
    }
    with pytest.raises(
        InputError, match=rf"refers to {pattern}.*; nothing was executed"
    ):
        read_content(tmp_path, contents[form]())
    assert not marker.exists()


def test_a_malicious_pickle_beside_the_weights_is_never_read(tmp_path):
    marker = tmp_path / "marker"
    evil = pickle.dumps(Runs(open, str(marker), "w"))
    value = {"a": tensor(SIX, (6,), (1,))}
    content = zip_file(value, NUMBERS, **{"constants.pkl": evil, "code/a.py": "1 / 0"})
    assert list(read_content(tmp_path, content).arrays) == ["a"]
    assert not marker.exists()


def test_a_whole_model_is_refused_with_the_way_out(tmp_path):
    model = Call(Global("torchvision.models.resnet", "ResNet"), ())
    with pytest.raises(
        InputError,
        match=r"torchvision\.models\.resnet\.ResNet.*safetensors\.torch\.save_file",
    ):
        read_content(tmp_path, zip_file(model, {}))


# Files that refer beyond their data or declare wrong values.


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((7,), (1,), 0),
        ((6,), (1,), 1),
        ((2, 3), (4, 1), 0),
        ((2,), (2**62,), 0),
        ((1,), (1,), 2**62),
        ((10**9,), (0,), 0),
        ((2**40, 2**40), (0, 0), 0),
        ((0,), (1,), 0),
        ((2, 3), (1,), 0),
    ],
)
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_tensor_that_is_not_in_its_storage_is_refused(
    tmp_path, form, shape, strides, offset
):
    value = {"conv1.weight": tensor(SIX, shape, strides, offset)}
    content = (
        zip_file(value, NUMBERS)
        if form == "zip"
        else legacy_file(value, NUMBERS, {"0": 6})
    )
    with pytest.raises(InputError, match=r"conv1\.weight.* (not fit in|strides)"):
        read_content(tmp_path, content)


@pytest.mark.parametrize(
    ("where", "pattern"),
    [
        (storage("0", "FloatStorage", 2**62), "the stated number of bytes"),
        (storage("0", "FloatStorage", 5), "the stated number of bytes"),
        (storage("0", "DoubleStorage", 6), "the stated number of bytes"),
        (storage("1", "FloatStorage", 6), "has no storage '1'"),
        (storage("../../marker", "FloatStorage", 6), r"no storage '\.\./\.\./marker'"),
        (storage("/etc/passwd", "FloatStorage", 6), "no storage '/etc/passwd'"),
    ],
)
def test_a_storage_that_is_not_what_is_said_is_refused(tmp_path, where, pattern):
    content = zip_file({"a": tensor(where, (1,), (1,))}, NUMBERS)
    with pytest.raises(InputError, match=pattern):
        read_content(tmp_path, content)


def test_members_with_paths_are_not_written_anywhere(tmp_path):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    value = {"a": tensor(SIX, (6,), (1,))}
    members = {"../../../marker": b"1", "data/../../marker": b"1"}
    read_content(folder, zip_file(value, NUMBERS, **members))
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["weights.pth"]


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(100_000_000))
    assert path.stat().st_size < 200_000
    with pytest.raises(InputError, match=r"member archive/data\.pkl is compressed"):
        read_state_dict(str(path))


def test_members_that_claim_more_than_the_file_has_are_refused(tmp_path):
    path = save(tmp_path / "weights.pth", ARRAYS)
    with zipfile.ZipFile(path, "a") as archive:
        for member in archive.infolist():
            member.file_size = member.compress_size = 2**31
        archive.writestr("archive/more", b"")  # forces writing the directory
    with pytest.raises(InputError, match="claim more bytes than the file has"):
        read_state_dict(str(path))


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (zip_file({}, {}, **{"b/data.pkl": b""}), "without the single data.pkl"),
        (pickled(1), "a pickle that torch.save did not write"),
        (legacy_file({}, {}, {}, little_endian=False), "not little-endian"),
        (legacy_file({"a": 1}, {}, {}), "entry a is not a tensor"),
        (zip_file({"net": {}, "epoch": 3}, {}), "net is not a tensor; .*level or in"),
        (zip_file({1: tensor(SIX, (6,), (1,))}, NUMBERS), "entry 1 is not a tensor"),
        (zip_file([1], {}), "holds a list, not a state dict"),
        (legacy_file({}, NUMBERS, {"0": 6}), "cannot be used"),
        (b"", "neither"),
        (b"<!DOCTYPE html>", "neither"),
        (b"version https://git-lfs.github.com/spec/v1", "neither"),
        (b"PK\x03\x04", "not a zip file"),
        (b"\x80\x02", "exhausted"),
        (b"\xff" * 8 + b"{", "header extends past the end"),
        (struct.pack("<Q", 2) + b"{]", "cannot be used"),
        (struct.pack("<Q", 60_000) + b'{"a":' * 12_000, "cannot be used"),
    ],
)
def test_what_holds_no_weights_is_refused_with_the_reason(tmp_path, content, pattern):
    with pytest.raises(InputError, match=pattern) as caught:
        read_content(tmp_path, content)
    assert "\n" not in str(caught.value)


def test_a_big_endian_zip_is_refused(tmp_path):
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickled({}))
        archive.writestr("a/byteorder", "big")
    with pytest.raises(InputError, match="not little-endian"):
        read_state_dict(str(path))


@pytest.mark.parametrize(
    "bad",
    [
        entry("F32", [2], 0, 400),
        entry("F32", [2], -8, 0),
        entry("F32", [3], 0, 8),
        entry("F32", [-1, -2], 0, 8),
        entry("F99", [2], 0, 8),
        {"dtype": "F32"},
        "text",
    ],
)
def test_a_safetensors_header_that_lies_is_refused(tmp_path, bad):
    path = tmp_path / "weights.safetensors"
    write_safetensors(path, {"a": bad}, bytes(8))
    with pytest.raises(InputError, match="cannot be used"):
        read_state_dict(str(path))


@pytest.mark.parametrize("name", ["\x1b[2J", "a\nb", "a" * 201])
def test_no_name_in_a_file_can_steer_or_flood_a_terminal(tmp_path, name):
    value = tensor(SIX, (6,), (1,))
    for tree in (
        {name: value},
        {"a": value, "b": Global(name.replace("\n", " "), "x")},
    ):
        with pytest.raises(InputError) as caught:
            read_content(tmp_path, zip_file(tree, NUMBERS))
        message = str(caught.value)
        assert message.isprintable()
        assert len(message) < 800


def test_an_absent_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.pth cannot be read"):
        read_state_dict(str(tmp_path / "nowhere.pth"))


# Damaged files.


@pytest.mark.parametrize("write", [save, save_legacy, save_safetensors])
def test_a_file_cut_anywhere_is_refused(tmp_path, write):
    content = write(tmp_path / "whole", ARRAYS).read_bytes()
    for length in range(0, len(content), 7):
        with pytest.raises(InputError):
            read_content(tmp_path, content[:length])


@pytest.mark.parametrize("form", TORCH_FILES)
def test_a_damaged_file_is_refused_or_gives_arrays_and_nothing_else(tmp_path, form):
    content = TORCH_FILES[form].read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 1, 8))):
            damaged[rng.randrange(len(content))] = rng.randrange(256)
        try:
            found = read_content(tmp_path, bytes(damaged)).arrays
        except InputError as error:
            refused += 1
            assert re.match(r"\S+ cannot be used as weights: \S", str(error))
        else:
            assert all(isinstance(array, np.ndarray) for array in found.values())
    assert 100 < refused < 400


def test_a_bit_that_is_flipped_in_the_numbers_of_a_zip_is_noticed(tmp_path):
    path = save(tmp_path / "weights.pth", ARRAYS)
    content = bytearray(path.read_bytes())
    at = content.find(ARRAYS["conv1.weight"].tobytes())
    content[at + 9] ^= 1
    with pytest.raises(InputError, match="Bad CRC"):
        read_content(tmp_path, bytes(content))
