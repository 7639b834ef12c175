"""Sharding of the optimizer's state over the devices, and the collectives it needs.

Every array keeps its name and shape and is divided along one axis, so a checkpoint is
the same for any number of devices.

Whole gradients are all-reduced, each device updates its slices of the parameters, and
an all-gather of one buffer joins them. Each element is computed as without sharding.
(On TPUs, XLA turns the paper's reduce-scatter of gradients back into an all-reduce.)

Source: Rajbhandari et al. 2020, ZeRO, https://arxiv.org/abs/1910.02054, section 5.1.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxii.distributed.mesh import DATA_AXIS
from jaxii.train.state import TrainState, Tree

# XLA for TPUs gathers whole tiles; it turns other sizes into an all-reduce.
_TILE = 1024


def cut_axis(shape: Sequence[int], num_shards: int) -> int | None:
    """Returns the axis along which an array is divided; None if no axis divides.

    It is the largest axis; the last one only if no other divides, because accelerators
    pad short rows.
    """
    axes = [axis for axis, size in enumerate(shape) if size and size % num_shards == 0]
    if num_shards == 1 or not axes:
        return None
    return max(axes, key=lambda axis: (axis < len(shape) - 1, shape[axis]))


def state_specs(state: TrainState, num_shards: int) -> TrainState:
    """Returns the partition spec of each array of a state.

    Args:
      state: Arrays or their shapes.
      num_shards: Number of shards of the optimizer's state; 1 is unsharded.
    """

    def spec(leaf: Any) -> PartitionSpec:
        axis = cut_axis(leaf.shape, num_shards)
        if axis is None:
            return PartitionSpec()
        return PartitionSpec(*[None] * axis, DATA_AXIS)

    everywhere = jax.tree.map(lambda leaf: PartitionSpec(), state)
    return replace(everywhere, opt_state=jax.tree.map(spec, state.opt_state))


def state_shardings(state: TrainState, mesh: Mesh, shard_state: bool) -> TrainState:
    """Returns the sharding of each array of a state (arrays or their shapes)."""
    specs = state_specs(state, mesh.size if shard_state else 1)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def state_shapes(state: TrainState, mesh: Mesh, shard_state: bool) -> TrainState:
    """Returns the shape, dtype and sharding of each array of a state."""

    def shape(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(shape, state, state_shardings(state, mesh, shard_state))


def make_state(
    make: Callable[..., TrainState], mesh: Mesh, shard_state: bool, *args: Any
) -> TrainState:
    """Returns `make(*args)`, computed in its final sharding, without a second copy."""
    shardings = state_shardings(jax.eval_shape(make, *args), mesh, shard_state)
    # `make` runs once. On CPUs, compiling it takes more than half as long as compiling
    # a train step; at this level, less than half of that.
    options = {"xla_backend_optimization_level": 1}
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    compiled = jax.jit(
        make, out_shardings=shardings, compiler_options=options if on_cpu else None
    )
    return compiled(*args)


class Shards:
    """Divides trees of the parameters' structure; for use inside `jax.shard_map`.

    Args:
      params: The whole parameters or their shapes.
      num_shards: Number of devices to divide over; 1 divides nothing.
    """

    def __init__(self, params: Tree, num_shards: int):
        leaves, self._structure = jax.tree.flatten(params)
        self._num_shards = num_shards
        self._shapes = [leaf.shape for leaf in leaves]
        axes = (cut_axis(shape, num_shards) for shape in self._shapes)
        # Index of a divided leaf -> its axis.
        self._cut = {i: axis for i, axis in enumerate(axes) if axis is not None}

    def own(self, tree: Tree) -> Tree:
        """Returns this device's slices of a whole tree."""
        leaves = self._structure.flatten_up_to(tree)
        device = lax.axis_index(DATA_AXIS)
        for i, axis in self._cut.items():
            size = leaves[i].shape[axis] // self._num_shards
            leaves[i] = lax.dynamic_slice_in_dim(leaves[i], device * size, size, axis)
        return self._structure.unflatten(leaves)

    def whole(self, tree: Tree) -> Tree:
        """Gathers the whole tree from the devices' slices; undoes `own`."""
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
        """Returns the squared norm of each whole array, from the devices' slices.

        Each tree has the parameters' structure. One all-reduce serves all trees.
        """
        squares = [
            [jnp.sum(jnp.square(leaf)) for leaf in self._structure.flatten_up_to(tree)]
            for tree in trees
        ]
        if self._cut:
            parts = [[row[i] for i in self._cut] for row in squares]
            for row, sums in zip(squares, lax.psum(parts, DATA_AXIS), strict=True):
                for i, total in zip(self._cut, sums, strict=True):
                    row[i] = total
        return tuple(self._structure.unflatten(row) for row in squares)
