"""Averages of the parameters along a stage, which are evaluated in their place.

The train step moves the average after every update: by `rate` of the way from where it
is to the parameters. A rate is a schedule of the stage's step alone, so that a run
which is resumed goes on with the same average. After an update that was skipped the
average moves as well, towards the parameters as they stayed.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxii.train.state import Tree

# Of `stage_step`: the steps of the stage before this one.
Rate = Callable[[Int[Array, ""]], Float[Array, ""]]


def ema_rate(decay: float) -> Rate:
    """Returns the rate of an exponential moving average.

    Early on it moves faster, so that it does not remember the start.

    Args:
      decay: what a step keeps of the average, in [0, 1).
    """

    def rate(stage_step: Int[Array, ""]) -> Float[Array, ""]:
        step = stage_step.astype(jnp.float32)
        return 1.0 - jnp.minimum(jnp.float32(decay), (1.0 + step) / (10.0 + step))

    return rate


def swa_rate(num_steps: int, share: float) -> Rate:
    """Returns the rate of a uniform average over a stage's last part.

    Until then the average is the parameters themselves.

    Args:
      num_steps: updates in the stage.
      share: of them that are averaged, in [0, 1].

    Source: Izmailov et al. 2018, https://arxiv.org/abs/1803.05407, algorithm 1, with
      the cycle length 1 that it gives for learning rates without cycles.
    """
    first = num_steps - round(share * num_steps)

    def rate(stage_step: Int[Array, ""]) -> Float[Array, ""]:
        averaged = jnp.maximum(stage_step - first + 1, 1)
        return 1.0 / averaged.astype(jnp.float32)

    return rate


def move(average: Tree, params: Tree, rate: Float[Array, ""]) -> Tree:
    """Returns the average moved towards the parameters; at rate 1 it is they."""
    return jax.tree.map(lambda a, p: (1.0 - rate) * a + rate * p, average, params)
