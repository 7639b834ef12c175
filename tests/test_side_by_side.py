"""Slices and labels of runs side by side say what each run's own files say."""

import numpy as np
import pytest
from small_runs import seal, summary, write_run
from test_label_table import EVIL, labels_of
from test_report import Reader

from jaxii.evaluation import by_label
from jaxii.report import side_by_side
from jaxii.report.compare import build_comparison
from jaxii.report.comparison_page import render_comparison
from jaxii.report.runs import read_run


def entries(*paths):
    return build_comparison([read_run(path) for path in paths]).entries


def with_labels(path, count=40, **facts):
    write_run(path, **facts)
    labels_of(count).save(path / by_label.FILE)
    return path


def sliced(north, south):
    found = {"north": {"f2": north, "interval": [north - 0.1, north + 0.1]}}
    return summary(0.3) | {"slices": found | {"south": {"f2": south}}}


@pytest.fixture
def two(tmp_path):
    return [
        with_labels(tmp_path / "a", lr=0.1, splits={"test": sliced(0.4, 0.3)}),
        with_labels(tmp_path / "b", lr=0.2, splits={"test": sliced(0.2, 0.35)}),
    ]


def test_the_worst_slice_comes_first_and_its_best_run_is_marked(
    two,
):
    found = side_by_side.slices(entries(*two))
    assert [row["name"] for row in found["rows"]] == ["north", "south"]
    north = found["rows"][0]["cells"]
    assert [cell["f2"] for cell in north] == ["0.4000", "0.2000"]
    assert [cell["best"] for cell in north] == [True, False]
    assert north[0]["interval"] == "0.300 to 0.500"
    assert found["runs"] == ["1. a", "2. b"]


def test_a_slice_that_a_run_does_not_have_is_a_dash(tmp_path):
    one = write_run(tmp_path / "a", splits={"test": sliced(0.4, 0.3)})
    other = summary(0.3) | {"slices": {"north": {"f2": 0.1}}}
    two = write_run(tmp_path / "b", lr=0.2, splits={"test": other})
    south = side_by_side.slices(entries(one, two))["rows"][1]
    assert [cell["f2"] for cell in south["cells"]] == ["0.3000", "–"]


def test_labels_stand_side_by_side_with_their_spread(two):
    changed = labels_of(40)
    changed.splits["test"].f2[5] = 0.999
    changed.save(two[1] / by_label.FILE)
    table = side_by_side.labels(entries(*two))
    columns = {c["title"]: c["values"] for c in table["data"]["columns"]}
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
    (column,) = side_by_side.labels(entries(*paths))["columns"][1:]
    wanted = 0.75 * labels_of(40).splits["test"].f2
    np.testing.assert_allclose(column.values, wanted, atol=1e-5)


def test_runs_with_other_labels_or_without_figures_have_no_table(two, tmp_path):
    plain = write_run(tmp_path / "plain", lr=0.3)
    assert side_by_side.labels(entries(two[0], plain)) is None
    other = with_labels(tmp_path / "other", count=41, lr=0.4)
    assert side_by_side.labels(entries(two[0], other)) is None


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
