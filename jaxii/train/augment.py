"""Augmentation on the device, in the train step: style, blur, colours, noise, mixing.

Input workers crop, flip and compress (`data.transforms`). An example's augmentation
depends only on the seed and its position in the run, except for mixing: the partner is
the next image on the same device.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from jaxii.models.cpu import in_memory
from jaxii.train.state import derive_key

# Rec. 601 luma.
LUMA = (0.299, 0.587, 0.114)
# Strength 1 here is strength 0.5 of SimCLR (Chen et al. 2020, appendix A).
BRIGHTNESS = CONTRAST = SATURATION = 0.4
HUE_TURNS = 0.1
GREY_PROBABILITY = 0.2
BLUR_PROBABILITY = 0.4
# Largest standard deviation of the blur, as a share of the image's side.
BLUR_SHARE = 1 / 64
NOISE_PROBABILITY = 0.25
# Largest standard deviation of the noise, in levels of 255.
NOISE_LEVELS = 12.0
# Restyling at strength 1. MIXED is the standard deviation of the entries added to the
# identity matrix; EDGES is the largest weight of the edges.
MIXED_PROBABILITY, MIXED = 0.6, 0.5
UNCOLOURED_PROBABILITY = 0.3
EDGED_PROBABILITY, EDGES = 0.5, 8.0
SMOOTHED_PROBABILITY = 0.3


def augment(
    images: UInt8[Array, "batch height width 3"],
    positions: Int[Array, " batch"],
    *,
    seed: int,
    strength: float,
) -> UInt8[Array, "batch height width 3"]:
    """Randomly blurs each image, changes its colours and adds noise.

    Args:
      images: Pixels.
      positions: Positions of the examples in the run; each has its own random numbers.
      seed: The run's seed.
      strength: 0 changes nothing; 1 is the strength of common recipes; at most 2.5.

    Source: Chen et al. 2020, SimCLR, appendix A; the noise is like a small sensor's.
    """

    def keys(purpose):
        base = derive_key(seed, purpose)
        return jax.vmap(lambda position: jax.random.fold_in(base, position))(positions)

    pixels = images.astype(jnp.float32)
    pixels, mean = _blur(pixels, keys("blur"), strength)
    pixels = _recolour(pixels, mean, keys("colours"), strength)
    pixels = pixels + _noise(keys("noise"), pixels.shape[1:3], strength)
    return jnp.clip(jnp.round(pixels), 0.0, 255.0).astype(jnp.uint8)


def restyle(
    images: UInt8[Array, "batch height width 3"],
    positions: Int[Array, " batch"],
    *,
    seed: int,
    strength: float,
) -> UInt8[Array, "batch height width 3"]:
    """Randomly changes the style of each image: its palette, edges and texture.

    First, the channels are mixed by a random matrix that keeps white, or averaged to
    grey; then edges are darkened, as if outlined; then pixels are averaged with their
    neighbours. A network then learns shapes, which helps if test images come from
    another source (see configs/README.md for the measured effect).

    Args:
      images: Pixels.
      positions: Positions of the examples in the run; each has its own random numbers.
      seed: The run's seed.
      strength: 0 changes nothing; at most 1.6.
    """
    base = derive_key(seed, "style")

    def draw(position):
        key = jax.random.fold_in(base, position)
        numbers = jax.random.uniform(key, (5,))
        entries = jax.random.normal(jax.random.fold_in(key, 1), (3, 3))
        mixed = numbers[0] < MIXED_PROBABILITY * strength
        matrix = jnp.eye(3) + jnp.where(mixed, MIXED * strength, 0.0) * entries
        uncoloured = numbers[1] < UNCOLOURED_PROBABILITY * strength
        matrix = jnp.where(uncoloured, 1.0 / 3.0, matrix)
        edged = numbers[2] < EDGED_PROBABILITY * strength
        edges = jnp.where(edged, EDGES * strength * numbers[3], 0.0)
        smoothed = numbers[4] < SMOOTHED_PROBABILITY * strength
        return matrix, edges, smoothed.astype(jnp.float32)

    store = partial(in_memory, is_lost=_never(positions))
    matrices, edges, smoothed = map(store, jax.vmap(draw)(positions))
    pixels = _channels_times(images.astype(jnp.float32) - 255.0, matrices) + 255.0
    pixels = store(pixels)
    contrast = jnp.abs(pixels - _neighbourhood_mean(pixels, store))
    pixels -= _spread(edges) * jnp.mean(contrast, axis=-1, keepdims=True)
    pixels = store(pixels)
    pixels += _spread(smoothed) * (_neighbourhood_mean(pixels, store) - pixels)
    return jnp.clip(jnp.round(pixels), 0.0, 255.0).astype(jnp.uint8)


def mix(
    images: UInt8[Array, "batch height width 3"],
    targets: Float[Array, "batch class"],
    known: Float[Array, "batch class"],
    positions: Int[Array, " batch"],
    *,
    seed: int,
    probability: float,
) -> tuple[
    UInt8[Array, "batch height width 3"],
    Float[Array, "batch class"],
    Float[Array, "batch class"],
]:
    """Mixes images with the next one on the device: half by mixup, half by CutMix.

    The share that an image keeps of itself is uniform in [0.5, 1]: max(b, 1 - b) for b
    from Beta(1, 1).

    Args:
      images: Pixels.
      targets: In [0, 1].
      known: 1 where the target counts.
      positions: Positions of the examples in the run.
      seed: The run's seed.
      probability: Share of the images that are mixed.

    Returns:
      Mixed pixels; targets mixed in the same proportion; `known`, 1 where it was 1 in
      both images.

    Source: Zhang et al. 2018, mixup; Yun et al. 2019, CutMix, section 3.
    """
    base = derive_key(seed, "mix")
    height, width = images.shape[1:3]

    def draw(position):
        numbers = jax.random.uniform(jax.random.fold_in(base, position), (5,))
        own = 0.5 + 0.5 * numbers[0]
        mixed, cut = numbers[1] < probability, numbers[2] < 0.5
        # A rectangle of the image's aspect ratio that covers 1 - own of its area.
        side = jnp.sqrt(1.0 - own)
        inside = _within(numbers[3], side, height)[:, None]
        inside = inside & _within(numbers[4], side, width)[None, :]
        others = jnp.where(cut, inside.astype(jnp.float32), 1.0 - own)
        return jnp.where(mixed, others, 0.0)

    others = jax.vmap(draw)(positions)[..., None]
    own = 1.0 - jnp.mean(others, axis=(1, 2))
    pixels = in_memory(images, _never(positions)).astype(jnp.float32)
    pixels = pixels + others * (jnp.roll(pixels, -1, axis=0) - pixels)
    targets = own * targets + (1.0 - own) * jnp.roll(targets, -1, axis=0)
    both_known = jnp.minimum(known, jnp.roll(known, -1, axis=0))
    known = jnp.where(own < 1.0, both_known, known)
    return jnp.round(pixels).astype(jnp.uint8), targets, known


def _within(start, side, length: int):
    """Returns which of `length` pixels lie in an interval of share `side`."""
    first = start * (1.0 - side) * length
    pixels = jnp.arange(length, dtype=jnp.float32) + 0.5
    return (pixels >= first) & (pixels < first + side * length)


def _blur(
    pixels: Float[Array, "batch height width 3"],
    keys: Key[Array, " batch"],
    strength: float,
) -> tuple[Float[Array, "batch height width 3"], Float[Array, "batch 3"]]:
    """Blurs some of the images, each by its own Gaussian; returns their means too.

    The means are computed from the input, so that `_recolour` fuses with the blur.
    """
    largest = BLUR_SHARE * strength * min(pixels.shape[1:3])
    radius = max(1, round(2.0 * largest))
    numbers = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    sigmas = jnp.maximum(largest * numbers[:, 1:], 0.1)
    offsets = jnp.arange(-radius, radius + 1, dtype=jnp.float32)[None]
    taps = jnp.exp(-0.5 * jnp.square(offsets / sigmas))
    taps = taps / jnp.sum(taps, axis=1, keepdims=True)
    identity = (offsets == 0).astype(jnp.float32)
    taps = jnp.where(numbers[:, :1] < BLUR_PROBABILITY * strength, taps, identity)
    rows, columns = (_shares(taps, length) for length in pixels.shape[1:3])
    # By default, TPUs round operands to bfloat16.
    mean = jnp.einsum("bh,bhwc,bw->bc", rows, pixels, columns, precision="highest")
    for axis in (1, 2):
        length = pixels.shape[axis]
        widths = [(0, 0)] * 4
        widths[axis] = (radius, radius)
        padded = jnp.pad(pixels, widths, mode="edge")
        pixels = jnp.zeros_like(pixels)
        for i in range(2 * radius + 1):
            shifted = jax.lax.slice_in_dim(padded, i, i + length, axis=axis)
            pixels = pixels + shifted * _spread(taps[:, i])
    return pixels, mean


def _shares(
    taps: Float[Array, "batch tap"], length: int
) -> Float[Array, "batch length"]:
    """Returns the weight of each pixel of a line in the mean of the blurred line."""
    radius = taps.shape[1] // 2
    offsets = np.arange(-radius, radius + 1)[:, None]
    sources = np.clip(np.arange(length) + offsets, 0, length - 1)
    counts = np.stack([np.bincount(row, minlength=length) for row in sources])
    shares = jnp.asarray(counts / length, jnp.float32)
    return jnp.matmul(taps, shares, precision="highest")


def _recolour(
    pixels: Float[Array, "batch height width 3"],
    mean: Float[Array, "batch 3"],
    keys: Key[Array, " batch"],
    strength: float,
) -> Float[Array, "batch height width 3"]:
    """Changes brightness, contrast, saturation and hue of each image, or greys it.

    All changes are linear in the pixels: one 3x3 matrix and one offset per image.
    """
    matrices, contrasts = jax.vmap(lambda key: _draw(key, strength))(keys)
    luma = jnp.asarray(LUMA, jnp.float32)
    grey = mean @ luma
    # Contrast scales about the image's mean grey. It commutes with the matrix, which
    # maps grey to grey.
    shift = (1.0 - contrasts) * grey
    return _channels_times(pixels * _spread(contrasts) + _spread(shift), matrices)


def _channels_times(
    pixels: Float[Array, "batch height width 3"], matrices: Float[Array, "batch 3 3"]
) -> Float[Array, "batch height width 3"]:
    """Multiplies each pixel by its image's matrix."""
    # Written out so that it fuses with the operations around it: a matrix product would
    # transpose the images to another layout and back.
    channels = [
        pixels[..., c : c + 1] * matrices[:, None, None, :, c] for c in range(3)
    ]
    return channels[0] + channels[1] + channels[2]


def _neighbourhood_mean(
    pixels: Float[Array, "batch height width channel"],
    store: Callable[[Array], Array],
) -> Float[Array, "batch height width channel"]:
    """Returns the mean of each pixel's 3x3 neighbourhood; edges repeat."""
    for axis in (1, 2):
        length = pixels.shape[axis]
        widths = [(0, 0)] * 4
        widths[axis] = (1, 1)
        padded = jnp.pad(pixels, widths, mode="edge")
        shifted = (
            jax.lax.slice_in_dim(padded, i, i + length, axis=axis) for i in range(3)
        )
        pixels = store(sum(shifted, jnp.zeros_like(pixels)) / 3.0)
    return pixels


def _never(positions: Int[Array, " batch"]) -> Bool[Array, ""]:
    """Returns False, which XLA does not know when it compiles."""
    return positions[0] < 0


def _noise(
    keys: Key[Array, " batch"], shape: tuple[int, ...], strength: float
) -> Float[Array, "batch height width 1"]:
    """Returns grey Gaussian noise for some of the images, 0 for the others."""

    def one(key):
        numbers = jax.random.uniform(jax.random.fold_in(key, 1), (2,))
        levels = NOISE_LEVELS * strength * numbers[1]
        levels = jnp.where(numbers[0] < NOISE_PROBABILITY * strength, levels, 0.0)
        return levels * jax.random.normal(key, (*shape, 1))

    return jax.vmap(one)(keys)


def _spread(values: Float[Array, " batch"]) -> Float[Array, "batch 1 1 1"]:
    return values[:, None, None, None]


def _draw(
    key: Key[Array, ""], strength: float
) -> tuple[Float[Array, "3 3"], Float[Array, ""]]:
    """Draws one image's colour matrix (brightness, saturation, hue) and contrast."""
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
    """Returns the rotation about the grey axis (1, 1, 1), by Rodrigues' formula."""
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    cross = jnp.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
    third = jnp.full((3, 3), 1.0 / 3.0)
    return (
        cosine * jnp.eye(3)
        + (1.0 - cosine) * third
        + sine * jnp.sqrt(1.0 / 3.0) * cross
    )
