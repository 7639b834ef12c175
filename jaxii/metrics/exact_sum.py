"""Sums of fractions that do not depend on the order of their terms.

Floating-point sums depend on the order, so the same images on more devices would give
other figures. Here every term is rounded once, to a multiple of 2^-30, and added as an
integer: sums over images, batches, devices and processes are identical in any order.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# A term is two integers of at most 2^15, so that sums of 65,535 terms fit in int32.
LIMB_BITS = 15
LIMB = 1 << LIMB_BITS
MAX_TERMS = (1 << 16) - 1


class Terms(NamedTuple):
    """Numbers from 0 to 1 as pairs of integers, or sums of up to 65,535 of them."""

    high: Int[Array, "*dims"]  # in units of 2^-15
    low: Int[Array, "*dims"]  # in units of 2^-30


class Total(NamedTuple):
    """A sum of numbers from 0 to 1; totals are added leaf by leaf."""

    whole: Int[Array, "*dims"]
    high: Int[Array, "*dims"]  # in units of 2^-15
    low: Int[Array, "*dims"]  # in units of 2^-30


def zero(*shape: int) -> Total:
    """Returns a total of 0."""
    return Total(*(jnp.zeros(shape, jnp.int32) for _ in Total._fields))


def terms(values: Float[Array, "*dims"]) -> Terms:
    """Returns numbers in [0, 1] as integers, rounded to multiples of 2^-30."""
    scaled = values.astype(jnp.float32) * LIMB
    high = jnp.floor(scaled)
    low = jnp.round((scaled - high) * LIMB)
    return Terms(high.astype(jnp.int32), low.astype(jnp.int32))


def sum_rows(added: Terms) -> Terms:
    """Returns the sums over the first axis, of at most `MAX_TERMS` rows."""
    return Terms(*(jnp.sum(limb, axis=0, dtype=jnp.int32) for limb in added))


def plus(total: Total, added: Terms) -> Total:
    """Returns the total with sums of terms added."""
    low = total.low + added.low
    high = total.high + added.high + (low >> LIMB_BITS)
    whole = total.whole + (high >> LIMB_BITS)
    return Total(whole, high & (LIMB - 1), low & (LIMB - 1))


def value(total: Total) -> Float[np.ndarray, "*dims"]:
    """Returns the sum as float64 on the host."""
    whole, high, low = (np.asarray(limb, np.float64) for limb in total)
    return whole + high / LIMB + low / LIMB**2
