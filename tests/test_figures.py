"""Tests that figures of a run are small, well-formed, and have room for long names."""

import warnings
from xml.etree import ElementTree

from test_page import HISTORY, STAGES, make_history, summary

from jaxii.report import figures


def test_figures_of_a_run_are_small_and_well_formed_xml():
    drawn = figures.training_curves(HISTORY, STAGES, 0.3)
    ElementTree.fromstring(drawn)
    assert len(drawn) < 150_000


def test_long_histories_are_thinned():
    short = figures.training_curves(make_history(4200, 10), [], None)
    long = figures.training_curves(make_history(42_000, 10), [], None)
    assert len(long) < 1.5 * len(short)


def test_long_names_leave_room_for_the_curves():
    long = "split " * 40
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = figures.reliability({long: summary(0.4, 0.3)})
        drawn += figures.f2_against_threshold(
            {long: summary(0.4, 0.3)}, {long: 0.2}, 0.9
        )
    assert "split split split s…" in drawn


def test_training_images_are_drawn_against_validation_with_their_gap():
    row = {"kind": "evaluation", "validation/f2": 0.4, "validation/bce": 9.0}
    gap = {"train/f2": 0.6, "train/bce": 5.0}
    history = [row | gap | {"step": step} for step in (10, 20)]
    drawn = figures.training_curves(history, [], None)
    assert drawn.count("no augmentation") == drawn.count("generalization gap") == 2
    lone = [row | {"step": step} for step in (10, 20)]
    assert "no augmentation" not in figures.training_curves(lone, [], None)


def test_the_held_out_domain_is_drawn_beside_validation():
    row = {"kind": "evaluation", "step": 5, "held_out/f2": 0.3, "validation/f2": 0.4}
    drawn = figures.training_curves([row], [], None)
    assert "held-out" in drawn
    assert "generalization gap" not in drawn


def test_no_history_makes_no_figure():
    assert figures.training_curves([], STAGES, 0.3) == ""
    assert figures.throughput([], STAGES) == ""
