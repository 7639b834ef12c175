"""A widening 1x1 convolution and its batch norm as one convolution, for accelerators.

A step on a TPU waits for its memory, and most of what it moves is the wide maps that
these convolutions give: written, read to be normalised, read three times more for the
gradient. But the output of a 1x1 convolution is a matrix times its input, so that its
mean and variance follow from those of the narrow input, and norm and convolution are
one convolution with scaled weights. The map before the norm is never made, nor needed
by the gradient, which JAX derives from what is written here.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxii.models.layers import BatchNorm, Conv


def can_fold(conv: Conv, norm: BatchNorm) -> bool:
    """Whether the input has few enough channels, and statistics are a device's own."""
    in_channels, out_channels = conv.kernel.shape[-2:]
    is_matrix = conv.kernel_size == conv.stride == conv.groups == 1
    return is_matrix and out_channels >= 2 * in_channels and norm.axis_name is None


def normalised_convolution(
    conv: Conv, norm: BatchNorm, x: Float[Array, "batch height width channel"]
) -> Float[Array, "batch height width out_channel"]:
    """Returns `norm(conv(x), train=True)` up to rounding, and updates the norm.

    With a kernel W [channel, out_channel], the output has the mean W' mean(x) and the
    variance diag(W' cov(x) W): a pass over x and a product of its channels, which costs
    channel / out_channel of the convolution.

    Args:
      conv: for which, with the norm, `can_fold` holds.
      norm: of the convolution's output.
      x: input of the convolution, in its compute type.
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
