"""Memory, arithmetic and traces of a run's steps."""

import sys
from pathlib import Path
from typing import Any

import jax

try:
    import resource
except ImportError:  # not on Windows
    resource = None


def memory_bytes() -> dict[str, float]:
    """Returns the most memory taken so far, in bytes.

    `host_memory_bytes` of this process, and `device_memory_bytes` of the fullest of its
    devices; the latter only where devices count it, which CPUs do not.
    """
    found = {}
    if resource is not None:
        # Kilobytes, but for macOS.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found["host_memory_bytes"] = float(peak * unit)
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    if peaks:
        found["device_memory_bytes"] = float(max(peaks))
    return found


def step_flops(train_step: Any, *given: Any) -> float:
    """Returns the operations of a train step on one device, as the compiler counts.

    Compiles it again, or takes it from the persistent cache: seconds, once a stage.

    Args:
      train_step: compiled with `jax.jit`.
      given: its arguments, or their shapes. Of a loop over micro-batches one turn is
        counted.
    """
    costs = train_step.lower(*given).compile().cost_analysis() or {}
    return float(costs.get("flops", 0.0))


class Profiler:
    """Traces the updates between two steps into a folder, with jax.profiler.

    Args:
      folder: where to; TensorBoard reads it, and Perfetto the *.trace.json.gz in it.
      first: step after which the trace starts.
      last: step after which it ends; `first` or less traces nothing.
    """

    def __init__(self, folder: Path = Path(), first: int = 0, last: int = 0):
        self._folder, self._first, self._last = folder, first, last
        self._tracing = self._traced = False

    def at(self, step: int, computed: Any) -> None:
        """Starts or ends the trace where that is due.

        Args:
          step: updates done in the whole run.
          computed: arrays of the newest update, which is waited for at either end, so
            that the trace holds whole steps.
        """
        if self._tracing and step >= self._last:
            jax.block_until_ready(computed)
            self._stop()
        elif not self._tracing and self._first <= step < self._last:
            jax.block_until_ready(computed)
            jax.profiler.start_trace(self._folder)
            self._tracing = True

    def close(self) -> str:
        """Ends a trace that is still going on; returns what came of it, "" for none."""
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
