"""Tests probabilities of one, several and adapted models against NumPy."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, logit
from test_label_shift import histogram_of

from jaxii.decoding.calibration import Calibration
from jaxii.decoding.label_shift import logit_shift, target_frequencies
from jaxii.decoding.thresholds import DEFAULT_THRESHOLDS
from jaxii.distributed.mesh import divided, make_mesh, to_devices
from jaxii.evaluation.predictor import (
    Model,
    make_predict,
    predicted,
    shift_of,
    shifted,
)

NUM_CLASSES, BATCH = 3, 16
HOME = np.array([0.1, 0.3, 0.5])
CALIBRATION = Calibration(np.array([1.0, 1.5, 0.8]), np.array([0.0, -0.5, 0.2]))


class Outputs(NamedTuple):
    logits: jax.Array
    embedding: jax.Array | None


def apply(params, batch_stats, images, *, train, key=None):
    """A linear classifier of the mean colour, less its running mean."""
    colour = jnp.mean(images.astype(jnp.float32), axis=(1, 2)) / 255.0
    mean = jnp.mean(colour, axis=0) if train else batch_stats["mean"]
    centred = colour - mean[None]
    kept = 0.9 * batch_stats["mean"] + 0.1 * jnp.mean(colour, axis=0)
    variance = jnp.mean(jnp.square(centred), axis=0)
    stats = {"mean": kept, "var": 0.9 * batch_stats["var"] + 0.1 * variance}
    return Outputs(centred @ params, centred), stats if train else batch_stats


def model(seed):
    rng = np.random.default_rng(seed)
    return Model(
        apply=apply,
        params=rng.normal(0, 4, (3, NUM_CLASSES)).astype(np.float32),
        batch_stats={
            "mean": np.full(3, 0.4, np.float32),
            "var": np.ones(3, np.float32),
        },
    )


def images_of(number, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (number, 4, 4, 3)).astype(np.uint8)


def probs_of(one, images, mean=None):
    colour = images.astype(np.float64).mean(axis=(1, 2)) / 255
    mean = one.batch_stats["mean"] if mean is None else mean
    return expit((colour - mean) @ one.params)


def on_devices(images):
    return to_devices({"images": images}, divided(make_mesh()))["images"]


def batches_of(images):
    """Yields batches, the last one padded with white images that are masked."""
    for start in range(0, len(images), BATCH):
        part = images[start : start + BATCH]
        batch = np.full((BATCH, *part.shape[1:]), 255, np.uint8)
        batch[: len(part)] = part
        mask = np.zeros(BATCH, np.float32)
        mask[: len(part)] = 1
        yield {"images": batch, "mask": mask}


def test_a_lone_model_gives_probabilities_and_its_embedding():
    images = images_of(BATCH)
    probs, embedding = make_predict([model(0)], make_mesh())(on_devices(images))
    np.testing.assert_allclose(probs, probs_of(model(0), images), atol=1e-5)
    assert embedding.shape == (BATCH, 3)


def test_several_give_the_mean_of_their_probabilities_and_no_embedding():
    images, models = images_of(BATCH), [model(seed) for seed in range(3)]
    probs, embedding = make_predict(models, make_mesh())(on_devices(images))
    expected = np.mean([probs_of(one, images) for one in models], axis=0)
    np.testing.assert_allclose(probs, expected, atol=1e-5)
    assert embedding is None


def test_an_adapted_model_has_the_statistics_of_the_images_it_was_shown():
    images = images_of(3 * BATCH)
    adapted = model(0).adapted(batches_of(images), make_mesh())
    colour = images.astype(np.float64).mean(axis=(1, 2)) / 255
    np.testing.assert_allclose(adapted.batch_stats["mean"], colour.mean(0), atol=1e-5)
    probs, _ = make_predict([adapted], make_mesh())(on_devices(images[:BATCH]))
    expected = probs_of(model(0), images[:BATCH], colour.mean(0))
    np.testing.assert_allclose(probs, expected, atol=1e-5)


@pytest.mark.parametrize("number", [5 * BATCH, 5 * BATCH + 3])
def test_a_shift_is_measured_on_every_image_once_and_on_no_padding(number):
    images, mesh = images_of(number), make_mesh()
    predict = make_predict([model(0)], mesh)
    found = shift_of(
        predict, batches_of(images), mesh, calibration=CALIBRATION, home=HOME
    )
    counts = histogram_of(probs_of(model(0), images))
    target = target_frequencies(counts, DEFAULT_THRESHOLDS, CALIBRATION, HOME)
    np.testing.assert_allclose(found, logit_shift(CALIBRATION, HOME, target), atol=1e-3)


def test_without_an_image_nothing_is_shifted():
    mesh = make_mesh()
    predict = make_predict([model(0)], mesh)
    found = shift_of(predict, [], mesh, calibration=CALIBRATION, home=HOME)
    np.testing.assert_array_equal(found, np.zeros(NUM_CLASSES))


def test_shifted_probabilities_keep_the_embedding():
    images, shift = images_of(BATCH), np.array([1.0, 0.0, -2.0], np.float32)
    predict = shifted(make_predict([model(0)], make_mesh()), shift)
    probs, embedding = predict(on_devices(images))
    expected = expit(logit(probs_of(model(0), images)) + shift)
    np.testing.assert_allclose(probs, expected, atol=1e-5)
    assert embedding.shape == (BATCH, 3)


@pytest.mark.parametrize("number", [0, 1, 2, 5])
def test_the_devices_have_the_next_batch_before_one_is_handed_over(number):
    batches = [
        {"images": np.full((2, 1, 1, 3), i, np.uint8), "index": np.array([i, i])}
        for i in range(number)
    ]
    events = []

    def predict(images):
        events.append(f"predict {images[0, 0, 0, 0]}")
        return images.astype(jnp.float32), None

    mesh = make_mesh(jax.devices()[:1])
    for batch, probs, embedding in predicted(predict, batches, mesh):
        events.append(f"handed {batch['index'][0]}")
        np.testing.assert_array_equal(probs, batch["images"])
        assert embedding is None
    expected = [f"predict {i}" for i in range(number)]
    for i in range(number):
        # After the batch that follows it, if any.
        expected.insert(min(i + 2, number) + i, f"handed {i}")
    assert events == expected
