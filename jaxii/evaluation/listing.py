"""Which images are to be answered for, and in which order.

Before it: what a person gave `predict`, which is a folder, images, or a CSV of paths.
After it: `image_files` reads them.
"""

import csv
import glob
import io
import os
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from jaxii.errors import InputError
from jaxii.prepare.image_files import IMAGE_SUFFIXES, files_below
from jaxii.prepare.image_ids import meant
from jaxii.storage import AnyPath, at

PATH_COLUMNS = ("path", "file", "filename", "file_name", "image_path", "image")
ID_COLUMN = "image_id"


@dataclass(frozen=True)
class Listing:
    """Images by name, in the order of their answers.

    Attributes:
      folder: what relative names are below.
      names: of the files, as they were found or given; "" where an id has no file.
      image_ids: one a name.
      source: what the images are together, as a person named them.
    """

    folder: AnyPath
    names: list[str]
    image_ids: list[str]
    source: str

    def __len__(self) -> int:
        return len(self.names)

    def path(self, row: int) -> AnyPath:
        """Returns where an image is; its name must not be empty."""
        name = self.names[row]
        if "://" in name:
            return at(name)
        return Path(name) if name.startswith("/") else self.folder / name

    def shown(self, row: int) -> str:
        """Returns what an image is called where a person reads of it."""
        return self.names[row] or f"{self.image_ids[row]} (no such file)"

    def check_ids(self) -> None:
        """Refuses images that rows of `image_id,labels` could not tell apart.

        Raises:
          InputError: two of them have one id.
        """
        first: dict[str, int] = {}
        for row, image_id in enumerate(self.image_ids):
            before = first.setdefault(image_id, row)
            if before != row:
                raise InputError(
                    f"{self.names[before]} and {self.names[row]} share the id "
                    f"{image_id}; rename one of them, list the images in a CSV with "
                    "the columns path and image_id, or give --output=FILE.jsonl, whose "
                    "rows have the file."
                )

    def select(self, image_ids: Sequence[str]) -> "Listing":
        """Returns the images of these ids, in their order; some may have no file.

        See `data.image_ids` for what an id means; answers have it as it is given.

        Raises:
          InputError: two images have one id.
        """
        self.check_ids()
        by_id = dict(zip(self.image_ids, self.names, strict=True))
        names = [by_id.get(meant(image_id, by_id), "") for image_id in image_ids]
        return replace(self, names=names, image_ids=list(image_ids))


def find(given: str, more: Sequence[str] = ()) -> Listing:
    """Finds the images that a person means.

    Args:
      given: a folder; a CSV; or images and patterns with commas between them.
      more: further images, as a shell makes them of a pattern.

    Raises:
      InputError: what is not there, cannot be read, has no image or one twice.
    """
    whole = _located(given)
    if not more and _is_dir(whole):
        return _of_folder(whole)
    if not more and given.lower().endswith(".csv"):
        return _of_csv(whole)
    # A comma may be part of a name.
    parts = [given] if _is_file(whole) else given.split(",")
    names = [name for part in parts for name in _expanded(part)]
    names += more
    for name in names:
        path = _located(name)
        if _is_dir(path):
            raise InputError(
                f"--images: {name} is a folder; give one folder, or images alone."
            )
        if not _is_file(path):
            raise InputError(
                f"--images={name} is not a folder or a file; give a folder with "
                "images, images, or a .csv with their paths."
            )
    _check_once("--images", names)
    source = f"{given} and {len(more)} more" if more else given
    return _listing(Path(), names, source)


def read_ids(path: AnyPath) -> list[str]:
    """Returns the image ids of a sample submission, in its order.

    Raises:
      InputError: no such file, another header, no id, or one twice.
    """
    with _csv_rows(path, "--ids", "the header image_id,labels") as rows:
        header = next(rows, list[str]())
        if header[:1] != [ID_COLUMN]:
            raise InputError(
                f"{path} starts with {','.join(header) or 'nothing'!r}; its header has "
                "to be image_id,labels."
            )
        ids = [row[0].strip() for row in rows if row]
    if not ids:
        raise InputError(f"--ids={path} lists no image; give one id a row.")
    _check_once(f"--ids={path}", ids)
    return ids


def _of_folder(folder: AnyPath) -> Listing:
    root = os.fspath(folder).rstrip("/")
    below = [path[len(root) + 1 :] for path, _, _ in files_below((folder,))]
    names = [name for name in below if _has_image_suffix(name) and not _hidden(name)]
    if not names:
        raise InputError(
            f"--images={folder} has no image; files may end in "
            f"{', '.join(IMAGE_SUFFIXES)}."
        )
    return _listing(folder, sorted(names), os.fspath(folder))


def _of_csv(path: AnyPath) -> Listing:
    accepted = ", ".join(PATH_COLUMNS)
    names: list[str] = []
    ids: list[str] = []
    with _csv_rows(path, "--images", f"one of the columns {accepted}") as rows:
        header = [cell.strip().lower() for cell in next(rows, list[str]())]
        columns = [i for i, name in enumerate(header) if name in PATH_COLUMNS]
        if len(columns) != 1:
            raise InputError(
                f"--images={path} has the columns {', '.join(header) or 'none'}; paths "
                f"are taken from exactly one of {accepted}. For a list of ids give "
                "--images=FOLDER --ids=CSV."
            )
        column, has_ids = columns[0], ID_COLUMN in header
        id_column = header.index(ID_COLUMN) if has_ids else column
        for number, row in enumerate(rows, start=2):
            if not row:
                continue
            if len(row) <= max(column, id_column) or not (
                row[column] and row[id_column].strip()
            ):
                raise InputError(
                    f"--images={path}: row {number} has no path or no id; give both."
                )
            _located(row[column])
            names.append(row[column])
            ids.append(row[id_column].strip() if has_ids else row[id_column])
    if not names:
        raise InputError(f"--images={path} lists no image; give one path a row.")
    _check_once(f"--images={path}", names)
    return _listing(path.parent, names, os.fspath(path), ids if has_ids else None)


def _listing(
    folder: AnyPath, names: list[str], source: str, image_ids: list[str] | None = None
) -> Listing:
    if image_ids is None:
        image_ids = [_stem(name) for name in names]
    return Listing(folder, names, image_ids, source)


def _located(name: str) -> AnyPath:
    if "://" in name and not name.startswith("gs://"):
        raise InputError(
            f"{name} is an address; images are read from disks and gs:// buckets: "
            "download them first."
        )
    return at(name)


def _expanded(part: str) -> list[str]:
    """Returns the images that a pattern matches; a plain name is itself."""
    if not glob.has_magic(part) or "://" in part or _is_file(Path(part)):
        return [part]
    found = sorted(filter(_has_image_suffix, glob.glob(part, recursive=True)))  # noqa: PTH207
    if not found:
        raise InputError(
            f"--images={part} matches no image; files may end in "
            f"{', '.join(IMAGE_SUFFIXES)}."
        )
    return found


def _is_file(path: AnyPath) -> bool:
    # pathlib's raises where a list of names is too long to be one.
    return os.path.isfile(path) if isinstance(path, Path) else path.is_file()  # noqa: PTH113


def _is_dir(path: AnyPath) -> bool:
    return os.path.isdir(path) if isinstance(path, Path) else path.is_dir()  # noqa: PTH112


def _has_image_suffix(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _hidden(name: str) -> bool:
    # macOS leaves ._x.jpg beside x.jpg, and thumbnails lie in folders like .thumbnails.
    return name.startswith(".") or "/." in name


def _stem(name: str) -> str:
    # os.path: a million of pathlib's take seconds.
    stem = os.path.splitext(name.rpartition("/")[2])[0]  # noqa: PTH122
    return stem.strip() or stem


@contextmanager
def _csv_rows(
    path: AnyPath, flag: str, needs: str
) -> Generator[Iterator[list[str]], None, None]:
    """Gives the rows of a CSV one after the other."""
    if not path.is_file():
        raise InputError(f"{flag}={path} is not a file; give a CSV with {needs}.")
    try:
        with io.TextIOWrapper(path.open("rb"), "utf-8-sig", newline="") as file:
            yield csv.reader(file)
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(
            f"{flag}={path} cannot be read as CSV ({error}); it must be UTF-8 text "
            f"with {needs}."
        ) from error


def _check_once(flag: str, items: list[str]) -> None:
    if len(set(items)) < len(items):
        twice = next(item for item, number in Counter(items).items() if number > 1)
        raise InputError(f"{flag} lists {twice} more than once; list each only once.")
