"""Trains for hours while processes are killed, and compares with an undisturbed run.

    python -m tests.benchmarks.soak --hours=4

Two processes of one CPU device each train the small run of `tests/many_processes.py`,
first undisturbed, for two fifths of the time. A second run of as many steps is then
disturbed at random times that follow from the seed, in start-up, steps, evaluations and
saves: kill -9 to one process, kill -9 to both, SIGTERM to one. The same command starts
it again until it is finished. Every second notes resident memory and open files.

The final checkpoints have to be equal bit for bit, and memory and files flat: over the
undisturbed run after its first quarter.
"""

import argparse
import collections
import math
import random
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from tests.benchmarks.input_memory import resident_mb
from tests.benchmarks.rehearse_processes import same_bits
from tests.benchmarks.table import Row, emit
from tests.many_processes import PREEMPTED, Run, prepare_folder

COUNT = 2
FIRST_STEPS, MEASURED_STEPS, MEASURED_EVERY = 20, 200, 10
SHARE_UNDISTURBED = 0.4
SHARE_IN_START_UP = 0.25
SECONDS_BETWEEN_SAVES = 20.0
KILL_ONE, KILL_ALL, SIGTERM = "kill -9 to one", "kill -9 to both", "SIGTERM to one"
KINDS = KILL_ONE, KILL_ALL, SIGTERM
MOST_SECONDS = 600
MOST_MB_AN_HOUR = 30.0


@dataclass(frozen=True)
class Note:
    """Memory and open files of a process, `seconds` after its first logged step."""

    seconds: float
    mb: float
    files: int


class Soak:
    """A run of two processes that is watched while it trains."""

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
        # One block a stage: most of a start-up would be compilation.
        self.run.module = "tests.small_main"
        self.num_steps = num_steps
        self.notes: list[Note] = []
        self.starts = 0
        self._trains_since: float | None = None

    def __enter__(self) -> "Soak":
        return self

    def __exit__(self, *_) -> None:
        self.run.stop()

    def start(self) -> None:
        self.run.start(COUNT)
        self.starts += 1
        self._trains_since = None

    def step(self) -> int:
        """Returns the last step that was logged since the start; 0 before one."""
        return int([0, *re.findall(r"step +(\d+)/", self.run.log())][-1])

    def ends_within(self, seconds: float, *, of_training: bool = False) -> bool:
        """Watches the processes; returns whether all ended.

        Args:
          seconds: How long.
          of_training: Count from the first logged step, not from now.
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
            raise AssertionError(f"ended by itself with {codes}\n{self.run.logs()}")

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
        # Starting up, decoders and report take memory of their own.
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


def measure(folder: Path) -> tuple[float, float]:
    """Returns the seconds of a start-up, and of a step with its share of saves."""
    begun, times = time.monotonic(), {}
    with Soak(folder, "measured", MEASURED_STEPS, MEASURED_EVERY) as soak:
        soak.start()
        while not soak.ends_within(0.1):
            times.setdefault(soak.step(), time.monotonic())
        soak.check_done()
    known = sorted(step for step in times if step >= FIRST_STEPS)
    seconds = times[known[-1]] - times[known[0]]
    return times[min(filter(None, times))] - begun, seconds / (known[-1] - known[0])


def undisturbed(folder: Path, *steps: int) -> Soak:
    """Trains to the end in one go."""
    with Soak(folder, "undisturbed", *steps) as soak:
        soak.start()
        soak.ends_within(math.inf)
        soak.check_done()
    return soak


def disturbed(
    folder: Path,
    *steps: int,
    rng: random.Random,
    start_up_seconds: float,
    every_seconds: float,
) -> tuple[Soak, collections.Counter[str]]:
    """Trains to the end with many starts; returns what was done how often."""
    done: collections.Counter[str] = collections.Counter()
    with Soak(folder, "disturbed", *steps) as soak:
        while True:
            soak.start()
            kind, victim = rng.choice(KINDS), rng.randrange(COUNT)
            trains = rng.random() >= SHARE_IN_START_UP
            seconds = rng.uniform(0.1, 1.9) * every_seconds
            if not trains:
                seconds = rng.random() * start_up_seconds
            if soak.ends_within(seconds, of_training=trains):
                soak.check_done()
                return soak, done
            step, begun = soak.step(), time.monotonic()
            codes = soak.disturb(kind, victim)
            done[kind] += 1
            done["left"] += codes == [PREEMPTED] * COUNT
            print(
                f"  start {soak.starts}: {kind} at step {step}, exit codes {codes} "
                f"after {time.monotonic() - begun:.1f} s",
                flush=True,
            )


def leftovers(workdir: Path) -> list[str]:
    """Returns what killed processes left in a workdir."""
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
            "MB an hour",
        ),
        Row(
            "open files of a process, median of its second half against its first",
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


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hours", type=float, default=4.0)
    parser.add_argument(
        "--every_seconds", type=float, default=180.0, help="between disturbances, mean"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is killed, when")
    args = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        prepare_folder(folder)
        start_up, per_step = measure(folder)
        save_every = max(round(SECONDS_BETWEEN_SAVES / per_step), 5)
        num_steps = int(args.hours * 3600 * SHARE_UNDISTURBED / per_step)
        steps = max(num_steps, 4 * save_every), save_every
        print(
            f"start-up {start_up:.0f} s; {steps[0]} steps of {per_step:.3f} s, a save "
            f"every {save_every}",
            flush=True,
        )
        whole = undisturbed(folder, *steps)
        print(f"undisturbed: {(time.monotonic() - begun) / 60:.0f} minutes", flush=True)
        often, done = disturbed(
            folder,
            *steps,
            rng=random.Random(args.seed),
            start_up_seconds=start_up,
            every_seconds=args.every_seconds,
        )
        rows = rows_of(whole, often)
    counts = ", ".join(f"{done[kind]} x {kind}" for kind in KINDS)
    print(
        f"{often.starts} starts: {counts}, after which {done['left']} saved and left; "
        f"{(time.monotonic() - begun) / 3600:.2f} hours"
    )
    emit(*rows)
    return 0 if all(row.is_met for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
