"""Tests the pixels that transforms return."""

import io

import cv2
import mixed_images
import numpy as np
import PIL.Image
import pytest
import simplejpeg

from jaxii.data import transforms
from jaxii.data.transforms import (
    EvalTransform,
    TrainTransform,
    decoded_size,
    read,
    thumbnail,
)


def quarters(height=80, width=120):
    """Returns four plain quarters, so that a colour identifies a place in the image."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (200, 0, 0)
    pixels[: height // 2, width // 2 :] = (0, 200, 0)
    pixels[height // 2 :, : width // 2] = (0, 0, 200)
    pixels[height // 2 :, width // 2 :] = (200, 200, 200)
    return pixels


def png(pixels):
    return cv2.imencode(".png", pixels[..., ::-1])[1].tobytes()


def jpeg(pixels):
    return simplejpeg.encode_jpeg(pixels, quality=95, colorspace="RGB")


ENCODERS = {"png": png, "jpeg": jpeg}


@pytest.mark.parametrize("encode", ENCODERS.values(), ids=ENCODERS)
@pytest.mark.parametrize("shape", [(80, 120), (300, 90), (40, 1000)])
def test_the_evaluation_view_is_the_whole_image(encode, shape):
    pixels = quarters(*shape)
    # The edges are visible too.
    edge = max(2, shape[1] // 20)
    pixels[:, :edge] = pixels[:, -edge:] = (0, 200, 200)
    view = EvalTransform(size_pixels=80)(encode(pixels))
    assert view.shape == (80, 80, 3)
    for (row, column), colour in {
        (10, 10): (200, 0, 0),
        (10, 70): (0, 200, 0),
        (70, 10): (0, 0, 200),
        (70, 70): (200, 200, 200),
        (10, 1): (0, 200, 200),
        (70, 78): (0, 200, 200),
    }.items():
        np.testing.assert_allclose(view[row, column], colour, atol=12)


@pytest.mark.parametrize("shape", [(100, 100), (100, 180), (260, 100)])
def test_a_smaller_crop_share_cuts_closer(shape):
    pixels = np.zeros((*shape, 3), np.uint8)
    rows, columns = (slice(n // 4, n - n // 4) for n in shape)
    pixels[rows, columns] = 255
    view = EvalTransform(size_pixels=50, crop_share=0.5)(png(pixels))
    assert (view == 255).all()


@pytest.mark.parametrize("encode", ENCODERS.values(), ids=ENCODERS)
def test_a_image_is_scaled_to_the_size_asked_for(encode):
    for size in (16, 64, 224):
        assert EvalTransform(size_pixels=size)(encode(quarters())).shape == (
            size,
            size,
            3,
        )


@pytest.mark.parametrize("shape", [(96, 96), (128, 96), (96, 200)])
def test_strength_zero_is_the_view_of_evaluation(shape):
    encoded = png(quarters(*shape))
    transform = TrainTransform(size_pixels=96, strength=0.0, mirror=False)
    view = transform(encoded, np.random.default_rng(0))
    np.testing.assert_array_equal(view, EvalTransform(size_pixels=96)(encoded))


def test_a_crop_of_a_gradient_has_the_pixels_of_its_place(monkeypatch):
    for name in ("ROTATION_DEGREES", "SHEAR", "DEGRADED_PROBABILITY"):
        monkeypatch.setattr(transforms, name, 0.0)
    monkeypatch.setattr(transforms, "ZOOM_OUT", 1.0)
    rows, columns = np.mgrid[0:128, 0:128].astype(np.uint8)
    pixels = np.stack([rows * 2, columns * 2, np.zeros_like(rows)], axis=-1)
    transform = TrainTransform(size_pixels=32, strength=1.5, mirror=False)
    for seed in range(20):
        top, left, height, width = transform._crop(
            128, 128, np.random.default_rng(seed)
        )
        view = transform(png(pixels), np.random.default_rng(seed)).astype(int)
        expected_rows = 2 * (top + (np.arange(32) + 0.5) * height / 32 - 0.5)
        expected_columns = 2 * (left + (np.arange(32) + 0.5) * width / 32 - 0.5)
        np.testing.assert_allclose(view[:, 16, 0], expected_rows, atol=3)
        np.testing.assert_allclose(view[16, :, 1], expected_columns, atol=3)


def test_half_of_the_views_are_mirrored():
    pixels = quarters(64, 64)
    transform = TrainTransform(size_pixels=64, strength=0.0)
    first = [
        transform(png(pixels), np.random.default_rng(seed))[5, 5].tolist()
        for seed in range(200)
    ]
    assert 70 < first.count([0, 200, 0]) < 130
    assert first.count([0, 200, 0]) + first.count([200, 0, 0]) == 200


def gradient(side=64):
    rows, columns = np.mgrid[0:side, 0:side].astype(np.uint8)
    return np.stack([rows, columns, np.full_like(rows, 9)], axis=-1)


def test_a_warped_gradient_has_the_pixels_of_its_place():
    transform, beyond = TrainTransform(size_pixels=64), 0
    for seed in range(20):
        view = transform._warp(gradient(), np.random.default_rng(seed)).astype(float)
        numbers = np.random.default_rng(seed).uniform((-1, -1, 0), (1, 1, 1))
        angle = np.deg2rad(transforms.ROTATION_DEGREES * numbers[0])
        zoom = transforms.ZOOM_OUT ** numbers[2]
        rows, columns = np.mgrid[0:64:7, 0:64:7]
        y, x = rows - 31.5, columns - 31.5
        x = x + transforms.SHEAR * numbers[1] * y
        source_rows = zoom * (np.sin(angle) * x + np.cos(angle) * y) + 31.5
        source_columns = zoom * (np.cos(angle) * x - np.sin(angle) * y) + 31.5
        expected = np.stack([source_rows, source_columns, np.full(y.shape, 9)], axis=-1)
        # Pixels of the border are repeated beyond it.
        np.testing.assert_allclose(
            view[rows, columns], np.clip(expected, 0, 63), atol=0.75
        )
        beyond += np.count_nonzero(expected > 64)
    assert beyond > 100


def test_a_degraded_image_is_smoother_and_about_half_of_them_are_degraded():
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    transform = TrainTransform(size_pixels=32)
    views = [transform._degrade(noise, np.random.default_rng(i)) for i in range(200)]
    changed = [view for view in views if not np.array_equal(view, noise)]
    # 1 - 0.75 ** 2 of them, minus those that are hardly scaled.
    assert 65 < len(changed) < 105
    assert np.mean([np.std(view) for view in changed]) < 0.9 * np.std(noise)


@pytest.mark.parametrize("strength", [0.5, 1.0, 2.5])
def test_every_strength_gives_a_square_of_bytes(strength):
    transform = TrainTransform(size_pixels=48, strength=strength)
    for seed in range(20):
        view = transform(jpeg(quarters(70, 130)), np.random.default_rng(seed))
        assert view.shape == (48, 48, 3)
        assert view.dtype == np.uint8


def test_the_same_rng_gives_the_same_view():
    transform = TrainTransform(size_pixels=32)
    views = [transform(jpeg(quarters()), np.random.default_rng(3)) for _ in range(2)]
    np.testing.assert_array_equal(*views)


def test_a_jpeg_is_decoded_no_larger_than_needed():
    big = jpeg(np.full((512, 512, 3), 100, np.uint8))
    assert read(big).decode(60, 60).shape == (64, 64, 3)
    assert read(big).decode(65, 65).shape[0] >= 65


def test_a_jpeg_is_decoded_at_one_of_the_fast_scales():
    big = jpeg(np.full((300, 401, 3), 100, np.uint8))
    # Scales from 3/8 to 7/8 take longer than the next power of two.
    for fewest, shape in {
        1: (38, 51),
        38: (38, 51),
        39: (75, 101),
        76: (150, 201),
        151: (300, 401),
        900: (300, 401),
    }.items():
        assert read(big).decode(fewest, 1).shape == (*shape, 3)
        assert decoded_size(300, 401, fewest, 1) == shape


def test_a_crop_is_the_view_without_warp_and_loss_of_quality(monkeypatch):
    transform = TrainTransform(size_pixels=48)
    crop = transform.crop(jpeg(quarters()), np.random.default_rng(5))
    monkeypatch.setattr(TrainTransform, "_warp", lambda self, view, rng: view)
    monkeypatch.setattr(TrainTransform, "_degrade", lambda self, view, rng: view)
    view = transform(jpeg(quarters()), np.random.default_rng(5))
    np.testing.assert_array_equal(view, crop)


@pytest.mark.parametrize(
    ("shape", "most"),
    [((102, 102), 12), ((128, 128), 4), ((160, 70), 6), ((66, 190), 5)],
)
def test_shrinking_down_to_a_third_is_antialiased_as_by_pillow(shape, most):
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    want = PIL.Image.fromarray(noise).resize((64, 64), PIL.Image.Resampling.BILINEAR)

    def error(got):
        return np.sqrt(np.mean((got.astype(float) - np.asarray(want)) ** 2))

    # White noise is the hardest case: its own deviation is 74.
    assert error(transforms.resize(noise, 64, 64)) < most
    assert error(cv2.resize(noise, (64, 64), interpolation=cv2.INTER_LINEAR)) > 18


def test_shrinking_to_less_than_a_third_gives_the_mean_of_the_area():
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    for shrink in (4, 6):
        side = 96 // shrink
        means = noise.reshape(side, shrink, side, shrink, 3).mean(axis=(1, 3))
        resized = transforms.resize(noise, side, side).astype(float)
        np.testing.assert_allclose(resized, means, atol=1)


@pytest.mark.parametrize("shape", [(8, 96), (96, 8)])
def test_one_side_is_averaged_where_the_other_grows(shape):
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    want = PIL.Image.fromarray(noise).resize((16, 16), PIL.Image.Resampling.BILINEAR)
    got = transforms.resize(noise, 16, 16).astype(float)
    # A triangle of two pixels against a box of one.
    assert np.sqrt(np.mean((got - np.asarray(want)) ** 2)) < 16
    plain = cv2.resize(noise, (16, 16), interpolation=cv2.INTER_AREA).astype(float)
    assert np.sqrt(np.mean((plain - np.asarray(want)) ** 2)) > 30


def test_a_crop_keeps_about_the_aspect_ratio_of_its_image():
    transform = TrainTransform(size_pixels=32, strength=0.5)
    rng = np.random.default_rng(0)
    crops = [transform._crop(100, 300, rng) for _ in range(500)]
    assert min(height * width for _, _, height, width in crops) > 0.57 * 30_000
    ratios = [width / height for _, _, height, width in crops]
    reach = transforms.ASPECT_RATIO**0.5
    assert 3 / reach * 0.98 < min(ratios) < max(ratios) < 3 * reach * 1.02
    # Both edges are reached.
    assert min(left for _, left, _, _ in crops) < 5
    assert max(left + width for _, left, _, width in crops) > 295


def test_a_grey_jpeg_has_three_channels():
    grey = simplejpeg.encode_jpeg(
        np.full((40, 40, 1), 77, np.uint8), colorspace="GRAY", quality=95
    )
    view = EvalTransform(size_pixels=20)(grey)
    np.testing.assert_allclose(view, 77, atol=2)


@pytest.mark.parametrize("encoded", [b"", b"no image", jpeg(quarters())[:40]])
def test_what_is_no_image_raises_a_value_error(encoded):
    with pytest.raises(ValueError, match=r"."):
        EvalTransform(size_pixels=16)(encoded)


def test_a_truncated_jpeg_raises_a_value_error():
    encoded = jpeg(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match=r"."):
        EvalTransform(size_pixels=64)(encoded[: len(encoded) // 2])


@pytest.mark.parametrize("size", [120, 30, 10])
@pytest.mark.parametrize("turn", mixed_images.STORED)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_views_are_upright_as_exif_says(kind, turn, size):
    upright = PIL.Image.fromarray(quarters(120, 160))
    encoded = mixed_images.turned(upright, turn, kind)
    plain = mixed_images.turned(upright, 1, kind)
    want = EvalTransform(size_pixels=size)(plain).astype(float)
    still = TrainTransform(size_pixels=size, strength=0.0, mirror=False)
    for view in (
        EvalTransform(size_pixels=size)(encoded),
        still(encoded, np.random.default_rng(0)),
    ):
        assert np.abs(view - want).mean() < 4


def test_the_size_of_a_turned_image_is_that_of_the_upright_one():
    upright = PIL.Image.fromarray(quarters(40, 60))
    for kind in ("JPEG", "PNG"):
        image = read(mixed_images.turned(upright, 6, kind))
        assert (image.height, image.width) == (40, 60)
        assert image.decode(40, 60).shape == (40, 60, 3)


def test_a_jpeg_that_libjpeg_warns_of_without_harm_is_read():
    encoded = jpeg(quarters())
    warned = encoded[:-2] + bytes(20) + encoded[-2:]
    views = [EvalTransform(size_pixels=40)(given) for given in (encoded, warned)]
    np.testing.assert_allclose(*(view.astype(float) for view in views), atol=4)


def test_what_is_transparent_is_white():
    image = PIL.Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    file = io.BytesIO()
    image.save(file, "PNG")
    assert (EvalTransform(size_pixels=20)(file.getvalue()) == 255).all()


def test_the_size_of_a_image_is_height_then_width():
    for encode in ENCODERS.values():
        image = read(encode(quarters(40, 60)))
        assert (image.height, image.width) == (40, 60)


@pytest.mark.parametrize("encode", ENCODERS.values(), ids=ENCODERS)
def test_a_thumbnail_is_the_whole_image_in_small(encode):
    small = simplejpeg.decode_jpeg(thumbnail(encode(quarters(300, 450)), 90))
    assert small.shape == (60, 90, 3)
    np.testing.assert_allclose(small[15, 20], (200, 0, 0), atol=12)
    np.testing.assert_allclose(small[45, 70], (200, 200, 200), atol=12)


def test_a_small_image_is_not_enlarged_and_what_is_no_image_raises():
    assert read(thumbnail(png(quarters(10, 20)), 90)).width == 20
    with pytest.raises(ValueError, match="not an image"):
        thumbnail(b"no image", 90)
