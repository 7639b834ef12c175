"""Times steps in turns, and traces them."""

import contextlib
import gzip
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax

from tests.benchmarks import peers

# Runs `number` steps and returns the seconds per step.
Steps = Callable[[int], float]


def timed(step: Callable[[], object]) -> Steps:
    """Returns a function that runs steps and waits for the last."""

    def steps(number: int) -> float:
        start = time.perf_counter()
        for _ in range(number):
            result = step()
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / number

    return steps


def medians(every: Mapping[str, Steps], rounds: int, number: int) -> dict[str, float]:
    """Returns the median seconds per step of each, in turns of `number` steps."""
    for steps in every.values():
        steps(2)
    turns = [
        {name: steps(number) for name, steps in every.items()} for _ in range(rounds)
    ]
    return {name: statistics.median(turn[name] for turn in turns) for name in every}


@contextlib.contextmanager
def contestants(
    makers: Mapping[str, Callable[[str, int, int], Steps]],
    dtype: str,
    batch: int,
    size: int,
    *,
    torch: str | None,
) -> Iterator[dict[str, Steps]]:
    """Yields name -> steps, made by `makers(dtype, batch, size)`.

    Args:
      torch: The script of `peer/` whose steps are "torch"; None for none.
    """
    with contextlib.ExitStack() as stack:
        every: dict[str, Steps] = {}
        if torch is not None:
            # First, so that it compiles during the compilation of the others.
            peer = peers.Steps(torch, dtype, str(batch), str(size))
            every["torch"] = stack.enter_context(contextlib.closing(peer))
        every |= {name: make(dtype, batch, size) for name, make in makers.items()}
        yield every


def traced(steps: Steps, number: int, kept: Path | None = None) -> list[dict]:
    """Traces steps; returns the events of their operations.

    Args:
      kept: Where the trace is copied to, for Perfetto.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            steps(number)
        (written,) = Path(folder).rglob("*.trace.json.gz")
        if kept is not None:
            shutil.copy(written, kept)
        with gzip.open(written) as file:
            events = json.load(file)["traceEvents"]
    # Not the modules and steps that the profiler adds to the operations.
    return [
        event
        for event in events
        if event.get("ph") == "X" and "hlo_op" in event.get("args", {})
    ]
