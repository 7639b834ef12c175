"""What the answers of every decoder are worth on a split, summed as batches come.

Before it: `decoders` were fitted on a split that may be seen. After it: `metrics.json`
and the report compare them. Answers are scored as they would be submitted, with at
least one label an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from jaxii.decoding.decoders import Decoders
from jaxii.evaluation.by_label import SplitFigures, split_figures
from jaxii.evaluation.summary import mean_and_error
from jaxii.metrics import bootstrap
from jaxii.metrics.by_image import ImageScores
from jaxii.metrics.streaming import Accumulators


@dataclass
class _Sums:
    f2: Float[np.ndarray, " group"]
    f2_squared: Float[np.ndarray, " group"]
    labels: Int[np.ndarray, " class"]
    hits: Int[np.ndarray, " class"]


class Scores:
    """Sums over the images of one split, for each decoder.

    Args:
      decoders: fitted.
      names: of those to score.
      in_use: the one whose answers are the result; its images are kept apart too.
      offsets: n + 1 starts of the split's images (CSR).
      label_ids: the labels present, without duplicates within an image.
      scored: whether the truth of each image is known; the others count nowhere.
      slice_ids: of each image.
      slices: their names.
      groups: of each image, the images of one thing; intervals draw whole ones.
    """

    def __init__(
        self,
        decoders: Decoders,
        names: Sequence[str],
        *,
        in_use: str,
        offsets: Int[np.ndarray, " row"],
        label_ids: Int[np.ndarray, " entry"],
        scored: Bool[np.ndarray, " image"],
        slice_ids: Int[np.ndarray, " image"],
        slices: Sequence[str],
        groups: Shaped[np.ndarray, " image"],
    ):
        self._decoders = decoders
        self._offsets, self._label_ids, self._scored = offsets, label_ids, scored
        self._slice_ids, self._slices = slice_ids, tuple(slices)
        self._in_use, self._groups = in_use, groups
        self.images = ImageScores(len(offsets) - 1)
        num_slices, num_classes = len(slices), len(decoders.class_thresholds)
        self._num_images = np.zeros(num_slices, np.int64)
        self._sums = {
            name: _Sums(
                f2=np.zeros(num_slices),
                f2_squared=np.zeros(num_slices),
                labels=np.zeros(num_classes, np.int64),
                hits=np.zeros(num_classes, np.int64),
            )
            for name in names
        }

    def add(
        self,
        probs: Float[np.ndarray, "batch class"],
        embedding: Float[np.ndarray, "batch embed"] | None,
        rows: Int[np.ndarray, " batch"],
    ) -> None:
        """Takes a batch; row -1 is padding, and images not scored are skipped."""
        kept = np.flatnonzero((rows >= 0) & self._scored[rows])
        if not len(kept):
            return
        probs, rows = probs[kept], rows[kept]
        embedding = None if embedding is None else embedding[kept]
        present = self._present(rows, probs.shape[1])
        num_true = present.sum(axis=1)
        slice_ids, num_slices = self._slice_ids[rows], len(self._slices)
        self._num_images += np.bincount(slice_ids, minlength=num_slices)
        answers = self._decoders.answers(self._sums, probs, embedding)
        for name, chosen in answers.items():
            sums, right = self._sums[name], chosen & present
            num_chosen = chosen.sum(axis=1)
            f2 = 5 * right.sum(axis=1) / np.maximum(4 * num_true + num_chosen, 1)
            sums.f2 += np.bincount(slice_ids, f2, minlength=num_slices)
            sums.f2_squared += np.bincount(slice_ids, f2**2, minlength=num_slices)
            sums.labels += chosen.sum(axis=0)
            sums.hits += right.sum(axis=0)
            if name == self._in_use:
                self.images.add(rows, f2, num_true, chosen, probs)

    def figures(self) -> dict[str, dict[str, float | int | None]]:
        """Returns each decoder's figures over all images, and its parameter."""
        count = int(self._num_images.sum())
        found = {}
        for name, sums in self._sums.items():
            f2, error = mean_and_error(count, sums.f2.sum(), sums.f2_squared.sum())
            found[name] = {
                "f2": f2,
                "standard_error": error,
                "coverage": int(np.count_nonzero(sums.hits)),
                "labels_per_image": int(sums.labels.sum()) / count,
                **self._decoders.parameter(name),
            }
        return found

    def summary(self) -> dict[str, Any]:
        """Returns the figures of a split that the answers of the decoder in use decide,
        and how many of its images have no known truth and are in none of them.

        Intervals are bootstrapped over groups, which are images where each image is a
        group of its own; `bootstrap` of the figures says so.
        """
        in_use = self._in_use
        sums, all_figures = self._sums[in_use], self.figures()
        scored_groups = self._groups[self._scored]
        by_slice = {}
        for i in np.flatnonzero(self._num_images):
            count = int(self._num_images[i])
            f2, error = mean_and_error(count, sums.f2[i], sums.f2_squared[i])
            by_slice[self._slices[i]] = {
                "num_images": count,
                "f2": f2,
                "standard_error": error,
                "interval": self._interval(self._slice_ids == i),
            }
        are_alone = len(set(scored_groups)) == len(scored_groups)
        return {
            "num_images_without_truth": int(np.count_nonzero(~self._scored)),
            "f2": all_figures[in_use]["f2"],
            "interval": self._interval(self._scored),
            "bootstrap": {
                "by": "image" if are_alone else "group",
                "level": bootstrap.LEVEL,
                "resamples": bootstrap.RESAMPLES,
            },
            "coverage": all_figures[in_use]["coverage"],
            "labels_per_image_predicted": all_figures[in_use]["labels_per_image"],
            "slices": by_slice,
            "worst_slice": min(by_slice, key=lambda name: by_slice[name]["f2"]),
            "decoders": all_figures,
        }

    def by_label(self, sums: Accumulators) -> SplitFigures:
        """Returns the figures of each label, of the answers of the decoder in use.

        Args:
          sums: of the same split.
        """
        of_decoder = self._sums[self._in_use]
        return split_figures(
            sums,
            hits=of_decoder.hits,
            predicted=of_decoder.labels,
            support=np.bincount(self._label_ids, minlength=len(of_decoder.hits)),
        )

    def true_labels(self, row: int) -> Int[np.ndarray, " label"]:
        """Returns the labels that an image has."""
        return self._label_ids[self._offsets[row] : self._offsets[row + 1]]

    def slice_of(self, row: int) -> str:
        """Returns the name of an image's slice."""
        return self._slices[self._slice_ids[row]]

    def _interval(self, among: Bool[np.ndarray, " image"]) -> list[float] | None:
        rows = np.flatnonzero(among & self._scored)
        found = bootstrap.interval(self.images.f2[rows], self._groups[rows])
        return None if found is None else list(found)

    def _present(
        self, rows: Int[np.ndarray, " image"], num_classes: int
    ) -> Bool[np.ndarray, "image class"]:
        lengths = np.diff(self._offsets)[rows]
        image = np.repeat(np.arange(len(rows)), lengths)
        before = np.cumsum(lengths) - lengths
        entry = np.arange(lengths.sum()) + np.repeat(
            self._offsets[rows] - before, lengths
        )
        present = np.zeros((len(rows), num_classes), bool)
        present[image, self._label_ids[entry]] = True
        return present
