"""What long work shows a person who waits: a bar on a terminal, lines in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 10.0
_muted = False


def mute() -> None:
    """Says nothing from now on: another process of the run tells the person."""
    global _muted
    _muted = True


@contextmanager
def progress() -> Iterator[Callable[[int, int, str], None]]:
    """Gives a callback `(done, total, what)` that moves a bar or prints lines."""
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
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console()) as bars:
        tasks = {}

        def move(done: int, total: int, what: str) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield move


def _lines() -> Callable[[int, int, str], None]:
    last: dict[str, float] = {}

    def line(done: int, total: int, what: str) -> None:
        now = time.monotonic()
        quiet = now - last.get(what, -SECONDS_BETWEEN_LINES) < SECONDS_BETWEEN_LINES
        if quiet and done < total:
            return
        last[what] = now
        print(f"{what}  {done}/{total}", flush=True)

    return line


def say(text: str = "") -> None:
    """Prints a line at once."""
    if not _muted:
        print(text, flush=True)
