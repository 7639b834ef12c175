"""Computes probabilities of images by one network, or the mean of several."""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from jaxii.decoding import label_shift
from jaxii.decoding.calibration import Calibration
from jaxii.decoding.thresholds import DEFAULT_THRESHOLDS
from jaxii.distributed.mesh import DATA_AXIS, divided, replicated, to_devices
from jaxii.metrics.histogram import NUM_KINDS, add_entries, bin_edges
from jaxii.models.cpu import CompilerOptions
from jaxii.train.batch_norm import reestimate
from jaxii.train.state import Tree

Batches = Iterable[Mapping[str, np.ndarray]]
# Batches that are dispatched before the oldest is yielded, so that the devices do not
# wait for the host; the number bounds device memory.
BATCHES_AHEAD = 1
# Maps images [batch, height, width, 3] on the devices to float32 probabilities
# [batch, class] and the embedding [batch, embed] or None.
Predict = Callable[[Array], tuple[Float[Array, "batch class"], Any]]


@dataclass(frozen=True, kw_only=True)
class Model:
    """A network with parameters and BatchNorm statistics.

    Attributes:
      apply: forward function of the network; compiled functions are cached by it.
      compiler_options: for `jax.jit`; see `models.cpu.compiler_options`.
    """

    apply: Callable[..., tuple[Any, Tree]]
    params: Tree
    batch_stats: Tree
    compiler_options: CompilerOptions = ()

    def adapted(self, batches: Batches, mesh: Mesh) -> "Model":
        """Returns the model with BatchNorm statistics of these images (AdaBN)."""
        stats = reestimate(
            self.apply,
            self.params,
            self.batch_stats,
            batches,
            mesh,
            compiler_options=self.compiler_options,
        )
        return replace(self, batch_stats=stats)

    def num_features(self, size_pixels: int) -> int:
        """Returns the number of pooled trunk features; computes nothing."""

        images = jax.ShapeDtypeStruct((1, size_pixels, size_pixels, 3), np.uint8)
        features = functools.partial(_pooled, self.apply)
        return jax.eval_shape(features, self.params, self.batch_stats, images).shape[1]


def make_predict(models: Sequence[Model], mesh: Mesh) -> Predict:
    """Returns a `Predict` of the models' mean; embedding is None for several models.

    Args:
      models: at least one, with the same labels and image size.
      mesh: the devices; images are divided over them.
    """
    forwards = [
        functools.partial(
            _forward(model.apply, mesh, model.compiler_options),
            model.params,
            model.batch_stats,
        )
        for model in models
    ]
    if len(forwards) == 1:
        return forwards[0]

    def predict(images: Array) -> tuple[Array, Any]:
        return _mean([forward(images)[0] for forward in forwards]), None

    return predict


def predicted(
    predict: Predict, batches: Batches, mesh: Mesh
) -> Iterator[tuple[dict[str, Array], Array, Any]]:
    """Yields each batch on the devices with its probabilities and embedding.

    Args:
      batches: this process's share of each batch; `images` and any other fields.
    """
    sharding = divided(mesh)
    ahead: collections.deque[tuple[dict[str, Array], Array, Any]] = collections.deque()
    for host_batch in batches:
        batch = to_devices(host_batch, sharding)
        ahead.append((batch, *predict(batch["images"])))
        if len(ahead) > BATCHES_AHEAD:
            jax.block_until_ready(ahead[0])
            yield ahead.popleft()
    yield from ahead


def shifted(predict: Predict, shift: Float[np.ndarray, " class"]) -> Predict:
    """Returns the function with its probabilities corrected by `label_shift`."""

    def corrected(images: Array) -> tuple[Array, Any]:
        probs, embedding = predict(images)
        return _corrected(probs, shift), embedding

    return corrected


def shift_of(
    predict: Predict,
    batches: Batches,
    mesh: Mesh,
    *,
    calibration: Calibration,
    home: Float[np.ndarray, " class"],
) -> Float[np.ndarray, " class"]:
    """Estimates the shift of each label's logit from a target's unlabelled images.

    Memory: a histogram of class x bin.

    Args:
      batches: `images` and `mask` of the target.
      calibration: calibration of the probabilities.
      home: frequency of each label where the calibration was fitted.
    """
    thresholds, num_classes = DEFAULT_THRESHOLDS, len(home)
    edges = bin_edges(thresholds, num_classes)
    shape = (NUM_KINDS, num_classes, len(edges) + 1)
    counts, count = jnp.zeros(shape, jnp.int32, device=replicated(mesh)), _counter(mesh)
    needed = ({name: batch[name] for name in ("images", "mask")} for batch in batches)
    for batch, probs, _ in predicted(predict, needed, mesh):
        counts = count(counts, probs, batch["mask"])
    histogram = np.asarray(counts)
    if not histogram.any():
        return np.zeros(num_classes, np.float32)
    target = label_shift.target_frequencies(histogram, thresholds, calibration, home)
    return label_shift.logit_shift(calibration, home, target)


def make_features(model: Model, mesh: Mesh) -> Callable[[Array], Array]:
    """Returns the function from images to pooled trunk features, [batch, feature]."""
    forward = _features(model.apply, mesh, model.compiler_options)
    return functools.partial(forward, model.params, model.batch_stats)


@functools.cache
def _features(
    apply: Callable[..., tuple[Any, Tree]], mesh: Mesh, options: CompilerOptions
) -> Callable[[Tree, Tree, Array], Array]:
    return _on_devices(functools.partial(_pooled, apply), mesh, options)


def _pooled(
    apply: Callable[..., tuple[Any, Tree]],
    params: Tree,
    batch_stats: Tree,
    images: Array,
) -> Array:
    outputs, _ = apply(params, batch_stats, images, train=False, key=None)
    return outputs.features


@functools.cache
def _forward(
    apply: Callable[..., tuple[Any, Tree]], mesh: Mesh, options: CompilerOptions
) -> Callable[[Tree, Tree, Array], tuple[Array, Any]]:
    """Compiles the network for inference: `forward(params, batch_stats, images)`."""

    def forward(
        params: Tree, batch_stats: Tree, images: Array
    ) -> tuple[Array, Array | None]:
        outputs, _ = apply(params, batch_stats, images, train=False, key=None)
        return jax.nn.sigmoid(outputs.logits), outputs.embedding

    return _on_devices(forward, mesh, options)


def _on_devices(
    forward: Callable[..., Any], mesh: Mesh, options: CompilerOptions
) -> Callable[..., Any]:
    """Compiles `forward(params, batch_stats, images)` with sharded images."""
    whole, parts = replicated(mesh), divided(mesh)
    everywhere, share = PartitionSpec(), PartitionSpec(DATA_AXIS)
    parallel = jax.shard_map(
        forward, mesh=mesh, in_specs=(everywhere, everywhere, share), out_specs=share
    )
    return jax.jit(
        parallel, in_shardings=(whole, whole, parts), compiler_options=dict(options)
    )


def _mean_of(probs: list[Array]) -> Array:
    return sum(probs[1:], probs[0]) / len(probs)


_mean: Callable[[list[Array]], Array] = jax.jit(_mean_of)


_corrected: Callable[[Array, Any], Array] = jax.jit(label_shift.corrected)


@functools.cache
def _counter(mesh: Mesh) -> Callable[[Array, Array, Array], Array]:
    """Compiles the addition of a batch to a histogram, without its labels."""

    def count(counts: Array, probs: Array, mask: Array) -> Array:
        nowhere = jnp.zeros(probs.shape, bool)
        edges = bin_edges(DEFAULT_THRESHOLDS, probs.shape[1])
        return add_entries(counts, probs, nowhere, None, mask > 0, edges)

    return jax.jit(count, donate_argnums=0, out_shardings=replicated(mesh))
