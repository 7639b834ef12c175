"""Tests that scripts of `launch/` print their commands and run what exists."""

import runpy
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))


def run_program(*words, cwd=ROOT):
    return subprocess.run([*map(str, words)], cwd=cwd, capture_output=True, text=True)


def run(*words):
    return run_program("bash", *words)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_without_arguments_a_script_shows_its_use_and_exits_2(script):
    for folder in (ROOT, script.parent):
        result = run_program("bash", script.relative_to(folder), cwd=folder)
        assert result.returncode == 2
        assert f"launch/{script.name}" in result.stdout


def test_shellcheck_finds_nothing():
    # Not on PATH if the environment's Python runs without activation.
    scripts = sysconfig.get_path("scripts")
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=scripts)
    if shellcheck is None:
        pytest.skip("needs shellcheck; pip install '.[test]' installs it")
    files = [*SCRIPTS, ROOT / "launch/commands.bash", *ROOT.glob("tests/*.sh")]
    result = run_program(shellcheck, "--external-sources", *files)
    assert result.returncode == 0, result.stdout


def dry_run_of_findings(tmp_path):
    result = run(ROOT / "launch/findings.sh", tmp_path / "data", tmp_path, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert not any(tmp_path.iterdir())
    return result.stdout.splitlines()


def test_findings_trains_every_run_that_there_is(tmp_path):
    names = runpy.run_path(str(ROOT / "configs/findings.py"))["RUNS"]
    text = "\n".join(dry_run_of_findings(tmp_path)) + " "
    for name in names:
        assert f"--config=configs/findings.py:{name} " in text


def test_findings_repeats_the_baseline_over_three_seeds(tmp_path):
    lines = dry_run_of_findings(tmp_path)
    baselines = [line for line in lines if "findings.py:baseline " in line]
    assert len(baselines) == 3


def test_findings_that_were_measured_are_not_run_again(tmp_path):
    everything = dry_run_of_findings(tmp_path)
    done = tmp_path / "runs"
    (done / "focal").mkdir(parents=True)
    (done / "focal" / "metrics.json").touch()
    left = run(ROOT / "launch/findings.sh", tmp_path, done, "--dry-run").stdout
    assert len(left.splitlines()) == len(everything) - 1
    assert "findings.py:focal " not in left
