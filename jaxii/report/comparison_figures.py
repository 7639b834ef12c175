"""The figures of a comparison: F2 of every run, in domain and shifted, and its gap.

Before it: `compare` made the rows, whose numbers in the table the figures repeat. After
it: `svg` makes text of a drawing, and `comparison_page` places it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxii.report.compare import f2, f2_error, splits_of
from jaxii.report.panels import WIDTH_INCHES, curve, legend, panels, short_name
from jaxii.report.runs import last_rows
from jaxii.report.seeds import Entry
from jaxii.report.svg import INK, MUTED, SERIES, STYLE, to_svg

MAX_ROW_NAME = 34
MAX_CURVES = 8
"""More rows than this are not told apart by colour."""

# Test is what a run is judged by: it has the first colour and the full dot.
MARKS: Mapping[str, dict[str, Any]] = {
    "train": {"marker": "|", "color": MUTED},
    "validation": {"marker": "o", "color": SERIES[2], "markerfacecolor": "none"},
    "held_out": {"marker": "D", "color": SERIES[3], "markerfacecolor": "none"},
    "test": {"marker": "o", "color": SERIES[0]},
}
UNCLEAN = {"marker": "X", "color": SERIES[1]}


def dots(entries: Sequence[Entry], floors: Mapping[str, float]) -> str:
    """Draws F2 of every split by row, and the best constant's.

    Args:
        entries: from the top down.
        floors: F2 of the best constant prediction, by split.

    Returns:
        SVG, or an empty string where no row has an F2.
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
        for split in (n for n in splits if n in floors):
            style = {"color": _mark(split)["color"], "linewidth": 1.0}
            label = f"best constant, {_plain(split)}"
            area.axvline(floors[split], linestyle=":", label=label, **style)
        names = [
            f"{i}. {short_name(entry.title, MAX_ROW_NAME)}"
            for i, entry in enumerate(entries, 1)
        ]
        area.set_yticks(range(len(entries)), names)
        area.set_ylim(len(entries) - 0.5, -0.5)
        area.tick_params(axis="y", length=0, labelcolor=INK)
        area.set_xlabel("mean F2")
        legend(area)
        return to_svg(figure, "dots", "Mean F2 of each split, by run.")


def _plot_split(area: Axes, entries: Sequence[Entry], split: str) -> None:
    for clean in (True, False):
        shown = [
            (row, found, f2_error(entry, split))
            for row, entry in enumerate(entries)
            if (found := f2(entry, split)) is not None
            and (entry.clean or split != "test") == clean
        ]
        if not shown:
            continue
        rows = [row for row, _, _ in shown]
        means = [found.mean for _, found, _ in shown]
        deviations = [found.deviation or 0.0 for _, found, _ in shown]
        errors = [error or 0.0 for _, _, error in shown]
        mark = _mark(split) if clean else UNCLEAN
        label = _plain(split) if clean else f"{_plain(split)}, run not clean"
        style = {"fmt": "none", "ecolor": mark["color"]}
        area.errorbar(means, rows, xerr=errors, elinewidth=0.8, **style)
        area.errorbar(means, rows, xerr=deviations, elinewidth=3.2, alpha=0.5, **style)
        style = {"linestyle": "none", "markersize": 5.5, "label": label, **mark}
        area.plot(means, rows, **style)


def shift(entries: Sequence[Entry]) -> str:
    """Draws F2 on test against F2 on validation, a dot a row.

    Args:
        entries: numbered from 1, as in the table.

    Returns:
        SVG, or an empty string where no row has both.
    """
    shown = [
        (number, entry)
        for number, entry in enumerate(entries, 1)
        if f2(entry, "validation") and f2(entry, "test")
    ]
    if not shown:
        return ""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, 4.6), layout="constrained")
        area = figure.subplots()
        for clean in (True, False):
            part = [entry for _, entry in shown if entry.clean == clean]
            if part:
                _plot_shift(area, part, MARKS["test"] if clean else UNCLEAN, clean)
        _draw_equality(area)
        area.set(xlabel="mean F2, validation", ylabel="mean F2, test")
        legend(area)
        numbers, numbered = zip(*shown, strict=True)
        _number(figure, area, numbers, numbered)
        return to_svg(figure, "shift", "Mean F2 on test against validation, by run.")


def _plot_shift(
    area: Axes, entries: Sequence[Entry], mark: Mapping[str, Any], clean: bool
) -> None:
    x, y = _means(entries)
    for width, alpha, spread in ((0.7, 0.7, _errors), (3.0, 0.45, _deviations)):
        across, up = (spread(entries, split) for split in ("validation", "test"))
        style = {"fmt": "none", "ecolor": mark["color"], "alpha": alpha}
        area.errorbar(x, y, xerr=across, yerr=up, elinewidth=width, **style)
    label = "run" if clean else "run, not clean"
    area.plot(x, y, linestyle="none", markersize=6, label=label, **mark)


def _means(entries: Sequence[Entry]) -> Float64[np.ndarray, "two row"]:
    found = [
        [f2(entry, split) for entry in entries] for split in ("validation", "test")
    ]
    return np.array([[e.mean if e else np.nan for e in row] for row in found])


def _errors(entries: Sequence[Entry], split: str) -> list[float]:
    return [f2_error(entry, split) or 0.0 for entry in entries]


def _deviations(entries: Sequence[Entry], split: str) -> list[float]:
    found = [f2(entry, split) for entry in entries]
    return [(e.deviation or 0.0) if e else 0.0 for e in found]


def _draw_equality(area: Axes) -> None:
    """Draws where test equals validation, if the dots lie near it."""
    limits = area.get_xlim(), area.get_ylim()
    low, high = max(low for low, _ in limits), min(high for _, high in limits)
    if low < high:
        style = {"color": MUTED, "linewidth": 0.9, "linestyle": "--"}
        area.plot([low, high], [low, high], label="no shift", **style)
    area.set(xlim=limits[0], ylim=limits[1])


def _number(
    figure: Figure, area: Axes, numbers: Sequence[int], entries: Sequence[Entry]
) -> None:
    """Writes each row's number beside its dot, where the most room is."""
    figure.draw_without_rendering()
    points = _means(entries).T
    places = area.transData.transform(points) * 72 / figure.dpi
    turns = np.linspace(0, 2 * np.pi, 8, endpoint=False) + np.pi / 4
    offsets = 9.0 * np.column_stack([np.cos(turns), np.sin(turns)])
    taken = list(places)
    for number, point, place in zip(numbers, points, places, strict=True):
        away = (place + offsets)[:, None] - np.asarray(taken)
        # More room than a number needs is no reason to leave the first place.
        room = np.minimum(np.hypot(*away.T).min(axis=0), 9.0).round(1)
        best = offsets[np.argmax(room)]
        taken.append(place + best)
        style = {"ha": "center", "va": "center", "fontsize": 7.5, "color": INK}
        area.annotate(
            str(number), point, xytext=best, textcoords="offset points", **style
        )


def gaps(entries: Sequence[Entry]) -> str:
    """Draws validation and training figures by step, of rows that recorded both.

    Args:
        entries: numbered from 1; of several seeds the first is drawn.

    Returns:
        SVG, or an empty string where no row recorded its training images.
    """
    rows = [
        (number, entry, last_rows(entry.runs[0].history, "evaluation"))
        for number, entry in enumerate(entries, 1)
    ]
    shown = [row for row in rows if any("train/f2" in figures for figures in row[2])]
    shown = shown[:MAX_CURVES]
    if not shown:
        return ""
    titles = [
        "F2 at its best threshold",
        "Cross-entropy of an image (sum over the labels)",
    ]
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(titles, height=2.3)
        for i, (number, entry, history) in enumerate(shown):
            name = f"{number}. {short_name(entry.name)}"
            for area, key in zip(axes, ("f2", "bce"), strict=True):
                style = {"colour": SERIES[i], "label": name}
                curve(area, history, f"validation/{key}", **style)
                style = {"colour": SERIES[i], "linestyle": "--", "linewidth": 1.0}
                curve(area, history, f"train/{key}", **style)
        legend(axes[0])
        axes[-1].set_xlabel("step")
        alt = "F2 and cross-entropy of validation and training images by step."
        return to_svg(figure, "gaps", alt)


def _mark(split: str) -> dict[str, Any]:
    return MARKS.get(split, MARKS["train"])


def _plain(split: str) -> str:
    return split.replace("_", " ")
