"""Compares the stock recipe with a plain PyTorch loop on tests of other domains.

    python -m tests.benchmarks.shifted_tests --sets=SETS --work=WORK --peer=SCRIPT

SETS holds folders in the Kaggle layout with truth/solution.csv and truth/test_meta.csv,
by default the five of the project: clip2photo, and the emoji of each of four vendors as
the test of the other three. Every folder becomes a table for `new`, which prepares it
and writes the stock recipe for --minutes; `train` trains it. At the same time, on its
own core, SCRIPT trains ResNet-18 in PyTorch for as long: as many epochs as fit, by the
processor time of its first two. If the longest training leaves time, `new` prints a
`hold_out` command that fills it; then that command runs too, and the decoders fitted on
held-out domains have a column. Neither side sees a label or an image of the test.

Both lengths are first measured for all sets, on an otherwise idle machine. Each
finished pair is a line of WORK/results.jsonl and is not repeated. The table shows the
F2 of the test by the decoder that each side chose on its own validation split, the
provenance of jaxii's figure, the time estimate that `new` printed, and the processor
time of both in minutes, which other work on the machine does not change.
"""

import argparse
import csv
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean

from tests.benchmarks import peers

SETS = ("clip2photo", "emoji_openmoji", "emoji_google", "emoji_fluent", "emoji_twitter")
PEER_FLAGS = ("--soft_f", "--augment", "--threads=1")
ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--peer", type=Path, required=True)
    parser.add_argument("--names", default=",".join(SETS))
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seeds", default="0")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    results = args.work / "results.jsonl"
    seeds, names = args.seeds.split(","), args.names.split(",")
    keys = [[name, int(seed), args.minutes] for seed in seeds for name in names]
    keys = [key for key in keys if key not in [row["key"] for row in _rows(results)]]
    lengths = [_lengths(args, name, seed) for name, seed, _ in keys]
    for key, length in zip(keys, lengths, strict=True):
        row = {"key": key, **_pair(args, *key[:2], *length)}
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    _print_table([row for row in _rows(results) if row["key"][2] == args.minutes])


def _rows(results: Path) -> list[dict]:
    return list(map(json.loads, results.open())) if results.exists() else []


def _lengths(args: argparse.Namespace, name: str, seed: int) -> tuple[int, int | None]:
    """Returns the peer's epochs and the minutes that `new` estimates for its recipe.

    `new` and the peer's first epochs run at the same time, as the two trainings do.
    """
    files, work = args.sets / name, _work(args, name, seed)
    lengths = work / "lengths.json"
    if not lengths.exists():
        _write_table(files, work / "table.csv")
        peer = _start_peer(args, files, work / "first.log", 2, seed)
        new = ("new", str(work / "stock"), f"--images={files}")
        new += (f"--labels={work / 'table.csv'}", f"--minutes={args.minutes}")
        _finish(_start_jaxii(work / "new.log", *new, "--label_separator=space"))
        epochs = int(args.minutes / _finish(peer) * 2)
        printed = (work / "new.log").read_text()
        estimate = re.search(r"time +about (\d+) minutes", printed)
        minutes = int(estimate[1]) if estimate else None
        lengths.write_text(json.dumps([max(2, epochs), minutes]))
    return tuple(json.loads(lengths.read_text()))


def _pair(
    args: argparse.Namespace, name: str, seed: int, epochs: int, estimate: int | None
) -> dict:
    """Trains both sides on a set at the same time; returns their figures."""
    work = _work(args, name, seed)
    peer = _start_peer(args, args.sets / name, work / "peer.log", epochs, seed)
    train = ("train", f"--config={work / 'stock' / 'stock.py'}")
    train += (f"--workdir={work / 'run'}", f"--config.seed={seed}")
    start = time.monotonic()
    our_minutes = _finish(_start_jaxii(work / "train.log", *train))
    minutes = (time.monotonic() - start) / 60
    metrics = json.loads((work / "run" / "metrics.json").read_text())
    held_out = _held_out(work)
    peer_minutes = _finish(peer)
    theirs = _peer_figures(work / "peer.log")
    return {
        "jaxii": metrics["splits"]["test"]["f2"],
        "oracle_threshold": metrics["splits"]["test"]["best_f2"],
        "validation": metrics["splits"]["validation"]["f2"],
        "decoder": metrics["decoder"]["name"],
        "minutes": round(minutes, 1),
        "processor_minutes": round(our_minutes, 1),
        "estimated_minutes": estimate,
        **held_out,
        "peer": theirs["f2"],
        "peer_validation": theirs["validation"],
        "peer_processor_minutes": round(peer_minutes, 1),
        "peer_epochs": epochs,
        "clean": metrics["provenance"]["clean"],
    }


def _held_out(work: Path) -> dict:
    """Runs the `hold_out` that `new` printed; returns its figures, empty if none."""
    length = re.search(r"hold_out .*--length=([\d.]+)", (work / "new.log").read_text())
    if length is None:
        return {}
    workdir = f"--workdir={work / 'run'}"
    minutes = 0.0
    for name, flag in (
        ("hold_out", f"--length={length[1]}"),
        ("evaluate", "--tune_on=held_out"),
    ):
        minutes += _finish(_start_jaxii(work / f"{name}.log", name, workdir, flag))
    metrics = json.loads((work / "run" / "metrics_tuned_on_held_out.json").read_text())
    return {
        "held_out": metrics["splits"]["test"]["f2"],
        "held_out_processor_minutes": round(minutes, 1),
        "held_out_clean": metrics["provenance"]["clean"],
    }


def _work(args: argparse.Namespace, name: str, seed: int) -> Path:
    work = args.work / f"{name}-{args.minutes:g}-{seed}"
    work.mkdir(parents=True, exist_ok=True)
    return work


def _write_table(files: Path, path: Path) -> None:
    """Writes a set in the Kaggle layout as one table that `new` reads."""
    names = dict(_csv(files / "class-descriptions.csv"))
    trainable = {code for (code,) in _csv(files / "classes-trainable.csv")}
    labels = defaultdict(list)
    for image, _, code, confidence in _csv(files / "train_human_labels.csv"):
        if float(confidence) > 0 and code in trainable:
            labels[image].append(_word(names[code]))
    rows = [
        (f"train/images/{image}.jpg", labels[image], "train", group, domain, "all")
        for image, domain, _, group in _csv(files / "train_meta.csv")
        if labels[image]
    ]
    meta = {row[0]: row for row in _csv(files / "truth" / "test_meta.csv")}
    for image, codes in _csv(files / "truth" / "solution.csv"):
        _, domain, part, _ = meta[image]
        found = [_word(names[code]) for code in codes.split() if code in trainable]
        file = f"stage_1_test_images/{image}.jpg"
        rows.append((file, found, "test", f"test {image}", domain, part))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "labels", "split", "group", "domain", "slice"))
        writer.writerows((row[0], " ".join(row[1]), *row[2:]) for row in rows)


def _word(label: str) -> str:
    return re.sub(r"\W+", "_", label)


def _csv(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))[1:]


def _start_jaxii(log: Path, *words: str) -> tuple[subprocess.Popen, Path]:
    return _start([sys.executable, "-m", "jaxii.main", *words], log, core=0)


def _start_peer(
    args: argparse.Namespace, files: Path, log: Path, epochs: int, seed: int
) -> tuple[subprocess.Popen, Path]:
    command = [peers.python(), str(args.peer), str(files), f"--epochs={epochs}"]
    return _start([*command, *PEER_FLAGS, f"--seed={seed}"], log, core=1)


def _start(command: list[str], log: Path, core: int) -> tuple[subprocess.Popen, Path]:
    print("  " + shlex.join(command), flush=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, preexec_fn=lambda: _core(core)
        )
    return process, log


def _finish(started: tuple[subprocess.Popen, Path]) -> float:
    """Waits for a command; returns its processor time in minutes."""
    process, log = started
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"a command failed; see {log}")
    return (usage.ru_utime + usage.ru_stime) / 60


def _peer_figures(log: Path) -> dict[str, float]:
    last = log.read_text().splitlines()[-1]
    figures = re.search(r"validation F2 ([\d.]+) .* test F2 ([\d.]+)", last)
    validation, f2 = map(float, figures.groups())
    return {"validation": validation, "f2": f2}


def _core(number: int) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})


def _print_table(rows: list[dict]) -> None:
    print(
        "| test | seed | minutes (estimate) | jaxii | with hold_out | PyTorch | "
        "difference |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        name, seed, _ = row["key"]
        print(
            f"| {name} | {seed} | {row['minutes']} ({row['estimated_minutes']}) | "
            f"{row['jaxii']:.3f} {'clean' if row['clean'] else 'NOT CLEAN'}, "
            f"{row['processor_minutes']} min | {_held_out_cell(row)} | "
            f"{row['peer']:.3f}, {row['peer_epochs']} epochs, "
            f"{row['peer_processor_minutes']} min | {row['jaxii'] - row['peer']:+.3f} |"
        )
    if rows:
        ours, theirs = (mean(row[side] for row in rows) for side in ("jaxii", "peer"))
        print(f"| mean | | | {ours:.3f} | | {theirs:.3f} | {ours - theirs:+.3f} |")


def _held_out_cell(row: dict) -> str:
    if "held_out" not in row:
        return ""
    clean = "clean" if row["held_out_clean"] else "NOT CLEAN"
    minutes = row["held_out_processor_minutes"]
    return f"{row['held_out']:.3f} {clean}, {minutes} min more"


if __name__ == "__main__":
    main()
