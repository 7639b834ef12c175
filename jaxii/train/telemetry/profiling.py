"""Measures memory and operations of train steps, and traces them."""

import math
import sys
from pathlib import Path
from typing import Any

import jax

try:
    import resource
except ImportError:  # not on Windows
    resource = None


def memory_bytes() -> dict[str, float]:
    """Returns the peak memory so far.

    `host_memory_bytes` is the peak of this process, `device_memory_bytes` the largest
    peak of its devices; CPUs do not report the latter.
    """
    found = {}
    if resource is not None:
        # Kilobytes, except on macOS.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found["host_memory_bytes"] = float(peak * unit)
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    if peaks:
        found["device_memory_bytes"] = float(max(peaks))
    return found


def step_flops(train_step: Any, *given: Any) -> float:
    """Returns the number of operations of a train step on one device.

    On GPUs, this is `product_flops`, because their compiler leaves out calls of cuBLAS
    and cuDNN (https://github.com/jax-ml/jax/issues/22249). On other devices, it is the
    compiler's count, which takes seconds: compiles the step again, or reads the
    persistent cache.

    Args:
      train_step: A jitted function. A loop over micro-batches counts as one iteration.
      given: Arguments of `train_step`, or their shapes.
    """
    if jax.default_backend() == "gpu":
        return product_flops(train_step.trace(*given).jaxpr)
    costs = train_step.lower(*given).compile().cost_analysis() or {}
    return float(costs.get("flops", 0.0))


def product_flops(jaxpr: Any) -> float:
    """Returns the operations of a program's matrix products and convolutions.

    Under `jax.shard_map`, these are the operations of one device. As in XLA's count, a
    loop counts as one iteration unless it is unrolled. Products with padding count too.

    Args:
      jaxpr: For example `jax.jit(f).trace(...).jaxpr`.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name in _TERMS:
            terms = _TERMS[equation.primitive.name](equation)
            total += 2.0 * equation.outvars[0].aval.size * terms
        copies = equation.params.get("unroll", 1)
        for inner in jax.tree.leaves(equation.params):
            if hasattr(inner, "eqns"):
                total += copies * product_flops(inner)
    return total


def _dot_terms(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return math.prod(shape[axis] for axis in contracted)


def _convolution_terms(equation: Any) -> float:
    kernel, params = equation.invars[1].aval, equation.params
    num_outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
    # The input gradient of a strided convolution dilates its input with zeros.
    return kernel.size / num_outputs / math.prod(params["lhs_dilation"])


# Primitive -> function that returns the number of products summed in each output.
_TERMS = {"dot_general": _dot_terms, "conv_general_dilated": _convolution_terms}


class Profiler:
    """Traces the updates between two steps into a folder, with jax.profiler.

    Args:
      folder: Folder for TensorBoard; Perfetto reads the *.trace.json.gz in it.
      first: Step after which the trace starts.
      last: Step after which the trace ends; `first` or less traces nothing.
    """

    def __init__(self, folder: Path = Path(), first: int = 0, last: int = 0):
        self._folder, self._first, self._last = folder, first, last
        self._step, self._computed = 0, None
        self._start: int | None = None
        self._end: int | None = None

    def at(self, step: int) -> None:
        """Starts or ends the trace if this step is its first or last.

        Args:
          step: Updates done in the whole run.
        """
        self._step = step
        if self._tracing and step >= self._last:
            self._stop()
        elif not self._tracing and self._first <= step < self._last:
            jax.block_until_ready(self._computed)
            jax.profiler.start_trace(self._folder)
            self._start = step

    def updated(self, step: int, computed: Any) -> None:
        """Records the newest update.

        Args:
          step: Updates done in the whole run.
          computed: An array of the newest update, awaited before the trace starts or
            ends so that it holds whole steps.
        """
        self._step, self._computed = step, computed

    def close(self) -> str:
        """Ends a running trace; returns a message about it, "" if none was planned."""
        if self._tracing:
            self._stop()
        if self._start is not None:
            return f"profile of steps {self._start} to {self._end}: {self._folder}"
        if self._first < self._last:
            return (
                f"no profile: this process did not train steps {self._first} to "
                f"{self._last}"
            )
        return ""

    @property
    def _tracing(self) -> bool:
        return self._start is not None and self._end is None

    def _stop(self) -> None:
        self._end = self._step
        try:
            jax.block_until_ready(self._computed)
        finally:
            jax.profiler.stop_trace()
