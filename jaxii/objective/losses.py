"""The loss terms: how wrong a prediction is, one number for each example.

The model's logits and the dense targets come in; `objective.multitask` weights the
terms, masks the padding and divides once. Nothing here reduces over the batch.
Everything is computed in float32 whatever comes in, and in terms of `log_sigmoid`, so
that values and gradients stay finite where a probability rounds to 0 or 1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Scalar = float | int | Float[Array, ""]

# Below this length a predicted embedding counts as this long: the gradient of a cosine
# grows as 1 / length, and a head that starts at zero must not blow the first step up.
MIN_PREDICTED_NORM = 1e-4
MIN_TARGET_NORM = 1e-6


def bce_loss(
    logits: Float[Array, "batch class"],
    targets: Float[Array, "batch class"],
    known: Float[Array, "batch class"],
) -> Float[Array, " batch"]:
    """Returns the sigmoid cross-entropy of each example, summed over its classes.

    `sum_c known (-y log p - (1 - y) log(1 - p))` with `p = sigmoid(logits)`.

    Args:
      logits: any range.
      targets: in [0, 1]; between the ends = soft.
      known: 1 = the class counts, 0 = it is ignored.

    Returns:
      float32, at least 0.

    Source: the negative log-likelihood of independent Bernoulli labels.
    """
    logits, targets, known = _as_float32(logits, targets, known)
    positive = targets * jax.nn.log_sigmoid(logits)
    negative = (1.0 - targets) * jax.nn.log_sigmoid(-logits)
    return -jnp.sum(known * (positive + negative), axis=-1)


def focal_loss(
    logits: Float[Array, "batch class"],
    targets: Float[Array, "batch class"],
    known: Float[Array, "batch class"],
    *,
    gamma: Scalar = 2.0,
    alpha: Scalar | None = None,
) -> Float[Array, " batch"]:
    """Returns the focal loss of each example, summed over its classes.

    `sum_c known (-a y (1 - p)^gamma log p - (1 - a)(1 - y) p^gamma log(1 - p))`. A soft
    target gets the expectation over a label that is present with that probability. With
    gamma 0 and no alpha this is `bce_loss`, so a swap can be a ramp of gamma.

    Args:
      logits: any range.
      targets: in [0, 1].
      known: 1 = the class counts, 0 = it is ignored.
      gamma: at least 0; may be traced (a schedule's value).
      alpha: in [0, 1], the weight of positives, 1 - alpha of negatives; None = both 1.

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


def asl_loss(
    logits: Float[Array, "batch class"],
    targets: Float[Array, "batch class"],
    known: Float[Array, "batch class"],
    *,
    gamma_pos: Scalar = 0.0,
    gamma_neg: Scalar = 4.0,
    clip: float | int = 0.05,
) -> Float[Array, " batch"]:
    """Returns the asymmetric loss of each example, summed over its classes.

    `sum_c known (-y (1 - p)^gamma_pos log p - (1 - y) q^gamma_neg log(1 - q))` with
    `q = max(p - clip, 0)`: negatives that the model is already sure of cost nothing.

    Args:
      logits: any range.
      targets: in [0, 1].
      known: 1 = the class counts, 0 = it is ignored.
      gamma_pos: at least 0; may be traced.
      gamma_neg: at least 0, as a rule more than gamma_pos; may be traced.
      clip: probability margin in [0, 1); 0 and equal gammas = `focal_loss`.

    Returns:
      float32, at least 0.

    Source: Ridnik et al. 2021, Asymmetric Loss for Multi-Label Classification, eq. 3-7.
    """
    logits, targets, known = _as_float32(logits, targets, known)
    log_p, log_not_p = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    positive = _power(log_not_p, gamma_pos) * log_p
    if clip > 0.0:
        shifted = jax.nn.sigmoid(logits) - clip
        counts = shifted > 0.0
        # The power has no finite slope at 0, so the branch that is not taken must be
        # given a harmless number too: its gradient is multiplied by 0, not skipped.
        safe = jnp.where(counts, shifted, 0.5)
        negative = _power(jnp.log(safe), gamma_neg) * jnp.log1p(-safe)
        negative = jnp.where(counts, negative, 0.0)
    else:
        negative = _power(log_p, gamma_neg) * log_not_p
    mixed = targets * positive + (1.0 - targets) * negative
    return -jnp.sum(known * mixed, axis=-1)


def soft_f_loss(
    logits: Float[Array, "batch class"],
    targets: Float[Array, "batch class"],
    known: Float[Array, "batch class"],
    *,
    beta: Scalar = 2.0,
) -> Float[Array, " batch"]:
    """Returns 1 - soft F-beta of each example.

    `1 - (1 + b^2) sum(p y) / (b^2 sum(y) + sum(p))`, sums over known classes: F-beta
    with the 0/1 prediction replaced by its probability. Without a known positive label
    it is 1 and says nothing: give such an example the weight 0 (`has_positive`).

    Args:
      logits: any range.
      targets: in [0, 1].
      known: 1 = the class counts, 0 = it is ignored.
      beta: above 0; 2 counts recall four times as much as precision.

    Returns:
      float32 in [0, 1] where targets are 0 or 1.

    Source: the per-image F-beta of the Inclusive Images Challenge, relaxed.
    """
    logits, targets, known = _as_float32(logits, targets, known)
    probs = known * jax.nn.sigmoid(logits)
    hits = jnp.sum(probs * targets, axis=-1)
    truth_and_guess = beta**2 * jnp.sum(known * targets, axis=-1) + jnp.sum(probs, -1)
    return 1.0 - (1.0 + beta**2) * hits / jnp.maximum(truth_and_guess, 1e-6)


def embedding_loss(
    predicted: Float[Array, "batch embed"], target: Float[Array, "batch embed"]
) -> Float[Array, " batch"]:
    """Returns 1 - cosine of the predicted and the target embedding of each example.

    Args:
      predicted: any length; the loss does not depend on it above 1e-4.
      target: the sum of the image's label embeddings weighted by confidence. A zero
        vector gives 1 with gradient 0: give such an example the weight 0
        (`has_direction`).

    Returns:
      float32 in [0, 2].

    Source: cosine proximity of label embeddings, DeViSE (Frome et al. 2013), section 3.
    """
    predicted, target = predicted.astype(jnp.float32), target.astype(jnp.float32)
    dot = jnp.sum(predicted * target, axis=-1)
    predicted_square = jnp.sum(predicted * predicted, axis=-1)
    target_square = jnp.sum(target * target, axis=-1)
    scale = jax.lax.rsqrt(jnp.maximum(predicted_square, MIN_PREDICTED_NORM**2))
    target_scale = jax.lax.rsqrt(jnp.maximum(target_square, MIN_TARGET_NORM**2))
    return 1.0 - (dot * scale) * target_scale


def has_known(known: Float[Array, "batch class"]) -> Float[Array, " batch"]:
    """Returns 1 for an example with any known class, else 0: [batch], float32."""
    return jnp.any(known > 0, axis=-1).astype(jnp.float32)


def has_positive(targets: Float[Array, "batch class"]) -> Float[Array, " batch"]:
    """Returns 1 for an example with any label above 0, else 0: [batch], float32."""
    return jnp.any(targets > 0, axis=-1).astype(jnp.float32)


def has_direction(target: Float[Array, "batch embed"]) -> Float[Array, " batch"]:
    """Returns 1 for an embedding that a cosine can be taken with, else 0: [batch]."""
    square = jnp.sum(jnp.square(target.astype(jnp.float32)), axis=-1)
    return (square >= MIN_TARGET_NORM**2).astype(jnp.float32)


LOSSES: dict[str, Callable[..., Float[Array, " batch"]]] = {
    "bce": bce_loss,
    "focal": focal_loss,
    "asl": asl_loss,
    "soft_f": soft_f_loss,
}


def _as_float32(*arrays: Float[Array, "batch class"]) -> list[Array]:
    return [array.astype(jnp.float32) for array in arrays]


def _power(
    log_base: Float[Array, "batch class"], exponent: Scalar
) -> Float[Array, "batch class"]:
    """base^exponent from log(base): exactly 1 at exponent 0, finite slope at base 0."""
    return jnp.exp(jnp.asarray(exponent, jnp.float32) * log_base)
