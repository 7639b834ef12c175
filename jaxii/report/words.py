"""Numbers as a person reads them; a dash for what is absent or not finite.

Before it: `runs` reads numbers. After it: the pages place their text.
"""

from collections.abc import Iterable
from typing import Any

from jaxii.report.runs import number_or_none

ABSENT = "–"


def number(value: Any, form: str = ".4f") -> str:
    """Returns a number as text, or a dash for what is absent or not finite."""
    known = number_or_none(value)
    return ABSENT if known is None else format(known, form)


def count(value: Any) -> str:
    """Returns a whole number with separators, or a dash."""
    return number(value, ",.0f")


def short(value: Any) -> str:
    """Returns a number to two decimals, or a dash."""
    return number(value, ".2f")


def interval(ends: Iterable[Any] | None) -> str:
    """Returns the two ends of an interval, or nothing for none."""
    return " to ".join(number(end, ".3f") for end in ends or ())


def percent(value: Any) -> str:
    """Returns a share in [0, 1] as a percentage, or a dash."""
    return number(value, ".1%")
