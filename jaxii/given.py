"""What flags give as text, and what of it cannot be meant.

Comes before `arguments`, which says what of them each command takes.
"""

import re
from pathlib import Path

from jaxii.errors import InputError, nearest_path
from jaxii.storage import AnyPath, at


def required(name: str, value: str) -> AnyPath:
    """Returns the path that a flag gives.

    Raises:
      InputError: it was not given.
    """
    if not value:
        raise InputError(f"--{name} is missing; see --help of the command.")
    return at(value)


def existing(name: str, value: str) -> AnyPath:
    """Returns a path; refuses one that is not there where another one nearly is.

    What does not exist and is near nothing is refused by whatever reads it.

    Raises:
      InputError: it was not given, or mistyped.
    """
    path = required(name, value)
    near = nearest_path(path)
    if near:
        raise InputError(f"--{name}={value} does not exist; {near}")
    return path


def local(name: str, path: AnyPath) -> Path:
    """Returns a path on this machine.

    Raises:
      InputError: it is in a bucket.
    """
    if isinstance(path, Path):
        return path
    raise InputError(
        f"{name}={path} is in a bucket, and every image is looked at; mount it, or "
        "copy it to this machine."
    )


def file_to_write(name: str, value: str, kind: str) -> AnyPath | None:
    """Returns the path of a file to write; None where none was given.

    Raises:
      InputError: it is a folder.
    """
    path = at(value) if value else None
    if path is not None and path.is_dir():
        raise InputError(
            f"--{name}={path} is a folder; give the name of a file for the {kind}."
        )
    return path


def profile_steps(text: str) -> tuple[int, int]:
    """Returns the steps after which a trace starts and ends; equal ones for none.

    Raises:
      InputError: it is not FIRST:LAST.
    """
    if not text:
        return 0, 0
    # No sign, and none of the other digits of Unicode.
    found = re.fullmatch(r"([0-9]+):([0-9]+)", text)
    if found and int(found[1]) < int(found[2]):
        return int(found[1]), int(found[2])
    raise InputError(
        f"--profile_steps={text} is not FIRST:LAST with FIRST below LAST; 100:105 "
        "traces the five updates after step 100."
    )
