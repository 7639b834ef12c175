"""Shared by the rehearsals of a pod: starting and ending runs, and tables."""

import contextlib
import json
import time

from tests.many_processes import Run

DEVICES = 8
MOST_SECONDS = 900
START_TIMEOUT_SECONDS = 45


def flags(num_steps, evaluate_every, seed=0):
    return (
        f"--config.stages[0].num_steps={num_steps}",
        f"--config.evaluate_every_steps={evaluate_every}",
        f"--config.seed={seed}",
        f"--start_timeout_seconds={START_TIMEOUT_SECONDS}",
    )


@contextlib.contextmanager
def started(folder, name, count, *, given, is_recorded=True):
    """Starts a run; always ends its processes afterwards."""
    run = Run(
        folder,
        name,
        num_devices=DEVICES,
        flags=given,
        is_recorded=is_recorded,
        most_seconds=MOST_SECONDS,
    )
    run.start(count)
    try:
        yield run
    finally:
        run.stop()


def finished(folder, name, count, *, given):
    """Trains to the end; returns the run."""
    start = time.monotonic()
    with started(folder, name, count, given=given) as run:
        codes = run.wait()
    if codes != [0] * count:
        raise AssertionError(f"{name} ended with {codes}\n{run.logs()}")
    print(f"  {name}: {count} processes, {time.monotonic() - start:.0f} s", flush=True)
    return run


def evaluated(run, count):
    """Evaluates the best checkpoint of a run; returns its metrics.json and answers."""
    run.start(count, evaluates=True)
    codes = run.wait()
    if codes != [0] * count:
        raise AssertionError(f"evaluation ended with {codes}\n{run.logs()}")
    metrics = json.loads((run.workdir / "metrics.json").read_text())
    del metrics["created"]
    return metrics, (run.workdir / "submission.csv").read_bytes()


def show(rows):
    """Prints rows of cells as a table; the first row names the columns."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:<{n}}" for cell, n in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip(), flush=True)
