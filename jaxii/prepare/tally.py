"""Counts of what preparation read, kept and dropped, per file and split."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from jaxii.storage import AnyPath, write_json

NUM_EXAMPLES = 5


@dataclass(frozen=True)
class Tally:
    """Counts of one file or split; `read` is `kept` plus all of `dropped`.

    Attributes:
      name: Name of the file or split.
      unit: What is counted: "rows", "images" or "labels".
      dropped: Number left out by reason.
      examples: The first few items per reason or note.
      notes: Further counts, such as labels kept.
    """

    name: str
    unit: str
    read: int
    kept: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    examples: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: Mapping[str, int] = field(default_factory=dict)

    def line(self) -> str:
        """Returns the counts as one line of text."""
        parts = [f"{self.name}: {self.read:,} {self.unit} read, {self.kept:,} kept"]
        for reason, number in self.dropped.items():
            if number:
                parts.append(f"{number:,} {reason}{self._shown(reason)}")
        parts += [
            f"{what} {number:,}{self._shown(what)}"
            for what, number in self.notes.items()
        ]
        return "; ".join(parts)

    def with_note(
        self, what: str, number: int, examples: Iterable[str] = ()
    ) -> "Tally":
        """Returns the counts with a note and a few examples, unless `number` is 0."""
        if not number:
            return self
        examples = few(examples)
        return replace(
            self,
            notes={**self.notes, what: number},
            examples={**self.examples, **({what: examples} if examples else {})},
        )

    def _shown(self, reason: str) -> str:
        examples = ", ".join(self.examples.get(reason, ()))
        return f" ({examples})" if examples else ""


@dataclass(frozen=True)
class Counts:
    """Counts of label and metadata files, and of the images of splits."""

    files: tuple[Tally, ...]
    splits: tuple[Tally, ...]

    def lines(self) -> list[str]:
        """Returns the counts as lines of text, files first."""
        return [tally.line() for tally in (*self.files, *self.splits)]

    def split(self, name: str) -> Tally:
        """Returns the tally of a split; raises KeyError if there is none."""
        return {tally.name: tally for tally in self.splits}[name]

    def file(self, name: str) -> Tally:
        """Returns the tally of a file by its name; raises KeyError if there is none."""
        return {tally.name: tally for tally in self.files}[name]

    def save(self, path: AnyPath) -> None:
        """Writes the counts as JSON, atomically."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: AnyPath) -> "Counts":
        """Reads a file that `save` wrote."""
        stored = json.loads(path.read_text())
        return cls(_tallies(stored["files"]), _tallies(stored["splits"]))


def few(names: Iterable[str]) -> tuple[str, ...]:
    """Returns the first few names."""
    return tuple(name for name, _ in zip(names, range(NUM_EXAMPLES), strict=False))


def _tallies(stored: Sequence[Mapping[str, Any]]) -> tuple[Tally, ...]:
    return tuple(
        Tally(**{**t, "examples": {k: tuple(v) for k, v in t["examples"].items()}})
        for t in stored
    )
