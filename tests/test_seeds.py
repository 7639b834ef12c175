"""Rows of a comparison have names that tell the runs apart."""

import pytest
from small_runs import write_run

from jaxii.report.runs import read_run
from jaxii.report.seeds import entries


def names(*paths):
    return [entry.title for entry in entries([read_run(path) for path in paths])]


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


def test_runs_on_other_datasets_are_not_seeds_of_one(tmp_path):
    one = write_run(tmp_path / "base_s0", seed=0, data_hash="a")
    two = write_run(tmp_path / "base_s1", seed=1, data_hash="b")
    assert names(one, two) == ["base_s0", "base_s1"]
