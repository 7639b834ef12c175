"""One update, pure: `train_step(state, batch) -> (state, metrics)`.

Comes after the objective and before the loop. Each device works on its share of the
batch under `jax.shard_map`; what is differentiated is the global objective, each term
divided by its weight over the whole batch. Two all-reduces a step: the terms' weights,
then gradients, statistics and sums together; `shards` adds an all-gather where it
divides the optimizer's state.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, UInt8

from jaxii.distributed.mesh import DATA_AXIS, divided, replicated
from jaxii.objective.objective import Objective
from jaxii.train.augment import augment, mix
from jaxii.train.averaging import Rate, move
from jaxii.train.sharding import Shards, state_specs
from jaxii.train.state import TrainState, Tree, derive_key

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What a train step is made of; all of it is fixed when the step is compiled.

    Attributes:
      apply: the network, `(params, batch_stats, images, train=, key=)` to outputs and
        new batch_stats.
      objective: the stage's objective.
      optimizer: the stage's optimizer; its `update` is given `stage_step`.
      learning_rate: the schedule inside `optimizer`, for the log.
      augmentation: strength of `augment`; 0 leaves the pixels alone.
      mix_probability: share of the examples that `mix` mixes.
      micro_batches: gradients of so many slices of a device's batch are added up before
        one update.
      average_rate: how fast the averaged parameters move; None turns the average off.
      frozen: top-level keys of params that stay as they are; with any, so does
        batch_stats, by which the network then normalises.
      shard_state: divide the optimizer's state over the devices.
      seed: base of the step's randomness.
    """

    apply: Callable[..., tuple[Any, Tree]]
    objective: Objective
    optimizer: optax.GradientTransformation
    learning_rate: Callable[..., Float[Array, ""]]
    augmentation: float = 0.0
    mix_probability: float = 0.0
    micro_batches: int = 1
    average_rate: Rate | None = None
    frozen: tuple[str, ...] = ()
    shard_state: bool = False
    seed: int = 0


def make_train_step(settings: StepSettings, mesh: Mesh) -> Any:
    """Compiles (at first use) the update over a mesh.

    Args:
      settings: the step's parts.
      mesh: the devices.

    Returns:
      `train_step(state, batch, label_embeddings) -> (state, metrics)`; the state given
      is consumed (its buffers are reused). `label_embeddings` [class, embed] float32 is
      None without an embedding term. Metrics are scalars of the global batch.
    """

    def on_a_device(
        state: TrainState,
        batch: Batch,
        label_embeddings: Float[Array, "class embed"] | None,
    ) -> tuple[TrainState, Metrics]:
        gradients, batch_stats, metrics = gradients_of(
            settings, state, batch, label_embeddings
        )
        return _update(settings, state, gradients, batch_stats, metrics)

    def train_step(state, batch, label_embeddings):
        everywhere, share = PartitionSpec(), PartitionSpec(DATA_AXIS)
        specs = state_specs(state, mesh.size if settings.shard_state else 1)
        return jax.shard_map(
            on_a_device,
            mesh=mesh,
            in_specs=(specs, share, everywhere),
            out_specs=(specs, everywhere),
            check_vma=True,
        )(state, batch, label_embeddings)

    whole, parts = replicated(mesh), divided(mesh)
    # A state that is divided lies as it was made, and as the specs above say.
    placed = None if settings.shard_state else whole
    return jax.jit(
        train_step,
        in_shardings=(placed, parts, whole),
        out_shardings=(placed, whole),
        donate_argnums=0,
    )


def gradients_of(
    settings: StepSettings,
    state: TrainState,
    batch: Batch,
    label_embeddings: Float[Array, "class embed"] | None,
) -> tuple[Tree, Tree, Metrics]:
    """Returns gradients, BatchNorm statistics and metrics of the global batch.

    Runs inside `jax.shard_map`; what it returns is equal on all devices.
    """
    objective = settings.objective
    images, targets, known = examples(settings, batch)
    example_weights = objective.example_weights(
        targets=targets,
        known=known,
        mask=batch["mask"],
        label_embeddings=label_embeddings,
    )
    totals = jax.lax.psum(
        {name: jnp.sum(weight) for name, weight in example_weights.items()}, DATA_AXIS
    )
    term_weights = objective.weights(state.stage_step)
    device = jax.lax.axis_index(DATA_AXIS)
    key = jax.random.fold_in(derive_key(settings.seed, "dropout", state.step), device)
    pieces = {
        "images": images,
        "targets": targets,
        "known": known,
        "weights": example_weights,
    }
    local_objective = _local_objective(
        settings, totals, term_weights, label_embeddings, state.stage_step
    )
    gradients, batch_stats, sums = _accumulate(
        local_objective, state, pieces, key, settings.micro_batches
    )
    num_devices = jax.lax.axis_size(DATA_AXIS)
    batch_stats = jax.tree.map(lambda x: x / num_devices, batch_stats)
    gradients, batch_stats, metrics = jax.lax.psum(
        (gradients, batch_stats, sums), DATA_AXIS
    )
    if settings.frozen:
        batch_stats = state.batch_stats
    return gradients, batch_stats, metrics | _prefixed("weight", term_weights)


def examples(
    settings: StepSettings, batch: Batch
) -> tuple[
    UInt8[Array, "batch height width 3"],
    Float[Array, "batch class"],
    Float[Array, "batch class"],
]:
    """Returns the images and targets that are trained on, and which targets count.

    Args:
      settings: augmentation and mixing; the objective's view of labels.
      batch: of one device.
    """
    targets, known = settings.objective.targets(
        batch["label_ids"], batch["label_confidences"]
    )
    images = batch["images"]
    if settings.augmentation > 0:
        images = augment(
            images,
            batch["positions"],
            seed=settings.seed,
            strength=settings.augmentation,
        )
    if settings.mix_probability > 0:
        images, targets, known = mix(
            images,
            targets,
            known,
            batch["positions"],
            seed=settings.seed,
            probability=settings.mix_probability,
        )
    return images, targets, known


def _local_objective(settings, totals, term_weights, label_embeddings, stage_step):
    """Returns a function; its sum over devices and slices is the global objective."""

    def local_objective(params, batch_stats, piece, key):
        frozen = {name: jax.lax.stop_gradient(params[name]) for name in settings.frozen}
        outputs, batch_stats = settings.apply(
            params | frozen,
            batch_stats,
            piece["images"],
            train=not frozen,
            key=key,
        )
        per_example = settings.objective.losses(
            logits=outputs.logits,
            embedding=outputs.embedding,
            targets=piece["targets"],
            known=piece["known"],
            label_embeddings=label_embeddings,
            stage_step=stage_step,
        )
        parts = {
            name: jnp.sum(loss * piece["weights"][name])
            / jnp.maximum(totals[name], 1.0)
            for name, loss in per_example.items()
        }
        value = sum(term_weights[name] * part for name, part in parts.items())
        return value, (batch_stats, {"objective": value, **_prefixed("loss", parts)})

    return local_objective


def _accumulate(local_objective, state, pieces, key, micro_batches):
    """Adds up gradients and sums over slices of this device's share of the batch."""
    # Marked as differing between devices, so that differentiation does not insert an
    # all-reduce of its own for every parameter (and in the compute dtype at that).
    params, batch_stats = jax.lax.pcast(
        (state.params, state.batch_stats), DATA_AXIS, to="varying"
    )
    differentiate = jax.grad(local_objective, has_aux=True)
    if micro_batches == 1:
        gradients, (batch_stats, sums) = differentiate(params, batch_stats, pieces, key)
        return gradients, batch_stats, sums
    slices = jax.tree.map(
        lambda x: x.reshape(micro_batches, x.shape[0] // micro_batches, *x.shape[1:]),
        pieces,
    )

    def one(carry, inputs):
        gradients, batch_stats, sums = carry
        piece, index = inputs
        more, (batch_stats, parts) = differentiate(
            params, batch_stats, piece, jax.random.fold_in(key, index)
        )
        added = jax.tree.map(jnp.add, (gradients, sums), (more, parts))
        return (added[0], batch_stats, added[1]), None

    first = jax.tree.map(lambda x: x[0], slices)
    shapes = jax.eval_shape(differentiate, params, batch_stats, first, key)
    zeros = jax.lax.pcast(
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0], shapes[1][1])),
        DATA_AXIS,
        to="varying",
    )
    indices = jnp.arange(micro_batches, dtype=jnp.uint32)
    carry, _ = jax.lax.scan(one, (zeros[0], batch_stats, zeros[1]), (slices, indices))
    return carry


def _update(settings, state, gradients, batch_stats, metrics):
    """Applies the optimizer, unless a gradient is not finite: then nothing moves.

    `stage_step` goes on either way, because the batch is used up, and it alone decides
    the learning rate, the objective's weights and the rate of the average.
    """
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(norm) & jnp.isfinite(metrics["objective"])
    num_shards = jax.lax.axis_size(DATA_AXIS) if settings.shard_state else 1
    shards = Shards(state.params, num_shards)
    own = shards.own(state.params)
    updates, opt_state = optax.with_extra_args_support(settings.optimizer).update(
        shards.own(gradients),
        state.opt_state,
        own,
        stage_step=state.stage_step,
        gradient_norm=norm,
        squared_norms=shards.squared_norms,
    )
    # Weight decay would move what has no gradient.
    frozen = {name: own[name] for name in settings.frozen}
    moved: Tree = optax.apply_updates(own, updates)
    kept = _keep_if(
        finite,
        (moved | frozen, batch_stats, opt_state),
        (own, state.batch_stats, state.opt_state),
    )
    params = shards.whole(kept[0])
    average_params = state.average_params
    if settings.average_rate is not None:
        rate = settings.average_rate(state.stage_step)
        average_params = move(average_params, params, rate)
    skipped = 1 - finite.astype(jnp.int32)
    in_a_row = (state.skipped_in_a_row + skipped) * skipped
    metrics = metrics | {
        "gradient_norm": norm,
        "learning_rate": settings.learning_rate(state.stage_step),
        "skipped_in_a_row": in_a_row,
        "skipped_steps": state.skipped_steps + skipped,
    }
    state = TrainState(
        step=state.step + 1,
        stage_step=state.stage_step + 1,
        params=params,
        batch_stats=kept[1],
        opt_state=kept[2],
        average_params=average_params,
        skipped_steps=state.skipped_steps + skipped,
        skipped_in_a_row=in_a_row,
    )
    return state, metrics


def _keep_if(condition: Bool[Array, ""], new: Tree, old: Tree) -> Tree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _prefixed(prefix: str, values: dict[str, jax.Array]) -> Metrics:
    return {f"{prefix}/{name}": value for name, value in values.items()}
