"""Tests the configuration of an adaptation; test_provenance_paths tests its results."""

import dataclasses
import runpy
from pathlib import Path

import pytest
from small_runs import changed

from jaxii.config import Config
from jaxii.distributed.mesh import check_batch_size
from jaxii.runs import assembly
from jaxii.runs.adapt import adapt, adapted, final_terms, with_small_batches
from jaxii.runs.run import Run
from jaxii.runs.workdir import Workdir
from jaxii.train.checkpoint import Checkpoints
from jaxii.train.stages import Saved

RECIPE = Path(__file__).parent.parent / "configs" / "f2_multitask.py"


def recipe(preset, **changes):
    return changed(
        Config.resolve(runpy.run_path(str(RECIPE))["get_config"](preset)), **changes
    )


def trained(folder, config):
    """Returns a run at a checkpoint of its last stage, without files."""
    name = config.stages[-1].name
    saved = Saved(
        stage=name, step=1, first_step=0, metric=0.1, evaluations=(), finished=True
    )
    checkpoints = Checkpoints(folder, [name], "", read_only=True)
    return Run(Workdir(folder), config, checkpoints, saved=saved)


@pytest.mark.parametrize(
    "preset", ["emoji", "inclusive_images", "inclusive_images_pod"]
)
@pytest.mark.parametrize(
    ("trainable", "num_steps"), [("all", 156), ("last_layer", 312)]
)
def test_an_adaptation_has_many_updates_whatever_the_run_s_batch(
    preset, trainable, num_steps, tmp_path
):
    start = trained(tmp_path, recipe(preset))
    made = adapted(start, trainable=trainable, num_epochs=0.0, peak_lr=0.0)
    (stage,) = assembly.stages_of(made, {"tuning": 1000}.__getitem__)
    assert stage.num_steps == num_steps
    assembly.check_before_data(made)


@pytest.mark.parametrize(
    ("num_devices", "size"), [(1, 64), (3, 63), (8, 64), (48, 48), (64, 64), (128, 128)]
)
@pytest.mark.parametrize("micro_batches", [1, 2, 8])
def test_small_batches_divide_over_the_devices(num_devices, size, micro_batches):
    run_s = num_devices * micro_batches * 64
    config = recipe(
        "inclusive_images", global_batch_size=run_s, micro_batches=micro_batches
    )
    made = with_small_batches(config, num_devices)
    assert made.global_batch_size == size
    check_batch_size(size, num_devices, made.micro_batches)
    # The run's slices have 64 images, so one slice is enough.
    assert made.micro_batches == 1


def test_slices_of_small_batches_are_not_larger_than_the_run_s():
    config = recipe("inclusive_images", global_batch_size=1024, micro_batches=32)
    assert with_small_batches(config, 1).micro_batches == 2
    assert with_small_batches(config, 2).micro_batches == 2
    assert with_small_batches(config, 8).micro_batches == 2


@pytest.mark.parametrize(("base", "rule"), [(0, "is not scaled"), (256, "is scaled")])
def test_smaller_batches_are_told(tmp_path, monkeypatch, capfd, base, rule):
    config = recipe("inclusive_images", optimizer__base_batch_size=base)
    said = said_by_adapt(config, tmp_path, monkeypatch, capfd)
    assert "64 images instead of the run's 1024" in said
    assert f"the learning rate {rule} with the batch" in said


def test_the_rate_is_told(tmp_path, monkeypatch, capfd):
    said = said_by_adapt(two_rates(), tmp_path, monkeypatch, capfd)
    assert said == "rate      0.0001 at most; the run's highest was 0.001\n"


def said_by_adapt(config, tmp_path, monkeypatch, capfd):
    """Returns what `adapt` prints before it trains."""
    start = trained(tmp_path, config)
    monkeypatch.setattr(Run, "open", lambda *_: start)
    monkeypatch.setattr("jaxii.runs.adapt.train", lambda *_, **__: None)
    adapt(
        start.workdir,
        output=tmp_path / "output",
        stage="",
        trainable="all",
        num_epochs=0.0,
        peak_lr=0.0,
        data_dir="",
        should_stop=lambda step: False,
    )
    return capfd.readouterr().out


def two_rates(**changes):
    """Returns a configuration whose stages have other rates than the optimizer."""
    stages = [
        {"name": name, "num_steps": 2, "terms": {"bce": 1.0}, "peak_lr_scale": scale}
        for name, scale in (("first", 0.02), ("second", 0.002))
    ]
    return recipe("emoji", stages=stages, optimizer__peak_lr=0.05, **changes)


@pytest.mark.parametrize(("trainable", "share"), [("all", 0.1), ("last_layer", 1.0)])
def test_an_adaptation_trains_at_a_share_of_the_highest_rate_of_the_stages(
    trainable, share, tmp_path
):
    def peak_lr(config, given=0.0):
        start = trained(tmp_path, config)
        made = adapted(start, trainable=trainable, num_epochs=0.0, peak_lr=given)
        return made.optimizer.peak_lr * made.stages[0].peak_lr_scale

    assert peak_lr(two_rates()) == pytest.approx(share * 1e-3)
    assert peak_lr(recipe("emoji")) == pytest.approx(share * 0.15)
    assert peak_lr(two_rates(), given=0.3) == 0.3


def test_batches_that_are_small_already_are_kept():
    config = recipe("emoji")
    assert with_small_batches(config, 8) is config
    config = dataclasses.replace(config, global_batch_size=24)
    assert with_small_batches(config, 8) is config


@pytest.mark.parametrize(
    ("terms", "final"),
    [
        ({"bce": 1.0}, {"bce": 1.0}),
        ({"bce": ((0.0, 1.0), (0.6, 0.5))}, {"bce": 0.5}),
        ({"bce": ((0.0, 1.0), (0.6, 0.5)), "embedding": 1.0}, {"bce": 0.5}),
        (
            {
                "focal": {
                    "weight": ((0.4, 0.0), (0.6, 1.0)),
                    "gamma": 2.0,
                    "alpha": None,
                }
            },
            {"focal": {"weight": 1.0, "gamma": 2.0, "alpha": None}},
        ),
        ({"embedding": 1.0}, {"bce": 1.0}),
        ({"bce": ((0.0, 1.0), (1.0, 0.0)), "embedding": 1.0}, {"bce": 1.0}),
        (
            {"bce": ((0.0, 1.0), (0.5, 0.0)), "soft_f": {"beta": 2.0}},
            {"soft_f": {"beta": 2.0}},
        ),
        ({"soft_f": {"weight": ((0.0, 1.0), (0.5, 0.0))}}, {"bce": 1.0}),
    ],
)
def test_an_adaptation_trains_with_the_objective_as_it_ended(terms, final):
    assert final_terms(terms) == final
