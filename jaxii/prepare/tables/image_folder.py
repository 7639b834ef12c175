"""The images of a folder: which there are, their sizes, and which are broken.

Comes first, and again before labels are counted. Some thousand images are decoded; of
more the start and the end of each file are read, and `prepare` decodes them all.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np

from jaxii.errors import InputError
from jaxii.prepare import image_files, image_ids
from jaxii.prepare.image_files import IMAGE_SUFFIXES
from jaxii.prepare.layout import files_below
from jaxii.prepare.recode import probe, recode, size
from jaxii.prepare.shards import one_thread_each
from jaxii.prepare.tables.notes import Notes

Progress = Callable[[int, int, str], None]
# Decoded whole up to here: half a minute on two cores.
MOST_DECODED = 4_000
# Bytes at the start in which the header mostly is, and at the end.
HEAD_BYTES, TAIL_BYTES = 1 << 17, 1 << 12
BLOCK = 64


@dataclass(frozen=True)
class Checked:
    """What was found out about some images.

    Attributes:
      short_sides: pixels; of those that are whole.
      broken: number of the image -> what is wrong.
      decoded: whether all were decoded, or only their headers read.
    """

    short_sides: np.ndarray
    broken: dict[int, str]
    decoded: bool


def find(root: Path, notes: Notes) -> list[str]:
    """Returns the paths of the images of a folder and of all folders in it, sorted.

    Raises:
      InputError: there is none.
    """
    if not root.is_dir():
        raise InputError(f"--images={root} is not a folder; give the one of images.")
    found, others, unnamed = [], Counter(), []
    for path, name, _ in files_below((root,)):
        if name.startswith(".") or "/__MACOSX/" in path:
            others["hidden"] += 1
        elif not name.lower().endswith(IMAGE_SUFFIXES):
            others[PurePath(name).suffix.lower() or "no suffix"] += 1
        elif not image_ids.is_text(path):
            unnamed.append(ascii(path))
        else:
            found.append(path)
    if not found:
        kinds = ", ".join(kind for kind, _ in others.most_common(5)) or "nothing"
        raise InputError(
            f"--images={root} has no image in it; {', '.join(IMAGE_SUFFIXES)} are "
            f"read, and it has {kinds}."
        )
    notes.found(f"{root}: {len(found):,} images")
    if others:
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in others.most_common(5))
        notes.found(f"{root}: other files, not looked at: {kinds}")
    notes.left_out("images whose names are not UTF-8", unnamed)
    return sorted(found)


def check(files: Sequence[str], on_progress: Progress | None = None) -> Checked:
    """Looks into images, with all cores.

    Args:
      files: paths.
      on_progress: called with (done, total, what).
    """
    decoded = len(files) <= MOST_DECODED
    what = "decoding" if decoded else "reading headers"
    look = _decode if decoded else _read_ends
    sides: list[int] = []
    broken: dict[int, str] = {}
    starts = range(0, len(files), BLOCK)
    # Reading waits for disks, decoding for cores.
    threads = (os.cpu_count() or 1) * (1 if decoded else 4)
    with one_thread_each(), ThreadPoolExecutor(threads) as pool:
        blocks = pool.map(lambda start: _look(look, files, start), starts)
        for start, (block_sides, block_broken) in zip(starts, blocks, strict=True):
            sides += block_sides
            broken |= block_broken
            if on_progress is not None:
                on_progress(min(start + BLOCK, len(files)), len(files), what)
    return Checked(np.array(sides, np.int64), broken, decoded)


def _look(look: Callable, files: Sequence[str], start: int):
    sides, broken = [], {}
    for number in range(start, min(start + BLOCK, len(files))):
        try:
            sides.append(min(look(files[number])))
        except (ValueError, OSError) as error:
            broken[number] = getattr(error, "strerror", None) or str(error)
    return sides, broken


def _decode(file: str) -> tuple[int, int]:
    data = image_files.read(Path(file))
    # As `prepare` will, so that it finds nothing more.
    recode(data, short_side=64)
    return size(data)


def _read_ends(file: str) -> tuple[int, int]:
    size_bytes = image_files.check(Path(file))
    with Path(file).open("rb") as opened:
        data = opened.read(HEAD_BYTES)
        if size_bytes > HEAD_BYTES:
            opened.seek(max(HEAD_BYTES, size_bytes - TAIL_BYTES))
            data += opened.read()
    try:
        return probe(data, size_bytes)
    except ValueError:
        # A long profile before the header, a film after the end: few enough to decode.
        return _decode(file)
