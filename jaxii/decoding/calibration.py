"""Calibrates probabilities by Platt scaling of each class, fitted on one split.

Unverified labels count as absent, as in F2.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int, Num
from scipy.special import expit, logit  # pyright: ignore[reportMissingTypeStubs]

from jaxii.decoding.thresholds import PRIOR_POSITIVES
from jaxii.metrics.histogram import PRESENT, bin_edges

# Logits are clipped to this range, which the bins of the histogram cover.
LOWEST_LOGIT, HIGHEST_LOGIT = -16.0, 14.0
MOST_BINS = 256
MOST_STEPS, SMALLEST_STEP = 100, 1e-7


class Calibration(NamedTuple):
    """Maps the logit z of each class to a calibrated logit, slope z + intercept."""

    slopes: Float64[np.ndarray, " class"]
    intercepts: Float64[np.ndarray, " class"]

    def __call__(
        self, probs: Float[np.ndarray, "batch class"]
    ) -> Float[np.ndarray, "batch class"]:
        """Returns calibrated probabilities; NaN counts as 0."""
        scores = np.nan_to_num(probs.astype(np.float32), nan=0.0)
        logits = np.clip(logit(scores), LOWEST_LOGIT, HIGHEST_LOGIT)
        slopes, intercepts = (x.astype(np.float32)[None, :] for x in self)
        return expit(slopes * logits + intercepts)

    def tempered(
        self, frequencies: Float[np.ndarray, " class"], confidence: float
    ) -> "Calibration":
        """Returns the calibration with logits shrunk toward those of the frequencies.

        The distance of a calibrated logit from the logit of the class's frequency is
        multiplied by `confidence`.

        Args:
          frequencies: frequency of each class, in [0, 1].
          confidence: factor in [0, 1]. 1 changes nothing; with 0 the probability of
            each class is its frequency for every image.
        """
        home = np.clip(logit(frequencies), LOWEST_LOGIT, HIGHEST_LOGIT)
        return Calibration(
            slopes=confidence * self.slopes,
            intercepts=confidence * self.intercepts + (1.0 - confidence) * home,
        )


def calibrate(
    histogram: Num[np.ndarray, "kind class bin"],
    thresholds: tuple[float, ...],
    *,
    prior_positives: float = PRIOR_POSITIVES,
) -> Calibration:
    """Fits slope and intercept of each class by penalised maximum likelihood.

    One slope and intercept are fitted for all classes first, then one pair for each
    class with a Gaussian prior around the common pair. The prior's precision is the
    information in `prior_positives` positives of the average class, so classes with few
    positives stay near the common pair. Memory: a few numbers for each nonempty pair of
    class and bin, with at most 256 bins per class.

    Args:
        histogram: counts by probability bin of the split to fit on; may be weighted.
        thresholds: the grid that the histogram was built with.
        prior_positives: prior strength, above 0; as it grows, the pairs become equal.

    Returns:
        The calibration; close to the identity if the histogram is nearly empty.

    Source: Platt 1999, section 2; Guo et al. 2017, section 4 (temperature scaling, one
        slope for all).
    """
    classes, entries = entries_of(histogram, thresholds)
    # A weak prior (about one positive) that matters only for a handful of images.
    start, precision = np.array([[1.0, 0.0]]), np.eye(2)[None]
    everything = _fit(np.zeros_like(classes), entries, start, precision)
    _, _, information = _at(np.zeros_like(classes), entries, everything)
    positives = max(float(entries.present.sum()), 1.0)
    precision = precision + information * prior_positives / positives
    num_classes = histogram.shape[1]
    own = _fit(classes, entries, np.repeat(everything, num_classes, axis=0), precision)
    return Calibration(slopes=own[:, 0], intercepts=own[:, 1])


class Entries(NamedTuple):
    """Logit, number of images and number of positives of each class and bin."""

    logits: Float64[np.ndarray, " entry"]
    images: Float64[np.ndarray, " entry"]
    present: Float64[np.ndarray, " entry"]


def entries_of(
    histogram: Num[np.ndarray, "kind class bin"], thresholds: tuple[float, ...]
) -> tuple[Int[np.ndarray, " entry"], Entries]:
    """Returns classes and counts of nonempty bins, merged to at most `MOST_BINS`."""
    _, num_classes, num_bins = histogram.shape
    edges = logit(bin_edges(thresholds, num_classes).astype(np.float64))
    edges = np.clip(edges, LOWEST_LOGIT, HIGHEST_LOGIT)
    edges = np.concatenate([[LOWEST_LOGIT], edges, [HIGHEST_LOGIT]])
    starts = np.arange(0, int(num_bins), -(-int(num_bins) // MOST_BINS))
    middles = (edges[starts] + edges[np.append(starts[1:], num_bins)]) / 2
    present = np.add.reduceat(histogram[PRESENT], starts, axis=1, dtype=np.float64)
    images = np.add.reduceat(histogram.sum(axis=0, dtype=np.float64), starts, axis=1)
    classes, bins = np.nonzero(images)
    found = Entries(middles[bins], images[classes, bins], present[classes, bins])
    return classes, found


def _fit(
    groups: Int[np.ndarray, " entry"],
    entries: Entries,
    start: Float64[np.ndarray, "group 2"],
    precision: Float64[np.ndarray, "1 2 2"],
) -> Float64[np.ndarray, "group 2"]:
    """Fits slope and intercept of each group by Newton's method with step halving.

    Args:
        groups: group of each entry.
        entries: the data.
        start: initial values, which are also the mean of the prior.
        precision: precision of the prior.
    """

    def at(
        values: Float64[np.ndarray, "group 2"],
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        loss, gradient, information = _at(groups, entries, values)
        away = values - start
        pull = away @ precision[0]
        loss = loss + np.sum(pull * away, axis=1) / 2
        return loss, gradient + pull, information + precision

    values, scale = start, np.ones(len(start))
    loss, gradient, information = at(values)
    for _ in range(MOST_STEPS):
        step = np.linalg.solve(information, gradient[:, :, None])[:, :, 0]
        if np.abs(step).max() < SMALLEST_STEP:
            break
        tried = values - scale[:, None] * step
        found = at(tried)
        better = found[0] <= loss + 1e-12 * np.abs(loss)
        values = np.where(better[:, None], tried, values)
        gradient = np.where(better[:, None], found[1], gradient)
        information = np.where(better[:, None, None], found[2], information)
        loss = np.where(better, found[0], loss)
        scale = np.where(better, 1.0, scale / 2)
    return values


def _at(
    groups: Int[np.ndarray, " entry"],
    entries: Entries,
    values: Float64[np.ndarray, "group 2"],
) -> tuple[
    Float64[np.ndarray, " group"],
    Float64[np.ndarray, "group 2"],
    Float64[np.ndarray, "group 2 2"],
]:
    """Returns loss, gradient and information of each group's logistic regression."""
    z, images, present = entries
    logits = values[groups, 0] * z + values[groups, 1]
    probs = expit(logits)

    def sums(amounts: Float64[np.ndarray, " entry"]) -> np.ndarray:
        return np.bincount(groups, amounts, minlength=len(values))

    loss = sums(images * np.logaddexp(0, logits) - present * logits)
    rest = images * probs - present
    weight = images * probs * (1 - probs)
    zz, zo, oo = sums(weight * z * z), sums(weight * z), sums(weight)
    information = np.stack([zz, zo, zo, oo], axis=1).reshape(-1, 2, 2)
    return loss, np.stack([sums(rest * z), sums(rest)], axis=1), information
