"""Tests that F-beta equals scikit-learn's, in NumPy and in JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import fbeta_score

import jaxii.metrics
from jaxii.errors import InputError
from jaxii.metrics.f_beta import check_beta, f_beta, f_beta_from_counts

RNG = np.random.default_rng(0)
DECISIONS = RNG.random((40, 9)) < 0.3
TARGETS = RNG.random((40, 9)) < 0.3
DECISIONS[:4], TARGETS[2:6] = False, False


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("zero_division", [0.0, 1.0])
def test_the_mean_is_that_of_scikit_learn(beta, zero_division):
    want = fbeta_score(
        TARGETS, DECISIONS, beta=beta, average="samples", zero_division=zero_division
    )
    found = f_beta(DECISIONS, TARGETS, beta, zero_division=zero_division)
    assert found.shape == (40,) and found.dtype == np.float64
    assert found.mean() == pytest.approx(want)
    on_device = jax.jit(f_beta, static_argnums=2)(
        jnp.asarray(DECISIONS), jnp.asarray(TARGETS), beta
    )
    assert on_device.dtype == jnp.float32
    if zero_division == 0:
        np.testing.assert_allclose(on_device, found, rtol=1e-6)


def test_zero_division_is_the_score_of_nothing_on_devices_too():
    none = jnp.zeros((1, 3))
    assert f_beta(none, none, zero_division=1.0).tolist() == [1.0]
    counts = jnp.zeros(2, jnp.int32)
    found = f_beta_from_counts(counts, counts, counts, zero_division=0.25)
    assert found.tolist() == [0.25, 0.25] and found.dtype == jnp.float32


def test_one_half_counts_as_present():
    half, less = np.array([[0.5, 0.49]]), np.array([[1.0, 0.0]])
    assert f_beta(half, less).tolist() == f_beta(less, half).tolist() == [1.0]


def test_zeros_and_ones_are_decisions_too():
    found = f_beta(DECISIONS.astype(np.int32), TARGETS.astype(np.float32))
    np.testing.assert_array_equal(found, f_beta(DECISIONS, TARGETS))


def test_counts_give_what_the_sets_give():
    found = f_beta_from_counts(
        (DECISIONS & TARGETS).sum(axis=1), DECISIONS.sum(axis=1), TARGETS.sum(axis=1)
    )
    np.testing.assert_array_equal(found, f_beta(DECISIONS, TARGETS))


def test_counts_broadcast():
    found = f_beta_from_counts(
        np.array([[1, 2]]), np.array([[1, 2]]), np.array([[2], [4]])
    )
    np.testing.assert_allclose(found, [[5 / 9, 1.0], [5 / 17, 10 / 18]])


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
@pytest.mark.parametrize(
    "targets", [TARGETS[:1], TARGETS[0], TARGETS[:, :1], TARGETS.argmax(axis=1)]
)
def test_targets_of_another_shape_are_refused(array, targets):
    reason = r"decisions has shape \(40, 9\) and targets has shape .*\[image, class\]"
    with pytest.raises(InputError, match=reason):
        f_beta(array(DECISIONS), array(targets))


def test_lists_are_arrays():
    found = f_beta(DECISIONS.tolist(), TARGETS.tolist())
    np.testing.assert_array_equal(found, f_beta(DECISIONS, TARGETS))
    with pytest.raises(InputError, match="use lists of the same length"):
        f_beta([[0, 2], [1]], [[0], [1]])


def test_arrays_of_one_dimension_are_refused():
    with pytest.raises(InputError, match=r"\[image, class\]"):
        f_beta(DECISIONS[0], TARGETS[0])


@pytest.mark.parametrize("beta", [0.0, -1.0, np.nan, np.inf])
def test_a_beta_that_is_no_positive_number_is_refused(beta):
    with pytest.raises(InputError, match=rf"beta={beta} .*finite number above 0"):
        f_beta(DECISIONS, TARGETS, beta)


def test_a_traced_beta_is_not_refused():
    jax.jit(check_beta)(jnp.float32(2))


def test_the_package_exports_the_function():
    assert jaxii.metrics.f_beta is f_beta
