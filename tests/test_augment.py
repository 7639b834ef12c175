"""Tests that augmentation changes images correctly and repeatably per position."""

import re

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxii.train import augment
from jaxii.train.augment import mix


def small_images(count=8):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.integers(60, 200, (count, 12, 12, 3)), jnp.uint8)


def positions(count=8, start=0):
    return jnp.arange(start, start + count, dtype=jnp.int32)


def change(images, places, strength=1.0, seed=0):
    return np.asarray(augment.augment(images, places, seed=seed, strength=strength))


def only(monkeypatch, *kept):
    """Keeps only these changes; others have probability 0 or no strength."""
    for name in ("BLUR_PROBABILITY", "NOISE_PROBABILITY"):
        if name not in kept:
            monkeypatch.setattr(augment, name, 0.0)
    if "colours" not in kept:
        for name in ("BRIGHTNESS", "CONTRAST", "SATURATION", "HUE_TURNS"):
            monkeypatch.setattr(augment, name, 0.0)
        monkeypatch.setattr(augment, "GREY_PROBABILITY", 0.0)


def test_strength_zero_changes_nothing():
    np.testing.assert_array_equal(
        change(small_images(), positions(), 0.0), small_images()
    )


def test_an_example_changes_alike_wherever_it_lies_in_the_batch():
    images, places = small_images(), positions()
    whole = change(images, places)
    order = np.array([5, 0, 3])
    np.testing.assert_array_equal(change(images[order], places[order]), whole[order])


@pytest.mark.parametrize("other", [{"start": 100}, {"seed": 1}])
def test_another_position_or_seed_changes_it_otherwise(other):
    start, seed = other.get("start", 0), other.get("seed", 0)
    one = change(small_images(), positions())
    other = change(small_images(), positions(start=start), seed=seed)
    assert (one != other).any(axis=(1, 2, 3)).all()


def test_grey_stays_grey(monkeypatch):
    only(monkeypatch, "colours")
    grey = jnp.full((64, 4, 4, 3), 120, jnp.uint8)
    out = change(grey, positions(64)).astype(int)
    assert np.ptp(out, axis=-1).max() <= 1


def test_about_one_image_in_five_loses_its_colours(monkeypatch):
    only(monkeypatch, "colours")
    image = jnp.broadcast_to(small_images(1), (1000, 12, 12, 3))
    out = change(image, positions(1000)).astype(int)
    grey = np.ptp(out, axis=-1).max(axis=(1, 2)) <= 2
    assert 150 < grey.sum() < 250


def test_the_mean_of_many_changes_is_near_the_image():
    image = jnp.broadcast_to(small_images(1), (2000, 12, 12, 3))
    out = change(image, positions(2000)).astype(float).mean(axis=0)
    luma = np.asarray(small_images(1)[0], float) @ augment.LUMA
    assert np.abs(out @ augment.LUMA - luma).mean() < 4.0


def test_a_matrix_without_hue_and_saturation_matches_opencv_grey(monkeypatch):
    only(monkeypatch, "colours")
    # Always grey, without brightness and contrast: the result is OpenCV's luma.
    monkeypatch.setattr(augment, "GREY_PROBABILITY", 2.0)
    monkeypatch.setattr(augment, "BRIGHTNESS", 0.0)
    monkeypatch.setattr(augment, "CONTRAST", 0.0)
    out = change(small_images(), positions())
    for image, grey in zip(np.asarray(small_images()), out, strict=True):
        expected = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(int)
        assert np.abs(grey[..., 0].astype(int) - expected).max() <= 1


def test_it_compiles_once_for_all_positions():
    compiled = jax.jit(lambda x, p: augment.augment(x, p, seed=0, strength=1.0))
    for start in (0, 8, 2**31 - 9):
        compiled(small_images(), positions(start=start))
    assert compiled._cache_size() == 1


def test_a_blurred_image_matches_opencv(monkeypatch):
    only(monkeypatch, "BLUR_PROBABILITY")
    monkeypatch.setattr(augment, "BLUR_PROBABILITY", 2.0)
    monkeypatch.setattr(augment, "BLUR_SHARE", 1 / 12)
    # Every sigma is the largest: 1 pixel of 12, so the window is 5 wide.
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.ones(shape))
    out = change(small_images(), positions())
    for image, blurred in zip(np.asarray(small_images()), out, strict=True):
        expected = cv2.GaussianBlur(image, (5, 5), 1.0, borderType=cv2.BORDER_REPLICATE)
        assert np.abs(blurred.astype(int) - expected).max() <= 1


def test_the_means_of_the_blurred_are_known_from_the_sharp(monkeypatch):
    monkeypatch.setattr(augment, "BLUR_PROBABILITY", 2.0)
    monkeypatch.setattr(augment, "BLUR_SHARE", 1 / 6)
    keys = jax.random.split(jax.random.key(0), 8)
    # Not square, with one bright edge: the border's pixels weigh more than others.
    pixels = small_images()[:, :9].astype(jnp.float32).at[:, 0].set(255.0)
    blurred, means = augment._blur(pixels, keys, 1.0)
    assert (jnp.abs(blurred - pixels) > 1).any(axis=(1, 2, 3)).sum() >= 4
    assert not np.allclose(pixels.mean(axis=(1, 2)), means, rtol=1e-3)
    np.testing.assert_allclose(means, blurred.mean(axis=(1, 2)), rtol=1e-5)


def test_about_four_images_in_ten_are_blurred(monkeypatch):
    only(monkeypatch, "BLUR_PROBABILITY")
    monkeypatch.setattr(augment, "BLUR_SHARE", 1 / 8)
    image = jnp.broadcast_to(small_images(1), (1000, 12, 12, 3))
    changed = (change(image, positions(1000)) != image).any(axis=(1, 2, 3))
    # The blur of a few images is so small that no pixel changes.
    assert 300 < changed.sum() < 450


def test_noise_is_grey_of_mean_zero_and_on_one_image_in_four(monkeypatch):
    only(monkeypatch, "NOISE_PROBABILITY")
    image = jnp.full((1000, 12, 12, 3), 128, jnp.uint8)
    out = change(image, positions(1000)).astype(int) - 128
    assert np.ptp(out, axis=-1).max() == 0
    assert 180 < np.any(out, axis=(1, 2, 3)).sum() < 300
    assert abs(out.mean()) < 0.1


def mixed(probability=1.0, count=8):
    rng = np.random.default_rng(1)
    targets = jnp.asarray(rng.integers(0, 2, (count, 5)), jnp.float32)
    known = jnp.asarray(rng.integers(0, 2, (count, 5)), jnp.float32)
    images = small_images(count)
    out = mix(images, targets, known, positions(count), seed=0, probability=probability)
    return (images, targets, known), out


def test_nothing_is_mixed_at_probability_zero():
    given, out = mixed(0.0)
    for before, after in zip(given, out, strict=True):
        np.testing.assert_array_equal(before, after)


def test_targets_are_mixed_as_the_pixels_are():
    # The next image is black, so the brightness of an image shows its share.
    count = 400
    shades = jnp.where(positions(count) % 2 == 0, 200, 0).astype(jnp.uint8)
    images = jnp.broadcast_to(shades[:, None, None, None], (count, 16, 16, 3))
    targets = (shades > 0).astype(jnp.float32)[:, None]
    known = jnp.ones_like(targets)
    out, mixed_targets, _ = mix(
        images, targets, known, positions(count), seed=0, probability=1.0
    )
    own = np.asarray(out, float).mean(axis=(1, 2, 3))[::2] / 200
    np.testing.assert_allclose(own, mixed_targets[::2, 0], atol=0.003)
    # Half, up to rounding to a rectangle of whole pixels.
    assert own.min() >= 0.4
    assert 0.7 < own.mean() < 0.8


def test_half_of_the_mixed_images_are_cut_and_not_blended():
    images = jnp.concatenate(
        [jnp.full((1, 16, 16, 3), shade, jnp.uint8) for shade in (200, 0) * 200]
    )
    zeros = jnp.zeros((400, 1))
    out, _, _ = mix(images, zeros, zeros, positions(400), seed=0, probability=1.0)
    cut = np.isin(np.asarray(out), (0, 200)).all(axis=(1, 2, 3))
    assert 160 < cut.sum() < 260


def test_a_mixed_target_is_known_where_both_were():
    (_, _, known), (_, _, out) = mixed()
    np.testing.assert_array_equal(out, np.minimum(known, np.roll(known, -1, axis=0)))


def restyled(images, places, strength=1.0, seed=0):
    return np.asarray(augment.restyle(images, places, seed=seed, strength=strength))


def test_restyling_of_strength_zero_changes_nothing():
    out = restyled(small_images(), positions(), 0.0)
    np.testing.assert_array_equal(out, small_images())


def test_an_example_is_restyled_alike_wherever_it_lies_in_the_batch():
    images, places = small_images(), positions()
    whole = restyled(images, places)
    order = np.array([5, 0, 3])
    np.testing.assert_array_equal(restyled(images[order], places[order]), whole[order])
    assert (restyled(images, places, seed=1) != whole).any()


def test_white_stays_white_in_every_style():
    white = jnp.full((200, 8, 8, 3), 255, jnp.uint8)
    np.testing.assert_array_equal(restyled(white, positions(200)), white)


def test_a_restyled_image_matches_opencv(monkeypatch):
    entries = np.array([[0.3, -1.0, 0.5], [0.0, 0.8, -0.2], [1.0, 0.1, -0.6]])
    numbers = [0.1, 0.9, 0.1, 0.5, 0.1]  # mixed, not greyed, edges of half, smoothed
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.array(numbers))
    monkeypatch.setattr(
        jax.random, "normal", lambda key, shape: jnp.asarray(entries, jnp.float32)
    )
    out = restyled(small_images(), positions())
    matrix = np.eye(3) + augment.MIXED * entries

    def mean(pixels):
        return cv2.blur(pixels, (3, 3), borderType=cv2.BORDER_REPLICATE)

    for image, found in zip(np.asarray(small_images()), out, strict=True):
        pixels = np.zeros(image.shape)
        for i, j, c in np.ndindex(image.shape):
            pixels[i, j, c] = 255 + sum(
                (float(image[i, j, k]) - 255) * matrix[c, k] for k in range(3)
            )
        contrast = np.abs(pixels - mean(pixels)).mean(axis=-1, keepdims=True)
        pixels = mean(pixels - augment.EDGES * 0.5 * contrast)
        expected = np.clip(np.round(pixels), 0, 255)
        assert np.abs(found - expected).max() <= 1


def test_restyling_greys_three_images_in_ten():
    image = jnp.broadcast_to(small_images(1), (1000, 12, 12, 3))
    out = restyled(image, positions(1000)).astype(int)
    grey = np.ptp(out, axis=-1).max(axis=(1, 2)) == 0
    assert 250 < grey.sum() < 350


def test_images_are_stored_before_they_are_shifted_but_only_on_cpus():
    def mixed(images, places):
        images = augment.restyle(images, places, seed=0, strength=1.0)
        targets = jnp.zeros((8, 1))
        return mix(images, targets, targets, places, seed=0, probability=0.5)

    traced = jax.jit(mixed).trace(small_images(), positions())
    on_gpu = traced.lower(lowering_platforms=("cuda",)).as_text()
    on_cpu = traced.lower(lowering_platforms=("cpu",))
    # With a condition that is not constant, the host waits for the GPU.
    condition = r"stablehlo.convert.*\(tensor<i1>\) -> tensor<i32>"
    assert re.search(condition, on_cpu.as_text())
    assert not re.search(condition, on_gpu)
    compiled = on_cpu.compile().as_text()
    # Once before images are rolled. For edges and texture: before and after each axis,
    # and for three random numbers per image.
    assert compiled.count(" conditional(") == 1 + 9
