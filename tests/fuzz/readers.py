"""Targets to fuzz: bytes are read as the commands read them, or refused by name."""

import contextlib
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl

from jaxii.data.labels import Vocabulary
from jaxii.data.transforms import EvalTransform, TrainTransform
from jaxii.errors import InputError
from jaxii.evaluation import image_records
from jaxii.prepare import label_files
from jaxii.prepare.label_files import Codes
from jaxii.prepare.recode import probe, recode
from jaxii.prepare.tables import labelled
from jaxii.prepare.tables.notes import Notes
from tests import small_layout

SHORT_SIDE, SIZE = 32, 16
IDS = pl.Series(["a", "b", "c"])
WORDS = Codes(Vocabulary(("x", "y"), ("X", "Y")), frozenset("xyz"), "classes.csv")
# Functions of a folder of images and a file.
READERS: tuple[Callable[[Path, Path], object], ...] = (
    lambda folder, file: labelled.read(folder, file, Notes()),
    lambda folder, file: labelled.read(
        folder, file, Notes(), vocabulary=WORDS.vocabulary
    ),
    lambda _, file: label_files.read_codes(file, None),
    lambda _, file: label_files.read_codes(file, file),
    lambda _, file: label_files.read_labels(file, WORDS, IDS),
    lambda _, file: label_files.read_image_labels(file, WORDS, IDS, header=False),
    lambda _, file: label_files.read_image_labels(file, WORDS, IDS, header=True),
    lambda _, file: label_files.read_metadata(file, IDS),
    lambda _, file: label_files.read_validation(file, IDS, IDS),
    lambda _, file: image_records.read_ids(file),
    lambda _, file: image_records.find(str(file)),
    lambda _, file: Vocabulary.load(file),
)


def image(data: bytes) -> None:
    """Reads an image; if it can be stored, makes views for training and prediction."""
    with contextlib.suppress(ValueError):
        probe(data, len(data))
    try:
        stored = recode(data, short_side=SHORT_SIDE)
    except ValueError:
        return
    view = EvalTransform(size_pixels=SIZE)(stored)
    crop = TrainTransform(size_pixels=SIZE)(stored, np.random.default_rng(0))
    assert view.shape == crop.shape == (SIZE, SIZE, 3)


def table(data: bytes) -> None:
    """Reads a label file with the reader selected by its first byte."""
    # A process of its own reads a Parquet file first, because polars may abort.
    if not data or data[1:5] == b"PAR1":
        return
    folder, file = _places()
    file.write_bytes(data[1:])
    with contextlib.suppress(InputError):
        READERS[data[0] % len(READERS)](folder, file)


@functools.cache
def _places() -> tuple[Path, Path]:
    """Makes the images that label files name; returns their folder and a file."""
    root = Path(tempfile.mkdtemp())
    (root / "images").mkdir()
    for name in IDS:
        (root / "images" / f"{name}.jpg").write_bytes(small_layout.jpeg(90, 8, 8))
    return root / "images", root / "table.csv"
