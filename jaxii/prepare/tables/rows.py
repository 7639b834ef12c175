"""Rows of labels, read from a label file or from folders named after labels.

One cell does not show whether "red fox" is one label or two, so all cells are used.
Cells are lists if nearly every part occurs in at least two different cells, if
splitting leaves at most half as many labels as there are different cells, or if most
cells are different and contain the separator, unless it is a space. For the labels of a
trained run, cells are split so that most parts are labels of the run. --label_separator
overrides both rules.
"""

import ast
import json
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from jaxii.errors import InputError
from jaxii.prepare.tables import columns
from jaxii.prepare.tables.images import NOWHERE, Match, Matcher
from jaxii.prepare.tables.notes import Notes, shown
from jaxii.prepare.tables.table import read_table

SEPARATORS = {"|": "a bar", ";": "a semicolon", ",": "a comma", " ": "spaces"}
# Values of --label_separator; "" detects it.
CHOICES = ("", "none", "|", ";", ",", "space", "json")
SEVERAL_SHARE = 0.9
JSON_SHARE = 0.9
_SIDE_BY_SIDE = re.compile(r"""(['"])\s+(?=['"])""")
# If at least this share of images has several different rows, a row is one label.
ROW_A_LABEL_SHARE = 0.05
SPLITS = {
    **dict.fromkeys(("train", "training", "tr", ""), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    "tuning": "tuning",
    **dict.fromkeys(("test", "testing", "te"), "test"),
}


@dataclass(frozen=True)
class LabelRows:
    """Rows of labels; an image may have several rows.

    Attributes:
      numbers: Position of the image of each row.
      labels: Labels of each row, as written in the file.
      confidences: In [0, 1].
      extra: Values of split, group, domain and slice per row, if given; "" for none.
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
    is_known: Callable[[str], bool] | None = None,
) -> LabelRows:
    """Reads the rows of a label file.

    Args:
      path: See `table.read_table`.
      files: Sorted paths of the images.
      root: The folder of the images.
      notes: Collects what was assumed and left out.
      path_column: See `columns.find`.
      label_column: See `columns.find`.
      label_separator: See `labels_of`.
      is_known: See `labels_of` and `columns.find`.

    Raises:
      InputError: If the file cannot be understood.
    """
    table = read_table(path, notes)
    matcher = Matcher(files, root, path.absolute().parent)
    found, match = columns.find(
        table,
        matcher,
        notes,
        path_column=path_column,
        label_column=label_column,
        is_known=is_known,
    )
    below = [os.path.relpath(file, root) for file in files]
    _note_missing(table[found.path].to_list(), match, below, notes)
    numbers = [number for number in match.rows if number != NOWHERE]
    table = table.filter(pl.Series(match.rows) != NOWHERE)
    if found.one_hot:
        labels = _one_hot(table, found.labels)
        notes.assumed("0 means that the label is absent, like an unlisted label")
        _note_differences(numbers, labels, below, notes)
    else:
        texts = table[found.labels[0]].to_list()
        labels = labels_of(
            texts,
            row_a_label=_has_row_a_label(numbers, texts),
            separator=label_separator,
            notes=notes,
            is_known=is_known,
        )
    rows = LabelRows(numbers, labels, [1.0] * len(numbers), _extra(table, found))
    if "confidence" in found.extra:
        return _with_confidences(rows, table[found.extra["confidence"]], notes)
    return rows


def of_folders(files: Sequence[str], root: Path, notes: Notes) -> LabelRows:
    """Uses the folder of each image as its label; images in `root` have none.

    Raises:
      InputError: If there is no subfolder.
    """
    parts = [Path(os.path.relpath(file, root)).parts[:-1] for file in files]
    first = {part[0].lower() for part in parts if part}
    has_splits = bool(first) and first <= SPLITS.keys()
    if not any(len(part) > has_splits for part in parts):
        raise InputError(
            f"--labels is not set and --images={root} has no label folders; set "
            "--labels to a CSV file with a path column and a label column."
        )
    notes.assumed(
        f"folders are labels, because --labels is not set: {root}/"
        f"{'SPLIT/' * has_splits}LABEL/..."
    )
    extra = {}
    if has_splits:
        names = [part[0].lower() if part else "train" for part in parts]
        extra["split"] = [SPLITS[name] for name in names]
        parts = [part[1:] for part in parts]
    labels = [list(part[:1]) for part in parts]
    return LabelRows(range(len(files)), labels, [1.0] * len(files), extra)


def _extra(table: pl.DataFrame, found: columns.Columns) -> dict[str, list[str]]:
    """Returns the values of split, group, domain and slice, if the table has them."""
    extra: dict[str, list[str]] = {
        kind: table[name].to_list()
        for kind, name in found.extra.items()
        if kind != "confidence"
    }
    if "split" in extra:
        extra["split"] = _splits(extra["split"], found.extra["split"])
    return extra


def _note_missing(
    texts: Sequence[str], match: Match, below: Sequence[str], notes: Notes
) -> None:
    pairs = list(zip(texts, match.rows, strict=True))
    missing = list(dict.fromkeys(text for text, row in pairs if row == NOWHERE))
    notes.left_out(
        "names in the label file",
        missing,
        f" ({sum(row == NOWHERE for _, row in pairs):,} rows) that match no image",
    )
    used = set(match.rows)
    notes.left_out(
        "images",
        [path for i, path in enumerate(below) if i not in used],
        " without a row in the label file",
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


def _note_differences(
    numbers: Sequence[int],
    labels: Sequence[Sequence[str]],
    below: Sequence[str],
    notes: Notes,
) -> None:
    """Notes the images whose rows have different labels."""
    first: dict[int, Sequence[str]] = {}
    different = {
        number: None
        for number, found in zip(numbers, labels, strict=True)
        if first.setdefault(number, found) != found
    }
    if different:
        notes.check(
            f"{len(different):,} images have rows with different labels; a label that "
            f"is 1 in one row and 0 or empty in another counts as present: "
            f"{shown(below[number] for number in different)}"
        )


def _splits(texts: Sequence[str], name: str) -> list[str]:
    unknown = sorted({text for text in texts if text.lower() not in SPLITS})
    if unknown:
        raise InputError(
            f"column {name!r} contains {unknown[0]!r}; use train, validation, tuning "
            "or test, or rename the column if it is not a split."
        )
    # Another row of the image may give its split.
    return [SPLITS[text.lower()] if text else "" for text in texts]


def _with_confidences(rows: LabelRows, texts: pl.Series, notes: Notes) -> LabelRows:
    values = texts.str.replace(",", ".", literal=True).cast(pl.Float64, strict=False)
    numbers = values.drop_nulls().drop_nans()
    if len(numbers) and not numbers.is_between(0.0, 1.0).all():
        raise InputError(
            f"column {texts.name!r} has values from {numbers.min()} to "
            f"{numbers.max()}; confidences must be from 0 (absent) to 1 (present). "
            "Change the values or rename the column."
        )
    between = int(((numbers > 0) & (numbers < 1)).sum())
    notes.assumed(
        "confidence 1 means verified present and 0 verified absent"
        + (f"; {between:,} rows in between are soft targets" if between else "")
    )
    bad = values.is_null() | values.is_nan()
    notes.left_out("rows whose confidence is not a number", texts.filter(bad).to_list())
    kept: list[int] = (~bad).arg_true().to_list()
    return LabelRows(
        [rows.numbers[i] for i in kept],
        [rows.labels[i] for i in kept],
        [values[i] for i in kept],
        {kind: [each[i] for i in kept] for kind, each in rows.extra.items()},
    )


def labels_of(
    cells: Sequence[str],
    *,
    row_a_label: bool,
    separator: str,
    notes: Notes,
    is_known: Callable[[str], bool] | None = None,
) -> list[list[str]]:
    """Returns the labels of each cell, as written.

    Args:
      cells: One per row.
      row_a_label: Whether images have several rows with different labels.
      separator: One of `CHOICES`; "" detects it.
      notes: Collects which separator is used and why.
      is_known: Whether a label is one of a trained run; None without a run.

    Raises:
      InputError: If cells are read as JSON and none is a list, or some cells are JSON
        lists but too few to read all as JSON.
    """
    counts = Counter(clean(cell) for cell in cells if cell)
    chosen = separator or _choose(counts, row_a_label)
    if not separator and chosen != "json":
        _check_no_lists(counts)
    why = "as specified" if separator else _REASONS.get(chosen, _REASON_LISTS)
    if is_known is not None and not separator and chosen != "json":
        chosen, why = _most_known(counts, is_known), "most parts are the run's labels"
    if chosen == "json":
        notes.assumed(f"each cell is a JSON list of labels ({why})")
        return _json_lists(cells, notes)
    if chosen == "none":
        layout = "one label per row" if row_a_label else "one label per image"
        notes.assumed(
            f"each cell is a single label, {layout} ({why}; --label_separator)"
        )
        _mind_separators(counts, notes)
        return [[cell] if cell else [] for cell in cells]
    name = SEPARATORS[" " if chosen == "space" else chosen]
    notes.assumed(
        f"each cell is a list of labels separated by {name} ({why}; "
        "--label_separator=none if each cell is a single label)"
    )
    return [_parts(cell, chosen) for cell in cells]


def _parts(cell: str, separator: str) -> list[str]:
    if separator == "none":
        return [cell]
    # split() without a separator splits at any white space and drops empty parts.
    return cell.split(None if separator == "space" else separator)


def _most_known(counts: Counter[str], is_known: Callable[[str], bool]) -> str:
    """Returns the separator with the largest share of known labels among the parts."""

    def share(separator: str) -> float:
        parts = {clean(part) for cell in counts for part in _parts(cell, separator)}
        return sum(map(is_known, parts)) / max(len(parts - {""}), 1)

    return max((choice for choice in CHOICES if choice not in ("", "json")), key=share)


_REASON_LISTS = (
    "nearly every part occurs in several cells, or splitting halves the number of "
    "labels, or most images would otherwise have a label of their own"
)
_REASONS = {
    "none": "most parts would occur in only one cell",
    "json": "cells start with [ and end with ]",
}


def clean(label: str) -> str:
    """Returns a label with composed letters and single inner spaces.

    Half of a surrogate pair, which no file can hold, becomes a question mark.
    """
    label = label.encode(errors="replace").decode()
    return " ".join(unicodedata.normalize("NFC", label).split())


def _choose(counts: Counter[str], row_a_label: bool) -> str:
    lists = sum(c.startswith("[") and c.endswith("]") for c in counts)
    if counts and lists >= JSON_SHARE * len(counts):
        return "json"
    own = not row_a_label and 2 * len(counts) > counts.total()
    for separator in SEPARATORS:
        # With a row per label, spaces are part of the label.
        if separator == " " and row_a_label:
            continue
        in_most = 2 * sum(separator in cell for cell in counts) > len(counts)
        # Texts with spaces that are mostly different are captions.
        crowded = own and in_most and separator != " "
        if crowded or _is_between(separator, counts):
            return "space" if separator == " " else separator
    return "none"


def _check_no_lists(cells: Iterable[str]) -> None:
    bracketed = (cell for cell in cells if cell.startswith("[") and cell.endswith("]"))
    lists = [cell for cell in bracketed if _list_of(cell) is not None]
    if lists:
        raise InputError(
            f"{len(lists):,} different cells are JSON lists of labels ({shown(lists)}) "
            "and others are not; write all cells as lists, or set --label_separator."
        )


def _is_between(separator: str, counts: Counter[str]) -> bool:
    lists = [cell for cell in counts if separator in cell]
    parts = Counter(
        part for cell in lists for part in set(map(str.strip, cell.split(separator)))
    )
    del parts[""]
    if not parts:
        return False
    alone = {cell.strip() for cell in counts if separator not in cell}
    several = sum(n for part, n in parts.items() if n > 1 or part in alone)
    share = several / parts.total()
    return share >= SEVERAL_SHARE or 2 * len(alone | parts.keys()) <= len(counts)


def _mind_separators(counts: Counter[str], notes: Notes) -> None:
    for separator, name in SEPARATORS.items():
        has = [cell for cell in counts if separator in cell]
        if has and separator != " ":
            notes.check(f"{len(has):,} labels contain {name}: {shown(has)}")


def _json_lists(cells: Sequence[str], notes: Notes) -> list[list[str]]:
    lists, wrong = [], []
    for cell in cells:
        labels = _list_of(cell) if cell else []
        if labels is None:
            wrong.append(cell)
        lists.append(labels or [])
    if wrong and len(wrong) == sum(bool(cell) for cell in cells):
        raise InputError(
            f"no cell is a JSON list of labels (such as {wrong[0][:60]!r}); use "
            "another --label_separator."
        )
    notes.left_out("rows whose cell is not a list of labels", wrong)
    return lists


def _list_of(cell: str) -> list[str] | None:
    """Returns the labels of a JSON list; None for any other cell."""
    try:
        return _parse(cell)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


def _parse(cell: str) -> list[str]:
    try:
        value = json.loads(cell)
    except ValueError:
        # pandas writes lists with Python's quotes, and NumPy arrays without commas.
        # Without commas, Python would join adjacent strings.
        value = ast.literal_eval(_SIDE_BY_SIDE.sub(r"\1, ", cell))
    if not isinstance(value, list) or any(isinstance(i, dict | list) for i in value):
        raise ValueError(cell)
    return [
        item if isinstance(item, str) else json.dumps(item)
        for item in value
        if item is not None
    ]
