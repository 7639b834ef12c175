"""Opens reports in a browser: of the default run and of a set with 7,178 classes.

    pip install playwright axe-playwright-python   # and a Chromium of the system
    python -m tests.benchmarks.report_in_browser [--run=runs/f2_multitask-toy_regions]

Writes a small set in the Kaggle layout with 7,178 classes whose names, codes, files and
slices are as hostile as text can be; prepares it, trains a tiny network for a few steps
and evaluates it, all with the commands. Then a browser opens each report and the
comparison of the runs, sorts and searches, and axe checks them in both themes. Exit
code 1 if a page causes console errors or requests, does not react, is larger than 6 MB,
takes over 2 s, or axe finds a serious problem.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import simplejpeg

from tests.benchmarks.table import Row, emit
from tests.report_browser import browser, visit

NUM_CLASSES = 7178
NUM_TRAIN, NUM_TUNING, NUM_TEST = 240, 20, 80
LABELS_AN_IMAGE = 36
MOST_MEGABYTES, MOST_SECONDS = 6.0, 2.0
HOSTILE = (
    "<script>alert('label')</script>",
    "</script><img src=x onerror=alert(1)>",
    "<!--<script>",
    "\"quoted\" & 'single' <b>bold</b>",
    "{{ 7 * 7 }} {% raw %} $x_1$ \\u003c",
    "👩🏽‍🚀 astronaut 🏳️‍🌈",
    "قطة سوداء (cat)",
    "חתול שחור, 12",
    "\u202eright to left override",
    "\u2067isolate without an end",
    "javascript:alert(2)",
    "a name without any space " + "x" * 180,
)
SETTINGS = (
    "--config=configs/f2_multitask.py:emoji",
    "--config.model.width=8",
    "--config.data.image_size_pixels=32",
    "--config.global_batch_size=16",
    "--config.label_embedding.dim=64",
    "--config.evaluate_every_steps=20",
    "--config.log_every_steps=2",
    "--config.stages[0].num_epochs=2.0",
    "--config.stages[1].num_epochs=2.0",
    "--config.stages[2].num_epochs=1.0",
)


def names() -> tuple[list[str], list[str]]:
    """Returns codes and names of the classes; the first ones are hostile."""
    codes = [f"/m/{i:05x}" for i in range(NUM_CLASSES)]
    codes[:3] = ["/m/<script>alert(3)</script>", "/m/\"&'", "/m/\u202e🐈"]
    words = ("Red", "Old", "Wooden", "Small", "Wild", "Open", "Round", "Tall")
    things = ("cat", "boat", "house", "tree", "bicycle", "hat", "bridge", "bird")
    plain = [f"{words[i % 8]} {things[i // 8 % 8]} {i}" for i in range(NUM_CLASSES)]
    return codes, [*HOSTILE, *plain[len(HOSTILE) :]]


def image_ids(kind: str, count: int) -> list[str]:
    """Returns file names that are as hostile as a file system allows."""
    marks = ("<b onclick=alert(4)>", "\"'&", "🐈", "قطة", "\u202egpj", "<script>")
    return [f"{kind}{i}{marks[i % len(marks)]}" for i in range(count)]


def write_files(root: Path) -> Path:
    """Writes the set in the Kaggle layout: smooth noise, Zipf-distributed labels."""
    rng = np.random.default_rng(0)
    codes, described = names()
    shares = 1 / np.arange(1, NUM_CLASSES + 1)
    shares /= shares.sum()
    (root / "train").mkdir(parents=True)
    (root / "stage_1_test_images").mkdir()

    def labels(i: int) -> list[str]:
        # Half of them random, half in turn, so that every class has an image.
        drawn = rng.choice(NUM_CLASSES, LABELS_AN_IMAGE // 2, replace=False, p=shares)
        start = i * 30
        turn = (np.arange(start, start + 30)) % NUM_CLASSES
        return [codes[j] for j in np.union1d(drawn, turn)]

    def image(path: Path) -> None:
        coarse = rng.integers(0, 256, (4, 4, 3), np.uint8)
        pixels = np.ascontiguousarray(np.kron(coarse, np.ones((16, 16, 1), np.uint8)))
        path.write_bytes(simplejpeg.encode_jpeg(pixels, quality=80))

    train = image_ids("train", NUM_TRAIN)
    tuning, test = image_ids("tuning", NUM_TUNING), image_ids("test", NUM_TEST)
    for image_id in train:
        image(root / "train" / f"{image_id}.jpg")
    for image_id in (*tuning, *test):
        image(root / "stage_1_test_images" / f"{image_id}.jpg")
    header = ["ImageID", "Source", "LabelName", "Confidence"]
    rows = [
        [image_id, "verification", code, 1]
        for i, image_id in enumerate(train)
        for code in labels(i)
    ]
    table(root / "train_human_labels.csv", header, *rows)
    table(root / "classes-trainable.csv", ["label_code"], *([c] for c in codes))
    both = zip(codes, described, strict=True)
    table(root / "class-descriptions.csv", ["label_code", "description"], *both)
    answers = [[image_id, " ".join(labels(i))] for i, image_id in enumerate(tuning)]
    table(root / "tuning_labels.csv", *answers)
    header = ["image_id", "labels"]
    solution = [[image_id, " ".join(labels(i))] for i, image_id in enumerate(test)]
    table(root / "stage_1_sample_submission.csv", header, *([i, ""] for i in test))
    table(root / "test_labels.csv", header, *solution)
    slices = [HOSTILE[0], HOSTILE[5], HOSTILE[6], "plain"]
    header = ["image_id", "group", "slice"]
    for name, ids in (("train", train), ("test", [*tuning, *test])):
        meta = [
            [image_id, f"g{i // 2}", slices[i % 4]] for i, image_id in enumerate(ids)
        ]
        table(root / f"{name}_meta.csv", header, *meta)
    return root


def table(path: Path, *rows) -> None:
    """Writes rows as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def jaxii(*words: str) -> None:
    """Runs a command of jaxii; prints its output if it fails."""
    result = subprocess.run(
        [sys.executable, "-m", "jaxii.main", *words],
        env={"JAX_PLATFORMS": "cpu", **os.environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if result.returncode:
        sys.exit(f"{result.stdout}\njaxii {' '.join(words)}: {result.returncode}")


def make_run(folder: Path) -> Path:
    """Makes the set and trains a run on it; returns the workdir."""
    workdir = folder / "<script>alert('run')<|script>"
    if not (workdir / "report.html").exists():
        files = write_files(folder / "files")
        jaxii("prepare", f"--input_dir={files}", f"--data_dir={folder / 'data'}")
        data = f"--data_dir={folder / 'data'}"
        jaxii("train", *SETTINGS, data, f"--workdir={workdir}")
    return workdir


def report_on(name: str, path: Path, opened) -> bool:
    """Opens a page, emits what was found, and returns whether nothing is wrong."""
    found = visit(opened, path)
    for line in (*found.noise, *found.axe_serious, *found.wrong):
        print(f"{name}: {line}")
    impacts = ", ".join(f"{n} {impact}" for impact, n in sorted(found.axe.items()))
    rows = (
        Row(
            f"{name}: size", path.name, "", found.megabytes, "<=", MOST_MEGABYTES, "MB"
        ),
        Row(f"{name}: open", "", "", found.seconds, "<=", MOST_SECONDS, "s"),
        Row(f"{name}: console errors and requests", "", "", len(found.noise), "<=", 0),
        Row(
            f"{name}: axe, serious and critical in both themes",
            f"all findings: {impacts or 'none'}",
            "",
            len(found.axe_serious),
            "<=",
            0,
        ),
        Row(f"{name}: does not react", "", "", len(found.wrong), "<=", 0),
    )
    emit(*rows)
    return all(row.is_met for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path("runs/f2_multitask-toy_regions")
    parser.add_argument(
        "--run", type=Path, default=default, help="workdir of an evaluated run"
    )
    parser.add_argument(
        "--keep", type=Path, help="folder for the generated set and its run"
    )
    args = parser.parse_args()
    if not (args.run / "report.html").exists():
        parser.error(f"{args.run} has no report.html; train the default recipe first")
    with tempfile.TemporaryDirectory() as scratch, browser() as opened:
        folder = (args.keep or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        workdir = make_run(folder)
        one, both = folder / "compare_classes.html", folder / "compare.html"
        jaxii("compare", str(workdir), str(workdir), "--each", f"--output={one}")
        jaxii("compare", str(args.run), str(workdir), f"--output={both}")
        pages = {
            "default run": args.run / "report.html",
            f"{NUM_CLASSES:,} classes": workdir / "report.html",
            f"compare, {NUM_CLASSES:,} classes": one,
            "compare, both runs": both,
        }
        fine = [
            report_on(name, path.absolute(), opened) for name, path in pages.items()
        ]
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
