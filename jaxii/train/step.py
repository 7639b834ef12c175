"""The train step, a pure function: `train_step(state, batch) -> (state, metrics)`.

Each device works on its shard of the batch under `jax.shard_map`. The global objective
is differentiated: each term is divided by its weight over the whole batch. A step has
two all-reduces: of the terms' weights, then of gradients, statistics and sums. Sharding
the optimizer state adds an all-gather, and an all-reduce with LARS or LAMB.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import optax  # pyright: ignore[reportMissingTypeStubs]
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, UInt8

from jaxii.distributed.mesh import DATA_AXIS, divided, replicated
from jaxii.models.cpu import CompilerOptions
from jaxii.objective.objective import Objective
from jaxii.train.augment import augment, mix, restyle
from jaxii.train.averaging import Rate, move
from jaxii.train.sharding import Shards, state_specs
from jaxii.train.state import TrainState, Tree, derive_key

T = TypeVar("T")
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class Slice(NamedTuple):
    """Examples of one device, and their weight in each term."""

    images: UInt8[Array, "batch height width 3"]
    targets: Float[Array, "batch class"]
    known: Float[Array, "batch class"]
    weights: dict[str, Float[Array, " batch"]]


# Objective of a slice of the batch: (params, batch_stats, slice, key) -> (objective,
# (new batch_stats, metrics to be summed)).
LocalObjective = Callable[
    [Tree, Tree, Slice, jax.Array], tuple[Array, tuple[Tree, Metrics]]
]


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """The parts of a train step; fixed when the step is compiled.

    Attributes:
      apply: The network, `(params, batch_stats, images, train=, key=) -> (outputs,
        new_batch_stats)`.
      objective: The stage's objective.
      optimizer: The stage's optimizer; its `update` takes `stage_step`.
      learning_rate: The schedule of `optimizer`, for the log.
      restyling: Strength of `restyle`; 0 leaves the pixels alone.
      augmentation: Strength of `augment`; 0 leaves the pixels alone.
      mix_probability: Share of the examples that `mix` mixes, in [0, 1].
      micro_batches: Slices of a device's batch whose gradients are added before an
        update.
      unrolled: Whether to unroll the loop over micro-batches: on CPUs, XLA's loops take
        ten times as long.
      average_rate: Rate of the parameter average; None turns the average off.
      frozen: Top-level keys of params that do not train. If not empty, batch_stats is
        frozen too and is used for normalisation.
      shard_state: Whether to divide the optimizer's state over the devices.
      seed: Base of the step's randomness.
      compiler_options: For `jax.jit`; see `models.cpu.compiler_options`.
    """

    apply: Callable[..., tuple[Any, Tree]]
    objective: Objective
    optimizer: optax.GradientTransformation
    learning_rate: Callable[..., Float[Array, ""]]
    restyling: float = 0.0
    augmentation: float = 0.0
    mix_probability: float = 0.0
    micro_batches: int = 1
    unrolled: bool = False
    average_rate: Rate | None = None
    frozen: tuple[str, ...] = ()
    shard_state: bool = False
    seed: int = 0
    compiler_options: CompilerOptions = ()

    @property
    def loop_iterations(self) -> int:
        """Iterations of the loop over micro-batches; 1 if it is unrolled."""
        return 1 if self.unrolled else self.micro_batches


def make_train_step(settings: StepSettings, mesh: Mesh) -> Any:
    """Returns the jitted update over a mesh.

    Returns:
      `train_step(state, batch, label_embeddings) -> (state, metrics)`. The buffers of
      the given state are donated. `label_embeddings` [class, embed] float32 is None
      without an embedding term. Metrics are scalars of the global batch.
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

    def train_step(
        state: TrainState,
        batch: Batch,
        label_embeddings: Float[Array, "class embed"] | None,
    ) -> tuple[TrainState, Metrics]:
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
    # A sharded state keeps the sharding it was made with, which matches `specs` above.
    placed = None if settings.shard_state else whole
    return jax.jit(
        train_step,
        in_shardings=(placed, parts, whole),
        out_shardings=(placed, whole),
        donate_argnums=0,
        compiler_options=dict(settings.compiler_options),
    )


def gradients_of(
    settings: StepSettings,
    state: TrainState,
    batch: Batch,
    label_embeddings: Float[Array, "class embed"] | None,
) -> tuple[Tree, Tree, Metrics]:
    """Returns gradients, BatchNorm statistics and metrics of the global batch.

    For use inside `jax.shard_map`; the results are equal on all devices.
    """
    objective = settings.objective
    images, targets, known = examples(settings, batch)
    example_weights = objective.example_weights(
        targets=targets,
        known=known,
        mask=batch["mask"],
        label_embeddings=label_embeddings,
    )
    totals = _summed(
        {name: jnp.sum(weight) for name, weight in example_weights.items()}
    )
    term_weights = objective.weights(state.stage_step)
    device = jax.lax.axis_index(DATA_AXIS)
    key = jax.random.fold_in(derive_key(settings.seed, "dropout", state.step), device)
    local = Slice(images, targets, known, example_weights)
    local_objective = _local_objective(
        settings, totals, term_weights, label_embeddings, state.stage_step
    )
    gradients, batch_stats, sums = _accumulate(
        settings, local_objective, state, local, key
    )
    num_devices = jax.lax.axis_size(DATA_AXIS)

    def per_device(x: Array) -> Array:
        return x / num_devices

    batch_stats = jax.tree.map(per_device, batch_stats)
    gradients, batch_stats, metrics = _summed((gradients, batch_stats, sums))
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
    """Returns the augmented images and targets of a device, and the known classes."""
    targets, known = settings.objective.targets(
        batch["label_ids"], batch["label_confidences"]
    )
    images = batch["images"]
    if settings.restyling > 0:
        images = restyle(
            images,
            batch["positions"],
            seed=settings.seed,
            strength=settings.restyling,
        )
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


def _local_objective(
    settings: StepSettings,
    totals: dict[str, Float[Array, ""]],
    term_weights: dict[str, Float[Array, ""]],
    label_embeddings: Float[Array, "class embed"] | None,
    stage_step: Array,
) -> LocalObjective:
    """Returns a function whose sum over devices and slices is the global objective."""

    def local_objective(
        params: Tree, batch_stats: Tree, local: Slice, key: jax.Array
    ) -> tuple[Array, tuple[Tree, Metrics]]:
        frozen = {name: jax.lax.stop_gradient(params[name]) for name in settings.frozen}
        outputs, batch_stats = settings.apply(
            params | frozen,
            batch_stats,
            local.images,
            train=not frozen,
            key=key,
        )
        per_example = settings.objective.losses(
            logits=outputs.logits,
            embedding=outputs.embedding,
            targets=local.targets,
            known=local.known,
            label_embeddings=label_embeddings,
            stage_step=stage_step,
        )
        parts = {
            name: jnp.sum(loss * local.weights[name]) / jnp.maximum(totals[name], 1.0)
            for name, loss in per_example.items()
        }
        weighted = [term_weights[name] * part for name, part in parts.items()]
        value = cast(Array, sum(weighted))
        return value, (batch_stats, {"objective": value, **_prefixed("loss", parts)})

    return local_objective


def _accumulate(
    settings: StepSettings,
    local_objective: LocalObjective,
    state: TrainState,
    local: Slice,
    key: jax.Array,
) -> tuple[Tree, Tree, Metrics]:
    """Adds up gradients and metrics over slices of this device's shard of the batch."""
    micro_batches = settings.micro_batches
    # Marked as varying between devices: otherwise differentiation inserts an all-reduce
    # for every parameter, in the compute dtype.
    params, batch_stats = _varying((state.params, state.batch_stats))
    differentiate = cast(
        Callable[..., tuple[Tree, tuple[Tree, Metrics]]],
        jax.grad(local_objective, has_aux=True),
    )
    if micro_batches == 1:
        gradients, (batch_stats, sums) = differentiate(params, batch_stats, local, key)
        return gradients, batch_stats, sums

    def divided_up(x: Array) -> Array:
        return x.reshape(micro_batches, x.shape[0] // micro_batches, *x.shape[1:])

    def first_of(x: Array) -> Array:
        return x[0]

    def zeros_like(x: jax.ShapeDtypeStruct) -> Array:
        return jnp.zeros(x.shape, x.dtype)

    def one(
        carry: tuple[Tree, Tree, Metrics], inputs: tuple[Slice, Array]
    ) -> tuple[tuple[Tree, Tree, Metrics], None]:
        gradients, batch_stats, sums = carry
        piece, index = inputs
        more, (batch_stats, parts) = differentiate(
            params, batch_stats, piece, jax.random.fold_in(key, index)
        )
        added = jax.tree.map(jnp.add, (gradients, sums), (more, parts))
        return (added[0], batch_stats, added[1]), None

    slices = jax.tree.map(divided_up, local)
    first = jax.tree.map(first_of, slices)
    shapes = jax.eval_shape(differentiate, params, batch_stats, first, key)
    zeros = _varying(jax.tree.map(zeros_like, (shapes[0], shapes[1][1])))
    indices = jnp.arange(micro_batches, dtype=jnp.uint32)
    start = zeros[0], batch_stats, zeros[1]
    found, _ = jax.lax.scan(one, start, (slices, indices), unroll=settings.unrolled)
    return found


def _summed(tree: T) -> T:
    """Returns the sum over devices of every array."""
    return cast(T, jax.lax.psum(tree, DATA_AXIS))


def _varying(tree: T) -> T:
    """Returns the tree marked as differing between devices."""
    return cast(T, jax.lax.pcast(tree, DATA_AXIS, to="varying"))


def _update(
    settings: StepSettings,
    state: TrainState,
    gradients: Tree,
    batch_stats: Tree,
    metrics: Metrics,
) -> tuple[TrainState, Metrics]:
    """Applies the optimizer, or skips the update if a gradient is not finite.

    The objective and BatchNorm's statistics must be finite too, because gradients are
    zero where a variance overflows. All are sums over devices, so all devices decide
    alike. A skipped update uses up its batch and increments `stage_step`, on which the
    learning rate, the objective's weights and the rate of the average depend.
    """
    norm = optax.tree.norm(gradients)
    finite = _all_finite((norm, metrics["objective"], batch_stats))
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
    # Weight decay would move parameters without a gradient.
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


def _all_finite(tree: Tree) -> Bool[Array, ""]:
    # XLA repeats a sum of scalars in the code of every parameter's update, which makes
    # up half of the step's code; it computes the reduction of an array once.
    sums = jnp.stack([jnp.sum(leaf) for leaf in jax.tree.leaves(tree)])
    return jnp.all(jnp.isfinite(sums))


def _keep_if(condition: Bool[Array, ""], new: Tree, old: Tree) -> Tree:
    def keep(new: Array, old: Array) -> Array:
        return jnp.where(condition, new, old)

    return jax.tree.map(keep, new, old)


def _prefixed(prefix: str, values: dict[str, jax.Array]) -> Metrics:
    return {f"{prefix}/{name}": value for name, value in values.items()}
