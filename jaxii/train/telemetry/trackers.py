"""Where a run can be followed besides the terminal: one interface, three programs.

TensorBoard's files are always written; `config.track` names one service beside them.
Telemetry hands figures in, the command images and the result. Each tracker works in a
thread of its own, so that none can hold the training up or end it.
"""

import json
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import UInt8
from numpy import ndarray

# Entries that wait for a tracker: hours of logs, and some megabytes.
MOST_WAITING = 1000
# What is waited at the end for a network that may be slow, or gone.
CLOSE_SECONDS = 30.0
Value = str | float | bool

RESULT_SPLITS = ("validation", "test")
"""Splits by whose F2 runs are compared."""


def result_name(split: str) -> str:
    """Returns the name of a split's F2 in the result.

    Not that of the evaluations while it trains: the result is the best checkpoint's.
    """
    return f"result/{split}/f2"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a run is.

    Attributes:
      name: of the run.
      settings: field of the configuration -> value, flat.
      about: what -> words for a person: data, provenance. Any text.
    """

    name: str
    settings: Mapping[str, Value]
    about: Mapping[str, str]


def flat(fields: Mapping[str, Any], first: Sequence[str] = ()) -> dict[str, Value]:
    """Returns nested fields as `part.field` -> number, text or truth value.

    Args:
      fields: a configuration as JSON has it; of a list of parts with names, each goes
        by its name.
      first: fields that come first: pages that show a few show these.
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
    """Shows and keeps what a run hands in; called in one thread."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Takes figures of a step, all finite."""

    def images(
        self,
        step: int,
        name: str,
        pixels: UInt8[ndarray, "height width 3"],
        captions: tuple[str, ...],
    ) -> None:
        """Takes images that lie in one, row by row, and what each one shows."""

    def result(self, step: int, figures: Mapping[str, float]) -> None:
        """Takes the figures that runs are compared by; the run has ended well."""

    def flush(self) -> None:
        """Puts what came so far where others can see it."""

    def close(self) -> None:
        """Ends the run, for now: it may go on in another process."""


class Trackers:
    """Hands everything on to some trackers, itself one; none can stop the caller.

    Args:
      makers: name -> opens a tracker; called in that tracker's thread, and again at the
        next entry where it failed.
      warn: is told the first failure of each.
      close_seconds: how long `close` waits for all of them together.
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
        """Hands figures of a step on."""
        self._put(lambda tracker: tracker.scalars(step, values))

    def images(
        self,
        step: int,
        name: str,
        pixels: UInt8[ndarray, "height width 3"],
        captions: tuple[str, ...],
    ) -> None:
        """Hands images on."""
        self._put(lambda tracker: tracker.images(step, name, pixels, captions))

    def result(self, step: int, figures: Mapping[str, float]) -> None:
        """Hands the result on."""
        self._put(lambda tracker: tracker.result(step, figures))

    def flush(self) -> None:
        """Has every tracker show what it was given."""
        self._put(lambda tracker: tracker.flush())

    def close(self) -> None:
        """Closes all; what a tracker has not taken in time is lost, and said."""
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
    """What waits for one tracker, and the thread that hands it over."""

    def __init__(
        self, name: str, make: Callable[[], Tracker], warn: Callable[[str], None]
    ):
        self._name, self._make, self._warn = name, make, warn
        self._warned = False
        self._waiting: queue.SimpleQueue[Callable[[Tracker], None] | None]
        self._waiting = queue.SimpleQueue()
        # So that it is opened now, and a person soon told where to look.
        self._waiting.put(lambda tracker: None)
        # A thread that hangs in a network must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def put(self, act: Callable[[Tracker], None]) -> None:
        if self._waiting.qsize() < MOST_WAITING:
            self._waiting.put(act)
        else:
            self._say("is too slow to be told everything")

    def ask_to_close(self) -> None:
        self._waiting.put(None)

    def wait(self, seconds: float) -> None:
        self._thread.join(max(seconds, 0.0))
        if self._thread.is_alive():
            self._warn(
                f"{self._name}: not all could be handed over in time; the end of the "
                "run may be missing there."
            )

    def _work(self) -> None:
        tracker = None
        while (act := self._waiting.get()) is not None:
            # Whatever a service raises, the run goes on.
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
                f"{self._name}: {first}. Training goes on; what cannot be handed over "
                "is missing there, and this is said once."
            )
