"""Progress and messages: a bar on a terminal, lines in a log.

Names of files, labels and domains may be any text, so control characters are escaped.
"""

import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

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

from jaxii.storage import named

# Called with (done, total, what). If `done` decreases, the activity starts over.
OnProgress = Callable[[int, int, str], None]
SECONDS_BETWEEN_LINES = 10.0
# Rates over less time are not shown: earlier work may be reported all at once.
LEAST_RATE_SECONDS = 1.0
_muted = False
# Control characters, line breaks, and surrogates for bytes that are not UTF-8.
_UNSHOWN = frozenset(("Cc", "Zl", "Zp", "Cs"))
# They reorder text: a name that ends in gpj.exe can be shown as ending in exe.jpg.
_REORDERING = frozenset(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A))))


def is_shown(character: str) -> bool:
    """Returns whether a character is neither a control nor a reordering character."""
    unshown = unicodedata.category(character) in _UNSHOWN
    return not unshown and character not in _REORDERING


def visible(text: str, *, kept: str = "") -> str:
    """Returns a text with its control and reordering characters escaped.

    Args:
      text: Any text.
      kept: Characters that are not escaped.
    """
    return "".join(
        letter
        if is_shown(letter) or letter in kept
        else letter.encode("unicode_escape").decode()
        for letter in text
    )


@contextmanager
def open_ended(stream: Any) -> Iterator[None]:
    """Suppresses errors of writing to a pipe whose reader has ended, such as `head`.

    Later output to the stream is discarded; the program continues.

    Raises:
      OSError: If a write fails for another reason, such as a full disk.
    """
    try:
        with named("the output"):
            yield
    except OSError as error:
        # The rest of the buffer would fail again when the interpreter exits.
        with Path(os.devnull).open("w") as nothing:
            os.dup2(nothing.fileno(), stream.fileno())
        if not isinstance(error, BrokenPipeError):
            raise


def write_line(text: str, stream: Any) -> None:
    """Writes a text as one line and flushes the stream."""
    with open_ended(stream):
        print(visible(text), file=stream, flush=True)


def mute() -> None:
    """Silences this process; the lead process of the run prints instead."""
    global _muted
    _muted = True


def no_progress(done: int, total: int, what: str) -> None:
    """Shows nothing."""


@contextmanager
def progress() -> Iterator[OnProgress]:
    """Yields a callback that moves a bar or prints lines."""
    if _muted:
        yield no_progress
        return
    if not sys.stdout.isatty():
        yield _lines()
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console()) as bars:
        tasks = {}
        reached: dict[str, int] = {}

        def move(done: int, total: int, what: str) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(visible(what), total=total)
            if done < reached.get(what, 0):
                bars.reset(tasks[what])
            reached[what] = done
            bars.update(tasks[what], completed=done, total=total)

        yield move


class _RateColumn(ProgressColumn):
    """Recent items per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        seconds = task.finished_time or task.elapsed or 0.0
        return Text(_rate(speed) if speed and seconds >= LEAST_RATE_SECONDS else "")


def _lines() -> OnProgress:
    first: dict[str, tuple[float, int]] = {}
    last: dict[str, float] = {}
    reached: dict[str, int] = {}

    def line(done: int, total: int, what: str) -> None:
        now = time.monotonic()
        if done < reached.get(what, 0):
            del first[what], last[what]
        reached[what] = done
        start, already = first.setdefault(what, (now, done))
        quiet = now - last.get(what, -SECONDS_BETWEEN_LINES) < SECONDS_BETWEEN_LINES
        if quiet and done < total:
            return
        last[what] = now
        text = f"{what}  {done}/{total}"
        # The rate starts at the first call, so that it excludes compilation.
        if done > already and now - start >= LEAST_RATE_SECONDS:
            rate = (done - already) / (now - start)
            text += f"  {_rate(rate)}"
            if done < total:
                left = timedelta(seconds=round((total - done) / rate))
                text += f"  {left} left"
        write_line(text, sys.stdout)

    return line


def _rate(speed: float) -> str:
    return f"{speed:,.0f}/s" if speed >= 10 else f"{speed:.1f}/s"


def say(text: str = "") -> None:
    """Prints a line at once."""
    if not _muted:
        write_line(text, sys.stdout)


def warn(text: str) -> None:
    """Prints a line on stderr at once."""
    if not _muted:
        write_line(text, sys.stderr)
