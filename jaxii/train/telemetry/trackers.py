"""Where a run can be followed besides the terminal: one interface, three programs.

TensorBoard's files are always written; `config.track` names one service beside them.
Telemetry hands figures in, the command images and the result. Each tracker works in a
thread of its own, so that none can hold the training up or end it.
"""

import queue
import threading
import time
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Protocol, runtime_checkable

from jaxtyping import UInt8
from numpy import ndarray

from jaxii.train.telemetry.facts import Facts
from jaxii.train.telemetry.services import Mlflow, Wandb
from jaxii.train.telemetry.tensorboard import TensorBoard

# Entries that wait for a tracker: hours of logs, and some megabytes.
MOST_WAITING = 1000
# What is waited at the end for a network that may be slow, or gone.
CLOSE_SECONDS = 30.0


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


SERVICES: dict[str, type[Wandb] | type[Mlflow]] = {"wandb": Wandb, "mlflow": Mlflow}


def check_tracker(track: str) -> None:
    """Refuses a service that is not installed, or that knows nobody here.

    Raises:
      InputError: with what to install or to set.
    """
    if track:
        SERVICES[track].check()


def open_trackers(
    workdir: str | PathLike[str],
    facts: Facts,
    *,
    track: str = "",
    start_step: int = 0,
    warn: Callable[[str], None],
) -> "Trackers":
    """Starts TensorBoard's files and the service that was asked for.

    Args:
      workdir: of the run; a service's name for the run is kept in it.
      facts: what the run is.
      track: a key of `SERVICES`, or "".
      start_step: steps done already.
      warn: is told, in a thread of a tracker's own, what a person should know.
    """
    makers: dict[str, Callable[[], Tracker]] = {
        "TensorBoard": lambda: TensorBoard(workdir, facts, start_step=start_step)
    }
    if track:
        makers[track] = lambda: SERVICES[track](workdir, facts, warn)
    return Trackers(makers, warn)


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
