"""Tests `launch/tpu_pod.sh` with a `gcloud` that records its calls and can fail."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLAGS = (
    "--config=configs/x.py:a",
    "--workdir=gs://b/run one",
    "--data_dir=gs://b/data",
)
OTHER_FLAGS = ("--config=configs/x.py:b", "--workdir=gs://b/other")
SERVICES = {"WANDB_API_KEY": "it's a secret", "MLFLOW_TRACKING_URI": "http://host"}


class Pod:
    """A pushed checkout, a fake gcloud, and its recorded calls."""

    def __init__(self, folder, checkout):
        self.checkout, self.fake = checkout, folder / "fake"
        self.fake.mkdir(exist_ok=True)
        programs = folder / "programs"
        programs.mkdir()
        self.gcloud = programs / "gcloud"
        self.gcloud.symlink_to(ROOT / "tests" / "fake_gcloud.sh")
        self.environment = {
            "PATH": f"{programs}:/usr/bin:/bin",
            "HOME": str(folder),
            "FAKE": str(self.fake),
            "ZONE": "us-west4-a",
            "POLL_SECONDS": "0.05",
            # If another gcloud is called by mistake, it has no account.
            "CLOUDSDK_CONFIG": str(folder / "no_account"),
        }
        found = shutil.which("gcloud", path=self.environment["PATH"])
        assert found == str(self.gcloud)
        self.revision = git(checkout, "rev-parse", "HEAD")

    def start(self, *words, **environment):
        return subprocess.Popen(
            ["bash", "launch/tpu_pod.sh", *words],
            cwd=self.checkout,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *words, **environment):
        process = self.start(*words, **environment)
        stdout, stderr = process.communicate(timeout=60)
        return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)

    def outcomes(self, *lines):
        (self.fake / "outcomes").write_text("\n".join(lines) + "\n")

    def calls(self, verb):
        return [words for words in self.lines("calls") if words.split()[3:4] == [verb]]

    def runs(self, worker=0):
        return self.lines(f"runs.worker{worker}")

    def lines(self, name):
        file = self.fake / name
        return file.read_text().splitlines() if file.exists() else []


def git(folder, *words):
    who = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    return subprocess.run(
        ["git", "-C", folder, *who, *words], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pushed")
    checkout = folder / "checkout"
    shutil.copytree(ROOT / "launch", checkout / "launch")
    git(checkout, "init", "--quiet")
    git(checkout, "add", "--all")
    git(checkout, "commit", "--quiet", "--message=scripts")
    git(checkout, "init", "--quiet", "--bare", folder / "origin")
    git(checkout, "remote", "add", "origin", folder / "origin")
    git(checkout, "push", "--quiet", "origin", "HEAD:main")
    return checkout


@pytest.fixture(scope="module")
def set_up(tmp_path_factory, pushed):
    """A pod after create and setup: made once, copied for each test."""
    pod = Pod(tmp_path_factory.mktemp("set_up"), pushed)
    for verb in ("create", "setup"):
        result = pod(verb, "pod")
        assert result.returncode == 0, result.stderr
    return pod.fake


@pytest.fixture
def pod(tmp_path, pushed):
    return Pod(tmp_path, pushed)


@pytest.fixture
def ready(tmp_path, pushed, set_up):
    shutil.copytree(set_up, tmp_path / "fake", symlinks=True)
    return Pod(tmp_path, pushed)


@pytest.fixture
def running(ready):
    """A pod with a run in progress that is not watched."""
    ready.outcomes("running running", "0 0")
    try:
        leave(ready, "run")
        yield ready
    finally:
        for worker in ("worker0", "worker1"):
            pid = (ready.fake / worker / "jaxii.pid").read_text().strip()
            subprocess.run(["pkill", "--parent", pid])


def leave(pod, verb):
    """Starts to watch the run, and presses Ctrl-C after a while."""
    watching = pod.start(verb, "pod", *FLAGS)
    wait_for_queries(pod)
    watching.send_signal(signal.SIGINT)
    assert watching.wait(timeout=20) == 130
    assert "pod and run continue: status" in watching.communicate()[1]


def wait_for_queries(pod):
    asked = len(pod.calls("list"))
    while len(pod.calls("list")) < asked + 4:
        time.sleep(0.1)


def test_create_asks_once_and_waits_until_the_pod_is_there(pod):
    result = pod("create", "pod", PROJECT="p", ACCELERATOR="v5litepod-256")
    assert result.returncode == 0, result.stderr
    (call,) = pod.calls("create")
    assert {"--node-id=pod", "--project=p", "--accelerator-type=v5litepod-256"} < {
        *call.split()
    }
    assert result.stdout.splitlines()[-2:] == ["pod: waiting", "pod: ready"]


def test_create_of_a_pod_that_is_there_asks_for_no_other(ready):
    assert ready("create", "pod").returncode == 0
    assert len(ready.calls("create")) == 1


def test_a_request_that_fails_stops_with_an_error(pod):
    (pod.fake / "refuse").touch()
    result = pod("create", "pod")
    assert result.returncode == 1
    assert "request for pod failed" in result.stderr


def test_setup_installs_the_same_commit_on_every_worker(ready):
    for worker in ("worker0", "worker1"):
        home = ready.fake / worker / f"jaxii-{ready.revision[:12]}"
        assert git(home, "rev-parse", "HEAD") == ready.revision
        assert (
            "--constraint .ci/lock.txt .[tpu,gcs]" in (home / "installed").read_text()
        )


def test_a_worker_that_fails_setup_stops_with_its_message_and_1(pod):
    assert pod("create", "pod").returncode == 0
    (pod.fake / "broken.worker1").touch()
    result = pod("setup", "pod")
    assert result.returncode == 1
    assert "No space left on device" in result.stderr
    assert "setup failed on a worker of pod" in result.stderr


def test_a_worker_that_fails_setup_in_a_resume_stops_before_any_run(pod):
    (pod.fake / "broken.worker1").touch()
    result = pod("resume", "pod", *FLAGS)
    assert result.returncode == 1
    assert "setup failed on a worker of pod" in result.stderr
    assert not pod.runs() and not pod.runs(1)


def test_run_starts_the_command_once_on_every_worker(ready):
    ready.outcomes("0 0")
    result = ready("run", "pod", *FLAGS)
    assert result.returncode == 0, result.stderr
    flags = " ".join((*FLAGS, "--start_timeout_seconds=300"))
    command = f"tpu,cpu -m jaxii.main {flags}"
    assert ready.runs(0) == ready.runs(1) == [command]


def test_the_workers_get_one_token_that_is_random_and_not_printed(ready):
    ready.outcomes("0 0")
    result = ready("run", "pod", *FLAGS)
    (token,) = ready.lines("tokens.worker0")
    assert ready.lines("tokens.worker1") == [token]
    assert len(token) == 32
    assert token not in result.stdout + result.stderr


def test_a_token_that_is_given_is_the_runs(ready):
    ready.outcomes("0 0")
    assert ready("run", "pod", *FLAGS, JAXII_RUN_TOKEN="it's mine").returncode == 0
    assert ready.lines("tokens.worker1") == ["it's mine"]


def test_run_without_setup_starts_nothing(pod):
    assert pod("create", "pod").returncode == 0
    result = pod("run", "pod", *FLAGS)
    assert result.returncode == 1
    assert f"commit {pod.revision[:12]} is not set up here" in result.stderr
    assert not pod.runs()


def test_run_without_a_pod_says_to_create_it(pod):
    result = pod("run", "pod", *FLAGS)
    assert result.returncode == 1
    assert "pod pod does not exist; create it" in result.stderr
    assert not pod.calls("create")


def test_after_a_preemption_a_new_pod_runs_the_same_command(ready):
    ready.outcomes("preempted 1", "0 0")
    result = ready("run", "pod", *FLAGS)
    assert result.returncode == 0, result.stderr
    assert len(ready.calls("delete")) == 1
    first, second = ready.calls("create")
    assert first == second
    assert len(ready.runs()) == 2 and len({*ready.runs()}) == 1


def test_a_run_that_was_asked_to_stop_goes_on_where_it_is(ready):
    ready.outcomes("75 75", "75 75", "0 0")
    assert ready("run", "pod", *FLAGS).returncode == 0
    assert len(ready.runs()) == 3
    assert len(ready.calls("create")) == 1


def test_preemptions_without_end_end_with_75(ready):
    ready.outcomes(*["preempted 1"] * 9)
    result = ready("run", "pod", *FLAGS, PREEMPTIONS="2")
    assert result.returncode == 75
    assert len(ready.runs()) == 3
    assert "too often; use resume to continue" in result.stderr


def test_misuse_stops_and_is_not_tried_again(ready):
    ready.outcomes("2 1", "0 0")
    result = ready("run", "pod", *FLAGS)
    assert result.returncode == 2
    assert len(ready.runs()) == 1
    assert "exited with code 2 (invalid input)" in result.stderr


def test_a_process_that_is_lost_is_started_again_a_bounded_number_of_times(ready):
    ready.outcomes(*["137 1"] * 9)
    result = ready("run", "pod", *FLAGS, RETRIES="2")
    assert result.returncode == 1
    assert len(ready.runs()) == len(ready.runs(1)) == 3
    assert "a process was lost (1 137)" in result.stderr


def test_resume_brings_back_a_pod_that_was_preempted_while_nobody_watched(ready):
    (ready.fake / "request").write_text("SUSPENDED")
    (ready.fake / "node").write_text("PREEMPTED")
    ready.outcomes("0 0")
    assert ready("resume", "pod", *FLAGS).returncode == 0
    assert len(ready.calls("create")) == 2
    assert len(ready.runs()) == 1


def test_ctrl_c_stops_watching_and_resume_starts_nothing_that_runs(running):
    leave(running, "resume")
    assert len(running.runs()) == len(running.runs(1)) == 1
    assert running("status", "pod").stdout.count("jaxii-process running") == 2
    # Other users of a worker can read command lines during the run.
    (token,) = running.lines("tokens.worker0")
    assert not [words for words in command_lines() if token in words]
    assert any("jaxii.main" in words for words in command_lines())


def test_another_run_is_refused_while_one_is_in_progress_and_starts_after_stop(running):
    result = running("run", "pod", *OTHER_FLAGS)
    assert result.returncode == 1
    home = f"jaxii-{running.revision[:12]}"
    assert f"another run is in progress: {home} {FLAGS[0]} " in result.stderr
    assert "use launch/tpu_pod.sh stop pod to end it" in result.stderr
    stopped = running("stop", "pod")
    assert stopped.returncode == 0, stopped.stderr
    assert "pod: the run has ended (143 stopped)" in stopped.stdout
    assert running("run", "pod", *OTHER_FLAGS).returncode == 0
    assert [OTHER_FLAGS[1] in run for run in running.runs()] == [False, True]


def test_another_revision_or_installation_is_another_run(running):
    file = running.fake / "worker1" / "jaxii.run"
    file.write_text(file.read_text().replace(running.revision[:12], "0123456789ab"))
    result = running("run", "pod", *FLAGS)
    assert result.returncode == 1
    assert "another run is in progress: jaxii-0123456789ab" in result.stderr


def test_a_run_that_is_stopped_is_not_started_again_by_who_watches_it(running):
    watching = running.start("run", "pod", *FLAGS)
    wait_for_queries(running)
    assert running("stop", "pod").returncode == 0
    assert watching.wait(timeout=20) == 75
    assert "the run was stopped; use resume" in watching.communicate()[1]
    assert len(running.runs()) == len(running.runs(1)) == 1


def test_stop_without_a_run_changes_nothing(ready):
    assert ready("stop", "pod").returncode == 0
    ready.outcomes("75 75", "0 0")
    assert ready("run", "pod", *FLAGS).returncode == 0
    assert len(ready.runs()) == 2


def test_extras_are_installed_and_their_variables_are_secret(ready, tmp_path):
    ready.outcomes("75 75", "0 0")
    (tmp_path / "temporary").mkdir()
    services = SERVICES | {"EXTRAS": "wandb,mlflow", "TMPDIR": f"{tmp_path}/temporary"}
    missing = ready("run", "pod", *FLAGS, **services)
    assert missing.returncode == 1
    assert "is not set up here with EXTRAS=wandb,mlflow" in missing.stderr
    assert ready("setup", "pod", **services).returncode == 0
    home = ready.fake / "worker1" / f"jaxii-{ready.revision[:12]}-wandb,mlflow"
    assert ".[tpu,gcs,wandb,mlflow]" in (home / "installed").read_text()
    result = ready("run", "pod", *FLAGS, **services)
    assert result.returncode == 0, result.stderr
    # Also after a restart, which copies them again.
    assert ready.lines("services.worker0") == ["it's a secret http://host"] * 2
    assert ready.lines("services.worker1") == ready.lines("services.worker0")
    assert {*ready.lines("modes")} == {"600"}
    printed = "\n".join([missing.stdout, result.stdout, result.stderr])
    assert "s a secret" not in printed + "\n".join(ready.lines("calls"))
    assert not (ready.fake / "worker0" / "jaxii.env").exists()
    assert not any((tmp_path / "temporary").iterdir())


def test_variables_of_services_stay_here_without_extras(ready):
    ready.outcomes("0 0")
    assert ready("run", "pod", *FLAGS, **SERVICES).returncode == 0
    assert ready.lines("services.worker0") == ["none none"]


def test_extras_that_are_no_list_of_names_are_refused(ready):
    result = ready("setup", "pod", EXTRAS="wandb; id")
    assert result.returncode == 2
    assert "EXTRAS=wandb; id is not a list of extras; use one such as" in result.stderr


def test_logs_are_those_of_the_worker_that_is_asked_for(ready):
    ready.outcomes("0 0")
    assert ready("run", "pod", *FLAGS).returncode == 0
    assert "\nthis is the log of worker1\n" in ready("logs", "pod", WORKER="1").stdout


def test_delete_gives_the_pod_back(ready):
    assert ready("delete", "pod").returncode == 0
    assert not (ready.fake / "request").exists()


def test_a_gcloud_that_does_not_answer_deletes_nothing_and_stops(ready):
    ready.gcloud.unlink()
    ready.gcloud.write_text("#!/bin/sh\nexit 1\n")
    ready.gcloud.chmod(0o755)
    result = ready("resume", "pod", *FLAGS)
    assert result.returncode == 1
    assert "pod does not respond" in result.stderr
    assert not ready.calls("delete")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config=x"], "--workdir is missing"),
        (["--workdir=runs/x"], "--workdir=runs/x is not in a bucket"),
        (["--workdir", "runs/x"], "--workdir=runs/x is not in a bucket"),
        (
            ["--workdir=gs://b/r", "--data_dir=/data"],
            "--data_dir=/data is not in a bucket",
        ),
    ],
)
def test_places_that_would_go_with_the_pod_are_refused(ready, flags, message):
    result = ready("run", "pod", *flags)
    assert result.returncode == 2
    assert message in result.stderr


def test_a_tree_with_changes_is_refused(ready):
    new = ready.checkout / "new.py"
    new.touch()
    result = ready("setup", "pod")
    new.unlink()
    assert result.returncode == 2
    assert "uncommitted changes; commit or stash" in result.stderr


def test_a_commit_that_is_not_pushed_is_refused(ready):
    git(ready.checkout, "commit", "--quiet", "--allow-empty", "--message=local")
    result = ready("setup", "pod")
    git(ready.checkout, "reset", "--quiet", "HEAD~")
    assert result.returncode == 2
    assert "is on no remote branch; push it" in result.stderr


def command_lines():
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        # The process may have ended.
        with contextlib.suppress(OSError):
            yield file.read_bytes().replace(b"\0", b" ").decode(errors="replace")


def test_without_a_zone_it_says_so(pod):
    result = pod("create", "pod", ZONE="")
    assert result.returncode == 2
    assert "ZONE is not set" in result.stderr


def test_a_dry_run_prints_exactly_its_golden_text_and_calls_nothing(pod):
    lines = []
    verbs = "create", "setup", "run", "resume", "logs", "status", "stop", "delete"
    for verb in verbs:
        words = [verb, "my-pod", *(FLAGS if verb in ("run", "resume") else ())]
        result = pod(*words, "--dry-run", REPOSITORY="https://example.org/jaxii.git")
        assert result.returncode == 0, result.stderr
        lines += [f"$ launch/tpu_pod.sh {verb} ...", result.stdout]
    text = "\n".join(lines).replace(pod.revision, "REVISION")
    text = text.replace(pod.revision[:12], "REVISION_12")
    golden = ROOT / "tests" / "golden" / "launch_tpu_pod.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()
    assert not (pod.fake / "calls").exists()
