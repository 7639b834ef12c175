"""Bytes that a compiled program moves between a device and its memory.

Comes after its text has been read. The compiler's own count, "bytes accessed", adds
what moves within the chip, which a bound on time must not.
"""

from jaxii.planner.hlo import Instruction, Module, arrays

# What names memory without touching it, or has been counted where it started.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
    *("after-all", "partition-id", "replica-id", "while", "conditional", "call"),
}
# What reads no more of its operand than it gives; where the result stands in its shape.
_MOVES = {"slice": 0, "dynamic-slice": 0, "copy-start": 0, "slice-start": 1}
_CONTROL = ("while", "conditional", "call", "async-start")


def memory_bytes(module: Module, loop_runs: int = 1) -> float:
    """Returns the bytes read from a device's memory and written to it.

    Every operand and result that does not lie in a memory of the chip's own counts
    once: a fusion is taken to read what it is given whole.

    Args:
      module: the program.
      loop_runs: how often a loop's body runs.
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
            total += runs * _moved(one, shapes)
    return total


def _moved(one: Instruction, shapes: dict[str, str]) -> int:
    if one.opcode in _FREE or one.opcode.endswith("-done"):
        return 0
    if one.opcode == "async-start" or 'custom_call_target="ConcatBitcast"' in one.text:
        return 0
    operands = [
        array
        for operand in dict.fromkeys(one.operands)
        for array in arrays(shapes.get(operand, ""))
    ]
    results = arrays(one.shape)
    if one.opcode in _MOVES and operands:
        result = results[_MOVES[one.opcode]]
        sides = (operands[0], result)
        return result.num_bytes * sum(not side.on_chip for side in sides)
    return sum(array.num_bytes for array in operands + results if not array.on_chip)
