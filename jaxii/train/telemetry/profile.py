"""A trace of some steps of a run, for TensorBoard and Perfetto.

The loop says at which step it is; nothing is traced, and nothing waits, at any other.
"""

from pathlib import Path
from typing import Any

import jax


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
