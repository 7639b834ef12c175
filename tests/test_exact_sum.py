"""Tests sums of fractions: correct to their unit, and equal in every order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxii.metrics import exact_sum


def total_of(values, batches=1):
    total = exact_sum.zero(1)
    for rows in np.array_split(np.float32(values)[:, None], batches):
        total = exact_sum.plus(
            total, exact_sum.sum_rows(exact_sum.terms(jnp.asarray(rows)))
        )
    return total


@pytest.fixture(scope="module")
def fractions():
    rng = np.random.default_rng(0)
    tiny = 10 ** rng.uniform(-9, 0, 40_000)
    return np.float32(np.concatenate([tiny, np.zeros(100), np.ones(100)]))


def test_a_sum_is_that_of_float64_to_half_a_unit_a_term(fractions):
    want = np.sum(fractions, dtype=np.float64)
    error = abs(exact_sum.value(total_of(fractions)) - want)
    # Errors of at most half a unit, equally often up and down.
    assert error <= 0.5 * 2.0**-30 * np.sqrt(len(fractions)) * 4


def test_every_order_and_division_gives_the_same_bits(fractions):
    rng = np.random.default_rng(1)
    want = total_of(fractions)
    for batches in (1, 7, 64):
        assert total_of(rng.permutation(fractions), batches) == want


def test_totals_of_devices_add_leaf_by_leaf(fractions):
    want = exact_sum.value(total_of(fractions))
    parts = [total_of(rows) for rows in np.array_split(fractions, 8)]
    assert exact_sum.value(jax.tree.map(lambda *x: sum(x), *parts)) == want


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2.0**-24, 1.0])
def test_the_most_terms_of_any_size_do_not_overflow(number):
    total = total_of(np.full(exact_sum.MAX_TERMS, number))
    assert exact_sum.value(total) == exact_sum.MAX_TERMS * number
