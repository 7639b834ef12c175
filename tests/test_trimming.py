import numpy as np

from jaxii.decoding.trimming import cluster_labels, trim


def test_labels_that_point_the_same_way_are_one_cluster():
    rng = np.random.default_rng(0)
    ways = np.eye(4, dtype=np.float32)[np.arange(14) % 4]
    lengths = rng.uniform(0.5, 5, (14, 1)).astype(np.float32)
    noise = rng.normal(0, 0.01, ways.shape).astype(np.float32)
    clusters = cluster_labels(ways * lengths + noise)
    assert len(np.unique(clusters)) == 4
    for way in range(4):
        assert len(np.unique(clusters[way::4])) == 1


def test_there_are_as_many_clusters_as_the_recipe_had_for_its_labels():
    vectors = np.random.default_rng(1).normal(0, 1, (300, 20)).astype(np.float32)
    assert len(np.unique(cluster_labels(vectors))) == round(300 * 2030 / 7178)


def test_a_label_without_a_vector_is_a_cluster_of_its_own():
    vectors = np.random.default_rng(2).normal(0, 1, (9, 3)).astype(np.float32)
    vectors[[1, 5]] = 0
    clusters = cluster_labels(vectors)
    others = np.delete(clusters, [1, 5])
    assert clusters[1] != clusters[5]
    assert not np.isin(clusters[[1, 5]], others).any()
    assert len(np.unique(others)) == 2


def test_labels_without_vectors_are_never_trimmed():
    clusters = cluster_labels(np.zeros((4, 2), np.float32))
    assert sorted(clusters.tolist()) == [0, 1, 2, 3]


def test_the_two_most_probable_of_a_cluster_are_kept():
    rng = np.random.default_rng(3)
    scores = rng.random((200, 30)).astype(np.float32)
    clusters = rng.integers(0, 6, 30)
    chosen = scores > rng.random((200, 1))
    got = trim(chosen, scores, clusters)
    want = np.zeros_like(chosen)
    for i in range(200):
        for cluster in range(6):
            ids = np.flatnonzero(chosen[i] & (clusters == cluster))
            want[i, sorted(ids, key=lambda j: -scores[i, j])[:2]] = True
    np.testing.assert_array_equal(got, want)


def test_answers_of_one_label_or_none_are_left_as_they_are():
    chosen = np.array([[True, False], [False, False]])
    scores = np.array([[0.5, 0.1], [0.2, 0.1]], np.float32)
    assert trim(chosen, scores, np.array([0, 0])).tolist() == chosen.tolist()
    none = np.zeros((0, 2), bool)
    assert trim(none, np.zeros((0, 2), np.float32), np.array([0, 0])).shape == (0, 2)
