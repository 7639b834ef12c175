"""Tests `doctor`: it names problems with fixes, and measures what limits a run."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
import small_layers
from small_runs import changed

from jaxii.data.transforms import TrainTransform
from jaxii.doctor import checks
from jaxii.doctor.checks import Finding
from jaxii.doctor.speed import Drawn, input_speed
from jaxii.errors import CheckFailed
from jaxii.runs import doctor as command
from jaxii.runs.speed import Speed


@pytest.fixture(scope="module", autouse=True)
def few_blocks():
    with small_layers.few_blocks(1, 1, 1, 1):
        yield


def test_a_disk_is_checked_where_the_run_will_be(tmp_path):
    found = checks.disk(tmp_path / "runs" / "new")
    assert str(tmp_path) in found.lines[0]
    assert "GB free" in found.lines[0]
    assert not (tmp_path / "runs").exists()


def test_a_full_or_closed_disk_is_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "LOW_SPACE_BYTES", 1e18)
    assert "make room" in checks.disk(tmp_path).broken[0]

    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checks.tempfile, "TemporaryFile", refuse)
    assert "Permission denied" in checks.disk(tmp_path).broken[0]


def test_versions_are_those_that_are_imported():
    (line,) = checks.versions().lines[:1]
    assert f"jax {jax.__version__}," in line
    assert f"numpy {np.__version__}" in line


def test_an_accelerator_that_jax_does_not_use_is_broken(monkeypatch, tmp_path):
    sign = tmp_path / "version"
    drivers = (((str(sign),), "an NVIDIA GPU", "jaxii[cuda]"),)
    monkeypatch.setattr(checks, "DRIVERS", drivers)
    assert not checks.devices().broken
    sign.write_text("")
    found = checks.devices()
    assert "cpu" in found.lines[0]
    assert "an NVIDIA GPU is present" in found.broken[0]


def test_devices_that_cannot_be_had_are_broken(monkeypatch):
    def fail():
        raise RuntimeError("Unable to initialize backend 'tpu'\nmore")

    monkeypatch.setattr(jax, "devices", fail)
    (text,) = checks.devices().broken
    assert "Unable to initialize backend 'tpu')" in text


def test_the_input_path_delivers_whole_batches():
    transform = TrainTransform(size_pixels=32)
    assert input_speed(Drawn(), transform, 2, 0.1) > 10


@pytest.mark.parametrize(
    ("given", "taken", "platform", "words"),
    [
        (1000.0, 250.0, "cpu", "about 200 images/s: .* the step takes 80% "),
        (1000.0, 4000.0, "gpu", "the input: 4.0 times as many cores"),
        (1000.0, 250.0, "tpu", "the step: the input is 4.0 times as fast"),
    ],
)
def test_what_limits_is_the_slower_of_input_and_step(given, taken, platform, words):
    measured = Speed(input=given, step=taken, first_step_seconds=1.0, batch_size=64)
    assert re.search(words, command._limit(measured, platform))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("jaxii.doctor.speed.NUM_IMAGES", 2)
    with small_layers.measured_quickly(monkeypatch):
        yield


def small_config():
    return changed(
        command._usual_config(),
        data__image_size_pixels=32,
        data__augmentation=0.0,
        model__width=8,
        model__batch_norm="global",
        global_batch_size=8,
        optimizer__average="none",
    )


def test_a_recipe_is_measured_and_nothing_is_written(quick, tmp_path, capsys):
    command.doctor(small_config(), place=tmp_path)
    said = capsys.readouterr().out
    for word in ("versions", "devices", "disk", "input", "step", "limit"):
        assert f"\n{word}" in f"\n{said}", word
    assert said.endswith("all checks passed\n")
    assert not list(tmp_path.iterdir())


def test_a_recipe_whose_data_is_not_there_yet_is_measured_all_the_same(tmp_path):
    config = small_config().moved(str(tmp_path / "prepared"))
    source, facts, of = command._data(config)
    assert isinstance(source, Drawn)
    assert facts.num_classes == command.USUAL["num_labels"]
    assert f"{tmp_path}/prepared does not exist yet" in of


def test_what_is_broken_ends_it_with_the_cure_in_sight(quick, monkeypatch, capsys):
    monkeypatch.setattr(checks, "disk", lambda place: Finding([], ["x: delete it"]))
    monkeypatch.setattr(command, "_speeds", lambda config, what: [])
    with pytest.raises(CheckFailed, match="problems found: 1; see the BROKEN lines"):
        command.doctor(None, place=Path("/tmp"))
    assert "BROKEN    x: delete it" in capsys.readouterr().out
