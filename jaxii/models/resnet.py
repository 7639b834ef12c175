"""The trunk: ResNet v1.5 and variants, from normalised images to pooled features.

With weights from torchvision or timm (`pretrained`), outputs equal theirs: batch norm
epsilon 1e-5, symmetric padding, and the stride on the 3x3 convolution.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxii.errors import InputError
from jaxii.models.layers import (
    BatchNorm,
    Conv,
    SqueezeExcite,
    average_pool,
    can_fold,
    global_average,
    max_pool,
    normalised_convolution,
)

# depth -> (blocks of each stage, whether they are bottlenecks)
DEPTHS: dict[int, tuple[tuple[int, int, int, int], bool]] = {
    18: ((2, 2, 2, 2), False),
    26: ((2, 2, 2, 2), True),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}
STEMS = ("imagenet", "small")
EXPANSION = 4  # output channels of a bottleneck per inner channel


class Variant(NamedTuple):
    """Differences from the plain network.

    Attributes:
      deep_stem: Three 3x3 convolutions in the stem, and an average pool before the 1x1
        convolution of a strided shortcut.
      squeeze_excite: Gates on a block's channels before the addition.
      inner_factor: Multiplies the channels of a bottleneck's 3x3 convolution.
      grouped: Divides that convolution into width / 2 groups.
    """

    deep_stem: bool = False
    squeeze_excite: bool = False
    inner_factor: int = 1
    grouped: bool = False


VARIANTS = {
    "resnet": Variant(),
    # He et al. 2018, "Bag of Tricks", https://arxiv.org/abs/1812.01187, section 4
    "resnet_d": Variant(deep_stem=True),
    # Hu et al. 2017, https://arxiv.org/abs/1709.01507
    "se_resnet": Variant(squeeze_excite=True),
    # Xie et al. 2016, https://arxiv.org/abs/1611.05431: 32 groups of 4 at width 64
    "resnext": Variant(inner_factor=2, grouped=True),
    # Zagoruyko and Komodakis 2016, https://arxiv.org/abs/1605.07146, as torchvision's
    "wide_resnet": Variant(inner_factor=2),
}


class Block(nnx.Module):
    """A residual block: two 3x3 convolutions, or a 1x1, 3x3, 1x1 bottleneck.

    The skip is the identity, or a strided 1x1 convolution if the shape changes.

    Source: He et al. 2015, https://arxiv.org/abs/1512.03385; stride on the 3x3 ("v1.5")
      as in torchvision; variants as in torchvision or timm.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        stride: int,
        bottleneck: bool,
        variant: Variant,
        groups: int,
        last_scale: float,
        folds_norms: bool = False,
        conv,
        norm,
        squeeze_excite,
    ):
        self.bottleneck, self.folds_norms = bottleneck, folds_norms
        out_channels = channels * EXPANSION if bottleneck else channels
        self.out_channels = out_channels
        if bottleneck:
            inner = channels * variant.inner_factor
            self.conv1 = conv(in_channels, inner, 1)
            self.norm1 = norm(inner)
            self.conv2 = conv(inner, inner, 3, stride=stride, groups=groups)
            self.norm2 = norm(inner)
            self.conv3 = conv(inner, out_channels, 1)
            self.norm3 = norm(out_channels, initial_scale=last_scale)
        else:
            self.conv1 = conv(in_channels, channels, 3, stride=stride)
            self.norm1 = norm(channels)
            self.conv2 = conv(channels, out_channels, 3)
            self.norm2 = norm(out_channels, initial_scale=last_scale)
        self.has_gates = variant.squeeze_excite
        if self.has_gates:
            self.gates = squeeze_excite(out_channels)
        self.has_shortcut = stride != 1 or in_channels != out_channels
        self.has_pool = variant.deep_stem and stride != 1
        if self.has_shortcut:
            stride = 1 if self.has_pool else stride
            self.shortcut_conv = conv(in_channels, out_channels, 1, stride=stride)
            self.shortcut_norm = norm(out_channels)

    def __call__(
        self, x: Float[Array, "batch height width channel"], train: bool
    ) -> Float[Array, "batch out_height out_width out_channel"]:
        y = jax.nn.relu(self.norm1(self.conv1(x), train))
        y = self.norm2(self.conv2(y), train)
        if self.bottleneck:
            y = self._normalised(self.conv3, self.norm3, jax.nn.relu(y), train)
        if self.has_gates:
            y = self.gates(y)
        if self.has_pool:
            x = average_pool(x)
        if self.has_shortcut:
            x = self._normalised(self.shortcut_conv, self.shortcut_norm, x, train)
        return jax.nn.relu(x + y)

    def _normalised(self, conv, norm, x, train):
        if train and self.folds_norms and can_fold(conv, norm):
            return normalised_convolution(conv, norm, x)
        return norm(conv(x), train)


class ResNet(nnx.Module):
    """ResNet v1.5 without its classifier: normalised images to pooled features.

    Args:
      depth: A key of `DEPTHS`.
      variant: A key of `VARIANTS`; "resnext" and "wide_resnet" need a bottleneck.
      width: Channels of the first stage; 64 is the standard network.
      stem: "imagenet" (7x7 stride 2, then 3x3 max-pool stride 2) or "small" (3x3,
        stride 1, no pool, for images of up to about 64 pixels).
      zero_init_residual: Whether the last scale of each block starts at 0, so every
        block starts as the identity (Goyal et al. 2017,
        https://arxiv.org/abs/1706.02677).
      dtype: Compute type; parameters are float32.
      bn_axis: See `layers.BatchNorm`.
      bn_group: See `layers.BatchNorm`.
      cpu_forms: Whether to use the implementations in `cpu`.
      folds_norms: Whether training uses `layers.normalised_convolution`, which reduces
        memory traffic on a TPU by a quarter.
      rngs: Stream `params` for the initial weights.
    """

    def __init__(
        self,
        *,
        depth: int,
        variant: str = "resnet",
        width: int = 64,
        stem: str = "imagenet",
        zero_init_residual: bool = True,
        dtype: DTypeLike = jnp.bfloat16,
        bn_axis: str | None = None,
        bn_group: int | None = None,
        cpu_forms: bool = False,
        folds_norms: bool = False,
        rngs: nnx.Rngs,
    ):
        stage_blocks, bottleneck = DEPTHS[depth]
        changes = VARIANTS[variant]

        conv = partial(Conv, dtype=dtype, cpu_forms=cpu_forms, rngs=rngs)
        norm = partial(BatchNorm, dtype=dtype, axis_name=bn_axis, group=bn_group)
        self.stem, self.dtype, self.cpu_forms = stem, dtype, cpu_forms
        self.add_stem(width, changes.deep_stem, conv, norm)
        # Blocks are attributes, because a list would give integer keys.
        self.block_names: tuple[str, ...] = ()
        self.num_features = width
        for stage, num_blocks in enumerate(stage_blocks):
            for block in range(num_blocks):
                new_block = Block(
                    self.num_features,
                    width * 2**stage,
                    stride=2 if stage > 0 and block == 0 else 1,
                    bottleneck=bottleneck,
                    variant=changes,
                    groups=width // 2 if changes.grouped else 1,
                    last_scale=0.0 if zero_init_residual else 1.0,
                    folds_norms=folds_norms,
                    conv=conv,
                    norm=norm,
                    squeeze_excite=partial(SqueezeExcite, rngs=rngs),
                )
                name = f"stage{stage + 1}_block{block + 1}"
                setattr(self, name, new_block)
                self.block_names += (name,)
                self.num_features = new_block.out_channels

    def add_stem(self, width: int, deep: bool, conv, norm) -> None:
        """Makes one convolution and norm, or three of each in a deep stem."""
        stride = 2 if self.stem == "imagenet" else 1
        self.stem_names = ("",)
        if not deep:
            self.stem_conv = conv(3, width, 7 if stride == 2 else 3, stride=stride)
            self.stem_norm = norm(width)
            return
        half = max(1, width // 2)
        self.stem_names = ("1", "2", "3")
        self.stem_conv1, self.stem_norm1 = conv(3, half, 3, stride=stride), norm(half)
        self.stem_conv2, self.stem_norm2 = conv(half, half, 3), norm(half)
        self.stem_conv3, self.stem_norm3 = conv(half, width, 3), norm(width)

    def __call__(
        self, images: Float[Array, "batch height width 3"], train: bool
    ) -> Float[Array, "batch feature"]:
        x = self.run_stem(images, train)
        for name in self.block_names:
            x = getattr(self, name)(x, train)
        return global_average(x)

    def run_stem(
        self, images: Float[Array, "batch height width 3"], train: bool
    ) -> Float[Array, "batch out_height out_width channel"]:
        """Returns the input of the first stage."""
        x = images.astype(self.dtype)
        for name in self.stem_names:
            x = getattr(self, f"stem_conv{name}")(x)
            norm = getattr(self, f"stem_norm{name}")
            if self.stem == "imagenet" and name == self.stem_names[-1]:
                return self.norm_of_pooled(x, norm, train)
            x = jax.nn.relu(norm(x, train))
        return x

    def norm_of_pooled(
        self, x: Float[Array, "batch height width channel"], norm, train: bool
    ) -> Float[Array, "batch out_height out_width channel"]:
        """Returns the max-pool of ReLU(norm(x)), computed after pooling x.

        Norm and ReLU are monotone in x, decreasing if the norm's scale is negative, so
        their maximum is at the largest or smallest x. The network's largest map, four
        times as large as the pooled one, is therefore never normalised.
        """
        sign = jnp.where(norm.scale[...] < 0, -1.0, 1.0).astype(x.dtype)
        x = x * sign[None, None, None]
        pooled = max_pool(x, self.cpu_forms) * sign[None, None, None]
        x = x * sign[None, None, None]
        return jax.nn.relu(norm(pooled, train, moments_of=x))


def last_side(side: int, stem: str) -> int:
    """Returns the side of the last maps of images of a side, in pixels."""
    num_halved = 5 if stem == "imagenet" else 3
    return -(-side // 2**num_halved)


def check_shape(depth: int, width: int, stem: str, variant: str) -> None:
    """Checks that a network can be built.

    Raises:
      InputError: If the depth, variant, stem or width is not allowed, or the depth or
        width does not fit the variant.
    """
    if variant not in VARIANTS:
        allowed = ", ".join(VARIANTS)
        raise InputError(f"variant={variant!r} is unknown; use one of {allowed}")
    if depth not in DEPTHS:
        allowed = ", ".join(str(known) for known in DEPTHS)
        raise InputError(f"depth={depth} is not supported; use one of {allowed}")
    if VARIANTS[variant].inner_factor > 1 and not DEPTHS[depth][1]:
        allowed = ", ".join(str(d) for d, (_, inner) in DEPTHS.items() if inner)
        raise InputError(
            f"depth={depth} has no bottleneck blocks, which variant={variant!r} needs; "
            f"use one of the depths {allowed}, or another variant"
        )
    if stem not in STEMS:
        raise InputError(f"stem={stem!r} is unknown; use one of {', '.join(STEMS)}")
    if width < 1:
        raise InputError(f"width={width} is below 1; use at least 1 (64 is standard)")
    if VARIANTS[variant].grouped and width % 2:
        raise InputError(
            f"width={width} is not divisible into the groups of variant={variant!r}; "
            f"use an even width, such as {width + 1}"
        )
