"""Chooses thresholds and k on the sums of one split, to be applied to others."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from jaxii.errors import InputError
from jaxii.metrics.exact_sum import value
from jaxii.metrics.histogram import PRESENT, bin_edges, counts_at_least
from jaxii.metrics.streaming import Accumulators

DEFAULT_THRESHOLDS: tuple[float, ...] = tuple(step / 100 for step in range(1, 100))
# F2 values closer than this form one plateau. The value is below the effect of one
# label of one image and above the rounding of the sums.
SAME_F2 = 1e-7
# With this many images, a label's own threshold or calibration weighs as much as the
# common one. In cross-validation over groups of the emoji set, 20 to 100 are equally
# good; without shrinkage, thresholds of 178 labels lose 0.04 of F2 on new images.
PRIOR_POSITIVES = 50.0


@dataclasses.dataclass(frozen=True)
class DecoderChoice:
    """Parameters of decoders; `embedding_k` is None without an embedding head.

    Both k are at most `streaming.MAX_K`.
    """

    threshold: float
    top_k: int
    embedding_k: int | None = None


def f2_by_threshold(acc: Accumulators) -> Float[np.ndarray, " threshold"]:
    """Returns the mean per-image F-beta at each threshold; 0 without images."""
    return value(acc.sums.f2) / max(float(acc.sums.num_images), 1.0)


def best_threshold(
    thresholds: Sequence[float], f2s: Float[np.ndarray, " threshold"]
) -> tuple[float, float]:
    """Returns the best threshold and its F2: the middle of the first best plateau.

    Args:
        thresholds: the grid, ascending, in [0, 1].
        f2s: F2 at each of them, in [0, 1].

    Returns:
        Threshold and F2. The middle of a plateau is furthest from where F2 falls.
    """
    index = _middle_of_best(f2s)
    return float(thresholds[index]), float(f2s[index])


def choose(acc: Accumulators) -> DecoderChoice:
    """Returns the decoder parameters with the best mean F2 on the split.

    Args:
        acc: the sums of the split, over all devices and processes.

    Returns:
        The choice; ties in F2 go to the smallest k.

    Raises:
        InputError: If the split has no image.
    """
    sums = acc.sums
    if not int(sums.num_images):
        raise InputError(
            "thresholds cannot be chosen on a split with 0 images; increase the "
            "validation fraction, or use a split with at least 1 image"
        )
    threshold, _ = best_threshold(acc.thresholds, f2_by_threshold(acc))
    ranked = int(sums.embedding.num_images) > 0
    return DecoderChoice(
        threshold=threshold,
        top_k=_best_k(value(sums.top_k.f2)),
        embedding_k=_best_k(value(sums.embedding.f2)) if ranked else None,
    )


def class_thresholds(
    acc: Accumulators, threshold: float
) -> Float[np.ndarray, " class"]:
    """Returns a threshold for each class, shrunk toward the common threshold.

    Let F be the mean F2 at the common threshold. A class's own threshold maximises
    (1 + beta^2) TP - F x (images predicted), the contribution of the class to F2 over
    all labels; maximising the class's own F2 would predict rare labels far too often.
    The result is the weighted mean of the class's own threshold, with its number of
    positives as weight, and the common one, with weight `PRIOR_POSITIVES`.

    Args:
        acc: the sums of the split, over all devices and processes.
        threshold: the best common threshold, on the grid.

    Source: Dinkelbach 1967 (maximum of a ratio); the weights are a Gaussian prior's.
    """
    histogram = np.asarray(acc.sums.histogram)
    grid = np.asarray(acc.thresholds, np.float32)
    edges = bin_edges(acc.thresholds, histogram.shape[1])
    counts = counts_at_least(histogram, edges, grid)
    f2 = np.interp(threshold, grid, f2_by_threshold(acc))
    gains = (1 + acc.beta**2) * counts[PRESENT] - f2 * counts.sum(axis=0)
    own = np.array([grid[_middle_of_best(row)] for row in gains])
    positives = histogram[PRESENT].sum(axis=1, dtype=np.float64)
    weight = positives / (positives + PRIOR_POSITIVES)
    return weight * own + (1 - weight) * threshold


def _best_k(f2_sums: Float[np.ndarray, " k"]) -> int:
    return int(np.argmax(f2_sums)) + 1


def _middle_of_best(values: Float[np.ndarray, " threshold"]) -> int:
    best = values >= values.max() - SAME_F2
    first = int(np.argmax(best))
    length = int(np.argmin(np.append(best[first:], False)))
    return first + (length - 1) // 2
