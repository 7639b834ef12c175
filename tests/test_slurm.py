"""Tests `launch/slurm.sh` with fakes of `sbatch`, `srun` and `scontrol`."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLAGS = (
    "--config=configs/x.py:a",
    "--workdir=/shared/run one",
    "--data_dir=/shared/data",
)
# As in Slurm, the job runs a copy, in the requested folder and environment.
SBATCH = """#!/usr/bin/env bash
echo "sbatch $*" >> "$FAKE/calls"
while [[ $1 == --* ]]; do
    case $1 in
        --chdir=*) cd "${1#*=}" || exit ;;
        --export=ALL,*) export "${1#*ALL,}" ;;
    esac
    shift
done
cp "$1" "$FAKE/spooled"; shift
printf '%s\\0' "$PWD" "$JAXII_JOB_LOG" "$@" > "$FAKE/job"
"""
SRUN = """#!/usr/bin/env bash
echo "srun $*" >> "$FAKE/calls"
echo "token $JAXII_RUN_TOKEN" >> "$FAKE/calls"
if [[ -e $FAKE/misused ]]; then touch "$JAXII_MISUSED_FILE"; fi
exit "$(cat "$FAKE/outcome")"
"""
SQUEUE = """#!/usr/bin/env bash
cat "$FAKE/state"
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >> "$FAKE/calls"
"""
PROGRAMS = {"sbatch": SBATCH, "srun": SRUN, "squeue": SQUEUE, "scontrol": SCONTROL}


class Cluster:
    def __init__(self, folder):
        self.folder, self.checkout = folder, folder / "checkout"
        programs = folder / "programs"
        programs.mkdir()
        for name, text in PROGRAMS.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        shutil.copytree(ROOT / "launch", self.checkout / "launch")
        (self.checkout / ".gitignore").write_text("/runs/\n")
        self.environment = {
            "PATH": f"{programs}:/usr/bin:/bin",
            "HOME": str(folder),
            "FAKE": str(folder),
        }
        self.git("init", "--quiet")
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message=scripts")
        self.revision = self.git("rev-parse", "HEAD")

    def git(self, *words):
        who = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        return subprocess.run(
            ["git", "-C", self.checkout, *who, *words],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    def submit(self, *words, **environment):
        return subprocess.run(
            ["bash", "launch/slurm.sh", *words],
            cwd=self.checkout,
            env=self.environment | environment,
            capture_output=True,
            text=True,
        )

    def run_job(self, outcome, state="RUNNING None", **environment):
        """Runs the job once; returns its exit code and whether it requeued itself."""
        (self.folder / "outcome").write_text(str(outcome))
        (self.folder / "state").write_text(f"{state}\n")
        directory, log, *words = (self.folder / "job").read_text().split("\0")[:-1]
        before = len(self.calls("scontrol"))
        code = subprocess.run(
            ["bash", self.folder / "spooled", *words],
            cwd=directory,
            env=self.environment
            | {"JAXII_JOB_LOG": log, "SLURM_JOB_ID": "7"}
            | environment,
            capture_output=True,
        ).returncode
        return code, len(self.calls("scontrol")) > before

    def calls(self, program):
        file = self.folder / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        return [line for line in lines if line.startswith(program)]


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


@pytest.fixture
def submitted(cluster):
    result = cluster.submit("4", *FLAGS)
    assert result.returncode == 0, result.stderr
    return cluster


def test_a_job_is_one_task_a_node_and_is_warned_before_its_end(submitted):
    (call,) = submitted.calls("sbatch")
    assert {"--nodes=4", "--ntasks-per-node=1", "--requeue", "--signal=TERM@120"} < {
        *call.split()
    }


def test_a_job_gets_all_processors_and_memory_of_its_nodes(submitted):
    (call,) = submitted.calls("sbatch")
    assert {"--exclusive", "--mem=0"} < {*call.split()}
    assert submitted.run_job(0) == (0, False)
    (call,) = submitted.calls("srun")
    assert "--cpu-bind=none" in call and "--cpus-per-task" not in call


def test_processors_that_are_asked_for_reach_the_processes(cluster):
    assert cluster.submit("4", *FLAGS, CPUS="48").returncode == 0
    (call,) = cluster.calls("sbatch")
    assert " --cpus-per-task=48 " in call and "--exclusive" not in call
    assert cluster.run_job(0, SLURM_CPUS_PER_TASK="48") == (0, False)
    assert " --cpus-per-task=48 " in cluster.calls("srun")[0]


def test_the_job_runs_the_commit_of_its_submission_whatever_comes_after(submitted):
    submitted.git("commit", "--quiet", "--allow-empty", "--message=later")
    directory = (submitted.folder / "job").read_text().split("\0")[0]
    head = subprocess.run(
        ["git", "-C", directory, "rev-parse", "HEAD"], capture_output=True, text=True
    )
    assert head.stdout.strip() == submitted.revision
    assert submitted.run_job(0) == (0, False)
    (call,) = submitted.calls("srun")
    assert call.endswith(f" -m jaxii.main {' '.join(FLAGS)}")


def test_a_second_submission_of_a_commit_uses_its_checkout_again(submitted):
    assert submitted.submit("2", *FLAGS).returncode == 0
    assert len(submitted.calls("sbatch")) == 2


def test_one_process_that_ends_does_not_kill_the_others_while_they_save(submitted):
    submitted.run_job(0)
    assert "--kill-on-bad-exit=0 --wait=0 " in submitted.calls("srun")[0]


def test_the_processes_get_a_token_that_is_new_at_each_start(submitted):
    submitted.run_job(75)
    submitted.run_job(0)
    first, second = (line.split()[1] for line in submitted.calls("token"))
    assert len(first) == len(second) == 32
    assert first != second


@pytest.mark.parametrize(
    ("outcome", "requeued"),
    [(0, False), (2, False), (75, True), (1, True), (137, True)],
)
def test_what_can_go_on_queues_itself_again(submitted, outcome, requeued):
    assert submitted.run_job(outcome) == (outcome, requeued)


@pytest.mark.parametrize(
    ("state", "requeued"),
    [
        ("RUNNING None", True),
        ("COMPLETING None", False),  # after scancel
        ("COMPLETING TimeLimit", True),
        ("", False),
    ],
)
@pytest.mark.parametrize("outcome", [75, 137])
def test_a_job_that_was_cancelled_stays_cancelled(submitted, outcome, state, requeued):
    assert submitted.run_job(outcome, state) == (outcome, requeued)


def test_invalid_input_of_one_process_is_not_hidden_by_the_end_of_the_others(submitted):
    assert submitted.run_job(134) == (134, True)
    (submitted.folder / "misused").touch()
    assert submitted.run_job(134) == (2, False)


def test_a_lost_process_queues_the_job_a_bounded_number_of_times(submitted):
    ends = [submitted.run_job(1)[1] for _ in range(5)]
    assert ends == [True, True, True, False, False]


def test_a_preempted_job_queues_itself_as_often_as_it_happens(submitted):
    assert all(submitted.run_job(75)[1] for _ in range(5))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config=x"], "--workdir is missing"),
        (["--workdir=runs/x"], "--workdir=runs/x is not the same path on every node"),
    ],
)
def test_a_workdir_that_nodes_do_not_share_is_refused(cluster, flags, message):
    result = cluster.submit("4", *flags)
    assert result.returncode == 2
    assert message in result.stderr


def test_a_tree_with_changes_is_refused(cluster):
    (cluster.checkout / "new.py").touch()
    result = cluster.submit("4", *FLAGS)
    assert result.returncode == 2
    assert "the working tree has uncommitted changes" in result.stderr


def test_a_dry_run_prints_exactly_its_golden_text_and_calls_nothing(cluster):
    result = cluster.submit("4", *FLAGS, "--dry-run")
    assert result.returncode == 0, result.stderr
    text = result.stdout.replace(cluster.revision, "REVISION")
    text = text.replace(str(cluster.checkout), "CHECKOUT")
    text = text.replace(str(cluster.folder), "HOME")
    golden = ROOT / "tests" / "golden" / "launch_slurm.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()
    assert not cluster.calls("")
    assert not (cluster.folder / ".cache").exists()
