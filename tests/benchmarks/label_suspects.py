"""Precision of `suspects` on planted label errors.

    python -m tests.benchmarks.label_suspects --files=DIR

DIR holds the training images and people's labels as `prepare` reads them. In a random 2
% of the images, one label is changed. In half of them, a label of the image is removed
(it has others); in the other half, a label is added, with a probability proportional to
its number of images. The data is prepared, `hold_out --folds=2` trains two small
networks, and `suspects` lists labels. With k changed images, precision is their share
of the first k listed images, and chance is their share of all images. Errors that were
already in the files count against the precision. Exit code 1 if the precision is below
five times chance.
"""

import argparse
import csv
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from jaxii.config import Config, default_config
from jaxii.prepare.kaggle import FILES, Layout, prepare
from jaxii.runs.hold_out import hold_out
from jaxii.runs.suspects import suspects
from jaxii.runs.workdir import Workdir
from tests.benchmarks.table import Row, emit

BAR, SHARE, FOLDS = 5.0, 0.02, 2
# An image and the code of one of its labels.
Entry = tuple[str, str]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=Path, required=True)
    parser.add_argument("--keep", type=Path, help="folder for data and runs")
    parser.add_argument("--epochs", type=float, default=10.0)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--pixels", type=int, default=32)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(exist_ok=True)
        num_images, planted = plant(args.files, folder / "labels.csv")
        nothing = {"tuning_labels": None, "sample_submission": None, "test_images": ()}
        changed = Layout.find(args.files, human_labels=folder / "labels.csv", **nothing)
        prepare(changed, folder / "data")
        listed = list_suspects(folder, args)
    row = precision(listed, planted, num_images)
    emit(row)
    return 0 if row.is_met else 1


def plant(files: Path, path: Path) -> tuple[int, dict[Entry, bool]]:
    """Writes people's labels with errors.

    Returns:
      The number of images, and the changed entries with whether each was added.
    """
    with (files / FILES["classes"]).open(newline="") as file:
        trained = {row["label_code"] for row in csv.DictReader(file)}
    labels: dict[str, list[str]] = defaultdict(list)
    with (files / FILES["human_labels"]).open(newline="") as file:
        for row in csv.DictReader(file):
            if float(row["Confidence"]) == 1 and row["LabelName"] in trained:
                labels[row["ImageID"]].append(row["LabelName"])
    counts = Counter(code for codes in labels.values() for code in codes)
    codes = sorted(counts)
    odds = np.array([counts[code] for code in codes], float)
    rng, planted = np.random.default_rng(0), {}
    several = sorted(image for image, its in labels.items() if len(its) > 1)
    chosen = rng.permutation(several)[: round(SHARE * len(labels))]
    for number, image in enumerate(chosen.tolist()):
        if number % 2:
            code = str(rng.choice(labels[image]))
            labels[image].remove(code)
        else:
            absent = odds * [code not in labels[image] for code in codes]
            code = str(rng.choice(codes, p=absent / absent.sum()))
            labels[image].append(code)
        planted[image, code] = number % 2 == 0
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("ImageID", "Source", "LabelName", "Confidence"))
        for image, its in labels.items():
            writer.writerows((image, "verification", code, 1) for code in its)
    return len(labels), planted


def list_suspects(folder: Path, args: argparse.Namespace) -> list[Entry]:
    """Trains without each fold; returns the listed entries, most suspect first."""
    config = default_config()
    config.data.dataset, config.data.directory = "kaggle", str(folder / "data")
    config.data.image_size_pixels = args.pixels
    config.data.augmentation = 0.5
    config.model.depth, config.model.width = 18, args.width
    config.model.compute_dtype = "float32"
    config.optimizer.average, config.optimizer.ema_decay = "ema", 0.99
    config.evaluate_every_steps = 1_000_000  # only at the end
    stage = {"name": "bce", "num_epochs": args.epochs, "terms": {"bce": 1.0}}
    config.stages = (stage,)
    workdir = Workdir(folder / "run")
    hold_out(
        workdir,
        config=Config.resolve(config),
        data_dir="",
        should_stop=lambda step: False,
        folds=FOLDS,
    )
    output = folder / "suspects.csv"
    sheet = folder / "suspects.html"
    suspects(workdir, data_dir="", output=output, sheet=sheet, top=1_000_000)
    with output.open(newline="") as file:
        return [(row["image_id"], row["label"]) for row in csv.DictReader(file)]


def precision(listed: list[Entry], planted: dict[Entry, bool], num_images: int) -> Row:
    """Prints what was found; returns the precision of the first images."""
    changed = {image for image, _ in planted}
    k, chance = len(changed), len(changed) / num_images
    first = list(dict.fromkeys(image for image, _ in listed))[:k]
    share = sum(image in changed for image in first) / k
    for is_added, what in ((False, "removed"), (True, "added")):
        kind = {entry for entry, added in planted.items() if added == is_added}
        found, in_all = (
            sum(entry in kind for entry in rows) for rows in (listed[:k], listed)
        )
        print(
            f"{what}: {found} of {len(kind)} labels in the first {k} rows, {in_all} in "
            f"all {len(listed)}"
        )
    return Row(
        what=f"label suspects: first {k} of {num_images} images, {k} with an error",
        ours=f"precision {share:.1%}",
        peer=f"chance {chance:.1%}",
        figure=share / chance,
        relation=">=",
        bar=BAR,
    )


if __name__ == "__main__":
    sys.exit(main())
