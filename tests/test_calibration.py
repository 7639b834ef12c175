"""Tests Platt scaling by class, against scikit-learn and a known distortion."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, logit
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression

from jaxii.decoding.calibration import Calibration, calibrate
from jaxii.decoding.thresholds import DEFAULT_THRESHOLDS
from jaxii.metrics.histogram import PRESENT, UNKNOWN, bin_edges

SLOPES = np.array([0.5, 1.0, 2.0, 1.5])
INTERCEPTS = np.array([1.0, 0.0, -1.0, -2.0])


def histogram_of(probs, targets):
    edges = bin_edges(DEFAULT_THRESHOLDS, probs.shape[1])
    counts = np.zeros((3, probs.shape[1], len(edges) + 1), np.int32)
    bins = np.searchsorted(edges, probs.astype(np.float32), side="right")
    classes = np.broadcast_to(np.arange(probs.shape[1]), probs.shape)
    np.add.at(counts, (np.where(targets, PRESENT, UNKNOWN), classes, bins), 1)
    return counts


def distorted(num_images, seed=0):
    """Returns reported and true probabilities, and labels drawn from the latter."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1.0, 1.5, (num_images, len(SLOPES)))
    true = expit(SLOPES * logits + INTERCEPTS)
    return expit(logits), true, rng.random(true.shape) < true


def calibration_error(probs, targets):
    """Returns scikit-learn's reliability curve as the mean gap of an entry."""
    flat, hits = probs.ravel(), targets.ravel()
    frequency, mean = calibration_curve(hits, flat, n_bins=15, strategy="uniform")
    bins = np.clip((flat * 15).astype(int), 0, 14)
    counts = np.bincount(bins, minlength=15)
    return np.sum(np.abs(frequency - mean) * counts[counts > 0]) / counts.sum()


def test_a_known_distortion_is_undone():
    probs, _, targets = distorted(40_000)
    found = calibrate(histogram_of(probs, targets), DEFAULT_THRESHOLDS)
    np.testing.assert_allclose(found.slopes, SLOPES, rtol=0.05)
    np.testing.assert_allclose(found.intercepts, INTERCEPTS, atol=0.08)


def test_a_tempered_calibration_is_between_itself_and_the_frequencies():
    probs, _, targets = distorted(500)
    found = calibrate(histogram_of(probs, targets), DEFAULT_THRESHOLDS)
    home = np.array([0.0, 0.2, 0.5, 0.9])
    logits = 0.3 * logit(found(probs)) + 0.7 * np.maximum(logit(home), -16.0)
    np.testing.assert_allclose(found.tempered(home, 0.3)(probs), expit(logits), 1e-5)
    np.testing.assert_array_equal(found.tempered(home, 1.0)(probs), found(probs))
    everywhere = found.tempered(home, 0.0)(probs)
    np.testing.assert_allclose(everywhere[:, 1:] - home[1:], 0.0, atol=1e-6)


def test_without_shrinkage_a_class_is_the_logistic_regression_of_scikit_learn():
    probs, _, targets = distorted(3_000)
    found = calibrate(
        histogram_of(probs, targets), DEFAULT_THRESHOLDS, prior_positives=1e-6
    )
    for label in range(len(SLOPES)):
        fit = LogisticRegression(C=np.inf, tol=1e-9)
        fit.fit(logit(probs[:, label : label + 1]), targets[:, label])
        # The prior toward the identity counts as one positive; bins are 0.1 wide.
        assert found.slopes[label] == pytest.approx(fit.coef_[0, 0], abs=0.02)
        assert found.intercepts[label] == pytest.approx(fit.intercept_[0], abs=0.02)


def test_full_shrinkage_gives_all_classes_the_same_two_numbers():
    probs, _, targets = distorted(2_000)
    found = calibrate(
        histogram_of(probs, targets), DEFAULT_THRESHOLDS, prior_positives=1e12
    )
    fit = LogisticRegression(C=np.inf, tol=1e-9)
    fit.fit(logit(probs).reshape(-1, 1), targets.ravel())
    np.testing.assert_allclose(found.slopes, fit.coef_[0, 0], atol=0.02)
    np.testing.assert_allclose(found.intercepts, fit.intercept_[0], atol=0.02)


@pytest.mark.parametrize(
    ("most", "prior"), [(10_000, {}), (1, {"prior_positives": 1.0})]
)
def test_shrinkage_is_the_prior_of_fifty_positives_of_the_average_class(most, prior):
    probs, _, targets = distorted(400)
    targets &= np.cumsum(targets).reshape(targets.shape) <= most
    z = logit(probs)

    def fitted(z, targets, centre, precision):
        def loss(x):
            logits = x[0] * z + x[1]
            away = x - centre
            return (
                np.sum(np.logaddexp(0, logits) - targets * logits)
                + away @ precision @ away / 2
            )

        return minimize(loss, centre, tol=1e-10).x

    # The prior counts as one positive, around the identity.
    everything = fitted(z.ravel(), targets.ravel(), np.array([1.0, 0.0]), np.eye(2))
    at = expit(everything[0] * z + everything[1]).ravel()
    design = np.stack([z.ravel(), np.ones(z.size)])
    information = (design * at * (1 - at)) @ design.T
    size = prior.get("prior_positives", 50)
    precision = np.eye(2) + information * size / targets.sum()
    found = calibrate(histogram_of(probs, targets), DEFAULT_THRESHOLDS, **prior)
    for c, got in enumerate(zip(found.slopes, found.intercepts, strict=True)):
        want = fitted(z[:, c], targets[:, c], everything, precision)
        # Bins are 0.1 wide.
        np.testing.assert_allclose(got, want, atol=0.01)


def test_a_class_of_which_nothing_is_known_has_the_calibration_of_all():
    probs, _, targets = distorted(400)
    counts = histogram_of(probs, targets)
    counts[:, -1] = 0
    found = calibrate(counts, DEFAULT_THRESHOLDS)
    first = calibrate(counts[:, :-1], DEFAULT_THRESHOLDS)
    np.testing.assert_allclose(found.slopes[:-1], first.slopes)
    assert len(found.slopes) == probs.shape[1] and np.isfinite(found.slopes[-1])
    common = calibrate(counts, DEFAULT_THRESHOLDS, prior_positives=1e12)
    np.testing.assert_allclose(found.slopes[-1], common.slopes[-1])
    np.testing.assert_allclose(found.slopes[-1], common.slopes[0], rtol=1e-6)


def test_the_calibration_error_of_new_images_falls():
    probs, _, targets = distorted(2_000, seed=1)
    found = calibrate(histogram_of(probs, targets), DEFAULT_THRESHOLDS)
    probs, _, targets = distorted(5_000, seed=2)
    before = calibration_error(probs, targets)
    after = calibration_error(found(probs.astype(np.float32)), targets)
    assert before > 0.05 and after < before / 3


def test_a_class_with_few_positives_stays_near_the_others():
    rng = np.random.default_rng(4)
    logits = rng.normal(-2, 1.5, (2_000, 20))
    targets = rng.random(logits.shape) < expit(logits)
    few = np.zeros(2_000, bool)
    few[:2] = True
    targets[:, 0] &= few
    targets[:, 1] &= rng.random(2_000) < 0.05
    found = calibrate(histogram_of(expit(logits), targets), DEFAULT_THRESHOLDS)
    # The images show that the labels are rare, even without a positive.
    assert np.all(found.intercepts[:2] < -1)
    assert np.all(np.abs(found.slopes[:2] - found.slopes.mean()) < 0.4)


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_one_probability_for_everything_is_fitted_without_harm(probability):
    probs = np.full((50, 3), probability)
    targets = np.arange(150).reshape(50, 3) % 5 == 0
    found = calibrate(histogram_of(probs, targets), DEFAULT_THRESHOLDS)
    got = found(probs.astype(np.float32))
    np.testing.assert_allclose(got, 0.2, atol=0.06)


def test_labels_that_no_image_has_become_improbable_and_stay_finite():
    probs = np.random.default_rng(0).random((100, 3))
    found = calibrate(histogram_of(probs, np.zeros((100, 3), bool)), DEFAULT_THRESHOLDS)
    got = found(probs.astype(np.float32))
    assert np.all(np.isfinite(got)) and got.max() < 0.1


def test_probabilities_of_0_and_1_and_none_stay_probabilities():
    calibration = Calibration(np.array([2.0, 1.0, 1.0]), np.array([0.5, 0.0, 0.0]))
    got = calibration(np.array([[0.0, 1.0, np.nan]], np.float32))
    assert got.dtype == np.float32
    assert np.all((got >= 0) & (got <= 1)) and got[0, 2] < 1e-6 < got[0, 1]
