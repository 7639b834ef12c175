"""Tests that figures per label equal scikit-learn's and survive saving and loading."""

import csv

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, fbeta_score

from jaxii.data.labels import Vocabulary
from jaxii.errors import InputError
from jaxii.evaluation import by_label
from jaxii.metrics import streaming

CLASSES, NUM = 4, 80
RNG = np.random.default_rng(2)
TARGETS = RNG.random((NUM, CLASSES)) < 0.3
TARGETS[:, 3] = False
PROBS = np.clip(0.5 * TARGETS + RNG.random((NUM, CLASSES)) / 2, 0, 1)
PROBS = PROBS.astype(np.float32)
CHOSEN = PROBS >= 0.5
CHOSEN[:, 3] = False
EVIL = "<script>alert('x')</script>, \"quoted\"\u202e 🐈"
VOCABULARY = Vocabulary(("/m/a", "/m/,", "/m/c", "007"), ("Cat", EVIL, "", "12"))


@pytest.fixture(scope="module")
def figures():
    sums = streaming.update(
        streaming.empty(CLASSES, (0.5,)),
        jnp.asarray(PROBS),
        jnp.asarray(TARGETS),
        None,
        jnp.ones(NUM),
    )
    return by_label.split_figures(
        np.asarray(sums.sums.histogram),
        hits=(CHOSEN & TARGETS).sum(axis=0),
        predicted=CHOSEN.sum(axis=0),
        support=TARGETS.sum(axis=0),
    )


def test_they_are_those_of_scikit_learn(figures):
    f2 = fbeta_score(TARGETS, CHOSEN, beta=2, average=None, zero_division=0)
    np.testing.assert_allclose(figures.f2[:3], f2[:3])
    np.testing.assert_array_equal(figures.support, TARGETS.sum(axis=0))
    for label in range(3):
        wanted = average_precision_score(TARGETS[:, label], PROBS[:, label])
        assert figures.average_precision[label] == pytest.approx(wanted, abs=1e-4)


def test_a_label_that_no_image_has_and_none_was_given_has_no_figure(figures):
    assert np.isnan(figures.f2[3])
    assert np.isnan(figures.average_precision[3])


def test_the_file_holds_what_was_saved(figures, tmp_path):
    table = by_label.LabelTable(
        vocabulary=VOCABULARY,
        train_images=np.array([3.0, 2.5, 0.0, 1.0]),
        thresholds=np.array([0.1, 0.2, 0.3, 0.4]),
        splits={"validation": figures, "test": figures},
    )
    path = tmp_path / by_label.FILE
    table.save(path)
    found = by_label.load(path)
    assert found.vocabulary == VOCABULARY
    assert list(found.splits) == ["validation", "test"]
    np.testing.assert_allclose(found.train_images, table.train_images)
    np.testing.assert_allclose(found.thresholds, table.thresholds)
    np.testing.assert_allclose(found.splits["test"].f2, figures.f2, atol=1e-6)


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "label_code,description\nx,y\n"])
def test_another_file_is_refused(tmp_path, text):
    path = tmp_path / by_label.FILE
    path.write_text(text)
    with pytest.raises(InputError, match=r"not a table of label figures.*evaluate"):
        by_label.load(path)


def test_no_cell_is_a_formula_of_a_spreadsheet_and_labels_are_read_as_they_were(
    figures, tmp_path
):
    labels = ("=cmd|' /C calc'!A0", "+1", "@SUM(1)", "-2")
    vocabulary = Vocabulary(labels, ("'=x", "'", "\tx", "it's"))
    nothing = np.zeros(CLASSES)
    table = by_label.LabelTable(
        vocabulary=vocabulary,
        train_images=nothing,
        thresholds=nothing,
        splits={"test": figures, "=set": figures},
    )
    table.save(tmp_path / by_label.FILE)
    with (tmp_path / by_label.FILE).open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t"))]
    read = by_label.load(tmp_path / by_label.FILE)
    assert read.vocabulary == vocabulary
    assert list(read.splits) == ["test", "=set"]
