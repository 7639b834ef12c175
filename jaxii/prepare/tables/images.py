"""Finds the images below a folder, and the image that a cell of a label file names."""

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath, PurePosixPath
from typing import NamedTuple

import numpy as np

from jaxii.console import OnProgress, no_progress
from jaxii.data.index import file_hash
from jaxii.errors import InputError
from jaxii.prepare import image_files
from jaxii.prepare.image_files import IMAGE_SUFFIXES, Skipped, files_below, is_text
from jaxii.prepare.recode import probe, recode, size
from jaxii.prepare.tables.notes import Notes
from jaxii.prepare.threads import one_thread_each

# Up to this many images are decoded, in half a minute on two cores.
MOST_DECODED = 4_000
# Bytes read at the start of a file, which usually hold the header, and at its end.
HEAD_BYTES, TAIL_BYTES = 1 << 17, 1 << 12
BLOCK = 64
NOWHERE = -1
# Most leading folders of a cell that are removed to match images.
MOST_DROPPED = 4


@dataclass(frozen=True)
class Checked:
    """Result of checking images.

    Attributes:
      short_sides: Short sides of the readable images, in pixels.
      broken: The fault of each broken image, by its position.
      file_hashes: Of the readable images; see `index.file_hash`. None if only
        headers were read, instead of decoding all images.
    """

    short_sides: np.ndarray
    broken: dict[int, str]
    file_hashes: np.ndarray | None

    @property
    def decoded(self) -> bool:
        return self.file_hashes is not None


def find(root: Path, notes: Notes) -> list[str]:
    """Returns the sorted paths of the images in a folder, searched recursively.

    Raises:
      InputError: If there is no image.
    """
    if not root.is_dir():
        raise InputError(f"--images={root} is not a folder; use a folder of images.")
    found, others, unnamed = [], Counter(), []
    skipped = Skipped()
    for path, name, _ in files_below((root,), skipped):
        if not name.lower().endswith(IMAGE_SUFFIXES):
            others[PurePath(name).suffix.lower() or "no suffix"] += 1
        elif not is_text(path):
            unnamed.append(ascii(path))
        else:
            found.append(path)
    others["hidden"] = len(skipped.hidden)
    others = +others  # without zero counts
    if unnamed and not found:
        raise InputError(
            f"--images={root}: no image has a name that is UTF-8 (the first: "
            f"{unnamed[0]}); rename the images, or set PYTHONUTF8=1 if their names are "
            "correct and the locale is not UTF-8."
        )
    if not found:
        kinds = ", ".join(kind for kind, _ in others.most_common(5)) or "nothing"
        raise InputError(
            f"--images={root} contains no images; supported suffixes: "
            f"{', '.join(IMAGE_SUFFIXES)}; found: {kinds}."
        )
    notes.found(f"{root}: {len(found):,} images")
    if others:
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in others.most_common(5))
        notes.found(f"{root}: other files are skipped: {kinds}")
    notes.left_out("images whose names are not UTF-8", unnamed)
    again = [os.path.relpath(path, root) for path in sorted(skipped.reached_again)]
    notes.left_out("links", again, " to folders that are read by another path")
    return sorted(found)


def check(
    files: Sequence[str], on_progress: OnProgress = no_progress, *, decode: bool = False
) -> Checked:
    """Checks images on all cores.

    Args:
      files: Paths of the images.
      on_progress: Called with (images checked, images in all, what).
      decode: Whether to decode all images; otherwise only headers are read if there are
        more than `MOST_DECODED` images.
    """
    decoded = decode or len(files) <= MOST_DECODED
    what = "decoding" if decoded else "reading headers"
    read = _decode if decoded else _read_ends
    found: list[_Facts] = []
    broken: dict[int, str] = {}
    starts = range(0, len(files), BLOCK)
    # Decoding is bound by cores, reading by disks.
    threads = (os.cpu_count() or 1) * (1 if decoded else 4)
    with one_thread_each(), ThreadPoolExecutor(threads) as pool:
        blocks = pool.map(lambda start: _check(read, files, start), starts)
        for start, (block_found, block_broken) in zip(starts, blocks, strict=True):
            found += block_found
            broken |= block_broken
            on_progress(min(start + BLOCK, len(files)), len(files), what)
    return Checked(
        np.array([facts.short_side for facts in found], np.int64),
        broken,
        np.array([facts.hash for facts in found], np.uint64) if decoded else None,
    )


class _Facts(NamedTuple):
    """Short side of an image, and hash of its file; 0 if only its ends were read."""

    short_side: int
    hash: int


def _check(
    read: Callable[[str], _Facts], files: Sequence[str], start: int
) -> tuple[list[_Facts], dict[int, str]]:
    """Returns facts and faults of a block of images."""
    found, broken = [], {}
    for number in range(start, min(start + BLOCK, len(files))):
        try:
            found.append(read(files[number]))
        except (ValueError, OSError) as error:
            broken[number] = getattr(error, "strerror", None) or str(error)
    return found, broken


def _decode(file: str) -> _Facts:
    data = image_files.read(Path(file))
    # Finds every fault that writing the dataset would find.
    recode(data, short_side=64)
    return _Facts(min(size(data)), file_hash(data))


def _read_ends(file: str) -> _Facts:
    size_bytes = image_files.check(Path(file))
    with Path(file).open("rb") as opened:
        data = opened.read(HEAD_BYTES)
        if size_bytes > HEAD_BYTES:
            opened.seek(max(HEAD_BYTES, size_bytes - TAIL_BYTES))
            data += opened.read()
    try:
        return _Facts(min(probe(data, size_bytes)), 0)
    except ValueError:
        # The file has a long colour profile or trailing data, which is rare.
        return _decode(file)


@dataclass(frozen=True)
class Match:
    """The images that the cells of a column name.

    Attributes:
      rows: Position of each cell's image, or `NOWHERE`.
      rule: How cells were matched, in words.
    """

    rows: list[int]
    rule: str

    @property
    def share(self) -> float:
        """Share of the cells that name an image."""
        return sum(row != NOWHERE for row in self.rows) / max(len(self.rows), 1)


class Matcher:
    """Finds images by their names in label files.

    Args:
      files: Paths of at least one image.
      root: The folder of the images.
      home: The folder of the label file.
    """

    def __init__(self, files: Sequence[str], root: Path, home: Path):
        self.example = os.path.relpath(files[0], root)
        self._root, self._home = root, home
        self._suffixes = [_suffix(file) for file in files]
        below = [plain(os.path.relpath(file, root)) for file in files]
        self._by_path = _numbers(below)
        self._by_place = _numbers([plain(absolute(f)) for f in files])
        self._by_name = _numbers([PurePosixPath(path).name for path in below])

    def match(self, cells: Sequence[str]) -> Match:
        """Returns the image of each cell, by one rule for all cells.

        The first rule that finds an image for more than half of the distinct cells is
        used, or else the rule that finds most. With a rule per cell, a missing image
        would match an image of the same name in another folder.
        """
        distinct = list(dict.fromkeys(cells))
        keys = [plain(cell) for cell in distinct]
        best: tuple[int, dict[str, int], str] = (0, {}, "")
        for rule, numbers, key in self._rules():
            found = {}
            # A rule that maps several paths to one name finds no image for them.
            times = Counter(key(path) for path in set(keys))
            # If a.png and a.jpg are both listed, the suffix decides.
            files = set(zip(keys, map(_suffix, distinct), strict=True))
            endings = Counter(key(path) for path, _ in files)
            for cell, path in zip(distinct, keys, strict=True):
                meant = key(path)
                several = numbers.get(meant, []) if times[meant] == 1 else []
                number = self._number(several, cell, exact=endings[meant] > 1)
                if number != NOWHERE:
                    found[cell] = number
            if len(found) > best[0]:
                best = (len(found), found, rule)
            if 2 * len(found) > len(distinct):
                break
        rows = [best[1].get(cell, NOWHERE) for cell in cells]
        return Match(rows, best[2])

    def _rules(self):
        yield f"relative to --images={self._root}", self._by_path, lambda path: path
        for start in dict.fromkeys((self._home, Path.cwd())):
            where = plain(os.fspath(start.absolute()))
            yield (
                f"relative to {start.absolute()}",
                self._by_place,
                partial(_join, where),
            )
        yield "as absolute paths", self._by_place, lambda path: path
        for number in range(1, MOST_DROPPED + 1):
            what = "folder" if number == 1 else f"{number} folders"
            yield (
                f"relative to --images={self._root}, without their first {what}",
                self._by_path,
                partial(_without, number),
            )
        rule = "by file name only, ignoring folders"
        yield rule, self._by_name, lambda path: path.rpartition("/")[2]

    def _number(self, found: list[int], cell: str, *, exact: bool) -> int:
        if exact or len(found) > 1:
            found = [n for n in found if self._suffixes[n] == _suffix(cell)]
        return found[0] if len(found) == 1 else NOWHERE


def plain(path: str) -> str:
    """Normalises a path for comparison: composed letters, "/", no image suffix.

    macOS decomposes accented letters, and Windows writes backslashes.
    """
    path = unicodedata.normalize("NFC", path).replace("\\", "/")
    while path.startswith("./"):
        path = path[2:]
    suffix = _suffix(path)
    return path[: -len(suffix)] if suffix in IMAGE_SUFFIXES else path


def absolute(path: str) -> str:
    """Returns an absolute path without following links."""
    return os.path.abspath(path)  # noqa: PTH100


def _join(folder: str, path: str) -> str:
    return os.path.normpath(f"{folder}/{path}")


def _without(number: int, path: str) -> str:
    return "/".join(path.strip("/").split("/")[number:])


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()  # noqa: PTH122 (10x faster)


def _numbers(keys: Sequence[str]) -> dict[str, list[int]]:
    numbers: dict[str, list[int]] = {}
    for number, key in enumerate(keys):
        numbers.setdefault(key, []).append(number)
    return numbers
