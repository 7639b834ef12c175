"""From scores to sets of labels.

Before it: probabilities or predicted embeddings of images, and the parameter that
`thresholds` chose for each decoder. After it: `predict` writes a submission. The best
constant prediction, what every decoder has to beat, is found here too.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Num

from jaxii.errors import InputError

MAX_K = 10


def threshold_decoder(
    scores: Float[np.ndarray, "batch class"],
    *,
    threshold: float | Float[np.ndarray, " class"],
    at_least_one: bool = False,
) -> Bool[np.ndarray, "batch class"]:
    """Returns the labels whose probability is at least the threshold.

    Args:
        scores: probabilities in [0, 1]; NaN is never predicted.
        threshold: in [0, 1], one or one a class; compared as float32, as on the
            device.
        at_least_one: give the most probable label where none reaches the threshold.

    Returns:
        True where the label is predicted.
    """
    scores = np.nan_to_num(scores.astype(np.float32), nan=0.0)
    chosen = scores >= np.float32(threshold)
    if at_least_one and scores.shape[1] > 0:
        empty = np.flatnonzero(~chosen.any(axis=1))
        chosen[empty, scores[empty].argmax(axis=1)] = True
    return chosen


def top_k_decoder(
    scores: Float[np.ndarray, "batch class"], *, k: int | Int[np.ndarray, " batch"]
) -> Bool[np.ndarray, "batch class"]:
    """Returns the k labels of the highest scores; of equal ones, those of lower id.

    Args:
        scores: probabilities or cosines.
        k: labels an image, one number or one an image, at least 1; all of them where
            there are fewer.

    Returns:
        True where the label is predicted.

    Raises:
        InputError: k below 1.
    """
    if np.min(k, initial=1) < 1:
        raise InputError(f"k={k} labels an image; at least 1 is allowed; raise k")
    scores = np.where(np.isnan(scores), -np.inf, scores)
    if not scores.size:
        return np.zeros(scores.shape, bool)
    ks = np.broadcast_to(np.minimum(k, scores.shape[1]), len(scores))[:, None]
    places = np.unique(ks) - 1
    kth = np.take_along_axis(-np.partition(-scores, places, axis=1), ks - 1, axis=1)
    above = scores > kth
    ties = scores == kth
    room = ks - above.sum(axis=1, keepdims=True)
    return above | (ties & (np.cumsum(ties, axis=1) <= room))


def embedding_decoder(
    embedding: Float[np.ndarray, "batch embed"],
    *,
    label_embeddings: Float[np.ndarray, "class embed"],
    k: int,
) -> Bool[np.ndarray, "batch class"]:
    """Returns the k labels whose embeddings have the highest cosine with the image's.

    Args:
        embedding: predicted embeddings, of any length.
        label_embeddings: one vector a class; a zero vector has cosine 0.
        k: labels an image, at least 1.

    Returns:
        True where the label is predicted.

    Raises:
        InputError: k below 1.
    """
    return top_k_decoder(_unit(embedding) @ _unit(label_embeddings).T, k=k)


def label_lists(
    chosen: Bool[np.ndarray, "batch class"],
    scores: Float[np.ndarray, "batch class"] | None = None,
) -> list[Int[np.ndarray, " label"]]:
    """Returns each image's predicted ids, by falling score if scores are given."""
    if scores is None:
        return [np.flatnonzero(row) for row in chosen]
    lists = []
    for row, score in zip(chosen, scores, strict=True):
        ids = np.flatnonzero(row)
        lists.append(ids[np.argsort(-score[ids], kind="stable")])
    return lists


def best_constant(
    label_counts: Num[np.ndarray, " class"],
    offsets: Int[np.ndarray, " row"],
    label_ids: Int[np.ndarray, " entry"],
    *,
    max_k: int = MAX_K,
) -> tuple[Int[np.ndarray, " label"], float]:
    """Returns the best answer that ignores the image, and its mean F2 on a split.

    Args:
        label_counts: images of the training split with each label.
        offsets: n + 1 starts of the images of the split to choose k on (CSR).
        label_ids: the labels present, without duplicates within an image.
        max_k: largest number of labels tried, at least 1.

    Returns:
        The k most frequent labels of training (of equals, the lower id), most frequent
        first, with the k of the best F2; and that F2.
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
        offsets: n + 1 starts of the split's images (CSR).
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
    """Returns the mean F2 of predicting the first 1, 2, ... labels of the order."""
    num_images = len(offsets) - 1
    if num_images < 1:
        raise InputError(
            "a constant prediction needs at least 1 image, and the split has 0; "
            "name a split that has images"
        )
    rank = np.full(num_classes, len(order), np.int64)
    rank[order] = np.arange(len(order))
    lengths = np.diff(offsets)
    ranks = rank[label_ids[offsets[0] : offsets[-1]]]
    image = np.repeat(np.arange(num_images), lengths)
    f2s = np.empty(len(order))
    for k in range(1, len(order) + 1):
        tp = np.bincount(image[ranks < k], minlength=num_images)
        f2s[k - 1] = np.mean(5 * tp / (4 * lengths + k))
    return f2s


def _unit(rows: Float[np.ndarray, "row embed"]) -> Float[np.ndarray, "row embed"]:
    rows = rows.astype(np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
