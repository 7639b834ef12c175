"""The bytes of a label file -> a table of text, whatever program saved it.

Comes first: encoding, separator, header. `columns` then says what each column is.
"""

import codecs
import csv
import io
import itertools
from pathlib import Path

import polars as pl

from jaxii.errors import InputError
from jaxii.prepare.image_files import IMAGE_SUFFIXES
from jaxii.prepare.tables.notes import Notes

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
