"""Recipes resolve to what is on record, and come back whole from what is on disk.

After a wanted change of a default or a recipe, write the golden texts anew with
`UPDATE_GOLDEN=1 python -m pytest tests/test_config.py` and read the diff.
"""

import copy
import json
import os
import runpy
from pathlib import Path

import pytest

from jaxii import config as configuration

GOLDEN = Path(__file__).parent / "golden"
CONFIGS = Path(__file__).parent.parent / "configs"
# A file without PRESETS has one recipe, and its get_config takes no argument.
RECIPES = [
    (path, preset)
    for path in sorted(CONFIGS.glob("*.py"))
    for preset in runpy.run_path(str(path)).get("PRESETS", ("",))
]
NAMES = [f"{path.stem}{preset and '-'}{preset}" for path, preset in RECIPES]


def load(path, preset=""):
    return runpy.run_path(str(path))["get_config"](*[preset] * bool(preset))


@pytest.fixture
def config():
    return load(CONFIGS / "f2_multitask.py")


@pytest.mark.parametrize(("path", "preset"), RECIPES, ids=NAMES)
def test_a_recipe_resolves_to_its_golden_text(path, preset):
    file = GOLDEN / f"config_{path.stem}{preset and '-'}{preset}.json"
    text = json.dumps(configuration.to_dict(load(path, preset)), indent=1) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()


def test_no_golden_text_is_without_its_recipe():
    assert sorted(p.stem for p in GOLDEN.glob("config_*")) == sorted(
        f"config_{name}" for name in NAMES
    )


@pytest.mark.parametrize(("path", "preset"), RECIPES, ids=NAMES)
def test_a_recipe_passes_check(path, preset):
    configuration.check(load(path, preset))


@pytest.mark.parametrize(("path", "preset"), RECIPES, ids=NAMES)
def test_a_recipe_comes_back_from_json(path, preset):
    config = load(path, preset)
    fields = json.loads(json.dumps(configuration.to_dict(config)))
    again = configuration.from_dict(fields)
    assert configuration.to_dict(again) == configuration.to_dict(config)
    assert configuration.content_hash(again) == configuration.content_hash(config)
    configuration.check(again)


def test_another_preset_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="nearest is emoji; use one of toy"):
        load(CONFIGS / "f2_multitask.py", "emojis")


def test_a_recipe_cannot_add_a_field():
    config = configuration.default_config()
    with pytest.raises((AttributeError, KeyError), match="peek_lr"):
        config.optimizer.peek_lr = 0.1


def test_a_recipe_cannot_change_a_type():
    config = configuration.default_config()
    with pytest.raises(TypeError):
        config.model.depth = "fifty"


def test_the_hash_changes_with_any_field(config):
    hashes = {configuration.content_hash(config)}
    config.seed = 1
    hashes.add(configuration.content_hash(config))
    config.stages[1]["peak_lr"] = 0.123
    hashes.add(configuration.content_hash(config))
    assert len(hashes) == 3


def test_differences_are_told_by_field_to_the_depth_of_a_stage(config):
    one = configuration.to_dict(config)
    other = copy.deepcopy(one)
    other["optimizer"]["peak_lr"] = 0.9
    other["stages"][1]["num_epochs"] = 99.0
    del other["seed"]
    assert configuration.differences(one, other) == [
        f"optimizer.peak_lr: {config.optimizer.peak_lr} -> 0.9",
        "seed: 0 -> absent",
        f"stages[1].num_epochs: {config.stages[1]['num_epochs']} -> 99.0",
    ]


def test_what_shows_a_run_does_not_make_it_another(config):
    before = configuration.content_hash(config)
    config.track = "wandb"
    configuration.check(config)
    assert configuration.content_hash(config) == before


def test_nothing_differs_from_itself(config):
    fields = configuration.to_dict(config)
    assert configuration.differences(fields, copy.deepcopy(fields)) == []


@pytest.mark.parametrize(
    "fields", [{"sead": 1}, {"optimizer": {"peek_lr": 0.1}}, {"model": 3}]
)
def test_a_field_on_disk_that_is_not_known_is_refused_by_name(config, fields):
    with pytest.raises(ValueError, match=r"config\.(sead|optimizer.peek_lr|model) "):
        configuration.from_dict(configuration.to_dict(config) | fields)


def test_a_field_that_is_newer_than_the_file_has_its_default(config):
    fields = configuration.to_dict(config)
    del fields["data"]["mirror"]
    assert configuration.from_dict(fields).data.mirror is True


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
    *sections, name = path.split(".")
    section = config[sections[0]] if sections else config
    section[name] = value
    with pytest.raises(ValueError, match=words) as caught:
        configuration.check(config)
    assert str(caught.value).startswith(f"config.{path}")
    assert "\n" not in str(caught.value)


def test_every_field_with_choices_has_a_default_among_them():
    config = configuration.default_config()
    config.stages = ({"name": "only"},)
    configuration.check(config)
