"""Writes progress to the terminal, `history.jsonl` and trackers, from host numbers.

Only the lead process writes; other processes only measure time. Does not call JAX.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from os import PathLike
from typing import Any

from jaxii.manifest import Digest, File
from jaxii.storage import Mirror, at, check_held, is_held, named
from jaxii.train.telemetry.display import (
    STAGE_WIDTH,
    Bars,
    Evaluated,
    Lines,
    Part,
    SavedAt,
    Standing,
    can_draw,
)
from jaxii.train.telemetry.history import (
    HISTORY,
    RESUME,
    drop_partial_line,
    read_history,
)
from jaxii.train.telemetry.images import Images
from jaxii.train.telemetry.trackers import Tracker

MAX_FIGURES = 5
# Rates are measured over at least this time, if the stage has run for it.
LEAST_RATE_SECONDS = 5.0


class ThroughputMeter:
    """Measures steps per second and the share of time spent waiting for input.

    A short window is measured together with those before it. Batches that were
    prefetched during an evaluation would otherwise give it many times the usual rate.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self.open_window(0)

    def open_window(self, step: int) -> None:
        """Starts the first window of a stage, which includes compilation, at a step."""
        # Steps, seconds and seconds of waiting of each window; None in the first.
        self._recent: list[tuple[int, float, float]] | None = None
        self._begin_window(step)

    def _begin_window(self, step: int) -> None:
        self._step, self._start = step, self._clock()
        self._waited = self._paused = 0.0

    def waited(self, seconds: float) -> None:
        """Adds time in which the loop waited for a batch."""
        self._waited += seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time in the context (evaluation, saving) from the window."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - start

    def close_window(self, step: int) -> tuple[float, float]:
        """Opens the next window; returns steps per second and input-wait share."""
        seconds = max(self._clock() - self._start - self._paused, 1e-9)
        windows = [*(self._recent or []), (step - self._step, seconds, self._waited)]
        while sum(each[1] for each in windows[1:]) >= LEAST_RATE_SECONDS:
            windows.pop(0)
        self._recent = [] if self._recent is None else windows
        self._begin_window(step)
        steps, seconds, waited = map(sum, zip(*windows, strict=True))
        return steps / seconds, min(waited / seconds, 1.0)


class Telemetry:
    """Shows and records a run; a context manager.

    Args:
      workdir: Receives `history.jsonl`; a bucket at evaluations, saves and the end.
      total_steps: Steps of the whole run.
      start_step: Steps done before; later records in the history no longer count.
      is_lead: False writes nothing.
      tracker: Receives the metrics too; the caller closes it.
      stream: Output for the display; None is standard output.
      clock: Monotonic seconds.
      memory: Returns memory by name, in bytes; `device_memory_bytes` is shown, else
        `host_memory_bytes`.
      peak_flops: Peak operations per second of a device; None computes no MFU (the
        share of the peak that a step uses).
    """

    def __init__(
        self,
        workdir: str | PathLike[str],
        *,
        total_steps: int,
        start_step: int,
        is_lead: bool = True,
        tracker: Tracker | None = None,
        stream: Any = None,
        clock: Callable[[], float] = time.monotonic,
        memory: Callable[[], Mapping[str, float]] = dict,
        peak_flops: float | None = None,
    ):
        self._is_lead = is_lead
        self._tracker = tracker
        self._memory, self._peak_flops = memory, peak_flops
        self._step_flops: float | None = None
        self._clock = clock
        self._meter = ThroughputMeter(clock)
        self._images_per_step = 0
        self._pace: tuple[float, int] | None = None
        self._stage, self._stage_first, self._stage_steps = "", 0, 0
        self._begun = 0
        self._total_steps = total_steps
        self._stage_may_end = self._run_may_end = False
        self._evaluated: Evaluated | None = None
        if not is_lead:
            return
        self._workdir = at(workdir)
        self._files = Mirror(self._workdir)
        history_path = self._files.fetch(HISTORY)
        is_resumed = drop_partial_line(history_path)
        self._history_digest = Digest(history_path if is_resumed else None)
        self._history = history_path.open("a", encoding="utf-8")
        if is_resumed:
            self._append({"kind": RESUME, "step": start_step})
        out = sys.stdout if stream is None else stream
        self._screen = Bars(out, clock) if can_draw(out) else Lines(out)
        for row in read_history(history_path):
            self._note_f2(row["step"], row)

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Flushes and closes everything; safe to call twice.

        Uploads nothing if the workdir is in a bucket and was taken over.
        """
        if self._is_lead:
            self._screen.close()
            with named(self._history.name):
                self._history.close()
            self._files.close(push=is_held(self._workdir))
            self._is_lead = False

    def start_stage(
        self,
        name: str,
        *,
        first_step: int,
        num_steps: int,
        images_per_step: int,
        step: int | None = None,
        total_steps: int | None = None,
        may_end_early: tuple[bool, bool] = (False, False),
    ) -> None:
        """Starts or resumes a stage.

        Args:
          name: Name of the stage.
          first_step: Run step at which the stage starts.
          num_steps: Planned steps of the stage.
          images_per_step: Global batch size.
          step: Current run step of a resumed stage; None is `first_step`.
          total_steps: Steps of the whole run, if a stage ended early.
          may_end_early: Whether a plateau may end (this stage, any remaining stage).
        """
        self._stage, self._stage_first, self._stage_steps = name, first_step, num_steps
        self._begun = first_step if step is None else step
        self._total_steps = total_steps or self._total_steps
        self._stage_may_end, self._run_may_end = may_end_early
        # The first window includes compilation and gives no pace.
        self._pace = None
        self._step_flops = None
        self._images_per_step = images_per_step
        self._meter.open_window(self._begun)

    def images(self, images: Images) -> None:
        """Sends augmented images from the start of the stage to the tracker."""
        if self._is_lead and self._tracker is not None:
            self._tracker.images(self._begun, f"images/{self._stage}", images)

    def waited(self, seconds: float) -> None:
        """Adds time in which the loop waited for a batch."""
        self._meter.waited(seconds)

    @property
    def wants_flops(self) -> bool:
        """Whether MFU still needs a call of `step_takes` in this stage."""
        return self._peak_flops is not None and self._step_flops is None

    def step_takes(self, flops: float) -> None:
        """Sets the number of operations of a step of this stage on one device."""
        self._step_flops = flops

    def paused(self) -> AbstractContextManager[None]:
        """Excludes the time in the context (evaluation) from images per second."""
        return self._meter.paused()

    def log_train(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records the training metrics of a step and updates the display.

        Args:
          step: Updates done in the whole run.
          metrics: Name -> number on the host; `objective` is displayed.
        """
        if not self._is_lead:
            return
        steps_per_second, wait = self._meter.close_window(step)
        rate = steps_per_second * self._images_per_step
        row = {name: float(value) for name, value in metrics.items()}
        row |= {"images_per_second": rate, "input_wait_share": wait}
        row |= {"step_seconds": 1 / steps_per_second if steps_per_second else math.nan}
        row |= self._memory()
        if self._peak_flops and self._step_flops:
            row["mfu"] = self._step_flops * steps_per_second / self._peak_flops
        self._record("train", step, row)
        self._screen.show(
            Standing(
                stage=Part(
                    name=self._stage,
                    step=step - self._stage_first,
                    num_steps=self._stage_steps,
                    may_end_early=self._stage_may_end,
                ),
                run=Part(
                    name="whole run",
                    step=step,
                    num_steps=self._total_steps,
                    may_end_early=self._run_may_end,
                ),
                seconds_per_step=self._seconds_per_step(step),
                objective=row.get("objective"),
                images_per_second=rate,
                input_wait=wait,
                mfu=row.get("mfu"),
                memory_bytes=row.get(
                    "device_memory_bytes", row.get("host_memory_bytes")
                ),
                skipped=int(row.get("skipped_steps", 0)),
            )
        )

    def log_evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records an evaluation and updates the display.

        Args:
          step: Updates done in the whole run.
          metrics: `split/name` -> number on the host; the first five are printed, and
            `validation/f2` is displayed.

        Raises:
          InputError: If the workdir is in a bucket and was taken over.
        """
        if not self._is_lead:
            return
        row = {name: float(value) for name, value in metrics.items()}
        self._record("evaluation", step, row)
        self._note_f2(step, row)
        figures = [f"{name} {value:.4g}" for name, value in row.items()]
        width = len(str(self._total_steps))
        place = f"step {step:>{width}}/{self._total_steps}"
        parts = [f"{self._stage:<{STAGE_WIDTH}}", place]
        self._screen.print_parts(parts + figures[:MAX_FIGURES])
        check_held(self._workdir)
        if self._tracker is not None:
            self._tracker.flush()
        self._files.push()

    def history(self) -> File | None:
        """Returns size and hash of `history.jsonl`; None if not the lead process.

        Uploads it to a bucket first, so that a checkpoint never lists missing rows.

        Raises:
          InputError: If the workdir is in a bucket and was taken over.
        """
        if not self._is_lead:
            return None
        check_held(self._workdir)
        self._files.push()
        return self._history_digest.file()

    def saved(self, step: int | None, *, before: bool = False) -> None:
        """Displays the step of the last checkpoint; None if there is none.

        Args:
          step: Step of the checkpoint.
          before: Whether an earlier process saved the checkpoint.
        """
        if self._is_lead:
            seconds = math.nan if before else self._clock()
            self._screen.saved(None if step is None else SavedAt(step, seconds))

    def note(self, text: str) -> None:
        """Prints a line, above the bars if any."""
        if self._is_lead:
            self._screen.print(text)

    def _note_f2(self, step: int, row: Mapping[str, Any]) -> None:
        f2 = row.get("validation/f2", math.nan)
        if math.isnan(f2):
            return
        before = self._evaluated
        if before is None or f2 > before.best_f2:
            self._evaluated = Evaluated(f2, f2, step)
        else:
            self._evaluated = replace(before, f2=f2)
        self._screen.evaluated(self._evaluated)

    def _seconds_per_step(self, step: int) -> float:
        """Returns wall time per step since the stage's first log, with evaluations."""
        now = self._clock()
        if self._pace is None or step <= self._pace[1]:
            self._pace = (now, step)
            return math.nan
        return (now - self._pace[0]) / (step - self._pace[1])

    def _record(self, kind: str, step: int, row: dict[str, float]) -> None:
        head = {"kind": kind, "step": step, "stage": self._stage}
        head |= {"stage_step": step - self._stage_first}
        # NaN is not JSON.
        self._append(
            head | {k: v if math.isfinite(v) else None for k, v in row.items()}
        )
        if self._tracker is not None:
            prefix = "train/" if kind == "train" else ""
            finite = {prefix + k: v for k, v in row.items() if math.isfinite(v)}
            self._tracker.scalars(step, finite)

    def _append(self, row: Mapping[str, Any]) -> None:
        line = json.dumps(row) + "\n"
        with named(self._history.name):
            self._history.write(line)
            self._history.flush()
        self._history_digest.update(line.encode())
