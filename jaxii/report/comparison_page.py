"""The page of a comparison: one self-contained HTML file with figures and tables."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float64
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxii.report.comparison import (
    Comparison,
    f2,
    floors,
    splits_of,
)
from jaxii.report.entries import Entry, Estimate, estimate
from jaxii.report.figures import (
    INK,
    MUTED,
    SERIES,
    STYLE,
    WIDTH_INCHES,
    legend,
    to_svg,
)
from jaxii.report.formatting import plain, short_name
from jaxii.report.label_table import Column, LabelPanel
from jaxii.report.page import templates
from jaxii.report.run_files import split_names

SECTIONS = (
    ("runs", "Mean F2 by run", "dots"),
    ("shift", "Validation against test", "shift"),
    ("figures", "All metrics", "rows"),
    ("slices", "Slices", "slices"),
    ("labels", "Labels", "labels"),
)
MAX_ROW_NAME = 30


class Mark(NamedTuple):
    """How the dots of a split are drawn."""

    marker: str
    color: str
    fill: str = "none"


# Runs are judged by the test, which has the first color and the filled dot.
MARKS = {
    "train": Mark("|", MUTED, MUTED),
    "validation": Mark("o", SERIES[2]),
    "held_out": Mark("D", SERIES[3]),
    "test": Mark("o", SERIES[0], SERIES[0]),
}
OTHER = Mark("s", SERIES[4])
UNCLEAN = Mark("X", SERIES[1], SERIES[1])


def render_comparison(comparison: Comparison) -> str:
    """Returns the page of a comparison as HTML."""
    entries, constant = comparison.entries, floors(comparison.entries)
    count, split = len(entries), last_split(entries)
    content = {
        "rows": comparison.rows,
        "dots": Markup(dots(entries, constant)),
        "shift": Markup(shift(entries)),
        "slices": slices(entries, split) if split else [],
        "labels": labels(entries, split) if split else None,
    }
    template = templates().get_template("comparison.html.j2")
    return template.render(
        heading=f"{count} runs" if count > 1 else entries[0].title,
        sections=[(id, title) for id, title, key in SECTIONS if content[key]],
        has_seeds=any(len(entry.runs) > 1 for entry in entries),
        columns=list(zip(comparison.columns, comparison.kinds, strict=True)),
        notes=comparison.notes,
        split=split,
        names=_names(entries),
        **content,
    )


def dots(entries: Sequence[Entry], constant: Mapping[str, float]) -> str:
    """Draws the F2 of each split by row, and that of the best constant prediction.

    Args:
        entries: Rows from top to bottom.
        constant: Split -> F2 of the best constant prediction.

    Returns:
        SVG, or "" if no row has an F2.
    """
    splits = splits_of(entries)
    if not splits:
        return ""
    with matplotlib.rc_context({**STYLE, "ytick.labelsize": 8}):
        size = (WIDTH_INCHES, 0.27 * len(entries) + 0.75)
        figure = Figure(figsize=size, layout="constrained")
        area = figure.subplots()
        for row, entry in enumerate(entries):
            means = [found.mean for n in splits if (found := f2(entry, n))]
            style = {"color": MUTED, "linewidth": 0.8, "zorder": 1}
            area.plot([min(means), max(means)], [row, row], **style)
        for split in splits:
            _plot_split(area, entries, split)
        for split in (n for n in splits if n in constant):
            style = {"color": MARKS.get(split, OTHER).color, "linewidth": 1.0}
            label = f"best constant, {plain(split)}"
            area.axvline(constant[split], linestyle=":", label=label, **style)
        area.set_yticks(range(len(entries)), _names(entries))
        area.set_ylim(len(entries) - 0.5, -0.5)
        area.tick_params(axis="y", length=0, labelcolor=INK)
        area.set_xlabel("mean F2")
        legend(area)
        return to_svg(figure, "dots", "Mean F2 of each split, by run.")


def _plot_split(area: Axes, entries: Sequence[Entry], split: str) -> None:
    for clean in (True, False):
        shown = [
            (row, found)
            for row, entry in enumerate(entries)
            if (found := f2(entry, split)) is not None
            and (entry.clean or split != "test") == clean
        ]
        if not shown:
            continue
        rows = [row for row, _ in shown]
        means = [found.mean for _, found in shown]
        deviations = [found.deviation or 0.0 for _, found in shown]
        errors = [found.error for _, found in shown]
        mark = MARKS.get(split, OTHER) if clean else UNCLEAN
        label = plain(split) if clean else f"{plain(split)}, run not clean"
        for bars, width, alpha in ((errors, 0.8, None), (deviations, 3.2, 0.5)):
            area.errorbar(
                means,
                rows,
                xerr=bars,
                fmt="none",
                ecolor=mark.color,
                elinewidth=width,
                alpha=alpha,
            )
        area.plot(
            means,
            rows,
            mark.marker,
            color=mark.color,
            markerfacecolor=mark.fill,
            markersize=5.5,
            label=label,
        )


def shift(entries: Sequence[Entry]) -> str:
    """Draws test F2 against validation F2, with the number of each row; "" if none."""
    shown = [
        (row, x, y, entry.clean)
        for row, entry in enumerate(entries, 1)
        if (x := f2(entry, "validation")) and (y := f2(entry, "test"))
    ]
    if not shown:
        return ""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, 4.6), layout="constrained")
        area = figure.subplots()
        for clean in (True, False):
            points = [(x, y) for _, x, y, is_clean in shown if is_clean == clean]
            if points:
                x, y = zip(*points, strict=True)
                _plot_runs(area, x, y, MARKS["test"] if clean else UNCLEAN)
        _draw_equality(area)
        area.set(xlabel="mean F2, validation", ylabel="mean F2, test")
        legend(area)
        places = np.array([(x.mean, y.mean) for _, x, y, _ in shown])
        _number(figure, area, [row for row, *_ in shown], places)
        return to_svg(figure, "shift", "Mean F2 on test against validation, by run.")


def _plot_runs(
    area: Axes, x: Sequence[Estimate], y: Sequence[Estimate], mark: Mark
) -> None:
    means = [e.mean for e in x], [e.mean for e in y]
    errors = [e.error for e in y], [e.error for e in x]
    deviations = [e.deviation or 0.0 for e in y], [e.deviation or 0.0 for e in x]
    for bars, width, alpha in ((errors, 0.7, 0.7), (deviations, 3.0, 0.45)):
        area.errorbar(
            *means, *bars, "none", ecolor=mark.color, elinewidth=width, alpha=alpha
        )
    label = "run, not clean" if mark is UNCLEAN else "run"
    area.plot(
        *means,
        mark.marker,
        color=mark.color,
        markerfacecolor=mark.fill,
        markersize=6,
        label=label,
    )


def _draw_equality(area: Axes) -> None:
    """Draws the line where test equals validation within the limits of the axes."""
    limits = area.get_xlim(), area.get_ylim()
    low, high = max(low for low, _ in limits), min(high for _, high in limits)
    if low < high:
        style = {"color": MUTED, "linewidth": 0.9, "linestyle": "--"}
        area.plot([low, high], [low, high], label="test = validation", **style)
    area.set(xlim=limits[0], ylim=limits[1])


def _number(
    figure: Figure,
    area: Axes,
    numbers: Sequence[int],
    points: Float64[np.ndarray, "row two"],
) -> None:
    """Writes each row's number beside its dot, on the side with most room."""
    figure.draw_without_rendering()
    places = area.transData.transform(points) * 72 / figure.dpi
    turns = np.linspace(0, 2 * np.pi, 8, endpoint=False) + np.pi / 4
    offsets = 9.0 * np.column_stack([np.cos(turns), np.sin(turns)])
    taken = list(places)
    for row, point, place in zip(numbers, points, places, strict=True):
        away = (place + offsets)[:, None] - np.asarray(taken)
        # The first place is kept if it has enough room.
        room = np.minimum(np.hypot(*away.T).min(axis=0), 9.0).round(1)
        best = offsets[np.argmax(room)]
        taken.append(place + best)
        style = {"ha": "center", "va": "center", "fontsize": 7.5, "color": INK}
        area.annotate(str(row), point, xytext=best, textcoords="offset points", **style)


def last_split(entries: Sequence[Entry]) -> str | None:
    """Returns the last split that all runs share, or None."""
    runs = [run for entry in entries for run in entry.runs]
    shared = set.intersection(
        *(run.metrics.splits.keys() - run.sets.keys() for run in runs)
    )
    return split_names(shared)[-1] if shared else None


@dataclass(frozen=True)
class Cell:
    """F2 of a slice; the best of a row is marked if there are several rows of runs."""

    found: Estimate | None
    interval: Sequence[float] | None
    is_best: bool


def slices(entries: Sequence[Entry], split: str) -> list[tuple[str, list[Cell]]]:
    """Returns the slices of a split, each with a cell for every row of runs.

    The slice with the lowest mean over rows comes first.
    """
    tables = [[run.metrics.splits[split].slices for run in e.runs] for e in entries]
    names = dict.fromkeys(n for of in tables for table in of for n in table)
    rows: list[tuple[float, str, list[Cell]]] = []
    for name in names:
        each = [[t[name] for t in of if name in t] for of in tables]
        found = [
            estimate([part.f2 for part in parts]) if len(parts) == len(of) else None
            for parts, of in zip(each, tables, strict=True)
        ]
        means = [f.mean for f in found if f is not None]
        best = max(means) if means and len(entries) > 1 else None
        cells = [
            Cell(
                found=f,
                interval=parts[0].interval if f and len(parts) == 1 else None,
                is_best=f is not None and f.mean == best,
            )
            for f, parts in zip(found, each, strict=True)
        ]
        rows.append((math.fsum(means) / len(means) if means else math.inf, name, cells))
    rows.sort(key=lambda row: row[0])
    return [(name, cells) for _, name, cells in rows]


def labels(entries: Sequence[Entry], split: str) -> LabelPanel | None:
    """Returns the F2 of each label on a split by row.

    None if a run has no figures of its labels, or different labels.
    """
    tables = [run.labels for entry in entries for run in entry.runs]
    known = [table for table in tables if table is not None]
    if len(known) < len(tables):
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
    return LabelPanel(
        vocabulary=first.vocabulary,
        columns=[support, *columns, *[spread] * several],
        ranked=spread if several else columns[0],
        caption=f"F2 of each label on {split}, by run",
    )


def _names(entries: Sequence[Entry]) -> list[str]:
    return [
        f"{i}. {short_name(e.title, MAX_ROW_NAME)}" for i, e in enumerate(entries, 1)
    ]
