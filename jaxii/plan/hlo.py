"""The collectives of a compiled program, read from its text.

Comes after the compiler, whose cost analysis does not count them.
"""

import math
import re
from dataclasses import dataclass, replace

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_KIND = "|".join(KINDS)
# Of an asynchronous collective the end counts: its shape is that of the result alone.
_COLLECTIVE = re.compile(rf"= (.+?) ({_KIND})(-done)?\(%?([\w.\-]*)")
_NAME = re.compile(r"(?:ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) .*\{$")
_ARRAY = re.compile(r"\b(pred|[a-z]+?(\d+)[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|body|condition|to_apply|_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\])")


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: one of `KINDS`.
      num_bytes: of its result on one device.
      group_size: devices that take part in it together; 0 for all.
      in_loop: whether it stands inside a loop.
      times: how often it runs in a step.
    """

    kind: str
    num_bytes: int
    group_size: int = 0
    in_loop: bool = False
    times: int = 1


def collectives(text: str) -> tuple[Collective, ...]:
    """Returns the collectives of an optimised HLO module, in the order of its text."""
    found: list[tuple[str, Collective]] = []
    calls: dict[str, set[str]] = {}
    bodies: set[str] = set()
    group_sizes: dict[str, int] = {}
    computation = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            computation = header[1]
            continue
        called = _called(line)
        calls.setdefault(computation, set()).update(called)
        if " while(" in line:
            bodies.update(called)
        if name := _NAME.match(line.strip()):
            group_sizes[name[1]] = _group_size(line)
        if match := _COLLECTIVE.search(line):
            shape, kind, done, started = match.groups()
            size = group_sizes.get(started, 0) if done else _group_size(line)
            one = Collective(kind=kind, num_bytes=_num_bytes(shape), group_size=size)
            found.append((computation, one))
    looped = _reachable(bodies, calls)
    return tuple(replace(one, in_loop=where in looped) for where, one in found)


def _called(line: str) -> set[str]:
    names = set(_CALLED.findall(line))
    for branches in _BRANCHES.findall(line):
        names.update(name.strip().lstrip("%") for name in branches.split(","))
    return names


def _reachable(first: set[str], calls: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    left = list(first)
    while left:
        name = left.pop()
        if name not in seen:
            seen.add(name)
            left += calls.get(name, ())
    return seen


def _group_size(line: str) -> int:
    match = _GROUPS.search(line)
    if match is None:
        return 0
    return int(match[2]) if match[2] else len(match[1].split(","))


def _num_bytes(shape: str) -> int:
    """Returns the bytes of an array or a tuple of them, without padding."""
    total = 0
    for dtype, bits, sides in _ARRAY.findall(shape):
        size = math.prod(int(side) for side in sides.split(",") if side)
        total += size * (8 if dtype == "pred" else int(bits)) // 8
    return total
