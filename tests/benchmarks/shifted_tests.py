"""The stock recipe against a plain PyTorch loop, on tests of other domains.

    python -m tests.benchmarks.shifted_tests --sets=SETS --work=WORK --peer=SCRIPT

SETS holds folders in the Kaggle layout with truth/solution.csv and truth/test_meta.csv,
by default the five of the project: clip2photo, and the emoji of each of four vendors in
turn as the test of the other three. Every folder becomes a table for `new`, which
prepares it and writes the stock recipe for --minutes; `train` trains it. Beside it, on
a core of its own, SCRIPT trains ResNet-18 in PyTorch for as long: the epochs that fit,
by the time of its first two. Neither sees a label or an image of the test.

Each finished pair is a line of WORK/results.jsonl and is not repeated. The table shows
F2 of the test by the decoder that each side chose on its own validation split, the
provenance of jaxii's figure, and the estimate of time that `new` printed.
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
    for seed in args.seeds.split(","):
        for name in args.names.split(","):
            key = [name, int(seed), args.minutes]
            if key in [row["key"] for row in _rows(results)]:
                continue
            row = {"key": key, **_pair(args, name, int(seed))}
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    _print_table([row for row in _rows(results) if row["key"][2] == args.minutes])


def _rows(results: Path) -> list[dict]:
    return list(map(json.loads, results.open())) if results.exists() else []


def _pair(args: argparse.Namespace, name: str, seed: int) -> dict:
    """Trains both sides on a set at the same time; returns their figures."""
    files, work = args.sets / name, args.work / f"{name}-{args.minutes:g}-{seed}"
    work.mkdir(parents=True, exist_ok=True)
    per_epoch = _peer_result(_start_peer(args, files, work / "first.log", 2, seed))
    epochs = max(2, int(args.minutes * 60 / per_epoch["seconds"] * 2))
    peer = _start_peer(args, files, work / "peer.log", epochs, seed)
    _write_table(files, work / "table.csv")
    recipe = work / "stock" / "stock.py"
    _jaxii(
        work / "new.log",
        *("new", str(recipe.parent), f"--images={files}"),
        *(f"--labels={work / 'table.csv'}", f"--minutes={args.minutes}"),
        "--label_separator=space",
    )
    estimate = re.search(r"time +about (\d+) minutes", (work / "new.log").read_text())
    start = time.monotonic()
    _jaxii(
        work / "train.log",
        *("train", f"--config={recipe}", f"--workdir={work / 'run'}"),
        f"--config.seed={seed}",
    )
    minutes = (time.monotonic() - start) / 60
    metrics = json.loads((work / "run" / "metrics.json").read_text())
    theirs = _peer_result(peer)
    return {
        "jaxii": metrics["splits"]["test"]["f2"],
        "oracle_threshold": metrics["splits"]["test"]["best_f2"],
        "peer": theirs["f2"],
        "validation": metrics["splits"]["validation"]["f2"],
        "peer_validation": theirs["validation"],
        "decoder": metrics["decoder"]["name"],
        "minutes": round(minutes, 1),
        "estimated_minutes": int(estimate[1]) if estimate else None,
        "peer_minutes": round(theirs["seconds"] / 60, 1),
        "peer_epochs": epochs,
        "clean": metrics["provenance"]["clean"],
    }


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


def _jaxii(log: Path, *words: str) -> None:
    command = [sys.executable, "-m", "jaxii.main", *words]
    print("  " + shlex.join(command), flush=True)
    with log.open("w") as file:
        subprocess.run(
            command, check=True, cwd=ROOT, stdout=file, preexec_fn=lambda: _core(0)
        )


def _start_peer(
    args: argparse.Namespace, files: Path, log: Path, epochs: int, seed: int
) -> tuple[subprocess.Popen, Path]:
    command = [peers.python(), str(args.peer), str(files), f"--epochs={epochs}"]
    command += [*PEER_FLAGS, f"--seed={seed}"]
    print("  " + shlex.join(command), flush=True)
    with log.open("w") as file:
        return subprocess.Popen(command, stdout=file, preexec_fn=lambda: _core(1)), log


def _peer_result(started: tuple[subprocess.Popen, Path]) -> dict[str, float]:
    process, log = started
    if process.wait():
        raise SystemExit(f"the peer failed; see {log}")
    number = r"([\d.]+)"
    last = log.read_text().splitlines()[-1]
    found = re.search(
        rf"epoch \d+ {number} s +validation F2 {number} .* test F2 {number}", last
    )
    seconds, validation, f2 = map(float, found.groups())
    return {"seconds": seconds, "validation": validation, "f2": f2}


def _core(number: int) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})


def _print_table(rows: list[dict]) -> None:
    print("| test | seed | minutes (estimate) | jaxii | PyTorch, epochs | difference |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        name, seed, _ = row["key"]
        print(
            f"| {name} | {seed} | {row['minutes']} ({row['estimated_minutes']}) | "
            f"{row['jaxii']:.3f} {'clean' if row['clean'] else 'NOT CLEAN'} | "
            f"{row['peer']:.3f}, "
            f"{row['peer_epochs']} | {row['jaxii'] - row['peer']:+.3f} |"
        )
    if rows:
        ours, theirs = (mean(row[side] for row in rows) for side in ("jaxii", "peer"))
        print(f"| mean | | | {ours:.3f} | {theirs:.3f} | {ours - theirs:+.3f} |")


if __name__ == "__main__":
    main()
