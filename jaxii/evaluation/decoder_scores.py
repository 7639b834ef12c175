"""Scores every decoder's predictions on a split, on the host.

Predictions are scored as submitted, with at least one label per image. Each process
decodes its own images; `add_processes` then adds the scores of all processes. Sums are
rounded once, so that they do not depend on the order of the images.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Bool, Float, Int, Shaped

from jaxii.decoding.decoders import Decoders, label_lists
from jaxii.evaluation.result import Bootstrap, DecoderMetrics, SliceMetrics
from jaxii.metrics import bootstrap
from jaxii.metrics.f_beta import f_beta

MOST_SHOWN = 9
"""Number of best images, and of worst images, that the report shows."""


@dataclass(frozen=True, kw_only=True)
class SplitTruth:
    """Labels, slices and groups of a split's images.

    Attributes:
      offsets: n + 1 CSR offsets of the n images in `label_ids`.
      label_ids: the labels present, without duplicates within an image.
      scored: whether the truth of an image is known; other images are not scored.
      slice_ids: index of each image's slice in `slices`.
      slices: names of the slices.
      groups: group of each image; intervals and standard errors are over groups.
    """

    offsets: Int[np.ndarray, " row"]
    label_ids: Int[np.ndarray, " entry"]
    scored: Bool[np.ndarray, " image"]
    slice_ids: Int[np.ndarray, " image"]
    slices: Sequence[str]
    groups: Shaped[np.ndarray, " image"]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @functools.cached_property
    def group_ids(self) -> Int[np.ndarray, " image"]:
        """Numbers of the groups in their sorted order; names take long to sort."""
        return np.unique(self.groups, return_inverse=True)[1]

    def labels(self, row: int) -> Int[np.ndarray, " label"]:
        """Returns the ids of the labels that are present in an image."""
        return self.label_ids[self.offsets[row] : self.offsets[row + 1]]

    def present(
        self, rows: Int[np.ndarray, " batch"], num_classes: int
    ) -> Bool[np.ndarray, "batch class"]:
        """Returns whether each label is present in each of the images."""
        found = np.zeros((len(rows), num_classes), bool)
        for place, row in enumerate(rows.tolist()):
            found[place, self.labels(row)] = True
        return found


class DecoderScores:
    """F2 of each image and counts of each label, for every decoder on one split.

    Memory: 8 bytes per image and decoder, and the predictions of the decoder in use;
    twice as much with `measure_offsets`.

    Args:
      decoders: fitted decoders.
      names: the decoders to score.
      in_use: the decoder of the predictions, slices and intervals.
      truth: labels of the split.
      measure_offsets: whether to compute expected F2, for `expected_f2_offsets`.

    Attributes, all of the decoder in use:
      predictions: label ids of each image, the most probable first.
      f2: F2 of each image; 0 for images not scored.
      labels: number of scored images for which each label is predicted.
      hits: number of images for which each label is predicted correctly.
    """

    def __init__(
        self,
        decoders: Decoders,
        names: Sequence[str],
        *,
        in_use: str,
        truth: SplitTruth,
        measure_offsets: bool = False,
    ):
        self.truth = truth
        self.predictions = [np.zeros(0, np.int64)] * len(truth)
        self._decoders, self._names, self._in_use = decoders, tuple(names), in_use
        num_classes = len(decoders.class_thresholds)
        self._f2 = {name: np.zeros(len(truth)) for name in names}
        self._labels = {name: np.zeros(num_classes, np.int64) for name in names}
        self._hits = {name: np.zeros(num_classes, np.int64) for name in names}
        measured = names if measure_offsets else ()
        self._expected = {name: np.zeros(len(truth)) for name in measured}
        self.f2, self.labels = self._f2[in_use], self._labels[in_use]
        self.hits = self._hits[in_use]

    def add(
        self,
        probs: Float[np.ndarray, "batch class"],
        embedding: Float[np.ndarray, "batch embed"] | None,
        rows: Int[np.ndarray, " batch"],
    ) -> None:
        """Decodes and scores a batch of this process; row -1 is padding.

        Images without known truth are only decoded, by the decoder in use.
        """
        for is_scored, names in ((True, self._names), (False, (self._in_use,))):
            places = np.flatnonzero(
                (rows >= 0) & (self.truth.scored[rows] == is_scored)
            )
            if not len(places):
                continue
            part = None if embedding is None else embedding[places]
            chosen = self._decoders.decisions(names, probs[places], part)
            lists = label_lists(chosen[self._in_use], probs[places])
            for row, label_ids in zip(rows[places], lists, strict=True):
                self.predictions[row] = label_ids
            if is_scored:
                self._score(rows[places], probs[places], chosen)

    def add_processes(self) -> None:
        """Adds the scores and predictions of all processes; every process calls it."""
        if jax.process_count() == 1:
            return
        # Exact: the scores of an image are 0 in all processes but one.
        for sums in (self._f2, self._expected, self._labels, self._hits):
            for own in sums.values():
                own[:] = _gather(own).sum(axis=0)
        lengths = _gather(np.array([len(ids) for ids in self.predictions], np.int64))
        own = np.concatenate([np.zeros(0, np.int64), *self.predictions])
        room = max(int(lengths.sum(axis=1).max()), 1)
        ids = _gather(np.pad(own, (0, room - len(own))))
        for of_process, found in zip(lengths, ids, strict=True):
            rows = np.flatnonzero(of_process)
            ends = np.cumsum(of_process[rows])
            for row, part in zip(rows, np.split(found, ends)[:-1], strict=True):
                self.predictions[row] = part

    def decoders(self) -> dict[str, DecoderMetrics]:
        """Returns the figures of each decoder over all scored images."""
        scored = self.truth.scored
        count = int(np.count_nonzero(scored))
        groups = self.truth.group_ids[scored]
        found: dict[str, DecoderMetrics] = {}
        for name, f2 in self._f2.items():
            mean, error = bootstrap.mean_and_error(f2[scored], groups)
            found[name] = DecoderMetrics(
                f2=mean,
                standard_error=error,
                coverage=int(np.count_nonzero(self._hits[name])),
                labels_per_image=int(self._labels[name].sum()) / count,
                parameter=self._decoders.parameter(name),
            )
        return found

    def expected_f2_offsets(self) -> dict[str, float]:
        """Returns mean F2 minus mean expected F2 by decoder; empty if not measured."""
        count = int(np.count_nonzero(self.truth.scored))
        return {
            name: (math.fsum(self._f2[name]) - math.fsum(expected)) / count
            for name, expected in self._expected.items()
        }

    def slices(self) -> dict[str, SliceMetrics]:
        """Returns the figures of each slice that has scored images."""
        truth = self.truth
        counts = np.bincount(truth.slice_ids[truth.scored], minlength=len(truth.slices))
        found: dict[str, SliceMetrics] = {}
        for i in np.flatnonzero(counts).tolist():
            rows = np.flatnonzero(truth.scored & (truth.slice_ids == i))
            f2, groups = self.f2[rows], truth.group_ids[rows]
            mean, error = bootstrap.mean_and_error(f2, groups)
            found[truth.slices[i]] = SliceMetrics(
                num_images=int(counts[i]),
                f2=mean,
                standard_error=error,
                interval=bootstrap.interval(f2, groups),
            )
        return found

    def interval(self) -> tuple[float, float] | None:
        """Returns the bootstrap interval of mean F2 over all scored images."""
        rows = np.flatnonzero(self.truth.scored)
        return bootstrap.interval(self.f2[rows], self.truth.group_ids[rows])

    def bootstrap(self) -> Bootstrap:
        """Returns how intervals are drawn: by image if each is its own group."""
        groups = self.truth.group_ids[self.truth.scored]
        are_alone = len(np.unique(groups)) == len(groups)
        return Bootstrap(
            by="image" if are_alone else "group",
            level=bootstrap.LEVEL,
            resamples=bootstrap.RESAMPLES,
        )

    def best_and_worst(self) -> tuple[list[int], list[int]]:
        """Returns rows of the scored images; see the function `best_and_worst`."""
        rows = np.flatnonzero(self.truth.scored)
        num_true = np.diff(self.truth.offsets)
        return best_and_worst(self.f2[rows], num_true[rows], rows)

    def _score(
        self,
        rows: Int[np.ndarray, " part"],
        probs: Float[np.ndarray, "part class"],
        chosen: Mapping[str, Bool[np.ndarray, "part class"]],
    ) -> None:
        present = self.truth.present(rows, len(self.hits))
        for name, predicted in chosen.items():
            self._f2[name][rows] = f_beta(predicted, present)
            self._labels[name] += predicted.sum(axis=0)
            self._hits[name] += (predicted & present).sum(axis=0)
        for name, expected in self._expected.items():
            found = self._decoders.expected_f2(name, probs, chosen[name])
            expected[rows] = found


def best_and_worst(
    f2: Float[np.ndarray, " image"],
    num_true: Int[np.ndarray, " image"],
    rows: Int[np.ndarray, " image"],
) -> tuple[list[int], list[int]]:
    """Returns the rows of the best images, best first, and of the worst, worst first.

    Ties are ordered by more labels, then by lower row. At most half of the images,
    rounded up, are among the worst, and no image is in both lists.
    """
    num_worst = min(MOST_SHOWN, -(-len(rows) // 2))
    worst = rows[np.lexsort((rows, -num_true, f2))[:num_worst]].tolist()
    ordered = rows[np.lexsort((rows, -num_true, -f2))[: 2 * MOST_SHOWN]].tolist()
    best = [row for row in ordered if row not in worst]
    return best[:MOST_SHOWN], worst


def _gather(own: Shaped[np.ndarray, " n"]) -> Shaped[np.ndarray, "process n"]:
    """Returns the arrays of all processes, which have the same shape."""
    # As bytes: JAX would round float64 and int64.
    gathered = multihost_utils.process_allgather(own.view(np.uint8))
    return np.ascontiguousarray(gathered).view(own.dtype)
