"""Trains for hours with killed processes, and compares with an undisturbed run.

    python -m tests.benchmarks.soak --hours=4 --folder=SOAK

Two processes of one CPU device each train the small run of `tests/many_processes.py`
undisturbed. At the same time, a second run of as many steps and processes is disturbed
at random times that follow from the seed, during start-up, steps, evaluations and
saves: kill -9 to one process, kill -9 to both, SIGTERM to one. The same command
restarts it until it is finished. Resident memory and open files are recorded every
second.

With --folder, the same command continues a benchmark that was stopped: an unfinished
undisturbed run starts again, and the disturbed run counts the stop as one more
disturbance. --hours applies to the first start, and is the time of both runs together:
each takes about half of it.

The final checkpoints have to be equal bit for bit, and memory and open files must not
grow, measured over the undisturbed run after its first quarter.
"""

import argparse
import collections
import contextlib
import json
import math
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import numpy as np

from tests.benchmarks.input_memory import resident_mb
from tests.benchmarks.rehearse_processes import same_bits
from tests.benchmarks.table import Row, emit
from tests.many_processes import PREEMPTED, Run, prepare_folder

COUNT = 2
FIRST_STEPS, MEASURED_STEPS, MEASURED_EVERY = 20, 200, 10
SHARE_IN_START_UP = 0.25
SECONDS_BETWEEN_SAVES = 20.0
KILL_ONE, KILL_ALL, SIGTERM = "kill -9 to one", "kill -9 to both", "SIGTERM to one"
KINDS = KILL_ONE, KILL_ALL, SIGTERM
STOPPED = "the benchmark stopped"
MOST_SECONDS = 600
MOST_MB_AN_HOUR = 30.0


@dataclass(frozen=True)
class Note:
    """Memory and open files of a process, `seconds` after its first logged step."""

    seconds: float
    mb: float
    files: int


class Soak:
    """A run of two processes, observed while it trains."""

    def __init__(self, folder: Path, name: str, num_steps: int, save_every: int):
        self.run = Run(
            folder,
            name,
            num_devices=COUNT,
            most_seconds=MOST_SECONDS,
            flags=(
                f"--config.stages[0].num_steps={num_steps}",
                f"--config.evaluate_every_steps={save_every}",
                f"--config.log_every_steps={min(save_every, 10)}",
                f"--start_timeout_seconds={MOST_SECONDS // 2}",
            ),
        )
        # With more blocks per stage, most of a start-up would be compilation.
        self.run.module = "tests.small_main"
        self.num_steps = num_steps
        self.notes: list[Note] = []
        self._trains_since: float | None = None

    def __enter__(self) -> "Soak":
        return self

    def __exit__(self, *_) -> None:
        self.run.stop()

    def start(self) -> None:
        self.run.start(COUNT)
        self._trains_since = None

    def step(self) -> int:
        """Returns the last step logged since the start; 0 if there is none."""
        return int([0, *re.findall(r"step +(\d+)/", self.run.log())][-1])

    def ends_within(self, seconds: float, *, of_training: bool = False) -> bool:
        """Observes the processes; returns whether all ended.

        Args:
          seconds: How long.
          of_training: Count from the first logged step instead of from now.
        """
        begun = time.monotonic()
        while any(process.poll() is None for process in self.run.processes):
            since = self._trains_since if of_training else begun
            if since is not None and time.monotonic() - since >= seconds:
                return False
            self._note()
            time.sleep(1.0)
        return True

    def check_done(self) -> None:
        codes = self.run.wait()
        if codes != [0] * COUNT:
            raise AssertionError(f"ended undisturbed with {codes}\n{self.run.logs()}")

    def disturb(self, kind: str, victim: int) -> list[int]:
        """Kills or signals processes; returns the exit codes of all."""
        if kind == SIGTERM:
            self.run.preempt(victim)
        else:
            for index in range(COUNT) if kind == KILL_ALL else [victim]:
                self.run.processes[index].kill()
        codes = self.run.wait()
        if None in codes:
            raise AssertionError(f"{kind}: hung, {codes}\n{self.run.logs()}")
        return codes

    def _note(self) -> None:
        # Start-up, decoders and report use memory of their own.
        if not 0 < self.step() < self.num_steps:
            return
        now = time.monotonic()
        self._trains_since = self._trains_since or now
        for process in self.run.processes:
            try:
                files = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
                mb = resident_mb(process.pid)
            except OSError:  # it has just ended
                continue
            seconds = now - self._trains_since
            self.notes.append(Note(seconds, mb, files))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Lengths of both runs, and the seconds that they are computed from.

    Attributes:
      start_up_seconds: Time of a start-up.
      step_seconds: Time of a step, with its share of the saves.
    """

    start_up_seconds: float
    step_seconds: float
    num_steps: int
    save_every: int


def measure(folder: Path, hours: float) -> Plan:
    """Returns the plan for `hours`, from two runs of a few steps side by side."""
    begun, times = time.monotonic(), {}
    names = "measured", "measured_beside"
    with contextlib.ExitStack() as stack:
        soak, beside = (
            stack.enter_context(Soak(folder, name, MEASURED_STEPS, MEASURED_EVERY))
            for name in names
        )
        soak.start()
        beside.start()
        while not soak.ends_within(0.1):
            times.setdefault(soak.step(), time.monotonic())
        soak.check_done()
    known = sorted(step for step in times if step >= FIRST_STEPS)
    step_seconds = (times[known[-1]] - times[known[0]]) / (known[-1] - known[0])
    save_every = max(round(SECONDS_BETWEEN_SAVES / step_seconds), 5)
    num_steps = int(hours / 2 * 3600 / step_seconds)
    return Plan(
        start_up_seconds=times[min(filter(None, times))] - begun,
        step_seconds=step_seconds,
        num_steps=max(num_steps, 4 * save_every),
        save_every=save_every,
    )


def planned(folder: Path, hours: float) -> Plan:
    """Returns the plan of the folder; prepares and measures if it has none."""
    path = folder / "plan.json"
    if not path.exists():
        for name in ("files", "prepared", "measured", "measured_beside"):
            shutil.rmtree(folder / name, ignore_errors=True)
        prepare_folder(folder)
        _write(path, asdict(measure(folder, hours)))
    return Plan(**json.loads(path.read_text()))


def undisturbed(folder: Path, plan: Plan, soak: Soak) -> None:
    """Trains to the end in one go, unless an earlier start of the benchmark did."""
    notes, begun = folder / "undisturbed.json", time.monotonic()
    if notes.exists():
        soak.notes = [Note(**note) for note in json.loads(notes.read_text())]
        return
    shutil.rmtree(soak.run.workdir, ignore_errors=True)
    soak.start()
    soak.ends_within(math.inf)
    soak.check_done()
    _write(notes, [asdict(note) for note in soak.notes])
    hours = (time.monotonic() - begun) / 3600
    print(f"  undisturbed: {plan.num_steps} steps in {hours:.2f} hours", flush=True)


def disturbed(
    folder: Path, plan: Plan, *, seed: int, every_seconds: float
) -> tuple[Soak, list[str]]:
    """Trains to the end with many starts; returns how each of them ended."""
    history = folder / "disturbed.json"
    ends = json.loads(history.read_text()) if history.exists() else []
    with Soak(folder, "disturbed", plan.num_steps, plan.save_every) as soak:
        while True:
            rng = random.Random(f"{seed} {len(ends)}")
            # Replaced at the end of this start, unless the benchmark is stopped first.
            _write(history, [*ends, STOPPED])
            soak.start()
            kind, victim = rng.choice(KINDS), rng.randrange(COUNT)
            trains = rng.random() >= SHARE_IN_START_UP
            seconds = rng.uniform(0.1, 1.9) * every_seconds
            if not trains:
                seconds = rng.random() * plan.start_up_seconds
            if soak.ends_within(seconds, of_training=trains):
                soak.check_done()
                return soak, ends
            step, begun = soak.step(), time.monotonic()
            codes = soak.disturb(kind, victim)
            left = " and left" * (codes == [PREEMPTED] * COUNT)
            ends.append(kind + left)
            _write(history, ends)
            print(
                f"  start {len(ends)}: {kind} at step {step}, exit codes {codes} "
                f"after {time.monotonic() - begun:.1f} s",
                flush=True,
            )


@contextlib.contextmanager
def timed(folder: Path) -> Iterator[list[float]]:
    """Records the seconds of each part of the benchmark in the folder; yields them."""
    path = folder / "seconds.json"
    seconds = json.loads(path.read_text()) if path.exists() else []
    begun = time.monotonic()
    try:
        yield seconds
    finally:
        seconds.append(time.monotonic() - begun)
        _write(path, seconds)


def _write(path: Path, value: object) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value))
    part.replace(path)


def leftovers(workdir: Path) -> list[str]:
    """Returns the names of temporary files in a workdir."""
    names = (path.relative_to(workdir).as_posix() for path in workdir.rglob("*"))
    return [name for name in names if re.search(r"\.part|\.lock|tmp|\.deleted", name)]


def rows_of(whole: Soak, often: Soak) -> list[Row]:
    """Compares the checkpoints, and measures memory and files after a first quarter."""
    runs = whole.run.last(), often.run.last()
    same = same_bits(runs[0][1], runs[1][1]) and runs[0][0] == runs[1][0]
    last = max(note.seconds for note in whole.notes)
    settled = [note for note in whole.notes if note.seconds > last / 4]
    seconds, mb = (
        np.array([getattr(n, f) for n in settled]) for f in ("seconds", "mb")
    )
    halves = [
        [n.files for n in settled if (n.seconds > last * 5 / 8) == half]
        for half in (False, True)
    ]
    left = leftovers(often.run.workdir)
    return [
        Row(
            f"final checkpoint, {len(jax.tree.leaves(runs[0][1]))} arrays, and figures",
            "bit for bit" if same else "DIFFER",
            "",
            float(not same),
            "<=",
            0.0,
        ),
        Row(
            f"resident memory of a process over {(last * 3 / 4) / 60:.0f} minutes",
            f"{mb.min():.0f} to {mb.max():.0f} MB",
            "",
            float(np.polyfit(seconds, mb, 1)[0] * 3600),
            "<=",
            MOST_MB_AN_HOUR,
            "MB per hour",
        ),
        Row(
            "open files of a process, median of the second half minus the first",
            f"at most {max(map(max, halves))}",
            "",
            float(np.median(halves[1]) - np.median(halves[0])),
            "<=",
            0.0,
            "files",
        ),
        Row(
            "unfinished files in the workdir",
            ", ".join(left) or "none",
            "",
            float(len(left)),
            "<=",
            0.0,
        ),
    ]


def run_in(folder: Path, args: argparse.Namespace) -> list[Row]:
    """Runs or continues the benchmark in a folder, and prints its progress."""
    with timed(folder) as seconds:
        plan = planned(folder, args.hours)
        print(
            f"start-up {plan.start_up_seconds:.0f} s; {plan.num_steps} steps of "
            f"{plan.step_seconds:.3f} s, a save every {plan.save_every} steps",
            flush=True,
        )
        with (
            ThreadPoolExecutor(1) as pool,
            Soak(folder, "undisturbed", plan.num_steps, plan.save_every) as whole,
        ):
            one_go = pool.submit(undisturbed, folder, plan, whole)
            often, ends = disturbed(
                folder, plan, seed=args.seed, every_seconds=args.every_seconds
            )
            one_go.result()
        rows = rows_of(whole, often)
    counts = ", ".join(f"{n} x {end}" for end, n in collections.Counter(ends).items())
    print(f"disturbed: {len(ends) + 1} starts: {counts}")
    print(f"{sum(seconds) / 3600:.2f} hours, both runs side by side")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hours", type=float, default=4.0)
    parser.add_argument(
        "--folder", type=Path, help="folder to keep and continue [temporary]"
    )
    parser.add_argument(
        "--every_seconds",
        type=float,
        default=180.0,
        help="mean time between disturbances",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed of the disturbances"
    )
    args = parser.parse_args()
    # Also ends the processes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with contextlib.ExitStack() as stack:
        folder = args.folder
        if folder is None:
            scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
            folder = Path(stack.enter_context(scratch))
        folder.mkdir(parents=True, exist_ok=True)
        rows = run_in(folder.absolute(), args)
    emit(*rows)
    return 0 if all(row.is_met for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
