"""A stage's train step, compiled for devices that need not be there, and its figures.

Comes after the topology and before the roofline. What is compiled is what training
runs: `jaxii.train.step.make_train_step`, on shapes in place of arrays, which lie as
training lays them.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh

from jaxii.planner.collectives import Collective, collectives
from jaxii.planner.hlo import parse
from jaxii.planner.traffic import memory_bytes
from jaxii.train.run import StagePlan
from jaxii.train.sharding import state_shapes
from jaxii.train.step import make_train_step

# Of the two ways in which XLA says it.
_NUMBERS = re.compile(r"[\d.]+[KMG] of [\d.]+[KMG]|exceeds available")

Shapes = Mapping[str, jax.ShapeDtypeStruct]


class DoesNotFit(Exception):
    """The program needs more memory than a device has; in the compiler's words."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one device does in one step.

    Attributes:
      argument_bytes: state and batch.
      output_bytes: of the new state, what does not take the place of the old.
      temporary_bytes: activations, gradients and whatever else the step forgets.
      program_bytes: instructions.
      flops: operations.
      hbm_bytes: read from the device's memory and written to it.
      accessed_bytes: the compiler's own count, with what moves within the chip.
      collectives: in the program's order.
    """

    argument_bytes: float
    output_bytes: float
    temporary_bytes: float
    program_bytes: float
    flops: float
    hbm_bytes: float
    accessed_bytes: float
    collectives: tuple[Collective, ...]

    @property
    def total_bytes(self) -> float:
        """Memory of a device while the step runs."""
        return (
            self.argument_bytes
            + self.output_bytes
            + self.temporary_bytes
            + self.program_bytes
        )


def step_compiler(
    plan: StagePlan, mesh: Mesh, label_embeddings: jax.ShapeDtypeStruct | None
) -> Callable[[Shapes], Figures]:
    """Returns a function that compiles the step for the shapes of a batch.

    Args:
      plan: of a stage.
      mesh: the devices.
      label_embeddings: shape of what the step is given, None without embedding head.

    Returns:
      `compile(batch) -> Figures`, of seconds to minutes; raises `DoesNotFit`.
    """

    shapes = jax.eval_shape(plan.fresh_state, jax.random.key(0))
    state = state_shapes(shapes, mesh, plan.settings.shard_state)
    train_step = make_train_step(plan.settings, mesh)

    def compile(batch: Shapes) -> Figures:
        lowered = train_step.lower(state, dict(batch), label_embeddings)
        return figures_of(lowered, plan.settings.micro_batches)

    return compile


def _words(error: Exception) -> str:
    """Returns the sentence of the compiler's report that has the numbers."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if _NUMBERS.search(line)]
    return (told or lines)[0]


def figures_of(lowered: Any, micro_batches: int = 1) -> Figures:
    """Compiles a lowered step and tells what it takes; raises `DoesNotFit`."""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(_words(error)) from error
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
    module = parse(compiled.as_text())
    # XLA counts a loop's body once. The only loop is that over micro-batches; to count
    # what is outside of it as often is to overstate the update a little.
    return Figures(
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        program_bytes=memory.generated_code_size_in_bytes,
        flops=costs["flops"] * micro_batches,
        hbm_bytes=memory_bytes(module, micro_batches),
        accessed_bytes=costs["bytes accessed"] * micro_batches,
        collectives=tuple(
            replace(c, times=micro_batches if c.in_loop else 1)
            for c in collectives(module)
        ),
    )
