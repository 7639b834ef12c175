"""Tests likely wrong or missing labels: the ranking, its file, and the command."""

import csv

import numpy as np
import pytest

from jaxii.data.labels import Vocabulary
from jaxii.evaluation import suspects
from jaxii.evaluation.suspects import Suspects, rank


def case(seed, images=60, classes=7):
    """Returns probabilities that follow the labels, some of them flipped."""
    rng = np.random.default_rng(seed)
    truth = rng.random((images, classes)) < rng.uniform(0.05, 0.6, classes)
    probs = np.where(truth, rng.beta(4, 2, truth.shape), rng.beta(1, 5, truth.shape))
    targets = truth ^ (rng.random(truth.shape) < 0.05)
    known = rng.random(truth.shape) < 0.9
    return probs.astype(np.float32), targets, known


def by_loops(probs, targets, known):
    """Returns (score, image, label, given) of each suspect, computed in loops."""
    found = []
    for label in range(probs.shape[1]):
        sums, counts = [0.0, 0.0], [0, 0]
        for image in range(len(probs)):
            if known[image, label]:
                p = float(probs[image, label])
                given = int(targets[image, label])
                sums[given] += p if given else 1 - p
                counts[given] += 1
        if 0 in counts:
            continue
        means = [sums[i] / counts[i] for i in (0, 1)]
        for image in range(len(probs)):
            p = float(probs[image, label])
            shifted = [
                own - mean + max(means)
                for own, mean in zip((1 - p, p), means, strict=True)
            ]
            given = int(targets[image, label])
            score = shifted[1 - given] / sum(shifted)
            if known[image, label] and score > 0.5:
                found.append((score, image, label, bool(given)))
    return sorted(found, key=lambda each: (-each[0], each[1], each[2]))


@pytest.mark.parametrize("seed", range(5))
def test_the_ranking_is_that_of_loops(seed):
    given = case(seed)
    found, wanted = rank(*given), by_loops(*given)
    assert 10 < len(found) == len(wanted)
    scores, rows, label_ids, is_given = zip(*wanted, strict=True)
    assert found.rows.tolist() == list(rows)
    assert found.label_ids.tolist() == list(label_ids)
    assert found.given.tolist() == list(is_given)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-6)
    np.testing.assert_array_equal(found.probs, given[0][list(rows), list(label_ids)])
    assert found.scores.min() >= 0 and found.scores.max() <= 1


def test_order_and_scores_are_those_of_cleanlab():
    # cleanlab 2.9.0 on label 4 of case(0), every entry known: `1 -
    # get_label_quality_scores(labels, pred_probs, adjust_pred_probs=True)`.
    probs, targets, _ = (array[:, 4:5] for array in case(0))
    found = rank(probs, targets, np.ones_like(targets))
    assert found.rows.tolist() == [29, 6, 15, 14, 7, 30, 5, 46]
    scores = 0.893116, 0.650375, 0.576421, 0.559998, 0.548937, 0.548193, 0.529069
    np.testing.assert_allclose(found.scores, [*scores, 0.504542], atol=1e-6)


def test_planted_errors_of_both_kinds_come_first():
    rng = np.random.default_rng(1)
    truth = rng.random((400, 5)) < 0.3
    probs = np.where(truth, 0.8, 0.1) + rng.normal(0, 0.03, truth.shape)
    targets, planted = truth.copy(), [(3, 0), (50, 1), (77, 4), (210, 2)]
    for image, label in planted:
        targets[image, label] ^= True
    found = rank(probs.astype(np.float32), targets, np.ones_like(truth))
    first = found.first(4)
    pairs = zip(first.rows.tolist(), first.label_ids.tolist(), strict=True)
    assert set(pairs) == set(planted)
    wrong = [bool(targets[pair]) for pair in planted]
    assert sorted(first.given.tolist()) == sorted(wrong)


def test_what_is_not_known_changes_nothing():
    probs, targets, known = case(3)
    other = np.where(known, probs, 1 - probs), np.where(known, targets, ~targets)
    found, again = rank(probs, targets, known), rank(*other, known)
    for name, values in vars(found).items():
        np.testing.assert_array_equal(values, getattr(again, name))


def test_a_label_that_none_or_all_images_have_is_never_suspect():
    probs = np.random.default_rng(0).random((20, 2)).astype(np.float32)
    targets = np.stack([np.zeros(20, bool), np.ones(20, bool)], axis=1)
    assert not len(rank(probs, targets, np.ones_like(targets)))
    assert not len(rank(probs, ~targets, np.zeros_like(targets)))


def test_a_saved_cell_is_no_formula_of_a_spreadsheet(tmp_path):
    names = ("=1+1", "+a", "-b", "@c", "d=e")
    found = Suspects(
        rows=np.arange(5),
        label_ids=np.arange(5),
        given=np.arange(5) % 2 == 0,
        probs=np.linspace(0, 1, 5, dtype=np.float32),
        scores=np.linspace(1, 0, 5),
    )
    suspects.save(
        found.first(4),
        tmp_path / "new" / "suspects.csv",
        vocabulary=Vocabulary(tuple("abcde"), names),
        image_ids=np.array(["1", "=2", "3", "4", "5"], object),
        splits=["held_out"] * 5,
        domains=np.array(["eu", "-", "eu", "eu", "eu"], object),
    )
    with (tmp_path / "new" / "suspects.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == suspects.HEADER
    assert [row["name"] for row in rows] == ["'=1+1", "'+a", "'-b", "'@c"]
    assert [row["image_id"] for row in rows] == ["1", "'=2", "3", "4"]
    assert [row["domain"] for row in rows] == ["eu", "'-", "eu", "eu"]
    assert [row["given"] for row in rows] == ["1", "0", "1", "0"]
    assert [float(row["score"]) for row in rows] == [1, 0.75, 0.5, 0.25]
