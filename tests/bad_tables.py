"""Label files with realistic damage, and the message expected for each.

All describe the images `NAMES`, whose labels are `TRUTH`; see `all_tables`.
"""

import codecs
import functools
import gzip
import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import polars as pl

NAMES = tuple(f"img{i:02d}.jpg" for i in range(12))
TRUTH = {name: ("cat", "dog", "été")[i % 3] for i, name in enumerate(NAMES)}
HEADER = "path,label"
ROWS = tuple(f"{name},{label}" for name, label in TRUTH.items())
TEXT = "\n".join((HEADER, *ROWS)) + "\n"


@dataclass(frozen=True)
class BadTable:
    """A label file with damage.

    Attributes:
      content: Its bytes.
      refused: Pattern of the message; "" if the file has to be read as `TRUTH`; None if
        it has to be either read or refused.
      said: Pattern that the notes about a file that is read have to contain.
    """

    content: bytes
    refused: str | None
    said: str = ""


@functools.cache
def all_tables() -> dict[str, BadTable]:
    """Returns the files by name."""
    return {
        name: table
        for family in (
            _encodings,
            _zero_bytes,
            _shapes,
            _headers,
            _quotes,
            _separators,
            _cells,
            _line_ends,
            _columns,
            _other_files,
            _json_lines,
            _parquet,
        )
        for name, table in family()
    }


def lines(*rows: str, header: str = HEADER) -> bytes:
    """Returns a CSV file."""
    return ("\n".join((header, *rows)) + "\n").encode()


def with_row(row: str) -> bytes:
    """Returns the usual file with an additional row in its middle."""
    return lines(*ROWS[:6], row, *ROWS[6:])


def frame() -> pl.DataFrame:
    """Returns the usual table."""
    return pl.DataFrame({"path": list(TRUTH), "label": list(TRUTH.values())})


def parquet(table: pl.DataFrame) -> bytes:
    """Returns a Parquet file."""
    file = io.BytesIO()
    table.write_parquet(file)
    return file.getvalue()


def _encodings() -> Iterator[tuple[str, BadTable]]:
    data = TEXT.encode()
    yield "utf8_mark.csv", BadTable(codecs.BOM_UTF8 + data, "")
    yield "utf8_two_marks.csv", BadTable(codecs.BOM_UTF8 * 2 + data, "")
    yield "utf16_little.csv", BadTable(TEXT.encode("utf-16"), "", "UTF-16")
    big = codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be")
    yield "utf16_big.csv", BadTable(big, "", "UTF-16")
    yield "utf16_no_mark.csv", BadTable(TEXT.encode("utf-16-le"), "zero bytes")
    yield "utf16_odd.csv", BadTable(TEXT.encode("utf-16")[:-1], "damaged or truncated")
    yield (
        "utf16_surrogate.csv",
        BadTable(TEXT.encode("utf-16") + b"\0\xd8", "damaged or truncated"),
    )
    yield "utf32.csv", BadTable(TEXT.encode("utf-32"), "", "UTF-32")
    yield "utf32_big.csv", BadTable(TEXT.encode("utf-32-be"), "zero bytes")
    yield "latin1.csv", BadTable(TEXT.encode("latin-1"), "", "cp1252")
    yield "mac.csv", BadTable(TEXT.encode("mac_roman"), None, ", detected from")
    yield "utf7.csv", BadTable(TEXT.encode("utf-7"), None)
    yield "one_bad_byte.csv", BadTable(data.replace(b"cat", b"c\xfft", 1), None)
    yield "overlong.csv", BadTable(data.replace(b"cat", b"c\xc0\xaf", 1), None)
    yield "surrogates.csv", BadTable(data.replace(b"cat", b"\xed\xa0\x80", 1), None)
    yield "twice_encoded.csv", BadTable(data.decode("latin-1").encode(), None)
    noise = np.random.default_rng(30).integers(1, 256, 4096, np.uint8).tobytes()
    yield "random.csv", BadTable(noise, ".")
    yield "random_tail.csv", BadTable(data + noise, ".")


def _zero_bytes() -> Iterator[tuple[str, BadTable]]:
    data = TEXT.encode()
    yield "zero_in_cell.csv", BadTable(data.replace(b"cat", b"c\0t", 1), "zero bytes")
    yield "zeros_at_end.csv", BadTable(data + bytes(4096), "zero bytes")
    yield "zeros.csv", BadTable(bytes(4096), "zero bytes")


def _shapes() -> Iterator[tuple[str, BadTable]]:
    yield "empty.csv", BadTable(b"", "is empty")
    yield "mark_alone.csv", BadTable(codecs.BOM_UTF8, "is empty")
    yield "blank.csv", BadTable(b"\n \n\t\n", "is empty")
    yield "header_alone.csv", BadTable(b"path,label\n", "no rows below its header")
    yield "blank_rows.csv", BadTable(lines(*(f"\n{row}\n\n" for row in ROWS)), "")
    yield "empty_rows.csv", BadTable(lines(*ROWS, ",", ",", ","), "")
    yield "no_last_end.csv", BadTable(TEXT.rstrip().encode(), "")
    yield "short_row.csv", BadTable(with_row("img00.jpg"), "")
    yield "long_row.csv", BadTable(with_row("img00.jpg,cat,dog"), "line 8: 3 cells")
    yield (
        "tail_everywhere.csv",
        BadTable(lines(*(f"{row}," for row in ROWS), header="path,label,"), ""),
    )
    yield "tail_in_rows.csv", BadTable(lines(*(f"{row}," for row in ROWS)), "3 cells")
    yield "tail_in_header.csv", BadTable(lines(*ROWS, header="path,label,"), "")
    yield "cut_row.csv", BadTable(TEXT.encode()[:-9], None)
    wide = ",".join(["x"] * 200_000)
    yield "very_long_row.csv", BadTable(with_row(wide), "line 8: 200000 cells")
    many = [f"column{i}" for i in range(500)]
    row = ",".join(["img00.jpg"] + ["0"] * 499)
    yield "very_wide.csv", BadTable(lines(row, header=",".join(many)), ".")


def _headers() -> Iterator[tuple[str, BadTable]]:
    yield "no_header.csv", BadTable(lines(*ROWS[1:], header=ROWS[0]), "", "no header")
    twice = lines(*(f"{row},x" for row in ROWS), header="path,label,label")
    yield "same_headers.csv", BadTable(twice, "two columns named 'label'")
    spaced = lines(*(f"{row},x" for row in ROWS), header="path,label, label")
    yield "same_but_spaces.csv", BadTable(spaced, "two columns named 'label'")
    no_names = lines(*(f"{row},," for row in ROWS), header="path,label,,")
    yield "no_names.csv", BadTable(no_names, "")
    cased = lines(*(f"{row},x" for row in ROWS), header="path,label,Label")
    yield "cased_headers.csv", BadTable(cased, None)
    yield "header_again.csv", BadTable(with_row(HEADER), "", "'path'")
    yield "excel_line.csv", BadTable(b"sep=,\n" + TEXT.encode(), "", "'path'")
    yield "title_line.csv", BadTable(b"My labels\n" + TEXT.encode(), ".")
    yield "comment_line.csv", BadTable(b"# by me\n" + TEXT.encode(), ".")
    yield "only_paths.csv", BadTable(lines(*NAMES, header="path"), "one column")
    labels = [f"{label},{i}" for i, label in enumerate(TRUTH.values())]
    yield (
        "no_paths.csv",
        BadTable(lines(*labels, header="label,n"), "is named in any column"),
    )
    yield "quoted_header.csv", BadTable(lines(*ROWS, header='"path" , "label"'), "")


def _quotes() -> Iterator[tuple[str, BadTable]]:
    for name, place in (("first", 0), ("middle", 6), ("last", 11)):
        rows = list(ROWS)
        image, label = rows[place].split(",")
        rows[place] = f'{image},"{label}'
        yield f"open_quote_{name}.csv", BadTable(lines(*rows), "quote")
        rows[place] = f'"{image},{label}'
        yield f"open_quote_{name}_path.csv", BadTable(lines(*rows), "quote")
    quoted = [f'"{row.split(",")[0]}","{row.split(",")[1]}"' for row in ROWS]
    yield "all_quoted.csv", BadTable(lines(*quoted), "")
    yield "text_after_quote.csv", BadTable(with_row('img00.jpg,"cat"x'), None)
    yield "quote_inside.csv", BadTable(with_row('img00.jpg,c"a"t'), None)
    single = [row.replace(",", ",'") + "'" for row in ROWS]
    yield "single_quotes.csv", BadTable(lines(*single), None)
    yield (
        "spaces_before.csv",
        BadTable(lines(*(row.replace(",", ', "') + '"' for row in ROWS)), ""),
    )
    yield "backslash.csv", BadTable(with_row('img00.jpg,"c\\"at"'), None)
    yield "line_in_cell.csv", BadTable(with_row('img00.jpg,"a\nb"'), None)


def _separators() -> Iterator[tuple[str, BadTable]]:
    for name, separator in (("semicolon", ";"), ("tab", "\t"), ("bar", "|")):
        data = TEXT.replace(",", separator).encode()
        yield f"{name}.csv", BadTable(data, "", "columns are separated by")
    for name, separator in (("colon", ":"), ("space", " "), ("wave", "~")):
        yield f"{name}.csv", BadTable(TEXT.replace(",", separator).encode(), "one col")
    mixed = [row.replace(",", ",;"[i % 2]) for i, row in enumerate(ROWS)]
    yield "mixed_separators.csv", BadTable(lines(*mixed), None, "that match no image")
    table = ["|path|label|", "|---|---|", *(f"|{r.replace(',', '|')}|" for r in ROWS)]
    yield "markdown.csv", BadTable("\n".join(table).encode(), None)


def _cells() -> Iterator[tuple[str, BadTable]]:
    yield "huge_label.csv", BadTable(with_row("img00.jpg," + "x" * 5_000_000), None)
    yield "huge_path.csv", BadTable(with_row("x" * 5_000_000 + ".jpg,cat"), "")
    yield (
        "huge_quoted.csv",
        BadTable(with_row('img00.jpg,"' + "x,\n" * 500_000 + '"'), None),
    )
    nested = "[" * 100_000
    yield "nested_list.csv", BadTable(lines(f'img00.jpg,"{nested}"'), ".")
    numbers = [f"{name},{i % 3}" for i, name in enumerate(NAMES)]
    yield "numbers.csv", BadTable(lines(*numbers), None)
    missing = ("nan", "NaN", "None", "NULL", "N/A", "")
    absent = [f"{name},{missing[i % 6]}" for i, name in enumerate(NAMES)]
    yield "nothing.csv", BadTable(lines(*absent), None)
    formulas = ("=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\x1b[31mred\x1b[0m")
    rows = [f"{name},{formulas[i % 5]}" for i, name in enumerate(NAMES)]
    yield "formulas.csv", BadTable(lines(*rows), None)
    odd = ("a\u202eb", "a\u200bb", "\ufeffa", "e\u0301", "\u00a0a", "a\x07b", "\x85")
    rows = [f"{name},{odd[i % 7]}" for i, name in enumerate(NAMES)]
    yield "odd_letters.csv", BadTable(lines(*rows), None)
    hot = lines(*(f"{n},1,{i}" for i, n in enumerate(NAMES)), header="path,cat,dog")
    yield "one_hot_with_2.csv", BadTable(hot, ".")
    paths = ("../x.jpg", "http://x.org/a.jpg", "~/a.jpg", "C:\\a.jpg", "/", ".", "//")
    rows = [*ROWS, *(f"{path},cat" for path in paths)]
    yield "odd_paths.csv", BadTable(lines(*rows), "", "that match no image")


def _line_ends() -> Iterator[tuple[str, BadTable]]:
    data = TEXT.encode()
    yield "crlf.csv", BadTable(data.replace(b"\n", b"\r\n"), "")
    yield "cr.csv", BadTable(data.replace(b"\n", b"\r"), "")
    ends = (b"\n", b"\r\n", b"\r")
    mixed = b"".join(r.encode() + ends[i % 3] for i, r in enumerate((HEADER, *ROWS)))
    yield "mixed_ends.csv", BadTable(mixed, "")
    yield "double_ends.csv", BadTable(data.replace(b"\n", b"\r\r\n"), "")
    for name, end in (("unicode_ends", "\u2028"), ("form_feeds", "\f")):
        yield f"{name}.csv", BadTable(TEXT.replace("\n", end).encode(), ".")


def _columns() -> Iterator[tuple[str, BadTable]]:
    def more(name: str, *cells: str) -> bytes:
        rows = [f"{row},{cells[i % len(cells)]}" for i, row in enumerate(ROWS)]
        return lines(*rows, header=f"{HEADER},{name}")

    yield "same_rows.csv", BadTable(lines(*ROWS, *ROWS), "", "are repeated")
    yield "more_labels.csv", BadTable(with_row("img00.jpg,dog"), None)
    high = more("confidence", "1", "1.5")
    yield "confidence_high.csv", BadTable(high, "from 1.0 to 1.5")
    yield "confidence_low.csv", BadTable(more("confidence", "1", "-1"), "from -1.0")
    yield "confidence_inf.csv", BadTable(more("confidence", "1", "inf"), "to inf")
    yield (
        "confidence_nan.csv",
        BadTable(
            more("confidence", "1", "nan", "x"), None, "confidence is not a number"
        ),
    )
    yield "confidence_comma.csv", BadTable(more("confidence", '"1,0"'), "")
    yield (
        "splits_odd.csv",
        BadTable(more("split", "train", "new"), "'split' contains 'new'"),
    )
    conflict = [f"{row},{split}" for split in ("train", "test") for row in ROWS]
    conflict = lines(*conflict, header=f"{HEADER},split")
    yield "splits_differ.csv", BadTable(conflict, "", "a different split")
    groups = [f"{row},{group}" for group in "ab" for row in ROWS]
    groups = lines(*groups, header=f"{HEADER},group")
    yield "groups_differ.csv", BadTable(groups, "", "a different group")


def _other_files() -> Iterator[tuple[str, BadTable]]:
    data = TEXT.encode()
    book = io.BytesIO()
    with zipfile.ZipFile(book, "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")
    yield "workbook.csv", BadTable(book.getvalue(), "Excel workbook")
    yield "archive.csv", BadTable(gzip.compress(data, mtime=0), "gzip")
    yield "page.csv", BadTable(b"<!doctype html><p>404", "HTML")
    yield "old_workbook.csv", BadTable(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" * 9, ".")
    yield "pointer.csv", BadTable(b"version https://git-lfs.github.com/spec/v1\n", ".")
    listed = json.dumps([{"path": name} for name in NAMES]).encode()
    yield "list.json", BadTable(listed, "a JSON list")


def _json_lines() -> Iterator[tuple[str, BadTable]]:
    objects = [{"path": name, "label": label} for name, label in TRUTH.items()]
    whole = [json.dumps(each) for each in objects]
    data = ("\n".join(whole) + "\n").encode()
    yield "mark.jsonl", BadTable(codecs.BOM_UTF8 + data, "")
    yield "blank_lines.jsonl", BadTable(data.replace(b"\n", b"\n\n"), "")
    yield "cut.jsonl", BadTable(data[:-9], "JSON Lines")
    yield "pretty.jsonl", BadTable(json.dumps(objects[0], indent=1).encode(), "JSON L")
    yield "broken.jsonl", BadTable(data.replace(b'"}', b'"', 1), "JSON Lines")
    yield "other_line.jsonl", BadTable(data + b"[1, 2]\n", "JSON Lines")
    yield "nan.jsonl", BadTable(data + b'{"path": NaN, "label": "cat"}\n', "JSON Lines")
    mixed = data + b'{"path": 7, "label": ["cat"]}\n'
    yield "mixed_types.jsonl", BadTable(mixed, None)
    twice = [
        f'{{"path": "img00.jpg", "path": "{name}", "label": "x"}}' for name in NAMES
    ]
    yield "same_keys.jsonl", BadTable("\n".join(twice).encode(), None)
    nested = [json.dumps({"image": each}) for each in objects]
    yield "nested.jsonl", BadTable("\n".join(nested).encode(), "no column")
    yield "empty_objects.jsonl", BadTable(b"{}\n{}\n", ".")
    deep = '{"path": ' + "[" * 50_000 + "]" * 50_000 + "}"
    yield "deep.jsonl", BadTable(deep.encode(), "line 1 has more than 500 brackets")
    # Only a line feed ends a line of JSON.
    split = '{"path": ' + "[" * 400 + '"\u2028", ' + "[" * 400 + "]" * 800 + "}"
    yield "deep_split.jsonl", BadTable(split.encode(), "line 1 has more than 500")
    # Many brackets, but at most three inside each other.
    boxes = [{**each, "boxes": [[0, 1]] * 600} for each in objects]
    yield "boxes.jsonl", BadTable("\n".join(map(json.dumps, boxes)).encode(), "")
    escaped = data.replace(b'"cat"', rb'"\ud800"', 1)
    yield "half_surrogate.jsonl", BadTable(escaped, None)
    ragged = [json.dumps({"path": name, f"x{i}": 1}) for i, name in enumerate(NAMES)]
    yield "other_keys.jsonl", BadTable("\n".join(ragged).encode(), None)


def _parquet() -> Iterator[tuple[str, BadTable]]:
    table, damaged = frame(), "damaged Parquet"
    whole = parquet(table)
    for share in (0.1, 0.5, 0.95):
        end = int(len(whole) * share)
        yield f"cut_{share:g}.parquet", BadTable(whole[:end], damaged)
    yield "start.parquet", BadTable(b"PAR1", damaged)
    yield "ends.parquet", BadTable(b"PAR1PAR1", damaged)
    zeroed = whole[:40] + bytes(60) + whole[100:]
    yield "zero_hole.parquet", BadTable(zeroed, damaged)
    length = whole[:-8] + b"\xff\xff\xff\x7f" + whole[-4:]
    yield "long_footer.parquet", BadTable(length, damaged)
    # Found by fuzzing: polars requests 2 exabytes, and the process is aborted.
    aborts = Path(__file__).parent / "fuzz" / "seeds" / "aborts.parquet"
    yield "aborts.parquet", BadTable(aborts.read_bytes(), damaged)
    rng = np.random.default_rng(31)
    for i in range(6):
        flipped = bytearray(whole)
        for place in rng.integers(4, len(whole) - 8, 12):
            flipped[place] ^= 1 << rng.integers(8)
        yield f"flipped_{i}.parquet", BadTable(bytes(flipped), None)
    yield "no_rows.parquet", BadTable(parquet(table.clear()), "no row")
    yield "no_columns.parquet", BadTable(parquet(pl.DataFrame()), "no column|no row")
    nested = table.select(image=pl.struct("path", "label"))
    yield "nested.parquet", BadTable(parquet(nested), "no column")
    days = {
        "n": [timedelta(days=1)] * 12,
        "days": [[date(2020, 1, 1)]] * 12,
        "bytes": [[b"\xff"]] * 12,
        "numbers": [[float("nan")]] * 12,
        "nothing": [None] * 12,
    }
    odd = table.with_columns(**{k: pl.Series(v) for k, v in days.items()})
    yield "odd_types.parquet", BadTable(parquet(odd), "")
    coded = table.with_columns(pl.col("label").cast(pl.Categorical))
    yield "categories.parquet", BadTable(parquet(coded), "")
