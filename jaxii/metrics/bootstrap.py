"""Standard errors and bootstrap intervals of means over images.

Standard errors assume independent images; the bootstrap draws groups of images.
"""

import numpy as np
from jaxtyping import Float, Int, Shaped

LEVEL = 0.95
RESAMPLES = 1000
# Groups drawn at a time, so that memory does not grow with the number of images.
_DRAWS = 4_000_000


def mean_and_error(count: int, total: float, squares: float) -> tuple[float, float]:
    """Returns the mean of numbers in [0, 1] and its standard error.

    Args:
        count: number of values, at least 1; for one value the error is its bound, 0.5.
        total: sum of the values.
        squares: sum of their squares.

    Returns:
        (mean, standard error).
    """
    mean = total / count
    spread = max(squares / count - mean**2, 0.0)
    return mean, float(np.sqrt(spread / (count - 1))) if count > 1 else 0.5


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
    names, ids = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        return None
    sums = np.bincount(ids, values, minlength=len(names))
    counts = np.bincount(ids, minlength=len(names))
    rng = np.random.default_rng(0)
    rows = max(1, _DRAWS // len(names))
    means: list[Float[np.ndarray, " resample"]] = []
    for start in range(0, RESAMPLES, rows):
        size = (min(rows, RESAMPLES - start), len(names))
        drawn: Int[np.ndarray, "resample group"] = rng.integers(0, len(names), size)
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)
