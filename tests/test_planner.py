"""Tests the plan of a step: as in training, on local and on absent devices."""

import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_layers
import small_layout
from test_topology import has_tpu_compiler

from jaxii.config import Config, StageConfig
from jaxii.distributed.mesh import make_mesh
from jaxii.errors import InputError
from jaxii.planner import plan_text, topology
from jaxii.planner.compiled import DoesNotFit
from jaxii.planner.topology import CHIPS, GIB
from jaxii.prepare.kaggle import Layout, prepare
from jaxii.runs import assembly
from jaxii.runs import plan as command

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def few_blocks():
    with small_layers.few_blocks(1, 1, 1, 1):
        yield


def small_config(preset="toy_regions", **fields):
    recipe = runpy.run_path(str(ROOT / "configs" / "f2_multitask.py"))
    config = recipe["get_config"](preset)
    if preset == "toy_regions":
        config.data.dataset = "kaggle"
    config.model.width = 8
    config.data.image_size_pixels = 16
    config.label_embedding.dim = 2
    config.global_batch_size = 32
    config.data.augmentation = 0.0
    config.update_from_flattened_dict(fields)
    return Config.resolve(config)


def run(config, **more):
    given = {"topology": ["local"], "device_batch_size": 0, "stage": "", "quick": True}
    command.plan(config, **{**given, **more})


@pytest.fixture(scope="module")
def printed():
    """Output of the command for a small network on eight devices."""
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "say", lines.append)
        run(small_config())
    return "\n".join(lines)


def test_the_plan_names_step_data_devices_and_batch(printed):
    assert "step      stage multitask: resnet 18 with embedding head" in printed
    assert (
        "7,178 classes, 1,568,738 training images" in printed and "assumed" in printed
    )
    assert "local: 8 x cpu; 4 images per device, 32 per step" in printed


def test_on_a_cpu_there_is_no_roofline_and_it_says_so(printed):
    assert "the device's memory is unknown" in printed
    assert "roofline  none: the peaks of cpu are unknown" in printed


def test_a_batch_is_that_of_training(tmp_path):
    files = small_layout.write(tmp_path / "files")
    prepare(Layout.find(files), tmp_path / "data", num_workers=1)
    config = small_config(**{"data.validation_fraction": 0.4})
    config = config.moved(str(tmp_path / "data"))
    data = assembly.open_data(config)
    batch = next(assembly.train_batches(config, data, "train", 0))
    facts = command.facts_of(config)
    shapes = command.batch_shapes(config, facts, config.global_batch_size)
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        name: (shape.shape, np.dtype(shape.dtype)) for name, shape in shapes.items()
    }
    assert facts.num_classes == len(data.vocabulary)
    assert facts.num_images == data.split("train").num_examples


@pytest.mark.parametrize(
    ("fields", "given", "pattern"),
    [
        ({"global_batch_size": 12}, {}, "12 is not divisible by 8 devices; use 8 or"),
        ({"micro_batches": 3}, {"device_batch_size": 4}, "--device_batch_size=4.*of 3"),
        ({}, {"stage": "f3"}, "--stage=f3 is not a stage.*multitask, classifier"),
        ({}, {"topology": ["v5e:9x9"]}, "--topology=v5e:9x9"),
        (
            {"model.batch_norm": "group:3"},
            {},
            "group:3 does not divide 8 devices; use group:2 or group:4",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused(fields, given, pattern):
    with pytest.raises(InputError, match=pattern):
        run(small_config(**fields), **given)


def fake_step(monkeypatch, limit):
    """Replaces compiling a step by a formula: 1 GiB plus 0.1 GiB per image."""

    def figures(self, size):
        if (total := GIB * (1 + 0.1 * size)) > limit * GIB:
            raise DoesNotFit(f"used {total / GIB:.2f}G of {limit}G")
        return command.Figures(
            argument_bytes=GIB,
            output_bytes=0.0,
            temporary_bytes=total - GIB,
            program_bytes=0.0,
            flops=1e12,
            hbm_bytes=1e9,
            collectives=(),
        )

    monkeypatch.setattr(command._Step, "figures", figures)

    def slice_of(name):
        chip, sides = CHIPS["v5e"], (2, 4)
        return topology.Topology(
            name=name, chip=chip, sides=sides, mesh=make_mesh(), hbm_bytes=limit * GIB
        )

    monkeypatch.setattr(topology, "absent", slice_of)


def test_what_fits_is_shown_with_the_largest_that_does(monkeypatch, capsys):
    fake_step(monkeypatch, 11)
    run(small_config(), topology=["v5e:2x4"], device_batch_size=48, quick=False)
    out = capsys.readouterr().out
    assert "5.80 GiB per device of 11.00 (53%): fits" in out
    assert "largest   96 images per device fit, in 10.60 GiB (compiled)" in out


def test_what_does_not_fit_is_refused_with_what_does(monkeypatch, capsys):
    fake_step(monkeypatch, 11)
    with pytest.raises(
        InputError,
        match=r"200 images per device do not fit on v5e:2x4; "
        r"use --device_batch_size=100",
    ):
        run(small_config(), topology=["v5e:2x4"], device_batch_size=200, quick=False)
    assert "memory    does not fit: used 21.00G of 11G" in capsys.readouterr().out


@pytest.mark.parametrize("topologies", [["local"], ["local", "local"]])
def test_what_only_exceeds_the_memory_of_local_devices_is_refused(
    topologies, monkeypatch, capsys
):
    local = replace(topology.local(), hbm_bytes=2**20)
    monkeypatch.setattr(topology, "local", lambda: local)
    with pytest.raises(
        InputError,
        match=r"4 images per device do not fit on local.*; use a smaller --dev",
    ):
        run(small_config(), topology=topologies)
    assert "does not fit" in capsys.readouterr().out


def tuning_stage(config, **fields):
    """Returns the configuration with a second stage, on the split tuning."""
    stage = StageConfig(name="adapt", terms={"bce": 1.0}, split="tuning", **fields)
    first = replace(config.stages[0], num_epochs=0.0, num_steps=10)
    return replace(config, stages=(first, stage))


def test_a_stage_whose_number_of_images_is_unknown_is_left_out_and_named(
    monkeypatch, capsys
):
    fake_step(monkeypatch, 11)
    given = {"topology": ["v5e:2x4"], "device_batch_size": 8}
    run(tuning_stage(small_config(), num_epochs=3.0), **given)
    out = capsys.readouterr().out
    assert "the run   320 images: " in out
    assert (
        "without stage adapt: its number of images is unknown; add --data_dir=" in out
    )
    run(tuning_stage(small_config(), num_steps=5), **given)
    out = capsys.readouterr().out
    assert "the run   480 images: " in out and "without stage" not in out


def test_a_stage_on_tuning_has_the_length_of_that_split(monkeypatch, capsys, tmp_path):
    files = small_layout.write(tmp_path / "files", num_train=320)
    prepare(Layout.find(files), tmp_path / "data", num_workers=1)
    config = tuning_stage(small_config(), num_epochs=32.0)
    fake_step(monkeypatch, 11)
    run(
        config.moved(str(tmp_path / "data")),
        topology=["v5e:2x4"],
        device_batch_size=8,
    )
    # 10 steps, then 32 passes over 2 images in batches of 32.
    out = capsys.readouterr().out
    assert "the run   384 images: " in out and "without stage" not in out


def test_several_topologies_are_a_table_and_refuse_what_does_not_fit(
    monkeypatch, capsys
):
    fake_step(monkeypatch, 11)
    names = ["v5e:2x4", "v5e:4x4"]
    run(small_config(), topology=names, device_batch_size=8)
    rows = capsys.readouterr().out.splitlines()
    header = rows.index(plan_text.HEADER)
    assert [row.split()[0] for row in rows[header + 1 : header + 3]] == names
    assert rows[header + 1].endswith("100.0%")
    with pytest.raises(InputError, match="do not fit on v5e:2x4, v5e:4x4; use a sm"):
        run(small_config(), topology=names, device_batch_size=200)


@pytest.mark.skipif(not has_tpu_compiler(), reason="libtpu is not installed")
def test_a_small_step_is_planned_for_a_slice_of_tpus_that_is_not_there():
    result = subprocess.run(
        [
            *(sys.executable, "-m", "jaxii.main", "plan", "--quick"),
            *("--config=configs/f2_multitask.py:emoji", "--topology=v5e:2x4"),
            *("--config.model.width=8", "--config.data.image_size_pixels=16"),
            *("--config.label_embedding.dim=8", "--stage=classifier"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "v5e:2x4: 8 x TPU v5 lite; 8 images per device, 64 per step" in result.stdout
    assert "of 15.75 (" in result.stdout and "network   2 all-reduce" in result.stdout
