"""The nearest of the names there are, for the message about one that is not there."""

import difflib
from collections.abc import Iterable


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns "did you mean X? " or "" where no name is near.

    Args:
      name: as it was given.
      names: those there are.
    """
    by_lower = {each.lower(): each for each in names}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f"did you mean {by_lower[near[0]]}? " if near else ""
