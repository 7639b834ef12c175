"""Files that are written whole or not at all, on disks and in buckets.

On a disk they are written beside their place, then renamed; an object in a bucket
(gs://, through etils.epath and the extra `gcs`) appears when its upload is complete.
"""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec
from etils import epath

from jaxii.errors import InputError

AnyPath = Path | epath.Path


def user_cache() -> Path:
    """Returns jaxii's folder in the user's cache; it need not be there.

    Raises:
      RuntimeError: the user has no home.
    """
    named = os.environ.get("XDG_CACHE_HOME", "")
    # By the XDG specification what is not absolute is to be ignored.
    root = Path(named) if Path(named).is_absolute() else Path.home() / ".cache"
    return root / "jaxii"


def at(path: str | os.PathLike[str]) -> AnyPath:
    """Returns the path of a local file, or that of an object if it is gs://...

    Raises:
      InputError: gs:// and no gcsfs.
    """
    text = os.fspath(path)
    if "://" not in text:
        return Path(path)
    if text.startswith("gs://"):
        try:
            import gcsfs  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise InputError(
                f"{text} needs gcsfs ({error}); pip install 'jaxii[gcs]'"
            ) from error
    return epath.Path(path)


def size_of(path: AnyPath) -> int:
    """Returns the bytes of a file."""
    return path.stat().st_size if isinstance(path, Path) else path.stat().length


def names_in(folder: AnyPath) -> set[str]:
    """Returns the names in a folder now; empty for a prefix without objects.

    Cost: one listing, where asking for each file of a bucket is a request a file.
    """
    if isinstance(folder, Path):
        return {path.name for path in folder.iterdir()}
    system, root = fsspec.url_to_fs(os.fspath(folder))
    system.invalidate_cache()  # others may have written since
    try:
        return {name.rpartition("/")[2] for name in system.ls(root, detail=False)}
    except FileNotFoundError:
        return set()


def sizes_below(folder: AnyPath) -> dict[str, int]:
    """Returns the bytes of each file below a folder, by its name relative to it.

    Cost: one listing. A folder that is not there has no files.
    """
    if isinstance(folder, Path):
        root, found = os.fspath(folder), {}
        for directory, _, names in os.walk(root):
            for name in names:
                path = os.path.join(directory, name)  # noqa: PTH118 (text, and fast)
                with contextlib.suppress(OSError):  # gone since, or a dangling link
                    found[os.path.relpath(path, root)] = os.stat(path).st_size  # noqa: PTH116
        return found
    system, root = fsspec.url_to_fs(os.fspath(folder))
    system.invalidate_cache()  # others may have written since
    found = system.find(root, detail=True)
    return {name[len(root) + 1 :]: int(facts["size"]) for name, facts in found.items()}


def write_beside(
    path: AnyPath, write: Callable[[Any], object], *, binary: bool = False
) -> None:
    """Writes a file under another name and renames it when it is complete.

    Args:
      path: where to; its folder is made, an older file replaced.
      write: is called with the open file.
      binary: whether it takes bytes and not text.
    """
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with local_draft(path) as draft, _opened(draft, binary) as file:
        write(file)


def _opened(path: Path, binary: bool) -> IO[Any]:
    if binary:
        return path.open("wb")
    return path.open("w", newline="", encoding="utf-8")


class Mirror:
    """A folder for files that grow, which no object in a bucket can.

    On a disk it is the folder itself. For a bucket it is one on this machine, whose
    files are uploaded, whole, at each `push`: what was written after the last one is
    lost with the process.

    Args:
      home: where the files belong; made where it is on a disk.

    Attributes:
      path: where they are written.
    """

    def __init__(self, home: AnyPath):
        self._home = home
        self._pushed: dict[Path, tuple[int, int]] = {}
        if isinstance(home, Path):
            self.path = home
            home.mkdir(parents=True, exist_ok=True)
        else:
            self._scratch = tempfile.TemporaryDirectory()
            self.path = Path(self._scratch.name)

    def fetch(self, name: str) -> Path:
        """Returns the path of a file, with what its home has of it."""
        if self.path != self._home and (self._home / name).exists():
            (self.path / name).write_bytes((self._home / name).read_bytes())
        return self.path / name

    def push(self) -> None:
        """Uploads the files that have changed."""
        if self.path == self._home:
            return
        for path in sorted(self.path.rglob("*")):
            state = path.stat().st_size, path.stat().st_mtime_ns
            if path.is_file() and self._pushed.get(path) != state:
                name = path.relative_to(self.path).as_posix()
                (self._home / name).write_bytes(path.read_bytes())
                self._pushed[path] = state

    def close(self) -> None:
        """Pushes, and removes what was on this machine."""
        self.push()
        if self.path != self._home:
            self._scratch.cleanup()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lets one process at a time work in a folder, which is made; the others wait."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write_text(path: AnyPath, text: str) -> None:
    """Writes text, whole or not at all."""
    write_beside(path, lambda file: file.write(text))


def write_json(path: AnyPath, value: Any) -> None:
    """Writes JSON, whole or not at all."""
    write_beside(path, lambda file: json.dump(value, file, indent=1, allow_nan=False))


@contextmanager
def local_draft(path: AnyPath) -> Iterator[Path]:
    """Gives the name of a local file that becomes `path` when the block succeeds.

    For writers that know neither open files nor buckets.
    """
    if isinstance(path, Path):
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            yield part
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    else:
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder, path.name)
            yield part
            epath.Path(part).copy(path, overwrite=True)


@contextmanager
def local_draft_folder(path: AnyPath) -> Iterator[Path]:
    """Gives a local folder that becomes `path` when the block succeeds.

    In a bucket its files appear one after the other, in the order of their names.

    Raises:
      InputError: `path` is there already, or no folder can be there.
    """
    if path.exists():
        raise InputError(f"{path} is there already; give the name of a new folder.")
    if not isinstance(path, Path):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
            path.mkdir(parents=True, exist_ok=True)
            for file in sorted(Path(folder).iterdir()):
                (path / file.name).write_bytes(file.read_bytes())
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"{path} cannot be made ({error.strerror}); give a folder that can be "
            "written."
        ) from error
    try:
        yield part
        part.replace(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
