"""Tests the set of largest expected F2 against sums over all sets and outcomes."""

import numpy as np
import pytest
from scipy.stats import poisson

from jaxii.decoding import expected_f as module
from jaxii.decoding.decoders import expected_f2_decoder
from jaxii.decoding.expected_f import (
    TOLERANCE,
    best_sizes,
    expected_f2,
    expected_f2_of,
    largest_sizes,
    num_nodes,
    num_powers,
)

NUM_LABELS, NUM_CASES = 12, 1000


def cases():
    """Returns probabilities of many shapes: flat, certain, tiny, skewed, with ties."""
    rng = np.random.default_rng(0)
    shapes = [
        rng.random((200, NUM_LABELS)),
        rng.beta(0.1, 0.3, (200, NUM_LABELS)),
        rng.beta(0.5, 20, (200, NUM_LABELS)),
        10.0 ** rng.uniform(-8, 0, (200, NUM_LABELS)),
        rng.integers(0, 5, (200, NUM_LABELS)) / 4,
    ]
    return np.concatenate(shapes)


def f2_of_all_sets():
    """Returns the F2 of each set as the answer when each set is the truth."""
    sets = (np.arange(2**NUM_LABELS)[:, None] >> np.arange(NUM_LABELS)) & 1
    sizes = sets.sum(axis=1)
    hits = (sets @ sets.T).astype(np.float64)
    return sets, 5 * hits / np.maximum(4 * sizes[None, :] + sizes[:, None], 1)


def test_the_set_is_the_best_of_all_sets_on_1000_cases():
    probs = cases()
    sets, f2 = f2_of_all_sets()
    chances = np.ones((len(sets), len(probs)))
    for label in range(NUM_LABELS):
        p = probs[:, label][None, :]
        chances *= np.where(sets[:, label, None] == 1, p, 1 - p)
    worth = f2 @ chances
    chosen = expected_f2_decoder(probs) @ (1 << np.arange(NUM_LABELS))
    got = worth[chosen, np.arange(len(probs))]
    assert len(probs) == NUM_CASES
    np.testing.assert_allclose(got, worth.max(axis=0), rtol=0, atol=2 * TOLERANCE)


def test_the_expected_f2_of_any_set_is_the_sum_over_all_outcomes():
    probs = cases()[:: NUM_CASES // 100]
    sets, f2 = f2_of_all_sets()
    chosen = np.random.default_rng(1).integers(len(sets), size=len(probs))
    chosen[0] = 0
    chances = np.where(sets[None] == 1, probs[:, None], 1 - probs[:, None]).prod(axis=2)
    want = np.einsum("ct,ct->c", f2[chosen], chances)
    got = expected_f2_of(probs, sets[chosen].astype(bool))
    assert got[0] == 0
    np.testing.assert_allclose(got, want, rtol=0, atol=2 * TOLERANCE)


def test_the_expected_f2_of_the_best_set_is_that_of_its_size():
    probs = np.random.default_rng(2).beta(0.1, 3, (70, 400))
    sizes = best_sizes(probs)
    want = expected_f2(probs, int(sizes.max()))[np.arange(70), sizes - 1]
    got = expected_f2_of(probs, expected_f2_decoder(probs))
    np.testing.assert_allclose(got, want, rtol=0, atol=2 * TOLERANCE)


def by_recursion(probs, k):
    """Returns the expected F2 of the first k labels from two count distributions."""

    def counts(ps):
        chances = np.array([1.0])
        for p in ps:
            chances = np.convolve(chances, [1 - p, p])
        return chances

    hits, others = counts(probs[:k]), counts(probs[k:])
    i = np.arange(len(hits))[:, None]
    j = np.arange(len(others))[None, :]
    f2 = 5 * i / (4 * (i + j) + k)
    return float(np.sum(hits[:, None] * others[None, :] * f2))


@pytest.mark.parametrize("scale", [1e-4, 0.03, 1.0])
def test_the_expected_f2_of_every_size_is_that_of_the_count_distributions(scale):
    rng = np.random.default_rng(1)
    probs = np.sort(rng.beta(0.3, 1, (3, 150)) * scale, axis=1)[:, ::-1]
    got = expected_f2(probs, 150)
    want = [[by_recursion(row, k) for k in range(1, 151)] for row in probs]
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)


def test_sums_of_powers_of_many_small_probabilities_are_exact_enough():
    rng = np.random.default_rng(2)
    probs = np.concatenate([rng.random(5), rng.random(1995) / 16])
    probs = np.sort(probs)[None, ::-1]
    got = expected_f2(probs, 10)[0]
    want = [by_recursion(probs[0], k) for k in range(1, 11)]
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)


def test_no_size_beyond_the_bound_is_better():
    rng = np.random.default_rng(3)
    probs = np.sort(10 ** rng.uniform(-5, 0, (50, 120)) ** 2, axis=1)[:, ::-1]
    probs = np.minimum(probs, 1.0)
    probs = np.concatenate([probs, np.sort(rng.beta(0.05, 1, (50, 120)))[:, ::-1]])
    best = np.argmax(expected_f2(probs, 120), axis=1) + 1
    assert np.all(best <= largest_sizes(probs))
    np.testing.assert_array_equal(best_sizes(probs), best)


def test_the_bound_on_sizes_is_that_of_jensens_inequality():
    probs = np.sort(np.random.default_rng(4).beta(0.2, 2, (40, 60)), axis=1)[:, ::-1]
    want = []
    for row in probs.tolist():
        at_most, at_least = [], []
        for k in range(1, 61):
            total = sum(row[:k])
            at_most.append(5 * total / (4 * total + k))
            at_least.append(5 * total / (4 * (1 + sum(row) - row[k - 1]) + k))
        want.append(max(k for k in range(1, 61) if at_most[k - 1] >= max(at_least)))
    assert max(want) < 60
    assert largest_sizes(probs).tolist() == want


@pytest.mark.parametrize(("count", "sizes"), [(0.3, 5), (3.0, 20), (40.0, 100)])
def test_as_many_nodes_are_taken_as_the_proof_needs(count, sizes):
    def proved(nodes):
        # Uses an ellipse on which the integrand is not too large.
        s = np.linspace(0.01, 3.0, 300)
        t = (1 + np.cosh(s)) / 2
        with np.errstate(over="ignore"):
            most = 5 * max(count, 1.0) * t ** (3.0 + sizes)
            most = most * np.exp(count * (t**4 - 1) - 2 * nodes * s)
            return np.min(2 * 2 * most / (1 - np.exp(-s))) <= TOLERANCE / 2

    steps = [16, 24, 32, 48, 64, 96, 128, 192, 256]
    assert num_nodes(count, sizes) == next(n for n in steps if proved(n))


def test_equal_probabilities_that_are_small_are_all_chosen():
    assert best_sizes(np.full((1, 300), 1e-6)).tolist() == [300]


def test_an_image_of_no_probable_label_gets_the_first_one():
    probs = np.array([[0.0, 0.0, 0.0], [np.nan, 0.0, 0.4]], np.float32)
    got = expected_f2_decoder(probs).astype(int)
    assert got.tolist() == [[1, 0, 0], [0, 0, 1]]


def test_a_label_without_a_number_is_never_chosen_and_hides_no_other():
    probs = np.array([[np.nan, 0.9, 0.0, 0.8, np.nan]], np.float32)
    assert expected_f2_decoder(probs).astype(int).tolist() == [[0, 1, 0, 1, 0]]


def test_sure_labels_are_all_chosen_and_impossible_ones_never():
    probs = np.array([[1, 0, 1, 1, 0, 1]], np.float32)
    assert expected_f2_decoder(probs).astype(int).tolist() == [[1, 0, 1, 1, 0, 1]]


def test_of_equal_probabilities_the_lower_id_is_chosen():
    probs = np.array([[0.1, 0.9, 0.3, 0.3, 0.3, 0.0]])
    size = best_sizes(probs)[0]
    assert expected_f2_decoder(probs)[0].nonzero()[0].tolist() == [1, 2, 3, 4][:size]


def test_images_do_not_depend_on_their_company(monkeypatch):
    probs = cases()[::37]
    alone = [best_sizes(row[None])[0] for row in probs]
    monkeypatch.setattr(module, "CHUNK_IMAGES", 5)
    assert best_sizes(probs).tolist() == alone


def test_no_images_give_no_answers():
    assert expected_f2_decoder(np.zeros((0, 4), np.float32)).shape == (0, 4)


@pytest.mark.parametrize(("count", "sizes"), [(3.0, 20), (40.0, 100), (900.0, 500)])
def test_the_nodes_give_the_mean_over_a_poisson_count(count, sizes):
    # The integrand for many improbable labels, whose count has a Poisson distribution.
    t, weights = module._nodes(num_nodes(count, sizes))
    counts = np.arange(3000)
    want = np.sum(poisson.pmf(counts, count) * 5 * count / (4 * counts + 4 + sizes))
    integrand = 5 * count * t ** (3 + sizes) * np.exp(count * (t**4 - 1))
    assert np.sum(weights * integrand) == pytest.approx(want, abs=TOLERANCE)


@pytest.mark.parametrize("largest", [1e-4, 0.01, 1 / 16])
@pytest.mark.parametrize("expected_count", [0.1, 7.0, 200.0])
def test_as_many_powers_are_taken_as_the_proof_needs(largest, expected_count):
    count = num_powers(largest, expected_count)
    bounds = expected_count * largest ** np.array([count, count - 1.0])
    assert bounds[0] <= TOLERANCE / 4 < bounds[1]


@pytest.mark.parametrize("largest", [1e-4, 0.01, 1 / 16])
def test_the_powers_give_the_logarithm_of_the_factors(largest):
    probs = np.full(2000, largest)
    count = num_powers(largest, float(probs.sum()))
    series = -sum((probs**r).sum() / r for r in range(1, count + 1))
    assert series == pytest.approx(np.log1p(-probs).sum(), abs=TOLERANCE / 2)
