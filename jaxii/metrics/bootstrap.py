"""How far a mean would move with other images of the same kind.

Standard errors take images as independent; the bootstrap draws groups of them.
"""

import numpy as np
from jaxtyping import Float, Int, Shaped

LEVEL = 0.95
RESAMPLES = 1000
# Draws at a time, so that memory does not grow with the images.
_DRAWS = 4_000_000


def mean_and_error(count: int, total: float, squares: float) -> tuple[float, float]:
    """Returns the mean of numbers in [0, 1] and its standard error.

    Args:
        count: of the numbers, at least 1; the error of a single one is its bound, 0.5.
        total: their sum.
        squares: the sum of their squares.
    """
    mean = total / count
    spread = max(squares / count - mean**2, 0.0)
    return mean, float(np.sqrt(spread / (count - 1))) if count > 1 else 0.5


def interval(
    values: Float[np.ndarray, " image"], groups: Shaped[np.ndarray, " image"]
) -> tuple[float, float] | None:
    """Returns the bootstrap interval of a mean, at `LEVEL`, of `RESAMPLES` draws.

    None of a single group: nothing says how another would be.

    Whole groups are drawn with replacement: images of one thing are no independent
    witnesses. Where each image is its own group, images are drawn. The draws are
    seeded: the same values give the same interval. Cost: `RESAMPLES` x groups.

    Args:
        values: of each image, in [0, 1]; at least one.
        groups: of each image; any values that can be sorted.

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
