"""Parts of the report beyond `metrics.json`: label figures, label map, images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int

from jaxii.data.labels import Vocabulary
from jaxii.evaluation.by_label import LabelTable
from jaxii.evaluation.decoder_scores import DecoderScores

NUM_NEAREST = 3
_ROWS = 512


@dataclass(frozen=True, kw_only=True)
class ShownImage:
    """An image with its labels and its prediction.

    Attributes:
      slice: name of the slice.
      f2: F2 of the prediction.
      right: names of labels predicted correctly, the most probable first.
      missed: names of labels present and not predicted.
      wrong: names of labels predicted and not present, the most probable first.
      jpeg: a small copy of the image; empty if it cannot be read.
    """

    image_id: str
    slice: str
    f2: float
    right: tuple[str, ...]
    missed: tuple[str, ...]
    wrong: tuple[str, ...]
    jpeg: bytes


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """The images of a split with the best and worst predictions; see
    `decoder_scores.best_and_worst`."""

    split: str
    best: tuple[ShownImage, ...]
    worst: tuple[ShownImage, ...]


@dataclass(frozen=True, kw_only=True)
class LabelMap:
    """Map of the labels that occur together with others.

    Attributes:
      class_ids: the labels on the map, ascending.
      places: coordinates on the first two principal axes of the unit vectors.
      shares: share of the variance on each axis, 0 to 1.
      nearest: class ids of the labels with the largest cosine, the nearest first.
      cosines: cosines of `nearest`.
    """

    class_ids: Int[np.ndarray, " label"]
    places: Float[np.ndarray, "label 2"]
    shares: tuple[float, float]
    nearest: Int[np.ndarray, "label near"]
    cosines: Float[np.ndarray, "label near"]


@dataclass(frozen=True, kw_only=True)
class StageRow:
    """A stage that has begun, with its best checkpoint.

    Attributes:
      terms: loss term -> its weights at the start and at the end.
      enters_from: description of the checkpoint that the stage starts from.
      train_step_compilations: number of compilations of its train step.
      best_f2: F2 at `best_step`, on the split that chooses checkpoints, or None.
    """

    name: str
    first_step: int
    last_step: int
    embedding_head: bool
    terms: Mapping[str, Sequence[float]]
    enters_from: str
    train_step_compilations: int
    best_step: int
    best_f2: float | None


@dataclass(frozen=True, kw_only=True)
class Details:
    """Parts of a report beyond its figures.

    Attributes:
      labels: figures of each label.
      label_map: map of the label embedding.
      gallery: images of the last split with labels.
    """

    labels: LabelTable | None = None
    label_map: LabelMap | None = None
    gallery: Gallery | None = None


def make_gallery(
    split: str,
    scores: DecoderScores,
    *,
    vocabulary: Vocabulary,
    image_ids: Sequence[str] | np.ndarray,
    thumbnail: Callable[[int], bytes],
) -> Gallery:
    """Returns the best and worst images of a split.

    Args:
      scores: scores of the split, all processes added.
      image_ids: one per row.
      thumbnail: returns a small JPEG of a row, or raises ValueError.
    """

    def shown(row: int) -> ShownImage:
        try:
            jpeg = thumbnail(row)
        except ValueError:
            jpeg = b""
        true, given = scores.truth.labels(row), scores.predictions[row]
        return ShownImage(
            image_id=str(image_ids[row]),
            slice=scores.truth.slices[int(scores.truth.slice_ids[row])],
            f2=float(scores.f2[row]),
            right=tuple(vocabulary.names(given[np.isin(given, true)])),
            missed=tuple(vocabulary.names(true[~np.isin(true, given)])),
            wrong=tuple(vocabulary.names(given[~np.isin(given, true)])),
            jpeg=jpeg,
        )

    best, worst = scores.best_and_worst()
    return Gallery(
        split=split, best=tuple(map(shown, best)), worst=tuple(map(shown, worst))
    )


def label_map(vectors: Float32[np.ndarray, "class embed"]) -> LabelMap | None:
    """Returns the map of a label embedding; None if it has fewer than three labels.

    Cost: labels squared x embed, seconds for 7,178 labels. Memory: 512 x labels.

    Args:
      vectors: embedding of each class; classes with a zero vector are left out.
    """
    lengths = np.linalg.norm(vectors, axis=1)
    class_ids = np.flatnonzero(lengths)
    if len(class_ids) < 3:
        return None
    unit = vectors[class_ids] / lengths[class_ids, None]
    centred = (unit - unit.mean(axis=0)).astype(np.float64)
    variances, axes = np.linalg.eigh(centred.T @ centred)
    # A one-dimensional embedding has one axis; the second axis of the map is then 0.
    axes = axes[:, ::-1][:, :2]
    axes = np.pad(axes, ((0, 0), (0, 2 - axes.shape[1])))
    # The sign of an eigenvector is arbitrary: fix it, or maps are mirrored at random.
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
    places: list[np.ndarray] = []
    cosines: list[np.ndarray] = []
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
