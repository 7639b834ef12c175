"""Schedules of the term weights, focal's gamma and the learning rate.

A configuration gives a number or a few (share of the stage, value) pairs. A schedule is
a function of the step, evaluated inside the compiled train step, so moving from one
loss to another does not recompile.
"""

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, TypeGuard, cast

import jax.numpy as jnp
import numpy as np
import optax  # pyright: ignore[reportMissingTypeStubs]
from jaxtyping import Array, Float, Num

from jaxii.errors import InputError

Step = int | float | Num[Array, ""]
Schedule = Callable[[Any], Float[Array, ""]]


def make_schedule(spec: object, num_steps: int, *, name: str = "schedule") -> Schedule:
    """Returns the schedule of a number or of a list of pairs.

    Args:
      spec: A number (constant), or (share of the stage in [0, 1], value) pairs in
        rising order: linear between pairs, constant before the first and after the
        last. Two pairs at one share are a jump; the second holds at that share.
      num_steps: Length of the stage in steps, at least 1; share 1 is step `num_steps`.
      name: The configuration field, for error messages.

    Returns:
      A function of the stage step (int or traced int32 scalar) to a float32 scalar.

    Raises:
      InputError: If the spec is neither, a value is negative or not finite, a share is
        outside [0, 1] or out of order, or more than two pairs are at one share.
    """
    pairs = _parse(spec, name)
    if num_steps < 1:
        raise InputError(
            f"{name}: the stage has {num_steps} steps; set its num_steps to at least 1"
        )
    shares = np.array([share for share, _ in pairs], np.float64)
    values = np.array([value for _, value in pairs], np.float64)
    knots = shares * num_steps
    # 0.1428572 * 7 is 1.0000004; without rounding the knot would fall after step 1.
    rounded = np.round(knots)
    knots = np.where(np.abs(knots - rounded) < 1e-6, rounded, knots)
    widths = np.diff(knots)
    slopes = np.diff(values) / np.where(widths > 0, widths, 1.0)
    # One segment lies before the first knot and one after each knot, so the number of
    # knots at or before a step is the index of its segment.
    starts = np.concatenate([knots[:1], knots]).astype(np.float32)
    bases = np.concatenate([values[:1], values]).astype(np.float32)
    slopes = np.concatenate([[0.0], slopes, [0.0]]).astype(np.float32)
    knots = knots.astype(np.float32)

    def schedule(step: Step) -> Float[Array, ""]:
        now = jnp.asarray(step).astype(jnp.float32)
        segment = jnp.sum((now >= jnp.asarray(knots)).astype(jnp.int32))
        start, base, slope = (jnp.asarray(x)[segment] for x in (starts, bases, slopes))
        return base + slope * (now - start)

    return schedule


def is_constant_zero(spec: object, *, name: str = "schedule") -> bool:
    """Returns whether a spec is 0 at every step; see `make_schedule`."""
    return all(value == 0.0 for _, value in _parse(spec, name))


def warmup_cosine(peak: float, warmup_steps: int, num_steps: int) -> Schedule:
    """Returns a learning rate with linear warm-up to the peak, then cosine decay to 0.

    The first step uses `peak / (warmup_steps + 1)`, not 0, so that it is not wasted.

    Args:
      peak: Learning rate at step `warmup_steps`, above 0.
      warmup_steps: From 0 to less than `num_steps`.
      num_steps: Steps of the stage; from this step on the rate is 0.

    Returns:
      A function of the step (int or traced int32 scalar) to a float32 scalar.

    Raises:
      InputError: If a number is outside its range.

    Source: Goyal et al. 2017 (warm-up); Loshchilov and Hutter 2017 (cosine).
    """
    if not (math.isfinite(peak) and peak > 0):
        raise InputError(
            f"learning rate peak={peak} must be finite and above 0; 0.1 is common for "
            "sgd"
        )
    if not 0 <= warmup_steps < num_steps:
        raise InputError(
            f"warmup_steps={warmup_steps} must be at least 0 and less than num_steps="
            f"{num_steps}; shorten the warm-up or lengthen the stage"
        )
    decay = optax.cosine_decay_schedule(peak, num_steps - warmup_steps)
    if warmup_steps:
        start = peak / (warmup_steps + 1)
        warmup = optax.linear_schedule(start, peak, warmup_steps)
        decay = optax.join_schedules([warmup, decay], [warmup_steps])

    def schedule(step: Step) -> Float[Array, ""]:
        now = jnp.asarray(step).astype(jnp.float32)
        return jnp.asarray(decay(now), jnp.float32)

    return schedule


def _parse(spec: object, name: str) -> list[tuple[float, float]]:
    """Returns the (share, value) pairs; a number is one pair at share 0."""
    if _is_number(spec):
        spec = [(0.0, spec)]
    if isinstance(spec, str) or not isinstance(spec, Sequence) or not spec:
        raise InputError(
            f"{name}={spec!r} must be a number or (share of the stage, value) pairs, "
            "such as 1.0 or ((0.0, 1.0), (0.5, 0.0))"
        )
    pairs = [_pair(pair, name) for pair in cast("Sequence[object]", spec)]
    _check(pairs, name)
    return pairs


def _pair(pair: object, name: str) -> tuple[float, float]:
    if isinstance(pair, Sequence) and not isinstance(pair, str):
        match cast("Sequence[object]", pair):
            case [share, value] if _is_number(share) and _is_number(value):
                return float(share), float(value)
            case _:
                pass
    raise InputError(
        f"{name}: {pair!r} is not a pair of numbers (share of the stage, value), such "
        "as (0.5, 1.0)"
    )


def _check(pairs: list[tuple[float, float]], name: str) -> None:
    shares = [share for share, _ in pairs]
    for share, value in pairs:
        if not 0.0 <= share <= 1.0:
            raise InputError(
                f"{name}: share {share} must be from 0 (start of the stage) to 1 (its "
                "end); divide a step by the stage's num_steps"
            )
        if not (math.isfinite(value) and value >= 0.0):
            raise InputError(
                f"{name}: value {value} must be finite and at least 0; use 0 to "
                "disable it"
            )
    if shares != sorted(shares):
        raise InputError(
            f"{name}: shares {shares} are not in ascending order; sort the pairs"
        )
    if any(shares.count(share) > 2 for share in shares):
        raise InputError(
            f"{name}: shares {shares} have more than two pairs at one share; keep two "
            "(a jump)"
        )


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and value is not True and value is not False
