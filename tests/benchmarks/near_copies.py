"""Plants 100 copies of training images in a test and counts those that `prepare` lists.

    python -m tests.benchmarks.near_copies --files=sets/emoji_vendor --drawings=5000
    python -m tests.benchmarks.near_copies --drawings=10000

A copy is recompressed (JPEG quality 30 to 90), cropped (up to 15 % of each side),
resized (by a factor of 0.5 to 2), or all three; a quarter each. There are `--images`
other images: drawings of toy_regions, and images of a folder in the Kaggle layout, each
in its own split, group and domain. An image is named if it is listed as a near copy of
an image in the other split. It is clean if it is neither a copy nor the original of a
copy; real duplicates across the splits of the set count as clean, to our disadvantage.
Pairs within train (in different groups) are counted separately, because many emoji with
different names are the same drawing. The cost is the processor time of `prepare` with
and without the search.
"""

import argparse
import csv
import shutil
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import polars as pl

from jaxii.data.folder import RECURRING_FILE
from jaxii.prepare.kaggle import Layout, prepare
from jaxii.prepare.toy_regions import writer
from tests.benchmarks.table import Row, emit

NUM_COPIES = 100
WAYS = ("recompressed", "cropped", "resized", "all three")
FOLDERS = {"train": "train", "test": "stage_1_test_images"}


def altered(image: np.ndarray, way: str, rng: np.random.Generator) -> bytes:
    """Returns a copy of an image as JPEG."""
    height, width, _ = image.shape
    if way in ("cropped", "all three"):
        left, right, top, bottom = rng.uniform(0, 0.15, 4)
        rows = slice(round(top * height), height - round(bottom * height))
        image = image[rows, round(left * width) : width - round(right * width)]
    if way in ("resized", "all three"):
        scale = 2 ** rng.uniform(-1, 1)
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=how)
    quality = int(rng.integers(30, 91))
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def gather(files: Path, root: Path, number: int, rng: np.random.Generator) -> list:
    """Copies images of a layout; returns id, group, domain of the training images."""
    found = [
        (split, path)
        for split, folder in FOLDERS.items()
        for path in sorted((files / folder).rglob("*.*"))
    ]
    chosen = rng.permutation(len(found))[:number].tolist()
    for split, path in (found[i] for i in chosen):
        shutil.copyfile(path, root / FOLDERS[split] / path.name)
    names = {found[i][1].stem for i in chosen}
    with (files / "train_meta.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["image_id"] in names]
    return [(row["image_id"], row["group"], row["domain"]) for row in rows]


def plant(root: Path, rng: np.random.Generator) -> dict[str, tuple[str, str]]:
    """Adds copies of training images to the test; returns id -> original, way."""
    originals = sorted((root / "train").iterdir())
    copies = {}
    for number, which in enumerate(rng.choice(len(originals), NUM_COPIES, False)):
        path, way = originals[which], WAYS[number % len(WAYS)]
        image_id = f"copy{number:03d}"
        data = altered(cv2.imread(str(path)), way, rng)
        (root / FOLDERS["test"] / f"{image_id}.jpg").write_bytes(data)
        copies[image_id] = path.stem, way
    return copies


def write_labels(root: Path, metadata: list) -> None:
    names = sorted(path.stem for path in (root / "train").iterdir())
    rows = "".join(f"{name},verification,/m/a,1\n" for name in names)
    header = "ImageID,Source,LabelName,Confidence\n"
    (root / "train_human_labels.csv").write_text(header + rows)
    (root / "classes-trainable.csv").write_text("label_code\n/m/a\n")
    with (root / "train_meta.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerows([("image_id", "group", "domain"), *metadata])


def report(pairs: pl.DataFrame, copies: dict, num_images: int, seconds: list) -> None:
    """Prints what was named, and emits one row of the table."""
    across = pairs.filter(pl.col("split") != pl.col("other_split"))
    named = set(zip(across["image_id"], across["other_id"], strict=True))
    found = {
        image_id for image_id, (one, _) in copies.items() if (image_id, one) in named
    }
    for way in WAYS:
        of_way = {image_id for image_id, (_, how) in copies.items() if how == way}
        print(f"{way}: {len(of_way & found)} of {len(of_way)} found")
    planted = {*copies, *(original for original, _ in copies.values())}
    clean = set(across["image_id"]) - planted
    within = set(pairs.filter(pl.col("split") == pl.col("other_split"))["image_id"])
    print(f"clean images named: {len(clean)} of {num_images:,}")
    print(f"images of train with near copies in other groups: {len(within)}")
    without, total = seconds
    print(f"processor time: {without:.1f} s, with the search {total:.1f} s")
    emit(
        Row(
            f"near copies found, of 100 among {num_images:,}",
            f"{len(found)}",
            f"clean images named: {len(clean) / num_images:.2%}; processor time of "
            f"prepare {total / without:.2f} times",
            len(found),
            ">=",
            95,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=Path, help="a folder in the Kaggle layout")
    parser.add_argument("--drawings", type=int, default=10_000)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--keep", type=Path, help="file to write the pairs to")
    args = parser.parse_args()
    rng, seconds = np.random.default_rng(0), []
    with tempfile.TemporaryDirectory() as scratch:
        root, metadata = Path(scratch, "files"), []
        for folder in FOLDERS.values():
            (root / folder).mkdir(parents=True)
        if args.files:
            metadata += gather(args.files, root, args.images - args.drawings, rng)
        if args.drawings:
            drawn = Path(scratch, "toy")
            test = args.drawings // 3
            writer.write(drawn, num_train=args.drawings - test, num_test=test)
            metadata += gather(drawn, root, args.drawings, rng)
        num_images = sum(len(list((root / f).iterdir())) for f in FOLDERS.values())
        copies = plant(root, rng)
        write_labels(root, metadata)
        layout = Layout.find(root)
        for near_copies in ("ignore", "keep"):
            start = time.process_time()
            prepare(layout, Path(scratch, near_copies), near_copies=near_copies)
            seconds.append(time.process_time() - start)
        pairs = pl.read_parquet(Path(scratch, "keep", RECURRING_FILE))
        if args.keep:
            pairs.write_parquet(args.keep)
    report(pairs, copies, num_images, seconds)


if __name__ == "__main__":
    main()
