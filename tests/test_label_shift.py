"""Tests label frequencies estimated from probabilities alone, on a known shift."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, logit

from jaxii.decoding.calibration import Calibration
from jaxii.decoding.label_shift import (
    corrected,
    frequencies,
    logit_shift,
    target_frequencies,
)
from jaxii.decoding.thresholds import DEFAULT_THRESHOLDS
from jaxii.metrics.histogram import UNKNOWN, bin_edges

HOME = np.array([0.05, 0.2, 0.5, 0.1])
TARGET = np.array([0.2, 0.05, 0.7, 0.1])
IDENTITY = Calibration(np.ones(4), np.zeros(4))
DISTORTED = Calibration(
    np.array([0.5, 1.0, 2.0, 1.5]), np.array([1.0, 0.0, -1.0, -2.0])
)


def drawn(rates, num_images, seed=0):
    """Returns probabilities of a classifier calibrated at HOME, and the truth.

    A present label moves a score from a Gaussian around -1 to one around 1.
    """
    rng = np.random.default_rng(seed)
    truth = rng.random((num_images, len(rates))) < rates
    scores = rng.normal(np.where(truth, 1.0, -1.0))
    return expit(2.0 * scores + logit(HOME)), truth


def histogram_of(probs):
    edges = bin_edges(DEFAULT_THRESHOLDS, probs.shape[1])
    counts = np.zeros((3, probs.shape[1], len(edges) + 1), np.int32)
    bins = np.searchsorted(edges, probs.astype(np.float32), side="right")
    classes = np.broadcast_to(np.arange(probs.shape[1]), probs.shape)
    np.add.at(counts, (UNKNOWN, classes, bins), 1)
    return counts


def found_in(probs, calibration=IDENTITY, **more):
    counts = histogram_of(probs)
    return target_frequencies(counts, DEFAULT_THRESHOLDS, calibration, HOME, **more)


def posteriors(probs, frequencies):
    """Returns probabilities for these label frequencies instead of `HOME`."""
    present = probs * frequencies / HOME
    absent = (1 - probs) * (1 - frequencies) / (1 - HOME)
    return present / (present + absent)


def test_a_known_shift_is_recovered_from_images_without_labels():
    probs, truth = drawn(TARGET, 40_000)
    np.testing.assert_allclose(found_in(probs), truth.mean(axis=0), atol=0.01)


def test_it_is_the_fixed_point_of_expectation_maximisation():
    probs, _ = drawn(TARGET, 2_000)
    expected = HOME.copy()
    for _ in range(2_000):
        expected = posteriors(probs, expected).mean(axis=0)
    # Bins are 0.1 wide in the logit.
    np.testing.assert_allclose(
        found_in(probs, prior_positives=0.0), expected, atol=0.002
    )


def test_the_prior_is_worth_ten_images_with_each_label():
    probs, _ = drawn(TARGET, 200)
    expected = HOME.copy()
    for _ in range(500):
        total = posteriors(probs, expected).sum(axis=0)
        expected = (total + 10) / (200 + 10 / HOME)
    np.testing.assert_allclose(found_in(probs), expected, atol=0.002)


def test_without_a_shift_nothing_is_corrected():
    probs, _ = drawn(HOME, 40_000)
    home = frequencies(histogram_of(probs), DEFAULT_THRESHOLDS, IDENTITY)
    np.testing.assert_allclose(home, probs.mean(axis=0), rtol=0.01)
    target = target_frequencies(histogram_of(probs), DEFAULT_THRESHOLDS, IDENTITY, home)
    np.testing.assert_allclose(logit_shift(IDENTITY, home, target), 0.0, atol=0.01)


def test_corrected_probabilities_are_calibrated_in_the_target():
    probs, truth = drawn(TARGET, 40_000)
    shift = logit_shift(IDENTITY, HOME, found_in(probs))
    right = np.asarray(corrected(jnp.asarray(probs, jnp.float32), jnp.asarray(shift)))
    for label in range(len(TARGET)):
        bins = (right[:, label] * 10).astype(int)
        for one in np.unique(bins):
            inside = bins == one
            if inside.sum() > 1000:
                gap = right[inside, label].mean() - truth[inside, label].mean()
                assert abs(gap) < 0.03


def test_of_distorted_probabilities_the_calibrated_ones_are_corrected():
    true, _ = drawn(TARGET, 5_000)
    slopes, intercepts = DISTORTED
    reported = expit((logit(true) - intercepts) / slopes)
    target = found_in(reported, DISTORTED)
    np.testing.assert_allclose(target, found_in(true), atol=0.005)
    shift = logit_shift(DISTORTED, HOME, target)
    moved = corrected(jnp.asarray(reported, jnp.float32), jnp.asarray(shift))
    expected = expit(logit(true) + logit(target) - logit(HOME))
    np.testing.assert_allclose(DISTORTED(np.asarray(moved)), expected, atol=1e-3)


def test_a_label_of_which_a_target_says_little_keeps_its_frequency():
    probs, _ = drawn(TARGET, 20)
    free = found_in(probs, prior_positives=0.0)
    held = found_in(probs, prior_positives=1000.0)
    np.testing.assert_allclose(held, HOME, atol=0.01)
    assert np.abs(free - HOME).max() > 0.05


def test_a_label_without_counts_has_a_finite_frequency():
    counts = histogram_of(drawn(TARGET, 20)[0])
    counts[:, -1] = 0
    found = target_frequencies(counts, DEFAULT_THRESHOLDS, IDENTITY, HOME)
    assert len(found) == len(HOME) and np.isfinite(found).all()


@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_what_is_certain_stays_so(prob):
    probs = jnp.full((2, 4), prob, jnp.float32)
    shift = jnp.asarray([-20.0, 20.0, 0.0, 1.0], jnp.float32)
    np.testing.assert_array_equal(corrected(probs, shift), prob)


def test_a_label_that_a_target_lacks_gives_a_finite_shift():
    probs = np.full((500, 4), 1e-6)
    home = np.full(4, 0.3)
    target = target_frequencies(
        histogram_of(probs), DEFAULT_THRESHOLDS, IDENTITY, home, prior_positives=0.0
    )
    shift = logit_shift(IDENTITY, home, target)
    assert np.isfinite(shift).all() and shift.dtype == np.float32
    assert (shift < -10).all()
