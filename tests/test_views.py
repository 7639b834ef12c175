"""Tests jaxii.models.views against OpenCV and a loop over images."""

from typing import NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxii.models.multitask import normalise
from jaxii.models.views import View, augmented_views, mean_over_views
from jaxii.prepare import recipe

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.integers(0, 256, (3, 20, 30, 3), np.uint8))
WEIGHTS = RNG.normal(size=(20 * 30 * 3, 5)).astype(np.float32) / 30


class Outputs(NamedTuple):
    logits: jax.Array
    embedding: jax.Array | None = None


def apply(params, batch_stats, images, *, train, key=None):
    """A network that depends on the place of every pixel; counts images in training."""
    if images.dtype == jnp.uint8:
        images = normalise(images)
    logits = jnp.matmul(images.reshape(len(images), -1), params, precision="highest")
    return Outputs(logits), batch_stats + len(images) * train


def by_opencv(image, view):
    """Returns a view, enlarged by OpenCV from the central pixels."""
    height, width = image.shape[:2]
    scale = 1 / view.share
    middle = np.array([width, height]) / 2 - 0.5
    moved = middle - scale * middle
    matrix = np.array([[scale, 0, moved[0]], [0, scale, moved[1]]])
    # OpenCV rounds coordinates to a 32nd of a pixel.
    seen = cv2.warpAffine(
        np.float32(image), matrix, (width, height), borderMode=cv2.BORDER_REPLICATE
    )
    return seen[:, ::-1] if view.mirrored else seen


def pixels_of(view):
    """Returns the images that a network gets in a view."""
    seen = []

    def see(params, batch_stats, images, *, train):
        seen.append(images)
        return Outputs(jnp.zeros((len(images), 1))), batch_stats

    mean_over_views(see, (view,))(None, None, IMAGES, train=False)
    return np.asarray(seen[0])


@pytest.mark.parametrize("share", [1.0, 0.85, 0.5])
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_view_is_the_enlarged_middle(share, mirrored):
    view = View(share=share, mirrored=mirrored)
    want = np.stack([by_opencv(image, view) for image in np.asarray(IMAGES)])
    zero = np.asarray(normalise(jnp.zeros((1, 1, 1, 3), jnp.uint8)))
    levels = (
        np.asarray(normalise(jnp.full((1, 1, 1, 3), 255, jnp.uint8))) - zero
    ) / 255
    got = (pixels_of(view) - zero) / levels
    np.testing.assert_allclose(got, want, atol=8 if share < 1 else 1e-3)
    assert np.abs(got - want).mean() < 1.5


def test_the_views_are_the_whole_and_the_middle_and_both_mirrored():
    whole, middle = View(), View(share=0.85)
    mirrored = View(mirrored=True), View(share=0.85, mirrored=True)
    assert set(augmented_views(mirror=True)) == {whole, middle, *mirrored}
    assert augmented_views(mirror=False) == (whole, middle)
    # Recipes are chosen without JAX, so they have a copy of the number.
    assert len(augmented_views(mirror=True)) == recipe.VIEWS


def test_outputs_are_the_means_over_the_views_of_each_image():
    views = augmented_views(mirror=True)
    averaged = jax.jit(mean_over_views(apply, views), static_argnames="train")
    outputs, stats = averaged(WEIGHTS, np.float32(7), IMAGES, train=False)
    single = [pixels_of(view).reshape(3, -1) @ WEIGHTS for view in views]
    np.testing.assert_allclose(outputs.logits, np.mean(single, axis=0), atol=1e-4)
    assert np.std(single, axis=0).min() > 1e-3
    assert outputs.embedding is None and stats == 7


def test_training_sees_images_as_they_are():
    averaged = mean_over_views(apply, augmented_views(mirror=True))
    got, got_stats = averaged(WEIGHTS, np.float32(7), IMAGES, train=True)
    want, want_stats = apply(WEIGHTS, np.float32(7), IMAGES, train=True)
    np.testing.assert_array_equal(got.logits, want.logits)
    assert got_stats == want_stats == 10


def test_a_network_is_wrapped_once_so_that_it_is_compiled_once():
    views = augmented_views(mirror=False)
    assert mean_over_views(apply, views) is mean_over_views(apply, views)
    assert mean_over_views(apply, views) is not mean_over_views(apply, views[:1])
