"""Tests that the best constant prediction equals that of a search with scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import fbeta_score

from jaxii.decoding.constant import best_constant, constant_f2
from jaxii.errors import InputError


def random_csr(num_images, num_classes, seed=0):
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, num_classes + 1)
    targets = rng.random((num_images, num_classes)) < 0.6 * weights
    offsets = np.concatenate([[0], np.cumsum(targets.sum(axis=1))])
    return targets, offsets, np.nonzero(targets)[1].astype(np.int32)


def test_best_constant_is_the_best_prefix_of_the_frequent_labels():
    targets, offsets, label_ids = random_csr(200, 20)
    counts = np.random.default_rng(1).integers(0, 50, 20)
    ids, f2 = best_constant(counts, offsets, label_ids)
    order = np.argsort(-counts, kind="stable")
    f2s = []
    for k in range(1, 21):
        predicted = np.zeros_like(targets)
        predicted[:, order[:k]] = True
        f2s.append(fbeta_score(targets, predicted, beta=2, average="samples"))
    assert f2 == pytest.approx(max(f2s), abs=1e-9)
    assert ids.tolist() == order[: np.argmax(f2s) + 1].tolist()


def test_the_best_constant_has_as_many_labels_as_the_images_need():
    # Every image has 40 of the 60 labels.
    offsets = 40 * np.arange(6)
    label_ids = np.tile(np.arange(40, dtype=np.int32), 5)
    ids, f2 = best_constant(np.arange(60, 0, -1), offsets, label_ids)
    assert ids.tolist() == list(range(40)) and f2 == pytest.approx(1)


def test_every_length_is_tried_on_a_large_split():
    rng = np.random.default_rng(0)
    lengths = rng.poisson(20, 40_000)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    label_ids = (7178 * rng.random(offsets[-1]) ** 8).astype(np.int32)
    counts = np.bincount(label_ids, minlength=7178)
    ids, f2 = best_constant(counts, offsets, label_ids)
    assert len(ids) > 10
    assert f2 == pytest.approx(constant_f2(ids, 7178, offsets, label_ids))


def test_constant_f2_applies_the_same_labels_to_another_split():
    targets, offsets, label_ids = random_csr(100, 8, seed=2)
    predicted = np.zeros_like(targets)
    predicted[:, [2, 0]] = True
    want = fbeta_score(targets, predicted, beta=2, average="samples")
    got = constant_f2([2, 0], 8, offsets, label_ids)
    assert got == pytest.approx(want, abs=1e-9)


def test_constant_of_a_part_of_a_csr_counts_that_part_only():
    _, offsets, label_ids = random_csr(100, 8, seed=2)
    part = constant_f2([0], 8, offsets[50:], label_ids)
    start = offsets[50]
    assert part == constant_f2([0], 8, offsets[50:] - start, label_ids[start:])


def test_a_constant_of_an_empty_split_is_refused():
    with pytest.raises(InputError, match="0"):
        best_constant(np.ones(3), np.zeros(1, np.int64), np.zeros(0, np.int32))
