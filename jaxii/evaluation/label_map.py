"""The label embedding as a person can look at it: two axes, and each label's nearest.

Before it: the vectors that PMI gave the labels. After it: the report draws the map.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int

NUM_NEAREST = 3
_ROWS = 512


@dataclass(frozen=True, kw_only=True)
class LabelMap:
    """Places of the labels that occur together with others.

    Attributes:
      class_ids: of the labels on the map, ascending.
      places: on the first two principal axes of the unit vectors.
      shares: of the vectors' variance that each axis has, 0 to 1.
      nearest: class ids of the labels of the largest cosine, the nearest first.
      cosines: theirs.
    """

    class_ids: Int[np.ndarray, " label"]
    places: Float[np.ndarray, "label 2"]
    shares: tuple[float, float]
    nearest: Int[np.ndarray, "label near"]
    cosines: Float[np.ndarray, "label near"]


def label_map(vectors: Float32[np.ndarray, "class embed"]) -> LabelMap | None:
    """Returns the map of a label embedding; None for fewer than three labels on it.

    Unit vectors, as both the decoder and the nearest labels compare by cosine. Cost:
    labels squared x embed; memory 512 x labels at a time; 7,178 labels take seconds.

    Args:
      vectors: one a class; zero where it occurs with no other, and then not on the map.
    """
    lengths = np.linalg.norm(vectors, axis=1)
    class_ids = np.flatnonzero(lengths)
    if len(class_ids) < 3:
        return None
    unit = vectors[class_ids] / lengths[class_ids, None]
    centred = (unit - unit.mean(axis=0)).astype(np.float64)
    variances, axes = np.linalg.eigh(centred.T @ centred)
    # An embedding of one number has one axis; the map's other one is then flat.
    axes = axes[:, ::-1][:, :2]
    axes = np.pad(axes, ((0, 0), (0, 2 - axes.shape[1])))
    # An eigenvector has no sign of its own: a map is not to be another's mirror image.
    largest = np.abs(axes).argmax(axis=0)
    axes = axes * np.where(axes[largest, [0, 1]] < 0, -1.0, 1.0)
    shares = np.append(variances[::-1], 0.0)[:2] / max(variances.sum(), 1e-12)
    nearest, cosines = _nearest(unit)
    return LabelMap(
        class_ids=class_ids,
        places=centred @ axes,
        shares=(float(shares[0]), float(shares[1])),
        nearest=class_ids[nearest],
        cosines=cosines,
    )


def _nearest(
    unit: Float32[np.ndarray, "label embed"],
) -> tuple[Int[np.ndarray, "label near"], Float[np.ndarray, "label near"]]:
    count = min(NUM_NEAREST, len(unit) - 1)
    places, cosines = [], []
    for start in range(0, len(unit), _ROWS):
        similar = unit[start : start + _ROWS] @ unit.T
        rows = np.arange(len(similar))
        similar[rows, start + rows] = -np.inf
        best = np.argpartition(-similar, count - 1, axis=1)[:, :count]
        found = np.take_along_axis(similar, best, axis=1)
        order = np.argsort(-found, axis=1, kind="stable")
        places.append(np.take_along_axis(best, order, axis=1))
        cosines.append(np.take_along_axis(found, order, axis=1))
    return np.concatenate(places), np.concatenate(cosines)
