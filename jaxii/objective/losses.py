"""Multi-label losses, one number per image.

Each takes plain JAX or NumPy arrays, and reduces over classes only. Arrays of different
shapes raise InputError: none is broadcast. Losses are computed in float32, with
`log_sigmoid` for logarithms of probabilities, so that values and gradients are finite
where a probability rounds to 0 or 1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from jaxii.errors import InputError

AnyArray = Array | np.ndarray
Scalar = float | int | Float[Array, ""]

# Shorter predicted embeddings count as this long. The gradient of a cosine grows as
# 1 / norm, and would explode in the first step of a head that is initialised to zero.
MIN_PREDICTED_NORM = 1e-4
MIN_TARGET_NORM = 1e-6
# Resolution of float32 below 1. With a smaller margin, `asl` would keep a probability
# of 1, whose logarithm is infinite.
_LEAST_CLIP = 2.0**-24


def bce(
    logits: Shaped[AnyArray, "batch class"],
    targets: Shaped[AnyArray, "batch class"],
    known: Shaped[AnyArray, "batch class"] | None = None,
) -> Float[Array, " batch"]:
    """Binary cross-entropy, summed over classes.

    `sum_c known (-y log p - (1 - y) log(1 - p))` with `p = sigmoid(logits)`.

    >>> logits, targets = np.array([[2.0, -1.0, 0.0]]), np.array([[1, 0, 1]])
    >>> bce(logits, targets).round(4)
    Array([1.1333], dtype=float32)

    Args:
      logits: Any range.
      targets: In [0, 1]; values in between are soft targets.
      known: 1 where the class counts, 0 where it is ignored. Default: every class.

    Returns:
      float32, at least 0.

    Source: the negative log-likelihood of independent Bernoulli labels.
    """
    logits, targets, known = _as_float32(logits, targets, known)
    positive = targets * jax.nn.log_sigmoid(logits)
    negative = (1.0 - targets) * jax.nn.log_sigmoid(-logits)
    return -jnp.sum(known * (positive + negative), axis=-1)


def focal(
    logits: Shaped[AnyArray, "batch class"],
    targets: Shaped[AnyArray, "batch class"],
    known: Shaped[AnyArray, "batch class"] | None = None,
    *,
    gamma: Scalar = 2.0,
    alpha: Scalar | None = None,
) -> Float[Array, " batch"]:
    """Focal loss, summed over classes.

    `sum_c known (-a y (1 - p)^gamma log p - (1 - a)(1 - y) p^gamma log(1 - p))`. The
    loss of a soft target is the expectation over a label that is present with that
    probability. With gamma 0 and no alpha the loss equals `bce`.

    >>> logits, targets = np.array([[2.0, -1.0, 0.0]]), np.array([[1, 0, 1]])
    >>> focal(logits, targets, gamma=2.0).round(4)
    Array([0.1977], dtype=float32)

    Args:
      logits: Any range.
      targets: In [0, 1].
      known: 1 where the class counts, 0 where it is ignored. Default: every class.
      gamma: At least 0; may be traced.
      alpha: In [0, 1], the weight of positives; negatives weigh 1 - alpha. None weighs
        both by 1.

    Returns:
      float32, at least 0.

    Source: Lin et al. 2017, Focal Loss for Dense Object Detection, section 3.
    """
    logits, targets, known = _as_float32(logits, targets, known)
    log_p, log_not_p = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    positive = targets * (_power(log_not_p, gamma) * log_p)
    negative = (1.0 - targets) * (_power(log_p, gamma) * log_not_p)
    if alpha is not None:
        positive, negative = alpha * positive, (1.0 - alpha) * negative
    return -jnp.sum(known * (positive + negative), axis=-1)


def asl(
    logits: Shaped[AnyArray, "batch class"],
    targets: Shaped[AnyArray, "batch class"],
    known: Shaped[AnyArray, "batch class"] | None = None,
    *,
    gamma_pos: Scalar = 0.0,
    gamma_neg: Scalar = 4.0,
    clip: Scalar = 0.05,
) -> Float[Array, " batch"]:
    """Asymmetric loss, summed over classes.

    `sum_c known (-y (1 - p)^gamma_pos log p - (1 - y) q^gamma_neg log(1 - q))` with
    `q = max(p - clip, 0)`: negatives with a probability below the clip cost nothing.

    >>> logits, targets = np.array([[2.0, -1.0, 0.0]]), np.array([[1, 0, 1]])
    >>> asl(logits, targets, gamma_neg=4.0, clip=0.05).round(4)
    Array([0.8206], dtype=float32)

    Args:
      logits: Any range.
      targets: In [0, 1].
      known: 1 where the class counts, 0 where it is ignored. Default: every class.
      gamma_pos: At least 0; may be traced.
      gamma_neg: At least 0, usually more than gamma_pos; may be traced.
      clip: Probability margin in [0, 1); 0 with equal gammas gives `focal`. Up to 6e-8,
        the resolution of float32, it counts as 0. May be traced.

    Returns:
      float32, at least 0.

    Source: Ridnik et al. 2021, Asymmetric Loss for Multi-Label Classification, eq. 3-7.
    """
    logits, targets, known = _as_float32(logits, targets, known)
    log_p, log_not_p = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    positive = _power(log_not_p, gamma_pos) * log_p
    shifted = jax.nn.sigmoid(logits) - clip
    has_clip = jnp.asarray(clip) > _LEAST_CLIP
    counts = has_clip & (shifted > 0.0)
    # The power has no finite slope at 0, the logarithm none at 1, and `where`
    # multiplies the gradient of the branch that is not taken by 0, so that branch needs
    # a finite gradient too.
    safe = jnp.where(counts, shifted, 0.5)
    clipped = _power(jnp.log(safe), gamma_neg) * jnp.log1p(-safe)
    clipped = jnp.where(counts, clipped, 0.0)
    # Exact where p rounds to 0 or 1.
    unclipped = _power(log_p, gamma_neg) * log_not_p
    negative = jnp.where(has_clip, clipped, unclipped)
    mixed = targets * positive + (1.0 - targets) * negative
    return -jnp.sum(known * mixed, axis=-1)


def soft_f(
    logits: Shaped[AnyArray, "batch class"],
    targets: Shaped[AnyArray, "batch class"],
    known: Shaped[AnyArray, "batch class"] | None = None,
    *,
    beta: Scalar = 2.0,
) -> Float[Array, " batch"]:
    """1 - soft F-beta of each image.

    `1 - (1 + b^2) sum(p y) / (b^2 sum(y) + sum(p))`, sums over known classes: F-beta
    with the 0/1 prediction replaced by its probability. An image without a known
    positive label has the constant loss 1; give it the weight 0 (`has_positive`).

    >>> logits, targets = np.array([[2.0, -1.0, 0.0]]), np.array([[1, 0, 1]])
    >>> soft_f(logits, targets, beta=2.0).round(4)
    Array([0.2845], dtype=float32)

    Args:
      logits: Any range.
      targets: In [0, 1].
      known: 1 where the class counts, 0 where it is ignored. Default: every class.
      beta: Above 0; 2 weighs recall four times as much as precision.

    Returns:
      float32, in [0, 1] for targets of 0 and 1.

    Source: the per-image F-beta of the Inclusive Images Challenge, relaxed.
    """
    logits, targets, known = _as_float32(logits, targets, known)
    probs = known * jax.nn.sigmoid(logits)
    hits = jnp.sum(probs * targets, axis=-1)
    truth_and_guess = beta**2 * jnp.sum(known * targets, axis=-1) + jnp.sum(probs, -1)
    return 1.0 - (1.0 + beta**2) * hits / jnp.maximum(truth_and_guess, 1e-6)


def embedding(
    predicted: Shaped[AnyArray, "batch embed"], target: Shaped[AnyArray, "batch embed"]
) -> Float[Array, " batch"]:
    """1 - cosine of the predicted and the target embedding of each image.

    >>> predicted, target = np.array([[2, 0], [2, 0]]), np.array([[3, 0], [0, 3]])
    >>> embedding(predicted, target)
    Array([0., 1.], dtype=float32)

    Args:
      predicted: Any norm; above 1e-4 the loss does not depend on the norm.
      target: The sum of the image's label embeddings, weighted by confidence. A zero
        vector gives 1 with gradient 0; give such an image the weight 0
        (`has_direction`).

    Returns:
      float32 in [0, 2].

    Source: cosine proximity of label embeddings, DeViSE (Frome et al. 2013), section 3.
    """
    predicted = jnp.asarray(predicted, jnp.float32)
    target = jnp.asarray(target, jnp.float32)
    _check_shapes(predicted=predicted, target=target)
    dot = jnp.sum(predicted * target, axis=-1)
    predicted_square = jnp.sum(predicted * predicted, axis=-1)
    target_square = jnp.sum(target * target, axis=-1)
    scale = jax.lax.rsqrt(jnp.maximum(predicted_square, MIN_PREDICTED_NORM**2))
    target_scale = jax.lax.rsqrt(jnp.maximum(target_square, MIN_TARGET_NORM**2))
    return 1.0 - (dot * scale) * target_scale


def has_known(known: Float[Array, "batch class"]) -> Float[Array, " batch"]:
    """Returns 1.0 for an image with a known class, else 0.0."""
    return jnp.any(known > 0, axis=-1).astype(jnp.float32)


def has_positive(targets: Float[Array, "batch class"]) -> Float[Array, " batch"]:
    """Returns 1.0 for an image with a label above 0, else 0.0."""
    return jnp.any(targets > 0, axis=-1).astype(jnp.float32)


def has_direction(target: Float[Array, "batch embed"]) -> Float[Array, " batch"]:
    """Returns 1.0 for an embedding of norm at least `MIN_TARGET_NORM`, else 0.0."""
    square = jnp.sum(jnp.square(target.astype(jnp.float32)), axis=-1)
    return (square >= MIN_TARGET_NORM**2).astype(jnp.float32)


LOSSES: dict[str, Callable[..., Float[Array, " batch"]]] = {
    "bce": bce,
    "focal": focal,
    "asl": asl,
    "soft_f": soft_f,
}


def _as_float32(
    logits: AnyArray, targets: AnyArray, known: AnyArray | None
) -> tuple[Array, Array, Array]:
    logits = jnp.asarray(logits, jnp.float32)
    targets = jnp.asarray(targets, jnp.float32)
    known = jnp.ones_like(logits) if known is None else jnp.asarray(known, jnp.float32)
    _check_shapes(logits=logits, targets=targets, known=known)
    return logits, targets, known


def _check_shapes(**arrays: Array) -> None:
    """Raises InputError unless all arrays have the shape of the first."""
    (first, array), *others = arrays.items()
    for name, other in others:
        if other.shape != array.shape:
            raise InputError(
                f"{first} has shape {array.shape} and {name} has shape {other.shape}; "
                "use arrays of the same shape, one row per image."
            )


def _power(
    log_base: Float[Array, "batch class"], exponent: Scalar
) -> Float[Array, "batch class"]:
    """base^exponent from log(base): exactly 1 at exponent 0, finite slope at base 0."""
    return jnp.exp(jnp.asarray(exponent, jnp.float32) * log_base)
