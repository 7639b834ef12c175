"""Rows of labels: what a label file, or folders named as labels, says of images.

Comes after `images`; `labelled` puts the rows of an image together.
"""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from jaxii.errors import InputError
from jaxii.prepare.tables import cells, columns
from jaxii.prepare.tables.notes import Notes
from jaxii.prepare.tables.paths import NOWHERE, Match, Matcher
from jaxii.prepare.tables.table import read_table

# Images that have several rows with other labels, from which on that is the layout.
ROW_A_LABEL_SHARE = 0.05
SPLITS = {
    **dict.fromkeys(("train", "training", "tr", ""), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "te"), "test"),
}


@dataclass(frozen=True)
class Rows:
    """Labels of images, a row at a time.

    Attributes:
      numbers: of the images; one may have several rows.
      labels: as they are written.
      confidences: in [0, 1].
      extra: split, group, domain and slice, where given; a text a row, "" for none.
    """

    numbers: Sequence[int]
    labels: Sequence[Sequence[str]]
    confidences: Sequence[float]
    extra: Mapping[str, Sequence[str]]


def of_file(
    path: Path,
    files: Sequence[str],
    root: Path,
    notes: Notes,
    *,
    path_column: str,
    label_column: str,
    label_separator: str,
) -> Rows:
    """Reads the rows of a label file.

    Args:
      path: of the file.
      files: the images, sorted.
      root: their folder.
      notes: are told everything that was assumed or left out.
      path_column: see `columns.find`.
      label_column: see `columns.find`.
      label_separator: see `cells.labels_of`.

    Raises:
      InputError: it cannot be understood.
    """
    table = read_table(path, notes)
    matcher = Matcher(files, root, path.absolute().parent)
    found, match = columns.find(
        table, matcher, notes, path_column=path_column, label_column=label_column
    )
    below = [os.path.relpath(file, root) for file in files]
    _note_missing(table[found.path].to_list(), match, below, notes)
    is_there = pl.Series([number != NOWHERE for number in match.rows])
    table = table.filter(is_there)
    numbers = [number for number in match.rows if number != NOWHERE]
    if found.one_hot:
        labels = _one_hot(table, found.labels)
        notes.assumed("0 says absent, as of every label that is not listed")
    else:
        texts = table[found.labels[0]].to_list()
        labels = cells.labels_of(
            texts,
            row_a_label=_has_row_a_label(numbers, texts),
            separator=label_separator,
            notes=notes,
        )
    extra = {
        kind: table[name].to_list()
        for kind, name in found.extra.items()
        if kind != "confidence"
    }
    if "split" in extra:
        extra["split"] = _splits(extra["split"], found.extra["split"])
    rows = Rows(numbers, labels, [1.0] * len(numbers), extra)
    if "confidence" in found.extra:
        return _with_confidences(rows, table[found.extra["confidence"]], notes)
    return rows


def of_folders(files: Sequence[str], root: Path, notes: Notes) -> Rows:
    """Takes the folder of each image for its label.

    Args:
      files: the images, sorted.
      root: their folder; those directly in it have no label.
      notes: are told.
    """
    parts = [Path(os.path.relpath(file, root)).parts[:-1] for file in files]
    first = {part[0].lower() for part in parts if part}
    has_splits = bool(first) and first <= SPLITS.keys()
    if not any(len(part) > has_splits for part in parts):
        raise InputError(
            f"--labels is missing, and no folder in --images={root} could be a label; "
            "give a CSV file with a column of paths and one of labels."
        )
    notes.assumed(
        f"folders are labels, for there is no --labels: {root}/"
        f"{'SPLIT/' * has_splits}LABEL/..."
    )
    extra = {}
    if has_splits:
        extra["split"] = [
            SPLITS[part[0].lower()] if part else "train" for part in parts
        ]
        parts = [part[1:] for part in parts]
    labels = [list(part[:1]) for part in parts]
    return Rows(range(len(files)), labels, [1.0] * len(files), extra)


def _note_missing(
    texts: Sequence[str], match: Match, below: Sequence[str], notes: Notes
) -> None:
    pairs = list(zip(texts, match.rows, strict=True))
    missing = list(dict.fromkeys(text for text, row in pairs if row == NOWHERE))
    notes.left_out(
        "names in the label file",
        missing,
        f", in {sum(row == NOWHERE for _, row in pairs):,} rows, of which there is no "
        "image",
    )
    used = set(match.rows)
    notes.left_out(
        "images",
        [path for i, path in enumerate(below) if i not in used],
        " without a row",
    )


def _has_row_a_label(numbers: Sequence[int], texts: Sequence[str]) -> bool:
    different = defaultdict(set)
    for number, text in zip(numbers, texts, strict=True):
        different[number].add(text)
    several = sum(len(each) > 1 for each in different.values())
    return several >= ROW_A_LABEL_SHARE * max(len(different), 1)


def _one_hot(table: pl.DataFrame, names: Sequence[str]) -> list[list[str]]:
    labels: list[list[str]] = [[] for _ in range(len(table))]
    for name in names:
        present = table[name].str.to_lowercase().is_in(list(columns.PRESENT))
        for row in present.arg_true():
            labels[row].append(name)
    return labels


def _splits(texts: Sequence[str], name: str) -> list[str]:
    unknown = sorted({text for text in texts if text.lower() not in SPLITS})
    if unknown:
        raise InputError(
            f"column {name!r} has {unknown[0]!r}; use train, validation or test, or "
            "call the column otherwise if it is no split."
        )
    # Empty is no split: another row of the image may say it.
    return [SPLITS[text.lower()] if text else "" for text in texts]


def _with_confidences(rows: Rows, texts: pl.Series, notes: Notes) -> Rows:
    values = texts.str.replace(",", ".", literal=True).cast(pl.Float64, strict=False)
    numbers = values.drop_nulls().drop_nans()
    if len(numbers) and not numbers.is_between(0.0, 1.0).all():
        raise InputError(
            f"column {texts.name!r} has values from {numbers.min()} to "
            f"{numbers.max()}; a confidence is from 0 (absent) to 1 (present): change "
            "them, or call the column otherwise."
        )
    between = int(((numbers > 0) & (numbers < 1)).sum())
    notes.assumed(
        "a confidence of 1 is present and 0 is absent, as if people had verified it"
        + (f"; {between:,} rows in between are soft targets" if between else "")
    )
    bad = values.is_null() | values.is_nan()
    notes.left_out("rows whose confidence is no number", texts.filter(bad).to_list())
    kept: list[int] = (~bad).arg_true().to_list()
    return Rows(
        [rows.numbers[i] for i in kept],
        [rows.labels[i] for i in kept],
        [values[i] for i in kept],
        {kind: [each[i] for i in kept] for kind, each in rows.extra.items()},
    )
