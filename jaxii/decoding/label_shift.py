"""Corrects probabilities for a target domain with other label frequencies.

Needs unlabelled images of the target. Assumes that only the frequencies of labels
differ, not the appearance of images with a label.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int, Num
from scipy.special import expit, logit  # pyright: ignore[reportMissingTypeStubs]

from jaxii.decoding.calibration import Calibration, Entries, entries_of

# Strength of the prior that draws a label's target frequency to its home frequency, in
# images with the label. Estimates from a handful of uncertain images are noise.
PRIOR_POSITIVES = 10.0
# Bound on the absolute log odds of a frequency, and the number of bisection steps.
HIGHEST_LOG_ODDS, HALVINGS = 20.0, 50
# Smallest slope to divide by; flatter calibrations say nothing about a label.
SMALLEST_SLOPE = 0.1


def frequencies(
    histogram: Num[np.ndarray, "kind class bin"],
    thresholds: tuple[float, ...],
    calibration: Calibration,
) -> Float64[np.ndarray, " class"]:
    """Returns the frequency of each label, estimated by its calibrated probabilities.

    The estimate is never 0. On the split of the calibration it is close to the observed
    frequency, except for rare labels.

    Args:
        histogram: counts by probability bin; kinds are summed, so labels are not used.
        thresholds: the grid that the histogram was built with.
        calibration: calibration of these probabilities.
    """
    classes, entries = entries_of(histogram, thresholds)
    probs = expit(_calibrated(calibration, classes, entries))
    sums = np.bincount(classes, entries.images * probs, minlength=histogram.shape[1])
    return sums / histogram[:, 0].sum(dtype=np.float64)


def target_frequencies(
    histogram: Num[np.ndarray, "kind class bin"],
    thresholds: tuple[float, ...],
    calibration: Calibration,
    home: Float64[np.ndarray, " class"],
    *,
    prior_positives: float = PRIOR_POSITIVES,
) -> Float64[np.ndarray, " class"]:
    """Estimates the frequency of each label in a target from unlabelled images.

    The estimate is the fixed point of expectation maximisation for each label alone:
    the frequency that equals the mean of the corrected probabilities. The likelihood
    has a single maximum, so bisection finds it in a fixed number of passes.

    Args:
        histogram: counts of the target's probabilities; kinds are summed.
        thresholds: the grid that the histogram was built with.
        calibration: calibration of the probabilities, fitted on the home split.
        home: label frequencies on the home split, from `frequencies`; in (0, 1).
        prior_positives: strength of the prior, at least 0; 0 is the published method.

    Source: Saerens, Latinne and Decaestecker 2002, Adjusting the Outputs of a
        Classifier to New a Priori Probabilities, section 3; with a calibration before
        it, Alexandari, Kundaje and Shrikumar 2020.
    """
    classes, entries = entries_of(histogram, thresholds)
    logits = _calibrated(calibration, classes, entries)
    num_images = histogram[:, 0].sum(dtype=np.float64)
    prior_images = prior_positives / home
    low = np.full(len(home), -HIGHEST_LOG_ODDS)
    high = -low
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        probs = expit(logits + (middle - logit(home))[classes])
        expected = np.bincount(classes, entries.images * probs, minlength=len(home))
        now = expit(middle)
        more = expected - num_images * now + prior_images * (home - now) > 0
        low, high = np.where(more, middle, low), np.where(more, high, middle)
    return expit((low + high) / 2)


def logit_shift(
    calibration: Calibration,
    home: Float64[np.ndarray, " class"],
    target: Float64[np.ndarray, " class"],
) -> Float[np.ndarray, " class"]:
    """Returns the shift of each class's logit, for `corrected`.

    The shift is the change in log odds of a calibrated probability, divided by the
    slope of the calibration. Thresholds and calibrations of uncorrected probabilities
    therefore remain valid for corrected ones.

    Args:
        calibration: calibration of the probabilities.
        home: label frequencies on the split of the calibration, in (0, 1).
        target: label frequencies in the target, in (0, 1).
    """
    slopes = np.maximum(calibration.slopes, SMALLEST_SLOPE)
    shift = (logit(target) - logit(home)) / slopes
    return np.clip(shift, -HIGHEST_LOG_ODDS, HIGHEST_LOG_ODDS).astype(np.float32)


def corrected(
    probs: Float[Array, "batch class"], shift: Float[Array, " class"]
) -> Float[Array, "batch class"]:
    """Returns probabilities with each class's logit shifted, on the device.

    Probabilities of exactly 0 and 1 do not change.
    """
    odds = jnp.exp(shift)[None, :]
    return probs * odds / (probs * odds + (1.0 - probs))


def _calibrated(
    calibration: Calibration, classes: Int[np.ndarray, " entry"], entries: Entries
) -> Float64[np.ndarray, " entry"]:
    return (
        calibration.slopes[classes] * entries.logits + calibration.intercepts[classes]
    )
