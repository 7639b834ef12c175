"""Interface of TensorBoard and tracking services, and their threads.

TensorBoard's files are always written; `config.track` adds one service. Each tracker
runs in its own thread, so that none can delay or end the training.
"""

import json
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxii.train.telemetry.images import Images

# Largest number of waiting entries per tracker: hours of logs, some megabytes.
MOST_WAITING = 1000
# Longest wait at the end, for a network that may be slow or down.
CLOSE_SECONDS = 30.0
Value = str | float | bool

RESULT_SPLITS = ("validation", "test")
"""Splits whose F2 is used to compare runs."""


def result_name(split: str) -> str:
    """Returns the name of the best checkpoint's F2 on a split.

    The name differs from that of evaluations during training.
    """
    return f"result/{split}/f2"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Name and description of a run.

    Attributes:
      settings: Flat field of the configuration -> value.
      about: Topic (such as data or provenance) -> text.
    """

    name: str
    settings: Mapping[str, Value]
    about: Mapping[str, str]


def flat(fields: Mapping[str, Any], first: Sequence[str] = ()) -> dict[str, Value]:
    """Flattens nested fields to `part.field` -> number, str or bool.

    Args:
      fields: A configuration as JSON; parts of a list are keyed by their `name`.
      first: Fields to put first, for pages that show only a few.
    """
    values = dict(_leaves(fields, ""))
    names = [*(name for name in first if name in values), *values]
    return {name: values[name] for name in names}


def _leaves(fields: Mapping[str, Any], prefix: str):
    for key, value in fields.items():
        if isinstance(value, Mapping) and value and not prefix.count("."):
            yield from _leaves(value, f"{prefix}{key}.")
        elif isinstance(value, list) and all(
            isinstance(part, Mapping) and "name" in part for part in value
        ):
            yield prefix + key, ", ".join(part["name"] for part in value)
            for part in value:
                own = {name: part[name] for name in part if name != "name"}
                yield from _leaves(own, f"{prefix}{key}.{part['name']}.")
        else:
            plain = isinstance(value, str | int | float)
            yield prefix + key, value if plain else json.dumps(value)


@runtime_checkable
class Tracker(Protocol):
    """Records metrics and images of a run; all calls come from one thread."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records finite figures of a step."""

    def images(self, step: int, name: str, images: Images) -> None:
        """Records a grid of images with their captions."""

    def result(self, step: int, figures: Mapping[str, float]) -> None:
        """Records the final figures of a run that has completed."""

    def flush(self) -> None:
        """Makes all records so far visible."""

    def close(self) -> None:
        """Ends the run for now; another process may resume it."""


class Trackers:
    """Forwards to several trackers, whose failures never reach the caller.

    Args:
      makers: Name -> function that opens a tracker. It is called in the tracker's
        thread; if it fails, again at the next entry.
      warn: Receives the first failure of each tracker.
      close_seconds: Longest time that `close` waits for all trackers together.
    """

    def __init__(
        self,
        makers: Mapping[str, Callable[[], Tracker]],
        warn: Callable[[str], None],
        *,
        close_seconds: float = CLOSE_SECONDS,
    ):
        self._close_seconds = close_seconds
        self._lines = [_Line(name, make, warn) for name, make in makers.items()]

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Forwards figures of a step."""
        self._put(lambda tracker: tracker.scalars(step, values))

    def images(self, step: int, name: str, images: Images) -> None:
        """Forwards images."""
        self._put(lambda tracker: tracker.images(step, name, images))

    def result(self, step: int, figures: Mapping[str, float]) -> None:
        """Forwards the result."""
        self._put(lambda tracker: tracker.result(step, figures))

    def flush(self) -> None:
        """Flushes every tracker."""
        self._put(lambda tracker: tracker.flush())

    def close(self) -> None:
        """Closes all trackers; warns if entries of a slow tracker are lost."""
        end = time.monotonic() + self._close_seconds
        for line in self._lines:
            line.ask_to_close()
        for line in self._lines:
            line.wait(end - time.monotonic())
        self._lines = []

    def _put(self, act: Callable[[Tracker], None]) -> None:
        for line in self._lines:
            line.put(act)


class _Line:
    """The queue and the thread of one tracker."""

    def __init__(
        self, name: str, make: Callable[[], Tracker], warn: Callable[[str], None]
    ):
        self._name, self._make, self._warn = name, make, warn
        self._warned = False
        self._waiting: queue.SimpleQueue[Callable[[Tracker], None] | None]
        self._waiting = queue.SimpleQueue()
        # This empty entry opens the tracker now, which prints the tracker's address.
        self._waiting.put(lambda tracker: None)
        # A thread that hangs in a network call must not keep the process alive.
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def put(self, act: Callable[[Tracker], None]) -> None:
        if self._waiting.qsize() < MOST_WAITING:
            self._waiting.put(act)
        else:
            self._say("too slow; some values were dropped")

    def ask_to_close(self) -> None:
        self._waiting.put(None)

    def wait(self, seconds: float) -> None:
        self._thread.join(max(seconds, 0.0))
        if self._thread.is_alive():
            self._warn(
                f"{self._name}: some values were not sent in time; the end of the run "
                "may be missing there."
            )

    def _work(self) -> None:
        tracker = None
        while (act := self._waiting.get()) is not None:
            # The run continues after any error of a service.
            try:
                tracker = tracker or self._make()
                act(tracker)
            except Exception as error:
                self._say(f"{type(error).__name__}: {error}")
        try:
            if tracker is not None:
                tracker.close()
        except Exception as error:
            self._say(f"{type(error).__name__}: {error}")

    def _say(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            first = text.partition("\n")[0].rstrip(".")
            self._warn(
                f"{self._name}: {first}. Training continues without the lost values; "
                "further errors are not shown."
            )
