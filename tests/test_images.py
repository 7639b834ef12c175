"""Tests that the images shown are those that a step trains on."""

import jax
import numpy as np
import optax
import pytest

from jaxii.objective.objective import make_objective
from jaxii.train.step import StepSettings, examples
from jaxii.train.telemetry.images import grid, make_images

NAMES = ("dog", "<script>", "שלום")
SIZE = 8


def settings(**changes):
    return StepSettings(
        apply=lambda *given, **more: None,
        objective=make_objective({"bce": 1.0}, num_steps=1, num_classes=len(NAMES)),
        optimizer=optax.sgd(0.1),
        learning_rate=lambda step: step,
        seed=3,
        **changes,
    )


def batch(rows):
    rng = np.random.default_rng(0)
    label_ids = np.full((rows, 2), -1, np.int32)
    label_ids[:, 0] = np.arange(rows) % len(NAMES)
    label_ids[0] = (0, 2)
    label_ids[1] = -1
    confidences = np.ones((rows, 2), np.float32)
    confidences[0, 0] = 0.4
    return {
        "images": rng.integers(0, 256, (rows, SIZE, SIZE, 3), np.uint8),
        "label_ids": label_ids,
        "label_confidences": confidences,
        "mask": np.ones(rows, np.float32),
        "positions": np.arange(rows, dtype=np.int32) + 50,
    }


def tiles(pixels):
    step = SIZE + 2
    rows, columns = (pixels.shape[0] + 2) // step, (pixels.shape[1] + 2) // step
    return [
        pixels[y * step : y * step + SIZE, x * step : x * step + SIZE]
        for y in range(rows)
        for x in range(columns)
    ]


@pytest.mark.parametrize("mix_probability", [0.0, 1.0])
def test_what_is_shown_is_what_the_first_device_trains_on(mix_probability):
    chosen = settings(augmentation=1.0, mix_probability=mix_probability)
    per_device = 20
    given = batch(per_device * jax.local_device_count())
    shown = make_images(chosen, NAMES)(given)
    share = {name: value[:per_device] for name, value in given.items()}
    images, _, _ = jax.jit(lambda b: examples(chosen, b))(share)
    for tile, image in zip(tiles(shown.pixels), np.asarray(images)[:16], strict=True):
        # One level: sums may round differently if compiled for another number of rows.
        np.testing.assert_allclose(tile.astype(int), image.astype(int), atol=1)
        assert np.abs(tile.astype(int) - given["images"][0].astype(int)).max() > 1


def test_captions_name_the_labels_and_how_sure_they_are():
    given = batch(4 * jax.local_device_count())
    shown = make_images(settings(), NAMES)(given)
    assert shown.captions == ("שלום, dog 40%", "no label", "שלום", "dog")
    assert len(tiles(shown.pixels)) == 4


def test_images_lie_in_rows_of_four():
    images = np.arange(6, dtype=np.uint8)[:, None, None, None] + np.zeros(
        (6, SIZE, SIZE, 3), np.uint8
    )
    pixels = grid(images)
    assert pixels.shape == (2 * SIZE + 2, 4 * SIZE + 6, 3)
    values = [tile[0, 0, 0] for tile in tiles(pixels)]
    assert values == [0, 1, 2, 3, 4, 5, 0, 0]
