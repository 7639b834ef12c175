"""F-beta of sets of labels: (1 + b^2) TP / ((1 + b^2) TP + b^2 FN + FP)."""

import math
from collections.abc import Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Num

from jaxii.errors import InputError

# Arrays, and nested lists in their place.
Numbers = np.ndarray | Array | Sequence[Any]


@overload
def f_beta(
    decisions: Bool[np.ndarray, "image class"]
    | Num[np.ndarray, "image class"]
    | Sequence[Any],
    targets: Bool[np.ndarray, "image class"]
    | Num[np.ndarray, "image class"]
    | Sequence[Any],
    beta: float = 2.0,
    *,
    zero_division: float = 0.0,
) -> Float[np.ndarray, " image"]: ...
@overload
def f_beta(
    decisions: Bool[Array, "image class"] | Num[Array, "image class"],
    targets: Bool[Array, "image class"] | Num[Array, "image class"],
    beta: float = 2.0,
    *,
    zero_division: float = 0.0,
) -> Float[Array, " image"]: ...
def f_beta(
    decisions: Numbers,
    targets: Numbers,
    beta: float = 2.0,
    *,
    zero_division: float = 0.0,
) -> np.ndarray | Array:
    """Returns the F-beta of each image; the mean is the score of a data set.

    Args:
      decisions: 1 or true where the label is predicted, [image, class].
      targets: 1 or true where the label is present; at least 0.5 counts as present.
      beta: weight of recall over precision, finite and above 0.
      zero_division: score of an image without labels for which none is predicted.

    Returns:
      [image], in [0, 1]; float64 for NumPy arrays and lists, float32 for JAX arrays.

    Raises:
      InputError: If the arrays are not two of one shape [image, class], or beta is not
        finite and above 0.

    Source: `fbeta_score(average=None)` of scikit-learn, over images.
    """
    decisions, targets = as_array(decisions), as_array(targets)
    if decisions.ndim < 2 or decisions.shape != targets.shape:
        raise InputError(
            f"decisions has shape {decisions.shape} and targets has shape "
            f"{targets.shape}; use two arrays of the same shape [image, class]."
        )
    check_beta(beta)
    chosen, present = (x.astype(np.float32) >= 0.5 for x in (decisions, targets))
    return f_beta_from_counts(
        (chosen & present).sum(axis=-1),
        chosen.sum(axis=-1),
        present.sum(axis=-1),
        beta,
        zero_division=zero_division,
    )


def as_array(numbers: Numbers) -> np.ndarray | Array:
    """Returns arrays unchanged, and a NumPy array for nested lists.

    Raises:
      InputError: If the lists differ in length.
    """
    if isinstance(numbers, Array):
        return numbers
    try:
        return np.asarray(numbers)
    except ValueError as error:
        raise InputError(
            f"a list is not an array ({error}); use lists of the same length, one per "
            "image, with a number per class."
        ) from error


def check_beta(beta: float | Array) -> None:
    """Checks that a beta is finite and above 0; accepts any traced value.

    Raises:
      InputError: If it is not.
    """
    # NaN fails both comparisons.
    if not isinstance(beta, Tracer) and not 0 < beta < math.inf:
        raise InputError(f"beta={beta} is not allowed; use a finite number above 0.")


@overload
def f_beta_from_counts(
    num_hits: Num[np.ndarray, "..."],
    num_predicted: Num[np.ndarray, "..."],
    num_true: Num[np.ndarray, "..."],
    beta: float = 2.0,
    *,
    zero_division: float = 0.0,
) -> Float[np.ndarray, "..."]: ...
@overload
def f_beta_from_counts(
    num_hits: Num[Array, "..."],
    num_predicted: Num[Array, "..."],
    num_true: Num[Array, "..."],
    beta: float = 2.0,
    *,
    zero_division: float | Float[Array, ""] = 0.0,
) -> Float[Array, "..."]: ...
def f_beta_from_counts(
    num_hits: np.ndarray | Array,
    num_predicted: np.ndarray | Array,
    num_true: np.ndarray | Array,
    beta: float = 2.0,
    *,
    zero_division: float | Float[Array, ""] = 0.0,
) -> np.ndarray | Array:
    """Returns F-beta from counts, which may broadcast against each other.

    Args:
      num_hits: labels that are present and predicted.
      num_predicted: labels that are predicted.
      num_true: labels that are present.
      beta: weight of recall over precision, above 0.
      zero_division: score where both sets are empty.
    """
    weight = beta**2
    if isinstance(num_hits, jax.Array):
        xp, dtype = jnp, jnp.float32
        zero_division = jnp.asarray(zero_division, dtype)
    else:
        xp, dtype = np, np.float64
    truth_and_guess = weight * num_true.astype(dtype) + num_predicted.astype(dtype)
    scores = (1 + weight) * num_hits.astype(dtype) / xp.maximum(truth_and_guess, 1)
    return xp.where(truth_and_guess > 0, scores, zero_division)
