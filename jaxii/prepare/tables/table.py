"""Reads a label file as a table of text: CSV, TSV, Parquet or JSON Lines."""

import codecs
import csv
import io
import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import charset_normalizer
import polars as pl

from jaxii.errors import InputError
from jaxii.prepare.image_files import IMAGE_SUFFIXES
from jaxii.prepare.tables.csv_rows import SEPARATORS, strict_rows
from jaxii.prepare.tables.notes import Notes, shown

SAMPLE_LINES = 200
# Most brackets inside each other in a line of JSON.
MOST_NESTED = 500
_NESTING = {"{": 1, "[": 1, "]": -1, "}": -1}
# Excel's first line that declares the separator.
_DECLARATION = re.compile(r'"?sep=([,;\t|])"?\s*', re.IGNORECASE)
_OTHER_FILES = {
    b"PK\x03\x04": "a ZIP archive or an Excel workbook",
    b"\x1f\x8b": "a gzip archive",
    b"[": "a JSON list",
    b"<": "HTML or XML",
}
# Encodings that are detected. The first of equally likely ones is used: text in the
# others is rarely valid in the first five.
ENCODINGS = (
    *("cp932", "euc_jp", "gb18030", "big5", "cp949"),
    *("cp1252", "cp1250", "cp1251", "koi8_r", "mac_roman"),
    *("cp1253", "cp1254", "cp1255", "cp1256"),
)
# Byte order marks. UTF-32 comes first, because its marks start like those of UTF-16.
_WIDE = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# Scores of charset-normalizer that differ by at most this are equally likely.
_SCORE_MARGIN = 0.05
_BETWEEN_CELLS = re.compile(rb"[,;\t\r\n|\"]+")
# A program that reads a Parquet file from standard input.
_TRIAL = """
import sys, polars
try:
    polars.read_parquet(sys.stdin.buffer.read())
except polars.exceptions.PolarsError as error:
    sys.exit(str(error))
"""
# Bytes that are enough to detect an encoding.
_DETECT_BYTES = 1 << 18


def read_table(path: Path, notes: Notes) -> pl.DataFrame:
    """Reads a table as text, without white space around cells.

    The content decides the format, not the file name. Lists in cells become JSON.
    Columns without a header and without a cell are left out, and so is Excel's first
    line "sep=;".

    Args:
      path: CSV with commas, semicolons, tabs or bars, Parquet, or JSON Lines.
      notes: Collects what was detected.

    Raises:
      InputError: If the file cannot be read, has another format, no known encoding or
        no row, or if a line has too many cells.
    """
    data = _bytes(path)
    if data.startswith(b"PAR1"):
        table = _as_text(path, _read_parquet(path, data), notes)
        notes.found(f"{path} is a Parquet file")
    else:
        text = _decode(path, data, notes).lstrip("\n")
        first, _, rest = text.partition("\n")
        declared = declared_separator(first)
        text = rest.lstrip("\n") if declared else text
        if not text.strip():
            raise InputError(f"{path} is empty; use a table with a header.")
        if text.startswith("{"):
            table = _as_text(path, _read_json_lines(path, text), notes)
            notes.found(f"{path} is JSON Lines")
        else:
            table = _read_separated(path, text, declared, notes)
    table = table.with_columns(pl.all().fill_null("").str.strip_chars())
    table = table.filter(pl.any_horizontal(pl.all() != ""))
    if not len(table):
        raise InputError(f"{path} has no rows below its header; add at least one.")
    columns = ", ".join(table.columns)
    notes.found(f"{path}: {len(table):,} rows, columns {columns}")
    return table


def is_image(cell: str) -> bool:
    """Returns whether a cell ends in an image suffix."""
    return cell.strip().lower().endswith(IMAGE_SUFFIXES)


def declared_separator(line: str) -> str:
    """Returns the separator that a line such as "sep=;" declares; "" for others."""
    found = _DECLARATION.fullmatch(line)
    return found[1] if found else ""


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from error
    for start, kind in _OTHER_FILES.items():
        if data.startswith(start):
            raise InputError(
                f"{path} is {kind}; save it as CSV, Parquet or JSON Lines, with one "
                "row per label or per image."
            )
    return data


def _read_parquet(path: Path, data: bytes) -> pl.DataFrame:
    # A subprocess tries first: damaged numbers make polars panic or abort the process.
    words = [sys.executable, "-c", _TRIAL]
    ended = subprocess.run(words, input=data, capture_output=True)
    if ended.returncode:
        lines = ended.stderr.decode(errors="replace").splitlines()
        lines = [line for line in lines if line and not line.startswith("note:")]
        reason = lines[-1] if lines else "polars crashed"
        raise InputError(f"{path} is a damaged Parquet file ({reason}).")
    return pl.read_parquet(io.BytesIO(data))


def _read_json_lines(path: Path, text: str) -> pl.DataFrame:
    _check_depth(path, text)
    try:
        return pl.read_ndjson(io.BytesIO(text.encode()), infer_schema_length=None)
    except pl.exceptions.PolarsError as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{path} starts with {{ but cannot be read as JSON Lines ({reason}); use "
            "one JSON object per line, with one type per column."
        ) from error


def _check_depth(path: Path, text: str) -> None:
    """Checks that no line is nested so deeply that it crashes polars before 2.1.

    Raises:
      InputError: If a line is nested more than `MOST_NESTED` times.
    """
    for number, line in enumerate(text.split("\n")):
        if line.count("{") + line.count("[") <= MOST_NESTED:
            continue
        depths = itertools.accumulate(_NESTING.get(letter, 0) for letter in line)
        if max(depths) > MOST_NESTED:
            raise InputError(
                f"{path}: line {number + 1} has more than {MOST_NESTED} brackets "
                "inside each other; use one JSON object per line, with text and lists "
                "of text."
            )


def _as_text(path: Path, table: pl.DataFrame, notes: Notes) -> pl.DataFrame:
    """Returns columns as text, lists as JSON; drops other nested and binary columns."""
    texts, others = [], []
    for column in table.iter_columns():
        kind = column.dtype
        if isinstance(kind, pl.List | pl.Array):
            rows = [
                None if row is None else json.dumps(row, default=str)
                for row in column.to_list()
            ]
            texts.append(pl.Series(column.name, rows, pl.String))
        elif kind.is_nested() or kind in (pl.Binary, pl.Object, pl.Duration):
            others.append(f"{column.name} ({kind.base_type()})")
        else:
            texts.append(column.cast(pl.String))
    if others:
        notes.found(f"{path}: skipped columns of unsupported types: {shown(others)}")
    if not texts:
        raise InputError(
            f"{path} has no columns of text, numbers or lists; it needs a path column "
            "and a label column."
        )
    return pl.DataFrame(texts)


def _decode(path: Path, data: bytes, notes: Notes) -> str:
    """Returns the text of a file, with "\\n" as line ends and no byte order mark."""
    wide = next((name for mark, name in _WIDE.items() if data.startswith(mark)), None)
    if wide is not None:
        notes.found(f"{path} is {wide}")
        try:
            text = data.decode(wide)
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path} is {wide} but damaged or truncated ({error.reason} at byte "
                f"{error.start:,}); save it again, preferably as UTF-8."
            ) from error
    elif b"\0" in data:
        raise InputError(f"{path} is not text (it has zero bytes); save it as CSV.")
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = _decode_legacy(path, data, notes)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _decode_legacy(path: Path, data: bytes, notes: Notes) -> str:
    cells = dict.fromkeys(_BETWEEN_CELLS.split(data))
    strange = [cell for cell in cells if not cell.isascii()]
    encoding = _detect(b"\n".join(strange)[:_DETECT_BYTES])
    try:
        if encoding is not None:
            text = data.decode(encoding)
            examples = [cell.decode(encoding, "replace") for cell in strange]
            notes.assumed(
                f"{path} is not UTF-8; it was read as {encoding}, detected from its "
                f"letters, for example {shown(examples)}; save it as UTF-8 if they "
                "look wrong"
            )
            return text
    except UnicodeDecodeError:
        pass
    raise InputError(
        f"{path} is not UTF-8 and its encoding was not recognised; save it as UTF-8 "
        "(in a spreadsheet: CSV UTF-8; in a shell: iconv -f ENCODING -t UTF-8)."
    )


def _detect(data: bytes) -> str | None:
    """Returns the most likely of `ENCODINGS`; None if none yields text."""
    scores = {
        encoding: match.chaos - match.coherence
        for match in charset_normalizer.from_bytes(data, cp_isolation=list(ENCODINGS))
        for encoding in match.could_be_from_charset
    }
    likely = min(scores.values(), default=0.0) + _SCORE_MARGIN
    return next((e for e in ENCODINGS if scores.get(e, 1e9) <= likely), None)


def _check_names(path: Path, names: Iterable[str]) -> None:
    twice = [name for name, number in Counter(names).items() if number > 1]
    if twice:
        raise InputError(f"{path} has two columns named {twice[0]!r}; rename one.")


def _read_separated(path: Path, text: str, declared: str, notes: Notes) -> pl.DataFrame:
    sample = "".join(itertools.islice(io.StringIO(text), SAMPLE_LINES))
    separator = declared or _separator(path, sample)
    first = _first_row(sample, separator)
    has_header = not any(is_image(cell) for cell in first)
    headers = [cell.strip() if has_header else "" for cell in first]
    _check_names(path, filter(None, headers))
    if separator != ",":
        notes.assumed(f"columns are separated by {SEPARATORS[separator]}")
    if not has_header:
        notes.assumed("there is no header, because the first line names an image")
    table = _parse(path, text, separator, has_header)
    blank = [
        column.name
        for column, header in zip(table.iter_columns(), headers, strict=False)
        if not header and (column.fill_null("").str.strip_chars() == "").all()
    ]
    return table.drop(blank)


def _first_row(text: str, separator: str) -> list[str]:
    return next(csv.reader(io.StringIO(text), delimiter=separator))


def _separator(path: Path, sample: str) -> str:
    """Returns the separator that gives most lines as many cells as the first line."""
    best, best_share = "", 0.0
    for separator in SEPARATORS:
        rows = list(csv.reader(io.StringIO(sample), delimiter=separator))
        widths = [len(row) for row in rows if row]
        share = sum(width == widths[0] for width in widths) / len(widths)
        if widths[0] > 1 and share > best_share:
            best, best_share = separator, share
    if not best:
        raise InputError(
            f"{path} has one column ({sample.splitlines()[0][:60]!r}); it needs a path "
            "column and a label column, separated by commas, semicolons, tabs or bars."
        )
    return best


def _parse(path: Path, text: str, separator: str, has_header: bool) -> pl.DataFrame:
    # polars treats a quote after a space as part of the cell.
    if f'{separator} "' in text:
        return _parse_leniently(path, text, separator, has_header)
    try:
        table = pl.read_csv(
            io.BytesIO(text.encode()),
            separator=separator,
            has_header=has_header,
            infer_schema=False,
        )
        header = _first_row(text, separator) if has_header else [""] * table.width
        table.columns = _named(header)
        return table
    # polars takes text that begins with "x\x01" for a compressed file: an OSError.
    except (pl.exceptions.PolarsError, OSError):
        return _parse_leniently(path, text, separator, has_header)


def _parse_leniently(
    path: Path, text: str, separator: str, has_header: bool
) -> pl.DataFrame:
    """Reads CSV that polars refuses, such as spaces around quotes; much slower."""
    lines = io.StringIO(re.sub(rf'" +(?=[{re.escape(separator)}\n])', '"', text))
    rows: list[list[str]] = []
    for _, row in strict_rows(path, lines, separator, skip_spaces=True):
        if row:
            rows.append(row + [""] * (len(rows[0]) - len(row) if rows else 0))
    names = _named(rows.pop(0) if has_header else [""] * len(rows[0]))
    _check_names(path, names)
    return pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String), orient="row")


def _named(header: Iterable[str]) -> list[str]:
    """Returns the names of columns; column_3 if the third has none."""
    return [name.strip() or f"column_{i}" for i, name in enumerate(header, start=1)]
