"""Tests that a comparison page is complete, matches the table, and draws every run."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from small_runs import CLEAN, seal, slice_metrics, split_metrics, write_run
from test_label_table import EVIL, labels_of
from test_page import Reader

from jaxii.evaluation import by_label
from jaxii.report import comparison_page
from jaxii.report.comparison import build_comparison
from jaxii.report.comparison_page import render_comparison
from jaxii.report.run_files import read_run

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
    """Three seeds, a run with a recorded gap, an unclean run, one without a test."""
    tuned = CLEAN.with_("thresholds", labels=["tuning"])
    return [
        *(
            write_run(tmp_path / f"base_s{i}", seed=i, f2=0.2 + i / 50)
            for i in range(3)
        ),
        write_run(tmp_path / "gap", lr=0.2, history=GAP),
        write_run(tmp_path / "tuned", lr=0.3, f2=0.4, provenance=tuned),
        write_run(
            tmp_path / "blind", lr=0.4, splits={"validation": split_metrics(0.3)}
        ),
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
    assert page.count("<svg") == page.count('role="img" aria-label="') == 2
    assert page.count("<table") == page.count("<caption>") == 2


def test_the_page_has_every_cell_and_note_of_the_table(runs):
    comparison = compared(*runs)
    text = "".join(Reader(render_comparison(comparison)).text)
    for cell in (cell for row in comparison.rows for cell in row):
        assert cell in text
    for note in comparison.notes:
        assert note in text


def test_every_run_is_named_in_the_first_figure(runs):
    drawn = comparison_page.dots(
        compared(*runs).entries, {"validation": 0.2, "test": 0.1}
    )
    ElementTree.fromstring(drawn)
    for name in ("1. base (3 seeds)", "2. gap", "3. tuned", "4. blind"):
        assert name in drawn
    for label in ("best constant, test", "test, run not clean"):
        assert label in drawn


def test_runs_without_a_test_are_left_out_of_the_shift_and_keep_their_numbers(runs):
    drawn = comparison_page.shift(compared(runs[-1], runs[-2]).entries)
    assert ">2</text>" in drawn
    assert ">1</text>" not in drawn


def test_numbers_of_runs_in_one_place_do_not_lie_on_one_another(tmp_path):
    paths = [write_run(tmp_path / f"run{i}", lr=i, f2=0.25) for i in range(5)]
    drawn = comparison_page.shift(compared(*paths).entries)
    found = [re.search(rf"<text[^>]*>{i}</text>", drawn) for i in range(1, 6)]
    places = {
        re.search(r'transform="[^"]*"|x="[^"]*" y="[^"]*"', m[0])[0] for m in found
    }
    assert len(places) == 5


def test_what_cannot_be_drawn_makes_no_figure(tmp_path):
    splits = {"validation": split_metrics(float("nan"))}
    path = write_run(tmp_path / "one", splits=splits)
    entries = compared(path).entries
    assert comparison_page.dots(entries, {}) == comparison_page.shift(entries) == ""
    Reader(render_comparison(compared(path)))


def test_names_of_runs_are_escaped(tmp_path):
    workdir = write_run(tmp_path / "<script>alert('$x_1$')<|script>")
    page = render_comparison(compared(workdir))
    assert page.count("<script") == 1


def test_the_page_is_the_same_for_the_same_runs(runs):
    assert render_comparison(compared(*runs)) == render_comparison(compared(*runs))


def entries(*paths):
    return build_comparison([read_run(path) for path in paths]).entries


def with_labels(path, count=40, **facts):
    write_run(path, **facts)
    labels_of(count).save(path / by_label.FILE)
    return path


def sliced(north, south):
    interval = [north - 0.1, north + 0.1]
    slices = {
        "north": slice_metrics(north, interval=interval),
        "south": slice_metrics(south),
    }
    return split_metrics(0.3, slices=slices)


@pytest.fixture
def two(tmp_path):
    return [
        with_labels(tmp_path / "a", lr=0.1, splits={"test": sliced(0.4, 0.3)}),
        with_labels(tmp_path / "b", lr=0.2, splits={"test": sliced(0.2, 0.35)}),
    ]


def test_the_worst_slice_comes_first_and_its_best_run_is_marked(
    two,
):
    rows = dict(comparison_page.slices(entries(*two), "test"))
    assert list(rows) == ["north", "south"]
    north = rows["north"]
    assert [cell.found.mean for cell in north] == [0.4, 0.2]
    assert [cell.is_best for cell in north] == [True, False]
    page = render_comparison(compared(*two))
    part = page[page.index('id="slices"') : page.index('id="labels"')]
    assert "0.4000" in part
    assert "0.300 to 0.500" in part
    assert part.index("1. a") < part.index("2. b")


def test_a_slice_that_a_run_does_not_have_is_a_dash(tmp_path):
    one = write_run(tmp_path / "a", splits={"test": sliced(0.4, 0.3)})
    other = split_metrics(0.3, slices={"north": slice_metrics(0.1)})
    two = write_run(tmp_path / "b", lr=0.2, splits={"test": other})
    _, (name, south) = comparison_page.slices(entries(one, two), "test")
    assert name == "south"
    assert [cell.found and cell.found.mean for cell in south] == [0.3, None]
    page = render_comparison(compared(one, two))
    assert '<td class="num best">0.3000</td><td class="num">–</td>' in page


def test_labels_stand_side_by_side_with_their_spread(two):
    changed = labels_of(40)
    changed.splits["test"].f2[5] = 0.999
    changed.save(two[1] / by_label.FILE)
    table = comparison_page.labels(entries(*two), "test")
    columns = {c["title"]: c["values"] for c in table.data()["columns"]}
    assert list(columns) == ["Images, test", "1. a", "2. b", "Spread"]
    own = labels_of(40).splits["test"].f2[5]
    assert columns["1. a"][5] == round(own, 3)
    assert columns["Spread"][5] == pytest.approx(0.999 - own, abs=1e-3)
    assert columns["Spread"][6] == 0


def test_seeds_have_their_mean(tmp_path):
    paths = [with_labels(tmp_path / f"s{i}", seed=i) for i in range(2)]
    halved = labels_of(40)
    halved.splits["test"].f2[:] /= 2
    halved.save(paths[1] / by_label.FILE)
    (column,) = comparison_page.labels(entries(*paths), "test").columns[1:]
    wanted = 0.75 * labels_of(40).splits["test"].f2
    np.testing.assert_allclose(column.values, wanted, atol=1e-5)


def test_runs_with_other_labels_or_without_figures_have_no_table(two, tmp_path):
    plain = write_run(tmp_path / "plain", lr=0.3)
    assert comparison_page.labels(entries(two[0], plain), "test") is None
    other = with_labels(tmp_path / "other", count=41, lr=0.4)
    assert comparison_page.labels(entries(two[0], other), "test") is None


def test_a_variant_has_the_figures_of_its_own_labels(two):
    metrics = (two[0] / "metrics.json").read_text()
    (two[0] / "metrics_adabn.json").write_text(metrics)
    seal(two[0], "metrics_adabn.json")
    assert read_run(two[0] / "metrics_adabn.json").labels is None
    labels_of(40).save(two[0] / "label_figures_adabn.csv")
    seal(two[0], "metrics_adabn.json")
    assert read_run(two[0] / "metrics_adabn.json").labels is not None


def test_the_page_shows_both_and_no_name_is_markup(two):
    page = render_comparison(build_comparison([read_run(path) for path in two]))
    read = Reader(page)
    for section in ("slices", "labels"):
        assert section in read.ids
        assert f'href="#{section}"' in page
    assert page.count("<script") == page.count("</script") == 2
    assert EVIL in "".join(read.text)
