"""Tests that the map has the principal axes, and that nearest labels are by cosine."""

import numpy as np

from jaxii.data import label_embedding
from jaxii.evaluation.details import NUM_NEAREST, label_map

VECTORS = np.random.default_rng(0).normal(size=(700, 6)).astype(np.float32)
VECTORS[:, 0] *= 3
VECTORS[[4, 9]] = 0


def test_nearest_labels_are_those_that_the_embedding_says():
    found = label_map(VECTORS)
    for label in (0, 5, 511, 512, 699):
        (at,) = np.flatnonzero(found.class_ids == label)
        wanted = label_embedding.nearest(VECTORS, label, NUM_NEAREST)
        assert [near for near, _ in wanted] == found.nearest[at].tolist()
        cosines = [cosine for _, cosine in wanted]
        np.testing.assert_allclose(found.cosines[at], cosines, rtol=1e-5)


def test_labels_that_occur_with_no_other_are_not_on_the_map():
    found = label_map(VECTORS)
    assert set(range(700)) - set(found.class_ids.tolist()) == {4, 9}
    assert not set(found.nearest.ravel().tolist()) & {4, 9}


def test_the_axes_have_the_largest_variance_first():
    found = label_map(VECTORS)
    variances = found.places.var(axis=0)
    assert variances[0] > variances[1]
    unit = VECTORS[found.class_ids]
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    wanted = np.linalg.svd(unit - unit.mean(axis=0), compute_uv=False) ** 2
    np.testing.assert_allclose(found.shares, wanted[:2] / wanted.sum(), rtol=1e-4)


def test_vectors_that_mirror_another_embedding_give_the_same_map():
    one, other = label_map(VECTORS), label_map(-VECTORS)
    signs = np.sign((one.places * other.places).sum(axis=0))
    np.testing.assert_allclose(one.places, signs * other.places, atol=1e-5)
    again = label_map(VECTORS)
    np.testing.assert_array_equal(one.places, again.places)


def test_too_few_labels_make_no_map():
    few = np.zeros((5, 3), np.float32)
    few[:2] = 1
    assert label_map(few) is None


def test_an_embedding_of_one_number_lies_on_a_line():
    line = np.array([[1.0], [2.0], [-1.0], [0.0]], np.float32)
    found = label_map(line)
    assert found.class_ids.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(found.places[:, 1], 0)
    assert found.nearest.shape == (3, 2)
