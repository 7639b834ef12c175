"""Layers of the ResNets, as Flax NNX modules and functions.

Layers compute in `dtype`; their parameters are float32. `cpu_forms` selects the
implementations in `cpu`.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxii.models import cpu

_EPSILON = 1e-5
# Share of the old statistics that an update of BatchNorm keeps.
MOMENTUM = 0.9
_kaiming = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Conv(nnx.Module):
    """A square convolution without bias, padded by (kernel_size - 1) / 2 on all sides.

    Source of `groups`: Xie et al. 2016, https://arxiv.org/abs/1611.05431
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        dtype: DTypeLike,
        cpu_forms: bool,
        rngs: nnx.Rngs,
    ):
        shape = (kernel_size, kernel_size, in_channels // groups, out_channels)
        self.kernel = nnx.Param(_kaiming(rngs.params(), shape, jnp.float32))
        self.kernel_size, self.stride, self.dtype = kernel_size, stride, dtype
        self.groups, self.cpu_forms = groups, cpu_forms

    def __call__(
        self, x: Float[Array, "batch height width channel"]
    ) -> Float[Array, "batch out_height out_width out_channel"]:
        kernel = self.kernel[...].astype(self.dtype)
        if self.cpu_forms:
            return cpu.convolve(x, kernel, self.stride, self.groups, plain=convolve)
        return convolve(x, kernel, self.stride)


def convolve(
    x: Float[Array, "batch height width channel"],
    kernel: Float[Array, "kernel_height kernel_width in_channel out_channel"],
    stride: int,
) -> Float[Array, "batch out_height out_width out_channel"]:
    """Returns a square convolution, padded by (kernel_size - 1) / 2 on all sides."""
    pad = (kernel.shape[0] - 1) // 2
    # "SAME" pads stride-2 layers on one side only, unlike torchvision.
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=[(pad, pad), (pad, pad)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] // kernel.shape[2],
    )


class BatchNorm(nnx.Module):
    """Batch normalisation with float32 statistics.

    The running variance averages the biased batch variance, as in Flax; torch averages
    the unbiased one, larger by n / (n - 1) for n = batch x height x width.

    Args:
      num_channels: Channels of the input.
      dtype: Type of the output.
      axis_name: Mesh axis over which statistics are averaged. None: per device.
      group: Number of neighbouring devices that share statistics. None: all.
      initial_scale: Initial value of the scale.

    Source: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167
    """

    def __init__(
        self,
        num_channels: int,
        *,
        dtype: DTypeLike,
        axis_name: str | None,
        group: int | None = None,
        initial_scale: float = 1.0,
    ):
        self.scale = nnx.Param(jnp.full((num_channels,), initial_scale, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((num_channels,), jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros((num_channels,), jnp.float32))
        self.var = nnx.BatchStat(jnp.ones((num_channels,), jnp.float32))
        self.dtype, self.axis_name, self.group = dtype, axis_name, group

    def __call__(
        self,
        x: Float[Array, "batch height width channel"],
        train: bool,
        moments_of: Float[Array, "batch in_height in_width channel"] | None = None,
    ) -> Float[Array, "batch height width channel"]:
        """Normalises `x`; in training by the moments of `moments_of` (default `x`)."""
        moments_of = x if moments_of is None else moments_of
        x = x.astype(jnp.float32)
        if train:
            mean, var = self._batch_moments(moments_of.astype(jnp.float32))
            self.track(mean, var)
        else:
            mean, var = self.mean[...], self.var[...]
        centred = x - mean[None, None, None]
        y = centred * self.factor(var)[None, None, None]
        y = y + self.bias[...][None, None, None]
        return y.astype(self.dtype)

    def track(
        self, mean: Float[Array, " channel"], var: Float[Array, " channel"]
    ) -> None:
        """Updates the running statistics with those of a batch."""
        self.mean[...] = MOMENTUM * self.mean[...] + (1.0 - MOMENTUM) * mean
        self.var[...] = MOMENTUM * self.var[...] + (1.0 - MOMENTUM) * var

    def factor(self, var: Float[Array, " channel"]) -> Float[Array, " channel"]:
        """Returns scale / sqrt(var + epsilon), the multiplier of centred values."""
        return lax.rsqrt(var + _EPSILON) * self.scale[...]

    def _batch_moments(self, x):
        # One pass over x and one collective.
        moments = jnp.stack(
            [jnp.mean(x, axis=(0, 1, 2)), jnp.mean(jnp.square(x), axis=(0, 1, 2))]
        )
        if self.axis_name is not None:
            moments = _mean_over_devices(moments, self.axis_name, self.group)
        mean, mean_square = moments
        return mean, jnp.maximum(mean_square - jnp.square(mean), 0.0)


def _mean_over_devices(
    moments: Float[Array, "moment channel"], axis_name: str, group: int | None
) -> Float[Array, "moment channel"]:
    """Returns the mean over all devices, or over this device's group."""
    if group is None:
        return lax.pmean(moments, axis_name)
    num_devices = lax.axis_size(axis_name)
    # Evaluation may use fewer devices than training.
    size = math.gcd(group, num_devices)
    groups = np.arange(num_devices).reshape(-1, size).tolist()
    # `pmean` takes no groups under check_vma (jax 0.10 to 0.12).
    gathered = lax.all_gather(moments, axis_name, axis_index_groups=groups)
    return jnp.mean(gathered, axis=0)


def can_fold(conv: Conv, norm: BatchNorm) -> bool:
    """Returns whether `normalised_convolution` supports the pair and saves memory."""
    in_channels, out_channels = conv.kernel.shape[-2:]
    is_matrix = conv.kernel_size == conv.stride == conv.groups == 1
    return is_matrix and out_channels >= 2 * in_channels and norm.axis_name is None


def normalised_convolution(
    conv: Conv, norm: BatchNorm, x: Float[Array, "batch height width channel"]
) -> Float[Array, "batch height width out_channel"]:
    """Returns `norm(conv(x), train=True)` up to rounding, and updates the norm.

    A train step on a TPU is bound by memory traffic, mostly of the wide outputs of 1x1
    convolutions. With a kernel W [channel, out_channel], the output has the mean W'
    mean(x) and the variance diag(W' cov(x) W), so one convolution with scaled weights
    suffices and the map before the norm is never stored. The statistics cost channel /
    out_channel of the convolution. `can_fold` must hold, and `x` must have the compute
    type.
    """
    kernel = conv.kernel[...][0, 0]
    num_pixels = x.shape[0] * x.shape[1] * x.shape[2]
    centre = jnp.mean(x, axis=(0, 1, 2), dtype=jnp.float32)
    products = jnp.einsum("bhwi,bhwj->ij", x, x, preferred_element_type=jnp.float32)
    covariance = products / num_pixels - centre[:, None] * centre[None]
    mean = jnp.matmul(centre, kernel, precision="highest")
    var = jnp.sum(kernel * jnp.matmul(covariance, kernel, precision="highest"), axis=0)
    var = jnp.maximum(var, 0.0)
    norm.track(mean, var)
    factor = norm.factor(var)
    folded = (kernel * factor[None]).astype(conv.dtype)
    shift = norm.bias[...] - mean * factor
    y = lax.conv_general_dilated(
        x,
        folded[None, None],
        window_strides=(1, 1),
        padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=jnp.float32,
    )
    return (y + shift[None, None, None]).astype(norm.dtype)


class Linear(nnx.Module):
    """A float32 linear layer; its cost is small compared with the trunk's."""

    def __init__(self, num_features, num_outputs, *, initial, rngs):
        shape = (num_features, num_outputs)
        self.kernel = nnx.Param(initial(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(num_outputs, jnp.float32))

    def __call__(
        self, features: Float[Array, "batch feature"]
    ) -> Float[Array, "batch output"]:
        return features @ self.kernel[...] + self.bias[...][None]


class SqueezeExcite(nnx.Module):
    """Scales each channel by a gate in (0, 1) that depends on all channels' means.

    Source: Hu et al. 2017, https://arxiv.org/abs/1709.01507, section 3, reduction 16.
    """

    def __init__(self, num_channels: int, *, rngs: nnx.Rngs):
        # At least 8, as in timm.
        num_squeezed = max(8, num_channels // 16)
        layer = partial(Linear, initial=jax.nn.initializers.he_normal(), rngs=rngs)
        self.squeeze = layer(num_channels, num_squeezed)
        self.excite = layer(num_squeezed, num_channels)

    def __call__(
        self, x: Float[Array, "batch height width channel"]
    ) -> Float[Array, "batch height width channel"]:
        squeezed = jax.nn.relu(self.squeeze(global_average(x)))
        gates = jax.nn.sigmoid(self.excite(squeezed)).astype(x.dtype)
        return x * gates[:, None, None]


def global_average(
    x: Float[Array, "batch height width channel"],
) -> Float[Array, "batch channel"]:
    """Returns the mean of each channel's map, float32."""
    return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)


def average_pool(
    x: Float[Array, "batch height width channel"],
) -> Float[Array, "batch out_height out_width channel"]:
    """Returns the means of 2x2 windows, stride 2, cut at the edges."""
    batch, height, width, channels = x.shape
    # Repeating the last row or column gives the mean of the pixels that exist.
    for axis, side in ((1, height), (2, width)):
        if side % 2:
            last = lax.slice_in_dim(x, side - 1, side, axis=axis)
            x = jnp.concatenate([x, last], axis=axis)
    windows = x.reshape(batch, (height + 1) // 2, 2, (width + 1) // 2, 2, channels)
    return jnp.mean(windows, axis=(2, 4))


def max_pool(
    x: Float[Array, "batch height width channel"], cpu_forms: bool = False
) -> Float[Array, "batch out_height out_width channel"]:
    """Returns the maximum of 3x3 windows, stride 2, padded by 1 with -inf."""
    if cpu_forms:
        return cpu.max_pool(x)
    return lax.reduce_window(
        x,
        -jnp.inf,  # JAX needs a plain constant for the gradient
        lax.max,
        window_dimensions=(1, 3, 3, 1),
        window_strides=(1, 2, 2, 1),
        padding=((0, 0), (1, 1), (1, 1), (0, 0)),
    )
