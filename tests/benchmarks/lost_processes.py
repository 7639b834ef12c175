"""Rehearses that one of four processes is killed or cannot save: `kill`, `full_disk`.

The other processes have to end within a minute, and the same command has to continue
from the last complete checkpoint to the end.
"""

import random
import resource
import time
import traceback

from tests.benchmarks.pod_runs import MOST_SECONDS, flags, show, started
from tests.many_processes import STAGE

LOST_SECONDS = 60
KILLED = ("in start-up", "in a step", "in a save")
FULL_DISK = "cannot save"
MOST_FILE_BYTES = 20_000


def kill(folder, args):
    """4 processes, kill -9 to one: the others end, and the same command continues."""
    steps = args.steps or 12
    start = time.monotonic()
    with started(folder, "measured", 4, given=flags(steps, 4)) as run:
        run.wait_for(f"step  1/{steps}")
        start_up = time.monotonic() - start
    print(f"  start-up takes {start_up:.0f} s", flush=True)
    return lose_one(folder, args, args.rounds or 20, steps, KILLED, start_up)


def full_disk(folder, args):
    """4 processes, one of which cannot save: all end, the same command continues."""
    steps = args.steps or 12
    return lose_one(folder, args, args.rounds or 4, steps, (FULL_DISK,), 0.0)


def lose_one(folder, args, rounds, steps, kinds, start_up):
    """Prints a table of rounds in which one of four processes is lost."""
    rng = random.Random(args.seed)
    given = flags(steps, 4)
    rows = [("round", "process", "when", "exit codes", "seconds", "continued from", "")]
    for i in range(rounds):
        when = kinds[i % len(kinds)]
        try:
            rows.append((i, *lose(folder, i, when, rng, start_up, steps, given)))
        except Exception as error:
            traceback.print_exc()
            rows.append((i, "", when, "", "", "", f"FAILED: {type(error).__name__}"))
        print("  " + "  ".join(map(str, rows[-1])), flush=True)
    show(rows)
    good = sum(row[-1] == "ok" for row in rows)
    print(f"{good} of {rounds}; bar: all end within {LOST_SECONDS} s, not with 0")
    return good == rounds


def lose(folder, i, when, rng, start_up, steps, given):
    """Returns the cells of one round."""
    name, victim = f"lost_{i}", rng.randrange(4)
    with started(folder, name, 4, given=given, is_recorded=False) as run:
        bring_about(run, victim, when, rng, start_up, steps)
        start = time.monotonic()
        # Twice the bar, to see by how much it is missed.
        codes = run.wait(2 * LOST_SECONDS)
        seconds = time.monotonic() - start
        logs, told = run.logs(), run.log(victim)
    complete = [saved.step for saved in run.saved()]
    with started(folder, name, 4, given=given, is_recorded=False) as again:
        last_codes = again.wait()
    said = f"resuming at step {complete[-1]}" if complete else "starting from fresh"
    problems = []
    if any(code in (None, 0) for code in codes):
        problems.append("hung" if None in codes else "ended with 0")
    if seconds > LOST_SECONDS:
        problems.append("too late")
    if when == FULL_DISK and not (
        codes[victim] == 1 and "saving the checkpoint of step" in told
    ):
        problems.append("did not say why")
    if last_codes != [0] * 4 or again.saved()[-1].step != steps:
        problems.append(f"did not continue: {last_codes}")
    elif said not in again.log():
        problems.append(f"did not say {said!r}")
    if problems:
        print(f"{logs}\n=== second start\n{again.logs()}", flush=True)
    return (
        victim,
        when,
        " ".join(map(str, codes)),
        f"{seconds:.1f}",
        f"step {complete[-1] if complete else 0}",
        ", ".join(problems) or "ok",
    )


def bring_about(run, victim, when, rng, start_up, steps):
    """Kills a process of a run, or keeps it from saving and waits until one ends."""
    process = run.processes[victim]
    if when == FULL_DISK:
        run.wait_for(f"step  {rng.choice((1, 2, 5, 6))}/{steps}")
        limits = (MOST_FILE_BYTES, MOST_FILE_BYTES)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limits)
        deadline = time.monotonic() + MOST_SECONDS
        while all(other.poll() is None for other in run.processes):
            if time.monotonic() > deadline:
                raise AssertionError(f"no process has ended\n{run.logs()}")
            time.sleep(0.05)
        return
    if when == "in start-up":
        # Measured with an empty compilation cache: later starts are faster.
        deadline = time.monotonic() + rng.random() * start_up
        while time.monotonic() < deadline and f"step  1/{steps}" not in run.log():
            time.sleep(0.05)
    elif when == "in a step":
        run.wait_for(f"step {rng.choice((2, 3, 5, 6, 7, 9)):>2}/{steps}")
        time.sleep(rng.random() * 0.5)
    else:
        wait_for_save(run)
        time.sleep(rng.random() * 0.2)
    process.kill()


def wait_for_save(run):
    """Waits until a save has begun; its folder has a temporary name during the save."""
    folder = run.workdir / "checkpoints" / STAGE
    deadline = time.monotonic() + MOST_SECONDS
    while not any(folder.glob("*tmp*")):
        if time.monotonic() > deadline or run.processes[0].poll() is not None:
            raise AssertionError(f"no save began\n{run.logs()}")
        time.sleep(0.002)
