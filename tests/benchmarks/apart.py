"""Runs work in its own process, so that its peak memory can be measured."""

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from tests.benchmarks.table import Row, emit


def run(words: Sequence[str]) -> Any:
    """Runs a command; returns the JSON of its last line of output."""
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_module(name: str, *args: str) -> Any:
    """Runs another benchmark, or this one with other flags; returns as `run` does."""
    return run([sys.executable, "-m", f"tests.benchmarks.{name}", *args])


def gigabytes() -> float:
    """Returns this process's peak resident memory so far."""
    # The unit is KiB on Linux and bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def emit_limits(
    what: str, seconds: float, max_seconds: float, peak: float, max_peak: float
) -> None:
    """Emits the rows of work that has a limit of time and of memory, in GB."""
    emit(
        Row(what, f"{seconds:.1f} s", "", seconds, "<=", max_seconds, "s"),
        Row(f"{what}: peak memory", f"{peak:.2f} GB", "", peak, "<=", max_peak, "GB"),
    )
