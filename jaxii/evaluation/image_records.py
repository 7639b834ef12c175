"""Finds image files to predict and reads them as records.

Each file goes through `recode`, as in `prepare`, so a model sees an image in the same
form in training and in prediction.
"""

import csv
import functools
import glob
import hashlib
import io
import itertools
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import SupportsIndex, cast

import numpy as np
from jaxtyping import Int64

from jaxii.data.index import Index
from jaxii.data.records import RandomAccess
from jaxii.data.schema import Record
from jaxii.data.transforms import thumbnail
from jaxii.errors import InputError
from jaxii.prepare import image_files
from jaxii.prepare.image_files import IMAGE_SUFFIXES, files_below
from jaxii.prepare.image_ids import composed, meant, of_paths, stem
from jaxii.prepare.recode import recode
from jaxii.prepare.tables.table import SEPARATORS, declared_separator
from jaxii.storage import AnyPath, at

PATH_COLUMNS = ("path", "file", "filename", "file_name", "image_path", "image")
ID_COLUMN = "image_id"
THUMBNAIL_PIXELS = 240


@dataclass(frozen=True)
class Listing:
    """Image files, in the order of their predictions.

    Attributes:
      folder: folder of relative names.
      names: the files, as found or given; "" for an id without a file.
      image_ids: one per name.
      source: the images, as the user named them.
      paths_as_ids: what the ids are if they are paths; see `image_ids.of_paths`.
    """

    folder: AnyPath
    names: list[str]
    image_ids: list[str]
    source: str
    paths_as_ids: str = ""

    def __len__(self) -> int:
        return len(self.names)

    def path(self, row: int) -> AnyPath:
        """Returns the path of an image whose name is not empty."""
        name = self.names[row]
        if "://" in name:
            return at(name)
        return Path(name) if name.startswith("/") else self.folder / name

    def shown(self, row: int) -> str:
        """Returns the name of an image for messages."""
        return self.names[row] or f"{self.image_ids[row]} (no such file)"

    def digest(self) -> str:
        """Returns a hexadecimal digest of the names and ids in their order."""
        words = "\0".join(itertools.chain(self.names, self.image_ids))
        return hashlib.sha256(words.encode(errors="surrogateescape")).hexdigest()

    def check_ids(self) -> None:
        """Checks that the ids are distinct.

        Raises:
          InputError: If two images share an id.
        """
        first: dict[str, int] = {}
        for row, image_id in enumerate(self.image_ids):
            before = first.setdefault(image_id, row)
            if before != row:
                raise InputError(
                    f"{self.names[before]} and {self.names[row]} share the id "
                    f"{image_id}; rename one of them, give their folder as --images, "
                    "list them in a CSV with the columns path and image_id, or use "
                    "--output=FILE.jsonl."
                )

    def select(self, image_ids: Sequence[str]) -> "Listing":
        """Returns the images of these ids, in the given order; some may have no file.

        Ids are matched by `image_ids.meant` and kept as given; if none fits, again with
        "/" and composed letters. If ids are paths, file names are matched, too; of
        identical files, the first is used.

        Raises:
          InputError: If two images share an id, or different files have a given name.
        """
        self.check_ids()
        by_id = {i: [name] for i, name in zip(self.image_ids, self.names, strict=True)}
        if self.paths_as_ids:
            by_stem = _grouped(map(stem, self.names), self.names)
            lists_paths = any("/" in image_id for image_id in image_ids)
            by_id = by_stem | by_id if lists_paths else by_id | by_stem
        spelled = _grouped(map(composed, by_id), by_id)
        names: list[str] = []
        for image_id in image_ids:
            found = meant(image_id, by_id)
            if found not in by_id:
                alike = spelled.get(meant(composed(image_id), spelled), [])
                found = alike[0] if len(alike) == 1 else ""
            names.append(self._one_of(image_id, by_id.get(found, [""])))
        return replace(self, names=names, image_ids=list(image_ids))

    def _one_of(self, image_id: str, names: Sequence[str]) -> str:
        """Returns the first of identical files.

        Raises:
          InputError: If they differ.
        """
        for other in names[1:]:
            if not _are_identical(self.folder / names[0], self.folder / other):
                path_id = self.image_ids[self.names.index(names[0])]
                raise InputError(
                    f"--ids lists {image_id}, but {names[0]} and {other} are different "
                    f"files; remove one of them, or list ids such as {path_id}."
                )
        return names[0]


@dataclass(frozen=True)
class ImageFiles:
    """Records without labels; satisfies `RandomAccess`.

    Indexing raises ValueError for a damaged image.

    Attributes:
      listing: the files.
      short_side: short side that larger images are reduced to, in pixels.
    """

    listing: Listing
    short_side: int

    def __len__(self) -> int:
        return len(self.listing)

    def __getitem__(self, row: SupportsIndex, /) -> Record:
        return {
            "image": self.jpeg(row.__index__()),
            "image_id": self.listing.image_ids[row.__index__()],
            "label_ids": np.zeros(0, np.int32),
            "label_confidences": np.zeros(0, np.float32),
            "label_sources": np.zeros(0, np.uint8),
            "slice_id": 0,
        }

    def jpeg(self, row: int) -> bytes:
        """Returns an image as `prepare` stores it.

        Raises:
          ValueError: If the file is damaged or missing; the text is the reason.
        """
        if not self.listing.names[row]:
            raise ValueError("no file with this id")
        encoded = image_files.read(self.listing.path(row))
        return recode(encoded, short_side=self.short_side)

    def fault(self, row: int) -> str:
        """Returns the reason why an image is damaged."""
        try:
            self.jpeg(row)
        except ValueError as error:
            return str(error)
        return "could not be read at first but can be read now; predict it again"


def thumbnails(
    source: RandomAccess, longest_side: int = THUMBNAIL_PIXELS
) -> Callable[[int], bytes]:
    """Returns the function from a row to a small JPEG of its whole image.

    The function raises the errors of reading the record or the image.

    Args:
      source: Records of images.
      longest_side: Maximum side of the JPEG, in pixels.
    """
    return lambda row: thumbnail(source[row]["image"], longest_side)


@dataclass(frozen=True, kw_only=True)
class LabelledFiles(ImageFiles):
    """Records with the labels of an index, whose row i describes file i."""

    index: Index

    def __getitem__(self, row: SupportsIndex, /) -> Record:
        """Returns a record.

        Raises:
          InputError: If the image is damaged or missing.
        """
        try:
            record = super().__getitem__(row)
        except ValueError as error:
            name = self.listing.shown(row.__index__())
            raise InputError(
                f"{name} could be read at first but cannot be read now ({error}); "
                "evaluate again."
            ) from error
        index, number = self.index, row.__index__()
        own = slice(index.offsets[number], index.offsets[number + 1])
        record["label_ids"] = index.label_ids[own]
        record["label_confidences"] = index.confidences[own]
        record["label_sources"] = index.label_sources[own]
        record["slice_id"] = int(index.slice_ids[number])
        return record

    def select(self, rows: Int64[np.ndarray, " chosen"]) -> "LabelledFiles":
        """Returns the records of these rows, in the given order."""
        listing, places = self.listing, cast(list[int], rows.tolist())
        names = [listing.names[row] for row in places]
        image_ids = [listing.image_ids[row] for row in places]
        chosen = replace(listing, names=names, image_ids=image_ids)
        return replace(self, listing=chosen, index=self.index.select(rows))


def find(given: str, more: Sequence[str] = ()) -> Listing:
    """Finds the images that the flag `--images` names.

    Args:
      given: a folder, a CSV, or images and patterns separated by commas.
      more: further images.

    Raises:
      InputError: If a file is missing, a CSV cannot be read, or an image is listed
        twice.
    """
    path = _located(given)
    if not more and _is_dir(path):
        return _of_folder(path)
    if not more and given.lower().endswith(".csv"):
        return _of_csv(path)
    # A comma may be part of a name.
    parts = [given] if _is_file(path) else given.split(",")
    names = [*(name for part in parts for name in _expanded(part)), *more]
    for name in names:
        path = _located(name)
        if _is_dir(path):
            raise InputError(
                f"--images: {name} is a folder; give one folder, or only images."
            )
        if not _is_file(path):
            raise InputError(
                f"--images={name} is not a file or a folder; give a folder of images, "
                "image files, or a .csv with their paths."
            )
    _check_distinct("--images", names)
    source = f"{given} and {len(more)} more" if more else given
    return Listing(Path(), names, list(map(stem, names)), source)


def read_ids(path: AnyPath) -> list[str]:
    """Returns the image ids of a sample submission, in its order.

    Raises:
      InputError: If the file cannot be read, has another header, lists no id or one
        id twice.
    """
    with _csv_rows(path, "--ids", "the header image_id,labels") as rows:
        header = next(rows, list[str]())
        if header[:1] != [ID_COLUMN]:
            raise InputError(
                f"{path} starts with {','.join(header) or 'nothing'!r}; its header "
                "must be image_id,labels."
            )
        ids = [row[0].strip() for row in rows if _has_cells(row)]
    if not ids:
        raise InputError(f"--ids={path} lists no images; give one id per row.")
    _check_distinct(f"--ids={path}", ids)
    return ids


def _of_folder(folder: AnyPath) -> Listing:
    root = os.fspath(folder).rstrip("/")
    below = [path[len(root) + 1 :] for path, _, _ in files_below((folder,))]
    names = sorted(filter(_has_image_suffix, below))
    if not names:
        raise InputError(
            f"--images={folder} contains no images; supported file endings are "
            f"{', '.join(IMAGE_SUFFIXES)}."
        )
    ids, paths_as_ids = of_paths(names)
    return Listing(folder, names, ids, os.fspath(folder), paths_as_ids)


def _of_csv(path: AnyPath) -> Listing:
    accepted = ", ".join(PATH_COLUMNS)
    names: list[str] = []
    ids: list[str] = []
    with _csv_rows(path, "--images", f"one of the columns {accepted}") as rows:
        header = [cell.strip().lower() for cell in next(rows, list[str]())]
        columns = [i for i, name in enumerate(header) if name in PATH_COLUMNS]
        if len(columns) != 1:
            raise InputError(
                f"--images={path} has the columns {', '.join(header) or 'none'}; it "
                f"needs exactly one of {accepted} for the paths. For a list of ids, "
                "use --images=FOLDER --ids=CSV."
            )
        has_ids = ID_COLUMN in header
        if has_ids:
            columns.append(header.index(ID_COLUMN))
        for number, row in enumerate(rows, start=2):
            if not _has_cells(row):
                continue
            cells = [row[i] for i in columns if i < len(row)]
            if len(cells) < len(columns) or not all(map(str.strip, cells)):
                what = "a path or an id; give both" if has_ids else "a path; give one"
                raise InputError(f"--images={path}: row {number} lacks {what}.")
            _located(cells[0])
            names.append(cells[0])
            ids.append(cells[-1].strip())
    if not names:
        raise InputError(f"--images={path} lists no images; give one path per row.")
    if isinstance(path, Path):
        names = _as_on_disk(path.parent, names)
    _check_distinct(f"--images={path}", names)
    ids = ids if has_ids else list(map(stem, names))
    return Listing(path.parent, names, ids, os.fspath(path))


def _as_on_disk(folder: Path, names: Sequence[str]) -> list[str]:
    """Returns listed paths as files are called; an absent path as it is given.

    An absent path is searched with "/", with composed letters and without white space
    around it. It is changed only if exactly one file fits.
    """

    @functools.cache
    def entries(place: Path) -> dict[str, list[str]]:
        try:
            found = [path.name for path in place.iterdir()]
        except OSError:
            found = []
        return _grouped(map(composed, found), found)

    def on_disk(name: str) -> str:
        if "://" in name or os.path.lexists(folder / name):
            return name
        parts = composed(name.strip()).split("/")
        place = Path("" if parts[0] else "/")
        for part in filter(None, parts):
            if os.path.lexists(folder / place / part):
                place /= part
                continue
            fitting = entries(folder / place).get(part, [])
            if len(fitting) != 1:
                return name
            place /= fitting[0]
        return str(place)

    return list(map(on_disk, names))


def _are_identical(first: AnyPath, second: AnyPath) -> bool:
    try:
        return image_files.read(first) == image_files.read(second)
    except ValueError:  # cannot be read
        return False


def _grouped(keys: Iterable[str], values: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for key, value in zip(keys, values, strict=True):
        groups[key].append(value)
    return dict(groups)


def _has_cells(row: Sequence[str]) -> bool:
    return any(map(str.strip, row))


def _located(name: str) -> AnyPath:
    if "://" in name and not name.startswith("gs://"):
        raise InputError(
            f"{name} is a URL; images are read from local disks and gs:// buckets; "
            "download them first."
        )
    return at(name)


def _expanded(part: str) -> list[str]:
    """Returns the images that a pattern matches, or the plain name itself."""
    if not glob.has_magic(part) or "://" in part or _is_file(Path(part)):
        return [part]
    found = sorted(filter(_has_image_suffix, glob.glob(part, recursive=True)))  # noqa: PTH207
    if not found:
        raise InputError(
            f"--images={part} matches no images; supported file endings are "
            f"{', '.join(IMAGE_SUFFIXES)}."
        )
    return found


def _is_file(path: AnyPath) -> bool:
    # `Path.is_file` raises if a list of names is too long for a path.
    return os.path.isfile(path) if isinstance(path, Path) else path.is_file()  # noqa: PTH113


def _is_dir(path: AnyPath) -> bool:
    return os.path.isdir(path) if isinstance(path, Path) else path.is_dir()  # noqa: PTH112


def _has_image_suffix(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


@contextmanager
def _csv_rows(
    path: AnyPath, flag: str, needs: str
) -> Generator[Iterator[list[str]], None, None]:
    if not path.is_file():
        raise InputError(f"{flag}={path} is not a file; give a CSV with {needs}.")
    try:
        with io.TextIOWrapper(path.open("rb"), "utf-8-sig", newline="") as file:
            first = file.readline()
            declared = declared_separator(first)
            header = file.readline() if declared else first
            lines = itertools.chain([header], file)
            separator = declared or max(SEPARATORS, key=header.count)
            # Strict, because an unclosed quote would hide the rows after it.
            yield csv.reader(lines, delimiter=separator, strict=True)
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(
            f"{flag}={path} cannot be read as CSV ({error}); it must be UTF-8 text "
            f"with {needs}."
        ) from error


def _check_distinct(flag: str, items: list[str]) -> None:
    if len(set(items)) < len(items):
        twice = next(item for item, number in Counter(items).items() if number > 1)
        raise InputError(f"{flag} lists {twice} more than once; list each only once.")
