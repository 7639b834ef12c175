"""Tests PMI against a loop, and the factorisation against exact eigenvectors."""

import numpy as np
import pytest
import scipy.sparse

from jaxii.data import label_embedding
from jaxii.data.label_embedding import cooccurrence, factorise, pmi
from jaxii.errors import InputError
from jaxii.prepare.toy_regions import annotators, scenes


def csr(rows):
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return offsets.astype(np.int64), np.array(
        [i for row in rows for i in row], np.int32
    )


def random_rows(num_images, num_classes, rng):
    """Returns labels of images with overlapping topics and Zipf frequencies."""
    weights = 1.0 / np.arange(2, num_classes + 2)
    popular = rng.choice(num_classes, (num_images, 2), p=weights / weights.sum())
    topic = rng.integers(num_classes // 5, size=num_images)
    near = (5 * topic[:, None] + rng.poisson(3.0, (num_images, 3))) % num_classes
    return [sorted(set(row)) for row in np.hstack([popular, near]).tolist()]


def pmi_by_loops(rows, num_classes, *, positive):
    counts, together, n = np.zeros(num_classes), np.zeros((num_classes,) * 2), 0
    for row in map(set, rows):
        n += bool(row)
        for i in row:
            counts[i] += 1
            for j in row - {i}:
                together[i, j] += 1
    matrix = np.zeros_like(together)
    for i in range(num_classes):
        for j in range(num_classes):
            if together[i, j] > 0:
                value = np.log(together[i, j] * n / (counts[i] * counts[j]))
                matrix[i, j] = max(value, 0.0) if positive else value
    return matrix


@pytest.fixture(scope="module")
def thousand():
    """The PMI matrix of 1,000 classes, and its eigenvalues by falling magnitude."""
    rng = np.random.default_rng(1)
    offsets, ids = csr(random_rows(40_000, 1000, rng))
    matrix = pmi(*cooccurrence(offsets, ids, 1000))
    values = np.linalg.eigvalsh(matrix.toarray())
    return matrix, values[np.argsort(-np.abs(values))]


@pytest.mark.parametrize("positive", [False, True])
def test_pmi_equals_loops(positive):
    rows = [*random_rows(300, 20, np.random.default_rng(0)), [], [3, 3, 4]]
    offsets, ids = csr(rows)
    counted = cooccurrence(offsets, ids, 20)
    got = pmi(*counted, positive=positive).toarray()
    np.testing.assert_allclose(
        got, pmi_by_loops(rows, 20, positive=positive), atol=1e-9
    )


def test_pmi_of_pairs_that_never_meet_and_of_the_diagonal_is_zero():
    offsets, ids = csr([[0, 1], [0, 1], [2, 3], [4]])
    matrix = pmi(*cooccurrence(offsets, ids, 5)).toarray()
    assert np.flatnonzero(matrix).tolist() == [1, 5, 13, 17]
    assert matrix[0, 1] == pytest.approx(np.log(2 * 4 / (2 * 2)))


def test_a_repeated_label_counts_once():
    once = cooccurrence(*csr([[0, 1], [1, 2]]), 3)
    twice = cooccurrence(*csr([[0, 1, 1, 0], [2, 1, 2]]), 3)
    assert (once[0] != twice[0]).nnz == 0
    assert once[1].tolist() == twice[1].tolist() == [1, 2, 1]


def test_independent_classes_have_a_pmi_near_zero():
    hits = np.random.default_rng(0).random((20_000, 8)) < 0.3
    offsets, ids = csr([np.flatnonzero(row).tolist() for row in hits])
    together, counts, _ = cooccurrence(offsets, ids, 8)
    matrix = pmi(together, counts, 20_000).toarray()
    assert np.abs(matrix).max() < 0.05


def test_smoothing_lowers_the_pmi_of_rare_pairs_and_keeps_symmetry():
    offsets, ids = csr(random_rows(3000, 60, np.random.default_rng(2)))
    counted = cooccurrence(offsets, ids, 60)
    plain = pmi(*counted).toarray()
    smooth = pmi(*counted, context_smoothing=0.75).toarray()
    np.testing.assert_allclose(smooth, smooth.T)
    rare = np.argsort(counted[1])[:20]
    pairs = plain[np.ix_(rare, rare)] != 0
    change = (smooth - plain)[np.ix_(rare, rare)][pairs]
    assert len(change) and change.max() < 0


def test_smoothed_pmi_is_the_mean_over_both_directions_of_the_published_one():
    rows = random_rows(300, 20, np.random.default_rng(0))
    together, counts, n = cooccurrence(*csr(rows), 20)
    got = pmi(together, counts, n, context_smoothing=0.75).toarray()
    pairs, c = together.toarray(), counts.astype(float)
    context = c**0.75 * c.sum() / np.sum(c**0.75)
    for i, j in zip(*np.nonzero(pairs), strict=True):
        one, other = (
            pairs[i, j] * n / (c[a] * context[b]) for a, b in ((i, j), (j, i))
        )
        assert got[i, j] == pytest.approx((np.log(one) + np.log(other)) / 2)


def test_a_single_image_says_nothing_of_what_belongs_together():
    assert pmi(*cooccurrence(*csr([[0, 1]]), 2)).nnz == 0


def test_vectors_of_all_dimensions_rebuild_the_matrix_with_the_signs_of_eigenvalues():
    offsets, ids = csr(random_rows(2000, 40, np.random.default_rng(3)))
    made = label_embedding.label_embedding(offsets, ids, 40, dim=40)
    matrix = pmi(*cooccurrence(offsets, ids, 40)).toarray()
    rebuilt = (made.vectors * np.sign(made.eigenvalues)) @ made.vectors.T
    np.testing.assert_allclose(rebuilt, matrix, atol=1e-4)
    assert made.explained_energy == pytest.approx(1.0)
    assert (made.eigenvalues < 0).any()


def test_the_energy_is_the_share_of_the_squared_eigenvalues():
    offsets, ids = csr(random_rows(2000, 40, np.random.default_rng(3)))
    made = label_embedding.label_embedding(offsets, ids, 40, dim=5)
    values = np.linalg.eigvalsh(pmi(*cooccurrence(offsets, ids, 40)).toarray())
    largest = np.sort(values**2)[::-1]
    want = largest[:5].sum() / largest.sum()
    assert made.explained_energy == pytest.approx(want, rel=1e-5)
    np.testing.assert_allclose(made.eigenvalues**2, largest[:5], rtol=1e-4)


@pytest.mark.parametrize("dim", [16, 64, 256])
def test_randomised_pairs_keep_99_percent_of_the_exact_energy(thousand, dim):
    matrix, exact = thousand
    values, basis = factorise(matrix, dim, exact=False)
    np.testing.assert_allclose(basis.T @ basis, np.eye(dim), atol=2e-3)
    rebuilt = np.sum(basis * (matrix @ basis), axis=0)
    assert np.sum(rebuilt**2) >= 0.99 * np.sum(exact[:dim] ** 2)
    np.testing.assert_allclose(values, rebuilt, rtol=1e-3, atol=1e-2)


def test_a_matrix_of_low_rank_is_factorised_at_random_too():
    rng = np.random.default_rng(0)
    factor = rng.standard_normal((600, 5))
    matrix = scipy.sparse.csr_array(factor @ factor.T)
    values, _ = factorise(matrix, 20, exact=False)
    want = np.sort(np.linalg.eigvalsh(factor.T @ factor))[::-1]
    np.testing.assert_allclose(values[:5], want, rtol=1e-4)
    assert np.isfinite(values).all() and np.abs(values[5:]).max() < 1e-2


@pytest.mark.parametrize(
    "block", [[[0, 2], [2, 0]], [[3, 0], [0, 3]], [[0, 0], [0, 1]]]
)
def test_a_space_that_powers_of_the_matrix_do_not_widen_is_filled_up(block):
    matrix = scipy.sparse.csr_array(np.kron(np.eye(400), np.array(block, float)))
    values, basis = factorise(matrix, 16, exact=False)
    largest = np.abs(np.linalg.eigvalsh(block)).max()
    np.testing.assert_allclose(np.abs(values), largest, rtol=1e-5)
    np.testing.assert_allclose(basis.T @ basis, np.eye(16), atol=1e-4)


def test_a_space_as_large_as_the_matrix_gives_the_exact_pairs(thousand):
    matrix, exact = thousand
    values, basis = factorise(matrix, 500, exact=False)
    assert values.dtype == basis.dtype == np.float32
    np.testing.assert_allclose(np.abs(values), np.abs(exact[:500]), rtol=1e-5)


@pytest.mark.parametrize("exact_max", [0, 2000])
def test_the_same_seed_gives_the_same_bytes(monkeypatch, exact_max):
    monkeypatch.setattr(label_embedding, "EXACT_MAX_CLASSES", exact_max)
    offsets, ids = csr(random_rows(2000, 200, np.random.default_rng(4)))
    first, second = (
        label_embedding.label_embedding(offsets, ids, 200, dim=16, seed=7)
        for _ in range(2)
    )
    assert first.vectors.tobytes() == second.vectors.tobytes()
    peaks = np.argmax(np.abs(first.vectors), axis=0)
    assert (first.vectors[peaks, np.arange(16)] > 0).all()


def test_random_factors_depend_on_the_seed(monkeypatch):
    monkeypatch.setattr(label_embedding, "EXACT_MAX_CLASSES", 0)
    monkeypatch.setattr(label_embedding, "_MIN_BLOCKS", 1)
    offsets, ids = csr(random_rows(2000, 200, np.random.default_rng(4)))
    made = [
        label_embedding.label_embedding(offsets, ids, 200, dim=16, seed=seed)
        for seed in (7, 7, 8)
    ]
    first, second, other = (one.vectors.tobytes() for one in made)
    assert first == second != other
    assert made[2].options == {
        "num_classes": 200,
        "dim": 16,
        "positive": False,
        "context_smoothing": 1.0,
        "seed": 8,
        "method": "randomised",
    }


def test_classes_without_company_have_zero_vectors_and_are_counted():
    offsets, ids = csr([[0, 1], [1, 2], [0, 1, 2], [0, 3], [4], []])
    made = label_embedding.label_embedding(offsets, ids, 7, dim=6)
    assert np.flatnonzero(~made.vectors.any(axis=1)).tolist() == [4, 5, 6]
    assert (made.num_isolated, made.num_pairs, made.num_images) == (3, 4, 5)


def test_labels_that_never_meet_give_zeros():
    made = label_embedding.label_embedding(*csr([[0], [1]]), 2, dim=2)
    assert not made.vectors.any() and made.explained_energy == 0.0


def test_images_without_any_label_are_counted_as_nothing():
    together, counts, num_images = cooccurrence(*csr([[], []]), 3)
    assert (together.shape, together.nnz, num_images) == ((3, 3), 0, 0)
    assert counts.tolist() == [0, 0, 0]


def test_all_labels_may_be_of_one_class():
    together, counts, num_images = cooccurrence(*csr([[1], [1]]), 3)
    assert (together.nnz, num_images) == (0, 2)
    assert counts.tolist() == [0, 2, 0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dim": 4}, "dim=4"),
        ({"dim": 0}, "dim=0"),
        ({"context_smoothing": 0.0}, "context_smoothing"),
        ({"context_smoothing": 1.1}, "context_smoothing"),
        ({"num_classes": 1, "dim": 1}, "label ids"),
        ({"num_classes": 2}, "from 0 to 2, but .* 2 classes; use ids from 0 to 1"),
        ({"label_ids": np.array([0, 1, -1, 2], np.int32)}, "ids range from -1 to 2"),
    ],
)
def test_what_cannot_be_used_is_refused(change, says):
    offsets, ids = csr([[0, 1], [1, 2]])
    given = {"offsets": offsets, "label_ids": ids, "num_classes": 3, "dim": 2} | change
    with pytest.raises(InputError, match=says):
        label_embedding.label_embedding(**given)


def test_a_saved_embedding_comes_back_with_its_provenance(tmp_path):
    made = label_embedding.label_embedding(
        *csr([[0, 1], [1, 2]]), 3, dim=2, positive=True
    )
    label_embedding.save(
        tmp_path / "labels.npz", made, {"split": "train", "label_hash": "ab"}
    )
    back = label_embedding.load(tmp_path / "labels.npz")
    np.testing.assert_array_equal(back.vectors, made.vectors)
    assert back.options == made.options and back.options["positive"] is True
    assert back.provenance == {"split": "train", "label_hash": "ab"}
    assert [path.name for path in tmp_path.iterdir()] == ["labels.npz"]


def test_a_file_that_is_no_embedding_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        label_embedding.load(tmp_path / "none.npz")
    (tmp_path / "bad.npz").write_text("no")
    with pytest.raises(InputError, match="not a label embedding"):
        label_embedding.load(tmp_path / "bad.npz")
    made = label_embedding.label_embedding(*csr([[0, 1]]), 2, dim=1)
    with pytest.raises(InputError, match=r"\.npz"):
        label_embedding.save(tmp_path / "labels.txt", made, {})


def test_a_zero_vector_has_no_neighbours_and_is_nobodys():
    vectors = np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [-1.0, 0.0]], np.float32)
    assert label_embedding.nearest(vectors, 1, 3) == []
    assert [place for place, _ in label_embedding.nearest(vectors, 0, 3)] == [2, 3]


def test_neighbours_are_the_largest_cosines_and_of_equals_the_lower_class():
    vectors = np.array([[2, 0], [0, 3], [1, 1], [5, 5], [-4, 0]], np.float32)
    found = label_embedding.nearest(vectors, 0, 3)
    assert [place for place, _ in found] == [2, 3, 1]
    want = [np.sqrt(0.5), np.sqrt(0.5), 0.0]
    assert [cosine for _, cosine in found] == pytest.approx(want, abs=1e-6)
    assert len(label_embedding.nearest(vectors, 0, 9)) == 4


def test_neighbours_in_the_toy_world_are_what_is_seen_together():
    rng = np.random.default_rng(0)
    names = scenes.LABELS
    rows = []
    for number in range(3000):
        region = scenes.SEEN[number % 3]
        seen = annotators.verified(scenes.compose(region, rng), rng, thorough=True)
        rows.append([names.index(name) for name in seen])
    made = label_embedding.label_embedding(*csr(rows), len(names), dim=24)

    def near(name, k=6):
        found = label_embedding.nearest(made.vectors, names.index(name), k)
        return {names[place] for place, _ in found}

    assert near("Boat") & {"Sailboat", "Water", "Fish", "Lighthouse"}
    assert near("Moon") & {"Star", "Night", "Astronomical object"}
    assert near("Bus") & {"Road", "Car", "Truck", "Traffic light", "Street light"}
