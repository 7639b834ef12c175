"""The nearest of the names there are, for the message about one that is not there.

A leaf of the import graph, as `errors` is.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns "the nearest is X; " or "" where no name is near.

    Args:
      name: as it was given.
      names: those there are.
    """
    by_lower = {str(each).lower(): each for each in names}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f"the nearest is {by_lower[near[0]]}; " if near else ""


def nearest_path(path: Any) -> str:
    """Returns "the nearest is PATH." or "" where the path is there or none is near.

    Args:
      path: local, or an object in a bucket, which nothing is near.
    """
    if not isinstance(path, Path) or path.exists() or not path.parent.is_dir():
        return ""
    names = {each.name: each for each in path.parent.iterdir()}
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"the nearest is {path.parent / near[0]}." if near else ""
