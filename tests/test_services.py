"""Tests the installed ones of Weights & Biases and MLflow, without a network."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxii.errors import InputError
from jaxii.train.telemetry.images import Images
from jaxii.train.telemetry.services import Mlflow, Wandb
from jaxii.train.telemetry.trackers import Facts

FACTS = Facts(
    name="run", settings={"optimizer.peak_lr": 0.05}, about={"provenance f2": "clean"}
)
NAMES = ("<script>alert('x')</script>", "שלום 👩🏽‍💻")
IMAGES = Images(np.full((4, 4, 3), 200, np.uint8), NAMES)
pytestmark = [
    # Warnings of these packages and of their imports.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def run_id(workdir, service):
    return json.loads((workdir / "tracked_run.json").read_text())[service]


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    package = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "trees")
    # MLflow writes images below the current folder.
    monkeypatch.chdir(tmp_path)
    return package


def test_an_mlflow_run_is_resumed_and_ends_with_its_result(tmp_path, mlflow):
    said = []
    first = Mlflow(tmp_path, FACTS, said.append)
    first.scalars(10, {"train/objective": 3.0})
    first.images(0, "images/f2", IMAGES)
    first.close()
    client = mlflow.MlflowClient()
    name = run_id(tmp_path, "mlflow")
    assert client.get_run(name).info.status == "KILLED"
    second = Mlflow(tmp_path, FACTS, said.append)
    assert client.get_run(name).info.status == "RUNNING"
    second.scalars(20, {"train/objective": 2.0})
    second.result(20, {"result/test/f2": 0.5})
    second.close()
    run = client.get_run(name)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"optimizer.peak_lr": "0.05"}
    assert run.data.tags["about.provenance f2"] == "clean"
    assert run.data.metrics["result/test/f2"] == 0.5
    history = client.get_metric_history(name, "train/objective")
    assert [(each.step, each.value) for each in history] == [(10, 3.0), (20, 2.0)]
    assert client.get_experiment_by_name("trees").experiment_id == (
        run.info.experiment_id
    )
    files = {file.path for file in client.list_artifacts(name, "images")}
    assert files == {"images/images_f2_0.png", "images/images_f2_0.txt"}
    text = client.download_artifacts(name, "images/images_f2_0.txt", str(tmp_path))
    captions = Path(text).read_text(encoding="utf-8")
    assert captions == f"1: {NAMES[0]}\n2: {NAMES[1]}"
    assert name in said[0]


def test_an_mlflow_run_of_another_server_is_begun_anew(tmp_path, mlflow, monkeypatch):
    Mlflow(tmp_path, FACTS, print).close()
    before = run_id(tmp_path, "mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    Mlflow(tmp_path, FACTS, print).close()
    assert run_id(tmp_path, "mlflow") != before


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    package = pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    package.teardown()
    yield package
    package.teardown()


def test_a_wandb_run_is_kept_offline_and_goes_on_under_its_id(tmp_path, wandb):
    said = []
    Wandb.check()
    for _ in range(2):
        tracker = Wandb(tmp_path, FACTS, said.append)
        tracker.scalars(10, {"train/objective": 3.0})
        tracker.images(0, "images/f2", IMAGES)
        tracker.result(10, {"result/test/f2": 0.5})
        tracker.close()
    name = run_id(tmp_path, "wandb")
    files = list((tmp_path / "wandb").glob(f"offline-run-*/run-{name}.wandb"))
    assert files
    stored = b"".join(file.read_bytes() for file in files)
    for text in (b"train/objective", b"result/test/f2", b"optimizer.peak_lr"):
        assert text in stored
    assert all("offline; upload it with `wandb sync" in line for line in said)


def test_wandb_without_a_key_is_refused_before_the_run(wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    wandb.teardown()
    with pytest.raises(InputError, match="wandb login"):
        Wandb.check()
