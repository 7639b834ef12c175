"""Several real processes as one run: stopped, killed, gone on with, and the same.

Two processes of two CPU devices each over loopback, against one process of four. The
network is tiny; everything else is what a user runs.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxii.data import toy_regions
from jaxii.data.open_images import Layout, prepare
from jaxii.train.checkpoint import Checkpoints
from jaxii.train.mesh import make_mesh, replicated
from jaxii.workdir import Workdir

ROOT = Path(__file__).parent.parent
RECIPE = """
from jaxii.config import default_config

def get_config(name=""):
    config = default_config()
    config.model.depth = 18
    config.model.width = 8
    config.model.compute_dtype = "float32"
    config.data.image_size_pixels = 32
    config.data.num_threads = 2
    config.global_batch_size = 32
    config.label_embedding.dim = 8
    config.optimizer.peak_lr = 0.02
    config.evaluate_every_steps = 6
    config.log_every_steps = 1
    config.stages = (
        {
            "name": "only",
            "num_steps": 18,
            "embedding_head": True,
            "terms": {"bce": 1.0, "embedding": 1.0},
        },
    )
    return config
"""
PREEMPTED = 75
MOST_SECONDS = 240.0


class Run:
    """A workdir that can be trained by any number of processes."""

    def __init__(self, folder, name):
        self.folder, self.workdir = folder, folder / name
        self.processes = []

    def start(self, count):
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // count}",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        }
        words = [
            *(sys.executable, "-m", "jaxii.main", "train"),
            f"--config={self.folder / 'recipe.py'}",
            f"--data_dir={self.folder / 'prepared'}",
            f"--workdir={self.workdir}",
        ]
        self.processes = []
        for index in range(count):
            place = [
                f"--coordinator=127.0.0.1:{port}",
                f"--num_processes={count}",
                f"--process_id={index}",
            ]
            log = (self.folder / f"{self.workdir.name}_{index}.log").open("w")
            with log:
                self.processes.append(
                    subprocess.Popen(
                        words + place * (count > 1),
                        cwd=ROOT,
                        env=environment,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )

    def wait(self):
        return [process.wait(timeout=MOST_SECONDS) for process in self.processes]

    def log(self, index=0):
        return (self.folder / f"{self.workdir.name}_{index}.log").read_text()

    def wait_for(self, text):
        deadline = time.monotonic() + MOST_SECONDS
        while text not in self.log():
            assert time.monotonic() < deadline, self.log()
            assert self.processes[0].poll() is None, self.log()
            time.sleep(0.05)

    def last(self):
        opened = Workdir(self.workdir)
        checkpoints = Checkpoints(
            opened.path, ["only"], opened.vocabulary().content_hash()
        )
        saved = checkpoints.saved()["only"][-1]
        model = checkpoints.restore_model(saved, replicated(make_mesh()))
        checkpoints.close()
        return saved, model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    (folder / "recipe.py").write_text(RECIPE)
    files = toy_regions.write(
        folder / "files", num_train=120, num_tuning=10, num_test=29
    )
    truth = files / "truth"
    layout = Layout.find(
        files,
        test_labels=truth / "solution.csv",
        test_metadata=truth / "test_meta.csv",
    )
    prepare(layout, folder / "prepared")
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    run = Run(folder, "alone")
    run.start(1)
    assert run.wait() == [0], run.log()
    return run


@pytest.fixture(scope="module")
def together(folder, alone):
    """Two processes: one asked to leave, then one killed, then to the end."""
    run = Run(folder, "together")
    run.start(2)
    run.wait_for("step  2/18")
    run.processes[1].send_signal(signal.SIGTERM)
    assert run.wait() == [PREEMPTED, PREEMPTED], run.log()
    left_at, _ = run.last()
    run.start(2)
    run.wait_for(f"step {left_at.step + 2:>2}/18")
    start = time.monotonic()
    run.processes[1].kill()
    codes = run.wait()
    assert codes[0] not in (0, 2, PREEMPTED)
    lost_after = time.monotonic() - start
    run.start(2)
    assert run.wait() == [0, 0], run.log()
    return run, left_at, lost_after


def test_all_leave_at_the_same_step_when_one_is_asked_to(together):
    _, left_at, _ = together
    assert 2 < left_at.step < 18
    assert not left_at.finished


def test_one_that_is_killed_ends_the_others_in_a_minute(together):
    assert together[2] < 60


def test_two_processes_end_as_one_does(alone, together):
    saved, model = alone.last()
    other, same = together[0].last()
    assert (other.step, other.example) == (saved.step, saved.example)
    np.testing.assert_allclose(
        [metric for _, metric in other.evaluations],
        [metric for _, metric in saved.evaluations],
        atol=1e-6,
    )
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(same), strict=True):
        largest = np.max(np.abs(a)) + 1e-6
        np.testing.assert_allclose(a / largest, b / largest, atol=1e-5)


def test_two_processes_answer_as_one_does(alone, together):
    answers = [run.workdir / "submission.csv" for run in (alone, together[0])]
    assert answers[0].read_text() == answers[1].read_text()


def test_only_the_lead_tells_a_person(together):
    run, _, _ = together
    assert "submission.csv" in run.log(0)
    assert "submission.csv" not in run.log(1)
    assert not list(run.workdir.rglob("*.part"))
