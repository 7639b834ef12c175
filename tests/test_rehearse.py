"""Tests `launch/rehearse.sh` with a `python` that ends as the test asks."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def rehearse(tmp_path):
    """Starts a rehearsal in its own process group, as a terminal does."""
    started = []

    def start(*words, **environment):
        environment = {"LOGS": str(tmp_path), **environment}
        process = subprocess.Popen(
            ["bash", "launch/rehearse.sh", *words],
            cwd=ROOT,
            env=os.environ
            | {"PYTHON": str(ROOT / "tests" / "fake_process.sh"), "XLA_FLAGS": ""}
            | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_every_process_gets_the_command_its_number_and_one_free_port(
    rehearse, tmp_path
):
    process = rehearse("3", "evaluate", "--workdir=a b", OUTCOMES="0 0 0", DEVICES="2")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    said = [next(line for line in output.splitlines() if line.startswith("given"))]
    said += [(tmp_path / f"{i}.log").read_text() for i in (1, 2)]
    ports = set()
    for i, line in enumerate(said):
        platform, devices, *words = line.split()[1:]
        assert platform == "cpu"
        assert devices == "--xla_force_host_platform_device_count=2"
        assert words[:5] == ["-m", "jaxii.main", "evaluate", "--workdir=a", "b"]
        assert words[6:] == ["--num_processes=3", f"--process_id={i}"]
        ports.add(words[5])
    (port,) = ports
    assert port.startswith("--coordinator=127.0.0.1:")


@pytest.fixture
def tokens(rehearse, tmp_path):
    """Rehearses two processes that print their tokens; returns both."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "token $JAXII_RUN_TOKEN"\n')
    python.chmod(0o755)

    def tell(**environment):
        process = rehearse("2", PYTHON=str(python), **environment)
        output, _ = process.communicate(timeout=60)
        told = re.search("^token (.*)$", output, re.MULTILINE)[1]
        assert output.count(told) == 1
        return told, (tmp_path / "1.log").read_text().strip().removeprefix("token ")

    return tell


def test_the_processes_of_a_run_know_one_token_that_is_random_and_not_printed(tokens):
    (first, same), (second, _) = tokens(), tokens()
    assert first == same != second
    assert re.fullmatch("[0-9a-f]{32}", first)


def test_a_token_that_is_given_is_the_runs(tokens):
    assert tokens(JAXII_RUN_TOKEN="my own") == ("my own", "my own")


def test_without_flags_it_runs_the_default_recipe(rehearse):
    output, _ = rehearse("1", OUTCOMES="0").communicate(timeout=60)
    assert " -m jaxii.main --config=configs/f2_multitask.py --coordinator" in output


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [("0 0", 0), ("75 75", 75), ("2 2", 2), ("0 1", 1), ("75 137", 137), ("0 75", 1)],
)
def test_it_ends_as_its_processes_did(rehearse, outcomes, code):
    process = rehearse("2", OUTCOMES=outcomes)
    process.communicate(timeout=60)
    assert process.returncode == code


def wait_for(file, text):
    end = time.monotonic() + 30
    while text not in (file.read_text() if file.exists() else ""):
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_process_once_and_all_end_with_75(
    rehearse, tmp_path, number
):
    process = rehearse("3", OUTCOMES="waiting waiting waiting")
    wait_for(tmp_path / "1.log", "waits")
    wait_for(tmp_path / "2.log", "waits")
    # To the whole group, as Ctrl-C does; the processes must not get it twice.
    os.killpg(process.pid, number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    logs = [output, *((tmp_path / f"{i}.log").read_text() for i in (1, 2))]
    assert [log.count("\nsignal") for log in logs] == [1, 1, 1]


def test_when_one_fails_the_rest_is_killed_after_its_grace(rehearse, tmp_path):
    process = rehearse("3", OUTCOMES="stubborn 1 stubborn", GRACE_SECONDS="1")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "process 1 exited with code 1" in errors
    assert "process 2 exited with code 137" in errors


def test_a_dry_run_prints_exactly_its_golden_text(rehearse):
    process = rehearse(
        *("4", "--config=configs/x.py", "--workdir=a b", "--dry-run"),
        **{"PORT": "23456", "DEVICES": "2", "LOGS": "runs/rehearsal"},
        PYTHON="python",
    )
    text, _ = process.communicate(timeout=60)
    golden = ROOT / "tests" / "golden" / "launch_rehearse.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()
