"""Tests that recipes resolve to their golden texts and can be restored from disk.

After an intended change of a default or a recipe, write new golden texts with
`UPDATE_GOLDEN=1 python -m pytest tests/test_config.py` and read the diff.
"""

import copy
import dataclasses
import json
import os
import re
import runpy
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
from small_runs import changed

from jaxii.config import (
    Config,
    StageConfig,
    default_config,
    differences,
    flatten,
)
from jaxii.data.labels import MACHINE_LABELS
from jaxii.errors import InputError
from jaxii.models.resnet import DEPTHS, STEMS, VARIANTS
from jaxii.objective.objective import UNKNOWN
from jaxii.train.optimizer import OPTIMIZERS
from jaxii.train.stages import ENTERS_FROM

GOLDEN = Path(__file__).parent / "golden"
CONFIGS = Path(__file__).parent.parent / "configs"
PACKAGE = Path(__file__).parent.parent / "jaxii"
# A file without PRESETS has one recipe, and its get_config takes no argument.
RECIPES = [
    (path, preset)
    for path in sorted(CONFIGS.glob("*.py"))
    for preset in runpy.run_path(str(path)).get("PRESETS", ("",))
]
NAMES = [f"{path.stem}{preset and '-'}{preset}" for path, preset in RECIPES]


def load(path, preset=""):
    recipe = runpy.run_path(str(path))["get_config"](*[preset] * bool(preset))
    return Config.resolve(recipe)


@pytest.fixture
def config():
    return load(CONFIGS / "f2_multitask.py")


@pytest.mark.parametrize(("path", "preset"), RECIPES, ids=NAMES)
def test_a_recipe_resolves_to_its_golden_text(path, preset):
    file = GOLDEN / f"config_{path.stem}{preset and '-'}{preset}.json"
    text = json.dumps(load(path, preset).to_dict(), indent=1, sort_keys=True) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()


def test_no_golden_text_is_without_its_recipe():
    assert sorted(p.stem for p in GOLDEN.glob("config_*")) == sorted(
        f"config_{name}" for name in NAMES
    )


@pytest.mark.parametrize(("path", "preset"), RECIPES, ids=NAMES)
def test_a_recipe_comes_back_from_json(path, preset):
    config = load(path, preset)
    again = Config.resolve(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.content_hash() == config.content_hash()


def test_another_preset_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="nearest is emoji; use one of toy"):
        load(CONFIGS / "f2_multitask.py", "emojis")


def test_a_recipe_cannot_add_a_field():
    config = default_config()
    with pytest.raises((AttributeError, KeyError), match="peek_lr"):
        config.optimizer.peek_lr = 0.1


def test_a_recipe_cannot_change_a_type():
    config = default_config()
    with pytest.raises(TypeError):
        config.model.depth = "fifty"


def test_the_hash_changes_with_any_field(config):
    stages = config.to_dict()["stages"]
    stages[1]["peak_lr_scale"] = 0.123
    others = changed(config, seed=1), changed(config, stages=stages)
    assert len({each.content_hash() for each in (config, *others)}) == 3


def test_differences_are_told_by_field_to_the_depth_of_a_stage(config):
    one = config.to_dict()
    other = copy.deepcopy(one)
    other["optimizer"]["peak_lr"] = 0.9
    other["stages"][1]["num_epochs"] = 99.0
    del other["seed"]
    assert differences(one, other) == [
        f"optimizer.peak_lr: {config.optimizer.peak_lr} -> 0.9",
        "seed: 0 -> absent",
        f"stages[1].num_epochs: {config.stages[1].num_epochs} -> 99.0",
    ]


def test_what_shows_a_run_does_not_make_it_another(config):
    shown = changed(config, track="wandb")
    assert shown.content_hash() == config.content_hash()


def test_nothing_differs_from_itself(config):
    fields = config.to_dict()
    assert differences(fields, copy.deepcopy(fields)) == []


@pytest.mark.parametrize(
    "fields", [{"sead": 1}, {"optimizer": {"peek_lr": 0.1}}, {"model": 3}]
)
def test_a_field_on_disk_that_is_not_known_is_refused_by_name(config, fields):
    with pytest.raises(InputError, match=r"config\.(sead|optimizer.peek_lr|model) "):
        Config.resolve(config.to_dict() | fields)


def test_a_misspelt_field_is_refused_with_the_nearest(config):
    for fields, name in (({"sead": 1}, "seed"), ({"data": {"miror": 1}}, "mirror")):
        with pytest.raises(InputError, match=f"the nearest is {name}; the fields are"):
            Config.resolve(config.to_dict() | fields)


def test_a_field_that_is_not_given_has_its_default(config):
    fields = config.to_dict()
    del fields["data"]["mirror"]
    assert Config.resolve(fields).data.mirror is True


def test_a_configuration_cannot_change(config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.stages[0].num_steps = 1


def test_a_replaced_field_is_checked(config):
    with pytest.raises(InputError, match=r"config.seed=-1; use a value in"):
        dataclasses.replace(config, seed=-1)


def test_whole_numbers_may_stand_for_others_and_lists_for_tuples(config):
    terms = {"bce": [[0, 1], [1, 0]]}
    stage = {"name": "a", "terms": terms, "num_epochs": 2}
    (made,) = Config.resolve({"stages": [stage]}).stages
    assert type(made.num_epochs) is float
    assert made.terms == {"bce": ((0, 1), (1, 0))}
    with pytest.raises(InputError, match=r"seed=1.0; use an integer in"):
        changed(config, seed=1.0)


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        (1, 1.0),
        (np.float32(1), 1.0),
        (np.int64(1), 1.0),
        (
            tuple(zip(np.linspace(0, 1, 3), np.arange(3), strict=True)),
            ((0.0, 0.0), (0.5, 1.0), (1.0, 2.0)),
        ),
        ({"weight": 1, "gamma": 2}, {"weight": 1.0, "gamma": 2.0}),
    ],
)
def test_every_number_of_a_term_is_a_float(given, plain):
    found, expected = (
        Config.resolve({"stages": [{**GOOD, "terms": {"focal": weight}}]})
        for weight in (given, plain)
    )
    assert repr(found) == repr(expected)
    assert found.content_hash() == expected.content_hash()


def test_numbers_of_numpy_are_numbers():
    stage = {**GOOD, "num_steps": np.int64(5), "peak_lr_scale": np.float32(0.5)}
    (made,) = Config.resolve({"stages": [stage]}).stages
    assert (made.num_steps, made.peak_lr_scale) == (5, 0.5)
    assert (type(made.num_steps), type(made.peak_lr_scale)) == (int, float)


@pytest.mark.parametrize(
    "terms", [{"bce": np.zeros(99)}, {"bce": {"weight": {1.0}}}, np.zeros(3), 3, None]
)
def test_terms_that_are_no_numbers_are_refused(terms):
    with pytest.raises(InputError, match=r"stage 'a': terms=.*use a dict of") as caught:
        Config.resolve({"stages": [{**GOOD, "terms": terms}]})
    assert "\n" not in str(caught.value)


CHOICES = {
    "data.machine_labels": MACHINE_LABELS,
    "data.unknown": UNKNOWN,
    "model.variant": tuple(VARIANTS),
    "model.depth": tuple(DEPTHS),
    "model.stem": STEMS,
    "optimizer.name": tuple(OPTIMIZERS),
}


@pytest.mark.parametrize("path", CHOICES)
def test_choices_are_those_of_the_code_that_takes_them(path):
    section, name = path.split(".")
    kind = get_type_hints(type(getattr(load(CONFIGS / "f2_multitask.py"), section)))
    assert get_args(kind[name]) == CHOICES[path]
    kinds = get_type_hints(StageConfig)
    assert get_args(kinds["enters_from"]) == ENTERS_FROM


def test_runs_and_cli_alone_read_the_configuration():
    reads = re.compile(r"^from jaxii(\.config import| import .*\bconfig\b)", re.M)
    readers = {
        path.relative_to(PACKAGE).parts[0]
        for path in PACKAGE.rglob("*.py")
        if reads.search(path.read_text())
    }
    assert readers <= {
        "__init__.py",
        "runs",
        "cli",
        "main.py",
        "arguments.py",
        "prepare",
    }


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("data.dataset", "emoji", "use one of toy_regions, kaggle, open_images_v4"),
        ("data.machine_labels", "hard", "use one of ignored, soft, thresholded"),
        ("data.unknown", "positive", "use one of negative, ignored"),
        ("data.image_size_pixels", 8, "use a value in"),
        ("data.validation_fraction", 0.0, "use a value in"),
        ("data.most_labels", 127, "use a value in"),
        ("model.depth", 20, "use one of 18, 26, 34, 50, 101, 152"),
        ("model.depth", None, "use one of 18"),
        ("model.compute_dtype", "float16", "use one of float32, bfloat16"),
        ("model.dropout", 1.0, "use a value in"),
        ("model.width", None, "use a value in"),
        ("model.batch_norm", "group:0", "use device, global, or group:N"),
        ("optimizer.name", "adam", "use one of sgd, adamw, lars, lamb"),
        ("optimizer.peak_lr", 0.0, "use a value in"),
        ("optimizer.peak_lr", float("nan"), "use a value in"),
        ("global_batch_size", 0, "use a value in"),
        ("micro_batches", 0, "use a value in"),
        ("log_every_steps", 0, "use a value in"),
        ("track", "tensorboard", "use one of '', wandb, mlflow"),
        ("stages", (), "at least one stage"),
        ("stages", (3,), "use a dict"),
    ],
)
def test_a_bad_value_is_refused_with_field_and_choices(config, path, value, words):
    with pytest.raises(InputError, match=words) as caught:
        changed(config, **{path.replace(".", "__"): value})
    assert str(caught.value).startswith(f"config.{path}")
    assert "\n" not in str(caught.value)


def test_every_default_is_allowed():
    Config.resolve({"stages": [GOOD]})


GOOD = {"name": "a", "terms": {"bce": 1.0}, "num_steps": 5}


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({**GOOD, "num_step": 5}, "no field 'num_step'"),
        ({**GOOD, "num_epochs": 1.0}, "exactly one"),
        ({**GOOD, "num_steps": 0}, "exactly one"),
        ({"name": "a", "num_steps": 5}, "has no 'terms'"),
        (
            {**GOOD, "enters_from": "first"},
            "'first'; use one of best, last",
        ),
        (
            {**GOOD, "warmup_share": 1.0},
            r"warmup_share=1.0; use a value in \[0.0, ",
        ),
        ({**GOOD, "name": "a/b"}, "letters, digits"),
        ({**GOOD, "terms": {"embedding": 1.0}}, "no embedding head"),
        ({**GOOD, "split": "test"}, "split='test'; use one of train, tuning"),
        (
            {**GOOD, "trainable": "head"},
            "trainable='head'; use one of all, last_layer",
        ),
        (
            {**GOOD, "trainable": "last_layer", "embedding_head": True},
            "only the classifier",
        ),
    ],
)
def test_a_stage_that_cannot_work_is_refused_by_name(stage, words):
    with pytest.raises(InputError, match=words):
        Config.resolve({"stages": [stage]})


def test_a_head_cannot_come_back():
    with_head = {**GOOD, "name": "b", "embedding_head": True}
    with pytest.raises(InputError, match="but not add one"):
        Config.resolve({"stages": [GOOD, with_head]})


def test_a_configuration_without_stages_is_refused():
    with pytest.raises(InputError, match=r"stages=\(\); add at least one stage"):
        Config.resolve({"seed": 1})


def test_two_stages_of_one_name_are_refused():
    with pytest.raises(InputError, match="two stages"):
        Config.resolve({"stages": [GOOD, GOOD]})


def test_flattening_names_stages_by_position():
    tree = {"stages": [{"name": "a"}, {"name": "b"}], "sizes": [1, 2], "empty": {}}
    assert flatten(tree) == {
        "stages[0].name": "a",
        "stages[1].name": "b",
        "sizes": [1, 2],
        "empty": {},
    }
