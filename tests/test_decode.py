import numpy as np
import pytest
from sklearn.metrics import fbeta_score

from jaxii.decoding.decode import (
    best_constant,
    constant_f2,
    embedding_decoder,
    label_lists,
    threshold_decoder,
    top_k_decoder,
)
from jaxii.errors import InputError


def scores_of(*rows):
    return np.asarray(rows, np.float32)


def random_csr(num_images, num_classes, seed=0):
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, num_classes + 1)
    targets = rng.random((num_images, num_classes)) < 0.6 * weights
    offsets = np.concatenate([[0], np.cumsum(targets.sum(axis=1))])
    return targets, offsets, np.nonzero(targets)[1].astype(np.int32)


def test_a_score_on_the_threshold_is_predicted():
    scores = scores_of([0.1, np.nextafter(np.float32(0.1), 0)])
    assert threshold_decoder(scores, threshold=0.1).tolist() == [[True, False]]


def test_at_least_one_gives_the_best_label_of_an_empty_answer_only():
    scores = scores_of([0.1, 0.3, 0.2], [0.6, 0.1, 0.7], [np.nan, np.nan, np.nan])
    got = threshold_decoder(scores, threshold=0.5, at_least_one=True)
    assert got.astype(int).tolist() == [[0, 1, 0], [1, 0, 1], [1, 0, 0]]


def test_every_class_can_have_a_threshold_of_its_own():
    scores = scores_of([0.5, 0.5, 0.5], [0.1, 0.7, 0.2])
    thresholds = np.array([0.2, 0.6, 0.5])
    got = threshold_decoder(scores, threshold=thresholds, at_least_one=True)
    assert got.astype(int).tolist() == [[1, 0, 1], [0, 1, 0]]


def test_without_at_least_one_an_answer_may_be_empty():
    assert not threshold_decoder(scores_of([0.1, 0.2]), threshold=0.5).any()


def test_no_images_give_no_answers():
    none = np.zeros((0, 3), np.float32)
    got = threshold_decoder(none, threshold=0.5, at_least_one=True)
    assert got.shape == (0, 3)
    assert top_k_decoder(none, k=2).shape == (0, 3)


@pytest.mark.parametrize("k", [1, 3, 7, 9])
def test_top_k_equals_a_stable_sort(k):
    scores = np.random.default_rng(0).integers(0, 4, (50, 7)).astype(np.float32)
    got = top_k_decoder(scores, k=k)
    want = np.zeros_like(got)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    np.put_along_axis(want, order, True, axis=1)
    np.testing.assert_array_equal(got, want)


def test_every_image_can_have_a_k_of_its_own():
    scores = np.random.default_rng(1).integers(0, 4, (50, 7)).astype(np.float32)
    ks = np.random.default_rng(2).integers(1, 10, 50)
    got = top_k_decoder(scores, k=ks)
    want = [
        top_k_decoder(row[None], k=int(k))[0] for row, k in zip(scores, ks, strict=True)
    ]
    np.testing.assert_array_equal(got, want)


def test_top_k_of_less_than_one_is_refused():
    with pytest.raises(InputError, match="k=0"):
        top_k_decoder(scores_of([0.1]), k=0)


def test_embedding_decoder_does_not_depend_on_lengths():
    labels = scores_of([1, 0], [0, 100], [-1, -1])
    got = embedding_decoder(scores_of([3, 0.1]), label_embeddings=labels, k=1)
    assert got.tolist() == [[True, False, False]]


def test_embedding_decoder_takes_zero_vectors():
    labels = scores_of([0, 0], [-1, 0])
    got = embedding_decoder(scores_of([1, 0], [0, 0]), label_embeddings=labels, k=1)
    assert got.tolist() == [[True, False], [True, False]]


def test_label_lists_are_ordered_by_score_when_scores_are_given():
    scores = scores_of([0.6, 0.1, 0.7], [0.1, 0.2, 0.1])
    chosen = scores >= 0.5
    assert [ids.tolist() for ids in label_lists(chosen)] == [[0, 2], []]
    assert [ids.tolist() for ids in label_lists(chosen, scores)] == [[2, 0], []]


def test_best_constant_is_the_best_prefix_of_the_frequent_labels():
    targets, offsets, label_ids = random_csr(200, 20)
    counts = np.random.default_rng(1).integers(0, 50, 20)
    ids, f2 = best_constant(counts, offsets, label_ids)
    order = np.argsort(-counts, kind="stable")
    f2s = []
    for k in range(1, 11):
        predicted = np.zeros_like(targets)
        predicted[:, order[:k]] = True
        f2s.append(fbeta_score(targets, predicted, beta=2, average="samples"))
    assert f2 == pytest.approx(max(f2s), abs=1e-9)
    assert ids.tolist() == order[: np.argmax(f2s) + 1].tolist()


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
