"""How configurations differ: the smallest parts that are not the same, and their text.

Before it: `runs` reads configurations. After it: `compare` shows what differs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxii.report.runs import as_text, is_list

ABSENT = "-"
MAX_VALUE = 60
"""A longer value loses its middle: both ends of a path or a schedule tell much."""
_ABSENT = object()


def differences(trees: Sequence[Any], prefix: str = "") -> dict[str, list[str]]:
    """Returns the fields in which configurations differ, with the text of each value.

    Args:
        trees: nested configurations.
        prefix: what every name starts with.

    Returns:
        For example `{"stages[0].terms.bce": ["1", "(0, 1), (0.4, 0)"]}`, in the order
        of the fields; `-` for what has no such field. A part that only some have, all
        of them the same, is one field.
    """
    if len({_text(tree) for tree in trees}) <= 1:
        return {}
    parts = _parts(trees, prefix)
    present = [tree for tree in trees if tree is not _ABSENT]
    is_whole = len(present) < len(trees) and len(set(map(_text, present))) == 1
    if is_whole or not parts:
        return {prefix: [shorten(_text(tree)) for tree in trees]}
    found: dict[str, list[str]] = {}
    for name, values in parts.items():
        found |= differences(values, name)
    return found


def shorten(text: str) -> str:
    """Returns a text of at most `MAX_VALUE` characters, cut in the middle."""
    if len(text) <= MAX_VALUE:
        return text
    tail = (MAX_VALUE - 1) // 3
    return f"{text[: MAX_VALUE - 1 - tail]}…{text[-tail:]}"


def _text(tree: Any) -> str:
    return ABSENT if tree is _ABSENT else as_text(tree)


def _is_list_of_mappings(tree: Any) -> bool:
    return is_list(tree) and len(tree) > 0 and all(isinstance(v, Mapping) for v in tree)


def _parts(trees: Sequence[Any], prefix: str) -> dict[str, list[Any]]:
    """Returns each tree's value of every field; nothing where one is a plain value."""
    present = [tree for tree in trees if tree is not _ABSENT]
    if all(isinstance(tree, Mapping) for tree in present):
        keys = dict.fromkeys(key for tree in present for key in tree)
        return {
            f"{prefix}.{key}" if prefix else str(key): [
                _ABSENT if tree is _ABSENT else tree.get(key, _ABSENT) for tree in trees
            ]
            for key in keys
        }
    if all(_is_list_of_mappings(tree) for tree in present):
        return {
            f"{prefix}[{i}]": [
                _ABSENT if tree is _ABSENT or i >= len(tree) else tree[i]
                for tree in trees
            ]
            for i in range(max(map(len, present)))
        }
    return {}
