"""Tests the command on a small dataset: all stages, killed and resumed, predicted.

Real processes run on one CPU device each. The network is tiny, with one block per
stage, and every stage is a few steps long; everything else is as for a user.
"""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxii import main
from jaxii.data import prepared
from jaxii.data.labels import Vocabulary
from jaxii.distributed.mesh import make_mesh, replicated
from jaxii.prepare.kaggle import Layout, prepare
from jaxii.prepare.toy_regions import writer
from jaxii.train.checkpoint import Checkpoints
from jaxii.train.telemetry.history import read_history

ROOT = Path(__file__).parent.parent
STAGES = ("multitask", "classifier")
SETTINGS = (
    "--config=configs/f2_multitask.py",
    "--config.model.width=8",
    "--config.data.image_size_pixels=32",
    "--config.global_batch_size=16",
    "--config.label_embedding.dim=8",
    "--config.evaluate_every_steps=4",
    "--config.evaluate_train_images=20",
    "--config.log_every_steps=2",
    "--config.optimizer.peak_lr=0.02",
    # With it, BatchNorm is re-estimated at each evaluation.
    "--config.optimizer.average=swa",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("end_to_end")


@pytest.fixture(scope="module")
def data(folder):
    """A drawn and prepared dataset: the folders of the layout and of the dataset."""
    files = writer.write(folder / "files", num_train=60, num_tuning=10, num_test=29)
    layout = Layout.find(
        files,
        test_labels=files / "truth" / "solution.csv",
        test_metadata=files / "truth" / "test_meta.csv",
    )
    # Smaller than drawn, so that `predict` has to reduce its images the same way.
    prepare(layout, folder / "prepared", short_side=64)
    return files, folder / "prepared"


def command(*words):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} "
        "--xla_force_host_platform_device_count=1",
    }
    return {
        "args": [sys.executable, "-m", "tests.small_main", *words],
        "cwd": ROOT,
        "env": environment,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }


def run(*words, code=0):
    result = subprocess.run(**command(*words))
    assert result.returncode == code, result.stdout
    return result.stdout


def run_here(*words):
    """Runs a command in this process, which is faster; returns its output."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main.main(["jaxii", *map(str, words)]) == 0
    return printed.getvalue()


def train_words(data, workdir):
    return ("train", *SETTINGS, f"--data_dir={data[1]}", f"--workdir={workdir}")


@pytest.fixture(scope="module")
def undisturbed(folder, data):
    """A whole run: its workdir and its output."""
    workdir = folder / "undisturbed"
    return workdir, run(*train_words(data, workdir))


def test_tensorboard_holds_images_of_every_stage_and_the_result(undisturbed):
    workdir, _ = undisturbed
    (file,) = (workdir / "tensorboard").iterdir()
    events = file.read_bytes()
    for name in (*(f"images/{stage}" for stage in STAGES), "result/test/f2"):
        assert name.encode() in events


def final_params(workdir):
    vocabulary = Vocabulary.load(workdir / "labels.csv")
    checkpoints = Checkpoints(workdir, STAGES, vocabulary.content_hash())
    last = checkpoints.saved()[STAGES[-1]][-1]
    model = checkpoints.restore_model(last, replicated(make_mesh()))
    checkpoints.close()
    return last, model


def assert_same_run(workdir, other):
    last, model = final_params(workdir)
    other_last, other_model = final_params(other)
    assert last == other_last
    names = {"params", "average_params", "batch_stats"}
    assert set(model) == set(other_model) == names
    flat, other_flat = (dict(leaves(m)) for m in (model, other_model))
    assert flat.keys() == other_flat.keys()
    for name, value in flat.items():
        np.testing.assert_array_equal(value, other_flat[name], err_msg=name)


def leaves(tree, path=""):
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{path}/{key}")
    else:
        yield path, np.asarray(tree)


def test_every_stage_is_on_disk_and_compiled_its_step_once(undisturbed):
    workdir, output = undisturbed
    assert {p.name for p in (workdir / "checkpoints").iterdir()} == set(STAGES)
    for stage in STAGES:
        assert re.search(rf"{stage}: steps .*compiled 1 time", output)


def test_the_embedding_head_is_gone_in_the_last_stage(undisturbed):
    _, model = final_params(undisturbed[0])
    assert set(model["params"]) == {"trunk", "classifier"}


def test_the_swap_of_the_loss_happened_inside_a_stage(undisturbed):
    rows = [
        json.loads(line)
        for line in (undisturbed[0] / "history.jsonl").read_text().splitlines()
    ]
    weights = [
        (row["weight/bce"], row["weight/focal"])
        for row in rows
        if row["kind"] == "train" and row["stage"] == "multitask"
    ]
    assert weights[0] == (1.0, 0.0)
    assert weights[-1] == (0.0, 1.0)


def test_it_says_where_everything_is(undisturbed):
    workdir, output = undisturbed
    for name in ("metrics.json", "report.html", "submission.csv", "checkpoints"):
        assert str(workdir / name) in output
        assert (workdir / name).exists()


def test_the_report_says_what_differs_from_the_recipe(undisturbed):
    workdir, _ = undisturbed
    (record, *_) = (workdir / "checkpoints" / STAGES[-1]).glob("*/metadata/metadata")
    recipe = json.loads(record.read_text())["recipe"]
    assert recipe["name"] == "configs/f2_multitask.py"
    assert recipe["own"]["model.width"] == 32
    assert recipe["own"]["data.directory"] == ""
    page = (workdir / "report.html").read_text()
    part = page[page.index("Differences from the recipe") :]
    assert "model.width</th><td><bdi>32</bdi></td><td><bdi>8</bdi>" in part


def test_metrics_name_the_floor_the_threshold_and_a_clean_provenance(undisturbed):
    metrics = json.loads((undisturbed[0] / "metrics.json").read_text())
    assert set(metrics["splits"]) == {"validation", "test"}
    assert metrics["splits"]["test"]["num_images"] == 29
    assert metrics["decoder"]["chosen_on"] == "validation"
    assert set(metrics["constant"]["f2"]) == {"validation", "test"}
    assert metrics["provenance"]["clean"] is True


def test_the_submission_has_a_row_for_every_test_image_and_no_empty_one(
    undisturbed, data
):
    with (undisturbed[0] / "submission.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["image_id", "labels"]
    with (data[0] / "stage_1_sample_submission.csv").open() as file:
        expected = {row[0] for row in list(csv.reader(file))[1:]}
    assert {row[0] for row in rows[1:]} == expected
    assert all(row[1] for row in rows[1:])


@pytest.mark.slow
def test_the_same_command_again_trains_nothing(data, undisturbed):
    workdir, _ = undisturbed
    before = (workdir / "history.jsonl").read_text().count('"train"')
    run(*train_words(data, workdir))
    assert (workdir / "history.jsonl").read_text().count('"train"') == before


def stop_when(words, wanted, number):
    """Starts the command and signals it at the first line that contains `wanted`."""
    with subprocess.Popen(**command(*words)) as process:
        for line in process.stdout:
            if wanted in line:
                process.send_signal(number)
                break
        process.stdout.read()
    return process.returncode


def kill_in_a_save(words, checkpoints):
    """Starts the command and kills it as soon as a new save has begun."""
    before = set(checkpoints.glob("*/*tmp*"))
    with subprocess.Popen(**command(*words)) as process:
        while not set(checkpoints.glob("*/*tmp*")) - before and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        process.stdout.read()
    return process.returncode


@pytest.fixture(scope="module")
def disturbed(folder, data):
    """The same run, stopped four times: its workdir, exit codes and last output."""
    workdir = folder / "disturbed"
    words = train_words(data, workdir)
    codes = [
        stop_when(words, "step  6/", signal.SIGKILL),
        kill_in_a_save(words, workdir / "checkpoints"),
        stop_when(words, "step 14/", signal.SIGTERM),
        stop_when(words, "stage classifier: starting", signal.SIGKILL),
    ]
    return workdir, codes, run(*words)


@pytest.mark.slow
def test_killed_anywhere_even_in_a_save_it_ends_bit_for_bit_the_same(
    disturbed, undisturbed
):
    workdir, codes, output = disturbed
    assert [codes[i] for i in (0, 1, 3)] == [-signal.SIGKILL] * 3
    assert "resuming at step" in output or "starting from step" in output
    assert_same_run(workdir, undisturbed[0])


@pytest.mark.slow
def test_asked_to_leave_it_saves_and_exits_75(disturbed):
    assert disturbed[1][2] == 75


def test_training_images_are_measured_beside_validation_at_each_evaluation(undisturbed):
    workdir, output = undisturbed
    rows = read_history(workdir / "history.jsonl")
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    assert evaluations
    for row in evaluations:
        for figure in ("f2", "map", "bce"):
            assert {f"validation/{figure}", f"train/{figure}"} <= row.keys()
    assert re.search(r"validation/f2 \S+  train/f2 \S+", output)
    assert "training, no augmentation" in (workdir / "report.html").read_text()


def test_evaluation_needs_only_the_workdir_and_gives_the_same_figures(
    undisturbed,
):
    workdir, _ = undisturbed
    before = json.loads((workdir / "metrics.json").read_text())
    run("evaluate", f"--workdir={workdir}")
    after = json.loads((workdir / "metrics.json").read_text())
    assert after["splits"] == before["splits"]


@pytest.mark.slow
def test_a_threshold_from_tuning_labels_is_recorded_and_told(undisturbed):
    workdir, _ = undisturbed
    output = run(
        "evaluate",
        f"--workdir={workdir}",
        "--tune_on=tuning",
        "--allow_tuning_labels",
    )
    assert "CAVEAT" in output
    metrics = json.loads((workdir / "metrics_tuned_on_tuning.json").read_text())
    assert metrics["provenance"]["clean"] is False
    assert json.loads((workdir / "metrics.json").read_text())["provenance"]["clean"]


@pytest.mark.parametrize(
    "decoder", ["expected_f2", pytest.param("threshold", marks=pytest.mark.slow)]
)
def test_predicting_the_files_of_the_test_gives_the_rows_of_its_evaluation(
    folder, data, undisturbed, decoder
):
    workdir, _ = undisturbed
    if decoder != "expected_f2":
        workdir = shutil.copytree(workdir, folder / decoder)
        run("evaluate", f"--workdir={workdir}", f"--decoder={decoder}")
    with (workdir / "submission.csv").open() as file:
        expected = list(csv.reader(file))
    paths = folder / f"{decoder}.csv"
    with paths.open("w") as file:
        images = data[0] / "stage_1_test_images"
        rows = [[images / f"{image_id}.jpg"] for image_id, _ in expected[1:]]
        csv.writer(file).writerows([["path"], *rows])
    output = folder / f"{decoder}_answers.csv"
    words = f"--workdir={workdir}", f"--images={paths}", f"--output={output}"
    assert f"decoder {decoder}" in run("predict", *words)
    metrics = json.loads((workdir / "metrics.json").read_text())
    assert metrics["short_side_pixels"] == 64
    with output.open() as file:
        assert list(csv.reader(file)) == expected
    assert len({labels for _, labels in expected[1:]}) > 1


def test_compare_puts_runs_in_one_table(folder, undisturbed):
    workdir, _ = undisturbed
    page = folder / "comparison.html"
    output = run_here("compare", workdir, workdir, f"--output={page}")
    assert "clean" in output
    assert "F2 train" in output
    assert "Mean F2 by run" in page.read_text()
    table = run_here("compare", workdir, "--markdown")
    assert table.startswith("| run | ")


def test_the_validation_split_is_carved_by_group(data):
    opened = prepared.open_prepared(
        data[1],
        validation_fraction=0.1,
        machine_labels="ignored",
        machine_threshold=0.5,
    )
    groups = [set(opened.split(s).index.groups) for s in ("train", "validation")]
    assert not groups[0] & groups[1]
