"""Runs side by side show what differs, and say where a run is amiss."""

import json

import pytest

from jaxii.errors import InputError
from jaxii.infer.provenance import Provenance
from jaxii.infer.report.compare import build_comparison, compare, print_table
from jaxii.infer.report.runs import flatten, read_run

CLEAN = Provenance().with_("thresholds", labels=["validation"])


def summary(f2):
    return {
        "f2": f2,
        "map": 0.4321,
        "coverage": 1234,
        "worst_slice": "[bold]north",
        "slices": {"[bold]north": {"f2": 0.1111}, "south": {"f2": 0.5}},
    }


def write_run(
    workdir, *, lr=0.1, f2=0.25, provenance=CLEAN, config=None, empty=None, **metrics
):
    workdir.mkdir(parents=True)
    config = config or {"optimizer": {"peak_lr": lr}, "seed": 3}
    (workdir / "config.json").write_text(json.dumps(config))
    metrics = {
        "dataset": "toy_regions",
        "label_hash": "abc",
        "decoder": {"name": "threshold", "threshold": 0.31, "chosen_on": "validation"},
        "provenance": provenance.to_json(),
        "splits": {"validation": summary(f2 + 0.1), "test": summary(f2)},
        **metrics,
    }
    if empty:
        metrics[empty] = {}
    (workdir / "metrics.json").write_text(json.dumps(metrics))
    history = [
        {"kind": "train", "step": 1, "images_per_second": 1.0},
        {"kind": "train", "step": 2, "images_per_second": 100.0},
        {"kind": "train", "step": 3, "images_per_second": 120.0},
        {"kind": "evaluation", "step": 3, "validation/f2": 0.3},
        {"kind": "train", "step": 1, "images_per_second": 110.0},
    ]
    lines = "\n".join(json.dumps(row) for row in history)
    (workdir / "history.jsonl").write_text(lines + "\n")
    return workdir


def rows_of(*workdirs):
    comparison = build_comparison([read_run(w) for w in workdirs])
    return [dict(zip(comparison.columns, r, strict=True)) for r in comparison.rows]


def printed(capsys, *workdirs):
    print_table(compare(list(workdirs)))
    return capsys.readouterr().out


def test_only_the_fields_that_differ_are_columns(tmp_path):
    one = write_run(tmp_path / "one", lr=0.1)
    two = write_run(tmp_path / "two", lr=0.2)
    first, second = rows_of(one, two)
    assert first["optimizer.peak_lr"] == "0.1"
    assert second["optimizer.peak_lr"] == "0.2"
    assert "seed" not in first


def test_equal_configurations_show_no_field(tmp_path):
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    assert build_comparison([read_run(one), read_run(two)]).fields == ()


def test_a_tiny_difference_is_a_difference(tmp_path):
    one = write_run(tmp_path / "one", lr=0.1)
    two = write_run(tmp_path / "two", lr=0.1000000001)
    assert "optimizer.peak_lr" in rows_of(one, two)[0]


def test_a_field_that_one_run_lacks_is_shown_as_absent(tmp_path):
    one = write_run(tmp_path / "one", config={"a": 1, "b": 2})
    two = write_run(tmp_path / "two", config={"a": 1})
    assert [row["b"] for row in rows_of(one, two)] == ["2", "-"]


def test_many_differing_fields_share_one_column(tmp_path):
    one = write_run(tmp_path / "one", config={f"f{i}": 0 for i in range(9)})
    two = write_run(tmp_path / "two", config={f"f{i}": 1 for i in range(9)})
    assert rows_of(one, two)[1]["differing fields"].split("\n")[8] == "f8 = 1"


def test_the_figures_of_a_run_are_in_its_row(tmp_path):
    (row,) = rows_of(write_run(tmp_path / "one", f2=0.25))
    assert row == {
        "run": "one",
        "F2 validation": "0.3500",
        "F2 test": "0.2500",
        "worst slice": "[bold]north 0.1111",
        "mAP": "0.4321",
        "coverage": "1,234",
        "threshold": "0.31",
        "provenance": "clean",
        "images/s": "110.0",
    }


def test_runs_stay_in_the_order_given(tmp_path):
    low = write_run(tmp_path / "low", f2=0.1)
    high = write_run(tmp_path / "high", f2=0.4)
    assert [row["run"] for row in rows_of(low, high)] == ["low", "high"]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    one, two = write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run")
    assert [row["run"] for row in rows_of(one, two)] == ["a/run", "b/run"]


def test_an_unclean_run_says_so(tmp_path, capsys):
    tuned = CLEAN.with_("thresholds", labels=["tuning"])
    text = printed(capsys, write_run(tmp_path / "one", provenance=tuned))
    assert "tuning labels: thresholds" in text
    assert "not clean" in text


def test_runs_of_different_labels_are_said_not_to_compare(tmp_path, capsys):
    one = write_run(tmp_path / "one")
    two = write_run(tmp_path / "two", label_hash="other")
    assert "different label lists" in printed(capsys, one, two)


def test_a_run_without_a_test_split_has_no_test_column(tmp_path):
    one = write_run(tmp_path / "one", splits={"validation": summary(0.3)})
    assert "F2 test" not in rows_of(one)[0]


def test_piped_text_is_plain_whole_and_one_line_a_run(tmp_path, capsys):
    one = write_run(tmp_path / ("long_name_" * 12))
    text = printed(capsys, one, write_run(tmp_path / "two", lr=0.2))
    assert "\x1b" not in text
    (line,) = [line for line in text.splitlines() if "long_name_" * 12 in line]
    assert "[bold]north 0.1111" in line
    assert "clean" in line


def test_no_workdir_is_refused():
    with pytest.raises(InputError, match="one or more"):
        compare([])


def test_a_missing_folder_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="nowhere is not a folder"):
        compare([tmp_path / "nowhere"])


@pytest.mark.parametrize("name", ["metrics.json", "config.json"])
def test_an_unfinished_run_is_refused(tmp_path, name):
    workdir = write_run(tmp_path / "one")
    (workdir / name).unlink()
    with pytest.raises(InputError, match=f"{name} does not exist.*evaluate"):
        compare([workdir])


@pytest.mark.parametrize("name", ["metrics.json", "config.json"])
@pytest.mark.parametrize("text", ["{", "[1]", "", "\xff"])
def test_a_damaged_file_is_refused_in_one_line(tmp_path, name, text):
    workdir = write_run(tmp_path / "one")
    (workdir / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=name) as caught:
        compare([workdir])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["decoder", "provenance", "splits"])
def test_incomplete_metrics_are_refused_by_key(tmp_path, key):
    with pytest.raises(InputError, match=f"lacks {key}"):
        compare([write_run(tmp_path / "one", empty=key)])


def test_an_unreadable_provenance_names_its_file(tmp_path):
    workdir = write_run(tmp_path / "one")
    metrics = json.loads((workdir / "metrics.json").read_text())
    metrics["provenance"]["extra"] = 1
    (workdir / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(InputError, match=r"metrics.json: provenance .*extra"):
        compare([workdir])


def test_flattening_names_stages_by_position():
    tree = {"stages": [{"name": "a"}, {"name": "b"}], "sizes": [1, 2], "empty": {}}
    assert flatten(tree) == {
        "stages[0].name": "a",
        "stages[1].name": "b",
        "sizes": [1, 2],
        "empty": {},
    }
