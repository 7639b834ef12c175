"""Rows of measured figures, each with its bar."""

import dataclasses
import json
import operator
import os
from pathlib import Path

# Names the file that rows are appended to while `python -m tests.benchmarks` runs.
ROWS_FILE = "JAXII_BENCHMARK_ROWS"
HEADS = ("what", "jaxii", "peer", "figure", "bar", "")
COMPARE = {"<=": operator.le, ">=": operator.ge}


@dataclasses.dataclass(frozen=True)
class Row:
    """A measured figure.

    Attributes:
      what: What is measured, and on what.
      ours: What jaxii took, with its unit.
      peer: The peer and what it took; "" if the bar is absolute.
      figure: The number compared with the bar, usually a ratio of `ours` and `peer`.
      relation: "<=" or ">=".
      bar: The number that `figure` is compared with.
      unit: Unit of the figure and the bar; "" for a ratio.
    """

    what: str
    ours: str
    peer: str
    figure: float
    relation: str
    bar: float
    unit: str = ""

    @property
    def is_met(self) -> bool:
        return bool(COMPARE[self.relation](self.figure, self.bar))

    def cells(self) -> tuple[str, ...]:
        unit = f" {self.unit}" if self.unit else ""
        return (
            self.what,
            self.ours,
            self.peer,
            f"{self.figure:.3g}{unit}",
            f"{self.relation} {self.bar:g}{unit}",
            "met" if self.is_met else "NOT MET",
        )


def emit(*rows: Row) -> None:
    """Prints rows, and passes them to `python -m tests.benchmarks` if it is running."""
    for row in rows:
        print(" | ".join(cell for cell in row.cells() if cell), flush=True)
    path = os.environ.get(ROWS_FILE)
    if path:
        with Path(path).open("a") as file:
            file.writelines(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows)


def read(path: Path) -> list[Row]:
    """Returns the rows that were passed on."""
    if not path.exists():
        return []
    return [Row(**json.loads(line)) for line in path.read_text().splitlines()]


def markdown(rows: list[Row]) -> str:
    """Returns the rows as a table."""
    cells = [HEADS, ("---",) * len(HEADS), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n"
