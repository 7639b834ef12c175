"""Numbers, names and configuration values as text.

An absent or non-finite number is a dash.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxii.data.prepared import SPLITS, WITHOUT_RECURRING

ABSENT = "–"
MAX_NAME = 20


def number_or_none(value: Any) -> float | None:
    """Returns a finite float, or None for anything else (absent, text, bool, NaN)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def number(value: Any, form: str = ".4f") -> str:
    """Returns a number formatted with the format spec `form`, or a dash."""
    known = number_or_none(value)
    return ABSENT if known is None else format(known, form)


def count(value: Any) -> str:
    """Returns a whole number with thousands separators, or a dash."""
    return number(value, ",.0f")


def short(value: Any) -> str:
    """Returns a number with two decimals, or a dash."""
    return number(value, ".2f")


def percent(value: Any) -> str:
    """Returns a share in [0, 1] as a percentage, or a dash."""
    return number(value, ".1%")


def interval(ends: Iterable[Any] | None) -> str:
    """Returns "0.100 to 0.200", or an empty string for None."""
    return " to ".join(number(end, ".3f") for end in ends or ())


def short_name(name: Any, longest: int = MAX_NAME) -> str:
    """Returns a name of at most `longest` characters, with its end cut off."""
    text = " ".join(str(name).split())
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def plain(split: str) -> str:
    """Returns the name of a split with spaces, or of a labelled set as it is."""
    is_split = split.removesuffix(WITHOUT_RECURRING) in SPLITS
    return split.replace("_", " ") if is_split else split


def as_text(value: Any) -> str:
    """Returns a configuration value as text, for example: 0.1, true, none, 1, 2, 3."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() else repr(value)
    if is_list(value):
        return ", ".join(map(_element_text, value)) or "empty"
    if isinstance(value, Mapping):
        pairs = (f"{k}: {_element_text(v)}" for k, v in value.items())
        return ", ".join(pairs) or "empty"
    return " ".join(str(value).split()) or "empty"


def _element_text(value: Any) -> str:
    nested = is_list(value) or isinstance(value, Mapping)
    return f"({as_text(value)})" if nested else as_text(value)


def is_list(value: Any) -> bool:
    """Returns whether a value is a sequence other than text."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
