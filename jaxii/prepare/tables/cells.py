"""The labels in the cells of a column: one, several with something between, or JSON.

Whether "red fox" is one label or two no cell can say. The rule, over all cells: they
are lists where nearly every part is in two different cells or more, where splitting
leaves at most half as many labels as different cells, or where most images have a
cell of their own: nobody could learn those. --label_separator overrules it.
"""

import ast
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from jaxii.errors import InputError
from jaxii.prepare.tables.notes import Notes, shown

SEPARATORS = {"|": "a bar", ";": "a semicolon", ",": "a comma", " ": "spaces"}
# What --label_separator may be.
CHOICES = ("", "none", "|", ";", ",", "space", "json")
SEVERAL_SHARE = 0.9
JSON_SHARE = 0.9
_SIDE_BY_SIDE = re.compile(r"""(['"])\s+(?=['"])""")


def labels_of(
    cells: Sequence[str], *, row_a_label: bool, separator: str, notes: Notes
) -> list[list[str]]:
    """Returns the labels of each cell, as they are written.

    Args:
      cells: text.
      row_a_label: whether images have several rows, with other labels in each.
      separator: one of `CHOICES`; "" finds it out.
      notes: are told which it is.

    Raises:
      InputError: cells that are no JSON lists and should be.
    """
    counts = Counter(clean(cell) for cell in cells if cell)
    chosen = separator or _choose(counts, row_a_label)
    why = "as was said" if separator else _REASONS.get(chosen, _REASON_LISTS)
    if chosen == "json":
        notes.assumed(f"a cell is a list of labels in JSON ({why})")
        return _json_lists(cells, notes)
    if chosen == "none":
        layout = "one label a row" if row_a_label else "one label an image"
        notes.assumed(f"a cell is one label, {layout} ({why}; --label_separator)")
        _mind_separators(counts, notes)
        return [[cell] if cell else [] for cell in cells]
    between = " " if chosen == "space" else chosen
    notes.assumed(
        f"a cell is a list of labels with {SEPARATORS[between]} between them ({why}; "
        "--label_separator=none if a cell is one label)"
    )
    # Any white space; split() drops empty parts.
    return [cell.split(None if between == " " else between) for cell in cells]


_REASON_LISTS = (
    "nearly every part is in several cells, or splitting halves the number of labels, "
    "or most images would have a label of their own"
)
_REASONS = {
    "none": "what splitting would leave is mostly in one cell only",
    "json": "cells start with [ and end with ]",
}


def clean(label: str) -> str:
    """Returns a label with composed letters and single spaces, none around it."""
    return " ".join(unicodedata.normalize("NFC", label).split())


def _choose(counts: Counter[str], row_a_label: bool) -> str:
    lists = sum(c.startswith("[") and c.endswith("]") for c in counts)
    if counts and lists >= JSON_SHARE * len(counts):
        return "json"
    own = not row_a_label and 2 * len(counts) > counts.total()
    for separator in SEPARATORS:
        # With a row a label, spaces are part of it.
        if separator == " " and row_a_label:
            continue
        in_most = 2 * sum(separator in cell for cell in counts) > len(counts)
        # Not spaces: those would be captions.
        crowded = own and in_most and separator != " "
        if crowded or _is_between(separator, counts):
            return "space" if separator == " " else separator
    return "none"


def _is_between(separator: str, counts: Counter[str]) -> bool:
    lists = [cell for cell in counts if separator in cell]
    parts = Counter(
        part for cell in lists for part in set(map(str.strip, cell.split(separator)))
    )
    del parts[""]
    if not parts:
        return False
    alone = {cell.strip() for cell in counts if separator not in cell}
    several = sum(n for part, n in parts.items() if n > 1 or part in alone)
    share = several / parts.total()
    return share >= SEVERAL_SHARE or 2 * len(alone | parts.keys()) <= len(counts)


def _mind_separators(counts: Counter[str], notes: Notes) -> None:
    for separator, name in SEPARATORS.items():
        has = [cell for cell in counts if separator in cell]
        if has and separator != " ":
            notes.mind(f"{len(has):,} labels have {name} in them: {shown(has)}")


def _json_lists(cells: Sequence[str], notes: Notes) -> list[list[str]]:
    lists, wrong = [], []
    for cell in cells:
        try:
            lists.append(_parse(cell) if cell else [])
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            wrong.append(cell)
            lists.append([])
    if wrong and len(wrong) == sum(bool(cell) for cell in cells):
        raise InputError(
            f"no cell is a JSON list of labels, such as {wrong[0][:60]!r}; give "
            "another --label_separator."
        )
    notes.left_out("rows whose cell is no list of labels", wrong)
    return lists


def _parse(cell: str) -> list[str]:
    try:
        value = json.loads(cell)
    except ValueError:
        # As pandas writes lists: quotes of Python's. NumPy's arrays have no commas
        # between words, which Python would join.
        value = ast.literal_eval(_SIDE_BY_SIDE.sub(r"\1, ", cell))
    if not isinstance(value, list):
        raise ValueError(cell)
    return [
        item if isinstance(item, str) else json.dumps(item)
        for item in value
        if item is not None
    ]
