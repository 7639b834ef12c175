import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import fbeta_score

from jaxii.decoding.thresholds import (
    DEFAULT_THRESHOLDS,
    best_threshold,
    choose,
    class_thresholds,
    f2_by_threshold,
)
from jaxii.errors import InputError
from jaxii.metrics import streaming

update = jax.jit(streaming.update)


def sums_of(probs, targets, grid=DEFAULT_THRESHOLDS, **embeddings):
    probs = jnp.asarray(probs, jnp.float32)
    acc = streaming.empty(probs.shape[1], grid)
    mask = jnp.ones(len(probs))
    targets = jnp.asarray(targets, bool)
    return update(acc, probs, targets, None, mask, **embeddings)


def test_default_grid_is_99_steps_of_a_hundredth():
    assert DEFAULT_THRESHOLDS[0] == 0.01 and DEFAULT_THRESHOLDS[-1] == 0.99
    assert len(DEFAULT_THRESHOLDS) == 99


@pytest.mark.parametrize(
    ("f2s", "want"),
    [
        ([0.1, 0.5, 0.3, 0.2, 0.1], 0.2),
        ([0.5, 0.5, 0.5, 0.2, 0.1], 0.2),
        ([0.1, 0.5, 0.5, 0.5, 0.5], 0.3),
        ([0.1, 0.5, 0.2, 0.5, 0.5], 0.2),
        ([0.0, 0.0, 0.0, 0.0, 0.0], 0.3),
        ([0.1, 0.5, 0.5 + 1e-9, 0.5, 0.1], 0.3),
        ([0.1, 0.5, 0.5, 0.5 + 1e-6, 0.1], 0.4),
    ],
)
def test_the_middle_of_the_first_best_plateau_is_chosen(f2s, want):
    threshold, f2 = best_threshold((0.1, 0.2, 0.3, 0.4, 0.5), np.asarray(f2s))
    assert threshold == want
    assert f2 == pytest.approx(max(f2s))


def test_choice_separates_separable_labels():
    acc = sums_of([[0.9, 0.2], [0.8, 0.9]], [[1, 0], [1, 1]])
    choice = choose(acc)
    assert choice.threshold == pytest.approx(0.5, abs=0.01)
    assert f2_by_threshold(acc).max() == pytest.approx(1)


def test_top_k_is_the_k_of_the_best_f2_and_of_equals_the_smallest():
    probs = [[0.9, 0.8, 0.1, 0.05]]
    assert choose(sums_of(probs, [[1, 1, 0, 0]])).top_k == 2
    assert choose(sums_of(probs, [[0, 0, 0, 0]])).top_k == 1


@pytest.mark.parametrize("num_labels", [40, 100])
def test_a_ranking_decoder_uses_as_many_labels_as_images_have(num_labels):
    targets = np.arange(120)[None] < num_labels
    scores = np.linspace(0.9, 0.1, 120)[None]
    choice = choose(
        sums_of(
            scores,
            targets,
            embedding=jnp.asarray(scores, jnp.float32),
            label_embeddings=jnp.eye(120),
        )
    )
    assert choice.top_k == choice.embedding_k == num_labels


def test_embedding_k_is_chosen_only_with_an_embedding():
    probs, targets = [[0.9, 0.8, 0.1]], [[1, 0, 1]]
    assert choose(sums_of(probs, targets)).embedding_k is None
    embedded = sums_of(
        probs,
        targets,
        embedding=jnp.array([[1.0, 0.0, 0.5]]),
        label_embeddings=jnp.eye(3),
    )
    assert choose(embedded).embedding_k == 2


def many_images(num_images=4000, seed=0):
    """Returns data with class 0 reported too low and class 1 too high; 2 is rare."""
    rng = np.random.default_rng(seed)
    true = rng.beta(0.3, 0.5, (num_images, 3))
    true[:, 2] *= rng.random(num_images) < 0.002
    targets = rng.random(true.shape) < true
    return true ** np.array([2.0, 0.5, 1.0]), targets


def test_thresholds_of_classes_follow_how_they_are_reported():
    acc = sums_of(*many_images())
    threshold = choose(acc).threshold
    low, high, rare = class_thresholds(acc, threshold)
    assert low < threshold < high
    assert rare == pytest.approx(threshold, abs=0.05)


@pytest.mark.parametrize("seed", range(4))
def test_thresholds_of_classes_are_those_of_a_search_class_by_class(seed):
    probs, targets = many_images(300, seed)
    probs, grid = np.float32(probs), np.float32(DEFAULT_THRESHOLDS)
    threshold = DEFAULT_THRESHOLDS[29]
    f2 = fbeta_score(
        targets, probs >= grid[29], beta=2, average="samples", zero_division=0
    )
    want = []
    for c in range(3):
        gains = []
        for t in grid:
            chosen = probs[:, c] >= t
            gains.append(5 * np.sum(chosen & targets[:, c]) - f2 * np.sum(chosen))
        best = [i for i, gain in enumerate(gains) if gain >= max(gains) - 1e-9]
        plateau = [i for i in best if set(range(best[0], i)) <= set(best)]
        own = grid[plateau[(len(plateau) - 1) // 2]]
        share = targets[:, c].sum() / (targets[:, c].sum() + 50)
        want.append(share * own + (1 - share) * threshold)
    got = class_thresholds(sums_of(probs, targets), threshold)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_class_without_positives_takes_the_threshold_of_all():
    probs, targets = many_images(500)
    targets[:, 1] = False
    acc = sums_of(probs, targets)
    assert class_thresholds(acc, 0.4)[1] == pytest.approx(0.4)


def test_thresholds_of_classes_raise_the_f2_of_new_images():
    acc = sums_of(*many_images())
    threshold = choose(acc).threshold
    own = class_thresholds(acc, threshold)
    probs, targets = many_images(seed=1)
    f2 = [
        fbeta_score(targets, probs >= t, beta=2, average="samples", zero_division=0)
        for t in (own, threshold)
    ]
    assert f2[0] > f2[1] + 0.005


def test_a_choice_cannot_be_changed():
    choice = choose(sums_of([[0.9, 0.1]], [[1, 0]]))
    with pytest.raises(dataclasses.FrozenInstanceError):
        choice.top_k = 3


def test_choosing_on_no_image_is_refused():
    nothing = streaming.empty(3, DEFAULT_THRESHOLDS)
    assert not f2_by_threshold(nothing).any()
    with pytest.raises(InputError, match="0 images"):
        choose(nothing)
