"""The network that is trained: one trunk, a classifier, and a droppable embedding head.

Before it comes `resnet`; after it the objective reads `Outputs`. The NNX modules are
split here, once: callers hold plain nested dicts of arrays with string keys, and two
pure functions. Dropping the embedding head is deleting the `EMBEDDING_HEAD` subtree of
the parameters and making the network again with `embedding_dim=0`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from jaxii.errors import InputError
from jaxii.models.layers import Linear
from jaxii.models.resnet import ResNet, check_shape

EMBEDDING_HEAD = "embedding"  # top-level key of params

Tree = dict[str, Any]  # nested dicts of arrays, string keys


class Outputs(NamedTuple):
    """What one forward pass gives, all float32."""

    logits: Float[Array, "batch class"]
    embedding: Float[Array, "batch embed"] | None  # None: no embedding head
    features: Float[Array, "batch feature"]  # pooled trunk output, before any dropout


def normalise(
    images: UInt8[Array, "batch height width 3"],
) -> Float[Array, "batch height width 3"]:
    """Returns float32 pixels with ImageNet's channel means 0 and deviations 1.

    Source: the constants of every torchvision model.
    """
    mean = 255.0 * jnp.array([0.485, 0.456, 0.406], jnp.float32)
    deviation = 255.0 * jnp.array([0.229, 0.224, 0.225], jnp.float32)
    return (images.astype(jnp.float32) - mean[None, None, None]) / deviation[
        None, None, None
    ]


class Network(NamedTuple):
    """A network as two pure functions over plain pytrees.

    Attributes:
        init: `init(key) -> (params, batch_stats)`; may be jitted or `eval_shape`d.
        apply: `apply(params, batch_stats, images, *, train, key=None) -> (Outputs,
            new_batch_stats)`. `images` [batch, height, width, 3] are uint8 pixels,
            which are normalised first, or floats that have been; `key` drives dropout,
            needed in training with an embedding head. With `train=False` the running
            statistics are used and returned unchanged. With `bn_axis=None` under
            `shard_map` the new statistics differ between devices.
    """

    init: Callable[[Array], tuple[Tree, Tree]]
    apply: Callable[..., tuple[Outputs, Tree]]


class _MultiTask(nnx.Module):
    def __init__(self, *, trunk, classifier_bias, embedding_dim, dropout, rngs):
        self.trunk = trunk(rngs=rngs)
        num_features = self.trunk.num_features
        num_classes = len(classifier_bias)
        head = partial(Linear, initial=jax.nn.initializers.normal(0.01), rngs=rngs)
        self.classifier = head(num_features, num_classes, bias=classifier_bias)
        self.dropout, self.has_embedding = dropout, embedding_dim > 0
        if self.has_embedding:
            zeros = np.zeros(embedding_dim, np.float32)
            self.embedding = head(num_features, embedding_dim, bias=zeros)

    def __call__(self, images, *, train, key):
        features = self.trunk(images, train)
        embedding = None
        if self.has_embedding:
            kept = features
            if train and self.dropout > 0:
                kept = _dropout(features, self.dropout, key)
            embedding = self.embedding(kept)
        return Outputs(self.classifier(features), embedding, features)


def _dropout(features, rate, key):
    if key is None:
        raise ValueError(
            "apply(train=True) needs `key` for the embedding head's dropout"
        )
    keep = jax.random.bernoulli(key, 1.0 - rate, features.shape)
    return jnp.where(keep, features / (1.0 - rate), jnp.zeros_like(features))


def make_network(
    *,
    depth: int,
    num_classes: int,
    embedding_dim: int,
    variant: str = "resnet",
    width: int = 64,
    stem: str = "imagenet",
    dropout: float = 0.2,
    dtype: DTypeLike = jnp.bfloat16,
    classifier_bias: Float[np.ndarray, "class"] | Float[Array, "class"] | None = None,
    bn_axis: str | None = None,
    bn_group: int | None = None,
    bn_momentum: float = 0.9,
    zero_init_residual: bool = True,
    platform: str | None = None,
) -> Network:
    """Builds the trunk and its heads, and returns them as pure functions.

    Args:
        depth: 18, 26, 34, 50, 101 or 152.
        num_classes: labels, >= 1.
        embedding_dim: length of a label embedding; 0 builds no embedding head.
        variant: a key of `resnet.VARIANTS`.
        width: channels of the first stage; 64 is the standard network.
        stem: "imagenet", or "small" for images of up to about 64 pixels.
        dropout: share of features dropped before the embedding head, in [0, 1).
        dtype: what the trunk computes in; everything kept or returned is float32.
        classifier_bias: initial bias, one number a class; None: zeros.
        bn_axis: mesh axis over which batch statistics are averaged; None: per device.
        bn_group: neighbours on `bn_axis` that share statistics; None: all of it.
        bn_momentum: the share a step keeps of the running statistics, in [0, 1).
        zero_init_residual: start every residual block as the identity.
        platform: to be fast on, as "cpu" or "tpu"; None: that of the devices at hand.

    Returns:
        A `Network`; its params are under "trunk", "classifier" and "embedding".

    Raises:
        InputError: an unknown depth, variant or stem, or a size out of range.
    """
    check_shape(depth, width, stem, variant)
    _check_heads(num_classes, embedding_dim, dropout, classifier_bias)
    if classifier_bias is None:
        classifier_bias = np.zeros(num_classes, np.float32)
    trunk = partial(
        ResNet,
        depth=depth,
        variant=variant,
        width=width,
        stem=stem,
        zero_init_residual=zero_init_residual,
        dtype=dtype,
        bn_momentum=bn_momentum,
        bn_axis=bn_axis,
        bn_group=bn_group,
        **_forms_for(platform or jax.default_backend()),
    )
    heads = {"classifier_bias": classifier_bias, "embedding_dim": embedding_dim}
    return _split(partial(_MultiTask, trunk=trunk, dropout=dropout, **heads))


def _forms_for(platform: str) -> dict[str, bool]:
    """Returns how the trunk is written: equal up to rounding, not in speed."""
    return {"cpu_forms": platform == "cpu", "folds_norms": platform == "tpu"}


def _check_heads(num_classes, embedding_dim, dropout, classifier_bias) -> None:
    if num_classes < 1:
        raise InputError(f"num_classes={num_classes}; a classifier needs at least 1")
    if embedding_dim < 0:
        raise InputError(f"embedding_dim={embedding_dim}; use 0 for no embedding head")
    if not 0 <= dropout < 1:
        raise InputError(f"dropout={dropout} is outside [0, 1); the recipe uses 0.2")
    if classifier_bias is not None and classifier_bias.shape != (num_classes,):
        raise InputError(
            f"classifier_bias has shape {classifier_bias.shape}; it needs one number "
            f"for each of num_classes={num_classes}"
        )


def _split(build: Callable[..., nnx.Module]) -> Network:
    """Turns a module's constructor into pure functions over its parameters."""
    shapes = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(params=0)))
    structure, _, _ = nnx.split(shapes, nnx.Param, nnx.BatchStat)

    def init(key):
        module = build(rngs=nnx.Rngs(params=key))
        return _plain(module, nnx.Param), _plain(module, nnx.BatchStat)

    def apply(params, batch_stats, images, *, train, key=None):
        module = nnx.merge(structure, params, batch_stats)
        if images.dtype == jnp.uint8:
            images = normalise(images)
        outputs = module(images, train=train, key=key)
        if not train:
            return outputs, batch_stats
        return outputs, _plain(module, nnx.BatchStat)

    return Network(init, apply)


def _plain(module, kind) -> Tree:
    return nnx.to_pure_dict(nnx.state(module, kind))
