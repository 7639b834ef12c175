"""What a check says: lines to read, and what has to be mended before a run."""

from dataclasses import dataclass, field


class Unwell(Exception):
    """Something on this machine will not work; the message says how many things."""


@dataclass
class Finding:
    """The result of one check.

    Attributes:
      lines: facts, for a person.
      broken: what will not work, each with the way to mend it.
    """

    lines: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
