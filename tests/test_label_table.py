"""Tests that the label table is light, complete without scripts, and escaped."""

import json
import re

import numpy as np
import pytest

from jaxii.data.labels import Vocabulary
from jaxii.evaluation.by_label import LabelTable, SplitFigures
from jaxii.evaluation.details import label_map
from jaxii.report import label_table
from jaxii.report.label_table import ENDS

EVIL = "</script><script>alert('x')</script>"


def labels_of(count, splits=("validation", "test")):
    rng = np.random.default_rng(0)
    names = [f"name {i}" for i in range(count)]
    names[0] = EVIL

    def figures():
        f2 = rng.random(count)
        f2[1] = np.nan
        return SplitFigures(
            support=rng.integers(0, 50, count).astype(float),
            average_precision=rng.random(count),
            f2=f2,
        )

    return LabelTable(
        vocabulary=Vocabulary(tuple(f"/m/{i}" for i in range(count)), tuple(names)),
        train_images=np.linspace(900, 1, count),
        thresholds=rng.random(count),
        splits={split: figures() for split in splits},
    )


def map_of(count):
    vectors = np.random.default_rng(1).normal(size=(count, 8)).astype(np.float32)
    vectors[2] = 0
    return label_map(vectors)


def test_the_judging_split_comes_first_and_every_figure_asked_for_is_there():
    table = label_table.of_run(labels_of(30), None)
    titles = [column["title"] for column in table.data()["columns"]]
    assert titles.index("F2, test") < titles.index("F2, validation")
    assert {"Images, test", "AP, test", "Own threshold"} <= set(titles)
    assert table.nearest == []


def test_a_missing_figure_is_null_for_the_script_and_a_dash_on_paper():
    table = label_table.of_run(labels_of(30), None)
    (f2,) = (c for c in table.data()["columns"] if c["title"] == "F2, test")
    assert f2["values"][1] is None
    (column,) = (c for c in table.columns if c.title == "F2, test")
    assert column.text(1) == "–"
    json.dumps(table.data(), allow_nan=False)


def test_few_labels_are_all_there_without_a_script_and_many_by_their_ends():
    ((_, few),) = label_table.of_run(labels_of(30), None).ends()
    assert sorted(few) == list(range(30))
    best, worst = label_table.of_run(labels_of(500), None).ends()
    f2 = labels_of(500).splits["test"].f2
    assert len(best[1]) == len(worst[1]) == ENDS
    assert min(f2[best[1]]) > max(f2[worst[1]])
    assert np.all(np.diff(f2[best[1]]) <= 0)


def test_a_label_off_the_map_has_no_nearest_labels():
    table = label_table.of_run(labels_of(40), map_of(40))
    assert table.nearest[2] == []
    assert all(len(near) == 3 for i, near in enumerate(table.nearest) if i != 2)
    assert 2 not in table.data()["map"]["ids"]


@pytest.mark.parametrize("count", [40, 900])
def test_the_map_has_every_dot_inside_and_names_that_do_not_touch(count):
    found, labels = map_of(count), labels_of(count)
    drawn = label_table.draw_map(found, labels)
    dots = re.findall(r"M(-?\d+) (-?\d+)h0", drawn)
    assert len(dots) == count - 1
    _, height = label_table.places(found)
    assert all(0 <= int(x) <= 1000 and 0 <= int(y) <= height for x, y in dots)
    assert "<script" not in drawn
    assert drawn.count("<text") > 10
    boxes = [
        (float(x) - (7.2 * len(name) if end else 0), float(y), 7.2 * len(name))
        for x, y, end, name in re.findall(
            r'<text x="(\S+)" y="(\S+)" text-anchor="(?:start|(end))">(name \d+)<',
            drawn,
        )
    ]
    for i, (x, y, width) in enumerate(boxes):
        for other, below, wide in boxes[:i]:
            apart = x + width <= other or other + wide <= x or abs(y - below) >= 17
            assert apart


def test_one_scale_serves_both_axes():
    found = map_of(200)
    at, _ = label_table.places(found)
    drawn = np.linalg.norm(at[:50] - at[50:100], axis=1)
    true = np.linalg.norm(found.places[:50] - found.places[50:100], axis=1)
    np.testing.assert_allclose(drawn / true, np.median(drawn / true), rtol=0.1)
