"""The page of a comparison is whole, says what the table says, and draws every run."""

import re
from xml.etree import ElementTree

import pytest
from small_runs import CLEAN, summary, write_run
from test_report import Reader

from jaxii.report import comparison_figures as figures
from jaxii.report.compare import build_comparison
from jaxii.report.comparison_page import render_comparison
from jaxii.report.runs import read_run

EVIL = "<script>alert('$x_1$')</script>"
GAP = [
    {"kind": "evaluation", "step": step}
    | {
        f"{split}/{key}": 0.1 * step
        for split in ("validation", "train")
        for key in keys
    }
    for step, keys in ((3, ("f2", "bce")), (6, ("f2", "bce")), (9, ("f2", "bce")))
]


@pytest.fixture
def runs(tmp_path):
    """Three seeds, a run that recorded its gap, an unclean one, one without a test."""
    tuned = CLEAN.with_("thresholds", labels=["tuning"])
    return [
        *(
            write_run(tmp_path / f"base_s{i}", seed=i, f2=0.2 + i / 50)
            for i in range(3)
        ),
        write_run(tmp_path / "gap", lr=0.2, history=GAP),
        write_run(tmp_path / "tuned", lr=0.3, f2=0.4, provenance=tuned),
        write_run(tmp_path / "blind", lr=0.4, splits={"validation": summary(0.3)}),
    ]


def compared(*paths):
    return build_comparison([read_run(path) for path in paths])


def test_the_page_is_whole_and_fetches_nothing(runs):
    page = render_comparison(compared(*runs))
    read = Reader(page)
    assert len(set(read.ids)) == len(read.ids) > 0
    assert set(re.findall(r"url\(#([^)]*)\)", page)) <= set(read.ids)
    assert all(url.startswith(("#", "data:")) for url in read.urls)
    assert not read.tags & {"iframe", "img", "object", "form"}
    assert page.count("<svg") == page.count('role="img" aria-label="') == 3
    assert page.count("<table") == page.count("<caption>") == 2


def test_the_page_has_every_cell_and_note_of_the_table(runs):
    comparison = compared(*runs)
    text = "".join(Reader(render_comparison(comparison)).text)
    for cell in (cell for row in comparison.rows for cell in row):
        assert cell in text
    for note in comparison.notes:
        assert note in text


def test_every_run_is_named_in_the_first_figure(runs):
    drawn = figures.dots(compared(*runs).entries, {"validation": 0.2, "test": 0.1})
    ElementTree.fromstring(drawn)
    for name in ("1. base (3 seeds)", "2. gap", "3. tuned", "4. blind"):
        assert name in drawn
    for label in ("best constant, test", "test, run not clean"):
        assert label in drawn


def test_runs_without_a_test_are_left_out_of_the_shift_and_keep_their_numbers(runs):
    drawn = figures.shift(compared(runs[-1], runs[-2]).entries)
    assert ">2</text>" in drawn
    assert ">1</text>" not in drawn


def test_numbers_of_runs_in_one_place_do_not_lie_on_one_another(tmp_path):
    paths = [write_run(tmp_path / f"run{i}", lr=i, f2=0.25) for i in range(5)]
    drawn = figures.shift(compared(*paths).entries)
    found = [re.search(rf"<text[^>]*>{i}</text>", drawn) for i in range(1, 6)]
    places = {
        re.search(r'transform="[^"]*"|x="[^"]*" y="[^"]*"', m[0])[0] for m in found
    }
    assert len(places) == 5


def test_only_runs_that_measured_training_images_show_a_gap(runs):
    entries = compared(*runs).entries
    drawn = figures.gaps(entries)
    assert "2. gap" in drawn
    assert "base" not in drawn
    assert figures.gaps(entries[:1]) == ""


def test_what_cannot_be_drawn_makes_no_figure(tmp_path):
    path = write_run(tmp_path / "one", splits={"validation": {"f2": float("nan")}})
    entries = compared(path).entries
    assert figures.dots(entries, {}) == figures.shift(entries) == ""
    Reader(render_comparison(compared(path)))


def test_names_of_runs_are_escaped(tmp_path):
    workdir = write_run(tmp_path / EVIL.replace("/", "|"))
    page = render_comparison(compared(workdir))
    assert page.count("<script") == 1


def test_the_page_is_the_same_for_the_same_runs(runs):
    assert render_comparison(compared(*runs)) == render_comparison(compared(*runs))
