"""The image trunk: ResNet v1.5, from normalised pixels to one feature vector an image.

Before it comes the batch, normalised on the device; after it the heads of `multitask`.
With torchvision's weights (`pretrained`) it gives torchvision's numbers: batch norm
epsilon 1e-5, symmetric padding written out, the stride on the 3x3 convolution. Modules
here are Flax NNX; `multitask` splits them once, so nothing else sees NNX.
"""

from functools import partial, reduce

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxii.errors import InputError

# depth -> (blocks of each of the four stages, whether they are bottlenecks)
DEPTHS: dict[int, tuple[tuple[int, int, int, int], bool]] = {
    18: ((2, 2, 2, 2), False),
    26: ((2, 2, 2, 2), True),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}
STEMS = ("imagenet", "small")
EXPANSION = 4  # a bottleneck's output channels over its inner ones
_EPSILON = 1e-5
_kaiming = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Conv(nnx.Module):
    """A square convolution without bias, padded by (kernel_size - 1) / 2 all round."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dtype: DTypeLike,
        cpu_forms: bool,
        rngs: nnx.Rngs,
    ):
        shape = (kernel_size, kernel_size, in_channels, out_channels)
        self.kernel = nnx.Param(_kaiming(rngs.params(), shape, jnp.float32))
        self.kernel_size, self.stride, self.dtype = kernel_size, stride, dtype
        self.cpu_forms = cpu_forms

    def __call__(
        self, x: Float[Array, "batch height width channel"]
    ) -> Float[Array, "batch out_height out_width out_channel"]:
        kernel = self.kernel[...].astype(self.dtype)
        size, stride, pad = self.kernel_size, self.stride, (self.kernel_size - 1) // 2
        smallest_output = (min(x.shape[1:3]) - 1) // stride + 1
        # XLA's CPU backend runs a convolution to a map smaller than its kernel, or its
        # gradient, up to 80 times slower than the matrix product, and the weight
        # gradient of a 1x1 convolution several times slower.
        if self.cpu_forms and (size == 1 or smallest_output < size):
            patches = jnp.concatenate(_window_pixels(x, size, stride, 0.0), axis=-1)
            matrix = kernel.reshape(-1, kernel.shape[-1])
            return jnp.einsum("bhwc,cd->bhwd", patches, matrix)
        # "SAME" would pad stride-2 layers on one side only, unlike torchvision.
        return lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(stride, stride),
            padding=[(pad, pad), (pad, pad)],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class BatchNorm(nnx.Module):
    """Batch normalisation with float32 statistics, whatever the compute type.

    The running variance averages the biased batch variance (Flax's rule); torch
    averages the unbiased one, larger by n / (n - 1) for n = batch x height x width.
    Loaded statistics are used as they are, so evaluation agrees.

    Source: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167
    """

    def __init__(
        self,
        num_channels: int,
        *,
        dtype: DTypeLike,
        momentum: float,
        axis_name: str | None,
        initial_scale: float = 1.0,
    ):
        self.scale = nnx.Param(jnp.full((num_channels,), initial_scale, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((num_channels,), jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros((num_channels,), jnp.float32))
        self.var = nnx.BatchStat(jnp.ones((num_channels,), jnp.float32))
        self.dtype, self.momentum, self.axis_name = dtype, momentum, axis_name

    def __call__(
        self, x: Float[Array, "batch height width channel"], train: bool
    ) -> Float[Array, "batch height width channel"]:
        x = x.astype(jnp.float32)
        if train:
            mean, var = self._batch_moments(x)
            keep = self.momentum
            self.mean[...] = keep * self.mean[...] + (1.0 - keep) * mean
            self.var[...] = keep * self.var[...] + (1.0 - keep) * var
        else:
            mean, var = self.mean[...], self.var[...]
        scale = lax.rsqrt(var + _EPSILON) * self.scale[...]
        centred = x - mean[None, None, None]
        y = centred * scale[None, None, None] + self.bias[...][None, None, None]
        return y.astype(self.dtype)

    def _batch_moments(self, x):
        # Mean and mean square in one pass over x, and one collective for both.
        moments = jnp.stack(
            [jnp.mean(x, axis=(0, 1, 2)), jnp.mean(jnp.square(x), axis=(0, 1, 2))]
        )
        if self.axis_name is not None:
            moments = lax.pmean(moments, self.axis_name)
        mean, mean_square = moments
        return mean, jnp.maximum(mean_square - jnp.square(mean), 0.0)


class Block(nnx.Module):
    """A residual block: two 3x3 convolutions, or a 1x1, 3x3, 1x1 bottleneck.

    The skip is the identity, or a strided 1x1 convolution where the shape changes.

    Source: He et al. 2015, https://arxiv.org/abs/1512.03385; stride on the 3x3 ("v1.5")
    as in torchvision.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        stride: int,
        bottleneck: bool,
        last_scale: float,
        conv,
        norm,
    ):
        self.bottleneck = bottleneck
        out_channels = channels * EXPANSION if bottleneck else channels
        self.out_channels = out_channels
        if bottleneck:
            self.conv1 = conv(in_channels, channels, 1)
            self.norm1 = norm(channels)
            self.conv2 = conv(channels, channels, 3, stride=stride)
            self.norm2 = norm(channels)
            self.conv3 = conv(channels, out_channels, 1)
            self.norm3 = norm(out_channels, initial_scale=last_scale)
        else:
            self.conv1 = conv(in_channels, channels, 3, stride=stride)
            self.norm1 = norm(channels)
            self.conv2 = conv(channels, out_channels, 3)
            self.norm2 = norm(out_channels, initial_scale=last_scale)
        self.has_shortcut = stride != 1 or in_channels != out_channels
        if self.has_shortcut:
            self.shortcut_conv = conv(in_channels, out_channels, 1, stride=stride)
            self.shortcut_norm = norm(out_channels)

    def __call__(
        self, x: Float[Array, "batch height width channel"], train: bool
    ) -> Float[Array, "batch out_height out_width out_channel"]:
        y = jax.nn.relu(self.norm1(self.conv1(x), train))
        y = self.norm2(self.conv2(y), train)
        if self.bottleneck:
            y = self.norm3(self.conv3(jax.nn.relu(y)), train)
        if self.has_shortcut:
            x = self.shortcut_norm(self.shortcut_conv(x), train)
        return jax.nn.relu(x + y)


class ResNet(nnx.Module):
    """ResNet v1.5 without its classifier: normalised images to pooled features.

    Args:
        depth: a key of `DEPTHS`.
        width: channels of the first stage, >= 1; 64 is the standard network.
        stem: "imagenet" (7x7 stride 2, then 3x3 max-pool stride 2) or "small" (3x3,
            stride 1, no pool: for images of up to about 64 pixels).
        zero_init_residual: start the last scale of each block at 0, so that every block
            starts as the identity (Goyal et al. 2017, https://arxiv.org/abs/1706.02677).
        dtype: what convolutions compute in; parameters are float32.
        bn_momentum: the share that a step keeps of the running statistics, in [0, 1).
        bn_axis: mesh axis over which batch statistics are averaged; None: per device.
        cpu_forms: write 1x1 convolutions, those to tiny maps, and the max-pool in
            the forms that XLA's CPU backend runs fastest. Equal up to rounding.
        rngs: `params` stream for the initial weights.

    Raises:
        InputError: an unknown depth or stem.
    """

    def __init__(
        self,
        *,
        depth: int,
        width: int = 64,
        stem: str = "imagenet",
        zero_init_residual: bool = True,
        dtype: DTypeLike = jnp.bfloat16,
        bn_momentum: float = 0.9,
        bn_axis: str | None = None,
        cpu_forms: bool = False,
        rngs: nnx.Rngs,
    ):
        check_shape(depth, width, stem)
        stage_blocks, bottleneck = DEPTHS[depth]

        conv = partial(Conv, dtype=dtype, cpu_forms=cpu_forms, rngs=rngs)
        norm = partial(BatchNorm, dtype=dtype, momentum=bn_momentum, axis_name=bn_axis)
        self.stem, self.dtype, self.cpu_forms = stem, dtype, cpu_forms
        kernel_size, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.stem_conv = conv(3, width, kernel_size, stride=stride)
        self.stem_norm = norm(width)
        # Blocks are named attributes, not a list: a list would give integer keys.
        self.block_names: tuple[str, ...] = ()
        self.num_features = width
        for stage, num_blocks in enumerate(stage_blocks):
            for block in range(num_blocks):
                new_block = Block(
                    self.num_features,
                    width * 2**stage,
                    stride=2 if stage > 0 and block == 0 else 1,
                    bottleneck=bottleneck,
                    last_scale=0.0 if zero_init_residual else 1.0,
                    conv=conv,
                    norm=norm,
                )
                name = f"stage{stage + 1}_block{block + 1}"
                setattr(self, name, new_block)
                self.block_names += (name,)
                self.num_features = new_block.out_channels

    def __call__(
        self, images: Float[Array, "batch height width 3"], train: bool
    ) -> Float[Array, "batch feature"]:
        x = self.run_stem(images, train)
        for name in self.block_names:
            x = getattr(self, name)(x, train)
        return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)

    def run_stem(
        self, images: Float[Array, "batch height width 3"], train: bool
    ) -> Float[Array, "batch out_height out_width channel"]:
        """Returns what the first stage is given."""
        x = self.stem_conv(images.astype(self.dtype))
        x = jax.nn.relu(self.stem_norm(x, train))
        return max_pool(x, self.cpu_forms) if self.stem == "imagenet" else x


def check_shape(depth: int, width: int, stem: str) -> None:
    """Refuses a network that cannot be built.

    Raises:
        InputError: an unknown depth or stem, or a width under 1.
    """
    if depth not in DEPTHS:
        allowed = ", ".join(str(known) for known in DEPTHS)
        raise InputError(f"depth={depth} is not a ResNet here; use one of {allowed}")
    if stem not in STEMS:
        raise InputError(f"stem={stem!r} is unknown; use one of {', '.join(STEMS)}")
    if width < 1:
        raise InputError(f"width={width} is below 1; 64 is the standard network")


def max_pool(
    x: Float[Array, "batch height width channel"], cpu_forms: bool = False
) -> Float[Array, "batch out_height out_width channel"]:
    """Returns the maximum of 3x3 windows, stride 2, padded by 1 with minus infinity.

    Args:
        x: activations.
        cpu_forms: take it over nine shifted slices, in float32, whose gradient XLA's
            CPU backend runs 8 times faster. Between equal pixels it shares the
            gradient, where the other form gives it to the first; for the zeros that a
            ReLU leaves, neither counts.
    """
    if cpu_forms:
        pixels = _window_pixels(x.astype(jnp.float32), 3, 2, -jnp.inf)
        return reduce(jnp.maximum, pixels).astype(x.dtype)
    return lax.reduce_window(
        x,
        -jnp.inf,  # a plain constant, or JAX has no gradient for it
        lax.max,
        window_dimensions=(1, 3, 3, 1),
        window_strides=(1, 2, 2, 1),
        padding=((0, 0), (1, 1), (1, 1), (0, 0)),
    )


def _window_pixels(
    x: Float[Array, "batch height width channel"], size: int, stride: int, fill: float
) -> list[Array]:
    """Returns pixel (i, j) of every window as a map, for each i, j of size x size."""
    pad = (size - 1) // 2
    last_row, last_column = ((side - 1) // stride * stride for side in x.shape[1:3])
    if pad:
        widths = ((0, 0), (pad, pad), (pad, pad), (0, 0))
        x = jnp.pad(x, widths, constant_values=fill)
    return [
        x[:, i : i + last_row + 1 : stride, j : j + last_column + 1 : stride]
        for i in range(size)
        for j in range(size)
    ]
