"""The figures of the report: what is drawn, and how its curves are made readable.

Matplotlib draws without a display and without pyplot's global state. Before it: `runs`
reads the history. After it: `svg` makes text of a drawing, and `page` places it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from jaxii.infer.report.runs import Row, last_rows, number_or_none
from jaxii.infer.report.svg import DASHES, MUTED, SERIES, STYLE, to_svg

WIDTH_INCHES = 9.6
MAX_NAME = 20
MAX_POINTS = 400
"""A curve keeps this many points; more cannot be told apart on a screen."""


def training_curves(
    history: Sequence[Row], stages: Sequence[Row], constant_f2: float | None
) -> str:
    """Draws objective, loss terms, validation F2 and term weights against step.

    Args:
        history: rows of the training history.
        stages: rows of the stage table; their first steps are drawn as borders.
        constant_f2: validation F2 of the best constant prediction; None: not drawn.

    Returns:
        SVG, or an empty string where there is nothing to draw.
    """
    train, evaluations = last_rows(history, "train"), last_rows(history, "evaluation")
    losses, weights = _terms(train, "loss/"), _terms(train, "weight/")
    panels = [
        ("Objective (weighted sum of the terms)", bool(train)),
        ("Loss terms, unweighted, on a logarithmic scale", bool(losses)),
        ("Validation F2 at its best threshold", bool(evaluations)),
        ("Weights of the terms", bool(weights)),
    ]
    titles = [title for title, has_data in panels if has_data]
    if not titles:
        return ""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panels(titles, height=1.45)
        if train:
            _plot(axes[titles.index(panels[0][0])], train, "objective", SERIES[0])
        if losses:
            _plot_terms(axes[titles.index(panels[1][0])], train, "loss/", losses)
        if evaluations:
            area = axes[titles.index(panels[2][0])]
            _plot_validation(area, evaluations, stages, constant_f2)
        if weights:
            area = axes[titles.index(panels[3][0])]
            _plot_terms(area, train, "weight/", weights)
            # A weight of 0 is a line to be seen, not the frame's.
            area.set_ylim(bottom=-0.04 * area.get_ylim()[1])
        _draw_stages(axes, stages)
        axes[-1].set_xlabel("step")
        return to_svg(
            figure, "training", f"Against training step: {'; '.join(titles)}."
        )


def f2_against_threshold(
    splits: Mapping[str, Any], constant: Mapping[str, Any], threshold: float | None
) -> str:
    """Draws mean F2 of each split at every threshold, and the threshold in use.

    Args:
        splits: evaluation summaries by split.
        constant: F2 of the best constant prediction by split.
        threshold: the threshold in use, in [0, 1]; None: not drawn.

    Returns:
        SVG, or an empty string where no split has a curve.
    """
    curves = {n: s for n, s in splits.items() if s.get("f2_by_threshold")}
    if not curves:
        return ""
    with matplotlib.rc_context(STYLE):
        figure, (area,) = _panels(["Mean F2 of the images"], height=2.9)
        for i, (name, summary) in enumerate(curves.items()):
            x, y = summary["thresholds"], summary["f2_by_threshold"]
            area.plot(
                x, y, color=SERIES[i % 8], linestyle=DASHES[i % 4], label=_short(name)
            )
            best = number_or_none(summary.get("best_threshold"))
            if best is not None:
                area.plot(
                    best, summary["best_f2"], "o", color=SERIES[i % 8], markersize=5
                )
        for i, name in enumerate(curves):
            floor = number_or_none(constant.get(name))
            if floor is not None:
                style = {
                    "color": SERIES[i % 8],
                    "linewidth": 0.7,
                    "linestyle": (0, (1, 1)),
                }
                area.axhline(floor, label=f"best constant, {_short(name)}", **style)
        if threshold is not None:
            area.axvline(threshold, color=MUTED, linewidth=1.0, linestyle=":")
            # Towards the middle: no threshold pushes its label out of the frame.
            side, shift = ("left", 0.007) if threshold < 0.8 else ("right", -0.007)
            label = area.text(threshold + shift, 0.04, f"in use: {threshold:.3g}")
            label.set(color=MUTED, transform=area.get_xaxis_transform(), ha=side)
        area.set_xlim(0, 1)
        area.set_ylim(bottom=0)
        area.set_xlabel("threshold on the probability; a dot marks each split's best")
        _legend(area)
        return to_svg(figure, "threshold", "Mean F2 against threshold, for each split.")


def reliability(splits: Mapping[str, Any]) -> str:
    """Draws how often labels were true against how probable they were said to be.

    Args:
        splits: evaluation summaries by split, with rows [mean probability, frequency,
            count].

    Returns:
        SVG, or an empty string where no split has rows.
    """
    tables = {n: s["reliability"] for n, s in splits.items() if s.get("reliability")}
    if not tables:
        return ""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, 2.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=":")
        for i, (name, rows) in enumerate(tables.items()):
            means, frequencies, counts = np.asarray(rows, np.float64).T
            style = {"color": SERIES[i % 8], "linestyle": DASHES[i % 4], "marker": "o"}
            left.plot(means, frequencies, markersize=3, label=_short(name), **style)
            right.plot(means, counts, markersize=3, label=_short(name), **style)
        left.set(xlim=(0, 1), ylim=(0, 1), xlabel="mean probability of the bin")
        left.set_title("How often the label was present")
        _logarithmic(right)
        right.set(xlim=(0, 1), xlabel="mean probability of the bin")
        right.set_title("Entries (image and label) in the bin")
        _legend(right)
        alt = "Frequency of presence and number of entries against probability."
        return to_svg(figure, "reliability", alt)


def throughput(history: Sequence[Row], stages: Sequence[Row]) -> str:
    """Draws images a second and the share of time spent waiting for input.

    Args:
        history: rows of the training history.
        stages: rows of the stage table.

    Returns:
        SVG, or an empty string where neither was recorded.
    """
    train = last_rows(history, "train")
    known = {
        "images_per_second": "Images a second",
        "input_wait_share": "Share of the time spent waiting for input",
    }
    names = [n for n in known if np.isfinite(_column(train, n)).any()]
    if not names:
        return ""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panels([known[n] for n in names], height=1.2)
        for area, name in zip(axes, names, strict=True):
            _plot(area, train, name, SERIES[2])
            area.set_ylim(bottom=0)
            if name == "input_wait_share":
                area.set_ylim(0, 1)
        _draw_stages(axes, stages)
        axes[-1].set_xlabel("step")
        alt = "Training speed against step."
        return to_svg(figure, "throughput", alt)


def _panels(titles: Sequence[str], *, height: float) -> tuple[Figure, list[Axes]]:
    """Returns panels one above the other that share the horizontal axis."""
    size = (WIDTH_INCHES, height * len(titles) + 0.35)
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(len(titles), 1, sharex=True, squeeze=False)[:, 0])
    for area, title in zip(axes, titles, strict=True):
        area.set_title(title)
        area.margins(x=0.01)
    return figure, axes


def _terms(rows: Sequence[Row], prefix: str) -> list[str]:
    names = dict.fromkeys(key for row in rows for key in row if key.startswith(prefix))
    return sorted(name.removeprefix(prefix) for name in names)


def _column(rows: Sequence[Row], name: str, absent: float = np.nan) -> np.ndarray:
    values = [number_or_none(row.get(name)) for row in rows]
    return np.asarray([absent if v is None else v for v in values], np.float64)


def _plot(
    area: Axes, rows: Sequence[Row], name: str, colour: str, **style: Any
) -> None:
    """Draws one column against step, as means of at most `MAX_POINTS` neighbours."""
    absent = 0.0 if name.startswith("weight/") else np.nan
    steps, values = _column(rows, "step"), _column(rows, name, absent)
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


def _plot_terms(
    area: Axes, rows: Sequence[Row], prefix: str, terms: Sequence[str]
) -> None:
    for i, term in enumerate(terms):
        style = {"linestyle": DASHES[i % 4], "label": _short(term)}
        _plot(area, rows, prefix + term, SERIES[i % len(SERIES)], **style)
    if prefix == "loss/" and any((_column(rows, prefix + t) > 0).any() for t in terms):
        _logarithmic(area)
    _legend(area)


def _plot_validation(
    area: Axes, rows: Sequence[Row], stages: Sequence[Row], floor: float | None
) -> None:
    _plot(area, rows, "validation/f2", SERIES[0], label="validation F2")
    if floor is not None:
        style = {"color": MUTED, "linewidth": 0.9, "linestyle": "--"}
        area.axhline(floor, label="best constant prediction", **style)
    best = [
        (s["best_step"], s["validation_f2"])
        for s in stages
        if number_or_none(s.get("best_step")) is not None
        and number_or_none(s.get("validation_f2")) is not None
    ]
    if best:
        x, y = zip(*best, strict=True)
        style = {"marker": "o", "linestyle": "none", "markersize": 5}
        area.plot(x, y, color=SERIES[1], label="best of the stage", **style)
    _legend(area)


def _draw_stages(axes: Sequence[Axes], stages: Sequence[Row]) -> None:
    """Draws where each stage begins, and its name between first panel and title."""
    if stages:
        axes[0].set_title(axes[0].get_title(loc="left"), pad=18)
    for number, stage in enumerate(stages):
        first = number_or_none(stage.get("first_step"))
        if first is None:
            continue
        for area in axes if number else ():
            area.axvline(first, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        label = axes[0].text(first, 1.03, _short(stage.get("name", "")))
        label.set(va="bottom", transform=axes[0].get_xaxis_transform(), fontsize=7.5)
        label.set(color=MUTED, in_layout=False)


def _short(name: Any) -> str:
    """Returns a name that leaves room for the curves."""
    text = " ".join(str(name).split())
    return text if len(text) <= MAX_NAME else f"{text[: MAX_NAME - 1]}…"


def _logarithmic(area: Axes) -> None:
    area.set_yscale("log")
    # The default labels are formulas, which this page does not set.
    low, high = area.get_ylim()
    steps = (1.0,) if high > 300 * low else (1.0, 2.0, 5.0)
    area.yaxis.set_major_locator(LogLocator(subs=steps))
    area.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    area.yaxis.set_minor_formatter(NullFormatter())


def _legend(area: Axes) -> None:
    # Outside, at the right: no curve is ever covered.
    if area.get_legend_handles_labels()[0]:
        area.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
