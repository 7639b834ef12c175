"""The labels of a page: a map, and a table that a script sorts and searches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from jaxtyping import Float64, Int

from jaxii.data.labels import Vocabulary
from jaxii.evaluation.by_label import LabelTable
from jaxii.evaluation.details import LabelMap
from jaxii.report.formatting import number, plain, short_name

# With more labels than this, only the ends of the table are shown without the script.
MOST_WITHOUT_SCRIPT = 100
ENDS = 20

WIDTH, MARGIN = 1000, 36
MOST_NAMED = 30
# Up to this many labels, dots are larger, names avoid all dots, and all may be named.
FEW = 300
MAX_NAME = 26
# Width of a letter and height of a line, in the drawing's units.
_LETTER, _LINE = 7.2, 17.0
# Sizes of dots, each with its range of labels as shares; the most frequent come first.
_SIZES = (("large", 0.0, 0.04), ("medium", 0.04, 0.3), ("small", 0.3, 1.0))


@dataclass(frozen=True)
class Column:
    """One figure of every label; NaN where a label has none."""

    title: str
    values: Float64[np.ndarray, " class"]
    digits: int

    def text(self, label: int) -> str:
        """Returns the figure of a label as text."""
        return number(float(self.values[label]), f",.{self.digits}f")


@dataclass(frozen=True, kw_only=True)
class LabelPanel:
    """A table of labels, which the script sorts and searches.

    Attributes:
      columns: The columns, from left to right.
      ranked: The column that orders the labels in `ends`.
      caption: Text above the table.
      nearest: Nearest labels of each label; empty for no such column.
      label_map: Map drawn beside the table, with the same labels; None for none.
    """

    vocabulary: Vocabulary
    columns: Sequence[Column]
    ranked: Column
    caption: str
    nearest: Sequence[Sequence[int]] = ()
    label_map: LabelMap | None = None

    def data(self) -> Mapping[str, object]:
        """Returns the JSON that the script reads."""
        names, codes = self.vocabulary.descriptions, self.vocabulary.codes
        place: Mapping[str, object] = {}
        if self.label_map is not None:
            x, y = places(self.label_map)[0].T.tolist()
            cosines = self.label_map.cosines.astype(np.float64).round(2).tolist()
            ids = self.label_map.class_ids.tolist()
            place = {"ids": ids, "x": x, "y": y, "cosines": cosines}
        return {
            "names": names,
            "codes": [c if c != n else "" for c, n in zip(codes, names, strict=True)],
            "columns": [
                {"title": c.title, "digits": c.digits, "values": _numbers(c)}
                for c in self.columns
            ],
            "nearest": self.nearest,
            "map": place,
        }

    def ends(self) -> list[tuple[str, list[int]]]:
        """Returns titles and labels of the tables shown on paper or without script."""
        ranked = self.ranked
        known = np.flatnonzero(np.isfinite(ranked.values))
        order = known[np.argsort(-ranked.values[known], kind="stable")].tolist()
        if len(ranked.values) <= MOST_WITHOUT_SCRIPT:
            rest = np.flatnonzero(~np.isfinite(ranked.values)).tolist()
            return [(f"All labels, by {ranked.title}", order + rest)]
        return [
            (f"The {ENDS} labels with the largest {ranked.title}", order[:ENDS]),
            (f"The {ENDS} labels with the smallest {ranked.title}", order[-ENDS:]),
        ]


def of_run(labels: LabelTable, label_map: LabelMap | None) -> LabelPanel:
    """Returns the table of a run; `label_map` is None without a label embedding."""
    columns = [Column("Images, training", labels.train_images, 0)]
    # The last split comes first, because runs are judged by it.
    for split in reversed(list(labels.splits)):
        figures, name = labels.splits[split], plain(split)
        columns += [
            Column(f"Images, {name}", figures.support, 0),
            Column(f"AP, {name}", figures.average_precision, 3),
            Column(f"F2, {name}", figures.f2, 3),
        ]
    columns.append(Column("Own threshold", labels.thresholds, 2))
    nearest: list[list[int]] = []
    if label_map is not None:
        nearest = [[] for _ in labels.vocabulary.codes]
        for label, near in zip(label_map.class_ids, label_map.nearest, strict=True):
            nearest[label] = near.tolist()
    return LabelPanel(
        vocabulary=labels.vocabulary,
        columns=columns,
        ranked=next((c for c in columns if c.title.startswith("F2")), columns[0]),
        caption="Metrics of each label",
        nearest=nearest,
        label_map=label_map,
    )


def _numbers(column: Column) -> list[float | int | None]:
    rounded = np.round(column.values, column.digits).tolist()
    whole = column.digits == 0
    return [
        None if not np.isfinite(v) else int(v) if whole or v == int(v) else v
        for v in rounded
    ]


def places(label_map: LabelMap) -> tuple[Int[np.ndarray, "label 2"], int]:
    """Returns the place of each label in the drawing, and the drawing's height.

    Both axes have the same scale, so that distances keep their proportions.
    """
    low = label_map.places.min(axis=0)
    spans = np.maximum(label_map.places.max(axis=0) - low, 1e-9)
    inner = WIDTH - 2 * MARGIN
    height = int(np.clip(inner * spans[1] / spans[0], 360, 560))
    scale = min(inner / spans[0], height / spans[1])
    centered = (label_map.places - low - spans / 2) * scale
    middle = np.array([WIDTH / 2, height / 2 + MARGIN])
    # SVG's vertical axis points downwards.
    at = middle + centered * np.array([1, -1])
    return at.round().astype(np.int64), height + 2 * MARGIN


def draw_map(label_map: LabelMap | None, labels: LabelTable | None) -> str:
    """Returns the map as an SVG element; "" without one.

    The script finds the label under the pointer. The number of training images of a
    label decides the size of its dot and whether it is named.
    """
    if label_map is None or labels is None:
        return ""
    names, counts = labels.vocabulary.descriptions, labels.train_images
    at, height = places(label_map)
    order = np.argsort(-counts[label_map.class_ids], kind="stable")
    paths = []
    for name, first, last in _SIZES:
        part = order[round(first * len(order)) : round(last * len(order))]
        steps = "".join(f"M{x} {y}h0" for x, y in at[part].tolist())
        paths.insert(0, f'<path class="dots {name}" d="{steps}"/>')
    texts = [
        f'<text x="{x}" y="{y}" text-anchor="{anchor}">'
        f"{escape(short_name(names[label_map.class_ids[i]], MAX_NAME))}</text>"
        for i, x, y, anchor in _named(at, order, label_map, names)
    ]
    few = " few" if len(at) <= FEW else ""
    alt = f"Map of {len(at)} labels; the label table lists the nearest labels of each."
    return (
        f'<svg class="map{few}" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{alt}">{"".join(paths)}'
        f'<g class="names">{"".join(texts)}</g><g class="marks"></g></svg>'
    )


def _named(at, order, label_map, names) -> list[tuple[int, float, float, str]]:
    """Returns the labels whose names have room, the most frequent first."""
    is_few = len(at) <= FEW
    taken = [(x - 4.0, y - 4.0, x + 4.0, y + 4.0) for x, y in at.tolist() if is_few]
    found = []
    most = FEW if is_few else MOST_NAMED
    for i in order[: 4 * most].tolist():
        name = short_name(names[label_map.class_ids[i]], MAX_NAME)
        width, (x, y) = _LETTER * len(name), at[i].tolist()
        for anchor, left in (("start", x + 9), ("end", x - 9 - width)):
            box = (left, y - _LINE / 2, left + width, y + _LINE / 2)
            inside = box[0] >= 0 and box[2] <= WIDTH
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                edge = left if anchor == "start" else left + width
                found.append((i, edge, y + 4.5, anchor))
                break
        if len(found) == most:
            break
    return found


def _overlap(one, other) -> bool:
    apart = one[2] < other[0] or other[2] < one[0]
    return not (apart or one[3] < other[1] or other[3] < one[1])
