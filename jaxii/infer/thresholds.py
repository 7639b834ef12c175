"""Choice of the decoders' one parameter each, on one split, to be applied to others.

Before it: `metrics` summed F2 at every threshold and every k over the split the choice
may see. After it: `summary` and `decode` apply the choice to other splits.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from jaxii.errors import InputError
from jaxii.infer.metrics import Accumulators, value

DEFAULT_THRESHOLDS: tuple[float, ...] = tuple(step / 100 for step in range(1, 100))
# F2 values closer than this are one plateau: it is below what one label of one image
# changes, and above the rounding of the sums.
SAME_F2 = 1e-7


@dataclasses.dataclass(frozen=True)
class DecoderChoice:
    """Each decoder's parameter; `embedding_k` is None without an embedding head."""

    threshold: float
    top_k: int
    embedding_k: int | None = None


def f2_by_threshold(acc: Accumulators) -> Float[np.ndarray, " threshold"]:
    """Returns the mean per-image F2 at each threshold, 0 where there is no image."""
    num_images = int(np.sum(np.asarray(acc.sums.num_images), dtype=np.int64))
    return value(acc.sums.f2).sum(axis=0) / max(num_images, 1)


def best_threshold(
    thresholds: Sequence[float], f2s: Float[np.ndarray, " threshold"]
) -> tuple[float, float]:
    """Returns the best threshold and its F2: the middle of the first best plateau.

    Args:
        thresholds: the grid, ascending, in [0, 1].
        f2s: F2 at each of them, in [0, 1].

    Returns:
        Threshold and F2. The middle of a plateau is furthest from where F2 falls.
    """
    index = _middle_of_best(f2s)
    return float(thresholds[index]), float(f2s[index])


def choose(acc: Accumulators) -> DecoderChoice:
    """Returns the decoders' parameters that give the split its best mean F2.

    Args:
        acc: the sums of the split, all devices and processes added.

    Returns:
        The choice; among equal k, the smallest.

    Raises:
        InputError: the split has no image.
    """
    sums = acc.sums
    if not np.any(np.asarray(sums.num_images)):
        raise InputError(
            "thresholds cannot be chosen on a split of 0 images; at least 1 is needed; "
            "raise the validation fraction or name another split"
        )
    threshold, _ = best_threshold(acc.thresholds, f2_by_threshold(acc))
    ranked = int(sums.embedding.num_images) > 0
    return DecoderChoice(
        threshold=threshold,
        top_k=_best_k(value(sums.top_k.f2)),
        embedding_k=_best_k(value(sums.embedding.f2)) if ranked else None,
    )


def _best_k(f2_sums: Float[np.ndarray, "group k"]) -> int:
    return int(np.argmax(f2_sums.sum(axis=0))) + 1


def _middle_of_best(values: Float[np.ndarray, " threshold"]) -> int:
    best = values >= values.max() - SAME_F2
    first = int(np.argmax(best))
    length = int(np.argmin(np.append(best[first:], False)))
    return first + (length - 1) // 2
