"""Slices and labels of several runs side by side, for the page of a comparison.

Before it: `runs` read the figures and `seeds` made the rows. After it:
`comparison_page` places the tables.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxii.report import label_table
from jaxii.report.label_table import Column
from jaxii.report.panels import short_name
from jaxii.report.runs import split_names
from jaxii.report.seeds import Entry, estimate
from jaxii.report.words import ABSENT, interval, number


def last_split(entries: Sequence[Entry]) -> str | None:
    """Returns the last split that every run has figures of; None if there is none."""
    runs = [run for entry in entries for run in entry.runs]
    shared = set.intersection(*(set(run.metrics["splits"]) for run in runs))
    names = [name for name in split_names(runs[0].metrics) if name in shared]
    return names[-1] if names else None


def slices(entries: Sequence[Entry]) -> dict[str, Any]:
    """Returns the slices of the last split, a column a row of the comparison.

    Args:
        entries: rows of the comparison.

    Returns:
        Nothing where no split is shared or none has slices.
    """
    split = last_split(entries)
    if split is None:
        return {}
    tables = [
        [run.metrics["splits"][split].get("slices") or {} for run in entry.runs]
        for entry in entries
    ]
    names = dict.fromkeys(n for of in tables for table in of for n in table)
    rows = []
    for name in names:
        found = [estimate([t.get(name, {}).get("f2") for t in of]) for of in tables]
        means = [f.mean for f in found if f is not None]
        cells = [
            {
                "f2": ABSENT if f is None else number(f.mean),
                "interval": interval(of[0].get(name, {}).get("interval"))
                if len(of) == 1
                else "",
                "best": f is not None and len(entries) > 1 and f.mean == max(means),
            }
            for f, of in zip(found, tables, strict=True)
        ]
        worst = math.fsum(means) / len(means) if means else math.inf
        rows.append((worst, {"name": name, "cells": cells}))
    rows.sort(key=lambda row: row[0])
    if not rows:
        return {}
    return {
        "split": split,
        "runs": _names(entries),
        "rows": [row for _, row in rows],
        "has_intervals": any(c["interval"] for _, row in rows for c in row["cells"]),
    }


def labels(entries: Sequence[Entry]) -> dict[str, Any] | None:
    """Returns the table of labels, F2 on the last split a column a row.

    Args:
        entries: rows of the comparison.

    Returns:
        None where a run has no figures of its labels, or other labels.
    """
    split = last_split(entries)
    tables = [run.labels for entry in entries for run in entry.runs]
    known = [table for table in tables if table is not None]
    if split is None or len(known) < len(tables):
        return None
    first = known[0]
    is_same = all(
        table.vocabulary.codes == first.vocabulary.codes and split in table.splits
        for table in known
    )
    if not is_same:
        return None
    columns = []
    for name, entry in zip(_names(entries), entries, strict=True):
        f2s = [r.labels.splits[split].f2 for r in entry.runs if r.labels is not None]
        columns.append(Column(name, np.mean(f2s, axis=0), 3))
    f2 = np.array([column.values for column in columns])
    spread = Column("Spread", f2.max(axis=0) - f2.min(axis=0), 3)
    support = Column(f"Images, {split}", first.splits[split].support, 0)
    several = len(entries) > 1
    return label_table.make_table(
        first.vocabulary.descriptions,
        first.vocabulary.codes,
        [support, *columns, *[spread] * several],
        ranked=spread if several else columns[0],
        caption=f"F2 of each label on {split}, by run",
    )


def _names(entries: Sequence[Entry]) -> list[str]:
    return [f"{i}. {short_name(e.title, 28)}" for i, e in enumerate(entries, 1)]
