"""The collectives of a compiled program.

Comes after its text has been read; the compiler's own cost analysis leaves them out.
"""

import re
from dataclasses import dataclass

from jaxii.planner.hlo import Instruction, Module, arrays

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\])")


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: one of `KINDS`.
      num_bytes: of its result on one device.
      group_size: devices that take part in it together; 0 for all.
      in_loop: whether it stands inside of a loop.
      times: how often it runs in a step.
    """

    kind: str
    num_bytes: int
    group_size: int = 0
    in_loop: bool = False
    times: int = 1


def collectives(module: Module) -> tuple[Collective, ...]:
    """Returns the collectives of a program, in the order of its text."""
    found = []
    looped = module.looped()
    for name, instructions in module.computations.items():
        by_name = {one.name: one for one in instructions}
        for one in instructions:
            # Of an asynchronous one the end counts: its shape is the result's alone.
            kind = one.opcode.removesuffix("-done")
            if kind not in KINDS:
                continue
            start = one if kind == one.opcode else by_name[one.operands[0]]
            found.append(
                Collective(
                    kind=kind,
                    num_bytes=sum(array.num_bytes for array in arrays(one.shape)),
                    group_size=_group_size(start),
                    in_loop=name in looped,
                )
            )
    return tuple(found)


def _group_size(instruction: Instruction) -> int:
    match = _GROUPS.search(instruction.text)
    if match is None:
        return 0
    return int(match[2]) if match[2] else len(match[1].split(","))
