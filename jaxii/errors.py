"""Exceptions that the command line prints without a traceback, and spelling hints."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class InputError(Exception):
    """A file, flag or config value that cannot be used; exit code 2.

    The message is one line: what was given, what is allowed, and the fix. The command
    line prints it without a traceback and exits with 2; any other exception is a bug.
    """


class CheckFailed(Exception):
    """A check of this machine failed; exit code 1."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns "the nearest is X; ", or "" if no name is near.

    Args:
      name: The name that was given, in any case.
      names: The names that exist.
    """
    by_lower = {str(each).lower(): each for each in names}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f"the nearest is {by_lower[near[0]]}; " if near else ""


def nearest_path(path: Any) -> str:
    """Returns "the nearest is PATH.", or "" if the path exists or none is near.

    Args:
      path: A local path; a path in a bucket has no near ones.
    """
    if not isinstance(path, Path) or path.exists() or not path.parent.is_dir():
        return ""
    names = {each.name: each for each in path.parent.iterdir()}
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"the nearest is {path.parent / near[0]}." if near else ""
