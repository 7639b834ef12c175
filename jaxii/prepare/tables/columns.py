"""Reads a label file of any format and finds out what its columns are.

The column of paths is the one whose cells name images; where several columns do, their
names decide.
"""

import codecs
import csv
import io
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from jaxii.errors import InputError, nearest
from jaxii.prepare.image_files import IMAGE_SUFFIXES
from jaxii.prepare.tables.images import Match, Matcher
from jaxii.prepare.tables.notes import Notes, shown

PATH_NAMES = (
    *("path", "file_path", "filepath", "file", "file_name", "filename"),
    *("image_path", "image", "image_id", "imageid", "img", "image", "id", "name"),
)
LABEL_NAMES = (
    *("labels", "label", "tags", "tag", "classes", "class", "categories", "category"),
    *("label_name", "labelname", "class_name", "classname", "targets", "target"),
)
# Columns that are taken by their very names.
EXTRA = ("confidence", "split", "group", "domain", "slice")
# Cells of which the path column is found out.
SAMPLE_ROWS = 2_000
_ONE_HOT = {"0", "1", "0.0", "1.0", "true", "false", ""}
PRESENT = {"1", "1.0", "true"}
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
SAMPLE_LINES = 200
# With another separator than the file's, a line is one cell, however long.
csv.field_size_limit(2**31 - 1)
_OTHER_FILES = {
    b"PK\x03\x04": "a ZIP archive or an Excel workbook",
    b"PAR1": "a Parquet file",
    b"{": "a JSON object",
    b"[": "a JSON list",
    b"<": "HTML or XML",
}


def read_table(path: Path, notes: Notes) -> pl.DataFrame:
    """Reads a file with separators; all cells are text without spaces around it.

    Args:
      path: of the file.
      notes: are told what had to be found out.

    Raises:
      InputError: it cannot be read, is no such file, or a line has too many cells.
    """
    text = _decode(path, _bytes(path), notes).lstrip("\n")
    if not text:
        raise InputError(f"{path} is empty; give a CSV file with a header.")
    sample = "".join(itertools.islice(io.StringIO(text), SAMPLE_LINES))
    separator = _separator(path, sample)
    first = next(csv.reader(io.StringIO(sample), delimiter=separator))
    has_header = not any(is_image(cell) for cell in first)
    headers = [cell.strip() for cell in first] if has_header else []
    twice = [name for name in headers if name and headers.count(name) > 1]
    if twice:
        raise InputError(f"{path} has two columns called {twice[0]!r}; rename one.")
    table = _parse(path, text, separator, has_header)
    table = table.with_columns(pl.all().fill_null("").str.strip_chars())
    table = table.filter(pl.any_horizontal(pl.all() != ""))
    if not len(table):
        raise InputError(f"{path} has no row below its header; give one that has.")
    if has_header:
        notes.found(f"{path}: {len(table):,} rows, columns {', '.join(table.columns)}")
    else:
        notes.found(f"{path}: {len(table):,} rows, {table.width} columns")
        notes.assumed(
            f"the first line is data and no header, for it names an image; columns "
            f"are called {', '.join(table.columns)}"
        )
    if separator != ",":
        notes.assumed(f"{SEPARATORS[separator]} are between the columns")
    return table


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from error
    if not data.strip():
        raise InputError(f"{path} is empty; give a CSV file with a header.")
    for start, kind in _OTHER_FILES.items():
        if data.startswith(start):
            raise InputError(
                f"{path} is {kind}; save it as CSV, with a header and a row a label or "
                "a row an image."
            )
    return data


def _decode(path: Path, data: bytes, notes: Notes) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        notes.found(f"{path} is UTF-16")
        text = data.decode("utf-16", errors="replace")
    elif b"\0" in data:
        raise InputError(f"{path} is no text (it has zero bytes); save it as CSV.")
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data[: error.start].count(b"\n") + 1
            notes.assumed(
                f"{path} is Windows-1252 text, for line {line} is no UTF-8; save it as "
                "UTF-8 if letters look wrong below"
            )
            text = data.decode("cp1252", errors="replace")
    odd = [
        name
        for name, is_there in (
            ("a byte order mark", data.startswith(codecs.BOM_UTF8)),
            ("CRLF line ends", "\r\n" in text),
        )
        if is_there
    ]
    if odd:
        notes.found(f"{path} has {' and '.join(odd)}; read as if it had none")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _separator(path: Path, sample: str) -> str:
    """Returns the separator with which most lines have as many cells as the first."""
    best, best_share = "", 0.0
    for separator in SEPARATORS:
        rows = list(csv.reader(io.StringIO(sample), delimiter=separator))
        widths = [len(row) for row in rows if row]
        share = sum(width == widths[0] for width in widths) / len(widths)
        if widths[0] > 1 and share > best_share:
            best, best_share = separator, share
    if not best:
        raise InputError(
            f"{path} has one column ({sample.splitlines()[0][:60]!r}); it needs one of "
            "paths and one of labels, with commas, semicolons or tabs between them."
        )
    return best


def is_image(cell: str) -> bool:
    return cell.strip().lower().endswith(IMAGE_SUFFIXES)


def _parse(path: Path, text: str, separator: str, has_header: bool) -> pl.DataFrame:
    # Quotes after a space are part of a cell to polars, and mean quotes to people.
    if f'{separator} "' in text:
        return _parse_leniently(path, text, separator, has_header)
    try:
        table = pl.read_csv(
            io.BytesIO(text.encode()),
            separator=separator,
            has_header=has_header,
            infer_schema=False,
        )
        if has_header:
            return table.rename(lambda name: name.strip())
        return table.rename(
            dict(zip(table.columns, _unnamed(table.width), strict=True))
        )
    except pl.exceptions.PolarsError:
        return _parse_leniently(path, text, separator, has_header)


def _parse_leniently(
    path: Path, text: str, separator: str, has_header: bool
) -> pl.DataFrame:
    """Reads what polars refuses, such as spaces around quotes; slower by far."""
    reader = csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True)
    rows: list[list[str]] = []
    try:
        for row in reader:
            if rows and len(row) > len(rows[0]):
                raise InputError(
                    f"{path} line {reader.line_num}: {len(row)} cells where the first "
                    f"line has {len(rows[0])} ({separator.join(row)[:60]!r}); put "
                    f"cells that contain {SEPARATORS[separator]} between double quotes."
                )
            if row:
                rows.append(row + [""] * (len(rows[0]) - len(row) if rows else 0))
    except csv.Error as error:
        raise InputError(
            f"{path} line {reader.line_num} cannot be read as CSV ({error}); mend it."
        ) from error
    width = len(rows[0])
    names = [name.strip() for name in rows.pop(0)] if has_header else _unnamed(width)
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"{path} has two columns called {twice[0]!r}; rename one.")
    return pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String), orient="row")


def _unnamed(width: int) -> list[str]:
    return [f"column_{number}" for number in range(1, width + 1)]


@dataclass(frozen=True)
class Columns:
    """Names of columns.

    Attributes:
      path: names the images.
      labels: the one with labels in its cells, or one a label (`one_hot`).
      one_hot: whether cells say 1 or 0 and the header is the label.
      extra: of `EXTRA`, those there are -> their names in the file.
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
) -> tuple[Columns, Match]:
    """Says what the columns are, and which image each row names.

    Args:
      table: as `table.read_table` gives it.
      matcher: of the images.
      notes: are told what was assumed.
      path_column: its name where it is given; "" finds it.
      label_column: likewise.

    Raises:
      InputError: no column names images, or none is sure to be labels.
    """
    for flag, name in (("path_column", path_column), ("label_column", label_column)):
        if name and name not in table.columns:
            near = nearest(name, table.columns)
            raise InputError(
                f"--{flag}={name} is not a column; {near}there are "
                f"{', '.join(table.columns)}."
            )
    path, match = _paths(table, matcher, notes, path_column, label_column)
    others = [name for name in table.columns if name not in (path, label_column)]
    extra = {plain_name(name): name for name in others if plain_name(name) in EXTRA}
    if not label_column:
        extra = _without_labels(table, others, extra, notes)
    rest = [name for name in table.columns if name not in (path, *extra.values())]
    labels, one_hot = _labels(table, rest, notes, label_column)
    for kind, name in extra.items():
        notes.assumed(f"column {name!r} is the {kind} of each image, as it is called")
    unused = [name for name in rest if name not in labels]
    if unused:
        notes.found(f"columns that are not used: {shown(unused)}")
    return Columns(path, labels, one_hot, extra), match


def _without_labels(
    table: pl.DataFrame, others: Sequence[str], extra: dict[str, str], notes: Notes
) -> dict[str, str]:
    """Returns the extra columns but for those that look like a label among others."""
    one_hot = [name for name in others if _is_one_hot(table[name])]
    has_labels = any(_is_called_label(n) for n in others if n not in one_hot)
    if has_labels or len(set(one_hot) - set(extra.values())) < 2:
        return extra
    labels = [name for name in extra.values() if name in one_hot]
    if labels:
        notes.mind(f"columns that are labels as those beside them: {shown(labels)}")
    return {kind: name for kind, name in extra.items() if name not in labels}


def plain_name(name: str) -> str:
    """Returns a column's name as it is compared."""
    return re.sub(r"[\s\-]+", "_", name.strip().lower())


def _paths(
    table: pl.DataFrame, matcher: Matcher, notes: Notes, given: str, not_this: str
) -> tuple[str, Match]:
    names = [given] if given else [n for n in table.columns if n != not_this]
    sample = table.gather_every(max(1, len(table) // SAMPLE_ROWS))
    shares = {name: matcher.match(sample[name].to_list()).share for name in names}
    # The first of those that are equally good by the order of the usual names.
    best = max(
        names,
        key=lambda n: (
            round(shares[n], 1),
            # 7 is a row's number as likely as 7.jpg; what ends so is an image.
            round(sum(map(is_image, sample[n])) / len(sample), 1),
            not _is_called_label(n),
            -_rank(n, PATH_NAMES),
            shares[n],
        ),
    )
    match = matcher.match(table[best].to_list())
    if match.share == 0:
        raise InputError(
            f"no cell of {'column ' if given else 'any column, as '}{best!r} (such as "
            f"{table[best][0]!r}) names an image below --images (such as "
            f"{matcher.example!r}); give the folder that the paths start from."
        )
    others = [n for n in names if n != best and shares[n] >= max(0.5, shares[best] / 2)]
    if given:
        notes.found(f"column {best!r} names the images, as was said")
    else:
        notes.assumed(
            f"column {best!r} names the images: {match.share:.1%} of its cells do"
            + (f"; {shown(others)} would too (--path_column)" if others else "")
        )
    notes.assumed(f"paths are read {match.rule}")
    return best, match


def _labels(
    table: pl.DataFrame, rest: Sequence[str], notes: Notes, given: str
) -> tuple[tuple[str, ...], bool]:
    if given:
        notes.found(f"column {given!r} has the labels, as was said")
        return (given,), False
    named = sorted(
        (name for name in rest if _is_called_label(name)),
        key=lambda name: _rank(name, LABEL_NAMES),
    )
    one_hot = tuple(name for name in rest if _is_one_hot(table[name]))
    if len(one_hot) > 1 and not set(named) - set(one_hot):
        notes.assumed(
            f"columns of 0 and 1 are labels, called as their headers say: "
            f"{len(one_hot)} of them, {shown(one_hot)}"
        )
        return one_hot, True
    # With a column that is called so, those of 0 and 1 are something else.
    named = [name for name in named if len(one_hot) < 2 or name not in one_hot]
    if named:
        others = f"; {shown(named[1:])} would do too (--label_column)"
        notes.assumed(
            f"column {named[0]!r} has the labels" + (others if named[1:] else "")
        )
        return (named[0],), False
    if len(rest) == 1:
        notes.assumed(f"column {rest[0]!r} has the labels: no other is left")
        return (rest[0],), False
    raise InputError(
        f"which column has the labels? There are {', '.join(rest) or 'none'} beside "
        "the paths; give one with --label_column."
    )


def _is_called_label(name: str) -> bool:
    return plain_name(name) in LABEL_NAMES


def _rank(name: str, names: tuple[str, ...]) -> int:
    plain = plain_name(name)
    return names.index(plain) if plain in names else len(names)


def _is_one_hot(cells: pl.Series) -> bool:
    values = set(cells.unique().str.to_lowercase())
    return values <= _ONE_HOT and bool(values & PRESENT)
