"""Gives images their ids, and finds the image that an id in a file means.

One rule applies to all files: label files, metadata, lists of validation images and
sample submissions.

* Ids are text and case-sensitive: 007 is not 7, and a is not A.
* White space around an id is ignored.
* An image suffix (.jpg, .jpeg, .png or .webp, in any case) is removed only if no image
  has the id with the suffix and one has the id without it.
"""

import os
import unicodedata
from collections.abc import Container, Iterator, Sequence

import polars as pl

from jaxii.prepare.image_files import IMAGE_SUFFIXES

_SUFFIX = rf"(?i)\.({'|'.join(suffix[1:] for suffix in IMAGE_SUFFIXES)})$"
# Notes of a tally.
SUFFIX_NOTE = "ids found without their image suffix"
CASE_NOTE = "ids that differ only in case"


def stem(path: str) -> str:
    """Returns a file's name without folder, suffix and surrounding white space.

    A name that would be empty keeps its suffix.
    """
    # pathlib takes seconds for a million names.
    name = path.rpartition("/")[2]
    return os.path.splitext(name)[0].strip() or name.strip()  # noqa: PTH122


def composed(path: str) -> str:
    """Returns a path with "/" and composed letters.

    Windows writes backslashes, and macOS decomposes accented letters.
    """
    return unicodedata.normalize("NFC", path).replace("\\", "/")


def of_paths(paths: Sequence[str]) -> tuple[list[str], str]:
    """Returns the ids of all images below a folder.

    Ids are file names without suffix if these are distinct; otherwise paths without
    suffix; or whole paths if those are not distinct, either.

    Args:
      paths: Relative to the folder.

    Returns:
      The ids, and what they are and why; "" for file names.
    """
    below = "path below --images"
    choices = (
        (list(map(stem, paths)), ""),
        (
            list(map(_without_suffix, paths)),
            f"{below} without suffix, because folders share file names",
        ),
        (list(paths), f"{below}, because some names differ only in their suffix"),
    )
    return next(
        (c for c in choices if len(set(c[0])) == len(paths) and all(c[0])), choices[-1]
    )


def below_any_folder(path: str) -> Iterator[str]:
    """Yields the ids that `of_paths` may give a file below any folder above it.

    >>> list(below_any_folder("cats/a.jpg"))
    ['a', 'a.jpg', 'cats/a', 'cats/a.jpg']

    Args:
      path: Separated by "/".
    """
    parts = path.strip("/").split("/")
    for first in reversed(range(len(parts))):
        below = "/".join(parts[first:])
        yield _without_suffix(below)
        yield below


def _without_suffix(path: str) -> str:
    return os.path.splitext(path)[0].strip()  # noqa: PTH122


def numbered(ids: pl.Series) -> pl.DataFrame:
    """Returns a table of ids (column image) and their positions (column row)."""
    return pl.DataFrame({"image": ids}).with_row_index("row").select("image", "row")


def without_suffix(names: pl.Series, images: pl.DataFrame) -> pl.DataFrame:
    """Returns the names that mean an image without their suffix; see `numbered`.

    Args:
      names: Stripped names, none of which is the id of an image.
      images: From `numbered`.
    """
    stems = pl.DataFrame({"image": names.drop_nulls().unique(maintain_order=True)})
    stems = stems.filter(pl.col("image").str.contains(_SUFFIX)).with_columns(
        stem=pl.col("image").str.replace(_SUFFIX, "").str.strip_chars()
    )
    found = stems.join(
        images.rename({"image": "stem"}), on="stem", maintain_order="left"
    )
    return found.select("image", "row")


def find_rows(names: pl.Series, ids: pl.Series) -> tuple[pl.Series, int]:
    """Finds the image that each name means.

    Args:
      names: As written in a file.
      ids: Distinct ids of the images.

    Returns:
      The position of each name's image, null if there is none; the number of names that
      mean an image only without their suffix.
    """
    images = numbered(ids)
    asked = pl.DataFrame({"image": names.cast(pl.String).str.strip_chars()})
    found = asked.join(images, on="image", how="left", maintain_order="left")["row"]
    more = without_suffix(asked["image"].filter(found.is_null()), images)
    if not len(more):
        return found, 0
    known = pl.concat([images, more])
    again = asked.join(known, on="image", how="left", maintain_order="left")["row"]
    return again, found.null_count() - again.null_count()


def meant(name: str, ids: Container[str]) -> str:
    """Returns the id that a name means; the stripped name if there is none.

    Unlike `find_rows`, it accepts ids that are not UTF-8, which polars cannot hold.
    """
    name = name.strip()
    if name in ids or not name.lower().endswith(IMAGE_SUFFIXES):
        return name
    stem = name.rpartition(".")[0].strip()
    return stem if stem in ids else name


def case_twins(ids: Sequence[str]) -> list[str]:
    """Returns the ids that differ from another id only in case.

    A file system that ignores case cannot hold both in one folder.
    """
    names = pl.Series(ids, dtype=pl.String)
    return names.filter(names.str.to_lowercase().is_duplicated()).to_list()
