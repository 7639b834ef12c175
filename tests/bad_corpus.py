"""Runs `new`, `prepare`, `train` and `predict` on bad images and bad label files.

    python -m tests.bad_corpus FOLDER [N]

Makes the files in FOLDER, runs each command in a child process, and prints how each
ended, as JSON; with N, it uses every N-th table.
"""

import csv
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests import forked

RECIPE_TEXT = """
from jaxii.config import default_config

def get_config(name=""):
    config = default_config()
    config.data.dataset = "kaggle"
    config.data.directory = "mine/data"
    config.data.image_size_pixels = 32
    config.data.validation_fraction = 0.3
    config.data.num_threads = 1
    config.model.depth = 18
    config.model.width = 8
    config.model.stem = "small"
    config.global_batch_size = 8
    config.stages = ({"name": "only", "num_steps": 8, "terms": {"bce": 1.0}},)
    return config
"""
NUM_GOOD = 16
LABELS = ("cat", "dog")
FAST = "--images=photos", "--labels=labels.csv"
COMMANDS = {
    "new": ("new", "mine", *FAST),
    "prepare": ("prepare", "--input_dir=kaggle", "--data_dir=prepared"),
    "train": ("train", "--config=recipe.py", "--workdir=run"),
    "predict": ("predict", "--workdir=run", "--images=photos", "--output=all.jsonl"),
}
MOST_SECONDS = 600


def write_images(root: Path) -> None:
    """Writes good, bad and odd files to photos/, and labels for them.

    The labels are written to labels.csv and, for `prepare`, to kaggle/.
    """
    from jaxii.prepare.image_files import is_text
    from tests import bad_images, mixed_images, odd_files, small_layout

    photos = root / "photos"
    photos.mkdir(parents=True)
    for i in range(NUM_GOOD):
        small_layout.put(photos, f"good{i:02d}", small_layout.jpeg(90 + 4 * i, 40, 48))
    for name, bad in bad_images.all_images().items():
        (photos / name).write_bytes(bad.content)
    for name in mixed_images.NAMES:
        (photos / f"{name}.jpg").write_bytes(b"<html>")
    odd_files.make(photos)
    names = sorted(path.name for path in photos.iterdir())
    names = [name for name in names if is_text(name)]
    rows = [(name, LABELS[i % 2]) for i, name in enumerate(names)]
    _write_csv(root / "labels.csv", ("path", "label"), rows)
    _write_layout(root / "kaggle", rows)
    (root / "kaggle" / "train").symlink_to(photos)
    (root / "recipe.py").write_text(RECIPE_TEXT)


def write_table(root: Path, name: str, content: bytes, file: str) -> None:
    """Writes a bad label file for `new`, and a layout with it for `prepare`."""
    from tests import bad_tables, small_layout

    (root / "photos").mkdir(parents=True)
    _write_layout(root / "kaggle", list(bad_tables.TRUTH.items()))
    train, test = (root / "kaggle" / name for name in ("train", "stage_1_test_images"))
    train.mkdir()
    test.mkdir()
    for i, image in enumerate(bad_tables.NAMES):
        for folder in (root / "photos", test if i % 4 == 0 else train):
            small_layout.put(folder, Path(image).stem, small_layout.jpeg(90 + i))
    (root / name).write_bytes(content)
    (root / "kaggle" / file).write_bytes(LAYOUT_FILES[file](content))


def _with_confidences(content: bytes) -> bytes:
    rows = content.partition(b"\n")[2].replace(b"\n", b",1\n")
    return b"ImageID,LabelName,Confidence\n" + rows


# File of a layout -> function that makes it from a label file.
LAYOUT_FILES: dict[str, Callable[[bytes], bytes]] = {
    "train_human_labels.csv": _with_confidences,
    "test_labels.csv": lambda x: x.replace(b"path,label", b"image_id,labels", 1),
    "train_meta.csv": lambda x: x.replace(b"path,label", b"image_id,group", 1),
    "validation_ids.csv": lambda x: x.replace(b"path,label", b"image_id,note", 1),
    "tuning_labels.csv": lambda x: x.partition(b"\n")[2],
}


def _write_layout(root: Path, rows: list[tuple[str, str]]) -> None:
    root.mkdir()
    codes = sorted({label for _, label in rows})
    _write_csv(root / "classes-trainable.csv", ("label_code",), [(c,) for c in codes])
    header = "ImageID", "Source", "LabelName", "Confidence"
    labels = [(Path(name).stem, "verification", label, "1") for name, label in rows]
    _write_csv(root / "train_human_labels.csv", header, labels)


def _write_csv(path: Path, header: tuple[str, ...], rows: list[tuple]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def write(root: Path, every: int) -> int:
    """Writes all files, and the commands to run as jobs.json; returns an exit code."""
    from tests import bad_tables

    write_images(root / "images")
    jobs = [(name, "images", words) for name, words in COMMANDS.items()]
    tables = list(bad_tables.all_tables().items())
    for i, (name, table) in list(enumerate(tables))[::every]:
        file = tuple(LAYOUT_FILES)[i % len(LAYOUT_FILES)]
        write_table(root / name, name, table.content, file)
        words = ("new", "mine", FAST[0], f"--labels={name}")
        jobs.append((f"new, {name}", name, words))
        jobs.append((f"prepare, {name} as {file}", name, COMMANDS["prepare"]))
    (root / "jobs.json").write_text(json.dumps(jobs))
    return 0


def main(root: Path, every: int = 1) -> None:
    """Runs everything, or every N-th table, and prints how it ended."""
    root.mkdir(parents=True, exist_ok=True)
    forked.prepare_imports(root / "compiled")
    from jaxii.prepare.recipe import Pace
    from jaxii.runs import speed

    # Measuring the speed of this machine takes a minute and is not tested here.
    speed.pace_of = lambda fields: Pace(images_per_second=100.0, start_seconds=1.0)
    # In a child, because threads of polars do not survive a fork.
    first = "write", partial(write, root, every), lambda: root
    base = next(forked.run_all([first], at_once=1, most_seconds=MOST_SECONDS))[2]
    assert base.code == 0, forked.said(root)
    found = []
    for name, place, words in json.loads((root / "jobs.json").read_text()):
        folder = root / place
        job = name, forked.command(*words), partial(Path, folder)
        ended = next(forked.run_all([job], at_once=1, most_seconds=MOST_SECONDS))[2]
        found.append(
            {
                "name": name,
                "code": ended.code,
                "wall_seconds": round(ended.wall_seconds, 2),
                "peak_bytes": ended.peak_bytes,
                "stdout": (folder / forked.STDOUT).read_text(errors="replace"),
                "stderr": (folder / forked.STDERR).read_text(errors="replace"),
            }
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), *map(int, sys.argv[2:]))
