"""The parts that the figures share: panels, curves, legends and their short names.

Matplotlib draws without a display and without pyplot's global state. Before it: `runs`
reads the history. After it: `figures` and `comparison_figures` draw with these.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from jaxii.report.runs import Row, number_or_none
from jaxii.report.svg import MUTED

WIDTH_INCHES = 9.6
MAX_NAME = 20
MAX_POINTS = 400
"""A curve keeps this many points; more cannot be told apart on a screen."""


def panels(titles: Sequence[str], *, height: float) -> tuple[Figure, list[Axes]]:
    """Returns panels one above the other that share the horizontal axis."""
    size = (WIDTH_INCHES, height * len(titles) + 0.35)
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(len(titles), 1, sharex=True, squeeze=False)[:, 0])
    for area, title in zip(axes, titles, strict=True):
        area.set_title(title)
        area.margins(x=0.01)
    return figure, axes


def column(
    rows: Sequence[Row], name: str, absent: float = np.nan
) -> Float64[np.ndarray, " row"]:
    """Returns one column of a history; `absent` where a row has no finite number."""
    values = [number_or_none(row.get(name)) for row in rows]
    return np.asarray([absent if v is None else v for v in values], np.float64)


def curve(
    area: Axes, rows: Sequence[Row], name: str, colour: str, **style: Any
) -> None:
    """Draws one column against step, as means of at most `MAX_POINTS` neighbours."""
    absent = 0.0 if name.startswith("weight/") else np.nan
    steps, values = column(rows, "step"), column(rows, name, absent)
    size = -(-len(steps) // MAX_POINTS)
    groups = np.arange(len(steps)) // max(size, 1)
    known = np.isfinite(values)
    if not known.any():
        return
    counts = np.bincount(groups, known)
    sums = np.bincount(groups, np.where(known, values, 0.0))
    means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    middles = np.bincount(groups, steps) / np.bincount(groups)
    # A lone point between gaps makes no line; a marker shows it.
    marker = "." if known.sum() < 12 else None
    area.plot(middles, means, color=colour, marker=marker, **style)


def draw_stages(axes: Sequence[Axes], stages: Sequence[Row]) -> None:
    """Draws where each stage begins, and its name between first panel and title."""
    if stages:
        axes[0].set_title(axes[0].get_title(loc="left"), pad=18)
    for number, stage in enumerate(stages):
        first = number_or_none(stage.get("first_step"))
        if first is None:
            continue
        for area in axes if number else ():
            area.axvline(first, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        # The first stage begins left of its first logged step, outside of the frame.
        inside = max(first, axes[0].get_xlim()[0])
        label = axes[0].text(inside, 1.03, short_name(stage.get("name", "")))
        label.set(va="bottom", transform=axes[0].get_xaxis_transform(), fontsize=7.5)
        label.set(color=MUTED, in_layout=False)


def short_name(name: Any, longest: int = MAX_NAME) -> str:
    """Returns a name that leaves room for the curves."""
    text = " ".join(str(name).split())
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def logarithmic(area: Axes) -> None:
    """Makes the vertical axis logarithmic, with plain numbers on it."""
    area.set_yscale("log")
    # The default labels are formulas, which this page does not set.
    low, high = area.get_ylim()
    steps = (1.0,) if high > 300 * low else (1.0, 2.0, 5.0)
    area.yaxis.set_major_locator(LogLocator(subs=steps))
    area.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    area.yaxis.set_minor_formatter(NullFormatter())


def legend(area: Axes) -> None:
    """Puts the legend outside, at the right, where no curve is ever covered."""
    if area.get_legend_handles_labels()[0]:
        area.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
