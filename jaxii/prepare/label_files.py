"""Reads the CSV files of a labelled image collection into tables of integers.

Codes become vocabulary indices and image ids become row numbers while polars streams a
file, so that 15 million rows take seconds. Every row left out is counted by reason.
"""

import os
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import polars as pl
from jaxtyping import Bool

from jaxii.data.labels import Vocabulary, largest_by_key
from jaxii.errors import InputError
from jaxii.prepare.image_ids import (
    SUFFIX_NOTE,
    case_twins,
    find_rows,
    numbered,
    without_suffix,
)
from jaxii.prepare.tables.columns import plain_name
from jaxii.prepare.tables.csv_rows import check_rows, line_of_row
from jaxii.prepare.tables.rows import clean
from jaxii.prepare.tally import Tally, few
from jaxii.storage import AnyPath

MAX_UNKNOWN_SHARE = 0.05
LABEL_COLUMNS = ("ImageID", "LabelName", "Confidence")
METADATA = ("group", "domain", "slice")
_NOT_TRAINABLE, _UNKNOWN = -1, -2


@dataclass(frozen=True)
class Codes:
    """The label codes that files may use.

    Attributes:
      vocabulary: The trainable codes, in order.
      known: All codes that the files describe, trainable or not.
      described_in: Name of the file that lists the known codes, for messages.
      has_descriptions: Whether that is a file of descriptions, which also lists codes
        that are not trainable.
    """

    vocabulary: Vocabulary
    known: frozenset[str]
    described_in: str
    has_descriptions: bool = False

    def table(self) -> pl.DataFrame:
        """Returns the label of each known code, -1 if it is not trainable."""
        trainable = self.vocabulary.index
        others = sorted(self.known - trainable.keys())
        return pl.DataFrame(
            {
                "code": [*trainable, *others],
                "label": [*trainable.values(), *[_NOT_TRAINABLE] * len(others)],
            },
            schema={"code": pl.String, "label": pl.Int32},
        )


@dataclass(frozen=True)
class Entries:
    """Labels of one file, as columns of equal length.

    Attributes:
      rows: Row number of the image.
      labels: Vocabulary index.
      confidences: In [0, 1].
    """

    rows: np.ndarray
    labels: np.ndarray
    confidences: np.ndarray


def read_codes(trainable: AnyPath, descriptions: AnyPath | None) -> Codes:
    """Reads the class files.

    Args:
      trainable: CSV with the column label_code, in the order of the classes.
      descriptions: CSV with the columns label_code,description, including codes that
        are not trainable.

    Raises:
      InputError: If a header is wrong, there is no class, a class is listed twice, or a
        code is empty or has white space or control characters.
    """
    codes = _read(trainable, ("label_code",))["label_code"].fill_null("").to_list()
    if not codes:
        raise InputError(f"{trainable} lists no classes; list one label_code per row")
    # A submission lists the codes of an image in one cell, separated by spaces.
    for line, code in enumerate(codes, start=2):
        unfit = (c.isspace() or unicodedata.category(c) == "Cc" for c in code)
        if not code or any(unfit):
            raise InputError(
                f"{trainable} line {line}: label_code {code!r} is empty or contains "
                "white space or control characters, which a submission cannot "
                "represent; replace such characters, for example with _"
            )
    names: dict[str, str] = {}
    if descriptions is not None:
        table = _read(descriptions, ("label_code", "description"))
        table = table.drop_nulls("label_code")
        names = dict(zip(table["label_code"], table["description"], strict=True))
    try:
        vocabulary = Vocabulary(tuple(codes), tuple(names.get(c) or c for c in codes))
    except InputError as error:
        raise InputError(f"{trainable}: {error}") from error
    return Codes(
        vocabulary,
        known=frozenset(names) | set(codes),
        described_in=(descriptions or trainable).name,
        has_descriptions=descriptions is not None,
    )


def read_labels(
    path: AnyPath, codes: Codes, image_ids: pl.Series
) -> tuple[Entries, Tally]:
    """Reads a file with one label per row: ImageID,Source,LabelName,Confidence.

    Other columns, such as the corners of boxes, are ignored.

    Args:
      path: The CSV file.
      codes: The allowed values of LabelName.
      image_ids: Distinct ids of the images, in the order of their row numbers. The
        module `image_ids` defines which image an ImageID means.

    Returns:
      One entry for each (image, label), with its largest confidence, and counts of the
      rows.

    Raises:
      InputError: If the header is wrong, a confidence is not a number from 0 to 1, or
        more than one row in twenty has an unknown code.
    """
    _check(path, LABEL_COLUMNS)
    lazy = pl.scan_csv(os.fspath(path), infer_schema=False).select(
        image=pl.col("ImageID").str.strip_chars(),
        code=pl.col("LabelName").str.strip_chars(),
        confidence=pl.col("Confidence"),
    )
    return _collect(path, lazy, codes, image_ids)


def read_image_labels(
    path: AnyPath, codes: Codes, image_ids: pl.Series, *, header: bool
) -> tuple[Entries, Tally, pl.Series]:
    """Reads a file with one image per row: image_id,labels (separated by spaces).

    Args:
      path: The CSV file.
      codes: The allowed codes.
      image_ids: As in `read_labels`.
      header: Whether the first line is "image_id,labels". Without a header, the first
        two columns are used.

    Returns:
      One entry for each (image, label), with confidence 1; counts of the labels; the
      distinct ids that the file lists, in order.

    Raises:
      InputError: As for `read_labels`.
    """
    table = read_rows(path, header=header)
    lazy = table.lazy().select(
        image="image_id",
        code=pl.col("labels").fill_null("").str.strip_chars().str.split(" "),
        confidence=pl.lit("1"),
    )
    lazy = lazy.explode("code").filter(pl.col("code") != "")
    entries, tally = _collect(path, lazy, codes, image_ids, unit="labels")
    return entries, tally, table["image_id"].unique(maintain_order=True)


def read_rows(path: AnyPath, *, header: bool) -> pl.DataFrame:
    """Reads the columns image_id,labels as text; see `read_image_labels`.

    Raises:
      InputError: If the file has no such columns.
    """
    if header:
        table = _read(path, ("image_id", "labels"))
    else:
        table = _read(path, None)
        if table.width < 2:
            raise InputError(
                f"{path} has one column; it needs two columns without a header: image "
                "id and label codes separated by spaces"
            )
        table = table.select(image_id=table.columns[0], labels=table.columns[1])
        if len(table) and table["image_id"][0] in ("image_id", "ImageID"):
            raise InputError(
                f"{path} starts with a header ({','.join(table.row(0))}) but must not "
                "have one; delete its first line"
            )
    table = table.with_columns(pl.col("image_id").str.strip_chars())
    return table.filter(pl.col("image_id").fill_null("") != "")


def read_metadata(path: AnyPath, image_ids: pl.Series) -> tuple[pl.DataFrame, Tally]:
    """Reads group, domain and slice of images from a metadata file.

    Args:
      path: CSV with the column image_id and any of group, domain and slice. Values are
        read by `rows.clean`. The counts name the columns that are not used, and the
        values that differ only in case.
      image_ids: As in `read_labels`.

    Returns:
      A table with the three columns and one row per image, null if the file has no
      value (repeated rows of an image are ignored); counts of the rows.

    Raises:
      InputError: If the file has no column image_id, none of the three, a column named
        like one of them (" group" or "Group"), or no row that names an image.
    """
    table = _read(path, ("image_id",))
    unused = [name for name in table.columns if name not in ("image_id", *METADATA)]
    _check_spelling(path, unused)
    if not set(METADATA) & set(table.columns):
        raise InputError(
            f"{path} has the columns {','.join(table.columns)}; it needs image_id and "
            "at least one of group, domain, slice"
        )
    columns = {
        name: _cleaned(table[name])
        if name in table.columns
        else pl.lit(None, pl.String)
        for name in METADATA
    }
    rows, num_suffixed = find_rows(table["image_id"], image_ids)
    chosen = table.select("image_id", **columns).with_columns(row=rows)
    missing = chosen.filter(pl.col("row").is_null())["image_id"].fill_null("")
    found = chosen.filter(pl.col("row").is_not_null())
    once = found.unique("row", keep="first", maintain_order=True)
    dropped = {"image missing": len(missing), "repeated": len(found) - len(once)}
    examples = {"image missing": few(missing)} if len(missing) else {}
    tally = Tally(path.name, "rows", len(chosen), len(once), dropped, examples)
    tally = tally.with_note(SUFFIX_NOTE, num_suffixed)
    tally = tally.with_note("columns that are not used", len(unused), unused)
    for name in METADATA:
        twins = case_twins(once[name].drop_nulls().unique().sort().to_list())
        tally = tally.with_note(f"{name}s that differ only in case", len(twins), twins)
    if len(chosen) and len(image_ids) and not len(once):
        raise InputError(
            f"{path} matches no images ({tally.line()}); use the names of the image "
            "files without folder and suffix as ids"
        )
    images = numbered(image_ids)
    aligned = images.join(once, on="row", how="left", maintain_order="left")
    return aligned.select(METADATA), tally


def _cleaned(values: pl.Series) -> pl.Series:
    texts = [clean(text) or None for text in values.fill_null("")]
    return pl.Series(texts, dtype=pl.String)


def _check_spelling(path: AnyPath, unused: Iterable[str]) -> None:
    """Raises InputError if an unused column is named like one that is read."""
    for name in unused:
        meant = plain_name(name)
        if meant in ("image_id", *METADATA):
            raise InputError(
                f"{path} has the column {name!r}, which is not read; rename it to "
                f"{meant}, or to another name if it does not contain the {meant}"
            )


def _collect(
    path: AnyPath,
    lazy: pl.LazyFrame,
    codes: Codes,
    image_ids: pl.Series,
    unit: str = "rows",
) -> tuple[Entries, Tally]:
    images = numbered(image_ids)
    table = _numbers(path, lazy, codes, images)
    _check_confidences(path, lazy, table["confidence"])
    unknown = int((table["label"] == _UNKNOWN).sum())
    if unknown > MAX_UNKNOWN_SHARE * len(table):
        raise _too_many_unknown(path, lazy, codes, f"{unknown:,} of {len(table):,}")
    examples: dict[str, tuple[str, ...]] = {}
    notes: dict[str, int] = {}
    if table.filter(pl.col("label") >= 0)["row"].null_count():
        # The file is read again only if it names missing images.
        missing = _missing(path, lazy, codes, images)
        suffixed = without_suffix(missing, images)
        if len(suffixed):
            table = _numbers(path, lazy, codes, pl.concat([images, suffixed]))
            missing = missing.filter(~missing.is_in(suffixed["image"].implode()))
            notes[SUFFIX_NOTE] = len(suffixed)
        if len(missing):
            examples["image missing"] = few(missing)
            notes["distinct missing images"] = len(missing)
    if unknown:
        examples["unknown label code"] = few(_first_unknown(path, lazy, codes))
    usable = table.filter(pl.col("label") >= 0, pl.col("row").is_not_null())
    num_labels = len(codes.vocabulary)
    keys, confidences = largest_by_key(
        usable["row"].to_numpy().astype(np.int64) * num_labels
        + usable["label"].to_numpy(),
        usable["confidence"].to_numpy(),
    )
    not_trainable = int((table["label"] == _NOT_TRAINABLE).sum())
    dropped = {
        "label not trainable": not_trainable,
        "unknown label code": unknown,
        "image missing": len(table) - not_trainable - unknown - len(usable),
        "repeated": len(usable) - len(keys),
    }
    entries = Entries(
        rows=keys // num_labels,
        labels=(keys % num_labels).astype(np.int32),
        confidences=confidences,
    )
    tally = Tally(path.name, unit, len(table), len(keys), dropped, examples, notes)
    return entries, tally


def _numbers(
    path: AnyPath, lazy: pl.LazyFrame, codes: Codes, images: pl.DataFrame
) -> pl.DataFrame:
    """Returns image row (null if missing), label and confidence of each row."""
    joined = lazy.join(images.lazy(), on="image", how="left").join(
        codes.table().lazy(), on="code", how="left"
    )
    numbers = joined.select(
        "row",
        pl.col("label").fill_null(_UNKNOWN),
        confidence=pl.col("confidence")
        .str.strip_chars()
        .cast(pl.Float32, strict=False),
    )
    return _run(path, numbers)


def _missing(
    path: AnyPath, lazy: pl.LazyFrame, codes: Codes, images: pl.DataFrame
) -> pl.Series:
    trainable = pl.DataFrame({"code": codes.vocabulary.codes}).lazy()
    missing = lazy.join(trainable, on="code", how="semi").join(
        images.lazy(), on="image", how="anti"
    )
    ids = _run(path, missing.select(pl.col("image").fill_null("")).unique())
    return ids["image"].sort()


def _first_unknown(path: AnyPath, lazy: pl.LazyFrame, codes: Codes) -> list[str]:
    known = codes.table().lazy()
    strange = lazy.join(known, on="code", how="anti", maintain_order="left")
    table = _run(path, strange.select("code").head(1000))
    return [str(code) for code in table["code"].unique(maintain_order=True)]


def _too_many_unknown(
    path: AnyPath, lazy: pl.LazyFrame, codes: Codes, rows: str
) -> InputError:
    first = _first_unknown(path, lazy, codes)[0]
    fix = "Check that the files belong together"
    if not codes.has_descriptions:
        fix = (
            "No class descriptions were given; add class-descriptions.csv, which also "
            "lists codes that are not trainable, or check that the files belong "
            "together"
        )
    return InputError(
        f"{path}: {rows} rows have an unknown label code (first: {first!r}); at most "
        f"{MAX_UNKNOWN_SHARE:.0%} may be missing from {codes.described_in}. {fix}"
    )


def _check_confidences(path: AnyPath, lazy: pl.LazyFrame, values: pl.Series) -> None:
    if bool(values.is_between(0.0, 1.0).fill_null(False).all()):
        return
    number = pl.col("confidence").str.strip_chars().cast(pl.Float32, strict=False)
    is_wrong = ~number.is_between(0.0, 1.0).fill_null(False)
    wrong = lazy.with_row_index("row", offset=1).filter(is_wrong).head(1)
    row, image, code, text = _run(path, wrong).row(0)
    found = f"the confidence of label {code} of image {image} is {text!r}"
    if text is None:
        found = "the row has no confidence"
    raise InputError(
        f"{path} line {line_of_row(path, row)}: {found}; it must be a number from 0 to "
        "1"
    )


def _read(path: AnyPath, expected: tuple[str, ...] | None) -> pl.DataFrame:
    _check(path, expected)
    return _parse(path, expected is not None)


def _check(path: AnyPath, expected: tuple[str, ...] | None) -> None:
    """Checks the header, the number of cells of each row, and the double quotes."""
    columns = _parse(path, expected is not None, rows=0).columns
    if expected is not None and not set(expected) <= set(columns):
        found = ",".join(columns)
        found = found if len(found) <= 120 else found[:120] + "..."
        raise InputError(
            f"{path} has the header {found}; it needs the columns {','.join(expected)}"
        )
    with _errors_named(path):
        check_rows(path, len(columns))


def _parse(path: AnyPath, has_header: bool, rows: int | None = None) -> pl.DataFrame:
    with _errors_named(path):
        return pl.read_csv(
            os.fspath(path), infer_schema=False, n_rows=rows, has_header=has_header
        )


def _run(path: AnyPath, lazy: pl.LazyFrame) -> pl.DataFrame:
    with _errors_named(path):
        return lazy.collect(engine="streaming")


@contextmanager
def _errors_named(path: AnyPath) -> Iterator[None]:
    try:
        yield
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{path} cannot be read as CSV ({reason}); it must be comma-separated "
            "UTF-8 text"
        ) from error


def read_validation(
    path: AnyPath, ids: pl.Series, groups: pl.Series
) -> tuple[Bool[np.ndarray, " image"], Tally]:
    """Reads which training images form the validation split.

    Groups are never divided: if one image is listed, its whole group is taken.

    Args:
      path: CSV with the column image_id; `image_ids` defines what an id means.
      ids: Ids of the training images.
      groups: Groups of the training images; the image id where there is no group.

    Returns:
      Whether each image is in validation, and counts of the file.

    Raises:
      InputError: If no training image is listed, an id is empty or listed twice, or the
        file cannot be read.
    """
    listed = _read(path, ("image_id",))["image_id"].fill_null("").str.strip_chars()
    for wrong in (listed.filter(listed.is_duplicated()), listed.filter(listed == "")):
        if len(wrong):
            raise InputError(
                f"{path} has {len(wrong)} rows with an empty or repeated image_id "
                f"(first: {wrong[0]!r}); give each image one row and an id"
            )
    rows, num_suffixed = find_rows(listed, ids)
    absent = listed.filter(rows.is_null()).to_list()
    found = rows.drop_nulls().unique().to_numpy()
    repeated = len(listed) - len(absent) - len(found)
    dropped = {"listed but missing": len(absent), "repeated": repeated}
    examples = {"listed but missing": few(absent)}
    tally = Tally(path.name, "images", len(listed), len(found), dropped, examples)
    if not tally.kept:
        raise InputError(
            f"{path} lists no training images ({tally.line()}); use the ids of the "
            "label file"
        )
    is_listed = np.zeros(len(ids), bool)
    is_listed[found] = True
    chosen = groups.is_in(groups.filter(is_listed).unique().implode()).to_numpy()
    added = ids.filter(chosen & ~is_listed)
    note = "other images of a listed group, also taken"
    tally = tally.with_note(SUFFIX_NOTE, num_suffixed)
    return chosen, tally.with_note(note, len(added), added)
