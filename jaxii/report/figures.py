"""The figures of the report: what is drawn of one run.

Before it: `runs` reads the history and `panels` has the parts. After it: `svg` makes
text of a drawing, and `page` places it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxii.report.panels import (
    WIDTH_INCHES,
    column,
    curve,
    draw_stages,
    legend,
    logarithmic,
    panels,
    short_name,
)
from jaxii.report.runs import Row, last_rows, number_or_none
from jaxii.report.svg import DASHES, MUTED, SERIES, STYLE, to_svg


def training_curves(
    history: Sequence[Row], stages: Sequence[Row], constant_f2: float | None
) -> str:
    """Draws objective, loss terms, F2, cross-entropy and term weights against step.

    Args:
        history: rows of the training history.
        stages: rows of the stage table; their first steps are drawn as borders.
        constant_f2: validation F2 of the best constant prediction; None: not drawn.

    Returns:
        SVG, or an empty string where there is nothing to draw.
    """
    train, evaluations = last_rows(history, "train"), last_rows(history, "evaluation")
    losses, weights = _terms(train, "loss/"), _terms(train, "weight/")
    kinds = (
        (
            "Objective (weighted sum of the terms)",
            bool(train),
            lambda area: curve(area, train, "objective", SERIES[0]),
        ),
        (
            "Loss terms, unweighted, on a logarithmic scale",
            bool(losses),
            lambda area: _plot_terms(area, train, "loss/", losses),
        ),
        (
            "F2 at its best threshold",
            bool(evaluations),
            lambda area: _plot_f2(area, evaluations, stages, constant_f2),
        ),
        (
            "Cross-entropy of an image (sum over the labels)",
            bool(_splits(evaluations, "bce")),
            lambda area: _plot_splits(area, evaluations, "bce"),
        ),
        (
            "Weights of the terms",
            bool(weights),
            lambda area: _plot_terms(area, train, "weight/", weights),
        ),
    )
    shown = [(title, draw) for title, has_data, draw in kinds if has_data]
    if not shown:
        return ""
    titles = [title for title, _ in shown]
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(titles, height=1.45)
        for area, (_, draw) in zip(axes, shown, strict=True):
            draw(area)
        draw_stages(axes, stages)
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
        figure, (area,) = panels(["Mean F2 of the images"], height=2.9)
        for i, (name, summary) in enumerate(curves.items()):
            x, y = summary["thresholds"], summary["f2_by_threshold"]
            area.plot(
                x,
                y,
                color=SERIES[i % 8],
                linestyle=DASHES[i % 4],
                label=short_name(name),
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
                area.axhline(floor, label=f"best constant, {short_name(name)}", **style)
        if threshold is not None:
            area.axvline(threshold, color=MUTED, linewidth=1.0, linestyle=":")
            # Towards the middle: no threshold pushes its label out of the frame.
            side, shift = ("left", 0.007) if threshold < 0.8 else ("right", -0.007)
            label = area.text(threshold + shift, 0.04, f"in use: {threshold:.3g}")
            label.set(color=MUTED, transform=area.get_xaxis_transform(), ha=side)
        area.set_xlim(0, 1)
        area.set_ylim(bottom=0)
        area.set_xlabel("threshold on the probability; a dot marks each split's best")
        legend(area)
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
            left.plot(means, frequencies, markersize=3, label=short_name(name), **style)
            right.plot(means, counts, markersize=3, label=short_name(name), **style)
        left.set(xlim=(0, 1), ylim=(0, 1), xlabel="mean probability of the bin")
        left.set_title("How often the label was present")
        logarithmic(right)
        right.set(xlim=(0, 1), xlabel="mean probability of the bin")
        right.set_title("Entries (image and label) in the bin")
        legend(right)
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
        # A weight of 0 is a line to be seen, not the frame's.
        area.set_ylim(bottom=-0.04 * area.get_ylim()[1])
    legend(area)


def _splits(rows: Sequence[Row], figure: str) -> list[str]:
    """Returns the splits of which a figure was recorded: validation first."""
    names = dict.fromkeys(key for row in rows for key in row)
    splits = [n.removesuffix(f"/{figure}") for n in names if n.endswith(f"/{figure}")]
    return sorted(splits, key=lambda n: (n == "train", n != "validation", n))


def _plot_splits(area: Axes, rows: Sequence[Row], figure: str) -> None:
    """Draws a figure of each split, and the gap between validation and training."""
    splits = _splits(rows, figure)
    for split in splits:
        is_train = split == "train"
        at = 2 if is_train else 0 if split == "validation" else 3
        name = "training, unaugmented" if is_train else split.replace("_", "-")
        style = {"linestyle": "--" if is_train else "-", "label": name}
        curve(area, rows, f"{split}/{figure}", SERIES[at], **style)
    if {"train", "validation"} <= set(splits):
        one, other = (column(rows, f"{n}/{figure}") for n in ("validation", "train"))
        style = {"color": SERIES[2], "alpha": 0.12, "linewidth": 0, "label": "the gap"}
        area.fill_between(column(rows, "step"), one, other, **style)
    legend(area)


def _plot_f2(
    area: Axes, rows: Sequence[Row], stages: Sequence[Row], floor: float | None
) -> None:
    _plot_splits(area, rows, "f2")
    if floor is not None:
        style = {"color": MUTED, "linewidth": 0.9, "linestyle": ":"}
        area.axhline(floor, label="best constant prediction", **style)
    best = [
        (s["best_step"], s["best_f2"])
        for s in stages
        if number_or_none(s.get("best_step")) is not None
        and number_or_none(s.get("best_f2")) is not None
    ]
    if best:
        x, y = zip(*best, strict=True)
        style = {"marker": "o", "linestyle": "none", "markersize": 5}
        area.plot(x, y, color=SERIES[1], label="best of the stage", **style)
    legend(area)
