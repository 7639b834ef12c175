"""What a run changes from step to step, and nothing else.

Made by `new_state` at the start of a stage, advanced by `jaxii.train.step`, saved by
`jaxii.train.checkpoint`. There is no random key in it: randomness is derived from
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
# An int32 scalar; like every other leaf it may be the shape of one (jax.eval_shape).
Count = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything the next step depends on, apart from the batch and the configuration.

    Attributes:
      step: updates done in the whole run, those that were skipped included.
      stage_step: the same in this stage. Every schedule is a function of it.
      params: float32 parameters, a nested dict.
      batch_stats: BatchNorm's running statistics, the mean over devices.
      opt_state: the optimizer's state; fresh at the start of a stage.
      average_params: average of `params` over the stage; None when it is off.
      skipped_steps: updates skipped for non-finite gradients in this stage.
      skipped_in_a_row: the same, since the last good one.
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
        """Returns the averaged parameters where there are some, else the parameters."""
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
        # A copy: the step gives away the buffers of its input state.
        average_params=jax.tree.map(jnp.copy, params) if with_average else None,
        skipped_steps=count(0),
        skipped_in_a_row=count(0),
    )


def at_stage_step(state: TrainState, stage_step: int) -> TrainState:
    """Returns a restored state whose schedules stand at a step of the stage.

    That is where they stand already, unless the batch has another size than when it was
    saved: then so many of the new steps have been done. Moments keep their own counts.
    """
    return replace(state, stage_step=jnp.full_like(state.stage_step, stage_step))


def derive_key(seed: int, purpose: str, step: int | Int[Array, ""] = 0) -> jax.Array:
    """Returns the key of one purpose at one step: the same whenever it is asked for."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))
    return jax.random.fold_in(key, step)
