"""What the report shows beyond the figures of `metrics.json`: labels, map and images.

Before it: `scores` of every split. After it: `report` draws it. Nothing in here grows
with the number of images.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxii.data.labels import Vocabulary
from jaxii.evaluation.by_label import LabelTable
from jaxii.evaluation.decoder_scores import Scores
from jaxii.evaluation.label_map import LabelMap
from jaxii.metrics.by_image import Answered


@dataclass(frozen=True, kw_only=True)
class ShownImage:
    """An image with its labels and its answer.

    Attributes:
      image_id: of the data set.
      slice: its name.
      f2: of the answer.
      right: names of the answer's labels that it has, the most probable first.
      missed: of the labels that it has and the answer has not.
      wrong: of the answer's labels that it has not, the most probable first.
      jpeg: a small copy of the image; empty where it cannot be read.
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
    """The images of a split that were answered best and worst.

    Attributes:
      split: its name.
      best: best first; of equal F2 those with more labels.
      worst: worst first; likewise.
    """

    split: str
    best: tuple[ShownImage, ...]
    worst: tuple[ShownImage, ...]


@dataclass(frozen=True, kw_only=True)
class Details:
    """What an evaluation knows beyond its figures; each part may be absent.

    Attributes:
      labels: figures of each label.
      label_map: of the label embedding.
      gallery: images of the last split that has labels.
    """

    labels: LabelTable | None = None
    label_map: LabelMap | None = None
    gallery: Gallery | None = None


def make_gallery(
    split: str,
    scores: Scores,
    *,
    vocabulary: Vocabulary,
    image_ids: Sequence[str] | np.ndarray,
    thumbnail: Callable[[int], bytes],
) -> Gallery:
    """Returns the best and worst images of a split.

    Args:
      split: its name.
      scores: of all its images.
      vocabulary: gives the names.
      image_ids: one a row.
      thumbnail: the small JPEG of a row; ValueError where it cannot be decoded.
    """

    def shown(image: Answered) -> ShownImage:
        try:
            jpeg = thumbnail(image.row)
        except ValueError:
            jpeg = b""
        true, given = scores.true_labels(image.row), image.label_ids
        return ShownImage(
            image_id=str(image_ids[image.row]),
            slice=scores.slice_of(image.row),
            f2=image.f2,
            right=tuple(vocabulary.names(given[np.isin(given, true)])),
            missed=tuple(vocabulary.names(true[~np.isin(true, given)])),
            wrong=tuple(vocabulary.names(given[~np.isin(given, true)])),
            jpeg=jpeg,
        )

    return Gallery(
        split=split,
        best=tuple(map(shown, scores.images.best())),
        worst=tuple(map(shown, scores.images.worst())),
    )
