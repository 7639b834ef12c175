"""Corrects probabilities for a domain where labels occur more or less often.

Needs images of that domain and no labels. Assumes that only the frequencies of labels
differ, not how their images look.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int, Num
from scipy.special import expit, logit  # pyright: ignore[reportMissingTypeStubs]

from jaxii.decoding.calibration import Calibration, Entries, entries_of

# A target's frequency of a label is drawn to the label's own as by so many images with
# it: what a handful of uncertain images say is noise.
PRIOR_POSITIVES = 10.0
# Frequencies are looked for between the odds exp(-20) and exp(20).
HIGHEST_LOG_ODDS, HALVINGS = 20.0, 50
# A calibration so flat says nothing of a label; steeper, its inverse is defined.
SMALLEST_SLOPE = 0.1


def frequencies(
    histogram: Num[np.ndarray, "kind class bin"],
    thresholds: tuple[float, ...],
    calibration: Calibration,
) -> Float64[np.ndarray, " class"]:
    """Returns how often each label occurs, by its calibrated probabilities.

    On the split of the calibration that is how often it did, but for labels too rare to
    be calibrated on their own, and never 0.

    Args:
        histogram: counts of `metrics`; kinds are added up, so that labels do not count.
        thresholds: the grid it was summed with.
        calibration: of these probabilities.
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
    """Returns how often each label occurs in a target, from images without labels.

    The fixed point of expectation maximisation, each label on its own: the frequency
    which the corrected probabilities have as their mean. The likelihood has one maximum
    only, so that it is found by bisection, in a fixed number of passes.

    Args:
        histogram: of the target's probabilities; kinds are added up.
        thresholds: the grid it was summed with.
        calibration: of the probabilities, fitted at home.
        home: frequencies there, as `frequencies` gives them; in (0, 1).
        prior_positives: at least 0; 0 is the method as published.

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
    """Returns what to add to the logits of the network, for `corrected`.

    The change of the log odds of a calibrated probability, divided by the slope of the
    calibration: what was chosen or fitted on uncorrected probabilities then holds for
    corrected ones.

    Args:
        calibration: of the probabilities.
        home: frequencies of the labels on its split, in (0, 1).
        target: those in the target, in (0, 1).
    """
    slopes = np.maximum(calibration.slopes, SMALLEST_SLOPE)
    shift = (logit(target) - logit(home)) / slopes
    return np.clip(shift, -HIGHEST_LOG_ODDS, HIGHEST_LOG_ODDS).astype(np.float32)


def corrected(
    probs: Float[Array, "batch class"], shift: Float[Array, " class"]
) -> Float[Array, "batch class"]:
    """Returns probabilities with each class's logit moved by its shift; on the device.

    A probability of exactly 0 or 1 stays what it is.
    """
    odds = jnp.exp(shift)[None, :]
    return probs * odds / (probs * odds + (1.0 - probs))


def _calibrated(
    calibration: Calibration, classes: Int[np.ndarray, " entry"], entries: Entries
) -> Float64[np.ndarray, " entry"]:
    return (
        calibration.slopes[classes] * entries.logits + calibration.intercepts[classes]
    )
