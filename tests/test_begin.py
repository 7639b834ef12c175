"""Tests that a run continues with its first configuration; changes are recorded."""

import json
import shutil

import oracle
import pytest
import small_layout
from small_runs import changed

from jaxii.errors import InputError
from jaxii.prepare.kaggle import Layout, prepare
from jaxii.runs.evaluate import evaluate
from jaxii.runs.train import train
from jaxii.runs.workdir import Workdir
from jaxii.train.trainer import Preempted

pytestmark = pytest.mark.usefixtures("without_drawings")

STAGE = {"name": "only", "terms": {"bce": [[0, 1], [1, 0.5]]}, "num_epochs": 4.0}
CAVEAT = (
    "The weights were trained with batches of 16 images, then 8 images after step 2; "
    "the configuration has only the last batch size."
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A configuration of five updates of 16 images, or ten of 8."""
    root = tmp_path_factory.mktemp("data")
    files = small_layout.write(root / "files", num_train=24)
    prepare(Layout.find(files), root / "data", num_workers=1)
    with oracle.every_network_is(oracle.network(((0,), (1,), (2,)))):
        config = oracle.make_config(root / "data")
        yield changed(config, global_batch_size=16, stages=[STAGE])


@pytest.fixture(scope="module")
def resumed(config, tmp_path_factory):
    """A finished run whose batch size changed after two updates."""
    workdir = Workdir(tmp_path_factory.mktemp("runs") / "run")
    with pytest.raises(Preempted):
        train(config, workdir, lambda step: step == 2)
    smaller = changed(config, global_batch_size=8)
    with pytest.raises(InputError, match=r"16 -> 8\).* or --change_batch_size \(in P"):
        train(smaller, workdir, lambda step: False)
    train(smaller, workdir, lambda step: False, change_batch_size=True)
    return workdir


def test_a_batch_size_that_changed_is_said_with_the_figures(resumed, tmp_path, capfd):
    report = resumed.result_file("report.html").read_text()
    assert f"<li>{CAVEAT}</li>" in report
    copy = Workdir(shutil.copytree(resumed.path, tmp_path / "copy"))
    evaluate(copy, data_dir="", stage="", tune_on="")
    assert f"CAVEAT     {CAVEAT}" in capfd.readouterr().out
    metrics = json.loads(copy.result_file("metrics.json").read_text())
    assert metrics["step"] == 8


def test_the_report_has_the_weights_of_the_terms_at_the_end(resumed):
    report = resumed.result_file("report.html").read_text()
    assert "<bdi>bce</bdi> 1 → 0.5</li>" in report


def test_a_finished_run_keeps_its_batch_size(config, resumed):
    before = resumed.config_file.read_bytes()
    with pytest.raises(InputError, match=r"8 -> 16\).*has finished, so its batch size"):
        train(config, resumed, lambda step: False, change_batch_size=True)
    assert resumed.config_file.read_bytes() == before
    # Repeating the command that changed the size completes an interrupted evaluation.
    same = changed(config, global_batch_size=8)
    train(same, resumed, lambda step: False, change_batch_size=True)


def test_a_checkpoint_from_before_the_change_says_its_batch_size(config, tmp_path):
    workdir = Workdir(tmp_path / "run")
    with pytest.raises(Preempted):
        train(config, workdir, lambda step: step == 2)
    smaller = changed(config, global_batch_size=8)
    workdir.claim(smaller, change_batch_size=True)
    evaluate(workdir, data_dir="", stage="", tune_on="")
    metrics = json.loads(workdir.result_file("metrics.json").read_text())
    assert metrics["provenance"]["batch_sizes"] == ["16 images"]
