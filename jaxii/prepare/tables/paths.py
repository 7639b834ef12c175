"""Which image a cell of a label file means.

One rule for a whole column, the first under which most cells name an image: a rule a
cell would find, for an image that is missing, one of the same name elsewhere.
"""

import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from jaxii.prepare.image_files import IMAGE_SUFFIXES

NOWHERE = -1
# Folders that cells may name before those below the folder of images.
MOST_DROPPED = 4


@dataclass(frozen=True)
class Match:
    """What the cells of a column mean.

    Attributes:
      rows: for each cell the number of its image, `NOWHERE` for none.
      rule: how cells were read, in words.
    """

    rows: list[int]
    rule: str

    @property
    def share(self) -> float:
        """Cells that name an image, of all."""
        return sum(row != NOWHERE for row in self.rows) / max(len(self.rows), 1)


class Matcher:
    """Finds images by what label files call them.

    Args:
      files: paths of the images, at least one.
      root: the folder they are in.
      home: the folder of the label file.

    Attributes:
      example: the path of an image, below the folder.
    """

    def __init__(self, files: Sequence[str], root: Path, home: Path):
        self.example = os.path.relpath(files[0], root)
        self._root, self._home = root, home
        self._suffixes = [_suffix(file) for file in files]
        below = [plain(os.path.relpath(file, root)) for file in files]
        self._by_path = _numbers(below)
        self._by_place = _numbers([plain(absolute(f)) for f in files])
        names = [PurePosixPath(path).name for path in below]
        self._by_name = _numbers(names)

    def match(self, cells: Sequence[str]) -> Match:
        """Returns the image of each cell, by one rule for all of them.

        The first that finds more than half of them: a later one would find a missing
        image's namesake elsewhere. Where none does, the one that finds most.
        """
        distinct = list(dict.fromkeys(cells))
        keys = [plain(cell) for cell in distinct]
        best: tuple[int, dict[str, int], str] = (0, {}, "")
        for rule, numbers, key in self._rules():
            found = {}
            # Two paths that a rule makes one are not the same image.
            times = Counter(key(path) for path in set(keys))
            # a.png is not a.jpg where both are listed.
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
        yield f"as below {self._root}", self._by_path, lambda path: path
        for start in dict.fromkeys((self._home, Path.cwd())):
            where = plain(os.fspath(start.absolute()))
            yield f"as from {start.absolute()}", self._by_place, partial(_join, where)
        yield "as absolute ones", self._by_place, lambda path: path
        for number in range(1, MOST_DROPPED + 1):
            what = "folder" if number == 1 else f"{number} folders"
            yield (
                f"as below {self._root}, without the first {what} they name",
                self._by_path,
                partial(_without, number),
            )
        yield BY_NAME, self._by_name, lambda path: path.rpartition("/")[2]

    def _number(self, found: list[int], cell: str, *, exact: bool) -> int:
        if exact or len(found) > 1:
            found = [n for n in found if self._suffixes[n] == _suffix(cell)]
        return found[0] if len(found) == 1 else NOWHERE


BY_NAME = "by the name of the file alone, whatever folder they name"


def plain(path: str) -> str:
    """Returns a path as it is compared: composed letters, slashes, no image suffix.

    macOS stores letters with their accents apart, and label files come from Windows.
    """
    path = unicodedata.normalize("NFC", path).replace("\\", "/")
    while path.startswith("./"):
        path = path[2:]
    suffix = _suffix(path)
    return path[: -len(suffix)] if suffix in IMAGE_SUFFIXES else path


def absolute(path: str) -> str:
    """Returns a path from the root on; links are not followed."""
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
