"""Test-time augmentation: a network whose outputs are means over views of an image."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from jaxii.models.multitask import normalise

# See configs/README.md for the measured effect of other shares.
CLOSER_SHARE = 0.85


@dataclass(frozen=True, kw_only=True)
class View:
    """A view of an image.

    Attributes:
      share: Share of each side that is kept and enlarged; 1 is the whole image.
      mirrored: Whether left and right are exchanged.
    """

    share: float = 1.0
    mirrored: bool = False


def augmented_views(*, mirror: bool) -> tuple[View, ...]:
    """Returns views of the whole image and of its enlarged middle.

    Args:
      mirror: Whether to add both views mirrored; mirroring must not change labels.
    """
    sides = (False, True) if mirror else (False,)
    return tuple(
        View(share=share, mirrored=mirrored)
        for share in (1.0, CLOSER_SHARE)
        for mirrored in sides
    )


@functools.cache
def mean_over_views(
    apply: Callable[..., tuple[Any, Any]], views: tuple[View, ...]
) -> Callable[..., tuple[Any, Any]]:
    """Returns an `apply` whose outputs are means over views, except in training.

    The result takes uint8 images and needs the memory of `len(views)` times as many. It
    is cached, so equal arguments return the same function, which compiles once.

    Args:
      apply: `Network.apply`.
      views: At least one.

    Source: He et al. 2016, ResNet, section 3.4, where scores of scales are averaged.
    """

    def apply_to_views(
        params: Any, batch_stats: Any, images: Array, *, train: bool, key: Any = None
    ) -> tuple[Any, Any]:
        if train:
            return apply(params, batch_stats, images, train=True, key=key)
        batch, *sides = images.shape
        pixels = normalise(images)
        # `jnp.stack` lowers to its own operation, which ONNX lacks.
        seen = jnp.concatenate([_view(pixels, view)[:, None] for view in views], 1)
        seen = seen.reshape(batch * len(views), *sides)
        outputs, batch_stats = apply(params, batch_stats, seen, train=False)

        def mean(values: Array) -> Array:
            values = values.reshape(batch, len(views), *values.shape[1:])
            return jnp.mean(values, axis=1)

        return jax.tree.map(mean, outputs), batch_stats

    return apply_to_views


def _view(
    pixels: Float[Array, "batch height width 3"], view: View
) -> Float[Array, "batch height width 3"]:
    if view == View():
        return pixels
    _, height, width, _ = pixels.shape
    columns = _interpolation(width, view.share)
    if view.mirrored:
        columns = columns[:, ::-1]
    # Matrix products instead of gathers: every platform and ONNX supports them.
    pixels = _times(pixels.transpose(0, 1, 3, 2), columns)
    rows = _interpolation(height, view.share)
    return _times(pixels.transpose(0, 3, 2, 1), rows).transpose(0, 3, 1, 2)


def _times(x: Array, matrix: Float32[np.ndarray, "old new"]) -> Array:
    return jnp.matmul(x, jnp.asarray(matrix), precision="highest")


def _interpolation(length: int, share: float) -> Float32[np.ndarray, "old new"]:
    """Returns the linear weights that interpolate the enlarged middle of a line."""
    places = (np.arange(length) + 0.5) * share + (1.0 - share) * length / 2 - 0.5
    places = np.clip(places, 0.0, length - 1.0)
    distances = np.abs(np.arange(length)[:, None] - places)
    return np.maximum(1.0 - distances, 0.0).astype(np.float32)
