"""Checks the rows of CSV files; errors name the line.

polars names no line, and ignores surplus cells of a row if it reads only some columns.
"""

import csv
import io
import itertools
from collections.abc import Iterable, Iterator
from typing import IO

from jaxii.errors import InputError
from jaxii.storage import AnyPath

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
# With a separator that the file does not use, a line is one cell, of any length.
csv.field_size_limit(2**31 - 1)
_CHUNK_BYTES = 1 << 20
# A cell that continues past the end of a chunk may have this many further lines; more
# mean that its quote is not closed.
_MAX_LINES = 10_000
_NOT_MARKS = bytes(byte for byte in range(256) if byte not in b',\n"')


def strict_rows(
    path: AnyPath,
    lines: Iterable[str],
    separator: str = ",",
    *,
    width: int = 0,
    first_line: int = 1,
    skip_spaces: bool = False,
) -> Iterator[tuple[int, list[str]]]:
    """Yields the line on which each row starts, and its cells; [] for an empty line.

    Args:
      path: The file, for messages.
      lines: Its lines, which end in "\\n".
      separator: One of `SEPARATORS`.
      width: The allowed number of cells; 0 means that of the first row.
      first_line: Number of the first of `lines`, for messages.
      skip_spaces: Whether spaces before a cell are ignored.

    Raises:
      InputError: If a double quote is not closed or a row has too many cells.
    """
    # Strict, because an unclosed quote would join all lines up to the next quote.
    reader = csv.reader(
        lines, delimiter=separator, skipinitialspace=skip_spaces, strict=True
    )
    line = first_line
    try:
        for row in reader:
            width = width or len(row)
            if len(row) > width:
                raise InputError(
                    f"{path} line {line}: {len(row)} cells, but the first line has "
                    f"{width} ({separator.join(row)[:60]!r}); put double quotes "
                    f"around cells that contain {SEPARATORS[separator]}."
                )
            yield line, row
            line = first_line + reader.line_num
    except csv.Error as error:
        raise _unclosed(path, line, str(error)) from error


def check_rows(path: AnyPath, width: int) -> None:
    """Checks a comma-separated file as `strict_rows` does, in one pass of 1 MiB chunks.

    Chunks without quotes and surplus cells, which are almost all, are only scanned.

    Args:
      path: The file.
      width: Number of its columns.

    Raises:
      InputError: As for `strict_rows`, or if a row has an odd number of double quotes:
        polars would join it with the next row.
      OSError: If the file cannot be read.
    """
    line = 1
    with path.open("rb") as file:
        for chunk in _chunks(file):
            marks = chunk.translate(None, _NOT_MARKS)
            if b'"' in marks or b"," * width in marks:
                _check_exactly(path, chunk, width, line)
            line += marks.count(b"\n")


def line_of_row(path: AnyPath, row: int) -> int:
    """Returns the line on which a row starts; row 0 is the header."""
    with io.TextIOWrapper(path.open("rb"), "utf-8-sig", "replace", "\n") as file:
        rows = strict_rows(path, map(_line_ends, file))
        # polars skips empty lines before the header, and only those.
        rows = itertools.dropwhile(lambda numbered: not numbered[1], rows)
        return next(itertools.islice(rows, row, None))[0]


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    """Yields pieces of a file that end with a line and do not divide quoted cells."""
    while chunk := file.read(_CHUNK_BYTES) + file.readline():
        is_open = chunk.count(b'"') % 2
        lines = []
        while is_open and len(lines) < _MAX_LINES and (line := file.readline()):
            is_open ^= line.count(b'"') % 2
            lines.append(line)
        yield b"".join([chunk, *lines])


def _check_exactly(path: AnyPath, chunk: bytes, width: int, first_line: int) -> None:
    text = _line_ends(chunk.decode("utf-8-sig", "replace"))
    lines = io.StringIO(text).readlines()
    rows = strict_rows(path, lines, width=width, first_line=first_line)
    starts = itertools.chain((line for line, _ in rows), [first_line + len(lines)])
    for start, end in itertools.pairwise(starts):
        row = "".join(lines[start - first_line : end - first_line])
        if row.count('"') % 2:
            raise _unclosed(path, start, f"{row[:60]!r}")


def _line_ends(text: str) -> str:
    # For polars, a carriage return within a line is part of a cell.
    return text.replace("\r\n", "\n").replace("\r", " ")


def _unclosed(path: AnyPath, line: int, reason: str) -> InputError:
    return InputError(
        f"{path} line {line}: a double quote is not closed, or text follows a closed "
        f"one ({reason}); write each quote inside a cell as two quotes."
    )
