"""How far a run is, on a terminal or in a job's log: what telemetry draws with."""

import math
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

STAGE_WIDTH = 10
GAP = "  "


class Lines:
    """One plain line for each log: for pipes, files and job logs."""

    def __init__(self, stream: Any):
        self._stream = stream

    def show(self, parts, *, stage, run, seconds_per_step) -> None:
        """Prints figures; `stage` is (name, step, steps) and `run` (step, steps)."""
        eta = _duration((run[1] - run[0]) * seconds_per_step)
        self.print(GAP.join([f"{stage[0]:<{STAGE_WIDTH}}", *parts, f"eta {eta}"]))

    def print(self, text: str) -> None:
        """Prints a line."""
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Writes out what is held back."""
        self._stream.flush()


class Bars:
    """Two bars (stage and run) over a line of figures; colours obey NO_COLOR."""

    def __init__(self, stream: Any):
        self._console = Console(file=stream)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}  eta {task.fields[eta]}"),
            console=self._console,
        )
        self._bars = [self._progress.add_task("", total=1, eta="-") for _ in range(2)]
        self._status = Text()
        self._live = Live(
            Group(self._progress, self._status),
            console=self._console,
            refresh_per_second=4,
        )
        self._live.start()

    def show(self, parts, *, stage, run, seconds_per_step) -> None:
        """Moves the bars; `stage` is (name, step, steps) and `run` (step, steps)."""
        rows = (stage, ("whole run", *run))
        for bar, (name, done, total) in zip(self._bars, rows, strict=True):
            eta = _duration((total - done) * seconds_per_step)
            self._progress.update(
                bar, description=name, completed=done, total=total, eta=eta
            )
        self._status.plain = GAP.join(parts[1:])

    def print(self, text: str) -> None:
        """Prints a line above the bars."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leaves the terminal as it is."""
        self._live.stop()


def _duration(seconds: float) -> str:
    """`1h02m`, `1m20s` or `45s`; `-` where it is not known."""
    if not math.isfinite(seconds):
        return "-"
    whole = max(round(seconds), 0)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
