"""Measures memory and operations of train steps, and traces them."""

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
    """Returns the compiler's count of a train step's operations on one device.

    Takes seconds: compiles the step again, or reads the persistent cache.

    Args:
      train_step: A jitted function. A loop over micro-batches counts as one iteration.
      given: Arguments of `train_step`, or their shapes.
    """
    costs = train_step.lower(*given).compile().cost_analysis() or {}
    return float(costs.get("flops", 0.0))


class Profiler:
    """Traces the updates between two steps into a folder, with jax.profiler.

    Args:
      folder: Folder for TensorBoard; Perfetto reads the *.trace.json.gz in it.
      first: Step after which the trace starts.
      last: Step after which the trace ends; `first` or less traces nothing.
    """

    def __init__(self, folder: Path = Path(), first: int = 0, last: int = 0):
        self._folder, self._first, self._last = folder, first, last
        self._tracing = self._traced = False

    def at(self, step: int, computed: Any) -> None:
        """Starts or ends the trace if this step is its first or last.

        Args:
          step: Updates done in the whole run.
          computed: Arrays of the newest updates, awaited so that the trace holds whole
            steps.
        """
        if self._tracing and step >= self._last:
            jax.block_until_ready(computed)
            self._stop()
        elif not self._tracing and self._first <= step < self._last:
            jax.block_until_ready(computed)
            jax.profiler.start_trace(self._folder)
            self._tracing = True

    def close(self) -> str:
        """Ends a running trace; returns a message about it, "" if none was planned."""
        if self._tracing:
            self._stop()
        if self._traced:
            return f"profile of steps {self._first} to {self._last}: {self._folder}"
        if self._first < self._last:
            return (
                f"no profile: steps {self._first} to {self._last} were not among those "
                "that were trained"
            )
        return ""

    def _stop(self) -> None:
        self._tracing = False
        jax.profiler.stop_trace()
        self._traced = True
