"""The table of labels: what the script sorts and searches, and its ends for paper.

Before it: `by_label` has the figures. After it: `labels.html.j2` places them, for a run
and for a comparison.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from jaxii.evaluation.by_label import LabelTable
from jaxii.evaluation.label_map import LabelMap
from jaxii.report import label_map_figure
from jaxii.report.words import number

MOST_WITHOUT_SCRIPT = 100
"""With more labels than this, paper and pages without a script show the ends."""
ENDS = 20


@dataclass(frozen=True)
class Column:
    """One figure of every label.

    Attributes:
      title: of the column.
      values: NaN where a label has none.
      digits: after the point.
    """

    title: str
    values: Float64[np.ndarray, " class"]
    digits: int

    def text(self, label: int) -> str:
        """Returns the figure of a label as text."""
        return number(float(self.values[label]), f",.{self.digits}f")


def of_run(labels: LabelTable, label_map: LabelMap | None) -> dict[str, Any]:
    """Returns what the template needs for the table of a run.

    Args:
      labels: figures of each label.
      label_map: gives the nearest labels.
    """
    columns = [Column("Images, training", labels.train_images, 0)]
    # The last split is what a run is judged by: it comes first.
    for split in reversed(list(labels.splits)):
        figures, name = labels.splits[split], split.replace("_", " ")
        columns += [
            Column(f"Images, {name}", figures.support, 0),
            Column(f"AP, {name}", figures.average_precision, 3),
            Column(f"F2, {name}", figures.f2, 3),
        ]
    columns.append(Column("Own threshold", labels.thresholds, 2))
    nearest: list[list[int]] = []
    place: dict[str, Any] = {}
    if label_map is not None:
        nearest = [[] for _ in labels.vocabulary.codes]
        for label, near in zip(label_map.class_ids, label_map.nearest, strict=True):
            nearest[label] = near.tolist()
        at, _ = label_map_figure.places(label_map)
        x, y = at.T.tolist()
        place = {
            "ids": label_map.class_ids.tolist(),
            "x": x,
            "y": y,
            "cosines": np.round(label_map.cosines.astype(np.float64), 2).tolist(),
        }
    ranked = next((c for c in columns if c.title.startswith("F2")), columns[0])
    return make_table(
        labels.vocabulary.descriptions,
        labels.vocabulary.codes,
        columns,
        ranked=ranked,
        nearest=nearest,
        place=place,
        caption="Figures of each label",
    )


def make_table(
    names: Sequence[str],
    codes: Sequence[str],
    columns: Sequence[Column],
    *,
    ranked: Column,
    caption: str,
    nearest: Sequence[Sequence[int]] = (),
    place: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns what the template needs for a table of labels.

    Args:
      names: one a label.
      codes: likewise.
      columns: figures, from the left.
      ranked: the one by which the ends are taken.
      caption: what the table is of.
      nearest: labels near each; empty: no such column.
      place: what the script needs of a map; see `label_map_figure`.
    """
    data = {
        "names": list(names),
        "codes": [c if c != n else "" for c, n in zip(codes, names, strict=True)],
        "columns": [
            {"title": c.title, "digits": c.digits, "values": _numbers(c)}
            for c in columns
        ],
        "nearest": [list(near) for near in nearest],
        "map": dict(place or {}),
    }
    return {
        "names": list(names),
        "codes": list(codes),
        "columns": columns,
        "nearest": nearest,
        "caption": caption,
        "ends": _ends(ranked),
        "data": data,
    }


def _numbers(column: Column) -> list[float | int | None]:
    rounded = np.round(column.values, column.digits).tolist()
    whole = column.digits == 0
    return [
        None if not np.isfinite(v) else int(v) if whole or v == int(v) else v
        for v in rounded
    ]


def _ends(ranked: Column) -> list[tuple[str, list[int]]]:
    """Returns titles and labels of the tables that are there without a script."""
    known = np.flatnonzero(np.isfinite(ranked.values))
    order = known[np.argsort(-ranked.values[known], kind="stable")].tolist()
    if len(ranked.values) <= MOST_WITHOUT_SCRIPT:
        rest = np.flatnonzero(~np.isfinite(ranked.values)).tolist()
        return [(f"All labels, by {ranked.title}", order + rest)]
    return [
        (f"The {ENDS} labels with the largest {ranked.title}", order[:ENDS]),
        (f"The {ENDS} labels with the smallest {ranked.title}", order[-ENDS:]),
    ]
