"""Tests several real processes as one run: stopped, killed, continued, same results.

Two processes of one CPU device each run over loopback and are compared with one process
of two devices: a sum of two numbers does not depend on their order, so both round
alike. With more devices, a ReLU whose input is within rounding of 0 may pass a gradient
in only one of the runs. The network is tiny; everything else is as for a user.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from many_processes import PREEMPTED, ROOT, Run, prepare_folder

import jaxii
from jaxii.distributed import processes
from jaxii.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    prepare_folder(folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    run = Run(folder, "alone", num_devices=2)
    run.start(1)
    assert run.wait() == [0], run.log()
    return run


@pytest.fixture(scope="module")
def together(folder, alone):
    """Two processes: one is asked to leave, then one is killed, then both finish."""
    run = Run(folder, "together", num_devices=2)
    run.start(2)
    run.wait_for("step  2/18")
    run.preempt(1)
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


@pytest.mark.slow
def test_all_leave_at_the_same_step_when_one_is_asked_to(together):
    _, left_at, _ = together
    assert 2 < left_at.step < 18
    assert not left_at.finished


@pytest.mark.slow
def test_one_that_is_killed_ends_the_others_in_a_minute(together):
    assert together[2] < 60


@pytest.mark.slow
def test_nobody_else_can_connect_to_a_run_on_this_machine(folder):
    run = Run(folder, "private")
    run.start(2)
    try:
        run.wait_for("step  1/18")
        socket.create_connection(("127.0.0.1", run.port)).close()
        # Another address of this machine stands in for another machine.
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", run.port))
    finally:
        run.stop()


@pytest.mark.slow
def test_two_processes_end_as_one_does(alone, together):
    saved, model = alone.last()
    other, same = together[0].last()
    leaves = (jax.tree.leaves(arrays["model"]) for arrays in (model, same))
    assert (other.step, other.example) == (saved.step, saved.example)
    np.testing.assert_allclose(
        [metric for _, metric in other.evaluations],
        [metric for _, metric in saved.evaluations],
        atol=1e-6,
    )
    for a, b in zip(*leaves, strict=True):
        largest = np.max(np.abs(a)) + 1e-6
        np.testing.assert_allclose(a / largest, b / largest, atol=1e-5)


@pytest.mark.slow
def test_two_processes_answer_as_one_does(alone, together):
    answers = [run.workdir / "submission.csv" for run in (alone, together[0])]
    assert answers[0].read_text() == answers[1].read_text()


@pytest.mark.slow
def test_only_the_lead_tells_a_person(together):
    run, _, _ = together
    assert "submission.csv" in run.log(0)
    assert "submission.csv" not in run.log(1)
    assert not list(run.workdir.rglob("*.part"))


@pytest.mark.slow
def test_all_leave_the_final_evaluation_when_one_is_asked_to(folder, together):
    run = Run(folder, "evaluated", num_devices=2)
    shutil.copytree(together[0].workdir, run.workdir)
    run.start(2)
    # Nothing is left to train.
    run.wait_for("1 stages, 18 steps")
    run.preempt(1)
    assert run.wait() == [PREEMPTED, PREEMPTED], run.logs()
    assert "the evaluation was stopped; run the same command again" in run.log()


# Joins a run of two processes, raises a signal if given, works for a while, leaves.
MEMBER = """
import signal, sys, time
from jaxii.distributed import processes
from jaxii.distributed.cluster import ProcessInfo

port, index, code, seconds, number, saves = map(int, sys.argv[1:])
processes.SHUTDOWN_SECONDS, processes.MISUSED_SECONDS = 5, 1
place = ProcessInfo(coordinator=f"127.0.0.1:{port}", count=2, index=index)
processes.join(place, ["jaxii"], 120, saves_on_sigterm=bool(saves))
if number:
    signal.raise_signal(number)
time.sleep(seconds)
processes.leave(code)
sys.exit(code)
"""


@pytest.fixture
def members():
    """Starts two `MEMBER`s: `members((code, seconds, number), ..., saves=)`."""
    started = []

    def members(*each, saves=0):
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
        for index, numbers in enumerate(each):
            words = map(str, (port, index, *numbers, saves))
            command = [sys.executable, "-c", MEMBER, *words]
            started.append(subprocess.Popen(command, cwd=ROOT))
        return started

    yield members
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("code", [0, PREEMPTED])
def test_a_process_that_is_done_waits_for_one_that_still_writes(members, code):
    writing = members((code, 12, 0), (code, 0, 0))
    assert [process.wait(120) for process in writing] == [code, code]


@pytest.mark.slow
def test_invalid_input_on_one_process_alone_ends_it_with_2(
    members, tmp_path, monkeypatch
):
    monkeypatch.setenv(processes.MISUSED_FILE, str(tmp_path / "misused"))
    _, misused = members((0, 600, 0), (2, 0, 0))
    assert misused.wait(120) == 2
    assert (tmp_path / "misused").exists()


@pytest.mark.slow
def test_invalid_input_on_all_processes_ends_all_with_2(members):
    assert [process.wait(120) for process in members((2, 0, 0), (2, 0, 0))] == [2, 2]


@pytest.mark.slow
def test_sigterm_ends_a_process_that_has_nothing_to_save(members):
    _, ended = members((0, 600, 0), (0, 600, signal.SIGTERM))
    assert ended.wait(120) == -signal.SIGTERM


@pytest.mark.slow
def test_sigterm_is_left_to_a_program_that_saves(members):
    notified = members((0, 0, 0), (0, 0, signal.SIGTERM), saves=1)
    assert [process.wait(120) for process in notified] == [0, 0]


def test_every_module_counts_for_whether_processes_run_the_same_code(monkeypatch):
    read, read_bytes = set(), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda p: read.add(p) or read_bytes(p))
    processes._program([])
    assert read == set(Path(jaxii.__file__).parent.rglob("*.py"))


def test_a_process_with_another_file_is_named_to_all(monkeypatch):
    digests = ["ab" * 32, "ab" * 32, "cd" * 32]
    gathered = np.stack([np.frombuffer(bytes.fromhex(d), np.uint8) for d in digests])
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda _: gathered)
    for digest in digests:
        with pytest.raises(InputError, match="a is another file on process 2 than on"):
            processes.check_same(digest, "a is another file")
    gathered = gathered[:2]
    processes.check_same(digests[0], "a is another file")


@pytest.mark.parametrize(
    "own",
    [
        ["--process_id={}"],
        ["-process_id={}"],
        ["--process_id", "{}"],
        ["-process_id", "{}"],
    ],
)
def test_the_number_of_a_process_is_no_part_of_its_program(own):
    first, second = (
        processes._program(["jaxii", "train", *(w.format(i) for w in own), "--x=1"])
        for i in range(2)
    )
    assert first == second
    assert first == processes._program(["jaxii", "train", "--x=1"])


def test_other_words_and_other_borders_of_words_are_another_program():
    digests = {
        processes._program(["jaxii", *words])
        for words in (["train", "x"], ["trainx"], ["train", "y"], ["process_id", "x"])
    }
    assert len(digests) == 4


class Agreement:
    """One process's share of JAX's agreement on a step to stop at."""

    def __init__(self):
        self.passed, self.stop_at = 0, None

    def notice(self):
        if self.stop_at is None:
            self.stop_at = self.passed + 1

    def reached(self, step):
        self.passed = step
        return step == self.stop_at


@pytest.mark.parametrize("steps_before", [0, 1, 5])
def test_a_notice_at_any_time_stops_a_resumed_run_and_what_follows(
    monkeypatch, steps_before
):
    agreement = Agreement()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(
        multihost_utils, "reached_preemption_sync_point", agreement.reached
    )
    should_stop = processes.preemption_notice()
    steps = iter(range(5001, 6000))
    assert not any(should_stop(next(steps)) for _ in range(steps_before))
    agreement.notice()
    assert should_stop(next(steps))
    # The next part of `hold_out`.
    assert should_stop(1)


def test_leaving_a_run_that_was_not_joined_starts_no_device(monkeypatch):
    def start():
        raise AssertionError("asking for processes starts the devices")

    monkeypatch.setattr(jax, "process_count", start)
    monkeypatch.setattr(os, "_exit", lambda code: start())
    for code in (0, 1, 2, 75):
        processes.leave(code)


@pytest.mark.parametrize("code", [0, 1, 2, PREEMPTED])
def test_only_invalid_input_leaves_the_file_for_launch_scripts(
    monkeypatch, tmp_path, code
):
    file = tmp_path / "misused"
    monkeypatch.setenv(processes.MISUSED_FILE, str(file))
    processes.leave(code)
    assert file.exists() == (code == 2)
