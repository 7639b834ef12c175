"""Simulates the sources of labels: people, a classifier and a box annotator."""

import hashlib

import numpy as np

from jaxii.prepare.toy_regions.scenes import KINDS, LABELS, Scene, labels
from jaxii.prepare.toy_regions.shapes import drawing

# Share of the true labels of each kind that a person notes.
_THOROUGH = {"object": 0.86, "parent": 0.67, "context": 0.67, "attribute": 0.6}
_HASTY = {"object": 0.82, "parent": 0.12, "context": 0.24, "attribute": 0.18}
_FOUND_BY_MACHINE = 0.72
_FALSE_ALARMS = 1.3
# Labels that files describe and use but that are not trainable, as in real files.
UNTRAINABLE = ("Illustration", "Landscape", "Sky", "Kite", "Art")
BOX_COLUMNS = ("XMin", "XMax", "YMin", "YMax", "IsOccluded", "IsTruncated",
               "IsGroupOf", "IsDepiction", "IsInside")  # fmt: skip


def verified(scene: Scene, rng: np.random.Generator, *, thorough: bool) -> list[str]:
    """Returns the labels that a person notes: some of the true ones, at least one.

    Args:
      scene: The scene.
      rng: Chooses what is forgotten.
      thorough: Whether to note about 3 in 4 labels; otherwise fewer, and few parents,
        contexts and attributes.
    """
    shares = _THOROUGH if thorough else _HASTY
    noted = [name for name in labels(scene) if rng.random() < shares[KINDS[name]]]
    return noted or [scene.things[-1].name]


def guessed(scene: Scene, rng: np.random.Generator) -> list[tuple[str, float]]:
    """Returns labels with confidences of a classifier, 0.01 to 0.99.

    Most true labels are included, with higher confidences than false ones.
    """
    true = labels(scene)
    found = {n: rng.beta(5.0, 2.0) for n in true if rng.random() < _FOUND_BY_MACHINE}
    for place in rng.integers(len(LABELS), size=rng.poisson(_FALSE_ALARMS)):
        confidence = rng.beta(1.6, 3.2)
        if LABELS[int(place)] not in true:
            found[LABELS[int(place)]] = confidence
    return [(n, round(float(np.clip(p, 0.01, 0.99)), 2)) for n, p in found.items()]


def boxes(scene: Scene, width: int, height: int) -> list[tuple]:
    """Returns a row (name, *BOX_COLUMNS) per object; width and height are in pixels."""
    reach = min(width, height) / np.array((width, height))
    rows = []
    for thing in scene.things:
        points = np.vstack([s.points for s in drawing(thing.name, thing.variant)])
        points = points * (-1.0 if thing.mirrored else 1.0, 1.0)
        points = (thing.x, thing.y) + thing.half * reach * points
        low, high = points.min(axis=0), points.max(axis=0)
        cut = int(bool(low.min() < 0.0 or high.max() > 1.0))
        low, high = np.clip(low, 0.0, 1.0), np.clip(high, 0.0, 1.0)
        edges = (f"{edge:.4f}" for edge in (low[0], high[0], low[1], high[1]))
        rows.append((thing.name, *edges, 0, cut, 0, 0, 0))
    return rows


def label_code(name: str) -> str:
    """Returns a code like those of Open Images: /m/0 and six characters."""
    number = int(hashlib.sha1(name.encode()).hexdigest(), 16)
    letters = "0123456789bcdfghjklmnpqrstvwxyz_"
    return "/m/0" + "".join(letters[(number >> (5 * place)) & 31] for place in range(6))
