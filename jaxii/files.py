"""Files that are written whole or not at all: beside their place, then renamed."""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_beside(
    path: Path, write: Callable[[Any], object], *, binary: bool = False
) -> None:
    """Writes a file under another name and renames it when it is complete.

    Args:
      path: where to; its folder is made, an older file replaced.
      write: is called with the open file.
      binary: whether it takes bytes and not text.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with (
            part.open("wb")
            if binary
            else part.open("w", newline="", encoding="utf-8") as file
        ):
            write(file)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


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


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, whole or not at all."""
    write_beside(path, lambda file: json.dump(value, file, indent=1, allow_nan=False))
