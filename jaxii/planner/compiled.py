"""Compiles a run's train step for devices that need not be present."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh

from jaxii.planner.hlo import Collective, collectives, memory_bytes, parse
from jaxii.planner.topology import GIB
from jaxii.train.sharding import state_shapes
from jaxii.train.step import make_train_step
from jaxii.train.telemetry.profiling import product_flops
from jaxii.train.trainer import StagePlan

# Matches both wordings of XLA's out-of-memory message.
_MEMORY_REPORT = re.compile(r"[\d.]+[KMG] of [\d.]+[KMG]|exceeds available")
# Batch sizes are tried in multiples of 8, the tile size of a TPU's memory.
BATCH_MULTIPLE = 8

Shapes = Mapping[str, jax.ShapeDtypeStruct]


class DoesNotFit(Exception):
    """The program needs more memory than a device has; the message says how much."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Memory and work of one train step on one device.

    Attributes:
      argument_bytes: State and batch.
      output_bytes: Outputs that do not reuse the memory of an argument.
      temporary_bytes: Activations, gradients and other intermediate values.
      program_bytes: Machine code.
      flops: Floating-point operations; on a GPU those of `product_flops`.
      hbm_bytes: Bytes read from and written to the device's memory.
      collectives: Collective operations, in program order.
    """

    argument_bytes: float
    output_bytes: float
    temporary_bytes: float
    program_bytes: float
    flops: float
    hbm_bytes: float
    collectives: tuple[Collective, ...]

    @property
    def total_bytes(self) -> float:
        """Device memory in use while the step runs."""
        return (
            self.argument_bytes
            + self.output_bytes
            + self.temporary_bytes
            + self.program_bytes
        )


def step_compiler(
    plan: StagePlan,
    mesh: Mesh,
    label_embeddings: jax.ShapeDtypeStruct | None,
    hbm_bytes: float | None = None,
) -> Callable[[Shapes], Figures]:
    """Returns a function that compiles the train step for given batch shapes.

    Args:
      plan: The stage.
      mesh: The devices.
      label_embeddings: Shape [class, dim]; None without an embedding head.
      hbm_bytes: Memory of a device; None if unknown.

    Returns:
      `compile(batch) -> Figures`. It takes seconds to minutes and raises `DoesNotFit`.
    """
    shapes = jax.eval_shape(plan.fresh_state, jax.random.key(0))
    state = state_shapes(shapes, mesh, plan.settings.shard_state)
    train_step = make_train_step(plan.settings, mesh)

    def compile(batch: Shapes) -> Figures:
        given = state, dict(batch), label_embeddings
        iterations = plan.settings.loop_iterations
        figures = figures_of(train_step.lower(*given), iterations, hbm_bytes)
        if not _is_gpu(mesh):
            return figures
        flops = product_flops(train_step.trace(*given).jaxpr)
        return replace(figures, flops=flops * iterations)

    return compile


def figures_of(
    lowered: Any, iterations: int = 1, hbm_bytes: float | None = None
) -> Figures:
    """Compiles a lowered step and returns its figures.

    Args:
      lowered: The step.
      iterations: Iterations of the step's loop over micro-batches; 1 without a loop.
      hbm_bytes: Memory of a device; None if unknown. The compilers of GPUs and CPUs do
        not refuse a program that needs more.

    Raises:
      DoesNotFit: If the program needs more memory than a device has.
    """
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        lines = [line.strip() for line in str(error).splitlines()]
        reports = [line for line in lines if _MEMORY_REPORT.search(line)]
        raise DoesNotFit((reports or lines)[0]) from error
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
    module = parse(compiled.as_text())
    # XLA counts a loop's body once. The only loop is the one over micro-batches.
    # Multiplying all FLOPs by `iterations` overstates the optimizer update slightly.
    figures = Figures(
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        program_bytes=memory.generated_code_size_in_bytes,
        flops=costs["flops"] * iterations,
        hbm_bytes=memory_bytes(module, iterations),
        collectives=collectives(module, iterations),
    )
    if hbm_bytes is not None and figures.total_bytes > hbm_bytes:
        raise DoesNotFit(
            f"needs {figures.total_bytes / GIB:.2f} GiB, but a device has "
            f"{hbm_bytes / GIB:.2f} GiB"
        )
    return figures


def _is_gpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "gpu"


def largest_batch(
    total_bytes: Callable[[int], float | None],
    *,
    start: int,
    hbm_bytes: float,
    micro_batches: int = 1,
) -> tuple[int, float] | None:
    """Returns the largest batch per device that was compiled, and its memory in bytes.

    Extrapolates the memory of two batch sizes linearly and compiles the predicted size;
    while a size does not fit, reduces it by an eighth.

    Args:
      total_bytes: Compiles a batch size and returns its memory, or None if it does not
        fit.
      start: First batch size to try; a multiple of `micro_batches`.
      hbm_bytes: Memory of a device.
      micro_batches: Micro-batches of a step; every size tried is a multiple of it.

    Returns:
      None if one image per micro-batch does not fit.
    """
    # Only two small sizes are compiled before the prediction: close to the limit, XLA
    # searches for values to recompute, which takes up to a quarter of an hour.
    unit = math.lcm(BATCH_MULTIPLE, micro_batches)
    known: dict[int, float] = {}

    def fits(size: int) -> bool:
        if size not in known:
            known[size] = total_bytes(size) or math.inf
        return known[size] < math.inf

    def halved(size: int) -> int:
        return max(size // 2 // micro_batches, 1) * micro_batches

    while not fits(start):
        if start <= micro_batches:
            return None
        start = halved(start)
    size, low = start, halved(start)
    if low == start or not fits(low):
        low, start = start, 2 * start
    if fits(start):
        slope = (known[start] - known[low]) / (start - low)
        free = hbm_bytes - known[start]
        size = (start + int(free / max(slope, 1.0))) // unit * unit
        while size > start and not fits(size):
            size = size * 7 // 8 // unit * unit
        size = max(size, start)
    return size, known[size]
