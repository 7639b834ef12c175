"""Options and forms of layers that are fast on XLA's CPU backend.

The forms are equal to the plain ones up to rounding.
"""

import contextlib
import math
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxlib.version import __version__ as jaxlib_version
from jaxtyping import Array, Float

Convolution = Callable[[Array, Array, int], Array]
# Small groups are joined up to this many channels: fast, and few convolutions.
_GROUP_CHANNELS = 64
# Fewest channels for which Winograd's products outweigh its transforms.
_WINOGRAD_CHANNELS = 64

# Options of `jax.jit`, hashable.
CompilerOptions = tuple[tuple[str, str | bool], ...]
# XLA's default without its convolutions, whose weight gradients are slow.
_WITHOUT_YNNPACK: CompilerOptions = (
    (
        "xla_cpu_experimental_ynn_fusion_type",
        "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE",
    ),
)
_ONEDNN: CompilerOptions = (("xla_cpu_experimental_onednn_custom_call", True),)
CPU_INFO = Path("/proc/cpuinfo")
# Flags of CPUs that multiply bfloat16: Intel's matrix units; vectors, also of AMD.
BFLOAT16_UNITS = {"amx_bf16", "avx512_bf16"}


def compiler_options(compute_dtype: DTypeLike) -> CompilerOptions:
    """Returns the options for `jax.jit` of a network that runs on this CPU.

    By default, XLA computes convolutions with YNNPACK. With jaxlib 0.10, Eigen is
    faster. With jaxlib 0.12, oneDNN is much faster for bfloat16 on CPUs with units for
    it, but JAX cannot keep its programs in the compilation cache. Only these releases
    were measured, and others may lack the options.
    """
    if has_fast_bfloat16() and jnp.dtype(compute_dtype) == jnp.bfloat16:
        return (*_WITHOUT_YNNPACK, *_ONEDNN)
    if _is_x86_linux() and jaxlib_version.startswith("0.10."):
        return _WITHOUT_YNNPACK
    return ()


def has_fast_bfloat16() -> bool:
    """Returns whether XLA computes bfloat16 convolutions with units of this CPU."""
    if not (_is_x86_linux() and jaxlib_version.startswith("0.12.")):
        return False
    with contextlib.suppress(OSError):
        found = CPU_INFO.read_text(encoding="ascii", errors="ignore").split()
        return not BFLOAT16_UNITS.isdisjoint(found)
    return False


def _is_x86_linux() -> bool:
    return sys.platform == "linux" and platform.machine() == "x86_64"


def convolve(
    x: Float[Array, "batch height width channel"],
    kernel: Float[Array, "kernel_height kernel_width in_channel out_channel"],
    stride: int,
    groups: int,
    plain: Convolution,
) -> Float[Array, "batch out_height out_width out_channel"]:
    """Returns a square, padded convolution, computed group by group.

    The gradient of a grouped convolution is up to 100 times slower on XLA's CPU backend
    than those of plain convolutions. `plain(x, kernel, stride)` convolves one group.
    """
    if groups == 1:
        return _convolve_group(x, kernel, stride, plain)
    kernel, groups = _join_small_groups(kernel, groups)
    kernels = jnp.split(kernel, groups, axis=-1)
    parts = zip(jnp.split(x, groups, axis=-1), kernels, strict=True)
    return jnp.concatenate(
        [_convolve_group(*part, stride, plain) for part in parts], -1
    )


def _convolve_group(x: Array, kernel: Array, stride: int, plain: Convolution) -> Array:
    size = kernel.shape[0]
    if _suits_winograd(x, kernel, stride):
        return _convolve_tiles(x, kernel)
    smallest_output = (min(x.shape[1:3]) - 1) // stride + 1
    # On XLA's CPU backend, a convolution whose output is smaller than its kernel is up
    # to 80 times slower than the matrix product, and so is its gradient; the weight
    # gradient of a 1x1 convolution is several times slower.
    if size == 1 or smallest_output < size:
        patches = jnp.concatenate(_window_pixels(x, size, stride, 0.0), axis=-1)
        return _multiply(patches, kernel.reshape(-1, kernel.shape[-1]))
    if (size, stride) == (7, 2) and not any(side % 2 for side in x.shape[1:3]):
        return _convolve_blocks(_in_memory(x, kernel), kernel)
    return _convolve(x, kernel, lambda x, kernel: plain(x, kernel, stride))


@dataclass(frozen=True)
class _Winograd:
    """Matrices of a minimal filtering algorithm F(n x n, 3 x 3).

    An output tile of n x n pixels needs (n + 2)^2 products per pair of channels.

    Attributes:
      kernel: G, for both sides of a kernel.
      inputs: B^T, for both sides of an input tile of (n + 2) x (n + 2) pixels.
      outputs: A^T, for both sides of the products.

    Source: Lavin and Gray 2016, https://arxiv.org/abs/1509.09308, sections 4.1 and 4.3
    """

    kernel: tuple[tuple[float, ...], ...]
    inputs: tuple[tuple[float, ...], ...]
    outputs: tuple[tuple[float, ...], ...]


_TILES_OF_2 = _Winograd(
    kernel=((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
    inputs=((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
    outputs=((1, 1, 1, 0), (0, 1, -1, -1)),
)
_TILES_OF_4 = _Winograd(
    kernel=(
        (1 / 4, 0, 0),
        (-1 / 6, -1 / 6, -1 / 6),
        (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6),
        (1 / 24, -1 / 12, 1 / 6),
        (0, 0, 1),
    ),
    inputs=(
        (4, 0, -5, 0, 1, 0),
        (0, -4, -4, 1, 1, 0),
        (0, 4, -4, -1, 1, 0),
        (0, -2, -1, 2, 1, 0),
        (0, 2, -1, -2, 1, 0),
        (0, 4, 0, -5, 0, 1),
    ),
    outputs=(
        (1, 1, 1, 1, 1, 0),
        (0, 1, -1, 2, -2, 0),
        (0, 1, 1, 4, 4, 0),
        (0, 1, -1, 8, -8, 1),
    ),
)


def _suits_winograd(x: Array, kernel: Array, stride: int) -> bool:
    """Returns whether `_convolve_tiles` is faster; bfloat16 is too coarse for it."""
    return (
        (kernel.shape[0], stride) == (3, 1)
        and min(kernel.shape[2:]) >= _WINOGRAD_CHANNELS
        and min(x.shape[1:3]) > 1
        and x.dtype == jnp.float32
    )


def _convolve_tiles(
    x: Float[Array, "batch height width channel"],
    kernel: Float[Array, "3 3 channel out_channel"],
) -> Float[Array, "batch height width out_channel"]:
    """Returns a 3x3 convolution with stride 1 by Winograd's minimal filtering.

    It multiplies a quarter as often. Each of its steps is a matrix product: the
    transforms of kernel and tiles, the products of channels, and the transform of the
    results.
    """
    batch, height, width, channels = x.shape
    out_channels = kernel.shape[-1]
    algorithm = _TILES_OF_2 if max(height, width) <= 2 else _TILES_OF_4
    side = len(algorithm.outputs)
    kernel = _both_sides(algorithm.kernel) @ kernel.reshape(9, -1)
    tiles = _overlapping_tiles(_overlapping_tiles(x, 1, side), 3, side)
    _, rows, _, columns, *_ = tiles.shape
    tiles = tiles.transpose(2, 4, 0, 1, 3, 5).reshape((side + 2) ** 2, -1)
    tiles = _both_sides(algorithm.inputs) @ tiles
    products = jnp.einsum(
        "ptc,pcd->ptd",
        tiles.reshape(len(tiles), -1, channels),
        kernel.reshape(len(kernel), channels, out_channels),
    )
    y = _both_sides(algorithm.outputs) @ products.reshape(len(products), -1)
    y = y.reshape(side, side, batch, rows, columns, out_channels)
    y = y.transpose(2, 3, 0, 4, 1, 5)
    y = y.reshape(batch, rows * side, columns * side, out_channels)
    return y[:, :height, :width]


def _both_sides(matrix: tuple[tuple[float, ...], ...]) -> Array:
    """Returns the matrix that applies `matrix` to both sides of flattened squares."""
    return jnp.asarray(np.kron(matrix, matrix), jnp.float32)


def _overlapping_tiles(x: Array, axis: int, side: int) -> Array:
    """Divides an axis into tiles of `side` pixels with one more at either end.

    The axis becomes two: tiles and pixels. Pixels outside of the map are 0.
    """
    num_tiles = math.ceil(x.shape[axis] / side)
    widths = [(0, 0)] * x.ndim
    widths[axis] = (1, side * (num_tiles + 1) - x.shape[axis] - 1)
    x = jnp.pad(x, widths)
    x = x.reshape(*x.shape[:axis], num_tiles + 1, side, *x.shape[axis + 1 :])
    first = lax.slice_in_dim(x, 0, num_tiles, axis=axis)
    following = lax.slice_in_dim(x, 1, num_tiles + 1, axis=axis)
    ends = lax.slice_in_dim(following, 0, 2, axis=axis + 1)
    return jnp.concatenate([first, ends], axis + 1)


def _convolve_blocks(x: Array, kernel: Array) -> Array:
    """Returns a 7x7 convolution with stride 2 as one of 4x4 over blocks of 2x2 pixels.

    Three times as fast for images: three channels do not fill a vector register, the
    twelve of a block do. The height and width of `x` must be even.
    """
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(batch, height // 2, width // 2, 4 * channels)
    # A zero row and column in front make the kernel 8x8, a whole number of blocks.
    kernel = jnp.pad(kernel, ((1, 0), (1, 0), (0, 0), (0, 0)))
    kernel = kernel.reshape(4, 2, 4, 2, channels, -1)
    kernel = kernel.transpose(0, 2, 1, 3, 4, 5).reshape(4, 4, 4 * channels, -1)
    return _convolve(x, kernel, _convolve_4x4)


def _convolve_4x4(x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1, 1),
        padding=[(2, 1), (2, 1)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(x: Array, kernel: Array, plain: Callable[[Array, Array], Array]) -> Array:
    """Returns `plain(x, kernel)`; its gradients read operands that are in memory.

    XLA's CPU backend fuses the producer of an operand into each of its consumers. A
    weight gradient reads both operands transposed, so norms, pooling and augmentation
    would be recomputed element by element in a slow memory order.
    """
    return plain(x, kernel)


def _convolve_forward(x, kernel, plain):
    x = _in_memory(x, kernel)
    return plain(x, kernel), (x, kernel)


def _convolve_backward(plain, kept, gradient):
    x, kernel = kept
    gradient = _in_memory(gradient, kernel)
    _, pull = jax.vjp(plain, x, kernel)
    of_x, of_kernel = pull(gradient)
    if gradient.shape[1:3] == x.shape[1:3] and kernel.shape[0] % 2:
        # As a convolution with the kernel turned around: XLA gives oneDNN no others.
        of_x = plain(gradient, jnp.swapaxes(kernel[::-1, ::-1], 2, 3))
    return of_x, of_kernel


_convolve.defvjp(_convolve_forward, _convolve_backward)


def in_memory(x: Array, is_lost: Array) -> Array:
    """Returns `x`, on CPUs placed in memory by a condition unknown at compile time.

    XLA's CPU backend fuses the producer of an operand into each of its consumers, so
    that a convolution or a sum over shifted copies computes it again and again. XLA
    stores the result of a conditional in memory. `lax.optimization_barrier` does not
    help: XLA's CPU backend removes barriers before it fuses.

    Args:
      x: The array.
      is_lost: A scalar that is False, although XLA does not know it. If True, `x` does
        not matter and is replaced by 0.
    """
    return lax.platform_dependent(x, is_lost, cpu=_stored, default=lambda x, is_lost: x)


def _stored(x: Array, is_lost: Array, filler: float = 0.0) -> Array:
    return lax.cond(is_lost, lambda x: jnp.full_like(x, filler), lambda x: x, x)


def _in_memory(x: Array, kernel: Array) -> Array:
    """Returns `x` in memory; NaN if the kernel is."""
    return _stored(x, jnp.isnan(kernel.reshape(-1)[0]), jnp.nan)


@jax.custom_vjp
def max_pool(
    x: Float[Array, "batch height width channel"],
) -> Float[Array, "batch out_height out_width channel"]:
    """Returns the maximum of 3x3 windows, stride 2, from nine shifted float32 slices.

    On XLA's CPU backend, the gradient is ten times faster than that of `reduce_window`.
    Equal pixels share the gradient; `reduce_window` gives it to the first.
    """
    pixels = _window_pixels(x.astype(jnp.float32), 3, 2, -jnp.inf)
    return reduce(jnp.maximum, pixels).astype(x.dtype)


def _max_pool_forward(x):
    y = max_pool(x)
    return y, (x, y)


def _max_pool_backward(kept, gradient):
    x, y = kept
    pixels = _window_pixels(x, 3, 2, -jnp.inf)
    gradient = gradient / reduce(
        jnp.add, [(pixel == y).astype(x.dtype) for pixel in pixels]
    )
    batch, rows, columns, channels = y.shape
    height, width = x.shape[1:3]
    widths = ((0, 0), (0, 2 * rows - height), (0, 2 * columns - width), (0, 0))
    x = jnp.pad(x, widths).reshape(batch, rows, 2, columns, 2, channels)
    # Even rows and columns are in one window, odd ones also in the following window.
    widths = ((0, 0), (0, 1), (0, 1), (0, 0))
    y, gradient = jnp.pad(y, widths), jnp.pad(gradient, widths)

    def of_pixels(row: int, column: int) -> Array:
        windows = [
            (slice(None), slice(i, i + rows), slice(j, j + columns))
            for i in range(row + 1)
            for j in range(column + 1)
        ]
        own = x[:, :, row, :, column]
        parts = [jnp.where(own == y[at], gradient[at], 0) for at in windows]
        return reduce(jnp.add, parts)

    of_rows = [
        jnp.stack([of_pixels(row, column) for column in (0, 1)], 3) for row in (0, 1)
    ]
    of_x = jnp.stack(of_rows, 2).reshape(batch, 2 * rows, 2 * columns, channels)
    return (of_x[:, :height, :width],)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


@jax.custom_vjp
def _multiply(
    x: Float[Array, "batch height width channel"],
    matrix: Float[Array, "channel out_channel"],
) -> Float[Array, "batch height width out_channel"]:
    """Multiplies each pixel by the matrix.

    The gradient of the matrix has its own rule. XLA's CPU backend copies the left
    operand of a product over pixels, which takes a sixth of a train step with JAX's
    rule; here the narrower operand is on the left.
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
    """Joins groups of few channels into larger ones, with zeros between groups."""
    rows, columns, in_channels, out_channels = kernel.shape
    joined = math.gcd(groups, max(1, _GROUP_CHANNELS // in_channels))
    if joined == 1:
        return kernel, groups
    kernel = kernel.reshape(
        rows, columns, in_channels, -1, joined, out_channels // groups
    )
    alone = jnp.eye(joined, dtype=kernel.dtype)
    kernel = jnp.einsum("hwignd,mn->hwmignd", kernel, alone)
    shape = (rows, columns, joined * in_channels, out_channels)
    return kernel.reshape(shape), groups // joined


def _window_pixels(
    x: Float[Array, "batch height width channel"], size: int, stride: int, fill: float
) -> list[Array]:
    """Returns one map for each (i, j): pixel (i, j) of every window."""
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
