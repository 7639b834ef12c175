"""Averages of the parameters over a stage, evaluated in place of the parameters.

After every update, including skipped ones, the train step moves the average towards the
parameters by `rate`, a function of only the stage's step.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxii.train.state import Tree

# A function of `stage_step`, the updates of the stage so far.
Rate = Callable[[Int[Array, ""]], Float[Array, ""]]


def ema_rate(decay: float) -> Rate:
    """Returns the rate of an exponential moving average with warm-up.

    Args:
      decay: Share of the average that a step keeps, in [0, 1); lower in early steps.
    """

    def rate(stage_step: Int[Array, ""]) -> Float[Array, ""]:
        step = stage_step.astype(jnp.float32)
        return 1.0 - jnp.minimum(jnp.float32(decay), (1.0 + step) / (10.0 + step))

    return rate


def swa_rate(num_steps: int, share: float) -> Rate:
    """Returns the rate of a uniform average over a stage's last part.

    Before that part the average equals the parameters.

    Args:
      num_steps: Updates in the stage.
      share: Share of the updates that are averaged, in [0, 1].

    Source: Izmailov et al. 2018, https://arxiv.org/abs/1803.05407, algorithm 1, with
      cycle length 1.
    """
    first = num_steps - round(share * num_steps)

    def rate(stage_step: Int[Array, ""]) -> Float[Array, ""]:
        averaged = jnp.maximum(stage_step - first + 1, 1)
        return 1.0 / averaged.astype(jnp.float32)

    return rate


def move(average: Tree, params: Tree, rate: Float[Array, ""]) -> Tree:
    """Returns the average moved towards `params`; with rate 1, returns `params`."""
    return jax.tree.map(lambda a, p: (1.0 - rate) * a + rate * p, average, params)
