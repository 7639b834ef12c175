"""Weights in torchvision's or timm's format, put into our network before training.

It reads a state dict (`conv1.weight`, `layer1.0.bn1.running_mean`, `fc.bias`) from
`.safetensors` or `.npz`, neither of which can run code, and returns the parameters and
batch statistics that `multitask` initialised, with the trunk replaced, and the
classifier too where its shape fits. Plain, wide and ResNeXt networks have torchvision's
names, which are timm's too; ResNet-D and SE-ResNet have timm's. Only NumPy: the caller
places arrays on devices.
"""

import json
import math
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxii.errors import InputError

Tree = dict[str, Any]

_SAFETENSORS_TYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",  # NumPy has no bfloat16; widened to float32 below
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}
_MODULES = {
    "conv": "conv",
    "norm": "bn",
    "shortcut_conv": "downsample.0",
    "shortcut_norm": "downsample.1",
    "stem_conv": "conv1",
    "stem_norm": "bn1",
    "gates": "se",
    "squeeze": "fc1",
    "excite": "fc2",
}
# Of a ResNet-D, whose names count what has no weights too: a ReLU, the average pool.
_DEEP_STEM_MODULES = {
    "shortcut_conv": "downsample.1",
    "shortcut_norm": "downsample.2",
    "stem_conv1": "conv1.0",
    "stem_norm1": "conv1.1",
    "stem_conv2": "conv1.3",
    "stem_norm2": "conv1.4",
    "stem_conv3": "conv1.6",
    "stem_norm3": "bn1",
}
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


class Loaded(NamedTuple):
    """Trees of float32 NumPy arrays, and what was left as it was initialised."""

    params: Tree
    batch_stats: Tree
    not_loaded: tuple[
        str, ...
    ]  # top-level keys of params: heads that kept their values


def load_pretrained(path: str | Path, params: Tree, batch_stats: Tree) -> Loaded:
    """Reads torchvision's or timm's weights from a file into our trees.

    Args:
        path: a `.safetensors` or `.npz` file.
        params: parameters as `Network.init` gave them.
        batch_stats: batch statistics as `Network.init` gave them.

    Raises:
        InputError: an unreadable file, or one that is not this network's.
    """
    return from_torchvision(read_weights(path), params, batch_stats)


def from_torchvision(
    weights: Mapping[str, np.ndarray], params: Tree, batch_stats: Tree
) -> Loaded:
    """Puts the state dict of a torchvision or timm ResNet into our trees.

    Args:
        weights: their names to arrays; `num_batches_tracked` is ignored.
        params: parameters as `Network.init` gave them; not changed.
        batch_stats: batch statistics as `Network.init` gave them; not changed.

    Returns:
        Copies with every trunk array replaced. The classifier is replaced where
        `fc.weight` and `fc.bias` have its shape; heads left alone are in `not_loaded`.

    Raises:
        InputError: trunk weights that are missing, superfluous, of another shape, or
            not finite.
    """
    unused = {name for name in weights if not name.endswith(".num_batches_tracked")}
    unused -= {"fc.weight", "fc.bias"}
    problems: list[str] = []
    modules = _MODULES
    if "stem_conv1" in params["trunk"]:
        modules = _MODULES | _DEEP_STEM_MODULES

    def take(tree: Tree, path: tuple[str, ...]) -> Tree:
        taken: Tree = {}
        for key, value in tree.items():
            if isinstance(value, Mapping):
                taken[key] = take(dict(value), (*path, key))
                continue
            name = _torchvision_name((*path, key), modules)
            unused.discard(name)
            if name not in weights:
                problems.append(f"{name} is missing")
                continue
            array = _ours(weights[name], value.ndim)
            if array.shape != value.shape:
                problems.append(f"{name} gives {array.shape}, needed {value.shape}")
            elif not np.isfinite(array).all():
                problems.append(f"{name} is not finite")
            taken[key] = array
        return taken

    new_params = {**params, "trunk": take(params["trunk"], ())}
    new_stats = {**batch_stats, "trunk": take(batch_stats["trunk"], ())}
    problems += [f"{name} has no place in this network" for name in sorted(unused)]
    if problems:
        raise InputError(_describe(problems))
    classifier = _classifier(weights, params["classifier"])
    if classifier is not None:
        new_params["classifier"] = classifier
    replaced = {"trunk"} if classifier is None else {"trunk", "classifier"}
    return Loaded(new_params, new_stats, tuple(sorted(set(params) - replaced)))


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """Reads named arrays from a `.safetensors` or `.npz` file.

    Raises:
        InputError: no such file, another format, or a damaged file. `.pth` is refused,
            because reading a pickle can run code.
    """
    path = Path(path)
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors}
    if path.suffix not in readers:
        raise InputError(
            f"{path} is not .safetensors or .npz; in torch, save the state dict with "
            "safetensors.torch.save_file(state_dict, 'weights.safetensors')"
        )
    if not path.is_file():
        raise InputError(f"{path} is not a file; give the path of pretrained weights")
    try:
        return readers[path.suffix](path)
    except (
        ValueError,
        TypeError,
        KeyError,
        OSError,
        EOFError,
        zipfile.BadZipFile,
    ) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path} cannot be read as {path.suffix} ({reason}); save it again"
        ) from error


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Reads 8 bytes of header length, a JSON header, then the raw little-endian data.

    Source: https://github.com/huggingface/safetensors#format
    """
    content = path.read_bytes()
    if len(content) < 8:
        raise ValueError("shorter than its 8-byte length field")
    (header_bytes,) = struct.unpack("<Q", content[:8])
    if header_bytes > len(content) - 8:
        raise ValueError("the header runs past the end of the file")
    header = json.loads(content[8 : 8 + header_bytes])
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    data = memoryview(content)[8 + header_bytes :]
    header.pop("__metadata__", None)
    return {name: _safetensor(name, entry, data) for name, entry in header.items()}


def _safetensor(name: str, entry: Mapping[str, Any], data: memoryview) -> np.ndarray:
    if entry["dtype"] not in _SAFETENSORS_TYPES:
        raise ValueError(f"{name} has the type {entry['dtype']}, unknown here")
    dtype = np.dtype(_SAFETENSORS_TYPES[entry["dtype"]])
    (start, stop), shape = entry["data_offsets"], tuple(entry["shape"])
    if not 0 <= start <= stop <= len(data):
        raise ValueError(f"{name} lies outside the file")
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has another number of bytes than its shape")
    array = np.frombuffer(data[start:stop], dtype)
    if entry["dtype"] == "BF16":
        array = (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array.reshape(shape)


def _torchvision_name(path: tuple[str, ...], names: Mapping[str, str]) -> str:
    """Returns e.g. layer1.0.conv2.weight for (stage1_block1, conv2, kernel)."""
    *modules, leaf = path
    return ".".join([*_torchvision_modules(modules, names), _LEAVES[leaf]])


def _torchvision_modules(modules: list[str], names: Mapping[str, str]) -> Iterator[str]:
    for module in modules:
        if block := re.fullmatch(r"stage(\d+)_block(\d+)", module):
            yield f"layer{block[1]}.{int(block[2]) - 1}"
        elif module in names:
            yield names[module]
        else:
            kind = module.rstrip("0123456789")
            yield names[kind] + module[len(kind) :]


def _ours(array: np.ndarray, rank: int) -> np.ndarray:
    """torch's [out, in, height, width] or [out, in] in our axis order, as float32.

    A matrix may be a 1x1 convolution there, as timm's squeeze-and-excite is.
    """
    array = np.asarray(array)
    if array.ndim == 4 and rank == 2 and array.shape[2:] == (1, 1):
        array = array[..., 0, 0]
    if array.ndim == 4:
        array = array.transpose(2, 3, 1, 0)
    elif array.ndim == 2:
        array = array.transpose(1, 0)
    return np.array(array, np.float32, order="C")


def _classifier(weights: Mapping[str, np.ndarray], current: Tree) -> Tree | None:
    if "fc.weight" not in weights or "fc.bias" not in weights:
        return None
    new = {
        name: _ours(weights[f"fc.{_LEAVES[name]}"], current[name].ndim)
        for name in ("kernel", "bias")
    }
    fits = all(new[name].shape == current[name].shape for name in new)
    return new if fits else None


def _describe(problems: list[str]) -> str:
    shown = "; ".join(problems[:5])
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    return (
        f"the weights are not this network's: {shown}{more}. "
        "Use weights of the same variant, depth, width and stem"
    )
