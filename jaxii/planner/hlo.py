"""A compiled program's text as computations of instructions.

Comes after the compiler; `collectives` and `traffic` count what is in it.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+?(\d+)[a-z0-9]*)\[([\d,]*)\]((?:\{[^}]*\})?)")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|body|condition|to_apply|_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One instruction.

    Attributes:
      name: unique in the module.
      shape: of the result, as it is written.
      opcode: what it does.
      operands: names of the instructions it works on.
      text: what follows the opcode.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    text: str

    def called(self) -> set[str]:
        """Returns the computations it names."""
        names = set(_CALLED.findall(self.text))
        for branches in _BRANCHES.findall(self.text):
            names.update(name.strip().lstrip("%") for name in branches.split(","))
        return names


@dataclass(frozen=True, kw_only=True)
class Module:
    """A program.

    Attributes:
      computations: instructions by the name of their computation, in running order.
      entry: the computation that is the program.
    """

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str

    def reachable(self, first: Iterable[str], opcodes: Iterable[str] = ()) -> set[str]:
        """Returns computations and those they call, by these opcodes or, none, any."""
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
        """Returns the computations inside of loops."""
        bodies = [
            name
            for instructions in self.computations.values()
            for one in instructions
            if one.opcode == "while"
            for name in one.called()
        ]
        return self.reachable(bodies)


def parse(text: str) -> Module:
    """Reads the text of an optimised HLO module."""
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
class ArrayShape:
    """An array of a result.

    Attributes:
      num_bytes: without padding.
      on_chip: whether it lies in a memory of the chip's own, as in a TPU's VMEM.
    """

    num_bytes: int
    on_chip: bool


def arrays(shape: str) -> list[ArrayShape]:
    """Returns the arrays that a shape, perhaps a tuple, consists of."""
    found = []
    for dtype, bits, sides, layout in _ARRAY.findall(shape):
        size = math.prod(int(side) for side in sides.split(",") if side)
        num_bytes = size * (8 if dtype == "pred" else int(bits)) // 8
        found.append(ArrayShape(num_bytes=num_bytes, on_chip="S(" in layout))
    return found
