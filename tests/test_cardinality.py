import itertools

import numpy as np
import pytest

from jaxii.decoding.cardinality import (
    MOST_CHOSEN,
    MOST_PRESENT,
    cardinality_decoder,
    count_prior,
)
from jaxii.decoding.expected_f import expected_f2_decoder

EVEN = np.full(MOST_PRESENT + 1, 1 / (MOST_PRESENT + 1))


def test_the_prior_is_the_share_of_images_with_each_number_of_labels():
    counts = np.array([1, 2, 2, 3] * 1000)
    prior = count_prior(counts)
    assert prior.sum() == pytest.approx(1)
    np.testing.assert_allclose(prior[:5], [0, 0.25, 0.5, 0.25, 0], atol=1e-3)
    assert prior.min() > 0


def test_more_labels_than_are_told_apart_count_as_the_most():
    assert count_prior(np.array([500] * 99))[-1] > 0.99


def test_under_an_even_prior_it_is_the_expected_f2_decoder():
    probs = np.random.default_rng(0).beta(0.3, 2, (300, 12)).astype(np.float32)
    got = cardinality_decoder(probs, prior=EVEN)
    np.testing.assert_array_equal(got, expected_f2_decoder(probs))


def test_it_is_the_best_k_of_all_outcomes_weighted_by_the_prior():
    rng = np.random.default_rng(1)
    prior = count_prior(rng.poisson(2.5, 200))
    probs = np.sort(rng.random((20, 7)), axis=1)[:, ::-1]
    outcomes = np.array(list(itertools.product([0, 1], repeat=7)))
    for row in probs:
        chances = np.prod(np.where(outcomes == 1, row, 1 - row), axis=1)
        chances = chances * prior[outcomes.sum(axis=1)]
        worth = []
        for k in range(1, 8):
            hits = outcomes[:, :k].sum(axis=1)
            worth.append(np.sum(chances * 5 * hits / (4 * outcomes.sum(axis=1) + k)))
        got = cardinality_decoder(row[None], prior=prior)
        assert got.sum() == np.argmax(worth) + 1


def test_a_prior_of_single_labels_shortens_the_answers():
    probs = np.random.default_rng(2).beta(0.5, 4, (200, 40)).astype(np.float32)
    single = count_prior(np.ones(5000, np.int64))
    short = cardinality_decoder(probs, prior=single).sum()
    assert short < cardinality_decoder(probs, prior=EVEN).sum()


def test_many_improbable_labels_count_nearly_as_they_would_one_by_one():
    rng = np.random.default_rng(3)
    probs = np.concatenate([rng.random((300, 6)), rng.random((300, 400)) / 200], axis=1)
    got = cardinality_decoder(probs, prior=EVEN).sum(axis=1)
    want = expected_f2_decoder(probs).sum(axis=1)
    assert np.mean(got == want) > 0.98
    assert np.abs(got - want).max() <= 1


def test_an_answer_has_at_least_one_label_and_no_more_than_are_tried():
    probs = np.stack([np.zeros(30), np.full(30, 0.9), np.full(30, np.nan)])
    sizes = cardinality_decoder(probs, prior=EVEN).sum(axis=1)
    assert sizes.tolist() == [1, MOST_CHOSEN, 1]


def test_no_images_give_no_answers():
    none = np.zeros((0, 4), np.float32)
    assert cardinality_decoder(none, prior=EVEN).shape == (0, 4)
