"""Tests that input and step of a recipe are timed on this machine."""

import jax
import plain_data
import pytest
import small_layers
import small_layout

from jaxii.config import Config, default_config
from jaxii.prepare.new import new
from jaxii.runs import speed
from jaxii.runs.speed import Speed


def test_on_cpus_input_and_step_share_the_cores():
    measured = Speed(input=600.0, step=300.0, first_step_seconds=9.0, batch_size=64)
    assert measured.images_per_second == pytest.approx(200.0)


def test_on_cpus_a_batch_for_accelerators_is_made_small():
    config = default_config()
    config.data.image_size_pixels = 224
    config.global_batch_size, config.micro_batches = 1024, 4
    config.stages = ({"name": "one", "num_epochs": 1.0, "terms": {"bce": 1.0}},)
    config = speed.smaller_batch(Config.resolve(config))
    assert config.global_batch_size == jax.device_count()
    assert config.micro_batches == 1


def test_new_times_its_recipe_on_the_prepared_data(tmp_path, monkeypatch):
    plain_data.json_lists(
        tmp_path,
        [(small_layout.jpeg(20 + i), ["a", "b"][: 1 + i % 2]) for i in range(24)],
    )
    measured = []

    def pace_of(fields):
        small = {"model.width": 8, "data.image_size_pixels": 32, "model.depth": 18}
        measured.append((fields, speed.pace_of(fields | small)))
        return measured[-1][1]

    with (
        small_layers.measured_quickly(monkeypatch),
        small_layers.few_blocks(1, 1, 1, 1),
    ):
        new(
            tmp_path / "mine",
            images=tmp_path / "photos",
            labels=tmp_path / "labels.csv",
            path_column="",
            label_column="",
            label_separator="",
            fold_case=False,
            min_images=1,
            platform="cpu",
            num_devices=1,
            fast_bfloat16=False,
            pace_of=pace_of,
        )
    ((fields, pace),) = measured
    assert fields["data.directory"] == str(tmp_path / "mine" / "data")
    assert pace.images_per_second > 1
    assert pace.start_seconds > 0
