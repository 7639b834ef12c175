"""The best constant prediction: the same labels for every image.

A decoder that does not beat this baseline has learnt nothing from the images.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, Num

from jaxii.errors import InputError
from jaxii.metrics.f_beta import f_beta_from_counts

MAX_K = 10


def best_constant(
    label_counts: Num[np.ndarray, " class"],
    offsets: Int[np.ndarray, " row"],
    label_ids: Int[np.ndarray, " entry"],
    *,
    max_k: int = MAX_K,
) -> tuple[Int[np.ndarray, " label"], float]:
    """Returns the best constant prediction and its mean F2 on a split.

    Args:
        label_counts: number of training images with each label.
        offsets: n + 1 CSR offsets of the n images that k is chosen on.
        label_ids: the labels present, without duplicates within an image.
        max_k: largest number of labels tried, at least 1.

    Returns:
        The k most frequent training labels, most frequent first (ties: lower id first),
        for the k with the best F2; and that F2.
    """
    order = np.argsort(-label_counts.astype(np.float64), kind="stable")[:max_k]
    f2s = _f2_of_prefixes(order, len(label_counts), offsets, label_ids)
    best = int(np.argmax(f2s))
    return order[: best + 1].astype(np.int64), float(f2s[best])


def constant_f2(
    constant: Sequence[int] | Int[np.ndarray, " label"],
    num_classes: int,
    offsets: Int[np.ndarray, " row"],
    label_ids: Int[np.ndarray, " entry"],
) -> float:
    """Returns the mean F2 of predicting the same labels for every image of a split.

    Args:
        constant: label ids, at least one, without duplicates.
        num_classes: number of classes.
        offsets: n + 1 CSR offsets of the split's n images.
        label_ids: the labels present, without duplicates within an image.
    """
    order = np.asarray(constant, np.int64)
    return float(_f2_of_prefixes(order, num_classes, offsets, label_ids)[-1])


def _f2_of_prefixes(
    order: Int[np.ndarray, " label"],
    num_classes: int,
    offsets: Int[np.ndarray, " row"],
    label_ids: Int[np.ndarray, " entry"],
) -> Float[np.ndarray, " label"]:
    """Returns the mean F2 of predicting the first 1, 2, ... labels of `order`."""
    num_images = len(offsets) - 1
    if num_images < 1:
        raise InputError(
            "a constant prediction needs at least 1 image, but the split has 0; use a "
            "split that has images"
        )
    rank = np.full(num_classes, len(order), np.int64)
    rank[order] = np.arange(len(order))
    lengths = np.diff(offsets)
    ranks = rank[label_ids[offsets[0] : offsets[-1]]]
    image = np.repeat(np.arange(num_images), lengths)
    f2s = np.empty(len(order))
    for k in range(1, len(order) + 1):
        tp = np.bincount(image[ranks < k], minlength=num_images)
        f2s[k - 1] = f_beta_from_counts(tp, np.array([k]), lengths).mean()
    return f2s
