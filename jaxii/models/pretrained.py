"""Loads weights in torchvision's or timm's layout into a network.

Plain, wide and ResNeXt networks use torchvision's names, which timm shares; ResNet-D
and SE-ResNet use timm's. All arrays are NumPy arrays.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxii.errors import InputError
from jaxii.models.multitask import Tree
from jaxii.models.resnet import VARIANTS
from jaxii.models.weight_files import read_state_dict

CLASSIFIER = ("fc.weight", "fc.bias")
# Counters of BatchNorm and of averaged weights.
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
# Names in a ResNet-D, whose indices also count ReLU and average pool.
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
    """A trunk's weights and their origin.

    Attributes:
      origin: The file and the part of it that was used.
      digest: SHA-256 of the file, in hexadecimal.
      params: Float32 arrays.
      batch_stats: Float32 arrays.
      left_out: Names and shapes of the file's classifier weights; "" if it has none.
    """

    origin: str
    digest: str
    params: Tree
    batch_stats: Tree
    left_out: str


def load_trunk(path: str, params: Tree, batch_stats: Tree) -> Trunk:
    """Reads the trunk of a torchvision or timm ResNet from a file.

    The classifier is left out even if its size fits, because a file does not name the
    label of each row.

    Args:
      path: A `.safetensors` file, or one of `torch.save`.
      params: Parameters of the network, or their shapes.
      batch_stats: Statistics of the network, or their shapes.

    Raises:
      InputError: If the file is unreadable or belongs to another network.
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


def check_stem_of_files(variant: str, stem: str) -> None:
    """Checks that a network has the stem of the networks in files.

    Raises:
      InputError: If it has the small stem, and arrays of the same shapes as with the
        other one.
    """
    if VARIANTS[variant].deep_stem and stem != "imagenet":
        raise InputError(
            f"config.model.stem={stem!r} does not fit weights of variant={variant!r} "
            "from a file: those have the stem 'imagenet', which has the same arrays "
            "but halves the side of its maps twice; use config.model.stem=imagenet."
        )


def fit_trunk(
    weights: Mapping[str, np.ndarray], params: Tree, batch_stats: Tree
) -> tuple[Tree, Tree]:
    """Arranges the state dict of a torchvision or timm ResNet as a trunk.

    Args:
      weights: Arrays by name; the classifier and counters are ignored.
      params: The trunk's parameters, or their shapes.
      batch_stats: The trunk's statistics, or their shapes.

    Returns:
      Parameters and batch statistics, float32.

    Raises:
      InputError: If weights are missing, superfluous, not finite, or have another shape
        or type.
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
                problems.append(
                    f"{name} has dtype {weights[name].dtype}, not a floating-point type"
                )
                continue
            array = _ours(weights[name], value.ndim)
            if array.shape != value.shape:
                problems.append(
                    f"{name} converts to shape {array.shape}, expected {value.shape}"
                )
            elif not np.isfinite(array).all():
                problems.append(f"{name} has non-finite values")
            taken[key] = array
        return taken

    taken = take(params, ()), take(batch_stats, ())
    problems += [f"{name} is not part of this network" for name in sorted(unused)]
    if problems:
        shown = "; ".join(problems[:5])
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise InputError(
            f"the weights do not fit this network: {shown}{more}. "
            "Use weights of the same variant, depth, width and stem"
        )
    return taken


def _torchvision_name(path: tuple[str, ...], names: Mapping[str, str]) -> str:
    """Returns e.g. layer1.0.conv2.weight for (stage1_block1, conv2, kernel)."""
    words = []
    for module in path[:-1]:
        kind = module.rstrip("0123456789")
        if block := re.fullmatch(r"stage(\d+)_block(\d+)", module):
            words.append(f"layer{block[1]}.{int(block[2]) - 1}")
        elif module in names:
            words.append(names[module])
        else:
            words.append(names[kind] + module[len(kind) :])
    return ".".join([*words, _LEAVES[path[-1]]])


def _ours(array: np.ndarray, rank: int) -> np.ndarray:
    """Transposes [out, in, height, width] or [out, in] from torch, as float32.

    A matrix may be a 1x1 convolution in torch, as in timm's squeeze-and-excite.
    """
    if array.ndim == 4 and rank == 2 and array.shape[2:] == (1, 1):
        array = array[..., 0, 0]
    if array.ndim == 4:
        array = array.transpose(2, 3, 1, 0)
    elif array.ndim == 2:
        array = array.transpose(1, 0)
    with np.errstate(over="ignore"):  # the result is reported as not finite
        return np.array(array, np.float32, order="C")
