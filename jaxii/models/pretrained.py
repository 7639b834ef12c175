"""Weights in torchvision's or timm's layout, put into our network before training.

Comes after `weight_files`, which reads a state dict (`conv1.weight`,
`layer1.0.bn1.running_mean`), and before the first stage, whose fresh trunk it replaces.
Plain, wide and ResNeXt networks have torchvision's names, which are timm's too;
ResNet-D and SE-ResNet have timm's. Only NumPy: the caller places arrays on devices.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxii.errors import InputError
from jaxii.models.weight_files import read_state_dict

Tree = dict[str, Any]

CLASSIFIER = ("fc.weight", "fc.bias")
# Batches that a BatchNorm, or an average of weights, has seen.
COUNTERS = ("num_batches_tracked", "n_averaged")
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


class Trunk(NamedTuple):
    """A trunk's float32 NumPy arrays, where they came from, and what was left out.

    Attributes:
        origin: the file and what was taken of it, for the record.
        digest: SHA-256 of the file, in hexadecimal.
        params: of the trunk.
        batch_stats: of the trunk.
        left_out: the classifier's weights in the file, in words; "" where it has none.
    """

    origin: str
    digest: str
    params: Tree
    batch_stats: Tree
    left_out: str


def load_trunk(path: str, params: Tree, batch_stats: Tree) -> Trunk:
    """Reads the trunk of a torchvision or timm ResNet from a file.

    The classifier stays out even where it has the right size: a file does not say
    which label a row of `fc.weight` is, and another order would be taken in silence.

    Args:
        path: a `.safetensors` file, or one of `torch.save`.
        params: as `Network.init` gives them, or their shapes.
        batch_stats: as `Network.init` gives them, or their shapes.

    Raises:
        InputError: an unreadable file, or one that is not this network's.
    """
    state = read_state_dict(path)
    try:
        trunk, statistics = fit_trunk(
            state.arrays, params["trunk"], batch_stats["trunk"]
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    left_out = [
        f"{name} {list(state.arrays[name].shape)}"
        for name in CLASSIFIER
        if name in state.arrays
    ]
    return Trunk(state.origin, state.digest, trunk, statistics, " and ".join(left_out))


def fit_trunk(
    weights: Mapping[str, np.ndarray], params: Tree, batch_stats: Tree
) -> tuple[Tree, Tree]:
    """Arranges the state dict of a torchvision or timm ResNet as our trunk.

    Args:
        weights: their names to arrays; the classifier and counters are passed over.
        params: the trunk's, or their shapes; not changed.
        batch_stats: the trunk's, or their shapes; not changed.

    Returns:
        Parameters and batch statistics, float32.

    Raises:
        InputError: weights that are missing, superfluous, of another shape or type, or
            not finite.
    """
    unused = {name for name in weights if not name.endswith(COUNTERS)}
    unused -= set(CLASSIFIER)
    problems: list[str] = []
    modules = _MODULES
    if "stem_conv1" in params:
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
            if weights[name].dtype.kind != "f":
                problems.append(f"{name} is of {weights[name].dtype}, no real numbers")
                continue
            array = _ours(weights[name], value.ndim)
            if array.shape != value.shape:
                problems.append(f"{name} gives {array.shape}, needed {value.shape}")
            elif not np.isfinite(array).all():
                problems.append(f"{name} is not finite")
            taken[key] = array
        return taken

    taken = take(params, ()), take(batch_stats, ())
    problems += [f"{name} has no place in this network" for name in sorted(unused)]
    if problems:
        raise InputError(_describe(problems))
    return taken


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
    if array.ndim == 4 and rank == 2 and array.shape[2:] == (1, 1):
        array = array[..., 0, 0]
    if array.ndim == 4:
        array = array.transpose(2, 3, 1, 0)
    elif array.ndim == 2:
        array = array.transpose(1, 0)
    with np.errstate(over="ignore"):  # what float32 cannot hold is told as not finite
        return np.array(array, np.float32, order="C")


def _describe(problems: list[str]) -> str:
    shown = "; ".join(problems[:5])
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    return (
        f"the weights are not this network's: {shown}{more}. "
        "Use weights of the same variant, depth, width and stem"
    )
