"""One pass over a split: every image once, masked where padded, summed on the device.

Comes after a checkpoint is restored (or inside the loop, at its cadence) and before
`thresholds` chooses and `summary` reports.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from jaxii.decoding.thresholds import DEFAULT_THRESHOLDS
from jaxii.distributed.mesh import DATA_AXIS, divided, replicated, to_devices
from jaxii.evaluation.models import Batches, Predict
from jaxii.evaluation.summary import summarise
from jaxii.metrics import streaming
from jaxii.metrics.streaming import Accumulators
from jaxii.objective.objective import targets_from_labels

INDEX = "index"
# Probabilities [batch, class], embedding [batch, embed] or None, row of each image.
OnBatch = Callable[[np.ndarray, np.ndarray | None, np.ndarray], None]


class Evaluator:
    """Sums the evaluation figures of whole splits.

    Args:
      mesh: the devices.
      num_classes: number of classes.
      slices: names of the slices that figures are cut by.
      label_embeddings: [class, embed]; None without the embedding decoder.
      thresholds: the grid.
    """

    def __init__(
        self,
        *,
        mesh: Mesh,
        num_classes: int,
        slices: Sequence[str],
        label_embeddings: Float[Array, "class embed"] | None,
        thresholds: tuple[float, ...] = DEFAULT_THRESHOLDS,
    ):
        self.slices = tuple(slices)
        self._mesh = mesh
        self._num_classes = num_classes
        self._label_embeddings = label_embeddings
        self._thresholds = thresholds
        self._update = _make_update(mesh, num_classes)
        self._empty, self._total = _make_empty_and_total(
            mesh, num_classes, len(self.slices), thresholds
        )

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
          predict: images to probabilities and embedding.
          batches: as `eval_batches` yields them; what has mask 0 is in no sum.
          verified_absent: whether the split's labels say what is *not* in an image;
            then average precision counts annotated entries only.
          on_batch: gets probabilities, embeddings and rows of every batch on the host;
            row -1 is padding.
        """
        sharding = divided(self._mesh)
        sums = self._empty()
        for host_batch in batches:
            batch = to_devices(host_batch, sharding)
            probs, embedding = predict(batch["images"])
            ranked = embedding if self._label_embeddings is not None else None
            labels = {k: v for k, v in batch.items() if k not in ("images", INDEX)}
            sums = self._update(
                sums,
                probs,
                ranked,
                labels,
                self._label_embeddings if ranked is not None else None,
                verified_absent,
            )
            if on_batch is not None:
                embeddings = None if embedding is None else gather(embedding)
                on_batch(gather(probs), embeddings, gather(batch[INDEX]))
        return jax.device_get(self._total(sums))

    def figures(self, sums: Accumulators, split: str) -> dict[str, float]:
        """Returns the few figures that are followed during a run, `split/...`."""
        summary = summarise(sums, self.slices)
        return {
            f"{split}/f2": summary["best_f2"],
            f"{split}/threshold": summary["best_threshold"],
            f"{split}/map": summary["map"],
            f"{split}/bce": summary["bce"],
            f"{split}/coverage": float(summary["coverage"]),
            f"{split}/recall_at_5": summary["recall_at_5"],
            f"{split}/calibration_error": summary["calibration_error"],
        }


def gather(array: Array) -> np.ndarray:
    """Returns the rows of a divided array from all processes, on every host."""
    if jax.process_count() == 1:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _make_update(mesh: Mesh, num_classes: int) -> Callable[..., Accumulators]:
    """Compiles the addition of one batch; every device keeps sums of its own."""
    everywhere, share = PartitionSpec(), PartitionSpec(DATA_AXIS)

    def update(sums, probs, embedding, labels, label_embeddings, verified_absent):
        def local(sums, probs, embedding, labels, label_embeddings):
            targets, known = targets_from_labels(
                labels["label_ids"],
                labels["label_confidences"],
                num_classes=num_classes,
                unknown="ignored",
            )
            added = streaming.update(
                jax.tree.map(lambda x: x[0], sums),
                probs,
                (targets >= 0.5).astype(jnp.float32),
                known if verified_absent else None,
                labels["mask"],
                labels["slice_ids"],
                embedding,
                label_embeddings,
            )
            return jax.tree.map(lambda x: x[None], added)

        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(share, share, share, share, everywhere),
            out_specs=share,
        )(sums, probs, embedding, labels, label_embeddings)

    return jax.jit(update, static_argnums=5, donate_argnums=0)


def _make_empty_and_total(mesh, num_classes, num_slices, thresholds):
    """Compiles the start (one set of zeros a device) and the end (their sum)."""
    num_devices = mesh.devices.size

    def empty():
        zeros = streaming.empty(num_classes, num_slices, thresholds)
        return jax.tree.map(
            lambda x: jnp.broadcast_to(x[None], (num_devices, *x.shape)), zeros
        )

    def total(sums):
        return jax.tree.map(lambda x: jnp.sum(x, axis=0, dtype=x.dtype), sums)

    return (
        jax.jit(empty, out_shardings=divided(mesh)),
        jax.jit(total, out_shardings=replicated(mesh)),
    )
