"""Tests that names of rows in a comparison distinguish the runs."""

from dataclasses import replace

import pytest
from small_runs import CLEAN, write_run

from jaxii.report.entries import (
    MAX_VALUE,
    config_of,
    differences,
    entries_of,
    shorten,
)
from jaxii.report.run_files import read_run


def names(*paths):
    return [entry.title for entry in entries_of([read_run(path) for path in paths])]


def of_seeds(folder, *workdirs, **options):
    return [
        write_run(folder / workdir, seed=i, **options)
        for i, workdir in enumerate(workdirs)
    ]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    one = write_run(tmp_path / "a" / "run")
    two = write_run(tmp_path / "b" / "run", lr=0.2)
    assert names(one, two) == ["a/run", "b/run"]


def test_an_evaluation_of_its_own_file_is_named_by_its_variant(tmp_path):
    workdir = write_run(tmp_path / "run")
    write_run(workdir, file="metrics_tuned_on_tuning.json")
    variant = workdir / "metrics_tuned_on_tuning.json"
    assert names(workdir, variant) == ["run", "run: tuned_on_tuning"]
    assert names(workdir / "metrics.json") == ["run"]


def test_the_stage_is_named_where_it_is_not_the_last(tmp_path):
    config = {"stages": [{"name": "warmup"}, {"name": "final"}], "seed": 0}
    one = write_run(tmp_path / "one", config=config, stage="final")
    two = write_run(tmp_path / "two", config=config | {"a": 1}, stage="warmup")
    assert names(one, two) == ["one", "two (stage warmup)"]


@pytest.mark.parametrize(
    ("workdirs", "name"),
    [
        (("base_s0", "base_s1"), "base"),
        (("base-seed0", "base-seed1"), "base"),
        (("base_seed=9", "base_seed=10"), "base"),
        (("base.0", "base.1"), "base"),
        (("losses0", "losses1"), "losses"),
        (("first", "second"), "first"),
        (("0", "1"), "0"),
    ],
)
def test_several_seeds_are_named_by_what_their_names_share(tmp_path, workdirs, name):
    assert names(*of_seeds(tmp_path, *workdirs)) == [f"{name} (2 seeds)"]


def test_variants_of_several_seeds_are_one_row_a_variant(tmp_path):
    workdirs = of_seeds(tmp_path, "base_s0", "base_s1")
    of_seeds(tmp_path, "base_s0", "base_s1", file="metrics_adabn.json")
    paths = [*workdirs, *(workdir / "metrics_adabn.json" for workdir in workdirs)]
    assert names(*paths) == ["base (2 seeds)", "base: adabn (2 seeds)"]


def test_two_rows_never_share_a_stem(tmp_path):
    one = of_seeds(tmp_path, "base_0", "base_1")
    two = of_seeds(tmp_path, "base_2", "base_3", lr=0.2)
    assert names(*one, *two) == ["base_0 (2 seeds)", "base_2 (2 seeds)"]


def test_a_run_whose_batch_size_changed_is_not_a_seed_of_one_that_kept_it(tmp_path):
    kept = of_seeds(tmp_path, "base_s0", "base_s1")
    sizes = ("8 images, then 4 images after step 5",)
    changed = write_run(
        tmp_path / "base_s2", seed=2, provenance=replace(CLEAN, batch_sizes=sizes)
    )
    assert names(*kept, changed) == ["base (2 seeds)", "base_s2"]
    entries = entries_of([read_run(path) for path in (*kept, changed)])
    configs = [config_of(entry.runs[0], ["seed"]) for entry in entries]
    assert differences(configs) == {"batch_sizes": ["-", *sizes]}


def test_runs_on_other_datasets_are_not_seeds_of_one(tmp_path):
    one = write_run(tmp_path / "base_s0", seed=0, data_hash="a")
    two = write_run(tmp_path / "base_s1", seed=1, data_hash="b")
    assert names(one, two) == ["base_s0", "base_s1"]


@pytest.mark.parametrize(
    ("data_hash", "rows"),
    [("a", ["base (2 seeds)"]), ("", ["base_s0", "base_s1"])],
)
def test_seeds_on_a_renamed_folder_of_the_same_content_are_one_row(
    tmp_path, data_hash, rows
):
    one, two = (
        write_run(
            tmp_path / f"base_s{seed}",
            seed=seed,
            dataset=f"kaggle (folder{seed})",
            data_hash=data_hash,
        )
        for seed in (0, 1)
    )
    assert names(one, two) == rows


def stages(*terms):
    return {"stages": [{"name": f"s{i}", "terms": t} for i, t in enumerate(terms)]}


def test_equal_configurations_do_not_differ():
    assert differences([stages({"bce": 1.0}), stages({"bce": 1})]) == {}


def test_a_tiny_difference_is_a_difference():
    found = differences([{"lr": 0.1}, {"lr": 0.1000000001}])
    assert found == {"lr": ["0.1", "0.1000000001"]}


def test_of_a_stage_only_the_differing_leaf_is_named():
    ramp = [[0.0, 1.0], [0.4, 0.0]]
    found = differences(
        [stages({"bce": 1.0, "asl": 0}), stages({"bce": ramp, "asl": 0})]
    )
    assert found == {"stages[0].terms.bce": ["1", "(0, 1), (0.4, 0)"]}


def test_a_field_that_one_lacks_is_absent():
    assert differences([{"a": 1, "b": 2}, {"a": 1}]) == {"b": ["2", "-"]}


def test_a_stage_that_one_lacks_is_one_field():
    found = differences([stages({"bce": 1.0}, {"soft_f": 1.0}), stages({"bce": 1.0})])
    assert found == {"stages[1]": ["name: s1, terms: (soft_f: 1)", "-"]}


def test_a_part_that_one_lacks_and_others_differ_in_is_many():
    focal = [{"gamma": gamma, "alpha": None} for gamma in (2.0, 3.0)]
    trees = [stages({"focal": focal[0]}), stages({"focal": focal[1]}), stages({})]
    assert differences(trees) == {
        "stages[0].terms.focal.gamma": ["2", "3", "-"],
        "stages[0].terms.focal.alpha": ["none", "none", "-"],
    }


def test_a_plain_value_against_a_part_is_one_field():
    found = differences([{"bce": 1.0}, {"bce": {"weight": 1.0, "gamma": 2.0}}])
    assert found == {"bce": ["1", "weight: 1, gamma: 2"]}


def test_a_long_value_keeps_both_ends():
    text = f"/start/{'x' * 200}/end"
    short = shorten(text)
    assert len(short) == MAX_VALUE
    assert short.startswith("/start/x")
    assert short.endswith("x/end")
    assert shorten("short") == "short"
