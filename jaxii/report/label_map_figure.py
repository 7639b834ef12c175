"""The map of the label embedding as SVG: every label a dot, the most frequent named.

Before it: `label_map` gave the places. After it: `page` places the drawing, and its
script finds the label under a pointer.
"""

from html import escape

import numpy as np
from jaxtyping import Float64, Int

from jaxii.evaluation.label_map import LabelMap
from jaxii.report.panels import short_name

WIDTH, MARGIN = 1000, 36
MOST_NAMED = 30
FEW = 300
"""Up to so many labels, dots are larger, no name lies on one, and all may be named."""
MAX_NAME = 26
# Of a letter and of a line of names, in the drawing's units.
_LETTER, _LINE = 7.2, 17.0
# Share of the labels that are more frequent than those of a size of dot.
_SIZES = (("large", 0.0, 0.04), ("medium", 0.04, 0.3), ("small", 0.3, 1.0))


def places(label_map: LabelMap) -> tuple[Int[np.ndarray, "label 2"], int]:
    """Returns where each label of the map lies in the drawing, and its height.

    One scale for both axes: distances are to be seen as they are.
    """
    low = label_map.places.min(axis=0)
    spans = np.maximum(label_map.places.max(axis=0) - low, 1e-9)
    inner = WIDTH - 2 * MARGIN
    height = int(np.clip(inner * spans[1] / spans[0], 360, 560))
    scale = min(inner / spans[0], height / spans[1])
    centred = (label_map.places - low - spans / 2) * scale
    middle = np.array([WIDTH / 2, height / 2 + MARGIN])
    # Upwards is positive on paper and negative on a screen.
    at = middle + centred * np.array([1, -1])
    return at.round().astype(np.int64), height + 2 * MARGIN


def draw(
    label_map: LabelMap, names: tuple[str, ...], counts: Float64[np.ndarray, " class"]
) -> str:
    """Returns the map as an SVG element.

    Args:
      label_map: of the label embedding.
      names: of all classes.
      counts: training images of all classes; the dots' sizes and who is named.
    """
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
    alt = f"Map of {len(at)} labels; the table below names the nearest of each."
    return (
        f'<svg class="map{few}" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{alt}">{"".join(paths)}'
        f'<g class="names">{"".join(texts)}</g><g class="marks"></g></svg>'
    )


def _named(at, order, label_map, names) -> list[tuple[int, float, float, str]]:
    """Returns the labels that have room for their names, the most frequent first."""
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
