"""Evaluates a split in one pass, with sums on the devices.

`split_metrics` joins these sums with the decoders' scores.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxii.decoding.thresholds import (
    DEFAULT_THRESHOLDS,
    best_threshold,
    f2_by_threshold,
)
from jaxii.distributed.mesh import DATA_AXIS, divided, replicated
from jaxii.errors import InputError
from jaxii.evaluation.decoder_scores import DecoderScores
from jaxii.evaluation.predictor import Batches, Predict, predicted
from jaxii.evaluation.result import SplitMetrics, threshold_index
from jaxii.metrics import streaming
from jaxii.metrics.average_precision import average_precision
from jaxii.metrics.calibration_error import calibration_error, reliability
from jaxii.metrics.exact_sum import value
from jaxii.metrics.f_beta import f_beta_from_counts
from jaxii.metrics.histogram import (
    PRESENT,
    bin_edges,
    counts_at_least,
    cross_entropy,
)
from jaxii.metrics.streaming import Accumulators
from jaxii.objective.objective import targets_from_labels

INDEX = "index"
# Fields of a batch that the sums need.
_LABELS = ("label_ids", "label_confidences", "mask")
# Takes this process's probabilities [batch, class], embedding [batch, embed] or None,
# and rows [batch]; row -1 is padding.
OnBatch = Callable[[np.ndarray, np.ndarray | None, np.ndarray], None]


class Evaluator:
    """Sums the evaluation figures of whole splits.

    Args:
      label_embeddings: one vector per class; None without the embedding decoder.
      thresholds: the grid, ascending.
    """

    def __init__(
        self,
        *,
        mesh: Mesh,
        num_classes: int,
        label_embeddings: Float[Array, "class embed"] | None,
        thresholds: tuple[float, ...] = DEFAULT_THRESHOLDS,
    ):
        self._mesh = mesh
        self._label_embeddings = label_embeddings
        self._update = _make_update(mesh, num_classes)
        self._empty, self._total = _make_empty_and_total(mesh, num_classes, thresholds)

    def run(
        self,
        predict: Predict,
        batches: Batches,
        *,
        verified_absent: bool,
        on_batch: OnBatch | None = None,
    ) -> Accumulators:
        """Returns the sums over all batches, the same on every process.

        Args:
          predict: returns probabilities and embedding of images.
          batches: from `eval_batches`; images with mask 0 are not counted.
          verified_absent: whether the split's labels include verified absences; then
            average precision counts annotated entries only.
          on_batch: called on the host with every batch of this process.
        """
        sums = self._empty()
        for batch, probs, embedding in predicted(predict, batches, self._mesh):
            ranked = embedding if self._label_embeddings is not None else None
            sums = self._update(
                verified_absent,
                sums,
                probs,
                ranked,
                {name: batch[name] for name in _LABELS},
                self._label_embeddings if ranked is not None else None,
            )
            if on_batch is not None:
                _hand_over(on_batch, batch, probs, embedding)
        return jax.device_get(self._total(sums))

    def predict(self, predict: Predict, batches: Batches, on_batch: OnBatch) -> None:
        """Calls `on_batch` with all batches, without sums; see `run`."""
        for batch, probs, embedding in predicted(predict, batches, self._mesh):
            _hand_over(on_batch, batch, probs, embedding)

    @staticmethod
    def figures(sums: Accumulators, split: str) -> dict[str, float]:
        """Returns the figures that training logs, named `split/...`."""
        num_images = _num_images(sums)
        best, best_f2 = best_threshold(sums.thresholds, f2_by_threshold(sums))
        histogram = np.asarray(sums.sums.histogram)
        edges = bin_edges(sums.thresholds, histogram.shape[1])
        mean_precision, _ = _mean_average_precision(histogram)
        hits, _ = _counts_at(sums, best)
        curve = reliability(histogram, edges, sums.sums.prob)
        return {
            f"{split}/f2": best_f2,
            f"{split}/threshold": best,
            f"{split}/map": mean_precision,
            f"{split}/bce": cross_entropy(histogram, edges) / num_images,
            f"{split}/coverage": float(np.count_nonzero(hits)),
            f"{split}/recall_at_5": _recall_at_5(sums),
            f"{split}/calibration_error": calibration_error(curve),
        }


def split_metrics(
    sums: Accumulators, scores: DecoderScores, *, in_use: str, threshold: float
) -> SplitMetrics:
    """Returns all figures of a split.

    Args:
      sums: from `Evaluator.run`.
      scores: scores of the decoders, all processes added.
      in_use: the decoder whose predictions are the result.
      threshold: the threshold of the decoder `threshold`.

    Raises:
      InputError: If there is no image, or the threshold is not on the grid.
    """
    num_images = _num_images(sums)
    f2s = f2_by_threshold(sums)
    best, best_f2 = best_threshold(sums.thresholds, f2s)
    histogram = np.asarray(sums.sums.histogram)
    edges = bin_edges(sums.thresholds, histogram.shape[1])
    num_true = histogram[PRESENT].sum(axis=1, dtype=np.int64)
    hits, predicted = _counts_at(sums, threshold)
    counts = hits, predicted, num_true
    totals = [np.array([count.sum()]) for count in counts]
    mean_precision, map_num_classes = _mean_average_precision(histogram)
    curve = reliability(histogram, edges, sums.sums.prob)
    decoders, slices = scores.decoders(), scores.slices()
    points = zip(*(column.tolist() for column in curve), strict=True)
    return SplitMetrics(
        num_images=num_images,
        num_images_without_truth=int(np.count_nonzero(~scores.truth.scored)),
        f2=decoders[in_use].f2,
        interval=scores.interval(),
        bootstrap=scores.bootstrap(),
        coverage=decoders[in_use].coverage,
        labels_per_image_predicted=decoders[in_use].labels_per_image,
        labels_per_image_true=float(num_true.sum() / num_images),
        slices=slices,
        worst_slice=min(slices, key=lambda name: slices[name].f2),
        decoders=decoders,
        threshold=threshold,
        micro_f2=float(f_beta_from_counts(totals[0], totals[1], totals[2])[0]),
        macro_f2=float(f_beta_from_counts(*counts).mean()),
        thresholds=list(sums.thresholds),
        f2_by_threshold=f2s.tolist(),
        best_threshold=best,
        best_f2=best_f2,
        map=mean_precision,
        map_num_classes=map_num_classes,
        recall_at_5=_recall_at_5(sums),
        bce=cross_entropy(histogram, edges) / num_images,
        calibration_error=calibration_error(curve),
        reliability=[list(point) for point in points],
    )


def gather(array: Array) -> np.ndarray:
    """Returns all rows of a sharded array, on every process."""
    if jax.process_count() == 1:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def own_rows(array: Array) -> np.ndarray:
    """Returns the rows of a sharded array on this process's devices."""
    if jax.process_count() == 1:
        return np.asarray(array)
    shards = sorted(array.addressable_shards, key=lambda s: s.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


def _hand_over(
    on_batch: OnBatch, batch: dict[str, Array], probs: Array, embedding: Array | None
) -> None:
    embeddings = None if embedding is None else own_rows(embedding)
    on_batch(own_rows(probs), embeddings, own_rows(batch[INDEX]))


def _num_images(sums: Accumulators) -> int:
    num_images = int(sums.sums.num_images)
    if num_images == 0:
        raise InputError(
            "an evaluation needs at least 1 image, but this split has 0; use a split "
            "with images."
        )
    return num_images


def _counts_at(
    sums: Accumulators, threshold: float
) -> tuple[Int[np.ndarray, " class"], Int[np.ndarray, " class"]]:
    """Returns the number of correct and of all predictions of each label."""
    histogram = np.asarray(sums.sums.histogram)
    edges = bin_edges(sums.thresholds, histogram.shape[1])
    at = threshold_index(sums.thresholds, threshold)
    grid = np.asarray(sums.thresholds, np.float32)[at : at + 1]
    counts = counts_at_least(histogram, edges, grid)[..., 0]
    return counts[PRESENT], counts.sum(axis=0)


def _mean_average_precision(
    histogram: Int[np.ndarray, "kind class bin"],
) -> tuple[float, int]:
    """Returns the mean over classes with positives, and their number."""
    precisions = average_precision(histogram)
    ranked = ~np.isnan(precisions)
    mean = float(precisions[ranked].mean()) if ranked.any() else 0.0
    return mean, int(ranked.sum())


def _recall_at_5(sums: Accumulators) -> float:
    recall = value(sums.sums.recall) / max(int(sums.sums.num_with_truth), 1)
    return float(recall[:5][-1])


@functools.cache
def _make_update(mesh: Mesh, num_classes: int) -> Callable[..., Accumulators]:
    """Compiles the addition of one batch; every device has its own sums."""
    everywhere, share = PartitionSpec(), PartitionSpec(DATA_AXIS)

    def local(
        verified_absent: bool,
        sums: Accumulators,
        probs: Array,
        embedding: Array | None,
        labels: dict[str, Array],
        label_embeddings: Array | None,
    ) -> Accumulators:
        targets, known = targets_from_labels(
            labels["label_ids"],
            labels["label_confidences"],
            num_classes=num_classes,
            unknown="ignored",
        )
        added = streaming.update(
            jax.tree.map(_first, sums),
            probs,
            (targets >= 0.5).astype(jnp.float32),
            known if verified_absent else None,
            labels["mask"],
            embedding,
            label_embeddings,
        )
        return jax.tree.map(_alone, added)

    def update(verified_absent: bool, *arrays: Any) -> Accumulators:
        return jax.shard_map(
            functools.partial(local, verified_absent),
            mesh=mesh,
            in_specs=(share, share, share, share, everywhere),
            out_specs=share,
        )(*arrays)

    return jax.jit(update, static_argnums=0, donate_argnums=1)


def _first(x: Array) -> Array:
    return x[0]


def _alone(x: Array) -> Array:
    return x[None]


@functools.cache
def _make_empty_and_total(
    mesh: Mesh, num_classes: int, thresholds: tuple[float, ...]
) -> tuple[Callable[[], Accumulators], Callable[[Accumulators], Accumulators]]:
    """Compiles zeros for every device, and the sum over devices."""
    num_devices = mesh.devices.size

    def empty() -> Accumulators:
        zeros = streaming.empty(num_classes, thresholds)

        def repeated(x: Array) -> Array:
            return jnp.broadcast_to(x[None], (num_devices, *x.shape))

        return jax.tree.map(repeated, zeros)

    def total(sums: Accumulators) -> Accumulators:
        def added(x: Array) -> Array:
            return jnp.sum(x, axis=0, dtype=x.dtype)

        return jax.tree.map(added, sums)

    return (
        jax.jit(empty, out_shardings=divided(mesh)),
        jax.jit(total, out_shardings=replicated(mesh)),
    )
