"""The optimizer's state divided over the devices, and the collectives of an update.

Used by `step`, and by whoever makes or restores a state. Every array keeps its name and
shape and is cut along one of its axes, so that a checkpoint is the same for any number
of devices, and for a state that is whole on each of them: that is one shard.

Gradients are added up whole, as always: each device then updates its slices of the
parameters, and one all-gather of one buffer puts the parameters together. Element by
element nothing else is computed, so that the run is the same. (The paper scatters the
gradients while it adds them up; XLA for TPUs makes an all-reduce of that again.)

Source: Rajbhandari et al. 2020, ZeRO, https://arxiv.org/abs/1910.02054, section 5.1.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxii.distributed.mesh import DATA_AXIS
from jaxii.train.state import TrainState, Tree

# XLA for TPUs gathers whole tiles; of anything else it makes an all-reduce.
_TILE = 1024


def cut_axis(shape: Sequence[int], num_shards: int) -> int | None:
    """Returns the axis along which an array is divided, or None where none divides.

    The largest, but the last only where no other divides: accelerators pad short rows.
    """
    axes = [axis for axis, size in enumerate(shape) if size and size % num_shards == 0]
    if num_shards == 1 or not axes:
        return None
    return max(axes, key=lambda axis: (axis < len(shape) - 1, shape[axis]))


def state_specs(state: TrainState, num_shards: int) -> TrainState:
    """Returns a state of the same structure that says how each array is divided.

    Args:
      state: arrays, or their shapes.
      num_shards: devices over which the optimizer's state is divided; 1: it is not.
    """

    def spec(leaf: Any) -> PartitionSpec:
        axis = cut_axis(leaf.shape, num_shards)
        if axis is None:
            return PartitionSpec()
        return PartitionSpec(*[None] * axis, DATA_AXIS)

    everywhere = jax.tree.map(lambda leaf: PartitionSpec(), state)
    return replace(everywhere, opt_state=jax.tree.map(spec, state.opt_state))


def state_shardings(state: TrainState, mesh: Mesh, shard_state: bool) -> TrainState:
    """Returns a state of the same structure that says where each array lies.

    Args:
      state: arrays, or their shapes.
      mesh: the devices.
      shard_state: divide the optimizer's state over them.
    """
    specs = state_specs(state, mesh.size if shard_state else 1)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def state_shapes(state: TrainState, mesh: Mesh, shard_state: bool) -> TrainState:
    """Returns a state of the same structure, of shapes that say where they lie.

    Args:
      state: arrays, or their shapes.
      mesh: the devices.
      shard_state: divide the optimizer's state over them.
    """

    def shape(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(shape, state, state_shardings(state, mesh, shard_state))


class Shards:
    """Trees of the parameters' structure, divided; for use inside `jax.shard_map`.

    Args:
      params: the parameters, whole, or their shapes.
      num_shards: devices over which they are divided; 1: they are not.
    """

    def __init__(self, params: Tree, num_shards: int):
        leaves, self._structure = jax.tree.flatten(params)
        self._num_shards = num_shards
        self._shapes = [leaf.shape for leaf in leaves]
        axes = (cut_axis(shape, num_shards) for shape in self._shapes)
        # Number of a leaf -> axis along which it is divided; the others stay whole.
        self._cut = {i: axis for i, axis in enumerate(axes) if axis is not None}

    def own(self, tree: Tree) -> Tree:
        """Returns this device's slices of a tree that is whole."""
        leaves = self._structure.flatten_up_to(tree)
        device = lax.axis_index(DATA_AXIS)
        for i, axis in self._cut.items():
            size = leaves[i].shape[axis] // self._num_shards
            leaves[i] = lax.dynamic_slice_in_dim(leaves[i], device * size, size, axis)
        return self._structure.unflatten(leaves)

    def whole(self, tree: Tree) -> Tree:
        """Returns the tree that the devices have slices of; undoes `own`."""
        if not self._cut:
            return tree
        leaves = self._structure.flatten_up_to(tree)
        flat = jnp.concatenate([leaves[i].reshape(-1) for i in self._cut])
        flat = jnp.pad(flat, (0, -flat.size % _TILE))
        rows = lax.all_gather(flat, DATA_AXIS, to="invarying")
        ends = list(itertools.accumulate(leaves[i].size for i in self._cut))
        columns = jnp.split(rows, ends, axis=1)[:-1]
        for (i, axis), part in zip(self._cut.items(), columns, strict=True):
            stacked = part.reshape(self._num_shards, *leaves[i].shape)
            leaves[i] = jnp.moveaxis(stacked, 0, axis).reshape(self._shapes[i])
        return self._structure.unflatten(leaves)

    def squared_norms(self, *trees: Tree) -> tuple[Tree, ...]:
        """Returns the squared norms of the whole arrays that the trees are slices of.

        Args:
          trees: slices, each tree of the parameters' structure.

        Returns:
          Trees of float32 scalars; one all-reduce gives them all.
        """
        squares = [
            [_square(leaf) for leaf in self._structure.flatten_up_to(tree)]
            for tree in trees
        ]
        if self._cut:
            parts = [[row[i] for i in self._cut] for row in squares]
            for row, sums in zip(squares, lax.psum(parts, DATA_AXIS), strict=True):
                for i, total in zip(self._cut, sums, strict=True):
                    row[i] = total
        return tuple(self._structure.unflatten(row) for row in squares)


def _square(leaf: Array) -> Float[Array, ""]:
    return jnp.sum(jnp.square(leaf))
