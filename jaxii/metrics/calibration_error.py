"""Reliability curve and expected calibration error of probabilities."""

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxii.metrics import exact_sum
from jaxii.metrics.histogram import PRESENT, counts_at_least, reliability_edges


class Reliability(NamedTuple):
    """Mean probability and frequency of entries in each nonempty reliability bin."""

    probs: Float[np.ndarray, " bin"]  # means, in [0, 1]
    frequencies: Float[np.ndarray, " bin"]  # share of entries that are present
    counts: Int[np.ndarray, " bin"]


def prob_sums(
    probs: Float[Array, "batch class"], real: Bool[Array, " batch"]
) -> exact_sum.Terms:
    """Returns the sums of probabilities by reliability bin, [class, reliability]."""
    edges = jnp.concatenate(
        [jnp.zeros(1, jnp.float32), jnp.asarray(reliability_edges())]
    )
    ends = jnp.concatenate([edges[1:], jnp.full(1, jnp.inf, jnp.float32)])
    terms = exact_sum.terms(probs)

    def within(bounds: tuple[Array, Array]) -> exact_sum.Terms:
        inside = (probs >= bounds[0]) & (probs < bounds[1]) & real[:, None]
        return exact_sum.sum_rows(
            exact_sum.Terms(*(jnp.where(inside, limb, 0) for limb in terms))
        )

    sums = cast(exact_sum.Terms, jax.lax.map(within, (edges, ends)))
    return exact_sum.Terms(*(limb.T for limb in sums))


def reliability(
    histogram: Int[np.ndarray, "kind class bin"],
    edges: Float[np.ndarray, " edge"],
    prob: exact_sum.Total,
) -> Reliability:
    """Returns the reliability curve of all (image, class) entries.

    Args:
        histogram: counts by bin; unknown entries count as absent.
        edges: from `bin_edges`.
        prob: sums from `prob_sums`, [class, reliability].
    """
    by_kind = histogram.sum(axis=1, dtype=np.int64)
    at_least = counts_at_least(by_kind, edges, reliability_edges())
    all_entries = by_kind.sum(axis=-1, keepdims=True)
    none = np.zeros_like(all_entries)
    in_bin = -np.diff(np.concatenate([all_entries, at_least, none], axis=-1), axis=-1)
    counts, hits = in_bin.sum(axis=0), in_bin[PRESENT]
    used = counts > 0
    return Reliability(
        probs=exact_sum.value(prob).sum(axis=0)[used] / counts[used],
        frequencies=hits[used] / counts[used],
        counts=counts[used],
    )


def calibration_error(curve: Reliability) -> float:
    """Returns the mean of |frequency - mean probability| over entries.

    Source: Guo et al. 2017, section 2 (expected calibration error).
    """
    gaps = np.abs(curve.frequencies - curve.probs) * curve.counts
    return float(gaps.sum() / curve.counts.sum())
