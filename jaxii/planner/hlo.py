"""Reads collectives and memory traffic from the HLO text of a compiled program.

XLA's own cost analysis leaves out collectives, and its "bytes accessed" includes
transfers within the chip, which do not belong in a bound on time.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+?(\d+)[a-z0-9]*)\[([\d,]*)\]((?:\{[^}]*\})?)")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|body|condition|to_apply|_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\])")
# Opcodes that touch no memory themselves, or whose cost is counted elsewhere.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
    *("after-all", "partition-id", "replica-id", "while", "conditional", "call"),
}
# Opcodes that read only as much of their operand as they return -> index of the result
# in their shape.
_MOVES = {"slice": 0, "dynamic-slice": 0, "copy-start": 0, "slice-start": 1}
_CONTROL = ("while", "conditional", "call", "async-start")


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One HLO instruction; `text` is everything after the opcode."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    text: str

    def called(self) -> set[str]:
        """Returns the names of the computations that this instruction refers to."""
        names = set(_CALLED.findall(self.text))
        for branches in _BRANCHES.findall(self.text):
            names.update(name.strip().lstrip("%") for name in branches.split(","))
        return names


@dataclass(frozen=True, kw_only=True)
class Module:
    """An HLO module: instructions by computation, in execution order."""

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str

    def reachable(self, first: Iterable[str], opcodes: Iterable[str] = ()) -> set[str]:
        """Returns `first` and all computations called from it.

        Follows only calls by `opcodes`, or all calls if `opcodes` is empty.
        """
        seen: set[str] = set()
        left = list(first)
        while left:
            name = left.pop()
            if name in seen:
                continue
            seen.add(name)
            for one in self.computations.get(name, ()):
                if not opcodes or one.opcode in opcodes:
                    left += one.called()
        return seen

    def looped(self) -> set[str]:
        """Returns the computations that run inside a loop."""
        bodies = [
            name
            for instructions in self.computations.values()
            for one in instructions
            if one.opcode == "while"
            for name in one.called()
        ]
        return self.reachable(bodies)


def parse(text: str) -> Module:
    """Parses the text of an optimized HLO module."""
    computations: dict[str, list[Instruction]] = {}
    instructions: list[Instruction] = []
    entry = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            instructions = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif match := _INSTRUCTION.match(line):
            name, shape, opcode, rest = match.groups()
            operands = tuple(_OPERAND.findall(rest.partition(")")[0]))
            instructions.append(
                Instruction(
                    name=name, shape=shape, opcode=opcode, operands=operands, text=rest
                )
            )
    return Module(
        computations={name: tuple(found) for name, found in computations.items()},
        entry=entry,
    )


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: One of `KINDS`.
      num_bytes: Size of its result on one device.
      group_size: Number of devices that take part; 0 for all.
      times: Number of executions per step.
    """

    kind: str
    num_bytes: int
    group_size: int = 0
    times: int = 1


def collectives(module: Module, loop_runs: int = 1) -> tuple[Collective, ...]:
    """Returns the collectives of a program, in the order of its text.

    Args:
      module: The program.
      loop_runs: Number of executions of a loop's body.
    """
    found = []
    looped = module.looped()
    for name, instructions in module.computations.items():
        by_name = {one.name: one for one in instructions}
        for one in instructions:
            # Asynchronous collectives are counted at their "-done" instruction, whose
            # shape is that of the result alone.
            kind = one.opcode.removesuffix("-done")
            if kind not in KINDS:
                continue
            start = one if kind == one.opcode else by_name[one.operands[0]]
            groups = _GROUPS.search(start.text)
            members, size = groups.groups() if groups else (None, "0")
            found.append(
                Collective(
                    kind=kind,
                    num_bytes=sum(num_bytes for num_bytes, _ in _arrays(one.shape)),
                    group_size=len(members.split(",")) if members else int(size),
                    times=loop_runs if name in looped else 1,
                )
            )
    return tuple(found)


def memory_bytes(module: Module, loop_runs: int = 1) -> float:
    """Returns the bytes read from and written to a device's memory.

    Every operand and result outside on-chip memory counts once. A fusion is assumed to
    read its operands completely.

    Args:
      module: The program.
      loop_runs: Number of executions of a loop's body.
    """
    shapes = {
        one.name: one.shape
        for instructions in module.computations.values()
        for one in instructions
    }
    looped = module.looped()
    total = 0.0
    for name in module.reachable([module.entry], _CONTROL):
        runs = loop_runs if name in looped else 1
        for one in module.computations.get(name, ()):
            total += runs * _moved_bytes(one, shapes)
    return total


def _moved_bytes(one: Instruction, shapes: Mapping[str, str]) -> int:
    if one.opcode in _FREE or one.opcode.endswith("-done"):
        return 0
    if one.opcode == "async-start" or 'custom_call_target="ConcatBitcast"' in one.text:
        return 0
    operands = [
        array
        for operand in dict.fromkeys(one.operands)
        for array in _arrays(shapes.get(operand, ""))
    ]
    results = _arrays(one.shape)
    if one.opcode in _MOVES and operands:
        num_bytes, on_chip = results[_MOVES[one.opcode]]
        return num_bytes * sum(not side for side in (operands[0][1], on_chip))
    return sum(num_bytes for num_bytes, on_chip in operands + results if not on_chip)


def _arrays(shape: str) -> list[tuple[int, bool]]:
    """Returns (bytes without padding, whether in on-chip memory) of each array."""
    found = []
    for dtype, bits, sides, layout in _ARRAY.findall(shape):
        size = math.prod(int(side) for side in sides.split(",") if side)
        num_bytes = size * (8 if dtype == "pred" else int(bits)) // 8
        # S(...) marks on-chip memory, such as a TPU's VMEM.
        found.append((num_bytes, "S(" in layout))
    return found
