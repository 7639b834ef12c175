"""Average precision of each class, from counts by probability bin."""

import numpy as np
from jaxtyping import Float, Int

from jaxii.metrics.histogram import PRESENT, UNKNOWN, VERIFIED_ABSENT

# With at least this many bins, scores in one bin can be treated as equal.
NUM_NARROW_BINS = 4096


def average_precision(
    histogram: Int[np.ndarray, "kind class bin"],
) -> Float[np.ndarray, " class"]:
    """Returns the average precision of each class; NaN without positives.

    A class with verified absences is ranked among its annotated images only, other
    classes among all images. Scores in a narrow bin count as equal and are treated as
    in scikit-learn. In wide bins this would lose 0.003 of the mean, so the positives
    of a bin lie evenly among its negatives. Memory: 512 classes x bins at a time.

    Source: scikit-learn's `average_precision_score`; only annotated entries, as in the
    Open Images evaluation protocol.
    """
    num_bins = histogram.shape[2]
    wide = num_bins < NUM_NARROW_BINS
    within = np.ones(num_bins)
    within[[0, -1]] = 0
    parts: list[Float[np.ndarray, " part"]] = []
    for start in range(0, histogram.shape[1], 512):
        part = histogram[:, start : start + 512, ::-1]
        present: np.ndarray = part[PRESENT]
        absent: np.ndarray = part[VERIFIED_ABSENT]
        unknown: np.ndarray = part[UNKNOWN]
        annotated = absent.any(axis=1, keepdims=True)
        negative = np.where(annotated, absent, unknown)
        negatives = np.cumsum(negative, axis=1)
        hits = np.cumsum(present, axis=1)
        num_positives = hits[:, -1].astype(np.float64)
        num_positives[num_positives == 0] = np.nan
        above = hits + negatives
        if wide:
            # The outermost bins hold saturated scores, which count as equal.
            hits = hits - within * np.maximum(present - 1, 0) / 2
            above = hits + negatives - within * negative / 2
        precision = hits / np.maximum(above, 1)
        parts.append(np.sum(present * precision, axis=1) / num_positives)
    return np.concatenate(parts)
