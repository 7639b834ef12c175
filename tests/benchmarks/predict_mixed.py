"""Rehearses `predict` on 2,000 files as found in practice, with a real run.

    python -m tests.benchmarks.predict_mixed --workdir=runs/f2_multitask-toy_regions
    python -m tests.benchmarks.predict_mixed --workdir=... --keep=folder   # to inspect

The files are JPEG, PNG and WebP in the variants of `tests/mixed_images.py`, including
CMYK and all EXIF orientations, with odd names; 30 files are damaged in ten ways. The
folder is predicted as a submission, and a CSV that lists it in another order is
predicted as JSON lines and as a contact sheet. Checked: every file has a row, in order,
and no row is empty; exactly the damaged files are named, on stderr and in the lines;
both passes agree; and each intact file gets the answer of the plain JPEG of its scene,
except for losses of the encoding: the mean difference of their scores is printed by
kind. Bars: no wrong row, no file wrongly named, a difference of 0.01 for any kind that
keeps the colours. Exit code 1 if a bar is not met.

The scenes are drawn as `toy_regions` draws them, or taken from --scenes.
"""

import argparse
import csv
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from jaxii.prepare.toy_regions import writer
from tests import mixed_images
from tests.benchmarks.table import Row, emit

NUM_FILES, NUM_DAMAGED, NUM_SCENES = 2_000, 30, 60
MOST_DIFFERENCE = 0.01
PLAIN = "JPEG"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--scenes", type=Path, help="a folder of upright images")
    parser.add_argument("--keep", type=Path, help="folder for files and answers")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        scenes = read_scenes(args.scenes or drawn(folder / "drawn"))
        written = mixed_images.write(folder / "files", scenes, NUM_FILES, NUM_DAMAGED)
        rows = rehearse(args.workdir, folder, written)
    emit(*rows)
    return 0 if all(row.is_met for row in rows) else 1


def drawn(folder: Path) -> Path:
    files = writer.write(folder, num_train=NUM_SCENES, num_tuning=1, num_test=1)
    return files / "train"


def read_scenes(folder: Path) -> list[Image.Image]:
    """Returns upright scenes wider than high, so that a rotation is visible."""
    found = sorted(path for path in folder.rglob("*") if path.suffix == ".jpg")
    scenes = []
    for path in found[:NUM_SCENES]:
        image = Image.open(path).convert("RGB")
        side = min(image.size)
        scenes.append(image.resize((max(4 * side, 400), max(3 * side, 300))))
    return scenes


def predict(workdir: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "jaxii.main", "predict", f"--workdir={workdir}", *words],
        capture_output=True,
        text=True,
        check=False,
    )


def rehearse(workdir: Path, folder: Path, written) -> list[Row]:
    begin = time.perf_counter()
    whole = folder / "files"
    first = predict(workdir, f"--images={whole}", f"--output={folder / 'a.csv'}")
    seconds = time.perf_counter() - begin
    print(first.stdout, first.stderr, sep="\n", flush=True)
    shuffled = random.Random(0).sample(written, len(written))
    with (folder / "list.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "image_id"])
        writer.writerows((f"files/{w.name}", f"id {i}") for i, w in enumerate(shuffled))
    second = predict(
        workdir,
        f"--images={folder / 'list.csv'}",
        f"--output={folder / 'b.jsonl'}",
        f"--sheet={folder / 'b.html'}",
    )
    print(second.stdout, second.stderr, sep="\n", flush=True)
    with (folder / "a.csv").open(newline="") as file:
        _, *answers = csv.reader(file)
    lines = [json.loads(line) for line in (folder / "b.jsonl").open()]
    told = re.search(r"(\d+) of them damaged", first.stdout)
    by_kind = differences(lines, shuffled)
    for kind, difference in sorted(by_kind.items(), key=lambda item: -item[1]):
        print(f"  {kind:20} {difference:.4f}")
    colours = {kind: d for kind, d in by_kind.items() if mixed_images.WHOLE[kind][2]}
    worst = max(colours, key=lambda kind: colours[kind])
    size = (folder / "b.html").stat().st_size / 1e6
    counted = int(told[1]) if told else 0
    return [
        Row(
            f"rows of {len(answers)} that are empty or out of order, for a folder",
            f"{seconds:.0f} s with start-up and compiling",
            "",
            out_of_order(answers, written),
            "<=",
            0,
        ),
        Row(
            f"rows of {len(lines)} that are not in the order of the CSV, or differ "
            "from the folder's",
            f"also a sheet of {size:.1f} MB",
            "",
            differing(lines, shuffled, dict(zip(names(written), answers, strict=True))),
            "<=",
            0,
        ),
        Row(
            f"files wrongly named as damaged or intact, of {NUM_DAMAGED} damaged",
            f"counted by the command: {counted}",
            "",
            wrongly_named(lines, shuffled) + abs(counted - NUM_DAMAGED),
            "<=",
            0,
        ),
        Row(
            "mean difference of scores from the plain JPEG's, worst encoding in colour",
            worst,
            "",
            colours[worst],
            "<=",
            MOST_DIFFERENCE,
        ),
    ]


def names(written) -> list[str]:
    return [one.name for one in written]


def out_of_order(answers: list[list[str]], written) -> int:
    return sum(
        row[0] != Path(one.name).stem or not row[1]
        for row, one in zip(answers, written, strict=True)
    )


def differing(lines, shuffled, by_name) -> int:
    return sum(
        line["file"] != f"files/{one.name}"
        or line["image_id"] != f"id {i}"
        or not (
            one.is_damaged
            or " ".join(label["code"] for label in line["labels"])
            == by_name[one.name][1]
        )
        for i, (line, one) in enumerate(zip(lines, shuffled, strict=True))
    )


def wrongly_named(lines, shuffled) -> int:
    wrong = [
        one
        for line, one in zip(lines, shuffled, strict=True)
        if one.is_damaged is not bool(line.get("error"))
    ]
    for one in wrong:
        print(f"  wrong: {one}")
    return len(wrong)


def differences(lines, shuffled) -> dict[str, float]:
    """Returns kind -> mean over its files of the mean difference of their scores."""
    scores = {}
    for line, one in zip(lines, shuffled, strict=True):
        if not one.is_damaged:
            scores.setdefault((one.kind, one.scene), line["scores"])
    found: dict[str, list[float]] = {}
    for (kind, scene), ours in scores.items():
        plain = scores.get((PLAIN, scene))
        if plain is not None:
            codes = ours.keys() | plain.keys()
            mean = np.mean([abs(ours.get(c, 0) - plain.get(c, 0)) for c in codes])
            found.setdefault(kind, []).append(float(mean))
    return {kind: float(np.mean(values)) for kind, values in found.items()}


if __name__ == "__main__":
    sys.exit(main())
