"""How far a mean F2 would move with other images of the same kind: the bootstrap.

Before it: F2 of each image. After it: `metrics.json` and the report show the interval.
"""

import numpy as np
from jaxtyping import Float, Int, Shaped

LEVEL = 0.95
RESAMPLES = 1000
# Draws at a time, so that memory does not grow with the images.
_DRAWS = 4_000_000


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
    means = []
    for start in range(0, RESAMPLES, rows):
        size = (min(rows, RESAMPLES - start), len(names))
        drawn: Int[np.ndarray, "resample group"] = rng.integers(0, len(names), size)
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)
