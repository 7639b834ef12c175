"""The optimizers, as optax transformations whose `update` takes the `stage_step`.

The learning rate is a schedule of `stage_step`, because a count in the optimizer state
would miss updates skipped for non-finite gradients. For bias correction, Adam keeps its
own count of the gradients that its moments average.

The train step also passes `update` the norms over all devices that clipping and trust
ratios need with a sharded state: `gradient_norm`, `squared_norms`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxii.errors import InputError

# Decays of Adam's means of gradients and of squared gradients.
B1, B2 = 0.9, 0.999
# Step of LARS as a share of a kernel's norm.
TRUST_COEFFICIENT = 0.001
# Makes the rule from the learning rate, the weight decay and the momentum.
Make = Callable[[optax.Schedule, float, float], optax.GradientTransformation]


def decay_mask(params: Any) -> Any:
    """Returns True for kernels (two dimensions or more), False for biases and scales.

    Weight decay and trust ratios apply to the leaves that are True.

    Source: He et al. 2019, Bag of Tricks for Image Classification, section 3.1.
    """
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def local_squared_norms(*trees: Any) -> tuple[Any, ...]:
    """Returns the squared norm of every leaf; for trees of unsharded arrays."""
    return tuple(
        jax.tree.map(lambda leaf: jnp.sum(jnp.square(leaf)), tree) for tree in trees
    )


def _scale_by_trust_ratio(coefficient: float):
    """Scales each kernel's update to `coefficient` times the kernel's norm."""

    def update(updates, state, params=None, *, squared_norms=local_squared_norms, **_):
        def scaled(masked, update, of_param, of_update):
            if not masked:
                return update
            known = (of_param > 0) & (of_update > 0)
            ratio = coefficient * jnp.sqrt(of_param / jnp.where(known, of_update, 1.0))
            return update * jnp.where(known, ratio, 1.0)

        mask, norms = decay_mask(params), squared_norms(params, updates)
        return jax.tree.map(scaled, mask, updates, *norms), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _clip(clip_norm: float):
    """Clips the gradient by its global norm."""

    def update(updates, state, params=None, *, gradient_norm=None, **_):
        norm = optax.tree.norm(updates) if gradient_norm is None else gradient_norm
        scale = clip_norm / jnp.maximum(norm, clip_norm)
        return jax.tree.map(lambda leaf: leaf * scale, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _scale_by_learning_rate(schedule: optax.Schedule):
    """Scales updates by minus the learning rate at `stage_step`."""

    def update(updates, state, params=None, **extra):
        size = -1 * schedule(extra["stage_step"])
        return jax.tree.map(lambda u: jnp.asarray(size, u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _sgd(schedule: optax.Schedule, weight_decay: float, momentum: float):
    """SGD with Nesterov momentum; L2 decay is added to the gradient."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay, decay_mask),
        optax.trace(momentum, nesterov=True),
        _scale_by_learning_rate(schedule),
    )


def _adamw(schedule: optax.Schedule, weight_decay: float, momentum: float):
    """AdamW (Loshchilov and Hutter 2019): decoupled decay, scaled by the rate only."""
    return optax.chain(
        optax.scale_by_adam(b1=B1, b2=B2),
        optax.add_decayed_weights(weight_decay, decay_mask),
        _scale_by_learning_rate(schedule),
    )


def _lars(schedule: optax.Schedule, weight_decay: float, momentum: float):
    """LARS (You et al. 2017): SGD with steps proportional to each kernel's norm."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay, decay_mask),
        _scale_by_trust_ratio(TRUST_COEFFICIENT),
        _scale_by_learning_rate(schedule),
        optax.trace(momentum, nesterov=True),
    )


def _lamb(schedule: optax.Schedule, weight_decay: float, momentum: float):
    """LAMB (You et al. 2020): Adam with steps proportional to each kernel's norm."""
    return optax.chain(
        optax.scale_by_adam(b1=B1, b2=B2, eps=1e-6),
        optax.add_decayed_weights(weight_decay, decay_mask),
        _scale_by_trust_ratio(1.0),
        _scale_by_learning_rate(schedule),
    )


OPTIMIZERS: dict[str, Make] = {
    "sgd": _sgd,
    "adamw": _adamw,
    "lars": _lars,
    "lamb": _lamb,
}


def make_optimizer(
    *,
    name: str,
    schedule: optax.Schedule,
    weight_decay: float,
    momentum: float = 0.9,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """Builds an optimizer: clip by global norm, then the named rule.

    Args:
      name: A key of `OPTIMIZERS`.
      schedule: Learning rate as a function of `stage_step`.
      weight_decay: At least 0; applies to kernels only (`decay_mask`).
      momentum: In [0, 1); used by "sgd" and "lars".
      clip_norm: Largest global norm of the gradient, above 0; None does not clip.

    Returns:
      The transformation; its `update` needs the params and `stage_step`, an int32
      scalar that counts the stage's earlier batches.

    Raises:
      InputError: If the name is unknown or a number is out of range.
    """
    if name not in OPTIMIZERS:
        raise InputError(
            f"optimizer {name!r} is not supported; set optimizer.name to one of "
            f"{', '.join(OPTIMIZERS)}"
        )
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise InputError(
            f"weight_decay={weight_decay} must be finite and at least 0; use 0 for none"
        )
    if not 0.0 <= momentum < 1.0:
        raise InputError(
            f"momentum={momentum} must be at least 0 and below 1; 0.9 is common"
        )
    if clip_norm is not None and not clip_norm > 0:
        raise InputError(
            f"clip_norm={clip_norm} must be above 0, or None for no clipping"
        )
    rule = OPTIMIZERS[name](schedule, weight_decay, momentum)
    if clip_norm is not None:
        rule = optax.chain(_clip(clip_norm), rule)
    return _with_standard_promotion(rule)


def _with_standard_promotion(
    rule: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Lets optax mix dtypes: Adam raises a float to the power of an int32 count."""
    rule = optax.with_extra_args_support(rule)

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):
            return rule.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(rule.init, update)
