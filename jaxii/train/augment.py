"""Colour augmentation on the device, inside the train step.

Comes before the forward pass. Crop and mirror are done by the input workers
(`jaxii.data.images`), which must touch the pixels anyway. What happens to an example
depends on (seed, its position in the run) alone, not on the devices it lands on.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8

from jaxii.train.state import derive_key

# Rec. 601 luma, as in every colour-jitter since.
LUMA = (0.299, 0.587, 0.114)
# At strength 1, as SimCLR (Chen et al. 2020, appendix A) has it at its strength 0.5.
BRIGHTNESS = CONTRAST = SATURATION = 0.4
HUE_TURNS = 0.1
GREY_PROBABILITY = 0.2


def jitter_colours(
    images: UInt8[Array, "batch height width 3"],
    positions: Int[Array, " batch"],
    *,
    seed: int,
    strength: float,
) -> UInt8[Array, "batch height width 3"]:
    """Changes brightness, contrast, saturation and hue of each image, or greys it.

    All five are linear in the pixels: one 3x3 matrix and one offset an image.

    Args:
      images: pixels.
      positions: of the examples in the run; each has its own random numbers.
      seed: of the run.
      strength: 0 changes nothing; 1 is the strength of common recipes; at most 2.5.

    Returns:
      Pixels.

    Source: Chen et al. 2020, SimCLR, appendix A.
    """
    base = derive_key(seed, "colours")
    keys = jax.vmap(lambda position: jax.random.fold_in(base, position))(positions)
    matrices, contrasts = jax.vmap(lambda key: _draw(key, strength))(keys)
    pixels = images.astype(jnp.float32)
    luma = jnp.asarray(LUMA, jnp.float32)
    mean = jnp.mean(pixels, axis=(1, 2)) @ luma
    # Contrast moves pixels away from the picture's mean grey; the matrix maps grey to
    # grey, so that doing it before the matrix equals doing it after.
    shift = (1.0 - contrasts) * mean
    pixels = pixels * _spread(contrasts) + _spread(shift)
    pixels = jnp.einsum("bhwc,bdc->bhwd", pixels, matrices, precision="highest")
    return jnp.clip(jnp.round(pixels), 0.0, 255.0).astype(jnp.uint8)


def _spread(values: Float[Array, " batch"]) -> Float[Array, "batch 1 1 1"]:
    return values[:, None, None, None]


def _draw(
    key: Key[Array, ""], strength: float
) -> tuple[Float[Array, "3 3"], Float[Array, ""]]:
    """Draws one image's colour matrix (brightness, saturation, hue, grey), contrast."""
    numbers = jax.random.uniform(key, (5,))

    def around_one(number, width):
        return 1.0 + width * strength * (2.0 * number - 1.0)

    saturation = around_one(numbers[2], SATURATION)
    grey = numbers[4] < GREY_PROBABILITY * strength
    saturation = jnp.where(grey, 0.0, saturation)
    angle = 2.0 * jnp.pi * HUE_TURNS * strength * (2.0 * numbers[3] - 1.0)
    to_grey = jnp.broadcast_to(jnp.asarray(LUMA, jnp.float32), (3, 3))
    colours = saturation * (_hue(angle) @ (jnp.eye(3) - to_grey))
    matrix = around_one(numbers[0], BRIGHTNESS) * (to_grey + colours)
    return matrix, around_one(numbers[1], CONTRAST)


def _hue(angle: Float[Array, ""]) -> Float[Array, "3 3"]:
    """Turns colours about the grey axis (Rodrigues' rotation about (1, 1, 1))."""
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    cross = jnp.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
    third = jnp.full((3, 3), 1.0 / 3.0)
    return (
        cosine * jnp.eye(3)
        + (1.0 - cosine) * third
        + sine * jnp.sqrt(1.0 / 3.0) * cross
    )
