"""The network: a trunk, a classifier, and an optional embedding head.

The NNX modules are split here, so callers use two pure functions and nested dicts of
arrays. To drop the embedding head, delete the subtree `EMBEDDING_HEAD` of the
parameters and make the network with `embedding_dim=0`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, UInt8

from jaxii.models import cpu
from jaxii.models.layers import Linear
from jaxii.models.resnet import ResNet, check_shape

EMBEDDING_HEAD = "embedding"  # top-level key of params

Tree = dict[str, Any]  # nested dicts of arrays, string keys


class Outputs(NamedTuple):
    """Float32 outputs of a forward pass."""

    logits: Float[Array, "batch class"]
    embedding: Float[Array, "batch embed"] | None  # None without an embedding head
    features: Float[Array, "batch feature"]  # pooled, before dropout


def normalise(
    images: UInt8[Array, "batch height width 3"],
) -> Float[Array, "batch height width 3"]:
    """Returns float32 pixels, standardised by ImageNet's means and deviations.

    Source: the constants of torchvision's models.
    """
    mean = 255.0 * jnp.array([0.485, 0.456, 0.406], jnp.float32)
    deviation = 255.0 * jnp.array([0.229, 0.224, 0.225], jnp.float32)
    return (images.astype(jnp.float32) - mean[None, None, None]) / deviation[
        None, None, None
    ]


class Network(NamedTuple):
    """A network as two pure functions over nested dicts of arrays.

    Attributes:
      init: `init(key) -> (params, batch_stats)`; may be jitted or `eval_shape`d.
      apply: `apply(params, batch_stats, images, *, train, key=None) -> (Outputs,
        new_batch_stats)`. `images` [batch, height, width, 3] are uint8, or normalised
        floats; `key` drives dropout in training with an embedding head. Without
        `train`, the running statistics are used and returned unchanged. Under
        `shard_map` with `bn_axis=None`, new statistics differ between devices.
      compiler_options: For `jax.jit` of `apply`; see `cpu.compiler_options`.
    """

    init: Callable[[Array], tuple[Tree, Tree]]
    apply: Callable[..., tuple[Outputs, Tree]]
    compiler_options: cpu.CompilerOptions = ()


class _MultiTask(nnx.Module):
    def __init__(self, *, trunk, num_classes, embedding_dim, dropout, rngs):
        self.trunk = trunk(rngs=rngs)
        num_features = self.trunk.num_features
        head = partial(Linear, initial=jax.nn.initializers.normal(0.01), rngs=rngs)
        self.classifier = head(num_features, num_classes)
        self.dropout, self.has_embedding = dropout, embedding_dim > 0
        if self.has_embedding:
            self.embedding = head(num_features, embedding_dim)

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
        raise ValueError("apply(train=True) with dropout needs `key`")
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
    bn_axis: str | None = None,
    bn_group: int | None = None,
    zero_init_residual: bool = True,
    platform: str | None = None,
) -> Network:
    """Builds the trunk and its heads, and returns them as pure functions.

    Args:
      depth: 18, 26, 34, 50, 101 or 152.
      num_classes: Number of labels.
      embedding_dim: Length of a label embedding; 0 builds no embedding head.
      variant: A key of `resnet.VARIANTS`.
      width: Channels of the first stage; 64 is the standard network.
      stem: "imagenet", or "small" for images of up to about 64 pixels.
      dropout: Share of features dropped before the embedding head, in [0, 1).
      dtype: Compute type of the trunk; parameters and outputs are float32.
      bn_axis: See `layers.BatchNorm`.
      bn_group: See `layers.BatchNorm`.
      zero_init_residual: Whether every residual block starts as the identity.
      platform: Platform to optimise for, such as "cpu" or "tpu". None: JAX's default.

    Returns:
      A `Network`; its params are under "trunk", "classifier" and "embedding".

    Raises:
      InputError: If the depth, variant, stem or width is not allowed.
    """
    check_shape(depth, width, stem, variant)
    platform = platform or jax.default_backend()
    trunk = partial(
        ResNet,
        depth=depth,
        variant=variant,
        width=width,
        stem=stem,
        zero_init_residual=zero_init_residual,
        dtype=dtype,
        bn_axis=bn_axis,
        bn_group=bn_group,
        cpu_forms=platform == "cpu",
        folds_norms=platform == "tpu",
    )
    heads = {"num_classes": num_classes, "embedding_dim": embedding_dim}
    network = _split(partial(_MultiTask, trunk=trunk, dropout=dropout, **heads))
    options = cpu.compiler_options(dtype) if platform == "cpu" else ()
    return network._replace(compiler_options=options)


def with_bias(
    init: Callable[[Array], tuple[Tree, Tree]], bias: Float32[np.ndarray, " class"]
) -> Callable[[Array], tuple[Tree, Tree]]:
    """Returns an `init` that sets the bias of the classifier."""

    def biased(key: Array) -> tuple[Tree, Tree]:
        params, batch_stats = init(key)
        classifier = {**params["classifier"], "bias": jnp.asarray(bias)}
        return {**params, "classifier": classifier}, batch_stats

    return biased


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
