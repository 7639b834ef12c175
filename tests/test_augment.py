"""Colours change as they should, and the same for the same position in the run."""

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxii.train import augment
from jaxii.train.augment import jitter_colours


def pictures(count=8):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.integers(60, 200, (count, 12, 12, 3)), jnp.uint8)


def positions(count=8, start=0):
    return jnp.arange(start, start + count, dtype=jnp.int32)


def jitter(images, places, strength=1.0, seed=0):
    return np.asarray(jitter_colours(images, places, seed=seed, strength=strength))


def test_strength_zero_changes_nothing():
    np.testing.assert_array_equal(jitter(pictures(), positions(), 0.0), pictures())


def test_an_example_changes_alike_wherever_it_lies_in_the_batch():
    images, places = pictures(), positions()
    whole = jitter(images, places)
    order = np.array([5, 0, 3])
    np.testing.assert_array_equal(jitter(images[order], places[order]), whole[order])


@pytest.mark.parametrize("change", [{"start": 100}, {"seed": 1}])
def test_another_position_or_seed_changes_it_otherwise(change):
    start, seed = change.get("start", 0), change.get("seed", 0)
    one = jitter(pictures(), positions())
    other = jitter(pictures(), positions(start=start), seed=seed)
    assert (one != other).any(axis=(1, 2, 3)).all()


def test_grey_stays_grey():
    grey = jnp.full((64, 4, 4, 3), 120, jnp.uint8)
    out = jitter(grey, positions(64)).astype(int)
    assert np.ptp(out, axis=-1).max() <= 1


def test_about_one_picture_in_five_loses_its_colours():
    image = jnp.broadcast_to(pictures(1), (1000, 12, 12, 3))
    out = jitter(image, positions(1000)).astype(int)
    grey = np.ptp(out, axis=-1).max(axis=(1, 2)) <= 2
    assert 150 < grey.sum() < 250


def test_the_mean_of_many_changes_is_near_the_picture():
    image = jnp.broadcast_to(pictures(1), (2000, 12, 12, 3))
    out = jitter(image, positions(2000)).astype(float).mean(axis=0)
    luma = np.asarray(pictures(1)[0], float) @ augment.LUMA
    assert np.abs(out @ augment.LUMA - luma).mean() < 4.0


def test_a_matrix_without_hue_and_saturation_matches_opencv_grey(monkeypatch):
    # Always grey, no brightness, no contrast: what is left is the luma of OpenCV.
    monkeypatch.setattr(augment, "GREY_PROBABILITY", 2.0)
    monkeypatch.setattr(augment, "BRIGHTNESS", 0.0)
    monkeypatch.setattr(augment, "CONTRAST", 0.0)
    out = jitter(pictures(), positions())
    for picture, grey in zip(np.asarray(pictures()), out, strict=True):
        expected = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(int)
        assert np.abs(grey[..., 0].astype(int) - expected).max() <= 1


def test_it_compiles_once_for_all_positions():
    compiled = jax.jit(lambda x, p: jitter_colours(x, p, seed=0, strength=1.0))
    for start in (0, 8, 2**31 - 9):
        compiled(pictures(), positions(start=start))
    assert compiled._cache_size() == 1
