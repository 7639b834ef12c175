"""Sums from which every evaluation figure is computed, kept on the device.

Before it: the network's probabilities of a batch. After it: `thresholds` chooses
decoders from the sums of one split, `summary` turns them into the numbers people read.
Only sums are kept: those of several batches, devices or processes add up leaf by leaf,
and nothing grows with the number of images.

Counts are int32: exact up to 2.1e9 images. Sums of fractions are integers too
(`totals`): however the images are divided, the sums are the same to the bit.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxii.errors import InputError
from jaxii.metrics import exact_sum
from jaxii.metrics.exact_sum import Terms, Total
from jaxii.metrics.histogram import (
    NUM_KINDS,
    NUM_RELIABILITY_BINS,
    add_entries,
    bin_edges,
    prob_sums,
)

BETA_SQUARED = 4.0
MAX_K = 10


class RankSums(NamedTuple):
    """What the best k labels of a ranking give, for k = 1..10."""

    f2: Total  # [group, k] sums of per-image F2
    num_images: Int[Array, ""]


class Sums(NamedTuple):
    """The arrays: every one of them adds over batches, devices and processes."""

    num_images: Int[Array, " group"]
    num_with_truth: Int[Array, ""]
    f2: Total  # [group, threshold] sums of per-image F2
    f2_squared: Total  # [group, threshold]
    histogram: Int[Array, "kind class bin"]
    prob: Total  # [class, reliability] sums of probabilities
    recall: Total  # [k] sums of per-image recall, over images with truth
    top_k: RankSums
    embedding: RankSums


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Accumulators:
    """The sums and the grid of thresholds (static: not a leaf) they were made for."""

    sums: Sums
    thresholds: tuple[float, ...] = dataclasses.field(metadata={"static": True})


def empty(
    num_classes: int, num_slices: int, thresholds: tuple[float, ...]
) -> Accumulators:
    """Returns accumulators of nothing.

    Args:
        num_classes: number of classes, at least 1.
        num_slices: number of slices (groups reported apart), at least 1.
        thresholds: the grid, strictly ascending, in [0, 1].

    Returns:
        Zeros. Memory: about `HISTOGRAM_BYTES`, or 2 KB a class where that is more.

    Raises:
        InputError: a number below 1, or a grid that is empty, unsorted or out of range.
    """
    if num_classes < 1 or num_slices < 1:
        raise InputError(
            f"metrics of {num_classes} classes and {num_slices} slices; "
            "both must be at least 1; check the dataset's label and slice lists"
        )
    grid = np.asarray(thresholds, np.float32)
    if grid.size == 0 or not (grid[0] >= 0 and grid[-1] <= 1 and _ascends(grid)):
        raise InputError(
            f"{grid.size} thresholds that are not strictly ascending within [0, 1]; "
            "give numbers such as 0.01, 0.02, ..., 0.99 in that order"
        )
    num_ks = min(MAX_K, num_classes)
    num_bins = len(bin_edges(tuple(thresholds), num_classes)) + 1
    by_threshold = (num_slices, grid.size)
    sums = Sums(
        num_images=jnp.zeros(num_slices, jnp.int32),
        num_with_truth=jnp.zeros((), jnp.int32),
        f2=exact_sum.zero(*by_threshold),
        f2_squared=exact_sum.zero(*by_threshold),
        histogram=jnp.zeros((NUM_KINDS, num_classes, num_bins), jnp.int32),
        prob=exact_sum.zero(num_classes, NUM_RELIABILITY_BINS),
        recall=exact_sum.zero(num_ks),
        top_k=_no_ranking(num_slices, num_ks),
        embedding=_no_ranking(num_slices, num_ks),
    )
    return Accumulators(sums=sums, thresholds=tuple(float(t) for t in thresholds))


def update(
    acc: Accumulators,
    probs: Float[Array, "batch class"],
    targets: Shaped[Array, "batch class"],
    known: Shaped[Array, "batch class"] | None,
    mask: Shaped[Array, " batch"],
    slice_ids: Int[Array, " batch"],
    embedding: Float[Array, "batch embed"] | None = None,
    label_embeddings: Float[Array, "class embed"] | None = None,
    *,
    zero_division: float | Float[Array, ""] = 0.0,
) -> Accumulators:
    """Adds one batch; pure, to be compiled with `acc` donated.

    A label is predicted when its probability is at least the threshold; NaN counts as
    0. Cost: one scatter over batch x class, and a compare and a sum of it for each
    threshold, one threshold at a time. Memory: a few arrays of batch x class.

    Args:
        acc: the sums so far.
        probs: probabilities in [0, 1].
        targets: 1 or true where the label is present; at least 0.5 counts as present.
        known: 1 where the label is verified either way; None: nowhere verified absent.
        mask: 1 for a real image, 0 for padding.
        slice_ids: in [0, num_slices).
        embedding: predicted embeddings; None: no embedding decoder.
        label_embeddings: one vector a class; needed with `embedding`.
        zero_division: F2 of an image without truth for which nothing is predicted.

    Returns:
        The new sums.

    Source: F-beta of scikit-learn's `fbeta_score(average="samples")`, beta = 2.
    """
    probs = jnp.where(jnp.isnan(probs), jnp.float32(0), probs.astype(jnp.float32))
    image = _images(targets, mask, slice_ids, acc, zero_division)
    present, num_true, real, in_slice, _ = image
    tp, predicted = _counts_by_threshold(probs, present, jnp.float32(acc.thresholds))
    f2 = _f2(tp, predicted, num_true, zero_division)
    order = jax.lax.top_k(probs, acc.sums.recall.whole.shape[0])[1]
    top_k, hits = _add_ranking(acc.sums.top_k, order, image)
    recall = hits / jnp.maximum(num_true, 1).astype(jnp.float32)[:, None]
    old = acc.sums
    ranking = old.embedding
    if embedding is not None and label_embeddings is not None:
        order = jax.lax.top_k(cosine(embedding, label_embeddings), order.shape[1])[1]
        ranking, _ = _add_ranking(ranking, order, image)
    edges = bin_edges(acc.thresholds, probs.shape[1])
    sums = Sums(
        num_images=old.num_images + jnp.sum(in_slice, axis=0, dtype=jnp.int32),
        num_with_truth=old.num_with_truth + jnp.sum(num_true > 0, dtype=jnp.int32),
        f2=exact_sum.plus(old.f2, _by_slice(in_slice, f2)),
        f2_squared=exact_sum.plus(old.f2_squared, _by_slice(in_slice, f2 * f2)),
        histogram=add_entries(old.histogram, probs, present, known, real, edges),
        prob=exact_sum.plus(old.prob, prob_sums(probs, real)),
        recall=exact_sum.plus(old.recall, exact_sum.sum_rows(exact_sum.terms(recall))),
        top_k=top_k,
        embedding=ranking,
    )
    return dataclasses.replace(acc, sums=sums)


def cosine(
    embedding: Float[Array, "batch embed"],
    label_embeddings: Float[Array, "class embed"],
) -> Float[Array, "batch class"]:
    """Returns the cosine of each embedding with each label's; 0 for a zero vector."""
    unit = [
        rows * jax.lax.rsqrt(jnp.maximum(jnp.sum(rows**2, 1, keepdims=True), 1e-12))
        for rows in (
            embedding.astype(jnp.float32),
            label_embeddings.astype(jnp.float32),
        )
    ]
    return jnp.matmul(unit[0], unit[1].T, precision="highest")


class _Images(NamedTuple):
    """What is known of a batch of images, whatever the decoder."""

    present: Bool[Array, "batch class"]
    num_true: Int[Array, " batch"]
    real: Bool[Array, " batch"]
    in_slice: Int[Array, "batch group"]
    zero_division: float | Float[Array, ""]


def _images(
    targets: Shaped[Array, "batch class"],
    mask: Shaped[Array, " batch"],
    slice_ids: Int[Array, " batch"],
    acc: Accumulators,
    zero_division: float | Float[Array, ""],
) -> _Images:
    real = mask.astype(jnp.float32) > 0
    present = (targets.astype(jnp.float32) >= 0.5) & real[:, None]
    num_slices = acc.sums.num_images.shape[0]
    in_slice = jax.nn.one_hot(slice_ids, num_slices, dtype=jnp.int32)
    return _Images(
        present=present,
        num_true=jnp.sum(present, axis=1, dtype=jnp.int32),
        real=real,
        in_slice=in_slice * real.astype(jnp.int32)[:, None],
        zero_division=zero_division,
    )


def _ascends(grid: Float[np.ndarray, " threshold"]) -> bool:
    return bool(np.all(grid[:-1] < grid[1:]))


def _no_ranking(num_slices: int, num_ks: int) -> RankSums:
    return RankSums(
        f2=exact_sum.zero(num_slices, num_ks), num_images=jnp.zeros((), jnp.int32)
    )


def _by_slice(
    in_slice: Int[Array, "batch group"], values: Float[Array, "batch column"]
) -> Terms:
    """Returns the sums of the values by slice, [group, column]."""
    return jax.tree.map(lambda x: jnp.matmul(in_slice.T, x), exact_sum.terms(values))


def _f2(
    tp: Int[Array, "batch column"],
    predicted: Int[Array, "batch column"],
    num_true: Int[Array, " batch"],
    zero_division: float | Float[Array, ""],
) -> Float[Array, "batch column"]:
    weight = jnp.float32(BETA_SQUARED)
    truth_and_guess = weight * num_true.astype(jnp.float32)[:, None]
    truth_and_guess = truth_and_guess + predicted.astype(jnp.float32)
    f2 = (1 + weight) * tp.astype(jnp.float32) / jnp.maximum(truth_and_guess, 1)
    return jnp.where(truth_and_guess > 0, f2, jnp.asarray(zero_division, jnp.float32))


def _counts_by_threshold(
    probs: Float[Array, "batch class"],
    present: Bool[Array, "batch class"],
    thresholds: Float[Array, " threshold"],
) -> tuple[Int[Array, "batch threshold"], Int[Array, "batch threshold"]]:
    """Returns true positives and predictions of each image at each threshold."""
    # Both counts in the halves of one integer: half the passes over the batch.
    packed = probs.shape[1] < 2**16
    hit = present.astype(jnp.uint32)
    weight = (hit << 16) + jnp.uint32(1) if packed else jnp.ones_like(hit)

    def count(threshold):
        def total(weights):
            kept = jnp.where(probs >= threshold, weights, jnp.uint32(0))
            return jnp.sum(kept, axis=1, dtype=jnp.uint32)

        both = total(weight)
        if packed:
            return both >> 16, both & jnp.uint32(0xFFFF)
        return total(hit), both

    tp, predicted = jax.lax.map(count, thresholds)
    return tp.T.astype(jnp.int32), predicted.T.astype(jnp.int32)


def _add_ranking(
    ranking: RankSums, order: Int[Array, "batch k"], image: _Images
) -> tuple[RankSums, Float[Array, "batch k"]]:
    """Returns the sums with the batch added, and the hits among each image's best k."""
    hit = jnp.take_along_axis(image.present, order, axis=1).astype(jnp.int32)
    hits = jnp.cumsum(hit, axis=1)
    num_ks = order.shape[1]
    taken = jnp.broadcast_to(jnp.arange(1, num_ks + 1, dtype=jnp.int32), hits.shape)
    f2 = _f2(hits, taken, image.num_true, image.zero_division)
    added = RankSums(
        f2=exact_sum.plus(ranking.f2, _by_slice(image.in_slice, f2)),
        num_images=ranking.num_images + jnp.sum(image.real, dtype=jnp.int32),
    )
    return added, hits.astype(jnp.float32)
