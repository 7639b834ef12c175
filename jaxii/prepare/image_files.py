"""Finds and reads image files, and decides which files can be read.

`prepare`, `new` and `predict` use this module, so they report the same fault for a
pipe, a device, an endless file or a dangling link.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import fsspec

from jaxii.errors import InputError
from jaxii.storage import AnyPath, at, size_of

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# A photo of 120 megapixels, the most that `recode` takes, is about 100 MB as a JPEG
# and 200 MB as a PNG. Each thread may hold one file of this size.
MAX_FILE_BYTES = 256 * 2**20
# Fields of a bucket listing that change with the content of an object.
_STAMPS = ("generation", "etag", "ETag", "md5Hash", "mtime", "LastModified")
_NO_FILE = "no such file"
# Faults of one file. Other I/O errors, such as a lost network disk, end the run.
_FAULTS = {
    errno.ENOENT: _NO_FILE,
    errno.ENOTDIR: _NO_FILE,
    errno.EISDIR: "a folder",
    errno.EACCES: "no permission to read it",
    errno.EPERM: "no permission to read it",
    errno.ENAMETOOLONG: "a name too long for a file",
    errno.ELOOP: "a link to itself",
}
# fsspec raises these without an errno.
_KINDS = {
    FileNotFoundError: errno.ENOENT,
    IsADirectoryError: errno.EISDIR,
    PermissionError: errno.EACCES,
}


class FileFacts(NamedTuple):
    """Identifies the version of a file without reading it.

    Attributes:
      size_bytes: 0 if there is no such file.
      stamp: Time of the last change of a local file in nanoseconds; generation of an
        object in a bucket, or its equivalent; "" if unknown.
    """

    size_bytes: int
    stamp: str


# Path, name and a function that returns the facts.
FoundFile = tuple[str, str, Callable[[], FileFacts]]


def facts(file: AnyPath | os.DirEntry) -> FileFacts:
    """Returns the facts of a file; size 0 if it cannot be accessed."""
    try:
        found = file.stat()
    except (OSError, ValueError):  # ValueError: a zero byte in the name
        return FileFacts(0, "")
    if isinstance(found, os.stat_result):
        return FileFacts(found.st_size, str(found.st_mtime_ns))
    return FileFacts(found.length, str(found.mtime))


def facts_listed(info: Mapping[str, Any]) -> FileFacts:
    """Returns the facts of an object as fsspec lists it."""
    stamps = (info.get(name) for name in _STAMPS)
    return FileFacts(int(info["size"]), str(next(filter(None, stamps), "")))


def read(path: AnyPath, size_bytes: int | None = None) -> bytes:
    """Returns the bytes of an image file.

    Args:
      path: Local, or in a bucket.
      size_bytes: Size of an object in a bucket, if a listing gave it. The size of a
        local file is always queried.

    Raises:
      ValueError: If the file is at fault; the message names the fault.
      OSError: If the storage fails.
    """
    check(path, size_bytes)
    with _named_faults(path):
        return path.read_bytes()


def check(path: AnyPath, size_bytes: int | None = None) -> int:
    """Returns the size of a readable image file in bytes; see `read`.

    A local file must be regular: reading a pipe waits for a writer, and a device may be
    endless.
    """
    with _named_faults(path):
        if isinstance(path, Path):
            found = path.stat()
            size_bytes = found.st_size
            if stat.S_ISDIR(found.st_mode):
                raise ValueError(_FAULTS[errno.EISDIR])
            if not stat.S_ISREG(found.st_mode):
                raise ValueError("not a regular file")
        elif size_bytes is None:
            size_bytes = size_of(path)
    if size_bytes > MAX_FILE_BYTES:
        raise ValueError(
            f"{size_bytes:,} bytes; at most {MAX_FILE_BYTES // 2**20} MiB are read"
        )
    return size_bytes


@contextmanager
def _named_faults(path: AnyPath) -> Iterator[None]:
    """Turns a storage error into ValueError if the file is at fault."""
    try:
        yield
    except OSError as error:
        number = error.errno or next(
            (code for kind, code in _KINDS.items() if isinstance(error, kind)), None
        )
        if number not in _FAULTS:
            raise
        # pathlib turns http://x into http:/x.
        is_address = isinstance(path, Path) and path.parts[0].endswith(":")
        fault = _FAULTS[number]
        if fault == _NO_FILE and is_address:
            fault = "an address; images are read from disks and gs:// buckets"
        raise ValueError(fault) from error


@dataclass(frozen=True)
class Images:
    """Image files in ascending order of their ids.

    Attributes:
      ids: Distinct ids: stripped file names without suffix.
      paths: One per id.
      facts: One per id.
      repeated: Ids with more than one file; the first by path is used.
      unnamed: Escaped paths of files whose names are not UTF-8. Ids are text, so these
        are left out.
      hidden: See `Skipped`.
      reached_again: See `Skipped`.
    """

    ids: list[str]
    paths: list[AnyPath]
    facts: list[FileFacts]
    repeated: tuple[str, ...] = ()
    unnamed: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    reached_again: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """What `files_below` leaves out, which it adds while it searches.

    Attributes:
      hidden: Paths of hidden files and folders.
      reached_again: Other paths of folders that are read, mostly links.
    """

    hidden: list[str] = field(default_factory=list)
    reached_again: list[str] = field(default_factory=list)


def find_images(folders: tuple[AnyPath, ...]) -> Images:
    """Finds the images in folders, searched recursively.

    Raises:
      InputError: If a folder cannot be listed.
    """
    found: dict[str, tuple[str, FileFacts]] = {}
    repeated: set[str] = set()
    unnamed = []
    skipped = Skipped()
    for path, name, facts in files_below(folders, skipped):
        stem, suffix = os.path.splitext(name)  # noqa: PTH122 (10x faster)
        if suffix.lower() not in IMAGE_SUFFIXES:
            continue
        if not is_text(stem):
            unnamed.append(ascii(path))
            continue
        stem = stem.strip() or stem
        before = found.get(stem)
        if before is not None:
            repeated.add(stem)
        if before is None or path < before[0]:
            found[stem] = (path, facts())
    ids = sorted(found)
    return Images(
        ids=ids,
        paths=[at(found[i][0]) for i in ids],
        facts=[found[i][1] for i in ids],
        repeated=tuple(sorted(repeated)),
        unnamed=tuple(sorted(unnamed)),
        hidden=tuple(map(_as_text, sorted(skipped.hidden))),
        reached_again=tuple(map(_as_text, sorted(skipped.reached_again))),
    )


def files_below(
    folders: tuple[AnyPath, ...], skipped: Skipped | None = None
) -> Iterator[FoundFile]:
    """Yields path, name and a function that returns the facts of each file.

    Folders are searched recursively. Files and folders that are called __MACOSX or
    start with "." are hidden and left out.

    Links to folders are followed last, in the order of their paths. A folder is read
    once, so files keep the paths that they have without links, and a link to a parent
    does not loop.

    Args:
      folders: Local, or in a bucket.
      skipped: Collects what is left out.

    Raises:
      InputError: If a folder cannot be listed.
    """
    skipped = skipped or Skipped()
    seen: set[tuple[int, int]] = set()
    pending = sorted(map(os.fspath, folders), key=os.path.islink)
    while pending:
        links: list[str] = []
        for folder in pending:
            if "://" in folder:
                yield from _objects_below(folder, skipped)
            else:
                yield from _walk(folder, seen, links, skipped)
        pending = sorted(links)


def _objects_below(folder: str, skipped: Skipped) -> Iterator[FoundFile]:
    # The listing includes the facts; a request per file would take hours.
    system, root = fsspec.url_to_fs(folder)
    system.invalidate_cache()  # others may have written since
    for name, info in system.find(root, detail=True).items():
        path = str(system.unstrip_protocol(name))
        parts = name.removeprefix(root).split("/")
        if any(map(_is_hidden, parts)):
            skipped.hidden.append(path)
        else:
            yield path, parts[-1], partial(facts_listed, info)


def _walk(
    root: str, seen: set[tuple[int, int]], links: list[str], skipped: Skipped
) -> Iterator[FoundFile]:
    """Yields the files below a folder; adds the links to folders to `links`."""
    pending = [root]
    while pending:
        folder = pending.pop()
        folders: list[str] = []
        try:
            place = os.stat(folder)  # noqa: PTH116 (the folder is text here)
            if (place.st_dev, place.st_ino) in seen:
                skipped.reached_again.append(folder)
                continue
            seen.add((place.st_dev, place.st_ino))
            entries = os.scandir(folder)
        except OSError as error:
            raise InputError(
                f"{folder} cannot be listed ({error.strerror}); use a readable folder."
            ) from error
        with entries:
            for entry in entries:
                if _is_hidden(entry.name):
                    skipped.hidden.append(entry.path)
                elif not _is_folder(entry):
                    yield entry.path, entry.name, partial(facts, entry)
                else:
                    (links if entry.is_symlink() else folders).append(entry.path)
        pending += sorted(folders, reverse=True)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _as_text(path: str) -> str:
    return path if is_text(path) else ascii(path)


def is_text(name: str) -> bool:
    """Returns whether a file name is UTF-8, as ids must be."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
