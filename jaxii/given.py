"""Paths that a command line gives, and those that it cannot mean.

Comes before `arguments`, which says what of them each command takes.
"""

from pathlib import Path

from jaxii.errors import InputError
from jaxii.files import AnyPath, at
from jaxii.nearest import nearest_path


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
        f"{name}={path} is in a bucket, and every picture is looked at; mount it, or "
        "copy it to this machine."
    )
