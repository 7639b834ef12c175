"""Progress and messages: a bar on a terminal, lines in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0
_muted = False


def mute() -> None:
    """Silences this process; the lead process of the run prints instead."""
    global _muted
    _muted = True


@contextmanager
def progress() -> Iterator[Callable[[int, int, str], None]]:
    """Yields a callback `(done, total, what)` that moves a bar or prints lines."""
    if _muted:
        yield lambda done, total, what: None
        return
    if not sys.stdout.isatty():
        yield _lines()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console()) as bars:
        tasks = {}

        def move(done: int, total: int, what: str) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield move


class _RateColumn(ProgressColumn):
    """Recent items per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(_rate(speed) if speed else "")


def _lines() -> Callable[[int, int, str], None]:
    first: dict[str, tuple[float, int]] = {}
    last: dict[str, float] = {}

    def line(done: int, total: int, what: str) -> None:
        now = time.monotonic()
        start, already = first.setdefault(what, (now, done))
        quiet = now - last.get(what, -SECONDS_BETWEEN_LINES) < SECONDS_BETWEEN_LINES
        if quiet and done < total:
            return
        last[what] = now
        text = f"{what}  {done}/{total}"
        # The rate starts at the first call, so that it excludes compilation.
        if done > already and now > start:
            rate = (done - already) / (now - start)
            text += f"  {_rate(rate)}"
            if done < total:
                left = timedelta(seconds=round((total - done) / rate))
                text += f"  {left} left"
        print(text, flush=True)

    return line


def _rate(speed: float) -> str:
    return f"{speed:,.0f}/s" if speed >= 10 else f"{speed:.1f}/s"


def say(text: str = "") -> None:
    """Prints a line at once."""
    if not _muted:
        print(text, flush=True)


def warn(text: str) -> None:
    """Prints a line on stderr at once."""
    if not _muted:
        print(text, file=sys.stderr, flush=True)
