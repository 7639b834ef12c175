"""What a run takes of its machine: memory, and arithmetic a step.

`telemetry` records it beside the speed; the loop and the command ask here.
"""

import sys
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
