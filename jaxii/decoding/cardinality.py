"""How many labels an answer gets, from the image and from how many images have.

Before it: calibrated probabilities, and the numbers of labels of a split's images.
After it: answers of the k most probable labels, with a k for each image. It differs
from `expected_f2` in what it knows of the number of labels present: independent labels
would let it vary more, or less, than it does.
"""

import numpy as np
from jaxtyping import Bool, Float, Float64, Int
from scipy.special import gammaln, xlogy

from jaxii.decoding.decode import top_k_decoder

# Larger answers are not tried, and larger numbers of labels count as the largest.
MOST_CHOSEN, MOST_PRESENT = 16, 47


def count_prior(
    counts: Int[np.ndarray, " row"],
) -> Float64[np.ndarray, " count"]:
    """Returns the share of images with 0, 1, ..., `MOST_PRESENT` labels.

    Args:
        counts: labels of each image of the split that the fit may see.

    Returns:
        Shares that add up to 1; one image is spread over all numbers, so that none is
        impossible.
    """
    most = MOST_PRESENT + 1
    found = np.bincount(np.minimum(counts, MOST_PRESENT), minlength=most)
    return (found + 1 / most) / (found.sum() + 1)


def cardinality_decoder(
    scores: Float[np.ndarray, "batch class"],
    *,
    prior: Float64[np.ndarray, " count"],
) -> Bool[np.ndarray, "batch class"]:
    """Returns the k most probable labels, k of the largest expected F2 under the prior.

    What is present is taken as independent labels, times the prior of their number:
    P(Y) ~ prior(|Y|) prod p^y (1 - p)^(1 - y). Of the number present among the first k
    and among the rest the distributions are exact up to the `MOST_CHOSEN` most probable
    labels; those of the others together are a Poisson variable, which is off by at most
    the sum of their squared probabilities.

    Args:
        scores: calibrated probabilities in [0, 1]; NaN counts as 0.
        prior: of `count_prior`.

    Returns:
        True where the label is chosen; at least one an image.

    Source: Le Cam 1960 for the bound; Dembczynski et al. 2011 for the sum.
    """
    scores = np.nan_to_num(scores, nan=0.0)
    ordered = np.sort(scores, axis=1)[:, ::-1].astype(np.float64)
    first = ordered[:, :MOST_CHOSEN]
    rest = ordered[:, MOST_CHOSEN:].sum(axis=1, keepdims=True)
    present = np.arange(len(prior))
    others = [_poisson(present[None, :], rest)]
    for p in first.T[::-1]:
        others.append(_with(others[-1], p))
    hits = np.zeros((len(scores), len(prior)))
    hits[:, 0] = 1.0
    worth = np.zeros_like(first)
    for k, p in enumerate(first.T, start=1):
        hits = _with(hits, p)
        i, total = present[1 : k + 1, None], present[1 : k + 1, None] + present
        value = 5 * i / (4 * total + k) * prior[np.minimum(total, present[-1])]
        worth[:, k - 1] = np.sum(
            hits[:, 1 : k + 1] * (others[-1 - k] @ value.T), axis=1
        )
    return top_k_decoder(scores, k=np.argmax(worth, axis=1) + 1)


def _poisson(
    count: Int[np.ndarray, "one count"], mean: Float64[np.ndarray, "batch one"]
) -> Float64[np.ndarray, "batch count"]:
    # As scipy.stats has it, whose import takes a second.
    return np.exp(xlogy(count, mean) - gammaln(count + 1) - mean)


def _with(
    counts: Float64[np.ndarray, "batch count"], p: Float64[np.ndarray, " batch"]
) -> Float64[np.ndarray, "batch count"]:
    """Returns the distributions of a number of labels with one label more."""
    more = counts * (1 - p)[:, None]
    more[:, 1:] += counts[:, :-1] * p[:, None]
    return more
