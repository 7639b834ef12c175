"""Times the work of `prepare` on full-size label files before it opens an image.

    python -m tests.benchmarks.label_files                # about 3 minutes, 2.5 GB

Files as large as those of Inclusive Images are generated first, which is not timed: 8.0
million human labels, 15.3 million machine labels and 14.6 million boxes of 1.74 million
images, in the Kaggle layout, with a long tail of labels. The work then runs in a fresh
process: the vocabulary; the labels of each image, by source; the splits train, tuning
and test; the fingerprint that a later run compares; and validation, carved out of
train. There are no image files; the list of images is passed directly. Bars: 25 s and 4
GB of resident memory, including interpreter and libraries.
"""

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

from jaxii.data import dataset
from jaxii.data.index import columns
from jaxii.prepare import build, kaggle, label_files
from jaxii.prepare.image_files import FileFacts, Images
from jaxii.prepare.kaggle import Layout
from tests.benchmarks import apart

NUM_IMAGES = 1_743_042
NUM_TEST_IMAGES = 32_580
NUM_TUNING_IMAGES = 1_000
HUMAN_ROWS, MACHINE_ROWS, BOX_ROWS = 8_036_466, 15_259_186, 14_610_229
NUM_CLASSES, NUM_DESCRIBED, NUM_BOX_CLASSES = 7_178, 19_995, 599
VALIDATION_FRACTION = 0.02
MAX_SECONDS, MAX_GIGABYTES = 25, 4


def image_ids(rng: np.random.Generator, count: int) -> pl.Series:
    """Returns ids of 16 hexadecimal digits, ascending."""
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    text = digits[rng.integers(16, size=(count, 16), dtype=np.uint8)]
    return pl.Series(text.view("S16").ravel().astype("U16")).unique().sort()


def rows(
    rng: np.random.Generator, ids: pl.Series, codes: pl.Series, count: int, source: str
) -> pl.DataFrame:
    """Returns label rows in the order of the images, with a long tail of codes."""
    weights = 1.0 / (np.arange(len(codes)) + 3.0)
    frequency = np.cumsum(weights / weights.sum())
    label = np.searchsorted(frequency, rng.random(count)).clip(max=len(codes) - 1)
    image = np.sort(rng.integers(len(ids), size=count))
    return pl.DataFrame({"ImageID": ids.gather(image)}).with_columns(
        Source=pl.lit(source), LabelName=codes.gather(label), Confidence=pl.lit(1)
    )


def with_corners(rng: np.random.Generator, table: pl.DataFrame) -> pl.DataFrame:
    """Returns the rows with the other columns of a file of boxes."""
    names = ("XMin", "XMax", "YMin", "YMax")
    table = table.with_columns(
        pl.Series(name, rng.random(len(table), dtype=np.float32)) for name in names
    )
    flags = ("IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside")
    return table.with_columns(pl.lit(0).alias(name) for name in flags)


def generate(root: Path, shrink: int) -> None:
    """Writes the files into a folder."""
    rng = np.random.default_rng(2018)
    (root / "train").mkdir()
    ids = image_ids(rng, NUM_IMAGES // shrink)
    described = pl.Series([f"/m/0{i:05d}" for i in range(NUM_DESCRIBED)])
    # The most frequent labels are trainable; one row in 100 has a code that is not.
    trainable = described.head(NUM_CLASSES)
    machine = described.head(NUM_CLASSES * 11 // 10)
    boxes = trainable.head(NUM_BOX_CLASSES)
    pl.DataFrame({"label_code": trainable}).write_csv(root / "classes-trainable.csv")
    pl.DataFrame({"label_code": described, "description": described}).write_csv(
        root / "class-descriptions.csv"
    )
    table = rows(rng, ids, trainable, HUMAN_ROWS // shrink, "verification")
    table.write_csv(root / "train_human_labels.csv")
    table = rows(rng, ids, machine, MACHINE_ROWS // shrink, "machine")
    confidence = pl.Series("Confidence", rng.integers(5, 11, len(table)) / 10)
    table.with_columns(confidence).write_csv(root / "train_machine_labels.csv")
    table = rows(rng, ids, boxes, BOX_ROWS // shrink, "activemil")
    with_corners(rng, table).write_csv(
        root / "train_bounding_boxes.csv", float_precision=6
    )
    del table
    test = image_ids(rng, NUM_TEST_IMAGES)
    names = [f"{a} {b}" for a, b in itertools.pairwise(trainable)]
    tuning = pl.DataFrame({"id": test[::30][:NUM_TUNING_IMAGES]}).with_columns(
        labels=pl.Series(names[:NUM_TUNING_IMAGES])
    )
    tuning.write_csv(root / "tuning_labels.csv", include_header=False)
    pl.DataFrame({"image_id": test, "labels": ""}).write_csv(
        root / "stage_1_sample_submission.csv"
    )
    # The image ids; a folder with this many files is not made.
    ids.to_frame("id").write_parquet(root / "train_ids.parquet")
    test.to_frame("id").write_parquet(root / "test_ids.parquet")


def images(path: Path) -> Images:
    """Returns the images of a list of ids, as `find_images` would find them."""
    ids = pl.read_parquet(path)["id"].to_list()
    folder = path.parent / "train"
    return Images(
        ids=ids,
        paths=[folder / f"{image_id}.jpg" for image_id in ids],
        facts=[FileFacts(45_000, "1538352000000000000")] * len(ids),
    )


class Nowhere:
    """A source of records that is never read."""

    def select(self, rows: np.ndarray) -> "Nowhere":
        return self


def work(root: Path) -> dict:
    """From label files to splits: the timed work."""
    layout = Layout.find(root)
    train = images(root / "train_ids.parquet")
    test = images(root / "test_ids.parquet")
    begin = time.perf_counter(), time.process_time()
    codes = label_files.read_codes(layout.classes, layout.descriptions)
    drafts, tallies = kaggle.draft_splits(layout, codes, train, test)
    build.fingerprint(drafts, codes.vocabulary, 256, "")
    drafted = time.perf_counter() - begin[0]
    index = columns(drafts[0].plan.table, ("all",))
    split = dataset.Split("train", index, Nowhere())
    splits = {"train": split}
    opened = dataset.Dataset(root, codes.vocabulary, ("all",), splits, "")
    splits = opened.carve(VALIDATION_FRACTION)
    return {
        "lines": [t.line() for t in (*tallies, *(draft.tally for draft in drafts))],
        "validation": splits["validation"].num_examples,
        "rows": sum(tally.read for tally in tallies[:3]),
        "drafted": drafted,
        "seconds": time.perf_counter() - begin[0],
        "processor_seconds": time.process_time() - begin[1],
        "gigabytes": apart.gigabytes(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shrink", type=int, default=1, help="divisor of the number of rows"
    )
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        print(json.dumps(work(args.work)))
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder), args.shrink)
        found = apart.run_module("label_files", "--work", folder)
    print("\n".join(found["lines"]))
    print(
        f"validation: {found['validation']:,} images; {found['drafted']:.1f} s before "
        f"it is carved; {found['processor_seconds']:.1f} s of processor time in total"
    )
    what = f"label files of {found['rows'] / 1e6:.1f} million rows to splits"
    limits = (found["seconds"], MAX_SECONDS, found["gigabytes"], MAX_GIGABYTES)
    apart.emit_limits(what, *limits)


if __name__ == "__main__":
    main()
