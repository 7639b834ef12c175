"""Standard errors and bootstrap intervals of means over images.

Both treat groups of images, not images, as independent.
"""

import math

import numpy as np
from jaxtyping import Float, Int, Shaped

LEVEL = 0.95
RESAMPLES = 1000
# Groups drawn at a time, so that memory does not grow with the number of images.
_DRAWS = 4_000_000


def mean_and_error(
    values: Float[np.ndarray, " image"], groups: Shaped[np.ndarray, " image"]
) -> tuple[float, float]:
    """Returns the mean of numbers in [0, 1] and its standard error.

    The images of a group are not independent, but groups are. If each image is its own
    group, this is the standard error of independent images. Sums are rounded once, so
    that they do not depend on the order of the images.

    Args:
        values: one per image, in [0, 1]; at least one.
        groups: group of each image; any values that can be sorted.

    Returns:
        (mean, standard error); the error of a single group is its bound, 0.5.

    Source: Cochran 1977, "Sampling Techniques", chapter 9A (ratio to size).
    """
    mean = math.fsum(values) / len(values)
    sums, counts = _by_group(values, groups)
    num_groups = len(sums)
    if num_groups < 2:
        return mean, 0.5
    squares = math.fsum((sums - counts * mean) ** 2)
    return mean, math.sqrt(squares * num_groups / (num_groups - 1)) / len(values)


def interval(
    values: Float[np.ndarray, " image"], groups: Shaped[np.ndarray, " image"]
) -> tuple[float, float] | None:
    """Returns the bootstrap interval of a mean at `LEVEL`.

    Whole groups are drawn with replacement, `RESAMPLES` times, because the images of a
    group are not independent. If each image is its own group, images are drawn. The
    draws are seeded: equal values give equal intervals. Cost: `RESAMPLES` x groups.

    Args:
        values: one per image, in [0, 1]; at least one.
        groups: group of each image; any values that can be sorted.

    Returns:
        (low, high); None for a single group.

    Source: Efron and Tibshirani 1993, chapter 13 (percentile interval); for groups,
        Davison and Hinkley 1997, section 3.8.
    """
    sums, counts = _by_group(values, groups)
    num_groups = len(sums)
    if num_groups < 2:
        return None
    rng = np.random.default_rng(0)
    rows = max(1, _DRAWS // num_groups)
    means: list[Float[np.ndarray, " resample"]] = []
    for start in range(0, RESAMPLES, rows):
        size = (min(rows, RESAMPLES - start), num_groups)
        drawn: Int[np.ndarray, "resample group"] = rng.integers(0, num_groups, size)
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def _by_group(
    values: Float[np.ndarray, " image"], groups: Shaped[np.ndarray, " image"]
) -> tuple[Float[np.ndarray, " group"], Int[np.ndarray, " group"]]:
    """Returns the sum and the number of the values of each group."""
    # Ascending, so that a sum does not depend on the order of the images.
    order = np.argsort(values)
    _, ids = np.unique(groups[order], return_inverse=True)
    return np.bincount(ids, values[order]), np.bincount(ids)
