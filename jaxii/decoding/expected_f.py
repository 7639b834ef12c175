"""Computes the expected F2 of sets of labels, and the size of the best set.

Labels are assumed independent. The best set of k labels is then the k most probable
(Lewis 1995; Ye et al. 2012), so only k is unknown. With Y the set of labels present,

    E[F2 of the top k] = 5 sum_{l <= k} p_l E[1 / (4 (1 + |Y without l|) + k)],

where 1 / a is the integral of t^(a - 1) over t from 0 to 1. With u = t^4 this gives

    E[F2 of the top k] = 5 integral of t^(3 + k) G(u) S_k(u) dt
    G(u) = prod_i (1 - p_i + p_i u),   S_k(u) = sum_{l <= k} p_l / (1 - p_l + p_l u).

The integrand is a polynomial in t, so a few Gauss-Legendre nodes integrate it to
`TOLERANCE` (see `num_nodes`). Improbable labels that cannot be chosen enter G by sums
of their powers (see `num_powers`). An image costs a sort and a few passes over its
labels; the recursions of Ye et al. take n^2 steps for n labels.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

# Error bound of the expected F2: half for the nodes, half for the powers.
TOLERANCE = 1e-12
CHUNK_IMAGES = 32
# Numbers in a block of factors or terms: 1 MB, which stays in a core's cache.
BLOCK = 2**17
# More probable labels are multiplied one by one: their powers fall too slowly.
SMALL = 1 / 16


def best_sizes(
    probs: Float[np.ndarray, "batch class"],
) -> Int64[np.ndarray, " batch"]:
    """Returns how many of the most probable labels have the largest expected F2.

    Cost: a sort, some ten passes over the labels, and `num_nodes` divisions for each
    label that can be chosen, on all cores. Memory: 10 numbers per label for 32 images
    per core.

    Args:
        probs: probabilities in [0, 1], of at least one class.

    Returns:
        Sizes of at least 1; no other size is better by more than `TOLERANCE`.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sizes = list(pool.map(_best_sizes, _chunks(probs)))
    return np.concatenate([np.zeros(0, np.int64), *sizes])


def expected_f2_of(
    probs: Float[np.ndarray, "batch class"], chosen: Bool[np.ndarray, "batch class"]
) -> Float64[np.ndarray, " batch"]:
    """Returns the expected F2 of a given set of labels for each image.

    Args:
        probs: probabilities in [0, 1].
        chosen: True where the label is in the set.

    Returns:
        Values correct to `TOLERANCE`; 0 for the empty set.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        f2 = list(pool.map(_expected_f2_of, _chunks(probs), _chunks(chosen)))
    return np.concatenate([np.zeros(0), *f2])


def expected_f2(
    probs: Float[np.ndarray, "batch class"], sizes: int
) -> Float64[np.ndarray, "batch size"]:
    """Returns the expected F2 of the 1, 2, ..., `sizes` most probable labels.

    Args:
        probs: probabilities in [0, 1].
        sizes: from 1 to the number of classes.

    Returns:
        Values correct to `TOLERANCE`.
    """
    return _expected_f2(_descending(probs), sizes)


def num_nodes(expected_count: float, sizes: int) -> int:
    """Returns the number of Gauss-Legendre nodes that integrates to `TOLERANCE`.

    N nodes are exact for polynomials of degree below 2 N, and their weights are
    positive and add up to 1, so the error is at most twice the distance to the nearest
    such polynomial. For a function bounded by M on the ellipse with foci 0 and 1 and
    parameter e^s, the distance is at most 2 M e^(-2 N s) / (1 - e^(-s)). The integrand
    has no negative coefficient, so its maximum is at the right end of the ellipse,
    t = (1 + cosh(s)) / 2, where it is below

        5 expected_count t^(3 + sizes) exp(expected_count (t^4 - 1)).

    Args:
        expected_count: sum of the probabilities.
        sizes: the largest k.

    Returns:
        The first of 16, 24, 32, 48, 64, 96, ... for which some s meets the tolerance.

    Source: Trefethen 2013, "Approximation theory and approximation practice",
        theorems 8.2 and 19.3.
    """
    s = np.linspace(0.01, 3.0, 300)
    t = (1 + np.cosh(s)) / 2
    log_most = (3 + sizes) * np.log(t) + expected_count * (t**4 - 1)
    log_error = np.log(20) + log_most - np.log1p(-np.exp(-s))
    log_tolerance = np.log(TOLERANCE / 2 / max(expected_count, 1.0))
    count = 16
    while np.min(log_error - 2 * count * s) > log_tolerance:
        count = count * 3 // 2 if count & (count - 1) == 0 else count * 4 // 3
    return count


def num_powers(largest: float, expected_count: float) -> int:
    """Returns how many powers of probabilities approximate the log of their factors.

    log(1 - p x) = -sum_r (p x)^r / r. With x at most 1, the remainder after R powers is
    at most p^(R + 1) / ((R + 1) (1 - p)). The remainder is a relative error of G, and
    the expected F2 is at most 1.

    Args:
        largest: the largest probability, at most `SMALL`.
        expected_count: sum of the probabilities.
    """
    count = 1
    while expected_count * largest**count > TOLERANCE / 4:
        count += 1
    return count


def largest_sizes(
    ordered: Float64[np.ndarray, "batch class"],
) -> Int64[np.ndarray, " batch"]:
    """Returns an upper bound on the size of the best set of each image.

    Let s be the sum of the k largest probabilities. By Jensen's inequality the expected
    F2 of the top k is at most 5 s / (4 s + k), which falls with k, and at least
    5 s / (4 (1 + expected count - p_k) + k).

    Args:
        ordered: probabilities, in descending order for each image.
    """
    s = np.cumsum(ordered, axis=1)
    k = np.arange(1, int(ordered.shape[1]) + 1)[None, :]
    at_most = 5 * s / (4 * s + k)
    at_least = 5 * s / (4 * (1 + s[:, -1:] - ordered) + k)
    possible = at_most >= at_least.max(axis=1, keepdims=True)
    return np.maximum(possible.sum(axis=1), 1)


def _chunks(rows: np.ndarray) -> list[np.ndarray]:
    starts = range(0, len(rows), CHUNK_IMAGES)
    return [rows[start : start + CHUNK_IMAGES] for start in starts]


def _expected_f2_of(
    probs: Float[np.ndarray, "batch class"], chosen: Bool[np.ndarray, "batch class"]
) -> Float64[np.ndarray, " batch"]:
    probs, sizes = probs.astype(np.float64), chosen.sum(axis=1)
    count = num_nodes(float(probs.sum(axis=1).max()), int(sizes.max()))
    t, weights = _nodes(count)
    kept = chosen.any(axis=0) | (probs.max(axis=0) > SMALL)
    product = 5 * weights * _product_of_small(probs[:, ~kept], t**4)
    product *= t ** (3 + sizes[:, None])
    sums = np.zeros_like(product)
    for p, hit in zip(probs[:, kept].T, chosen[:, kept].T, strict=True):
        factor = _factors(p[None], t**4)[0]
        product *= factor
        sums += (p * hit)[:, None] / factor
    return np.einsum("bn,bn->b", product, sums)


def _best_sizes(
    probs: Float[np.ndarray, "batch class"],
) -> Int64[np.ndarray, " batch"]:
    ordered = _descending(probs)
    most = largest_sizes(ordered)
    best = np.zeros(len(probs), np.int64)
    # Images are grouped by size, so that a rare large size does not slow the others.
    octaves = np.frexp(most)[1]
    for octave in np.unique(octaves):
        rows = np.flatnonzero(octaves == octave)
        f2 = _expected_f2(ordered[rows], int(most[rows].max()))
        best[rows] = np.argmax(f2, axis=1) + 1
    return best


def _descending(
    probs: Float[np.ndarray, "batch class"],
) -> Float64[np.ndarray, "batch class"]:
    return np.sort(probs, axis=1)[:, ::-1].astype(np.float64)


def _expected_f2(
    ordered: Float64[np.ndarray, "batch class"], sizes: int
) -> Float64[np.ndarray, "batch size"]:
    t, weights = _nodes(num_nodes(float(ordered.sum(axis=1).max()), sizes))
    u = t**4
    largest = ordered.max(axis=0)
    kept = max(sizes, int(np.count_nonzero(largest > SMALL)))
    product = 5 * weights * _product_of_small(ordered[:, kept:], u)
    columns = np.ascontiguousarray(ordered[:, :kept].T)
    step = max(1, BLOCK // product.size)
    for start in range(0, kept, step):
        product *= np.multiply.reduce(_factors(columns[start : start + step], u))
    before = np.zeros_like(product)
    parts: list[Float64[np.ndarray, "batch part"]] = []
    for start in range(0, sizes, step):
        chosen = columns[start : min(start + step, sizes)]
        sums = chosen[:, :, None] / _factors(chosen, u)
        for row in sums:
            row += before
            before = row
        k = np.arange(start + 1, start + len(chosen) + 1)[:, None]
        parts.append(np.einsum("kbn,bn,kn->bk", sums, product, t ** (3 + k)))
    return np.concatenate(parts, axis=1)


def _factors(
    columns: Float64[np.ndarray, "class batch"], u: Float64[np.ndarray, " node"]
) -> Float64[np.ndarray, "class batch node"]:
    """Returns 1 - p + p u, which is positive because nodes are positive."""
    return (1 - columns)[:, :, None] + columns[:, :, None] * u


def _product_of_small(
    probs: Float64[np.ndarray, "batch class"], u: Float64[np.ndarray, " node"]
) -> Float64[np.ndarray, "batch node"]:
    """Returns the product of 1 - p + p u over the labels, by sums of powers."""
    log_product = np.zeros((len(probs), len(u)))
    power, x = probs.copy(), np.ones_like(u)
    most = float(probs.sum(axis=1).max())
    for r in range(1, num_powers(float(probs.max(initial=0.0)), most) + 1):
        x = x * (1 - u)
        log_product -= power.sum(axis=1)[:, None] * x / r
        power *= probs
    return np.exp(log_product)


@functools.cache
def _nodes(
    count: int,
) -> tuple[Float64[np.ndarray, " node"], Float64[np.ndarray, " node"]]:
    """Returns Gauss-Legendre nodes and weights on [0, 1].

    Newton's method starts from cosines close to the nodes. NumPy loses four digits and
    SciPy six in the weights near 1, where the integrand of large sets has its mass.
    """
    x = np.cos(np.pi * (np.arange(count) + 0.75) / (count + 0.5))
    slope = np.ones_like(x)
    for _ in range(6):
        before, value = np.ones_like(x), x
        for n in range(2, count + 1):
            before, value = value, ((2 * n - 1) * x * value - (n - 1) * before) / n
        slope = count * (before - x * value) / ((1 - x) * (1 + x))
        x = x - value / slope
    return (1 + x) / 2, 1 / ((1 - x) * (1 + x) * slope**2)
