"""A comparison as text: a table for a terminal or a pipe, and one for a README.

Before it: `compare` made the cells. After it: a person reads them.
"""

import re

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from jaxii.report.compare import Comparison

TEXT_COLUMNS = ("worst slice", "provenance")
"""Columns among the figures that hold words."""


def as_table(comparison: Comparison) -> Table:
    """Returns the comparison as a rich table; no name is read as markup."""
    table = Table(box=box.SIMPLE_HEAD, caption_justify="left")
    table.caption = Text("\n".join(comparison.notes))
    for position, column in enumerate(comparison.columns):
        is_text = is_text_column(comparison, position)
        table.add_column(
            Text(column), justify="left" if is_text else "right", overflow="fold"
        )
    for row in comparison.rows:
        cells = [Text(cell) for cell in row]
        badge = cells[comparison.columns.index("provenance")]
        badge.stylize("green" if badge.plain == "clean" else "bold red")
        table.add_row(*cells)
    return table


def print_table(table: Table) -> None:
    """Prints a table; into a pipe or a file as plain text, as wide as it needs.

    Args:
        table: what `as_table` returned.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        needed = Measurement.get(console, console.options.update(width=10_000), table)
        console.width = max(needed.maximum, console.width)
    console.print(table)


def as_markdown(comparison: Comparison) -> str:
    """Returns the comparison as a table of GitHub's Markdown, the notes below it."""
    rules = [
        "---" if is_text_column(comparison, i) else "---:"
        for i in range(len(comparison.columns))
    ]
    rows = [
        [_escape(column) for column in comparison.columns],
        rules,
        *([_escape(cell) for cell in row] for row in comparison.rows),
    ]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", " ".join(map(_escape, comparison.notes))])


def is_text_column(comparison: Comparison, position: int) -> bool:
    """Says whether a column holds words, not figures."""
    is_setting = position < comparison.num_text_columns
    return is_setting or comparison.columns[position] in TEXT_COLUMNS


def _escape(text: str) -> str:
    escaped = re.sub(r"([\\|*<`])", r"\\\1", text)
    return escaped.replace("\n", "<br>")
