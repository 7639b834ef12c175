"""Finds the kind of each column of a label file.

The column of paths is the one whose cells name images. If several columns do, image
suffixes and the names of the columns decide.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

import polars as pl

from jaxii.errors import InputError, nearest
from jaxii.prepare.tables.images import Match, Matcher
from jaxii.prepare.tables.notes import Notes, shown
from jaxii.prepare.tables.table import is_image

PATH_NAMES = (
    *("path", "file_path", "filepath", "file", "file_name", "filename"),
    *("image_path", "image", "image_id", "imageid", "img", "id", "name"),
)
LABEL_NAMES = (
    *("labels", "label", "tags", "tag", "classes", "class", "categories", "category"),
    *("label_name", "labelname", "class_name", "classname", "targets", "target"),
)
# Columns that are recognised only by their names.
EXTRA = ("confidence", "split", "group", "domain", "slice")
# Approximate number of rows that are matched to find the column of paths.
SAMPLE_ROWS = 2_000
_ONE_HOT = {"0", "1", "0.0", "1.0", "true", "false", ""}
PRESENT = {"1", "1.0", "true"}
# Share of other cells up to which a column may be meant as one of 0 and 1.
MOST_ODD = 0.5


@dataclass(frozen=True)
class Columns:
    """Names of columns.

    Attributes:
      path: The column that names the images.
      labels: The column of labels, or one column per label (`one_hot`).
      one_hot: Whether cells are 1 or 0 and the headers are labels.
      extra: Column name of each kind in `EXTRA` that the file has.
    """

    path: str
    labels: tuple[str, ...]
    one_hot: bool
    extra: dict[str, str]


def find(
    table: pl.DataFrame,
    matcher: Matcher,
    notes: Notes,
    *,
    path_column: str = "",
    label_column: str = "",
    is_known: Callable[[str], bool] | None = None,
) -> tuple[Columns, Match]:
    """Finds the kind of each column, and the image that each row names.

    Args:
      table: See `table.read_table`.
      matcher: Finds images by name.
      notes: Collects what was assumed.
      path_column: The column that names the images; "" detects it.
      label_column: The column of labels; "" detects it.
      is_known: Whether a label is one of a trained run; None without a run.

    Raises:
      InputError: If no column names images, or the column of labels is ambiguous.
    """
    for flag, name in (("path_column", path_column), ("label_column", label_column)):
        if name and name not in table.columns:
            near = nearest(name, table.columns)
            raise InputError(
                f"--{flag}={name} is not a column; {near}the columns are "
                f"{', '.join(table.columns)}."
            )
    path, match = _paths(table, matcher, notes, path_column, label_column)
    others = [name for name in table.columns if name not in (path, label_column)]
    known = {name for name in others if is_known is not None and is_known(name)}
    extra = {plain_name(name): name for name in others if plain_name(name) in EXTRA}
    if not label_column:
        extra = _without_labels(table, others, extra, known, notes)
    rest = [name for name in table.columns if name not in (path, *extra.values())]
    labels, one_hot = _labels(table, rest, known, notes, label_column)
    for kind, name in extra.items():
        notes.assumed(f"column {name!r} is used as the {kind}, based on its name")
    unused = [name for name in rest if name not in labels]
    odd = [name for name in unused if one_hot and name in known]
    if odd:
        raise InputError(
            f"columns {shown(odd)} are labels of the run, but have cells that are not "
            "0, 1 or empty; change these cells, or rename columns that are no labels."
        )
    if unused:
        notes.found(f"unused columns: {shown(unused)}")
    return Columns(path, labels, one_hot, extra), match


def _without_labels(
    table: pl.DataFrame,
    others: Sequence[str],
    extra: dict[str, str],
    known: Set[str],
    notes: Notes,
) -> dict[str, str]:
    """Returns the extra columns, except those that are one of the one-hot labels."""
    one_hot = _one_hot(table, others, known)
    if any(_is_called_label(name) for name in others if name not in one_hot):
        return extra
    is_one_of_many = len(set(one_hot) - set(extra.values())) > 1
    labels = [
        name
        for name in extra.values()
        if name in one_hot and (is_one_of_many or name in known)
    ]
    if labels:
        notes.check(
            f"columns read as labels, like the other 0/1 columns: {shown(labels)}"
        )
    return {kind: name for kind, name in extra.items() if name not in labels}


def plain_name(name: str) -> str:
    """Normalises a column's name for comparison."""
    return re.sub(r"[\s\-]+", "_", name.strip().lower())


def _paths(
    table: pl.DataFrame, matcher: Matcher, notes: Notes, given: str, not_this: str
) -> tuple[str, Match]:
    names = [given] if given else [n for n in table.columns if n != not_this]
    sample = table.gather_every(max(1, len(table) // SAMPLE_ROWS))
    shares = {name: matcher.match(sample[name].to_list()).share for name in names}
    # Equally good columns are ranked by their names, in the order of `PATH_NAMES`.
    best = max(
        names,
        key=lambda n: (
            round(shares[n], 1),
            # 7 may be a row number; 7.jpg is an image.
            round(sum(map(is_image, sample[n])) / len(sample), 1),
            not _is_called_label(n),
            -_rank(n, PATH_NAMES),
            shares[n],
        ),
    )
    match = matcher.match(table[best].to_list())
    if match.share == 0:
        raise InputError(
            f"no image below --images (such as {matcher.example!r}) is named in "
            f"{'column ' if given else 'any column, including '}{best!r} (such as "
            f"{table[best][0]!r}); set --images to the folder that the paths "
            "start from."
        )
    is_named = given or plain_name(best) in PATH_NAMES
    if not is_named and matcher.match([best]).share:
        raise InputError(
            f"the header of the column of paths, {best!r}, is the name of an image, so "
            "the first line seems to be a row; add a header such as path,label, or set "
            f"--path_column={best}."
        )
    others = [n for n in names if n != best and shares[n] >= max(0.5, shares[best] / 2)]
    if given:
        notes.found(f"column {best!r} names the images, as specified")
    else:
        notes.assumed(
            f"column {best!r} names the images: {match.share:.1%} of its cells match"
            + (f"; {shown(others)} would also fit (--path_column)" if others else "")
        )
    notes.assumed(f"paths are read {match.rule}")
    return best, match


def _labels(
    table: pl.DataFrame,
    rest: Sequence[str],
    known: Set[str],
    notes: Notes,
    given: str,
) -> tuple[tuple[str, ...], bool]:
    if given:
        notes.found(f"column {given!r} has the labels, as specified")
        return (given,), False
    named = sorted(
        (name for name in rest if _is_called_label(name)),
        key=lambda name: _rank(name, LABEL_NAMES),
    )
    one_hot = _one_hot(table, rest, known)
    # A single column of 0 and 1 could be anything, unless the run has its label.
    are_labels = len(one_hot) > 1 or not known.isdisjoint(one_hot)
    if are_labels and not set(named) - set(one_hot):
        notes.assumed(
            f"columns of 0 and 1 are labels, named by their headers "
            f"({len(one_hot)} labels): {shown(one_hot)}"
        )
        _check_others(table, [name for name in rest if name not in one_hot], notes)
        return one_hot, True
    # Columns of 0 and 1 beside a column of labels are not labels.
    named = [name for name in named if len(one_hot) < 2 or name not in one_hot]
    if named:
        others = f"; {shown(named[1:])} would also fit (--label_column)"
        notes.assumed(
            f"column {named[0]!r} has the labels" + (others if named[1:] else "")
        )
        return (named[0],), False
    if len(rest) == 1:
        notes.assumed(f"column {rest[0]!r} has the labels, as the only one remaining")
        return (rest[0],), False
    raise InputError(
        f"cannot determine the label column; columns besides the paths: "
        f"{', '.join(rest) or 'none'}. {_advice(table, rest)}"
    )


def _advice(table: pl.DataFrame, names: Sequence[str]) -> str:
    """Returns what to do, also if columns are labels marked with yes and no, or x."""
    alike: dict[frozenset[str], list[str]] = defaultdict(list)
    for name in names:
        alike[frozenset(table[name].unique())].append(name)
    marks, labels = max(
        ((values, found) for values, found in alike.items() if len(values) == 2),
        key=lambda pair: len(pair[1]),
        default=(frozenset[str](), list[str]()),
    )
    if len(labels) < 2:
        return "Choose one with --label_column."
    return (
        f"{shown(labels)} have the same two values ({shown(sorted(marks))}); if each "
        "column is a label, write 1 and 0 instead. Otherwise, choose one with "
        "--label_column."
    )


def _check_others(table: pl.DataFrame, names: Sequence[str], notes: Notes) -> None:
    """Notes columns that are no labels only because of a few cells."""
    for name in names:
        cells = table[name].str.to_lowercase()
        odd = table[name].filter(~cells.is_in(list(_ONE_HOT)))
        if len(odd) <= MOST_ODD * len(cells) and cells.is_in(list(PRESENT)).any():
            notes.check(
                f"column {name!r} is not used as a label: {len(odd):,} cells are not "
                f"0, 1 or empty: {shown(odd.unique(maintain_order=True).to_list())}"
            )


def _is_called_label(name: str) -> bool:
    return plain_name(name) in LABEL_NAMES


def _rank(name: str, names: tuple[str, ...]) -> int:
    plain = plain_name(name)
    return names.index(plain) if plain in names else len(names)


def _one_hot(
    table: pl.DataFrame, names: Sequence[str], known: Set[str]
) -> tuple[str, ...]:
    """Returns the columns of 0 and 1 that have a 1 or are labels of the run."""
    values = {name: set(table[name].unique().str.to_lowercase()) for name in names}
    return tuple(
        name
        for name in names
        if values[name] <= _ONE_HOT and (values[name] & PRESENT or name in known)
    )
