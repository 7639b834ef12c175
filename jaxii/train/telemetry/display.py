"""How far a run is, on a terminal or in a job's log: what telemetry draws with.

Nothing here asks a device: all of it is host numbers of the last log, and the clock.
"""

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

STAGE_WIDTH = 10
GAP = "  "
NO_BREAK = "\u00a0"
# Columns of a terminal below which there is no room for bars.
LEAST_FOR_BARS = 60


@dataclass(frozen=True, kw_only=True)
class Part:
    """How far a stage is, or the whole run.

    Attributes:
      name: of it.
      step: updates done of it.
      num_steps: updates of it; the most, where it may end early.
      may_end_early: whether a plateau of the metric would end it, or a part of it.
    """

    name: str
    step: int
    num_steps: int
    may_end_early: bool = False

    def eta(self, seconds_per_step: float) -> str:
        """Returns the time that is left, `at most` where it may end early."""
        left = _duration((self.num_steps - self.step) * seconds_per_step)
        return f"at most {left}" if self.may_end_early and left != "-" else left


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a run stands at a log; NaN and None are what is not known.

    Attributes:
      stage: the one that runs.
      run: all of them.
      seconds_per_step: wall time, evaluations included.
      objective: mean since the log before.
      images_per_second: evaluations left out.
      input_wait: share of the time in which the loop stood still for want of a batch.
      mfu: share of the device's peak.
      memory_bytes: taken at most.
      skipped: updates that were left out, their gradients not being finite.
    """

    stage: Part
    run: Part
    seconds_per_step: float
    objective: float | None
    images_per_second: float
    input_wait: float
    mfu: float | None
    memory_bytes: float | None
    skipped: int


@dataclass(frozen=True)
class Evaluated:
    """F2 on `validation` at the last evaluation, and the best so far with its step."""

    f2: float
    best_f2: float
    best_step: int


@dataclass(frozen=True)
class SavedAt:
    """A checkpoint: its step, and by the display's clock when it was saved.

    NaN seconds: by an earlier process.
    """

    step: int
    seconds: float


def can_draw(stream: Any) -> bool:
    """Says whether a stream is a terminal on which a panel can be drawn anew."""
    if not stream.isatty():
        return False
    console = Console(file=stream)
    # Rules and ellipses need Unicode; a terminal may say that it is 0 columns wide.
    is_unicode = console.encoding.startswith("utf")
    return console.is_interactive and is_unicode and console.width > 0


class Lines:
    """One plain line for each log: for pipes, files and job logs."""

    def __init__(self, stream: Any):
        self._stream = stream
        self._evaluated: Evaluated | None = None
        self._saved: SavedAt | None = None

    def show(self, standing: Standing) -> None:
        """Prints where the run stands."""
        run = standing.run
        width = len(str(run.num_steps))
        parts = [
            f"{standing.stage.name:<{STAGE_WIDTH}}",
            f"step {run.step:>{width}}/{run.num_steps}",
        ]
        if standing.objective is not None:
            parts.append(f"objective {standing.objective:<8.4g}")
        f2 = "-" if self._evaluated is None else f"{self._evaluated.f2:.3f}"
        parts.append(f"f2 {f2:<5}")
        parts.append(f"images/s {standing.images_per_second:<6.4g}")
        parts.append(f"wait {standing.input_wait:>3.0%}")
        if standing.mfu is not None:
            parts.append(f"mfu {standing.mfu:>3.0%}")
        if standing.memory_bytes is not None:
            parts.append(f"mem {standing.memory_bytes / 2**30:.1f}G")
        if self._saved is not None:
            parts.append(f"saved {self._saved.step}")
        if standing.skipped:
            parts.append(f"skipped {standing.skipped}")
        parts.append(f"eta {run.eta(standing.seconds_per_step)}")
        self.print(GAP.join(parts))

    def evaluated(self, evaluated: Evaluated) -> None:
        """Notes the last evaluation."""
        self._evaluated = evaluated

    def saved(self, saved: SavedAt | None) -> None:
        """Notes the last checkpoint; None = there is none."""
        self._saved = saved

    def print(self, text: str) -> None:
        """Prints a line."""
        print(text, file=self._stream, flush=True)

    def print_parts(self, parts: Sequence[str]) -> None:
        """Prints what belongs together, in one line."""
        self.print(GAP.join(parts))

    def close(self) -> None:
        """Writes out what is held back."""
        self._stream.flush()


class Panel:
    """Two bars (stage and run) over lines of figures; a renderable of rich.

    Every line fits the terminal: bars give way first, then the ends of lines.

    Args:
      clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self.standing: Standing | None = None
        self.evaluated: Evaluated | None = None
        self.saved: SavedAt | None = None

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[Table | Text]:
        standing = self.standing
        if standing is None:
            return
        bars = Table.grid(padding=(0, 2), pad_edge=False, expand=True)
        wide = options.max_width >= LEAST_FOR_BARS
        for ratio in (None, 1, None, None, None) if wide else (None, None, None):
            bars.add_column(no_wrap=True, ratio=ratio)
        for part in (standing.stage, standing.run):
            cells = [
                part.name,
                ProgressBar(total=part.num_steps, completed=part.step),
                f"{part.step / max(part.num_steps, 1):>4.0%}",
                f"{part.step}/{part.num_steps}",
                f"eta {part.eta(standing.seconds_per_step)}",
            ]
            bars.add_row(*cells if wide else (cells[0], *cells[3:]))
        yield bars
        for line in (
            self._learning(standing),
            _speed(standing),
            self._safety(standing),
        ):
            yield Text(GAP.join(line), no_wrap=True, overflow="ellipsis")

    def _learning(self, standing: Standing) -> list[str]:
        parts = []
        if standing.objective is not None:
            parts.append(f"objective {standing.objective:.4g}")
        if self.evaluated is not None:
            parts.append(f"validation f2 {self.evaluated.f2:.3f}")
            best, step = self.evaluated.best_f2, self.evaluated.best_step
            parts.append(f"best {best:.3f} at step {step}")
        return parts

    def _safety(self, standing: Standing) -> list[str]:
        parts = ["nothing saved yet"]
        if self.saved is not None:
            ago = _duration(self._clock() - self.saved.seconds)
            when = "before this start" if ago == "-" else f"{ago} ago"
            parts = [f"saved {self.saved.step}, {when}"]
        if standing.skipped:
            parts.append(f"skipped {standing.skipped} updates that were not finite")
        return parts


class Bars:
    """A panel at the foot of a terminal, drawn anew twice a second by its own thread.

    Colours obey NO_COLOR.

    Args:
      stream: the terminal.
      clock: seconds, monotonic.
    """

    def __init__(self, stream: Any, clock: Callable[[], float]):
        self._console = Console(file=stream)
        self._panel = Panel(clock)
        self._live = Live(self._panel, console=self._console, refresh_per_second=2)
        self._live.start()

    def show(self, standing: Standing) -> None:
        """Lets the panel say where the run stands, from its next drawing on."""
        self._panel.standing = standing

    def evaluated(self, evaluated: Evaluated) -> None:
        """Notes the last evaluation."""
        self._panel.evaluated = evaluated

    def saved(self, saved: SavedAt | None) -> None:
        """Notes the last checkpoint; None = there is none."""
        self._panel.saved = saved

    def print(self, text: str) -> None:
        """Prints a line above the panel."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def print_parts(self, parts: Sequence[str]) -> None:
        """Prints what belongs together above the panel; breaks lines between parts."""
        # To textwrap a no-break space is no place to break.
        text = GAP.join(part.replace(" ", NO_BREAK) for part in parts)
        lines = textwrap.wrap(
            text,
            self._console.width,
            subsequent_indent=" " * (STAGE_WIDTH + len(GAP)),
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in lines:
            self.print(line.replace(NO_BREAK, " "))

    def close(self) -> None:
        """Leaves the terminal as it is."""
        self._live.stop()


def _speed(standing: Standing) -> list[str]:
    rate = standing.images_per_second
    parts = [
        f"images/s {rate:,.0f}" if rate >= 1000 else f"images/s {rate:.4g}",
        f"input wait {standing.input_wait:.0%}",
    ]
    if standing.mfu is not None:
        parts.append(f"mfu {standing.mfu:.0%}")
    if standing.memory_bytes is not None:
        parts.append(f"mem {standing.memory_bytes / 2**30:.1f}G")
    return parts


def _duration(seconds: float) -> str:
    """`1h02m`, `1m20s` or `45s`; `-` where it is not known."""
    if not math.isfinite(seconds):
        return "-"
    whole = max(round(seconds), 0)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
