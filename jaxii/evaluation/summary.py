"""The numbers people read, from the sums of one split.

Before it: `metrics` summed the split on the device and `thresholds` chose the decoders
on another one. After it: the evaluation result, history and report carry the dict.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxii.decoding.thresholds import (
    DecoderChoice,
    best_threshold,
    choose,
    f2_by_threshold,
)
from jaxii.errors import InputError
from jaxii.metrics.exact_sum import value
from jaxii.metrics.histogram import (
    PRESENT,
    average_precision,
    bin_edges,
    counts_at_least,
    cross_entropy,
    reliability_edges,
)
from jaxii.metrics.streaming import BETA_SQUARED, Accumulators


def summarise(
    acc: Accumulators, slices: Sequence[str], *, choice: DecoderChoice | None = None
) -> dict[str, Any]:
    """Returns every evaluation figure of one split as plain numbers, lists and dicts.

    Args:
        acc: the sums of the split, all devices and processes added.
        slices: the slices' names, in the order of the slice ids.
        choice: the decoders' parameters, chosen on another split; None: on this one,
            which flatters it, and `chosen_here` in the result says so.

    Returns:
        F2 is the mean over images unless named otherwise; `macro_f2` counts a class
        never present nor predicted as 0; `map` is over classes with positives (0 if
        none); `bce` is the cross-entropy of an image, summed over classes; slices
        without images are left out; the standard error of a single image is given as
        its bound, 0.5.

    Raises:
        InputError: no image, a threshold off the grid, or other slices than summed.
    """
    chosen_here = choice is None
    choice = choose(acc) if choice is None else choice
    num_slices = len(np.asarray(acc.sums.num_images))
    if len(slices) != num_slices:
        raise InputError(
            f"{len(slices)} slice names for metrics of {num_slices} slices; they must "
            "agree; evaluate again with the dataset's own slice list"
        )
    num_images = int(np.asarray(acc.sums.num_images).sum(dtype=np.int64))
    if num_images == 0:
        raise InputError(
            "an evaluation needs at least 1 image, and this split gave 0; name a split "
            "that has images"
        )
    f2s = f2_by_threshold(acc)
    best, best_f2 = best_threshold(acc.thresholds, f2s)
    at = threshold_index(acc.thresholds, choice.threshold)
    by_slice = _by_slice(acc, slices, at)
    recall = value(acc.sums.recall) / max(int(acc.sums.num_with_truth), 1)
    summary: dict[str, Any] = {
        "num_images": num_images,
        "f2": float(f2s[at]),
        "threshold": choice.threshold,
        "chosen_here": chosen_here,
        "thresholds": list(acc.thresholds),
        "f2_by_threshold": f2s.tolist(),
        "best_threshold": best,
        "best_f2": best_f2,
        "recall_at_5": float(recall[:5][-1]),
        "slices": by_slice,
        "worst_slice": min(by_slice, key=lambda name: by_slice[name]["f2"]),
    }
    return summary | _from_histogram(acc, at, num_images)


def threshold_index(thresholds: Sequence[float], threshold: float) -> int:
    """Returns where the threshold lies on the grid.

    Raises:
        InputError: it is not on the grid.
    """
    distance = np.abs(np.asarray(thresholds) - threshold)
    index = int(np.argmin(distance))
    if distance[index] > 1e-6:
        raise InputError(
            f"threshold {threshold} is not on the evaluation grid of {len(thresholds)} "
            f"values from {thresholds[0]} to {thresholds[-1]}; the nearest is "
            f"{thresholds[index]}"
        )
    return index


def mean_and_error(count: int, total: float, squares: float) -> tuple[float, float]:
    """Returns the mean of numbers in [0, 1] and its standard error.

    Args:
        count: of the numbers, at least 1; the error of a single one is its bound, 0.5.
        total: their sum.
        squares: the sum of their squares.
    """
    mean = float(total) / count
    spread = max(float(squares) / count - mean**2, 0.0)
    return mean, float(np.sqrt(spread / (count - 1))) if count > 1 else 0.5


def _by_slice(
    acc: Accumulators, slices: Sequence[str], at: int
) -> dict[str, dict[str, float | int]]:
    counts = np.asarray(acc.sums.num_images, np.int64)
    sums = value(acc.sums.f2)[:, at]
    squares = value(acc.sums.f2_squared)[:, at]
    table = {}
    for name, count, total, square in zip(slices, counts, sums, squares, strict=True):
        if count == 0:
            continue
        mean, error = mean_and_error(int(count), float(total), float(square))
        table[name] = {"num_images": int(count), "f2": mean, "standard_error": error}
    return table


def _from_histogram(acc: Accumulators, at: int, num_images: int) -> dict[str, Any]:
    """Returns the figures that are read from counts by class and probability bin."""
    histogram = np.asarray(acc.sums.histogram)
    edges = bin_edges(acc.thresholds, histogram.shape[1])
    grid = np.asarray(acc.thresholds, np.float32)[at : at + 1]
    counts = counts_at_least(histogram, edges, grid)[..., 0]
    tp, predicted = counts[PRESENT], counts.sum(axis=0)
    num_true = histogram[PRESENT].sum(axis=1, dtype=np.int64)
    precisions = average_precision(histogram)
    ranked = ~np.isnan(precisions)
    reliability, error = _calibration(acc, histogram, edges)
    return {
        "micro_f2": float(_f2(tp.sum(), predicted.sum(), num_true.sum())),
        "macro_f2": float(np.mean(_f2(tp, predicted, num_true))),
        "map": float(precisions[ranked].mean()) if ranked.any() else 0.0,
        "map_num_classes": int(ranked.sum()),
        "coverage": int(np.count_nonzero(tp)),
        "labels_per_image_predicted": float(predicted.sum() / num_images),
        "labels_per_image_true": float(num_true.sum() / num_images),
        "bce": cross_entropy(histogram, edges) / num_images,
        "calibration_error": error,
        "reliability": reliability,
    }


def _f2(tp: Any, predicted: Any, num_true: Any) -> Any:
    both = BETA_SQUARED * num_true + predicted
    return (1 + BETA_SQUARED) * tp / np.maximum(both, 1)


def _calibration(
    acc: Accumulators,
    histogram: Int[np.ndarray, "kind class bin"],
    edges: Float[np.ndarray, " edge"],
) -> tuple[list[list[float | int]], float]:
    """Returns [mean probability, frequency, count] of each used bin, and the error.

    Every (image, class) entry counts, unknown as absent. The error is the mean of
    |frequency - mean probability| over entries: Guo et al. 2017, section 2.
    """
    by_kind = histogram.sum(axis=1, dtype=np.int64)
    at_least = counts_at_least(by_kind, edges, reliability_edges())
    all_entries = by_kind.sum(axis=-1, keepdims=True)
    none = np.zeros_like(all_entries)
    in_bin = -np.diff(np.concatenate([all_entries, at_least, none], axis=-1), axis=-1)
    counts, hits = in_bin.sum(axis=0), in_bin[PRESENT]
    used = counts > 0
    means = value(acc.sums.prob).sum(axis=0)[used] / counts[used]
    frequencies = hits[used] / counts[used]
    gaps = np.abs(frequencies - means) * counts[used]
    rows = zip(means.tolist(), frequencies.tolist(), counts[used].tolist(), strict=True)
    return [list(row) for row in rows], float(gaps.sum() / counts.sum())
