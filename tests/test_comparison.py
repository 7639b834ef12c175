"""Tests that comparisons show differences between runs and name their problems."""

import json
import statistics
from dataclasses import replace

import pytest
from rich.text import Text
from small_runs import (
    CLEAN,
    changed,
    constant,
    decoder_in_use,
    decoder_metrics,
    seal,
    slice_metrics,
    split_metrics,
    write_run,
)

from jaxii.cli.compare import compare
from jaxii.config import Config
from jaxii.errors import InputError
from jaxii.evaluation.held_out import HeldOut
from jaxii.evaluation.result import DomainShiftEstimate, Estimate
from jaxii.report.comparison import build_comparison
from jaxii.report.run_files import last_split, read_run, standard_error
from jaxii.runs.workdir import Workdir


def compared(*paths, **options):
    return build_comparison([read_run(path) for path in paths], **options)


def rows_of(*paths, **options):
    comparison = compared(*paths, **options)
    return [dict(zip(comparison.columns, r, strict=True)) for r in comparison.rows]


def printed(capsys, *paths, **options):
    compare(list(paths), **{"output": None, "each": False, "markdown": False} | options)
    return capsys.readouterr().out


# Contents of each run's row.


def test_only_the_fields_that_differ_are_columns(tmp_path):
    one = write_run(tmp_path / "one", lr=0.1)
    two = write_run(tmp_path / "two", lr=0.2)
    first, second = rows_of(one, two)
    assert first["optimizer.peak_lr"] == "0.1"
    assert second["optimizer.peak_lr"] == "0.2"
    assert "seed" not in first


def test_equal_configurations_show_no_field(tmp_path):
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    assert compared(one, two).columns[:2] == ("run", "F2 validation")


def test_fields_that_do_not_change_a_result_are_not_shown(tmp_path):
    one = write_run(tmp_path / "one", config={"data": {"directory": "a", "side": 1}})
    two = write_run(tmp_path / "two", config={"data": {"directory": "b", "side": 1}})
    columns = compared(one, two, ignored=["data.directory", "no.such"]).columns
    assert columns[:2] == ("run", "F2 validation")


def test_with_many_differing_fields_each_row_names_its_changes_alone(tmp_path):
    base = {f"f{i}": 0 for i in range(9)}
    write_run(tmp_path / "base", config=base)
    for i in range(9):
        write_run(tmp_path / f"run{i}", config=base | {f"f{i}": 1})
    names = ["base", *(f"run{i}" for i in range(9))]
    rows = rows_of(*(tmp_path / name for name in names))
    cells = [row["differs from base in"] for row in rows]
    assert cells == ["-", *(f"f{i} = 1" for i in range(9))]


def test_the_figures_of_a_run_are_in_its_row(tmp_path):
    (row,) = rows_of(write_run(tmp_path / "one", f2=0.25))
    assert row == {
        "run": "one",
        "F2 validation": "0.3500",
        "F2 test": "0.2500",
        "worst slice": "[bold]north 0.1111",
        "mAP": "0.4321",
        "coverage": "1,234",
        "decoder": "threshold 0.31",
        "provenance": "clean",
        "images/s": "110.0",
    }


def test_runs_stay_in_the_order_given(tmp_path):
    low = write_run(tmp_path / "low", f2=0.1)
    high = write_run(tmp_path / "high", f2=0.4, lr=0.2)
    assert [row["run"] for row in rows_of(low, high)] == ["low", "high"]


def test_training_f2_is_that_of_the_evaluated_step(tmp_path):
    rows = [
        {"kind": "evaluation", "step": step, "train/f2": f2}
        for step, f2 in ((2, 0.8), (3, 0.7), (4, 0.9))
    ]
    workdir = write_run(tmp_path / "one", history=rows)
    assert rows_of(workdir)[0]["F2 train"] == "0.7000"


def test_the_estimate_of_held_out_domains_is_shown(tmp_path):
    estimates = DomainShiftEstimate(
        validation=Estimate(f2=0.3, threshold=0.3, test_f2=0.2),
        held_out_domains=Estimate(f2=0.28, threshold=0.4, test_f2=0.2),
        domains={},
        test_f2=0.25,
    )
    one = write_run(tmp_path / "one", estimates=estimates)
    two = write_run(tmp_path / "two", lr=0.2)
    assert [row["F2 held out"] for row in rows_of(one, two)] == ["0.2800", "-"]
    assert "best on average over the domains" in " ".join(compared(one, two).notes)
    splits = {"validation": split_metrics(0.3), "held_out": split_metrics(0.27)}
    three = write_run(tmp_path / "three", splits=splits)
    assert rows_of(three)[0]["F2 held out"] == "0.2700"
    assert "best on average" not in " ".join(compared(three).notes)
    # Its threshold is chosen on held_out itself.
    four = write_run(tmp_path / "four", splits=splits, estimates=estimates)
    assert rows_of(four)[0]["F2 held out"] == "0.2700"
    assert "best on average" not in " ".join(compared(four).notes)


@pytest.mark.parametrize(("length", "is_noted"), [(0.25, True), (1.0, False)])
def test_shorter_hold_out_runs_are_noted(tmp_path, length, is_noted):
    record = HeldOut(adaptation_gains={}, expected_f2_errors={}, length=length)
    one = write_run(tmp_path / "one", held_out=record)
    found = "an estimate for shorter training" in " ".join(compared(one).notes)
    assert found == is_noted


def test_another_decoder_than_the_threshold_is_named(tmp_path):
    figures = split_metrics(0.3, decoders={"expected_f2": decoder_metrics(0.3)})
    decoder = decoder_in_use("expected_f2")
    one = write_run(tmp_path / "one", decoder=decoder, splits={"test": figures})
    assert rows_of(one)[0]["decoder"] == "expected_f2"


def test_a_run_without_a_test_split_has_no_test_column(tmp_path):
    one = write_run(tmp_path / "one", splits={"validation": split_metrics(0.3)})
    assert "F2 test" not in rows_of(one)[0]


def test_figures_are_of_the_whole_test_beside_the_one_without_near_copies(tmp_path):
    f2s = {"validation": 0.3, "test": 0.2}
    splits = {name: split_metrics(f2) for name, f2 in f2s.items()}
    splits |= {
        f"{name}_without_recurring": split_metrics(f2, map=0.9)
        for name, f2 in f2s.items()
    }
    one = write_run(tmp_path / "one", splits=splits)
    assert last_split(read_run(one)) == "test"
    (row,) = rows_of(one)
    assert list(row)[1:5] == [
        "F2 validation without recurring",
        "F2 validation",
        "F2 test without recurring",
        "F2 test",
    ]
    assert row["mAP"] == "0.4321"


def test_a_split_that_only_some_runs_have_is_a_column(tmp_path):
    splits = {split: split_metrics(0.3) for split in ("tuning", "test")}
    one = write_run(tmp_path / "one", splits=splits)
    two = write_run(tmp_path / "two", lr=0.2)
    assert [row["F2 tuning"] for row in rows_of(one, two)] == ["0.3000", "-"]
    assert [row["F2 tuning"] for row in rows_of(two, one)] == ["-", "0.3000"]
    assert [row["F2 validation"] for row in rows_of(one, two)] == ["-", "0.3500"]


def test_an_unclean_run_says_so(tmp_path, capsys):
    tuned = CLEAN.with_("thresholds", labels=["tuning"])
    text = printed(capsys, write_run(tmp_path / "one", provenance=tuned))
    assert "tuning labels: thresholds" in text
    assert "not clean" in text


def test_runs_of_different_labels_are_said_not_to_compare(tmp_path, capsys):
    one = write_run(tmp_path / "one")
    two = write_run(tmp_path / "two", label_hash="other")
    assert "different label lists" in printed(capsys, one, two)


def test_runs_on_other_content_of_a_dataset_are_said_not_to_compare(tmp_path, capsys):
    one = write_run(tmp_path / "one", data_hash="a")
    two = write_run(tmp_path / "two", data_hash="b")
    assert "different datasets" in printed(capsys, one, two)
    assert "different" not in printed(capsys, one, one)


@pytest.mark.parametrize(("data_hash", "differ"), [("a", False), ("", True)])
def test_a_renamed_folder_of_the_same_content_is_the_same_dataset(
    tmp_path, data_hash, differ
):
    one, two = (
        write_run(tmp_path / name, dataset=f"kaggle ({name})", data_hash=data_hash)
        for name in ("one", "two")
    )
    notes = " ".join(compared(one, two).notes)
    assert ("different datasets" in notes) == differ


def test_the_best_constant_prediction_is_told_where_runs_agree_on_it(tmp_path):
    one = write_run(tmp_path / "one")
    said = "Mean F2 of the best constant prediction: validation 0.2000"
    assert f"{said}, test 0.1000." in compared(one).notes
    two = write_run(
        tmp_path / "two", constant=constant({"validation": 0.2, "test": 0.3})
    )
    assert f"{said}." in compared(one, two).notes


# Runs of several seeds.


def write_seeds(folder, f2s, name="base_s{}", **options):
    return [
        write_run(folder / name.format(i), f2=f2, seed=i, **options)
        for i, f2 in enumerate(f2s)
    ]


def test_runs_that_differ_by_their_seed_alone_are_one_row(tmp_path):
    f2s = (0.2, 0.25, 0.24)
    other = write_run(tmp_path / "other", lr=0.2)
    first, second = rows_of(*write_seeds(tmp_path, f2s), other)
    assert (first["run"], second["run"]) == ("base (3 seeds)", "other")
    mean, deviation = statistics.fmean(f2s), statistics.stdev(f2s)
    assert first["F2 test"] == f"{mean:.4f} ± {deviation:.4f}"
    assert first["F2 validation"] == f"{mean + 0.1:.4f} ± {deviation:.4f}"
    assert first["mAP"] == "0.4321 ± 0.0000"
    assert first["decoder"] == "threshold 0.31 ± 0"
    assert second["F2 test"] == "0.2500"
    assert "seed" not in first


def test_each_run_has_a_row_of_its_own_on_request(tmp_path):
    rows = rows_of(*write_seeds(tmp_path, (0.2, 0.25)), each=True)
    assert [(row["run"], row["seed"]) for row in rows] == [
        ("base_s0", "0"),
        ("base_s1", "1"),
    ]


def test_a_seed_given_twice_is_not_two_seeds(tmp_path):
    (workdir,) = write_seeds(tmp_path, (0.2,))
    assert [row["run"] for row in rows_of(workdir, workdir)] == ["base_s0"] * 2


def test_seeds_of_another_provenance_stay_apart(tmp_path):
    tuned = CLEAN.with_("thresholds", labels=["tuning"])
    one, _ = write_seeds(tmp_path, (0.2, 0.3))
    two = write_run(tmp_path / "base_s1", seed=1, provenance=tuned)
    assert len(rows_of(one, two)) == 2


def test_the_worst_slice_of_several_seeds_is_worst_on_average(tmp_path):
    def of(north, south):
        slices = {"north": slice_metrics(north), "south": slice_metrics(south)}
        return {"test": split_metrics(0.3, slices=slices)}

    one = write_run(tmp_path / "one", seed=0, splits=of(0.1, 0.2))
    two = write_run(tmp_path / "two", seed=1, splits=of(0.5, 0.2))
    assert rows_of(one, two)[0]["worst slice"] == "south 0.2000 ± 0.0000"


def test_the_standard_error_is_that_of_the_decoder_in_use(tmp_path):
    # The slices cannot give it, because a group may have images in several slices.
    other = decoder_metrics(0.3)
    decoders = {"threshold": other, "top_k": replace(other, standard_error=0.02)}
    splits = {"test": split_metrics(0.3, decoders=decoders)}
    decoder = decoder_in_use("top_k")
    run = read_run(write_run(tmp_path / "run", splits=splits, decoder=decoder))
    assert standard_error(run, "test") == 0.02
    assert standard_error(run, "held_out") is None
    note = "Largest standard error of a mean F2 over images: test 0.0200."
    assert note in build_comparison([run]).notes


# Printed output.


def test_piped_text_is_plain_whole_and_one_line_a_run(tmp_path, capsys):
    one = write_run(tmp_path / ("long_name_" * 12))
    text = printed(capsys, one, write_run(tmp_path / "two", lr=0.2))
    assert "\x1b" not in text
    (line,) = [line for line in text.splitlines() if "long_name_" * 12 in line]
    assert "[bold]north 0.1111" in line
    assert "clean" in line


@pytest.fixture
def terminal(monkeypatch):
    """Returns a function that makes the output a terminal of a given width."""
    for name in ("NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    return lambda width: monkeypatch.setenv("COLUMNS", str(width))


def write_wide(folder):
    """Writes runs whose table is wider than most terminals."""
    splits = ("validation", "validation_without_recurring", "test", "tuning")
    metrics = {name: split_metrics(0.3) for name in splits}
    return [
        write_run(folder / f"emoji_openmoji_{i}", lr=0.1 + i, splits=metrics)
        for i in range(3)
    ]


def test_a_table_wider_than_the_terminal_is_divided_between_columns(
    tmp_path, capsys, terminal
):
    terminal(80)
    paths = write_wide(tmp_path)
    text = Text.from_ansi(printed(capsys, *paths)).plain
    assert max(map(len, text.splitlines())) <= 80
    *tables, notes = text.split("\n\n")
    assert len(tables) == 3
    assert notes.startswith("Worst slice, mAP and coverage are on")
    for name, *cells in compared(*paths).rows:
        # A cell split over two lines would be incomplete here.
        lines = [row for row in text.splitlines() if row.startswith(name)]
        assert len(lines) == len(tables)
        shown = " ".join(line.removeprefix(name) for line in lines)
        assert shown.split() == " ".join(cells).split()


def test_a_table_that_fits_the_terminal_is_one_table(tmp_path, capsys, terminal):
    terminal(300)
    text = Text.from_ansi(printed(capsys, *write_wide(tmp_path))).plain
    assert text.splitlines()[0].split()[:2] == ["run", "optimizer.peak_lr"]
    assert text.count("emoji_openmoji_0") == 1


def test_a_name_wider_than_the_terminal_is_broken(tmp_path, capsys, terminal):
    terminal(40)
    text = Text.from_ansi(printed(capsys, write_run(tmp_path / ("long_" * 20)))).plain
    assert max(map(len, text.splitlines())) <= 40


def test_markdown_is_a_table_with_a_cell_for_every_column(tmp_path, capsys):
    slices = {"a|b\\": slice_metrics(0.1)}
    splits = {"test": split_metrics(0.2, slices=slices)}
    one = write_run(tmp_path / "one", splits=splits)
    text = printed(capsys, one, write_run(tmp_path / "two", lr=0.2), markdown=True)
    head, rule, *rows = text.partition("\n\n")[0].splitlines()
    columns = head.strip("| ").split(" | ")
    assert columns[:2] == ["run", "optimizer.peak_lr"]
    aligned = rule.strip("| ").split(" | ")
    assert aligned[columns.index("run")] == "---"
    assert aligned[columns.index("F2 test")] == "---:"
    assert len(rows) == 2
    assert r" a\|b\\ 0.1000 " in rows[0]
    assert all(
        len(row.replace(r"\|", "").split("|")) - 2 == len(columns) for row in rows
    )


def test_lines_of_a_cell_stay_in_one_row_of_markdown(tmp_path, capsys):
    one = write_run(tmp_path / "one", config={f"f{i}": 0 for i in range(6)})
    two = write_run(tmp_path / "two", config={f"f{i}": 1 for i in range(6)})
    text = printed(capsys, one, two, markdown=True)
    assert "f0 = 1<br>f1 = 1" in text


def test_a_page_is_written_where_asked_and_markdown_is_printed_alone(tmp_path, capsys):
    workdir, output = write_run(tmp_path / "one"), tmp_path / "pages" / "c.html"
    assert "page  " in printed(capsys, workdir, output=output)
    assert output.read_text().startswith("<!doctype html>")
    assert "page  " not in printed(capsys, workdir, output=output, markdown=True)


# Refused inputs.


def test_no_workdir_is_refused(capsys):
    with pytest.raises(InputError, match="one or more"):
        printed(capsys)


def test_a_missing_folder_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="nowhere is not a workdir"):
        read_run(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.json", "metrics.txt", "metricsx.json"])
def test_a_file_that_holds_no_metrics_is_refused(tmp_path, name):
    workdir = write_run(tmp_path / "one", file=name)
    with pytest.raises(InputError, match=f"{name} is not a workdir.*metrics_VARIANT"):
        read_run(workdir / name)


@pytest.mark.parametrize("name", ["metrics.json", "config.json"])
def test_an_unfinished_run_is_refused(tmp_path, name):
    workdir = write_run(tmp_path / "one")
    (workdir / name).unlink()
    with pytest.raises(InputError, match=f"{name} .*(exist|missing).*evaluate"):
        read_run(workdir)


@pytest.mark.parametrize("name", ["metrics.json", "config.json"])
@pytest.mark.parametrize("text", ["{", "[1]", "", "\xff"])
def test_a_damaged_file_is_refused_in_one_line(tmp_path, name, text):
    workdir = write_run(tmp_path / "one")
    (workdir / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=name) as caught:
        read_run(workdir)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["decoder", "provenance", "splits"])
def test_incomplete_metrics_are_refused_by_key(tmp_path, key):
    with pytest.raises(InputError, match=f"{key} is missing"):
        read_run(write_run(tmp_path / "one", without=key))


def test_an_unreadable_provenance_names_its_file(tmp_path):
    workdir = write_run(tmp_path / "one")
    metrics = json.loads((workdir / "metrics.json").read_text())
    metrics["provenance"]["extra"] = 1
    (workdir / "metrics.json").write_text(json.dumps(metrics))
    seal(workdir)
    with pytest.raises(InputError, match=r"metrics.json: provenance .*extra"):
        read_run(workdir)


@pytest.mark.parametrize("name", ["metrics.json", "config.json", "history.jsonl"])
def test_an_edited_file_is_refused(tmp_path, name):
    workdir = write_run(tmp_path / "one")
    text = (workdir / name).read_text()
    (workdir / name).write_text(text.replace("3", "4"))
    with pytest.raises(InputError, match=f"{name} is (missing or )?damaged.*evaluate"):
        read_run(workdir)


def test_fields_that_do_not_change_a_result_may_differ_since_the_evaluation(tmp_path):
    stages = [{"name": "last", "terms": {"bce": 1.0}, "num_steps": 3}]
    config = Config.resolve({"stages": stages})
    fields, config_hash = config.to_dict(), config.content_hash()
    path = write_run(tmp_path / "one", config=fields, config_hash=config_hash)
    Workdir(path).claim(changed(config, data__directory="moved", log_every_steps=7))
    assert read_run(path).config["data"]["directory"] == "moved"
    other = changed(config, data__directory="moved", seed=9).to_dict()
    (path / "config.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match=r"config.json is damaged.*evaluate"):
        read_run(path)


def test_a_history_may_have_grown_since_the_evaluation(tmp_path):
    workdir = write_run(tmp_path / "one")
    with (workdir / "history.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 4}\n')
    assert read_run(workdir).history[-1]["step"] == 4
