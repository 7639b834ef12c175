"""Tests that intervals contain the mean, follow groups, and are repeatable."""

import numpy as np
import pytest

from jaxii.metrics.bootstrap import interval, mean_and_error


def f2s(count, seed=0):
    return np.random.default_rng(seed).beta(2, 3, count)


def test_the_interval_holds_the_mean_and_is_as_wide_as_the_standard_error_says():
    values = f2s(400)
    low, high = interval(values, np.arange(400))
    assert low < values.mean() < high
    error = values.std(ddof=1) / 20
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_images_of_one_thing_widen_the_interval():
    values = np.repeat(f2s(40), 10)
    alone = interval(values, np.arange(400))
    grouped = interval(values, np.repeat(np.arange(40), 10))
    assert grouped[1] - grouped[0] > 2 * (alone[1] - alone[0])
    # Ten copies of an image count as one.
    once = interval(f2s(40), np.arange(40))
    assert grouped == pytest.approx(once)


def test_groups_may_have_any_names_and_sizes():
    values = np.array([0.0, 1.0, 1.0, 1.0])
    low, high = interval(values, np.array(["b", "a", "a", "a"], object))
    assert (low, high) == (0.0, 1.0)


def test_the_same_values_give_the_same_interval():
    assert interval(f2s(50), np.arange(50)) == interval(f2s(50), np.arange(50))


def test_one_group_has_no_interval():
    assert interval(np.array([0.25]), np.array(["x"], object)) is None
    assert interval(f2s(50), np.zeros(50)) is None


def test_draws_in_several_parts_are_the_draws_in_one(monkeypatch):
    whole = interval(f2s(30), np.arange(30))
    monkeypatch.setattr("jaxii.metrics.bootstrap._DRAWS", 7 * 30)
    assert interval(f2s(30), np.arange(30)) == whole


def test_the_interval_is_that_of_a_thousand_seeded_draws():
    values = f2s(30)
    rng = np.random.default_rng(0)
    means = [values[rng.integers(0, 30, 30)].mean() for _ in range(1000)]
    expected = np.quantile(means, [0.025, 0.975])
    assert interval(values, np.arange(30)) == pytest.approx(expected)


@pytest.mark.parametrize("values", [f2s(2), f2s(50), np.full(7, 0.1)])
def test_the_standard_error_is_that_of_numpy(values):
    count = len(values)
    mean, error = mean_and_error(values, np.arange(count))
    assert mean == pytest.approx(values.mean())
    expected = values.std(ddof=1) / np.sqrt(count)
    assert error == pytest.approx(expected, abs=1e-7)


def test_the_error_of_a_single_group_is_its_bound():
    assert mean_and_error(np.array([0.25]), np.array(["x"], object)) == (0.25, 0.5)
    assert mean_and_error(np.full(4, 0.25), np.zeros(4)) == (0.25, 0.5)


def test_the_standard_error_of_equal_images_is_that_of_one_of_each():
    once = mean_and_error(f2s(40), np.arange(40))
    copied = mean_and_error(np.repeat(f2s(40), 10), np.repeat(np.arange(40), 10))
    assert copied == pytest.approx(once)


def test_the_standard_error_of_groups_is_that_of_the_bootstrap():
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(400), rng.integers(1, 9, 400))
    values = 0.8 * f2s(400)[groups] + 0.2 * rng.random(len(groups))
    _, error = mean_and_error(values, groups)
    low, high = interval(values, groups)
    assert 2 * 1.96 * error == pytest.approx(high - low, rel=0.1)
    alone = values.std(ddof=1) / np.sqrt(len(values))
    assert error > 1.5 * alone


def test_the_standard_error_does_not_depend_on_the_order_of_the_images():
    groups, values = np.arange(500) % 60, f2s(500)
    found = mean_and_error(values, groups)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(500)
        assert mean_and_error(values[order], groups[order]) == found
