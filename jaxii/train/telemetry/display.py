"""Displays progress of a run on a terminal or in a job's log, from host numbers."""

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

from jaxii.console import visible, write_line

STAGE_WIDTH = 10
GAP = "  "
NO_BREAK = "\u00a0"
# Terminals with fewer columns show no bars.
LEAST_FOR_BARS = 60


@dataclass(frozen=True, kw_only=True)
class Part:
    """Progress of a stage or the whole run.

    Attributes:
      step: Updates done.
      num_steps: Planned updates, an upper bound if `may_end_early`.
      may_end_early: Whether a plateau of the metric may end the part early.
    """

    name: str
    step: int
    num_steps: int
    may_end_early: bool = False

    def eta(self, seconds_per_step: float) -> str:
        """Returns the remaining time, with `at most` if `may_end_early`."""
        left = _duration((self.num_steps - self.step) * seconds_per_step)
        return f"at most {left}" if self.may_end_early and left != "-" else left


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Progress of a run at the time of a log; NaN and None are unknown.

    Attributes:
      seconds_per_step: Wall time, evaluations included.
      objective: Mean since the previous log.
      images_per_second: Recent mean; evaluations excluded.
      input_wait: Share of the time in which the loop waited for a batch.
      mfu: Model FLOPs utilisation, the share of the device's peak.
      memory_bytes: Peak memory.
      skipped: Updates skipped for non-finite gradients.
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
    """F2 on `validation` at the last evaluation, and the best F2 with its step."""

    f2: float
    best_f2: float
    best_step: int


@dataclass(frozen=True)
class SavedAt:
    """Step and time of a checkpoint; NaN seconds if an earlier process saved it."""

    step: int
    seconds: float


def can_draw(stream: Any) -> bool:
    """Returns whether a stream is a terminal that can redraw a panel."""
    if not stream.isatty():
        return False
    console = Console(file=stream)
    # Rules and ellipses need Unicode; a terminal may report 0 columns.
    is_unicode = console.encoding.startswith("utf")
    return console.is_interactive and is_unicode and console.width > 0


class Lines:
    """One plain line per log, for pipes, files and job logs."""

    def __init__(self, stream: Any):
        self._stream = stream
        self._evaluated: Evaluated | None = None
        self._saved: SavedAt | None = None

    def show(self, standing: Standing) -> None:
        """Prints the progress."""
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
        """Notes the last checkpoint; None if there is none."""
        self._saved = saved

    def print(self, text: str) -> None:
        """Prints a line."""
        write_line(text, self._stream)

    def print_parts(self, parts: Sequence[str]) -> None:
        """Prints parts in one line."""
        self.print(GAP.join(parts))

    def close(self) -> None:
        """Flushes the stream."""
        self._stream.flush()


class Panel:
    """A rich renderable of two bars (stage and run) above lines of figures.

    A narrow terminal shows no bars and cuts the ends of lines.
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
        parts = ["no checkpoint yet"]
        if self.saved is not None:
            ago = _duration(self._clock() - self.saved.seconds)
            when = "before the restart" if ago == "-" else f"{ago} ago"
            parts = [f"saved {self.saved.step}, {when}"]
        if standing.skipped:
            parts.append(f"skipped {standing.skipped} non-finite updates")
        return parts


class Bars:
    """A panel at the bottom of a terminal, redrawn twice a second by its own thread.

    Colours obey NO_COLOR.
    """

    def __init__(self, stream: Any, clock: Callable[[], float]):
        self._console = Console(file=stream)
        self._panel = Panel(clock)
        self._live = Live(self._panel, console=self._console, refresh_per_second=2)
        self._live.start()

    def show(self, standing: Standing) -> None:
        """Shows the progress at the next drawing."""
        self._panel.standing = standing

    def evaluated(self, evaluated: Evaluated) -> None:
        """Notes the last evaluation."""
        self._panel.evaluated = evaluated

    def saved(self, saved: SavedAt | None) -> None:
        """Notes the last checkpoint; None if there is none."""
        self._panel.saved = saved

    def print(self, text: str) -> None:
        """Prints a line above the panel."""
        text = visible(text)
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def print_parts(self, parts: Sequence[str]) -> None:
        """Prints parts above the panel; breaks lines only between parts."""
        # textwrap does not break at a no-break space.
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
        """Stops drawing."""
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
    """Returns `1h02m`, `1m20s` or `45s`; `-` if unknown."""
    if not math.isfinite(seconds):
        return "-"
    whole = max(round(seconds), 0)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
