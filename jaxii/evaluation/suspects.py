"""Ranks labels that are likely wrong or missing, by confident learning.

Needs probabilities from models that were not trained on the ranked images.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64, Shaped

from jaxii.data.labels import Vocabulary
from jaxii.evaluation.by_label import as_cell
from jaxii.storage import AnyPath, write_beside

HEADER = (
    *("image_id", "label", "name", "given", "probability", "score"),
    *("split", "domain"),
)
_DIGITS = 4


@dataclass(frozen=True, kw_only=True)
class Suspects:
    """Labels of images that are likely wrong or missing, the most likely first.

    Attributes:
      rows: row of the image of each suspect.
      label_ids: id of its label.
      given: whether the image has the label, which is then likely wrong; otherwise it
        is likely missing.
      probs: out-of-sample probability of the label.
      scores: 0 to 1, comparable between labels; see `rank`.
    """

    rows: Int64[np.ndarray, " suspect"]
    label_ids: Int64[np.ndarray, " suspect"]
    given: Bool[np.ndarray, " suspect"]
    probs: Float32[np.ndarray, " suspect"]
    scores: Float[np.ndarray, " suspect"]

    def __len__(self) -> int:
        return len(self.rows)

    def first(self, number: int) -> "Suspects":
        """Returns the most likely suspects, at most `number`."""
        return Suspects(
            **{name: values[:number] for name, values in vars(self).items()}
        )


def rank(
    probs: Float32[np.ndarray, "image class"],
    targets: Bool[np.ndarray, "image class"],
    known: Bool[np.ndarray, "image class"],
) -> Suspects:
    """Returns the labels that contradict a model's probabilities.

    Each label is treated alone, as two classes, present and absent. The mean
    probability of a class over the images that are given the class is subtracted from
    its probabilities, because confidence differs between classes. An entry is suspect
    if the class that it is not given has the larger difference. The score is this
    difference as a probability: the larger mean is added to both differences, and both
    are divided by their sum. A label that no or every image has is never suspect.

    Memory: images x 30 bytes, in addition to the arguments and the result.

    Args:
      probs: out-of-sample probabilities, in [0, 1].
      targets: whether the image is given the label.
      known: whether the entry counts; other entries are never suspect.

    Source: Northcutt, Jiang and Chuang 2021, "Confident Learning", section 3 (means as
      thresholds); Thyagarajan et al. 2022,
      "Identifying Incorrect Annotations in Multi-Label Classification Data" (label by
      label). A score is 1 minus that of cleanlab's `get_label_quality_scores` with
      `adjust_pred_probs`.
    """
    found = [
        _rank_label(probs[:, label], targets[:, label], known[:, label])
        for label in range(probs.shape[1])
    ]
    rows = np.concatenate([rows for rows, _ in found])
    scores = np.concatenate([scores for _, scores in found])
    lengths = [len(rows) for rows, _ in found]
    label_ids = np.repeat(np.arange(len(found), dtype=np.int64), lengths)
    order = np.lexsort((label_ids, rows, -scores))
    rows, label_ids = rows[order], label_ids[order]
    return Suspects(
        rows=rows,
        label_ids=label_ids,
        given=targets[rows, label_ids],
        probs=probs[rows, label_ids],
        scores=scores[order],
    )


def _rank_label(
    probs: Float32[np.ndarray, " image"],
    targets: Bool[np.ndarray, " image"],
    known: Bool[np.ndarray, " image"],
) -> tuple[Int64[np.ndarray, " suspect"], Float[np.ndarray, " suspect"]]:
    """Returns the suspect rows of one label, and their scores."""
    rows = np.flatnonzero(known)
    given = targets[rows]
    if given.all() or not given.any():
        return rows[:0], np.zeros(0)
    present = probs[rows].astype(np.float64)
    mean_present, mean_absent = present[given].mean(), (1.0 - present[~given]).mean()
    margin = (present - mean_present) - (1.0 - present - mean_absent)
    margin[given] *= -1.0
    suspect = margin > 0.0
    # The sum that `rank` divides by, which is the same for all images.
    total = 1.0 + abs(mean_present - mean_absent)
    return rows[suspect], 0.5 + 0.5 * margin[suspect] / total


def save(
    suspects: Suspects,
    path: AnyPath,
    *,
    vocabulary: Vocabulary,
    image_ids: Shaped[np.ndarray, " image"],
    splits: Sequence[str],
    domains: Shaped[np.ndarray, " image"],
) -> None:
    """Writes a CSV file with the columns `HEADER`, a row per suspect, atomically.

    Text cells are written as by `as_cell`.

    Args:
      splits: split of each image, in the run that predicted it.
      domains: domain of each image.
    """

    def write(file: TextIO) -> None:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEADER)
        for place in range(len(suspects)):
            row, label = int(suspects.rows[place]), int(suspects.label_ids[place])
            cells = (
                as_cell(image_ids[row]),
                as_cell(vocabulary.codes[label]),
                as_cell(vocabulary.descriptions[label]),
                int(suspects.given[place]),
                round(float(suspects.probs[place]), _DIGITS),
                round(float(suspects.scores[place]), _DIGITS),
                splits[row],
                as_cell(domains[row]),
            )
            writer.writerow(cells)

    write_beside(path, write)
