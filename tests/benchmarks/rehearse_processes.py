"""Rehearses, with real processes over loopback, what can happen to runs of a pod.

    python -m tests.benchmarks.rehearse_processes topologies
    python -m tests.benchmarks.rehearse_processes preempt
    python -m tests.benchmarks.rehearse_processes kill --rounds=20
    python -m tests.benchmarks.rehearse_processes full_disk --rounds=4
    python -m tests.benchmarks.rehearse_processes reshape --seeds=3

Each trains the small run of `tests/many_processes.py` on eight CPU devices, prints a
table, and exits with 1 if a bar is not met. If a round fails, the end of its logs is
printed, and the next round begins. On two idle cores, the commands take about 4, 8, 30,
5 and 10 minutes.
"""

import argparse
import collections
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from tests.benchmarks.lost_processes import full_disk, kill
from tests.benchmarks.pod_runs import DEVICES, evaluated, finished, flags, show, started
from tests.many_processes import PREEMPTED, prepare_folder

BATCH = 128
SAME_PARAMS = 1e-5
# Difference of a figure between 0 and 1 that rounding of the parameters may cause.
SAME_FIGURES = 1e-6
# Biases behind a zero scale have hardly left zero after some steps.
LEAST_SCALE = 1e-5
PREEMPTED_SECONDS = 30


def steady(num_steps, seed=0):
    """Returns the flags of runs that are compared up to rounding.

    These runs have 16 images per device and final maps of four pixels. With the four
    images and single-pixel maps of the small recipe, BatchNorm has only four values,
    and a difference grows about fivefold per step.
    """
    return (
        *flags(num_steps, 10, seed),
        "--config.data.image_size_pixels=64",
        f"--config.global_batch_size={BATCH}",
    )


def difference(one, other):
    """Returns the largest difference of two trees, relative to each leaf's maximum.

    A maximum below `LEAST_SCALE` counts as `LEAST_SCALE`.
    """
    worst = 0.0
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        largest = max(float(np.max(np.abs(a))), LEAST_SCALE)
        worst = max(worst, float(np.max(np.abs(a - b))) / largest)
    return worst


def same_bits(one, other):
    leaves = jax.tree.leaves(one), jax.tree.leaves(other)
    return all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(*leaves, strict=True)
    )


def ids(run):
    """Returns step -> its (position, index) pairs, in order."""
    steps = run.examples()
    return {
        step: sorted(
            pair
            for positions, index in steps[step].values()
            for pair in zip(positions, index, strict=True)
        )
        for step in sorted(steps)
    }


def splits(run):
    """Returns the figures of every split of a finished run."""
    return json.loads((run.workdir / "metrics.json").read_text())["splits"]


def figures(run):
    """Returns every number of every split of a finished run, in order."""
    leaves = jax.tree.leaves(splits(run))
    return np.array([leaf for leaf in leaves if isinstance(leaf, int | float)])


def topologies(folder, args):
    """1 x 8, 2 x 4, 4 x 2 (processes x devices): the same run and the same figures.

    The runs' parameters differ by rounding, so the last column evaluates one checkpoint
    on each: metrics.json and submission.csv have to be identical to the last digit.
    """
    given = steady(args.steps or 20)
    runs = {
        n: finished(folder, f"{n}x{DEVICES // n}", n, given=given) for n in (1, 2, 4)
    }
    saved, arrays = runs[1].last()
    answers = (runs[1].workdir / "submission.csv").read_bytes()
    results = evaluated(runs[1], 1)
    heads = "processes x devices,params,figures,ids,best F2s,submission,one checkpoint"
    rows = [tuple(heads.split(","))]
    good = True
    for count, run in runs.items():
        other, other_arrays = run.last()
        largest = difference(arrays["model"]["params"], other_arrays["model"]["params"])
        same = (
            ids(run) == ids(runs[1]),
            other.evaluations == saved.evaluations,
            (run.workdir / "submission.csv").read_bytes() == answers,
            evaluated(runs[1], count) == results,
        )
        rounding = float(np.max(np.abs(figures(run) - figures(runs[1]))))
        good &= all(same) and largest <= SAME_PARAMS and rounding <= SAME_FIGURES
        words = ("same" if each else "DIFFER" for each in same)
        rows.append((run.workdir.name, f"{largest:.1e}", f"{rounding:.1e}", *words))
    show(rows)
    print(
        f"bars of the largest differences: params {SAME_PARAMS:.0e} (relative), "
        f"figures of all splits {SAME_FIGURES:.0e}"
    )
    return good


def preempt(folder, args):
    """4 processes, SIGTERM to one; the resumed run equals the undisturbed one."""
    rng = random.Random(args.seed)
    steps = args.steps or 20
    given = flags(steps, 10)
    whole = finished(folder, "undisturbed", 4, given=given)
    rows = [("asked", "after", "saved at", "exit codes", "seconds", "resumed")]
    good = True
    for i in range(args.rounds or 3):
        name, index = f"preempted_{i}", rng.randrange(4)
        after = rng.randrange(2, steps - 4)
        with started(folder, name, 4, given=given) as run:
            run.wait_for(f"step {after:>2}/{steps}")
            start = time.monotonic()
            run.preempt(index)
            codes = run.wait()
            seconds = time.monotonic() - start
        trained = run.examples()
        lasts = {max(s for s in trained if p in trained[s]) for p in range(4)}
        lasts |= {run.saved()[-1].step}
        again = finished(folder, name, 4, given=given)
        same = same_bits(again.last()[1], whole.last()[1]) and ids(again) == ids(whole)
        good &= codes == [PREEMPTED] * 4 and seconds <= PREEMPTED_SECONDS
        good &= len(lasts) == 1 and same
        rows.append(
            (
                f"process {index}",
                f"step {after}",
                ", ".join(map(str, sorted(lasts))),
                " ".join(map(str, codes)),
                f"{seconds:.1f}",
                "bit for bit" if same else "DIFFERS",
            )
        )
    show(rows)
    print(
        f"bar: one step, exit code {PREEMPTED}, within {PREEMPTED_SECONDS} s, equal "
        "bit for bit"
    )
    return good


def reshape(folder, args):
    """4 -> 2 -> 8 -> 1 processes in one run, compared with three undisturbed runs."""
    steps = args.steps or 40
    counts = (4, 2, 8, 1)
    given = steady(steps)
    for i, count in enumerate(counts[:-1]):
        with started(folder, "reshaped", count, given=given) as run:
            run.wait_for(f"step {(i + 1) * steps // len(counts):>2}/{steps}")
            run.preempt(count - 1)
            codes = run.wait()
        if codes != [PREEMPTED] * count:
            raise AssertionError(f"{count} processes: {codes}\n{run.logs()}")
        print(f"  {count} processes to step {run.saved()[-1].step}", flush=True)
    run = finished(folder, "reshaped", counts[-1], given=given)
    others = [
        finished(folder, f"seed_{seed}", 1, given=steady(steps, seed))
        for seed in range(args.seeds)
    ]
    trained = [pair for pairs in ids(run).values() for pair in pairs]
    positions = [position for position, _ in trained]
    in_order = positions == list(range(steps * BATCH))
    same = ids(run) == ids(others[0])
    size, epochs = epochs_of(trained)
    repeated = sum(n > 1 for epoch in epochs for n in epoch.values())
    missing = sum(size - len(epoch) for epoch in epochs[:-1])
    print(
        f"{steps} steps, {len(trained)} examples, {len(epochs)} epochs of {size}: "
        f"{repeated} repeated, {missing} missing in an epoch; positions "
        f"{'are' if in_order else 'ARE NOT'} consecutive; ids per step "
        f"{'equal' if same else 'DIFFER FROM'} those of the undisturbed run"
    )
    rows = [("metric", "reshaped", *(f"seed {s}" for s in range(args.seeds)), "spread")]
    good = in_order and same and not repeated and not missing
    for split, figures in splits(run).items():
        for name in ("f2", "map"):
            values = [splits(other)[split][name] for other in others]
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            # The seed is the same, so reshaping may change only rounding.
            good &= abs(figures[name] - values[0]) <= max(spread, 1e-6)
            cells = (f"{value:.4f}" for value in (figures[name], *values))
            rows.append((f"{split}/{name}", *cells, f"{spread:.4f}"))
    show(rows)
    largest = difference(run.last()[1]["model"], others[0].last()[1]["model"])
    print(f"params and statistics differ by {largest:.1e} from the undisturbed seed 0")
    return good


def epochs_of(trained):
    """Returns the length of an epoch, and the count of every index for each epoch."""
    size = len({index for _, index in trained})
    epochs = collections.defaultdict(collections.Counter)
    for position, index in trained:
        epochs[position // size][index] += 1
    return size, [epochs[number] for number in sorted(epochs)]


COMMANDS = {
    "topologies": topologies,
    "preempt": preempt,
    "kill": kill,
    "full_disk": full_disk,
    "reshape": reshape,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed of kills and signals"
    )
    args = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        prepare_folder(folder, num_train=256, num_test=61)
        good = COMMANDS[args.command](folder, args)
    print(f"{args.command}: {'met' if good else 'NOT MET'}, ", end="")
    print(f"{time.monotonic() - start:.0f} s on {os.cpu_count()} cores")
    return 0 if good else 1


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main())
