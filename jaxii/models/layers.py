"""The layers that `resnet` is built of, as Flax NNX modules and plain functions.

They compute in the type they are given and keep float32 parameters. Where XLA's CPU
backend is slow at a layer's usual form, `cpu_forms` picks another, equal to rounding.
"""

import math
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

_EPSILON = 1e-5
_kaiming = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# Channels of a convolution that is fast on a CPU, without too many to compile.
_CPU_GROUP_CHANNELS = 64


class Conv(nnx.Module):
    """A square convolution without bias, padded by (kernel_size - 1) / 2 all round.

    With `groups` above 1 the channels are divided into so many parts, each a
    convolution of its own (Xie et al. 2016, https://arxiv.org/abs/1611.05431).
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
        kernel, groups = self.kernel[...].astype(self.dtype), self.groups
        if not self.cpu_forms:
            return self._convolve(x, kernel)
        if groups == 1:
            return self._convolve_on_cpu(x, kernel)
        # The gradient of a grouped convolution is up to 100 times slower on XLA's CPU
        # backend than the plain convolutions it consists of.
        kernel, groups = _join_small_groups(kernel, groups)
        kernels = jnp.split(kernel, groups, axis=-1)
        parts = zip(jnp.split(x, groups, axis=-1), kernels, strict=True)
        return jnp.concatenate([self._convolve_on_cpu(*part) for part in parts], -1)

    def _convolve(self, x, kernel):
        pad = (self.kernel_size - 1) // 2
        # "SAME" would pad stride-2 layers on one side only, unlike torchvision.
        return lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(self.stride, self.stride),
            padding=[(pad, pad), (pad, pad)],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[-1] // kernel.shape[2],
        )

    def _convolve_on_cpu(self, x, kernel):
        size, stride = self.kernel_size, self.stride
        smallest_output = (min(x.shape[1:3]) - 1) // stride + 1
        # XLA's CPU backend runs a convolution to a map smaller than its kernel, or its
        # gradient, up to 80 times slower than the matrix product, and the weight
        # gradient of a 1x1 convolution several times slower.
        if size == 1 or smallest_output < size:
            patches = jnp.concatenate(_window_pixels(x, size, stride, 0.0), axis=-1)
            return _multiply(patches, kernel.reshape(-1, kernel.shape[-1]))
        return self._convolve(x, kernel)


@jax.custom_vjp
def _multiply(
    x: Float[Array, "batch height width channel"],
    matrix: Float[Array, "channel out_channel"],
) -> Float[Array, "batch height width out_channel"]:
    """Returns each pixel times the matrix.

    Its gradient is written out for the matrix's sake: XLA's CPU backend transposes the
    left operand of a product over pixels, and JAX's rule would have the gradient of the
    output there, mostly the wider one, whose copy costs a sixth of a train step.
    """
    return jnp.einsum("bhwc,cd->bhwd", x, matrix)


def _multiply_forward(x, matrix):
    return _multiply(x, matrix), (x, matrix)


def _multiply_backward(kept, gradient):
    x, matrix = kept
    in_channels, out_channels = matrix.shape
    inputs, outputs = x.reshape(-1, in_channels), gradient.reshape(-1, out_channels)
    over_pixels = (((0,), (0,)), ((), ()))
    if in_channels <= out_channels:
        of_matrix = lax.dot_general(inputs, outputs, over_pixels)
    else:
        of_matrix = lax.dot_general(outputs, inputs, over_pixels).T
    return jnp.einsum("bhwd,cd->bhwc", gradient, matrix), of_matrix


_multiply.defvjp(_multiply_forward, _multiply_backward)


def _join_small_groups(
    kernel: Float[Array, "kernel_height kernel_width in_channel out_channel"],
    groups: int,
) -> tuple[Float[Array, "kernel_height kernel_width joined out_channel"], int]:
    """Joins groups of few channels into larger ones, with zeros where they meet."""
    rows, columns, in_channels, out_channels = kernel.shape
    joined = math.gcd(groups, max(1, _CPU_GROUP_CHANNELS // in_channels))
    if joined == 1:
        return kernel, groups
    kernel = kernel.reshape(
        rows, columns, in_channels, -1, joined, out_channels // groups
    )
    alone = jnp.eye(joined, dtype=kernel.dtype)
    kernel = jnp.einsum("hwignd,mn->hwmignd", kernel, alone)
    shape = (rows, columns, joined * in_channels, out_channels)
    return kernel.reshape(shape), groups // joined


class BatchNorm(nnx.Module):
    """Batch normalisation with float32 statistics, whatever the compute type.

    The running variance averages the biased batch variance (Flax's rule); torch
    averages the unbiased one, larger by n / (n - 1) for n = batch x height x width.
    Loaded statistics are used as they are, so evaluation agrees.

    Statistics are those of one device; with `axis_name`, of all devices along that mesh
    axis, or of each `group` neighbours there.

    Source: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167
    """

    def __init__(
        self,
        num_channels: int,
        *,
        dtype: DTypeLike,
        momentum: float,
        axis_name: str | None,
        group: int | None = None,
        initial_scale: float = 1.0,
    ):
        self.scale = nnx.Param(jnp.full((num_channels,), initial_scale, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((num_channels,), jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros((num_channels,), jnp.float32))
        self.var = nnx.BatchStat(jnp.ones((num_channels,), jnp.float32))
        self.dtype, self.momentum = dtype, momentum
        self.axis_name, self.group = axis_name, group

    def __call__(
        self,
        x: Float[Array, "batch height width channel"],
        train: bool,
        moments_of: Float[Array, "batch in_height in_width channel"] | None = None,
    ) -> Float[Array, "batch height width channel"]:
        """Normalises `x`, in training by the batch moments of another or of itself."""
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
        """Moves the running statistics towards those of a batch."""
        keep = self.momentum
        self.mean[...] = keep * self.mean[...] + (1.0 - keep) * mean
        self.var[...] = keep * self.var[...] + (1.0 - keep) * var

    def factor(self, var: Float[Array, " channel"]) -> Float[Array, " channel"]:
        """Returns what centred values are multiplied by."""
        return lax.rsqrt(var + _EPSILON) * self.scale[...]

    def _batch_moments(self, x):
        # Mean and mean square in one pass over x, and one collective for both.
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
    """Returns the mean over all devices, or over this one's group of neighbours."""
    if group is None:
        return lax.pmean(moments, axis_name)
    num_devices = lax.axis_size(axis_name)
    # Where fewer devices evaluate a network than trained it, all of them are a group.
    size = math.gcd(group, num_devices)
    groups = np.arange(num_devices).reshape(-1, size).tolist()
    # `pmean` takes no groups under check_vma (jax 0.10 to 0.12).
    gathered = lax.all_gather(moments, axis_name, axis_index_groups=groups)
    return jnp.mean(gathered, axis=0)


class Linear(nnx.Module):
    """A linear layer in float32: against the trunk's cost, its precision is free."""

    def __init__(self, num_features, num_outputs, *, bias, initial, rngs):
        shape = (num_features, num_outputs)
        self.kernel = nnx.Param(initial(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.asarray(bias, jnp.float32))

    def __call__(
        self, features: Float[Array, "batch feature"]
    ) -> Float[Array, "batch output"]:
        return features @ self.kernel[...] + self.bias[...][None]


class SqueezeExcite(nnx.Module):
    """Scales each channel by a gate in (0, 1) that depends on all channels' means.

    Source: Hu et al. 2017, https://arxiv.org/abs/1709.01507, section 3, reduction 16.
    """

    def __init__(self, num_channels: int, *, rngs: nnx.Rngs):
        # 8 at least, as timm has it: a narrow network would have a gate of one number.
        num_squeezed = max(8, num_channels // 16)
        layer = partial(Linear, initial=jax.nn.initializers.he_normal(), rngs=rngs)
        self.squeeze = layer(num_channels, num_squeezed, bias=jnp.zeros(num_squeezed))
        self.excite = layer(num_squeezed, num_channels, bias=jnp.zeros(num_channels))

    def __call__(
        self, x: Float[Array, "batch height width channel"]
    ) -> Float[Array, "batch height width channel"]:
        squeezed = jax.nn.relu(self.squeeze(global_average(x)))
        gates = jax.nn.sigmoid(self.excite(squeezed)).astype(x.dtype)
        return x * gates[:, None, None]


def global_average(
    x: Float[Array, "batch height width channel"],
) -> Float[Array, "batch channel"]:
    """Returns each map's mean, float32."""
    return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)


def average_pool(
    x: Float[Array, "batch height width channel"],
) -> Float[Array, "batch out_height out_width channel"]:
    """Returns the means of 2x2 windows, stride 2; a window over the edge is cut."""
    batch, height, width, channels = x.shape
    # To repeat the last pixel is to leave the missing one out of the mean.
    for axis, side in ((1, height), (2, width)):
        if side % 2:
            last = lax.slice_in_dim(x, side - 1, side, axis=axis)
            x = jnp.concatenate([x, last], axis=axis)
    windows = x.reshape(batch, (height + 1) // 2, 2, (width + 1) // 2, 2, channels)
    return jnp.mean(windows, axis=(2, 4))


def max_pool(
    x: Float[Array, "batch height width channel"], cpu_forms: bool = False
) -> Float[Array, "batch out_height out_width channel"]:
    """Returns the maximum of 3x3 windows, stride 2, padded by 1 with minus infinity.

    Args:
        x: activations.
        cpu_forms: take it over nine shifted slices, in float32, whose gradient XLA's
            CPU backend runs 8 times faster. Between equal pixels it shares the
            gradient, where the other form gives it to the first.
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
