"""Times the label embedding from a CSV file of full size to the saved vectors.

    python -m tests.benchmarks.pmi_embedding

A label file as large as that of Inclusive Images is generated first (Zipf frequencies,
topics that make labels occur together), which is not counted. The work then runs in a
fresh process: read the CSV, merge, count, factorise, save. Prints its seconds, its peak
memory, and the share of the PMI matrix's energy that the vectors keep.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

from jaxii.data import embedding
from jaxii.data.label_files import Codes, read_labels
from jaxii.data.labels import Vocabulary

NUM_IMAGES = 1_743_042
NUM_ROWS = 8_036_466
NUM_CLASSES = 7_178
NUM_TOPICS = 300
CLASSES_A_TOPIC = 80


def generate(path: Path, num_images: int, num_rows: int, num_classes: int) -> None:
    """Writes train_human_labels.csv with a long tail and topics."""
    rng = np.random.default_rng(2018)
    weights = 1.0 / (np.arange(num_classes) + 3.0)
    frequency = np.cumsum(weights / weights.sum())
    popular = np.minimum(
        np.searchsorted(frequency, rng.random(num_rows)), num_classes - 1
    )
    topics = np.stack(
        [rng.permutation(num_classes)[:CLASSES_A_TOPIC] for _ in range(NUM_TOPICS)]
    )
    images = np.sort(
        np.concatenate(
            [
                np.arange(num_images),
                rng.integers(num_images, size=num_rows - num_images),
            ]
        )
    )
    topic = rng.integers(NUM_TOPICS, size=num_images)[images]
    place = np.minimum(rng.exponential(12.0, num_rows), CLASSES_A_TOPIC - 1).astype(int)
    labels = np.where(rng.random(num_rows) < 0.7, topics[topic, place], popular)
    pl.DataFrame({"image": images, "label": labels}).select(
        ImageID=pl.format("{}", pl.col("image").cast(pl.String).str.pad_start(16, "0")),
        Source=pl.lit("verification"),
        LabelName=pl.format("/m/0{}", pl.col("label").cast(pl.String).str.zfill(5)),
        Confidence=pl.lit(1),
    ).write_csv(path)


def work(csv: Path, out: Path, num_classes: int, dim: int) -> dict[str, float | int]:
    """CSV to saved file; what is timed."""
    start = time.perf_counter()
    codes = tuple(f"/m/0{label:05d}" for label in range(num_classes))
    vocabulary = Vocabulary(codes, codes)
    image_ids = (
        pl.scan_csv(csv, infer_schema=False)
        .select(pl.col("ImageID").unique())
        .collect(engine="streaming")["ImageID"]
    )
    known = Codes(vocabulary, frozenset(codes), csv.name)
    entries, _ = read_labels(csv, known, image_ids)
    order = np.argsort(entries.rows, kind="stable")
    per_image = np.bincount(entries.rows, minlength=len(image_ids))
    offsets = np.concatenate([[0], np.cumsum(per_image)])
    read = time.perf_counter()
    made = embedding.label_embedding(
        offsets, entries.labels[order], num_classes, dim=dim
    )
    embedding.save(
        out, made, {"split": "train", "label_hash": vocabulary.content_hash()}
    )
    done = time.perf_counter()
    return {
        "images": made.num_images,
        "labels": len(entries.labels),
        "pairs": made.num_pairs,
        "explained_energy": round(made.explained_energy, 4),
        "read_seconds": round(read - start, 2),
        "embed_and_save_seconds": round(done - read, 2),
        "seconds": round(done - start, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--num_classes", type=int, default=NUM_CLASSES)
    parser.add_argument("--shrink", type=int, default=1, help="divides the rows")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        result = work(
            args.work, args.work.with_name("e.npz"), args.num_classes, args.dim
        )
        # Linux counts in KiB, macOS in bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        print(json.dumps(result | {"peak_gigabytes": round(peak / 1e9, 2)}))
        return
    with tempfile.TemporaryDirectory() as folder:
        csv = Path(folder) / "train_human_labels.csv"
        generate(
            csv, NUM_IMAGES // args.shrink, NUM_ROWS // args.shrink, args.num_classes
        )
        command = [sys.executable, "-m", "tests.benchmarks.pmi_embedding"]
        command += ["--work", str(csv), "--dim", str(args.dim)]
        command += ["--num_classes", str(args.num_classes)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
