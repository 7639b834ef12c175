"""The best constant prediction: the same labels for every image.

A decoder that does not beat this baseline has learnt nothing from the images.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, Num

from jaxii.errors import InputError
from jaxii.metrics.f_beta import f_beta_from_counts


def best_constant(
    label_counts: Num[np.ndarray, " class"],
    offsets: Int[np.ndarray, " row"],
    label_ids: Int[np.ndarray, " entry"],
) -> tuple[Int[np.ndarray, " label"], float]:
    """Returns the best constant prediction and its mean F2 on a split.

    Args:
        label_counts: number of training images with each label.
        offsets: n + 1 CSR offsets of the n images that k is chosen on.
        label_ids: the labels present, without duplicates within an image.

    Returns:
        The k most frequent training labels, most frequent first (ties: lower id first),
        for the k with the best F2, from 1 to the number of classes; and that F2.
    """
    order = np.argsort(-label_counts.astype(np.float64), kind="stable")
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
    """Returns the mean F2 of predicting the first 1, 2, ... labels of `order`.

    Cost: one pass over the entries, and one over `order`, for each number of labels
    that an image has.
    """
    num_images = len(offsets) - 1
    if num_images < 1:
        raise InputError(
            "a constant prediction needs at least 1 image, but the split has 0; use a "
            "split that has images"
        )
    rank = np.full(num_classes, len(order), np.int64)
    rank[order] = np.arange(len(order))
    ranks = rank[label_ids[offsets[0] : offsets[-1]]]
    lengths = np.diff(offsets)
    length_of_entry = np.repeat(lengths, lengths)
    ks = np.arange(1, len(order) + 1)
    f2s = np.zeros(len(order))
    # F2 is linear in the hits of images with the same number of labels.
    for length in np.unique(length_of_entry):
        found = np.bincount(ranks[length_of_entry == length], minlength=len(order))
        hits = np.cumsum(found[: len(order)])
        f2s += f_beta_from_counts(hits, ks, np.array(length))
    return f2s / num_images
