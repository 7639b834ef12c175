"""Tests that scores equal scikit-learn's for any batches and processes."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import fbeta_score

from jaxii.decoding.decoders import NAMES, fit_decoders
from jaxii.decoding.thresholds import DEFAULT_THRESHOLDS, choose
from jaxii.evaluation import decoder_scores
from jaxii.evaluation.decoder_scores import (
    MOST_SHOWN,
    DecoderScores,
    SplitTruth,
    best_and_worst,
)
from jaxii.metrics import streaming

NUM_CLASSES = 12
SLICES = ("light", "none of these", "dark")
RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(NUM_CLASSES, 4)).astype(np.float32)


def split(num_images, seed):
    """Returns probabilities that are far too high, embeddings, labels and slices."""
    rng = np.random.default_rng(seed)
    true = rng.beta(0.3, 1.2, (num_images, NUM_CLASSES))
    targets = rng.random(true.shape) < true
    embedding = targets @ VECTORS + rng.normal(0, 0.5, (num_images, 4))
    slices = 2 * rng.integers(0, 2, num_images)
    probs = np.sqrt(true).astype(np.float32)
    return probs, embedding.astype(np.float32), targets, slices


@pytest.fixture(scope="module")
def sums():
    probs, embedding, targets, _ = split(600, 1)
    acc = streaming.empty(NUM_CLASSES, DEFAULT_THRESHOLDS)
    return jax.device_get(
        jax.jit(streaming.update)(
            acc,
            jnp.asarray(probs),
            jnp.asarray(targets),
            None,
            jnp.ones(600),
            jnp.asarray(embedding),
            jnp.asarray(VECTORS),
        )
    )


@pytest.fixture(scope="module")
def decoders(sums):
    return fit_decoders(sums, choose(sums), label_embeddings=VECTORS)


def answers(decoders, seed=2):
    probs, embedding, _, _ = split(400, seed)
    return decoders.decisions(decoders.names(has_head=True), probs, embedding)


def scores_of(
    decoders,
    names,
    targets,
    slices,
    *,
    in_use,
    scored=None,
    groups=None,
    measure_offsets=False,
):
    """Returns empty scores of a split with these targets."""
    num_images = len(targets)
    truth = SplitTruth(
        offsets=np.concatenate([[0], np.cumsum(targets.sum(axis=1))]),
        label_ids=np.nonzero(targets)[1].astype(np.int32),
        scored=np.ones(num_images, bool) if scored is None else scored,
        slice_ids=slices,
        slices=SLICES,
        groups=np.arange(num_images) // 2 if groups is None else groups,
    )
    return DecoderScores(
        decoders, names, in_use=in_use, truth=truth, measure_offsets=measure_offsets
    )


def add(found, order, size, seed=2):
    """Adds images in this order, in batches with padding."""
    probs, embedding, _, _ = split(400, seed)
    for start in range(0, len(order), size):
        part = order[start : start + size]
        rows = np.full(size, -1, np.int32)
        rows[: len(part)] = part
        found.add(probs[rows], embedding[rows], rows)
    return found


@pytest.fixture(scope="module")
def scores(decoders):
    _, _, targets, slices = split(400, 2)
    names = decoders.names(has_head=True)
    found = scores_of(decoders, names, targets, slices, in_use="per_class")
    return add(found, np.random.default_rng(3).permutation(400), 64)


def error_of(values, groups):
    """Returns the standard error of a mean over images, from the sums of groups."""
    residuals = [
        values[groups == group].sum() - (groups == group).sum() * values.mean()
        for group in set(groups.tolist())
    ]
    return np.std(residuals, ddof=1) * np.sqrt(len(residuals)) / len(values)


def test_scores_are_those_of_scikit_learn(decoders, scores):
    targets, got = split(400, 2)[2], answers(decoders)
    figures = scores.decoders()
    assert tuple(figures) == NAMES
    for name, chosen in got.items():
        mean = fbeta_score(targets, chosen, beta=2, average="samples", zero_division=0)
        both = 4 * targets.sum(axis=1) + chosen.sum(axis=1)
        each = 5 * (targets & chosen).sum(axis=1) / both
        found = figures[name]
        assert found.f2 == pytest.approx(mean)
        pairs = each.reshape(200, 2).mean(axis=1)
        error = np.std(pairs, ddof=1) / np.sqrt(200)
        assert found.standard_error == pytest.approx(error)
        assert found.coverage == np.count_nonzero((chosen & targets).any(axis=0))
        assert found.labels_per_image == pytest.approx(chosen.sum() / 400)


def test_slices_are_measured_apart_with_the_decoder_in_use(decoders, scores):
    _, _, targets, slices = split(400, 2)
    chosen = answers(decoders)["per_class"]
    found = scores.slices()
    assert scores.f2.mean() == pytest.approx(scores.decoders()["per_class"].f2)
    # A slice without images is omitted.
    assert list(found) == ["light", "dark"]
    for number, name in enumerate(SLICES):
        rows = slices == number
        if rows.any():
            f2 = fbeta_score(
                targets[rows], chosen[rows], beta=2, average="samples", zero_division=0
            )
            assert found[name].f2 == pytest.approx(f2)
            assert found[name].num_images == rows.sum()
            error = error_of(scores.f2[rows], np.arange(400)[rows] // 2)
            assert found[name].standard_error == pytest.approx(error)


def test_images_without_truth_change_no_score(decoders):
    probs, embedding, targets, slices = split(400, 2)
    scored = np.random.default_rng(4).random(400) < 0.5
    targets &= scored[:, None]

    def scores_at(rows, scored):
        found = scores_of(
            decoders,
            decoders.names(has_head=True),
            targets[rows],
            slices[rows],
            in_use="threshold",
            scored=scored,
            groups=rows // 2,
        )
        found.add(probs[rows], embedding[rows], np.arange(len(rows)))
        return found

    some = np.flatnonzero(scored)
    mixed = scores_at(np.arange(400), scored)
    alone = scores_at(some, np.ones(len(some), bool))
    # Equal except for the order of additions.
    for name, found in mixed.decoders().items():
        other = alone.decoders()[name].to_json()
        assert found.to_json() == pytest.approx(other, rel=1e-12)
    for name, found in mixed.slices().items():
        other = vars(alone.slices()[name])
        for figure, number in vars(found).items():
            assert number == pytest.approx(other[figure], rel=1e-12)
    assert mixed.interval() == pytest.approx(alone.interval(), rel=1e-12)
    assert mixed.bootstrap() == alone.bootstrap()
    kinds = zip(mixed.best_and_worst(), alone.best_and_worst(), strict=True)
    for shown, only in kinds:
        assert shown == [some[row] for row in only]
    # All images are predicted.
    assert all(len(ids) for ids in mixed.predictions)


def test_a_batch_without_any_truth_scores_nothing(decoders):
    probs, embedding, _, slices = split(3, 2)
    found = scores_of(
        decoders,
        ["threshold"],
        np.zeros((3, NUM_CLASSES), bool),
        slices,
        in_use="threshold",
        scored=np.zeros(3, bool),
    )
    found.add(probs, embedding, np.arange(3))
    assert found.best_and_worst() == ([], [])
    assert found.slices() == {}


def test_offsets_are_of_scored_images_and_the_same_in_any_order(decoders):
    probs, _, targets, slices = split(400, 2)
    names, scored = decoders.names(has_head=True), np.arange(400) % 3 > 0
    found = [
        add(
            scores_of(
                decoders,
                names,
                targets & scored[:, None],
                slices,
                in_use="per_class",
                scored=scored,
                measure_offsets=True,
            ),
            order,
            64,
        )
        for order in (np.arange(400), np.random.default_rng(5).permutation(400))
    ]
    offsets = found[0].expected_f2_offsets()
    assert offsets == found[1].expected_f2_offsets()
    assert tuple(offsets) == NAMES
    for name, chosen in answers(decoders).items():
        mean = fbeta_score(
            targets[scored], chosen[scored], beta=2, average="samples", zero_division=0
        )
        expected = decoders.expected_f2(name, probs, chosen)[scored].mean()
        assert offsets[name] == pytest.approx(mean - expected)


def test_offsets_that_are_not_asked_for_are_not_measured(scores):
    assert scores.expected_f2_offsets() == {}


def test_order_and_size_of_batches_do_not_matter(decoders, scores):
    _, _, targets, slices = split(400, 2)
    names = decoders.names(has_head=True)
    other = scores_of(decoders, names, targets, slices, in_use="per_class")
    add(other, np.arange(400), 100)
    assert other.decoders() == scores.decoders()
    assert other.slices() == scores.slices()
    assert other.best_and_worst() == scores.best_and_worst()
    for one, same in zip(other.predictions, scores.predictions, strict=True):
        np.testing.assert_array_equal(one, same)


def test_processes_that_share_the_images_find_what_one_finds(
    decoders, scores, monkeypatch
):
    _, _, targets, slices = split(400, 2)
    names = decoders.names(has_head=True)
    own = []
    for process in range(3):
        found = scores_of(
            decoders, names, targets, slices, in_use="per_class", measure_offsets=True
        )
        own.append(add(found, np.arange(process, 400, 3), 50))
    alone = scores_of(
        decoders, names, targets, slices, in_use="per_class", measure_offsets=True
    )
    offsets = add(alone, np.arange(400), 100).expected_f2_offsets()
    together(own, monkeypatch)
    for found in own:
        assert found.decoders() == scores.decoders()
        assert found.slices() == scores.slices()
        assert found.interval() == scores.interval()
        assert found.expected_f2_offsets() == offsets
        assert found.best_and_worst() == scores.best_and_worst()
        for one, same in zip(found.predictions, scores.predictions, strict=True):
            np.testing.assert_array_equal(one, same)


def together(own, monkeypatch):
    """Calls `add_processes` of all at once, in one thread per process."""
    barrier, sent = threading.Barrier(len(own)), {}

    def gather(array):
        sent[threading.current_thread().name] = array
        barrier.wait()
        found = np.stack([sent[str(i)] for i in range(len(own))])
        barrier.wait()
        return found

    monkeypatch.setattr(jax, "process_count", lambda: len(own))
    monkeypatch.setattr(decoder_scores, "_gather", gather)
    threads = [
        threading.Thread(target=found.add_processes, name=str(i))
        for i, found in enumerate(own)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not barrier.broken


def test_a_prediction_lists_the_most_probable_label_first(scores):
    probs = split(400, 2)[0]
    for row, ids in enumerate(scores.predictions):
        assert len(ids) and np.all(np.diff(probs[row, ids]) <= 0)


# Best and worst images.

NUM = 60
# With few values, most images share their F2 with others.
F2 = RNG.integers(0, 4, NUM) / 4
NUM_TRUE = RNG.integers(1, 4, NUM)


def test_they_are_those_of_a_sort_of_all_images():
    best, worst = best_and_worst(F2, NUM_TRUE, np.arange(NUM))
    wanted = sorted(range(NUM), key=lambda i: (-F2[i], -NUM_TRUE[i], i))
    assert best == wanted[:MOST_SHOWN]
    wanted = sorted(range(NUM), key=lambda i: (F2[i], -NUM_TRUE[i], i))
    assert worst == wanted[:MOST_SHOWN]


def test_no_image_of_a_small_split_is_both():
    best, worst = best_and_worst(F2[:5], NUM_TRUE[:5], np.arange(5))
    assert len({*best, *worst}) == 5
    assert not {*best} & {*worst}


def test_where_nearly_all_are_perfect_the_worst_are_not_among_the_best():
    f2 = np.where(np.arange(200) < 3, 0.0, 1.0)
    best, worst = best_and_worst(f2, np.ones(200, int), np.arange(200))
    assert len(best) == len(worst) == MOST_SHOWN
    assert worst[:3] == [0, 1, 2]
    assert not {*best} & {*worst}


def test_the_worst_are_at_most_half_of_the_images():
    best, worst = best_and_worst(F2[:4], NUM_TRUE[:4], np.arange(4) + 20)
    assert len(worst) == len(best) == 2
