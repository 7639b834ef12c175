"""Re-estimation of BatchNorm's running statistics over unlabelled images.

Used on images of a target domain (`evaluate --adapt_bn`), and on training images for
averaged parameters (SWA), which have no statistics of their own.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxii.distributed.mesh import DATA_AXIS, divided, replicated, to_devices
from jaxii.models.cpu import CompilerOptions
from jaxii.models.layers import MOMENTUM
from jaxii.train.state import Tree


def reestimate(
    apply: Callable[..., tuple[Any, Tree]],
    params: Tree,
    batch_stats: Tree,
    batches: Iterable[Mapping[str, np.ndarray]],
    mesh: Mesh,
    *,
    compiler_options: CompilerOptions = (),
) -> Tree:
    """Returns the mean and variance of every BatchNorm over the images of all batches.

    Each batch is normalised by its own statistics, as in training, so the images should
    be shuffled; a few thousand suffice. The variance is that of all images together,
    not the mean of the batches' variances.

    Args:
      apply: The network.
      params: The network's parameters.
      batch_stats: Old statistics, returned if there is no image.
      batches: Host batches of one size with `images` and `mask`, the same number on all
        processes. Padding is replaced by other images of its global batch, which may be
        another process's, and has no weight in the mean over batches.
      mesh: The devices.
      compiler_options: For `jax.jit`; see `models.cpu.compiler_options`.

    Memory: the images of a batch with padding are on every device for a moment.

    Source: Li et al. 2016, Revisiting Batch Normalization For Practical Domain
      Adaptation (AdaBN), https://arxiv.org/abs/1603.04779
    """
    measure, add, finish = _compiled(apply, mesh, compiler_options)
    has_padding, without_padding = _compiled_padding(mesh)
    sharding = divided(mesh)
    total = None
    for batch in batches:
        sent = to_devices({name: batch[name] for name in ("images", "mask")}, sharding)
        if has_padding(sent["mask"]):
            sent["images"] = without_padding(**sent)
        found = measure(params, batch_stats, sent)
        total = found if total is None else add(total, found)
    return batch_stats if total is None else finish(total, batch_stats)


@functools.cache
def _compiled_padding(mesh):
    """Compiles whether a global batch has padding, and its replacement by images."""

    def has_padding(mask):
        return jnp.any(mask <= 0)

    def without_padding(images, mask):
        """Returns the images; padding is replaced by the real ones, in their order."""
        real = mask > 0
        found = jnp.flatnonzero(real, size=len(real), fill_value=0)
        place = (jnp.cumsum(~real) - 1) % jnp.maximum(jnp.sum(real), 1)
        return images[jnp.where(real, jnp.arange(len(real)), found[place])]

    return (
        jax.jit(has_padding, out_shardings=replicated(mesh)),
        jax.jit(without_padding, out_shardings=divided(mesh)),
    )


@functools.cache
def _compiled(apply, mesh, options):
    """Compiles the sums of a batch, their addition, and the final statistics."""
    everywhere, share = PartitionSpec(), PartitionSpec(DATA_AXIS)

    def moments(params, batch_stats, batch):
        """Returns the weighted sums of mean and mean square, and the weight."""
        params, zeros = jax.lax.pcast(
            (params, jax.tree.map(jnp.zeros_like, batch_stats)), DATA_AXIS, to="varying"
        )
        key = jax.random.key(0)
        _, updated = apply(params, zeros, batch["images"], train=True, key=key)
        # An update of zeros is the batch's share of its statistics.
        stats = jax.tree.map(lambda x: x / (1.0 - MOMENTUM), updated)
        weight = jnp.sum(batch["mask"])
        sums = jax.tree.map(lambda x: weight * x, _with_squares(stats))
        return jax.lax.psum((sums, weight), DATA_AXIS)

    measure = jax.shard_map(
        moments,
        mesh=mesh,
        in_specs=(everywhere, everywhere, share),
        out_specs=everywhere,
    )

    def add(total, found):
        return jax.tree.map(jnp.add, total, found)

    def finish(total, batch_stats):
        sums, weight = total
        means = jax.tree.map(lambda x: x / jnp.maximum(weight, 1.0), sums)
        return jax.tree.map(
            lambda new, old: jnp.where(weight > 0, new, old),
            _with_variances(means),
            batch_stats,
        )

    whole = replicated(mesh)
    return (
        jax.jit(measure, out_shardings=whole, compiler_options=dict(options)),
        jax.jit(add, out_shardings=whole),
        jax.jit(finish, out_shardings=whole),
    )


def _with_squares(stats: Tree) -> Tree:
    """Returns the tree with every variance replaced by the mean square."""
    if "var" in stats:
        return {**stats, "var": stats["var"] + jnp.square(stats["mean"])}
    return {name: _with_squares(tree) for name, tree in stats.items()}


def _with_variances(stats: Tree) -> Tree:
    """Undoes `_with_squares`."""
    if "var" in stats:
        variance = stats["var"] - jnp.square(stats["mean"])
        return {**stats, "var": jnp.maximum(variance, 0.0)}
    return {name: _with_variances(tree) for name, tree in stats.items()}
