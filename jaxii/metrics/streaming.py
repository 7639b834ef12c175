"""Sums over images on the device, from which evaluation figures are computed.

Sums of batches, devices and processes are added leaf by leaf, and memory does not grow
with the number of images. The sums do not depend on a fitted decoder.

Counts are int32, exact up to 2.1e9 images. Sums of fractions are integers too (see
`exact_sum`), so they are identical however the images are divided.
"""

import dataclasses
import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxii.errors import InputError
from jaxii.metrics import exact_sum
from jaxii.metrics.calibration_error import prob_sums
from jaxii.metrics.exact_sum import Terms, Total
from jaxii.metrics.f_beta import f_beta_from_counts
from jaxii.metrics.histogram import (
    NUM_KINDS,
    NUM_RELIABILITY_BINS,
    add_entries,
    bin_edges,
)

# Most labels that a ranking decoder uses. Ranking takes longer with each.
MAX_K = 100


class RankSums(NamedTuple):
    """Sums for the k best labels of a ranking, for k from 1 to at most `MAX_K`."""

    f2: Total  # [k] sums of per-image F-beta
    num_images: Int[Array, ""]


class Sums(NamedTuple):
    """Arrays that are added over batches, devices and processes."""

    num_images: Int[Array, ""]
    num_with_truth: Int[Array, ""]
    f2: Total  # [threshold] sums of per-image F-beta
    histogram: Int[Array, "kind class bin"]
    prob: Total  # [class, reliability] sums of probabilities
    recall: Total  # [k] sums of per-image recall, over images with truth
    top_k: RankSums
    embedding: RankSums


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Accumulators:
    """The sums, with their thresholds and beta as static fields (no leaves)."""

    sums: Sums
    thresholds: tuple[float, ...] = dataclasses.field(metadata={"static": True})
    beta: float = dataclasses.field(default=2.0, metadata={"static": True})


def empty(
    num_classes: int, thresholds: tuple[float, ...], beta: float = 2.0
) -> Accumulators:
    """Returns empty accumulators.

    Args:
        num_classes: number of classes, at least 1.
        thresholds: the grid, strictly ascending, in [0, 1].
        beta: weight of recall over precision in F-beta, above 0.

    Returns:
        Zeros. Memory: about `HISTOGRAM_BYTES`, or 2 KB per class if that is more.

    Raises:
        InputError: If there is no class, or the grid is empty, unsorted or out of
            range.
    """
    if num_classes < 1:
        raise InputError(
            f"metrics need at least 1 class, not {num_classes}; check the label list "
            "of the dataset"
        )
    grid = np.asarray(thresholds, np.float32)
    ascends = bool(np.all(grid[:-1] < grid[1:]))
    if grid.size == 0 or not (grid[0] >= 0 and grid[-1] <= 1 and ascends):
        raise InputError(
            f"thresholds ({grid.size} given) must be strictly ascending within [0, 1]; "
            "use values such as 0.01, 0.02, ..., 0.99"
        )
    num_ks = min(MAX_K, num_classes)
    num_bins = len(bin_edges(tuple(thresholds), num_classes)) + 1
    sums = Sums(
        num_images=jnp.zeros((), jnp.int32),
        num_with_truth=jnp.zeros((), jnp.int32),
        f2=exact_sum.zero(grid.size),
        histogram=jnp.zeros((NUM_KINDS, num_classes, num_bins), jnp.int32),
        prob=exact_sum.zero(num_classes, NUM_RELIABILITY_BINS),
        recall=exact_sum.zero(num_ks),
        top_k=RankSums(exact_sum.zero(num_ks), jnp.zeros((), jnp.int32)),
        embedding=RankSums(exact_sum.zero(num_ks), jnp.zeros((), jnp.int32)),
    )
    grid_values = tuple(float(t) for t in thresholds)
    return Accumulators(sums=sums, thresholds=grid_values, beta=beta)


def update(
    acc: Accumulators,
    probs: Float[Array, "batch class"],
    targets: Shaped[Array, "batch class"],
    known: Shaped[Array, "batch class"] | None,
    mask: Shaped[Array, " batch"],
    embedding: Float[Array, "batch embed"] | None = None,
    label_embeddings: Float[Array, "class embed"] | None = None,
) -> Accumulators:
    """Returns the sums with one batch added; pure, to be compiled with `acc` donated.

    A label is predicted if its probability is at least the threshold; NaN counts as 0.
    Cost: one scatter over batch x class, and a comparison and a sum over batch x class
    for each threshold in turn. Memory: a few arrays of batch x class.

    Args:
        acc: the sums so far.
        probs: probabilities in [0, 1].
        targets: 1 or true where the label is present; at least 0.5 counts as present.
        known: 1 where the label is verified as present or absent; None if no absence is
            verified.
        mask: 1 for a real image, 0 for padding.
        embedding: predicted embeddings; None without the embedding decoder.
        label_embeddings: one vector per class; needed with `embedding`.

    Source: F-beta of scikit-learn's `fbeta_score(average="samples")`.
    """
    probs = jnp.where(jnp.isnan(probs), jnp.float32(0), probs.astype(jnp.float32))
    real = mask.astype(jnp.float32) > 0
    present = (targets.astype(jnp.float32) >= 0.5) & real[:, None]
    num_true = jnp.sum(present, axis=1, dtype=jnp.int32)
    num_images = jnp.sum(real, dtype=jnp.int32)
    score = functools.partial(_f_beta_sums, num_true=num_true, real=real, beta=acc.beta)
    old = acc.sums
    num_ks = old.recall.whole.shape[0]
    ks = jnp.arange(1, num_ks + 1, dtype=jnp.int32)[None, :]
    hits = _hits_of_best(probs, present, num_ks)
    at_least_one = jnp.maximum(num_true, 1).astype(jnp.float32)[:, None]
    recall = exact_sum.terms(hits.astype(jnp.float32) / at_least_one)
    ranking = old.embedding
    if embedding is not None and label_embeddings is not None:
        cosines = cosine(embedding, label_embeddings)
        best = _hits_of_best(cosines, present, num_ks)
        ranking = _plus(ranking, score(best, ks), num_images)
    tp, predicted = _counts_by_threshold(probs, present, jnp.float32(acc.thresholds))
    edges = bin_edges(acc.thresholds, probs.shape[1])
    sums = Sums(
        num_images=old.num_images + num_images,
        num_with_truth=old.num_with_truth + jnp.sum(num_true > 0, dtype=jnp.int32),
        f2=exact_sum.plus(old.f2, score(tp, predicted)),
        histogram=add_entries(old.histogram, probs, present, known, real, edges),
        prob=exact_sum.plus(old.prob, prob_sums(probs, real)),
        recall=exact_sum.plus(old.recall, exact_sum.sum_rows(recall)),
        top_k=_plus(old.top_k, score(hits, ks), num_images),
        embedding=ranking,
    )
    return dataclasses.replace(acc, sums=sums)


def cosine(
    embedding: Float[Array, "batch embed"],
    label_embeddings: Float[Array, "class embed"],
) -> Float[Array, "batch class"]:
    """Returns the cosine of each image and label embedding; 0 for a zero vector."""
    unit = [
        rows * jax.lax.rsqrt(jnp.maximum(jnp.sum(rows**2, 1, keepdims=True), 1e-12))
        for rows in (
            embedding.astype(jnp.float32),
            label_embeddings.astype(jnp.float32),
        )
    ]
    return jnp.matmul(unit[0], unit[1].T, precision="highest")


def _f_beta_sums(
    hits: Int[Array, "batch column"],
    predicted: Int[Array, "row column"],
    *,
    num_true: Int[Array, " batch"],
    real: Bool[Array, " batch"],
    beta: float,
) -> Terms:
    """Returns the sums of F-beta over real images, [column]."""
    scores = f_beta_from_counts(hits, predicted, num_true[:, None], beta)
    return exact_sum.sum_rows(exact_sum.terms(jnp.where(real[:, None], scores, 0)))


def _plus(ranking: RankSums, f2: Terms, num_images: Int[Array, ""]) -> RankSums:
    return RankSums(exact_sum.plus(ranking.f2, f2), ranking.num_images + num_images)


def _hits_of_best(
    scores: Float[Array, "batch class"],
    present: Bool[Array, "batch class"],
    num_ks: int,
) -> Int[Array, "batch k"]:
    """Returns how many of the 1, 2, ... best labels are present."""
    order = jax.lax.top_k(scores, num_ks)[1]
    hit = jnp.take_along_axis(present, order, axis=1).astype(jnp.int32)
    return jnp.cumsum(hit, axis=1)


def _counts_by_threshold(
    probs: Float[Array, "batch class"],
    present: Bool[Array, "batch class"],
    thresholds: Float[Array, " threshold"],
) -> tuple[Int[Array, "batch threshold"], Int[Array, "batch threshold"]]:
    """Returns numbers of true positives and predictions per image and threshold."""
    # Both counts share one integer, which halves the passes over the batch.
    packed = probs.shape[1] < 2**16
    hit = present.astype(jnp.uint32)
    weight = (hit << 16) + jnp.uint32(1) if packed else jnp.ones_like(hit)

    def count(threshold: Array) -> tuple[Array, Array]:
        def total(weights: Array) -> Array:
            kept = jnp.where(probs >= threshold, weights, jnp.uint32(0))
            return jnp.sum(kept, axis=1, dtype=jnp.uint32)

        both = total(weight)
        if packed:
            return both >> 16, both & jnp.uint32(0xFFFF)
        return total(hit), both

    tp, predicted = cast(tuple[Array, Array], jax.lax.map(count, thresholds))
    return tp.T.astype(jnp.int32), predicted.T.astype(jnp.int32)
