"""Paths on disks and in buckets (gs://, with the extra `gcs`), and atomic writes."""

import contextlib
import errno
import fcntl
import json
import os
import platform
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import fsspec
from etils import epath

from jaxii.errors import InputError

AnyPath = Path | epath.Path
# Lock file in a folder that a process holds.
LOCK = ".lock"
_BEGUN = datetime.now(UTC).isoformat(" ", "seconds")
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def user_cache() -> Path:
    """Returns jaxii's folder in the user's cache; it need not exist.

    Raises:
      InputError: If neither XDG_CACHE_HOME nor the user's home folder is known.
    """
    named = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification ignores relative paths.
    if Path(named).is_absolute():
        return Path(named, "jaxii")
    try:
        return Path.home() / ".cache" / "jaxii"
    except RuntimeError as error:
        raise InputError(
            "the user has no home folder, and HOME and XDG_CACHE_HOME are not set; set "
            "XDG_CACHE_HOME to the absolute path of a folder for cached files."
        ) from error


def at(path: str | os.PathLike[str]) -> AnyPath:
    """Returns a local path, or for gs:// a path in a bucket, which needs gcsfs."""
    text = os.fspath(path)
    if "://" not in text:
        return Path(path)
    if not text.startswith("gs://"):
        raise InputError(
            f"{text} is neither a local path nor a gs:// path; use one of these."
        )
    try:
        import gcsfs  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            f"{text} requires gcsfs ({error}); run pip install 'jaxii[gcs]'."
        ) from error
    return epath.Path(path)


def size_of(path: AnyPath) -> int:
    """Returns the size of a file in bytes."""
    return path.stat().st_size if isinstance(path, Path) else path.stat().length


def names_in(folder: AnyPath) -> set[str]:
    """Returns the current names in a folder; empty for a prefix without objects.

    Cost: one listing; checking files of a bucket one by one is a request per file.
    """
    if isinstance(folder, Path):
        return {path.name for path in folder.iterdir()}
    system, root = fsspec.url_to_fs(os.fspath(folder))
    system.invalidate_cache()  # other processes may have written
    try:
        return {name.rpartition("/")[2] for name in system.ls(root, detail=False)}
    except FileNotFoundError:
        return set()


def sizes_below(folder: AnyPath) -> dict[str, int]:
    """Returns relative name -> bytes of each file below a folder; {} if it is missing.

    Cost: one listing.
    """
    if isinstance(folder, Path):
        root, found = os.fspath(folder), {}
        for directory, _, names in os.walk(root):
            for name in names:
                path = os.path.join(directory, name)  # noqa: PTH118 (text, and fast)
                with contextlib.suppress(OSError):  # deleted by now, or a dangling link
                    found[os.path.relpath(path, root)] = os.stat(path).st_size  # noqa: PTH116
        return found
    system, root = fsspec.url_to_fs(os.fspath(folder))
    system.invalidate_cache()  # other processes may have written
    found = system.find(root, detail=True)
    return {name[len(root) + 1 :]: int(facts["size"]) for name, facts in found.items()}


def check_writable(path: AnyPath) -> None:
    """Checks, before its content is computed, that a file can be written.

    Creates the folder of the file.

    Raises:
      InputError: If the folder cannot be created or is read-only.
    """
    reason = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = str(error.strerror)
    if isinstance(path, Path) and not os.access(path.parent, os.W_OK):
        reason = reason or "its folder is read-only"
    if reason:
        raise InputError(
            f"{path} cannot be written ({reason}); use a path in a writable folder."
        )


def write_beside(
    path: AnyPath, write: Callable[[Any], object], *, binary: bool = False
) -> None:
    """Writes a file atomically.

    Args:
      path: The file. Its folder is created and an existing file is replaced.
      write: Called with the open file.
      binary: Whether the file takes bytes rather than text.
    """
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
    mode, encoding, newline = ("wb", None, None) if binary else ("w", "utf-8", "")
    with (
        local_draft(path) as draft,
        draft.open(mode, encoding=encoding, newline=newline) as file,
    ):
        write(file)


class Mirror:
    """The local folder `path`, for files that are appended to.

    If `home` is on a disk, `path` is `home`, which is created. Objects in a bucket
    cannot be appended to: `path` is then a temporary folder, and `push` uploads its
    changed files. Writes after the last `push` are lost if the process dies.
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
        """Returns the local path of a file; downloads it if the bucket has it."""
        if self.path != self._home and (self._home / name).exists():
            (self.path / name).write_bytes((self._home / name).read_bytes())
        return self.path / name

    def push(self) -> None:
        """Uploads the files that changed since the last push."""
        if self.path == self._home:
            return
        for path in sorted(self.path.rglob("*")):
            state = path.stat().st_size, path.stat().st_mtime_ns
            if path.is_file() and self._pushed.get(path) != state:
                name = path.relative_to(self.path).as_posix()
                (self._home / name).write_bytes(path.read_bytes())
                self._pushed[path] = state

    def close(self, *, push: bool = True) -> None:
        """Pushes unless told otherwise, and removes the temporary folder."""
        if push:
            self.push()
        if self.path != self._home:
            self._scratch.cleanup()


@contextmanager
def locked(folder: AnyPath) -> Iterator[None]:
    """Holds an exclusive lock on a folder, which is created; other processes wait.

    There is no lock in buckets and on file systems that cannot lock folders (NFS).
    """
    if not isinstance(folder, Path):
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def held(folder: AnyPath) -> Iterator[None]:
    """Holds a folder, which is created, for one process.

    On a disk, other processes get an error. The operating system locks the file `LOCK`
    until the process ends, even if it is killed. NFS shares the lock between hosts; on
    file systems without locks, no process gets an error.

    Buckets have no such locks: the process that starts last takes the folder over, and
    `check_held` raises an error in the earlier process.

    Raises:
      InputError: If another process holds the folder, or it cannot be written.
    """
    if not isinstance(folder, Path):
        (folder / LOCK).write_text(_holder())
        try:
            yield
        finally:
            if _read_lock(folder) == _holder():
                (folder / LOCK).unlink()
        return
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with contextlib.closing(_hold(folder)) as file:
            try:
                with named(folder / LOCK):
                    # Unbuffered, or closing would write again to a full disk.
                    os.write(file.fileno(), _holder().encode())
                yield
            finally:
                # Removed before unlocking, or it might be the file of the next process.
                (folder / LOCK).unlink(missing_ok=True)
    finally:
        with contextlib.suppress(OSError):  # something was written
            for path in new:
                path.rmdir()


def is_held(folder: AnyPath) -> bool:
    """Returns whether this process still holds a folder that it has `held`.

    Always true on a disk, where no other process can take the folder over.
    Cost: in a bucket, one small read.
    """
    return isinstance(folder, Path) or _read_lock(folder) == _holder()


def check_held(folder: AnyPath) -> None:
    """Checks that this process still holds a folder that it has `held`.

    Cost: in a bucket, one small read.

    Raises:
      InputError: If the folder is in a bucket and another process has taken it over.
    """
    if not is_held(folder):
        holder = _read_lock(folder)
        raise InputError(
            f"{folder} was taken over by {holder or 'a process that has ended'}; in a "
            "bucket, the process that starts last keeps the folder. Use another folder "
            "for one of the two."
        )


def _holder() -> str:
    return f"process {os.getpid()} on {platform.node()} since {_BEGUN}"


def _read_lock(folder: AnyPath) -> str:
    """Returns the text of a bucket folder's lock object; "" if there is none."""
    system, path = fsspec.url_to_fs(os.fspath(folder / LOCK))
    try:
        # Not cached: other processes may have written.
        return system.cat_file(path).decode(errors="replace")
    except FileNotFoundError:
        return ""


def _hold(folder: Path) -> TextIO:
    """Returns the locked, empty file of a folder."""
    path = folder / LOCK
    try:
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            file = path.open("a+", encoding="utf-8", errors="replace")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read(200) or "another process"
                file.close()
                raise InputError(
                    f"{folder} is in use by {holder}; wait until it ends, stop it, or "
                    "use another folder."
                ) from None
            except OSError:  # a file system without locks
                pass
            # The last holder may have removed the file after it was opened here.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    break
            file.close()
        file.truncate(0)
        return file
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            raise
        raise InputError(
            f"{folder} cannot be written ({error.strerror}); use a writable folder."
        ) from error


def write_text(path: AnyPath, text: str) -> None:
    """Writes text atomically."""
    write_beside(path, lambda file: file.write(text))


def write_json(path: AnyPath, value: Any) -> None:
    """Writes JSON atomically."""
    write_beside(path, lambda file: json.dump(value, file, indent=1, allow_nan=False))


@contextmanager
def named(path: str | os.PathLike[str], draft: Path | None = None) -> Iterator[None]:
    """Adds `path` to disk errors, as of a full disk, that name no file or `draft`."""
    try:
        yield
    except Exception as error:
        # Polars and ArrayRecord raise errors of their own with the system's text.
        quoted = (code for code in _DISK_ERRORS if os.strerror(code) in str(error))
        code = getattr(error, "errno", None) or next(quoted, None)
        if code is None or getattr(error, "filename", None) not in (None, str(draft)):
            raise
        raise OSError(code, os.strerror(code), os.fspath(path)) from error


def _draft_of(path: Path) -> Path:
    """Returns a new name beside `path`.

    The name is random, because processes of two containers may have equal numbers.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


def is_leftover(name: str) -> bool:
    """Returns whether a name is of a lock or a draft, which a killed process leaves."""
    return name == LOCK or (name.startswith(".") and name.endswith(".part"))


@contextmanager
def local_draft(path: AnyPath) -> Iterator[Path]:
    """Yields the path of a local file that becomes `path` when the block succeeds."""
    if isinstance(path, Path):
        part = _draft_of(path)
        try:
            with named(path, part):
                yield part
                part.replace(path)
        finally:
            with contextlib.suppress(OSError):  # a read-only disk
                part.unlink(missing_ok=True)
    else:
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder, path.name)
            yield part
            epath.Path(part).copy(path, overwrite=True)


@contextmanager
def local_draft_folder(path: AnyPath) -> Iterator[Path]:
    """Yields a local folder that becomes `path` when the block succeeds.

    In a bucket the files appear one by one, in the order of their names.

    Raises:
      InputError: If `path` exists or cannot be created.
    """
    if path.exists():
        raise InputError(f"{path} already exists; use the name of a new folder.")
    if not isinstance(path, Path):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
            path.mkdir(parents=True, exist_ok=True)
            for file in sorted(Path(folder).iterdir()):
                (path / file.name).write_bytes(file.read_bytes())
        return
    part = _draft_of(path)
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"{path} cannot be created ({error.strerror}); use a writable folder."
        ) from error
    try:
        with named(path):
            yield part
            part.replace(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
