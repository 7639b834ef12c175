"""The figures of a run as SVG elements, and the parts that all figures share.

Colors and fonts are CSS variables, so a drawing fits light mode, dark mode and paper.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from jaxii.evaluation.details import StageRow
from jaxii.evaluation.result import SplitMetrics
from jaxii.report.formatting import number_or_none, short_name
from jaxii.report.run_files import last_rows
from jaxii.train.telemetry.history import Row

WIDTH_INCHES = 9.6
# A curve keeps this many points; a screen cannot show more.
MAX_POINTS = 400
# Matplotlib needs real colors; each of these stands for a CSS variable of the page.
INK, MUTED, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
SERIES = tuple(f"#0a0a{i:02x}" for i in range(1, 9))
DASHES = ("-", "--", "-.", ":")
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    PAPER: "var(--paper)",
    **{color: f"var(--series-{i})" for i, color in enumerate(SERIES, start=1)},
}
STYLE: dict[Any, Any] = {
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 8.5,
    "figure.facecolor": "none",
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.borderaxespad": 0.0,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.4,
    "lines.solid_capstyle": "round",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "text.color": INK,
    # A stage or slice named "$x_1$" is not a formula.
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
}


def to_svg(figure: Figure, name: str, alt: str) -> str:
    """Returns a figure as an SVG element with alternative text.

    `name` is the prefix of its identifiers and unique on a page.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'\bxlink:href="#', f'href="#{name}-', text)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    box = re.search(r'viewBox="[^"]*"', text)
    head = f'<svg {box.group() if box else ""} role="img" aria-label="{escape(alt)}">'
    return re.sub(r"^<svg[^>]*>", lambda _: head, text, count=1).strip()


def panels(titles: Sequence[str], *, height: float) -> tuple[Figure, list[Axes]]:
    """Returns stacked panels that share the horizontal axis; `height` is in inches."""
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
    """Returns one column of a history; `absent` replaces non-finite values."""
    values = [number_or_none(row.get(name)) for row in rows]
    return np.asarray([absent if v is None else v for v in values], np.float64)


def curve(area: Axes, rows: Sequence[Row], name: str, color: str, **style: Any) -> None:
    """Draws one column against step, averaged to at most `MAX_POINTS` points."""
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
    # Markers show points between gaps, where no line is drawn.
    marker = "." if known.sum() < 12 else None
    area.plot(middles, means, color=color, marker=marker, **style)


def draw_stages(axes: Sequence[Axes], stages: Sequence[StageRow]) -> None:
    """Draws the start of each stage, and its name above the first panel."""
    if stages:
        axes[0].set_title(axes[0].get_title(loc="left"), pad=18)
    for number, stage in enumerate(stages):
        style = {"color": MUTED, "linewidth": 0.9, "linestyle": (0, (4, 3))}
        for area in axes if number else ():
            area.axvline(stage.first_step, **style)
        # The first stage starts before its first logged step, outside the frame.
        inside = max(stage.first_step, axes[0].get_xlim()[0])
        label = axes[0].text(inside, 1.03, short_name(stage.name))
        label.set(va="bottom", transform=axes[0].get_xaxis_transform(), fontsize=7.5)
        label.set(color=MUTED, in_layout=False)


def logarithmic(area: Axes) -> None:
    """Makes the vertical axis logarithmic, with plain numbers as labels."""
    area.set_yscale("log")
    # The default labels are formulas, which the page cannot typeset.
    low, high = area.get_ylim()
    steps = (1.0,) if high > 300 * low else (1.0, 2.0, 5.0)
    area.yaxis.set_major_locator(LogLocator(subs=steps))
    area.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    area.yaxis.set_minor_formatter(NullFormatter())


def legend(area: Axes) -> None:
    """Draws the legend to the right of the frame."""
    if area.get_legend_handles_labels()[0]:
        area.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))


def training_curves(
    history: Sequence[Row], stages: Sequence[StageRow], constant_f2: float | None
) -> str:
    """Draws objective, loss terms, F2, cross-entropy and term weights against step.

    Args:
        history: The training history.
        stages: The stage table; first steps are drawn as borders.
        constant_f2: Validation F2 of the best constant prediction; None for no line.

    Returns:
        SVG, or "" without data.
    """
    train, evaluations = last_rows(history, "train"), last_rows(history, "evaluation")
    losses, weights = _terms(train, "loss/"), _terms(train, "weight/")
    draw: dict[str, Callable[[Axes], None]] = {}
    if train:
        draw["Objective (weighted sum of the terms)"] = lambda area: curve(
            area, train, "objective", SERIES[0]
        )
    if losses:
        draw["Unweighted loss terms (logarithmic scale)"] = lambda area: _plot_terms(
            area, train, "loss/", losses
        )
    if evaluations:
        draw["F2 at its best threshold"] = lambda area: _plot_f2(
            area, evaluations, stages, constant_f2
        )
    if _splits(evaluations, "bce"):
        draw["Cross-entropy per image (sum over labels)"] = lambda area: _plot_splits(
            area, evaluations, "bce"
        )
    if weights:
        draw["Weights of the terms"] = lambda area: _plot_terms(
            area, train, "weight/", weights
        )
    if not draw:
        return ""
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(list(draw), height=1.45)
        for area, plot in zip(axes, draw.values(), strict=True):
            plot(area)
        draw_stages(axes, stages)
        axes[-1].set_xlabel("step")
        alt = f"Against training step: {'; '.join(draw)}."
        return to_svg(figure, "training", alt)


def f2_against_threshold(
    splits: Mapping[str, SplitMetrics],
    constant: Mapping[str, float],
    threshold: float | None,
) -> str:
    """Draws mean F2 against threshold for each split, and the threshold in use.

    Args:
        splits: Figures by split.
        constant: F2 of the best constant prediction, by split.
        threshold: In [0, 1]; None for no line.
    """
    with matplotlib.rc_context(STYLE):
        figure, (area,) = panels(["Mean F2 of the images"], height=2.9)
        for i, (name, of) in enumerate(splits.items()):
            color, label = SERIES[i % 8], short_name(name)
            x, y = of.thresholds, of.f2_by_threshold
            area.plot(x, y, color=color, linestyle=DASHES[i % 4], label=label)
            area.plot(of.best_threshold, of.best_f2, "o", color=color, markersize=5)
            style = {"color": color, "linewidth": 0.7, "linestyle": (0, (1, 1))}
            area.axhline(constant[name], label=f"best constant, {label}", **style)
        if threshold is not None:
            area.axvline(threshold, color=MUTED, linewidth=1.0, linestyle=":")
            # The label is on the side with more room.
            side, shift = ("left", 0.007) if threshold < 0.8 else ("right", -0.007)
            label = area.text(threshold + shift, 0.04, f"in use: {threshold:.3g}")
            label.set(color=MUTED, transform=area.get_xaxis_transform(), ha=side)
        area.set_xlim(0, 1)
        area.set_ylim(bottom=0)
        area.set_xlabel("probability threshold; dots mark the best of each split")
        legend(area)
        return to_svg(figure, "threshold", "Mean F2 against threshold, for each split.")


def reliability(splits: Mapping[str, SplitMetrics]) -> str:
    """Draws the frequency of labels against probability."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, 2.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=":")
        for i, (name, of) in enumerate(splits.items()):
            means, frequencies, counts = np.asarray(of.reliability, np.float64).T
            style = {"color": SERIES[i % 8], "linestyle": DASHES[i % 4], "marker": "o"}
            left.plot(means, frequencies, markersize=3, label=short_name(name), **style)
            right.plot(means, counts, markersize=3, label=short_name(name), **style)
        left.set(xlim=(0, 1), ylim=(0, 1), xlabel="mean probability of the bin")
        left.set_title("Frequency of the label")
        logarithmic(right)
        right.set(xlim=(0, 1), xlabel="mean probability of the bin")
        right.set_title("Image-label pairs in the bin")
        legend(right)
        alt = "Frequency of labels and number of pairs against probability."
        return to_svg(figure, "reliability", alt)


def throughput(history: Sequence[Row], stages: Sequence[StageRow]) -> str:
    """Draws images per second and the share of input wait; "" if not recorded."""
    train = last_rows(history, "train")
    known = {
        "images_per_second": "Images per second",
        "input_wait_share": "Share of time spent waiting for input",
    }
    names = [n for n in known if np.isfinite(column(train, n)).any()]
    if not names:
        return ""
    with matplotlib.rc_context(STYLE):
        figure, axes = panels([known[n] for n in names], height=1.2)
        for area, name in zip(axes, names, strict=True):
            curve(area, train, name, SERIES[2])
            area.set_ylim(bottom=0)
            if name == "input_wait_share":
                area.set_ylim(0, 1)
        draw_stages(axes, stages)
        axes[-1].set_xlabel("step")
        alt = "Training speed against step."
        return to_svg(figure, "throughput", alt)


def _terms(rows: Sequence[Row], prefix: str) -> list[str]:
    names = dict.fromkeys(key for row in rows for key in row if key.startswith(prefix))
    return sorted(name.removeprefix(prefix) for name in names)


def _plot_terms(
    area: Axes, rows: Sequence[Row], prefix: str, terms: Sequence[str]
) -> None:
    for i, term in enumerate(terms):
        style = {"linestyle": DASHES[i % 4], "label": short_name(term)}
        curve(area, rows, prefix + term, SERIES[i % len(SERIES)], **style)
    if prefix == "loss/" and any((column(rows, prefix + t) > 0).any() for t in terms):
        logarithmic(area)
    if prefix == "weight/":
        # Keep a weight of 0 visible above the frame.
        area.set_ylim(bottom=-0.04 * area.get_ylim()[1])
    legend(area)


def _splits(rows: Sequence[Row], figure: str) -> list[str]:
    """Returns the splits with a figure in the history, validation first."""
    names = dict.fromkeys(key for row in rows for key in row)
    splits = [n.removesuffix(f"/{figure}") for n in names if n.endswith(f"/{figure}")]
    return sorted(splits, key=lambda n: (n == "train", n != "validation", n))


def _plot_splits(area: Axes, rows: Sequence[Row], figure: str) -> None:
    """Draws a figure of each split, and the gap between training and validation."""
    splits = _splits(rows, figure)
    for split in splits:
        is_train = split == "train"
        at = 2 if is_train else 0 if split == "validation" else 3
        name = "training, no augmentation" if is_train else split.replace("_", "-")
        style = {"linestyle": "--" if is_train else "-", "label": name}
        curve(area, rows, f"{split}/{figure}", SERIES[at], **style)
    if {"train", "validation"} <= set(splits):
        one, other = (column(rows, f"{n}/{figure}") for n in ("validation", "train"))
        style = {
            "color": SERIES[2],
            "alpha": 0.12,
            "linewidth": 0,
            "label": "generalization gap",
        }
        area.fill_between(column(rows, "step"), one, other, **style)
    legend(area)


def _plot_f2(
    area: Axes, rows: Sequence[Row], stages: Sequence[StageRow], floor: float | None
) -> None:
    _plot_splits(area, rows, "f2")
    if floor is not None:
        style = {"color": MUTED, "linewidth": 0.9, "linestyle": ":"}
        area.axhline(floor, label="best constant prediction", **style)
    best = [(s.best_step, s.best_f2) for s in stages if s.best_f2 is not None]
    if best:
        x, y = zip(*best, strict=True)
        style = {"marker": "o", "linestyle": "none", "markersize": 5}
        area.plot(x, y, color=SERIES[1], label="best of each stage", **style)
    legend(area)
