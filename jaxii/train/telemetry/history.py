"""Reads `WORKDIR/history.jsonl`, which holds the metrics of each logged step."""

import json
import math
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from jaxii.storage import at

HISTORY = "history.jsonl"
RESUME = "resume"


# A line of the file: `kind`, `step`, and metrics by name.
Row = Mapping[str, Any]


def read_history(path: str | PathLike[str]) -> list[Row]:
    """Returns the rows of a history file by step; non-finite metrics are NaN.

    Skips rows that a killed run wrote after the step it was resumed from, earlier rows
    of the same (kind, step) and incomplete lines. A missing file has no rows.
    """
    path = at(path)
    rows: dict[tuple[str, int], Row] = {}
    if not path.exists():
        return []
    for line in path.read_bytes().decode(errors="replace").splitlines():
        row = _parse_row(line)
        if row is None:
            continue
        kind, step = row["kind"], row["step"]
        if kind == RESUME:
            rows = {key: kept for key, kept in rows.items() if key[1] <= step}
        else:
            rows[kind, step] = row
    return sorted(rows.values(), key=lambda row: row["step"])


def drop_partial_line(path: Path) -> bool:
    """Removes an incomplete last line; returns whether the file exists."""
    if not path.exists():
        return False
    with path.open("r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)
    return True


def _parse_row(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    if not isinstance(row, dict) or not {"kind", "step"} <= row.keys():
        return None
    return {key: math.nan if value is None else value for key, value in row.items()}
