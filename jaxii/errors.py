"""Exceptions that the command line prints without a traceback, and spelling hints."""

import difflib
import traceback
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


def recipe_error(recipe: str, error: BaseException, *, flag: str = "") -> InputError:
    """Returns an InputError with a recipe's own error and its line in the recipe.

    Args:
      recipe: "FILE" or "FILE:PRESET".
      error: The error that the recipe raised.
      flag: The part of the command line before the recipe, for the message.
    """
    frames = list(traceback.extract_tb(error.__traceback__))
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
        frames += traceback.extract_tb(error.__traceback__)
    file = recipe.partition(":")[0]
    lines = [f"line {frame.lineno}" for frame in frames if frame.filename == file]
    text = str(error.args[0] if isinstance(error, KeyError) else error)
    if isinstance(error, LookupError) and not lines:
        return InputError(
            f"{flag}{recipe} lacks the stage or term of a flag --config.stages ({text})"
            "; add it to the recipe, or change the flag."
        )
    where = f" ({lines[-1]})" if lines else ""
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    # The message may already name the recipe.
    text = text.removeprefix(f"{recipe}; ")
    return InputError(f"{flag}{recipe}: {kind}{text}{where}")
