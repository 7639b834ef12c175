"""Tests the choice of validation: by a hash, with every common label on both sides."""

import numpy as np
import pytest

from jaxii.data import index, validation
from jaxii.data.labels import HUMAN, MACHINE


def random_index(seed, num_rows=400, num_labels=60):
    """Returns images in groups of up to four; labels have a long tail."""
    rng = np.random.default_rng(seed)
    groups = [f"g{seed}-{rng.integers(num_rows // 2)}" for _ in range(num_rows)]
    odds = 1.0 / np.arange(1, num_labels + 1)
    odds *= 3.0 / odds.sum()
    has = rng.random((num_rows, num_labels)) < odds
    rows, labels = np.nonzero(has)
    sources = np.where(rng.random(len(rows)) < 0.2, MACHINE, HUMAN)
    confidences = (rng.random(len(rows)) < 0.9).astype(np.float32)
    table = index.table(
        image_ids=[f"{i}" for i in range(num_rows)],
        groups=groups,
        domains=["all"] * num_rows,
        slices=["all"] * num_rows,
        offsets=np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=num_rows))]),
        label_ids=labels,
        confidences=confidences,
        label_sources=sources.astype(np.uint8),
    )
    return index.columns(table, ("all",))


def groups_of(given, label, rows):
    """Returns the groups among some rows that have a label verified as present."""
    found = set()
    for row in np.flatnonzero(rows):
        for entry in range(given.offsets[row], given.offsets[row + 1]):
            verified = given.label_sources[entry] != MACHINE
            present = verified and given.confidences[entry] >= 0.5
            if given.label_ids[entry] == label and present:
                found.add(given.groups[row])
    return found


def by_hash(given, fraction):
    limit = np.uint64(int(fraction * 2**64))
    return validation._hashes(given.groups) < limit


@pytest.mark.parametrize("fraction", [0.03, 0.1, 0.3, 0.9])
@pytest.mark.parametrize("seed", range(5))
def test_labels_of_ten_groups_are_on_both_sides_and_no_group_is(seed, fraction):
    given = random_index(seed)
    chosen = validation.choose(given, fraction)
    assert not set(given.groups[chosen]) & set(given.groups[~chosen])
    common = 0
    for label in range(60):
        if len(groups_of(given, label, np.ones(len(given), bool))) >= 10:
            assert groups_of(given, label, chosen), label
            assert groups_of(given, label, ~chosen), label
            common += 1
    assert common > 10


def test_only_groups_of_a_label_that_lacked_a_side_change_it():
    moved = 0
    for seed in range(20):
        given = random_index(seed)
        chosen, hashed = validation.choose(given, 0.05), by_hash(given, 0.05)
        lacking = [
            label
            for label in range(60)
            if len(groups_of(given, label, ~hashed)) >= 10
            and not groups_of(given, label, hashed)
        ]
        for group in set(given.groups[chosen != hashed]):
            rows = given.groups == group
            assert any(groups_of(given, label, rows) for label in lacking)
            moved += 1
        assert lacking or np.array_equal(chosen, hashed)
    assert moved > 10


def test_the_choice_does_not_depend_on_the_order_of_the_images():
    given = random_index(3)
    chosen = set(given.image_ids[validation.choose(given, 0.05)])
    order = np.random.default_rng(0).permutation(len(given))
    turned = given.select(order)
    assert set(turned.image_ids[validation.choose(turned, 0.05)]) == chosen


@pytest.mark.parametrize("number", [2, 5])
def test_folds_are_even_also_within_validation(number):
    given = random_index(seed=3)
    folds, chosen = validation.folds(given.groups, number), by_hash(given, 0.3)
    for rows in (chosen, ~chosen):
        sizes = [len(set(given.groups[rows & (folds == i)])) for i in range(number)]
        assert max(sizes) - min(sizes) <= 1
        assert sum(sizes) == len(set(given.groups[rows]))
