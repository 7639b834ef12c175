"""Times the label embedding at full size, from sparse labels to the saved vectors.

    python -m tests.benchmarks.pmi_embedding              # about 3 minutes

A label file as large as that of Inclusive Images is generated first, which is not
timed. It has Zipf frequencies, and topics that make labels occur together, which give
the PMI matrix the spectrum of real labels: a few large eigenvalues of both signs and a
long flat tail; 1,024 of the 7,178 hold two thirds of the energy. The work then runs in
a fresh process: read the CSV and merge (printed separately), then count, factorise,
save. Another process factorises the same matrix with `eigh`. Bars: 12 s from sparse
labels to the saved file; 2 GB of resident memory, including reading and libraries; 99 %
of the energy of as many exact eigenpairs.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
import scipy.linalg

from jaxii.data import label_embedding
from jaxii.data.label_embedding import cooccurrence, pmi
from jaxii.data.labels import Vocabulary
from jaxii.prepare.label_files import Codes, read_labels
from tests.benchmarks import apart
from tests.benchmarks.table import Row, emit

NUM_IMAGES = 1_743_042
NUM_ROWS = 8_036_466
NUM_CLASSES = 7_178
NUM_TOPICS = 300
CLASSES_A_TOPIC = 80
MAX_SECONDS, MAX_GIGABYTES, MIN_ENERGY = 12, 2, 0.99


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


def work(csv: Path, num_classes: int, dim: int) -> dict[str, float | int]:
    """From the CSV to the saved file: the timed work."""
    out = csv.with_name("embedding.npz")
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
    made = label_embedding.label_embedding(
        offsets, entries.labels[order], num_classes, dim=dim
    )
    label_embedding.save(
        out, made, {"split": "train", "label_hash": vocabulary.content_hash()}
    )
    done = time.perf_counter()
    found = {
        "images": made.num_images,
        "labels": len(entries.labels),
        "pairs": made.num_pairs,
        "energy": made.explained_energy,
        "read_seconds": read - start,
        "seconds": done - read,
        "gigabytes": apart.gigabytes(),
    }
    np.savez(csv.with_name("labels.npz"), offsets=offsets, ids=entries.labels[order])
    return found


def exact_energy(labels: Path, num_classes: int, dim: int) -> float:
    """Returns the share of the energy that the largest exact eigenvalues have."""
    with np.load(labels) as arrays:
        counted = cooccurrence(arrays["offsets"], arrays["ids"], num_classes)
    dense = pmi(*counted).astype(np.float32).toarray()
    squares = np.sort(scipy.linalg.eigvalsh(dense, overwrite_a=True).astype(float) ** 2)
    return float(squares[-dim:].sum() / squares.sum())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--num_classes", type=int, default=NUM_CLASSES)
    parser.add_argument(
        "--shrink", type=int, default=1, help="divisor of the number of rows"
    )
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--exact", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        print(json.dumps(work(args.work, args.num_classes, args.dim)))
        return
    if args.exact:
        print(json.dumps(exact_energy(args.exact, args.num_classes, args.dim)))
        return

    def run(*more: str):
        given = ("--dim", str(args.dim), "--num_classes", str(args.num_classes))
        return apart.run_module("pmi_embedding", *more, *given)

    with tempfile.TemporaryDirectory() as folder:
        csv = Path(folder, "train_human_labels.csv")
        generate(
            csv, NUM_IMAGES // args.shrink, NUM_ROWS // args.shrink, args.num_classes
        )
        found = run("--work", str(csv))
        exact = run("--exact", str(csv.with_name("labels.npz")))
    print(
        f"{found['images']:,} images, {found['labels']:,} labels, {found['pairs']:,} "
        f"pairs; {found['read_seconds'] + found['seconds']:.1f} s from the CSV, "
        f"{found['read_seconds']:.1f} s of which to read"
    )
    what = f"PMI embedding, {args.num_classes:,} labels, {args.dim:,} dimensions"
    limits = (found["seconds"], MAX_SECONDS, found["gigabytes"], MAX_GIGABYTES)
    apart.emit_limits(what, *limits)
    energy = found["energy"]
    emit(
        Row(
            f"{what}: share of the exact energy",
            f"{energy:.4f} of the matrix's",
            f"`eigh`: {exact:.4f}",
            energy / exact,
            ">=",
            MIN_ENERGY,
        ),
    )


if __name__ == "__main__":
    main()
