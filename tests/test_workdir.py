"""Tests that a run's folder belongs to one configuration and one vocabulary."""

import json
from pathlib import Path

import pytest

from jaxii.config import Config, default_config
from jaxii.data.labels import Vocabulary
from jaxii.errors import InputError
from jaxii.evaluation.result import EVALUATION, check_evaluation, write_evaluation
from jaxii.runs.workdir import Workdir

HOSTILE = (
    *(
        "../../../x",
        "/etc/x",
        "a/b",
        "a\\b",
        ".",
        "..",
        "\x1b]0;x\x07",
        "\n",
        "é" * 300,
    ),
    *("x" * 300, "x" * 301, "x" * 120 + "%%", "%2E", "con", "label=1"),
)

LABELS = Vocabulary(("/m/a", "/m/b"), ("A", "B"))
OTHER_LABELS = Vocabulary(("/m/b", "/m/a"), ("B", "A"))


def new_config(**changes):
    config = default_config()
    config.stages = ({"name": "only", "terms": {"bce": 1.0}, "num_steps": 2},)
    for path, value in changes.items():
        *sections, name = path.split("__")
        (config[sections[0]] if sections else config)[name] = value
    return Config.resolve(config)


def content(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def workdir(tmp_path):
    made = Workdir(tmp_path / "run")
    made.claim(new_config())
    made.claim_labels(LABELS)
    return made


def test_a_claimed_folder_gives_the_configuration_back(workdir):
    assert workdir.config() == new_config()
    assert workdir.vocabulary() == LABELS


def test_the_same_configuration_may_claim_again(workdir):
    before = content(workdir.path)
    workdir.claim(new_config())
    workdir.claim_labels(LABELS)
    assert content(workdir.path) == before


def test_what_does_not_change_the_result_may_differ(workdir):
    changed = new_config(
        data__directory="elsewhere", data__num_threads=7, log_every_steps=3
    )
    workdir.claim(changed)
    assert workdir.config().data.directory == "elsewhere"


def test_a_stored_whole_number_is_the_number_that_is_given(workdir):
    text = workdir.config_file.read_text()
    older = text.replace('"bce": 1.0', '"bce": 1')
    assert older != text
    workdir.config_file.write_text(older)
    assert workdir.config().content_hash() == new_config().content_hash()
    workdir.claim(new_config())
    assert workdir.config_file.read_text() == text


def test_an_evaluation_of_another_batch_size_stays_stale_at_every_start(workdir):
    lists = [workdir.result_file(EVALUATION, names) for names in ((), ("ensemble",))]
    for listed in lists:
        write_evaluation(listed, [workdir.config_file])
    changed = new_config(global_batch_size=32)
    for _ in range(2):  # the second is after a preemption
        workdir.claim(changed, change_batch_size=True)
        for listed in lists:
            with pytest.raises(InputError, match=r"config.json is damaged or was"):
                check_evaluation(listed, ["config.json"], again="run evaluate again")


def test_an_evaluation_of_the_configuration_stays_valid_if_the_data_moves(workdir):
    listed = workdir.result_file(EVALUATION)
    write_evaluation(listed, [workdir.config_file])
    for place in ("elsewhere", "again elsewhere"):
        workdir.claim(new_config(data__directory=place))
        check_evaluation(listed, ["config.json"], again="run evaluate again")


def test_how_often_it_is_evaluated_decides_the_best_and_may_not_differ(workdir):
    with pytest.raises(InputError, match="evaluate_every_steps: 200 -> 3"):
        workdir.claim(new_config(evaluate_every_steps=3))


def test_another_configuration_is_refused_with_the_fields_and_nothing_changes(workdir):
    before = content(workdir.path)
    with pytest.raises(
        InputError, match=r"optimizer.peak_lr: 0.05 -> 0.5; seed: 0 -> 4\).*--workdir"
    ):
        workdir.claim(new_config(seed=4, optimizer__peak_lr=0.5))
    assert content(workdir.path) == before


def test_another_stage_is_told_by_its_field_alone(workdir):
    stages = ({"name": "only", "terms": {"bce": 1.0}, "num_steps": 3},)
    with pytest.raises(InputError, match=r"\(stages\[0\].num_steps: 2 -> 3\)"):
        workdir.claim(new_config(stages=stages))


@pytest.mark.parametrize("changes", [{}, {"seed": 4}])
def test_what_else_to_do_is_said_only_if_just_the_batch_size_differs(workdir, changes):
    changed = new_config(global_batch_size=32, micro_batches=2, **changes)
    ending = r"another --workdir\.$" if changes else r"another --workdir, or wait\.$"
    with pytest.raises(InputError, match=ending):
        workdir.check(changed, otherwise=", or wait")
    with pytest.raises(InputError, match=r"another --workdir\.$"):
        workdir.check(changed)


def test_many_differences_are_cut_and_counted(workdir):
    changed = new_config(
        seed=1,
        micro_batches=2,
        evaluate_every_steps=9,
        global_batch_size=8,
        model__depth=18,
        model__width=8,
        optimizer__momentum=0.8,
    )
    with pytest.raises(InputError, match="and 2 more") as caught:
        workdir.claim(changed)
    assert str(caught.value).count(" -> ") == 5


def test_a_run_of_another_version_is_refused_in_one_line(workdir):
    fields = json.loads(workdir.config_file.read_text())
    del fields["data"]["mix_probability"]
    workdir.config_file.write_text(json.dumps(fields))
    for act in (workdir.config, lambda: workdir.claim(new_config())):
        with pytest.raises(InputError, match="written by another version of jaxii"):
            act()


def test_other_labels_are_refused_and_nothing_changes(workdir):
    before = content(workdir.path)
    with pytest.raises(InputError, match="trained on labels") as caught:
        workdir.claim_labels(OTHER_LABELS)
    for vocabulary in (LABELS, OTHER_LABELS):
        assert vocabulary.content_hash() in str(caught.value)
    assert content(workdir.path) == before


def test_labels_may_be_claimed_first(tmp_path):
    workdir = Workdir(tmp_path / "new" / "run")
    workdir.claim_labels(LABELS)
    workdir.claim(new_config())
    assert workdir.vocabulary() == LABELS


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not the folder of a run"):
        Workdir(tmp_path).config()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match=r"cannot be created.*writable folder"):
            Workdir(path).claim(new_config())


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '"text"', "\xff"])
def test_a_damaged_configuration_is_refused_by_name(workdir, text):
    workdir.config_file.write_bytes(text.encode("latin-1"))
    for act in (workdir.config, lambda: workdir.claim(new_config())):
        with pytest.raises(
            InputError, match=r"config.json is not a valid JSON .*restore"
        ):
            act()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sead": 1}, "config.sead is not a field"),
        ({"seed": "many"}, "seed"),
        ({"stages": []}, "at least one stage"),
        ({"global_batch_size": 0}, "use a value in"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_with_its_file(
    workdir, change, words
):
    fields = json.loads(workdir.config_file.read_text()) | change
    workdir.config_file.write_text(json.dumps(fields))
    with pytest.raises(InputError, match=words) as caught:
        workdir.config()
    assert str(workdir.config_file) in str(caught.value)


def test_what_was_tuned_elsewhere_has_names_of_its_own(tmp_path):
    workdir = Workdir(tmp_path)
    assert workdir.result_file("metrics.json").name == "metrics.json"
    assert (
        workdir.result_file("metrics.json", ["tuned_on_tuning", "adabn"]).name
        == "metrics_tuned_on_tuning_adabn.json"
    )


def test_any_domain_is_the_name_of_one_folder_of_its_own(workdir):
    folders = [workdir.held_out(domain).path for domain in HOSTILE]
    for folder in folders:
        Workdir(folder).claim(new_config())
    made = list((workdir.path / "held_out").iterdir())
    assert sorted(made) == sorted(folders)
    assert len(set(folders)) == len(HOSTILE)
    assert all(path.is_relative_to(workdir.path) for path in map(Path.resolve, made))
    assert all(folder.name.isprintable() for folder in folders)
