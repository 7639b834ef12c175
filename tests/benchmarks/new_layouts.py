"""Takes realistic label files through new, prepare, train and evaluate.

    python -m tests.benchmarks.new_layouts            # about 5 minutes
    python -m tests.benchmarks.new_layouts spaces     # one layout

Drawn scenes of toy_regions are written in the layouts of `tests/plain_data.py`,
including their errors; each goes through the commands that `new` prints. Exit code 1 if
a command fails, an error is not named, or the F2 is not above that of the best constant
prediction.
"""

import argparse
import csv
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from jaxii.prepare.toy_regions import writer
from tests import plain_data

NUM_IMAGES = 900


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(plain_data.LAYOUTS)
    parser.add_argument("layouts", nargs="*", help=f"any of {', '.join(names)}")
    parser.add_argument("--num_images", type=int, default=NUM_IMAGES)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        examples = _examples(Path(scratch) / "drawn", args.num_images)
        for name in args.layouts or names:
            failed = _try(name, Path(scratch) / name, examples)
            print(
                f"{name}: {'FAILED: ' + failed if failed else 'passed'}\n", flush=True
            )
            if failed:
                return 1
    return 0


def _examples(folder: Path, number: int) -> list[plain_data.Example]:
    """Draws scenes; returns their images and their human labels."""
    files = writer.write(folder, num_train=number, num_tuning=1, num_test=1)
    described = dict(_read(files / "class-descriptions.csv"))
    labels = defaultdict(list)
    for image, _, code, confidence in _read(files / "train_human_labels.csv"):
        if confidence in ("1", "1.0"):
            labels[image].append(described[code].replace(" ", "-"))
    images = {path.stem: path for path in files.glob("train*/**/*.jpg")}
    return [(images[i].read_bytes(), found) for i, found in sorted(labels.items())]


def _read(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))[1:]


def _try(name: str, folder: Path, examples: list[plain_data.Example]) -> str:
    """Runs all commands on one layout; returns what failed, "" for nothing."""
    print(f"== {name}")
    folder.mkdir()
    words = plain_data.LAYOUTS[name](folder, examples)
    start = time.monotonic()
    code, said = _run(folder, f"python -m jaxii.main new mine {shlex.join(words)}")
    print(said, flush=True)
    if code:
        return "new"
    if name != "folders":
        missed = [p for p in plain_data.DIRT if not re.search(p, said)]
        if missed:
            return f"new does not print {missed}"
    commands = said.partition("\nnext\n")[2].splitlines()
    for command in commands:
        code, output = _run(folder, command)
        print("\n".join(output.splitlines()[-14:]), flush=True)
        if code:
            return command
    code, output = _run(folder, "python -m jaxii.main evaluate --workdir=runs/mine")
    if code:
        return f"evaluate: {output}"
    metrics = json.loads((folder / "runs/mine/metrics.json").read_text())
    ours = metrics["splits"]["validation"]["f2"]
    constant = metrics["constant"]["f2"]["validation"]
    print(
        f"{name}: validation F2 {ours:.3f}, best constant {constant:.3f}, "
        f"{time.monotonic() - start:.0f} s in total"
    )
    return "" if ours > constant else "no better than a constant prediction"


def _run(folder: Path, command: str) -> tuple[int, str]:
    words = [sys.executable, *shlex.split(command)[1:]]
    root = Path(__file__).parent.parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        words,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


if __name__ == "__main__":
    sys.exit(main())
