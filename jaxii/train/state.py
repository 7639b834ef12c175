"""The training state: everything that a run changes from step to step.

`new_state` makes it at the start of a stage, `jaxii.train.step` advances it, and
`jaxii.train.checkpoint` saves it. It contains no random key: randomness is derived from
(seed, purpose, step).
"""

import zlib
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

Tree = Any
# An int32 scalar, or its shape (`jax.eval_shape`), as for every other leaf.
Count = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything the next step depends on, apart from the batch and the configuration.

    Attributes:
      step: updates done in the whole run, including skipped ones.
      stage_step: the same for this stage; every schedule is a function of `stage_step`.
      params: float32 parameters, a nested dict.
      batch_stats: BatchNorm's running statistics, averaged over devices.
      opt_state: the optimizer's state; fresh at the start of a stage.
      average_params: average of `params` over the stage; None without averaging.
      skipped_steps: updates skipped in this stage because they were not finite.
      skipped_in_a_row: consecutive skipped updates, up to the last update.
    """

    step: Count
    stage_step: Count
    params: Tree
    batch_stats: Tree
    opt_state: Tree
    average_params: Tree
    skipped_steps: Count
    skipped_in_a_row: Count

    def params_to_evaluate(self) -> Tree:
        """Returns the averaged parameters if there are any, else the parameters."""
        return self.params if self.average_params is None else self.average_params


def new_state(
    *,
    params: Tree,
    batch_stats: Tree,
    optimizer: optax.GradientTransformation,
    step: int,
    with_average: bool,
) -> TrainState:
    """Returns the state at the start of a stage that begins after `step` updates."""

    def count(value: int) -> Int[Array, ""]:
        return jnp.asarray(value, jnp.int32)

    return TrainState(
        step=count(step),
        stage_step=count(0),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        # A copy, because the step donates the buffers of its input state.
        average_params=jax.tree.map(jnp.copy, params) if with_average else None,
        skipped_steps=count(0),
        skipped_in_a_row=count(0),
    )


def at_stage_step(state: TrainState, stage_step: int) -> TrainState:
    """Returns a restored state with another `stage_step`, the input of all schedules.

    The value differs from the saved one only if the batch size has changed, as the same
    examples are then another number of steps. The optimizer keeps its own counts.
    """
    return replace(state, stage_step=jnp.full_like(state.stage_step, stage_step))


def derive_key(seed: int, purpose: str, step: int | Int[Array, ""] = 0) -> jax.Array:
    """Returns the key of a purpose at a step; equal arguments give equal keys."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))
    return jax.random.fold_in(key, step)
