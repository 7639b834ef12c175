"""What a run is, in words and numbers: what trackers show beside its figures."""

from collections.abc import Mapping
from dataclasses import dataclass

RESULT_SPLITS = ("validation", "test")
"""Splits by whose F2 runs are compared."""


def result_name(split: str) -> str:
    """Returns the name of a split's F2 in the result.

    Not that of the evaluations while it trains: the result is the best checkpoint's.
    """
    return f"result/{split}/f2"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a run is.

    Attributes:
      name: of the run.
      settings: field of the configuration -> value, flat.
      about: what -> words for a person: data, provenance. Any text.
    """

    name: str
    settings: Mapping[str, str | float | bool]
    about: Mapping[str, str]
