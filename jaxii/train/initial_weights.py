"""The initial parameters and BatchNorm statistics of a stage.

A stage starts from fresh weights, from a checkpoint (of the previous stage or of
another run, whole or the trunk alone), or from pretrained weights of its trunk.
`trainer` decides which.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
from jax.sharding import Sharding

from jaxii.errors import InputError
from jaxii.models.multitask import EMBEDDING_HEAD
from jaxii.train.checkpoint import Checkpoints, evaluated_params
from jaxii.train.stages import Saved
from jaxii.train.state import Tree

# Makes a stage's fresh parameters and statistics; may be jitted or `eval_shape`d.
Init = Callable[[jax.Array], tuple[Tree, Tree]]


@dataclass(frozen=True)
class FreshWeights:
    """The network's own initialisation."""

    source = "fresh parameters"


@dataclass(frozen=True, kw_only=True)
class CheckpointWeights:
    """The weights of a checkpoint of this run or of another.

    Attributes:
      checkpoints: Checkpoints of that run.
      saved: The checkpoint.
      source: Description of the checkpoint, for messages.
    """

    checkpoints: Checkpoints
    saved: Saved
    source: str

    def load(self, init: Init, key: jax.Array, sharding: Sharding) -> tuple[Tree, Tree]:
        """Returns parameters and statistics for a stage.

        Raises:
          InputError: If the checkpoint does not fit the network, or is damaged.
        """
        model = self.checkpoints.restore_model(self.saved, sharding)
        return inherit(model, jax.eval_shape(init, key)[0], self.source)

    def check_fits(self, init: Init) -> None:
        """Compares shapes, without reading the arrays.

        Raises:
          InputError: If the checkpoint does not fit the network.
        """
        like = jax.eval_shape(init, jax.random.key(0))[0]
        inherit(self.checkpoints.model_shapes(self.saved), like, self.source)

    def trunk(self) -> "TrunkWeights":
        """Returns the weights of the trunk alone."""
        source = f"the trunk of {self.source}"
        return TrunkWeights(
            checkpoints=self.checkpoints, saved=self.saved, source=source
        )


class TrunkWeights(CheckpointWeights):
    """The trunk of a checkpoint; the heads start fresh."""

    def load(self, init: Init, key: jax.Array, sharding: Sharding) -> tuple[Tree, Tree]:
        """Returns parameters and statistics for a stage; see `CheckpointWeights`."""
        model = self.checkpoints.restore_model(self.saved, sharding)
        params, batch_stats = jax.jit(init, out_shardings=sharding)(key)
        trunk, statistics = inherit(_trunk(model), params[TRUNK], self.source)
        return {**params, TRUNK: trunk}, {**batch_stats, TRUNK: statistics}

    def check_fits(self, init: Init) -> None:
        """Compares shapes; see `CheckpointWeights`."""
        like = jax.eval_shape(init, jax.random.key(0))[0]
        model = self.checkpoints.model_shapes(self.saved)
        inherit(_trunk(model), like[TRUNK], self.source)


@dataclass(frozen=True, kw_only=True)
class PretrainedWeights:
    """Weights from another program; subtrees that they lack start fresh.

    Attributes:
      source: Description of the file, for messages.
      params: Parameters by top-level key, such as "trunk".
      batch_stats: BatchNorm statistics by top-level key.
    """

    source: str
    params: Mapping[str, Tree]
    batch_stats: Mapping[str, Tree]

    def load(self, init: Init, key: jax.Array, sharding: Sharding) -> tuple[Tree, Tree]:
        """Returns parameters and statistics for a stage."""
        params, batch_stats = init(key)
        return {**params, **self.params}, {**batch_stats, **self.batch_stats}


InitialWeights = FreshWeights | CheckpointWeights | PretrainedWeights
FRESH = FreshWeights()
# Top-level key of parameters and statistics.
TRUNK = "trunk"


def inherit(model: Mapping[str, Tree], like: Tree, source: str) -> tuple[Tree, Tree]:
    """Returns parameters and statistics for a stage, from an earlier checkpoint.

    Uses the averaged parameters if the checkpoint has them, because those were
    evaluated. The embedding head is dropped if the new stage has none.

    Args:
      model: `params`, `batch_stats` and, if saved, `average_params` of a checkpoint, or
        their shapes.
      like: Shapes of the new stage's parameters.
      source: Description of the checkpoint, for the error.

    Raises:
      InputError: If the shapes differ.
    """
    params = dict(evaluated_params(model))
    if EMBEDDING_HEAD not in like:
        params.pop(EMBEDDING_HEAD, None)
    shapes, wanted = _shapes(params), _shapes(like)
    if shapes != wanted:
        (path, *_) = (
            path for path in (*wanted, *shapes) if shapes.get(path) != wanted.get(path)
        )
        raise InputError(
            f"the network of {source} does not fit the stage that starts from it: "
            f"{path} is {shapes.get(path, 'absent')} there and "
            f"{wanted.get(path, 'absent')} here; use the same variant, depth, width "
            "and heads, or start from other weights."
        )
    return params, model["batch_stats"]


def _trunk(model: Mapping[str, Tree]) -> dict[str, Tree]:
    """Returns a restored model's trunk to start from, and its statistics."""
    return {
        "params": evaluated_params(model)[TRUNK],
        "batch_stats": model["batch_stats"][TRUNK],
    }


def _shapes(tree: Tree) -> dict[str, str]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): str(list(leaf.shape))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
