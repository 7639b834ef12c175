"""What a run is, in words and numbers: what trackers show beside its figures."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Value = str | float | bool

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
    settings: Mapping[str, Value]
    about: Mapping[str, str]


def flat(fields: Mapping[str, Any], first: Sequence[str] = ()) -> dict[str, Value]:
    """Returns nested fields as `part.field` -> number, text or truth value.

    Args:
      fields: a configuration as JSON has it; of a list of parts with names, each goes
        by its name.
      first: fields that come first: pages that show a few show these.
    """
    values = dict(_leaves(fields, ""))
    names = [*(name for name in first if name in values), *values]
    return {name: values[name] for name in names}


def _leaves(fields: Mapping[str, Any], prefix: str):
    for key, value in fields.items():
        if isinstance(value, Mapping) and value and not prefix.count("."):
            yield from _leaves(value, f"{prefix}{key}.")
        elif isinstance(value, list) and all(
            isinstance(part, Mapping) and "name" in part for part in value
        ):
            yield prefix + key, ", ".join(part["name"] for part in value)
            for part in value:
                own = {name: part[name] for name in part if name != "name"}
                yield from _leaves(own, f"{prefix}{key}.{part['name']}.")
        else:
            plain = isinstance(value, str | int | float)
            yield prefix + key, value if plain else json.dumps(value)
