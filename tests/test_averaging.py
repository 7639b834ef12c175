"""Tests rates of averages against averages over a list of parameters."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxii.train.averaging import ema_rate, move, swa_rate


def averages(rate, values):
    """Returns the average after each value; it starts before the first."""
    average, found = jnp.float32(0.0), []
    for step, value in enumerate(values):
        at = rate(jnp.asarray(step, jnp.int32))
        average = move(average, jnp.float32(value), at)
        found.append(float(average))
    return found


@pytest.mark.parametrize(("share", "number"), [(0.25, 5), (0.5, 10), (1.0, 20)])
def test_swa_is_the_mean_over_the_last_share_of_the_steps(share, number):
    values = np.random.default_rng(0).normal(size=20).astype(np.float32)
    found = averages(swa_rate(20, share), values)
    first = 20 - number
    expected = [values[first : end + 1].mean() for end in range(first, 20)]
    np.testing.assert_allclose(found[first:], expected, rtol=1e-5, atol=1e-6)


def test_before_its_share_of_the_steps_swa_is_the_parameters_themselves():
    values = np.random.default_rng(0).normal(size=20).astype(np.float32)
    found = averages(swa_rate(20, 0.25), values)
    np.testing.assert_array_equal(found[:16], values[:16])


def test_swa_over_no_step_is_the_parameters_themselves():
    values = np.random.default_rng(0).normal(size=6).astype(np.float32)
    np.testing.assert_array_equal(averages(swa_rate(6, 0.0), values), values)


def test_ema_keeps_its_decay_once_it_has_forgotten_its_start():
    rate = ema_rate(0.9)
    assert float(rate(jnp.asarray(1000, jnp.int32))) == pytest.approx(0.1)
    # The first update has a weight of 0.9.
    assert float(rate(jnp.asarray(0, jnp.int32))) == pytest.approx(0.9)
