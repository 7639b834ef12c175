"""Tests the command line: mistakes are answered in one line, with code 2."""

import asyncio
import csv
import gc
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest.mock import Mock

import cv2
import jax
import mixed_images
import numpy as np
import plain_data
import pytest
import small_layers
import small_layout
from etils import epath
from PIL import Image
from small_runs import save_checkpoint, seal, split_metrics, write_run

from jaxii import main
from jaxii.cli import dispatch, start
from jaxii.cli import flags as cli_flags
from jaxii.cli.flags import DECODERS, config_of
from jaxii.decoding.decoders import NAMES
from jaxii.distributed import processes
from jaxii.distributed.cluster import ProcessInfo
from jaxii.distributed.mesh import replicated
from jaxii.errors import CheckFailed, InputError
from jaxii.evaluation import by_label
from jaxii.prepare.kaggle import Layout, prepare
from jaxii.prepare.recipe import Pace
from jaxii.prepare.tables import rows
from jaxii.runs import doctor, speed
from jaxii.runs import evaluate as evaluation
from jaxii.runs.begin import begin
from jaxii.runs.run import Run
from jaxii.runs.workdir import Workdir
from jaxii.storage import held
from jaxii.train.checkpoint import Checkpoints, FailedSave
from jaxii.train.state import new_state

pytestmark = pytest.mark.usefixtures("without_drawings")

ROOT = Path(__file__).parent.parent
RECIPE = "--config=configs/f2_multitask.py"
SETTINGS = (
    RECIPE,
    "--config.data.dataset=kaggle",
    "--config.model.width=8",
    "--config.data.image_size_pixels=16",
    "--config.data.validation_fraction=0.4",
    "--config.global_batch_size=8",
    "--config.model.batch_norm=global",
    "--config.label_embedding.dim=2",
    "--config.optimizer.average=none",
)


@pytest.fixture(scope="module", autouse=True)
def few_blocks():
    with small_layers.few_blocks(1, 1, 0, 0):
        yield


def listing(folder):
    return {
        str(path.relative_to(folder)): path.stat().st_size if path.is_file() else -1
        for path in folder.rglob("*")
        # Python's cache, because recipes are modules.
        if "__pycache__" not in path.parts
    }


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs `jaxii WORDS` in this process; returns code, stdout and stderr."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(processes, "preemption_notice", lambda: lambda step: False)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["jaxii", *map(str, words)])
        capfd.readouterr()
        code = main.main(sys.argv)
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def refused(run, tmp_path):
    """Checks that `jaxii WORDS` is refused in one line and writes nothing."""

    def refused(words, pattern, folder=tmp_path):
        before = listing(folder)
        code, _, errors = run(*words)
        assert code == 2
        assert len(errors.splitlines()) == 1, errors
        assert errors.startswith("jaxii: ")
        assert "Traceback" not in errors
        assert re.search(pattern, errors), errors
        assert listing(folder) == before

    return refused


# The command line itself.


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (
            ["trian"],
            "'trian' is not a command; the nearest is train; use one of train, new",
        ),
        (["train", "fast"], "train takes flags only, not 'fast'; see train --help"),
        (["--bogus=1"], "Unknown command line flag 'bogus'.*--help"),
        ([], "--config is missing; .*give --config configs/f2_multitask.py"),
        (["train"], "--config is missing"),
        (["evaluate"], "--workdir is missing; see --help"),
        (["predict"], "--workdir is missing"),
        (["hold_out"], "--workdir is missing"),
        (["predict", "--workdir=x"], "--images is missing"),
        (
            ["suspects", "--workdir=x", "--output=a.csv", "--sheet=a.csv"],
            "--output and --sheet are both a.csv; use two different files",
        ),
        (
            ["suspects", "--workdir=x", "--output=x/suspects.html"],
            "--output and --sheet are both x/suspects.html; use two different files",
        ),
        (
            ["suspects", "--workdir=x", "--sheet=x/suspects.csv"],
            "--output and --sheet are both x/suspects.csv; use two different files",
        ),
        (["prepare"], "--input_dir is missing"),
        (["prepare", "--input_dir=x"], "--data_dir is missing"),
        (["prepare", "--short_side=small"], "--short_side=small: "),
        (["prepare", "--short_side=4"], "--short_side=4: .*>= 16"),
        (["compare"], "compare was given no workdir"),
        (["plan"], "--config is missing"),
        (["plan", f"{RECIPE}:emoji", "--topology=v5e:3x3"], "not a TPU slice"),
        (["plan", "--device_batch_size=-1"], "--device_batch_size=-1: .*positive"),
        (["evaluate", "--tune_on=test"], "validation|held_out|tuning>"),
        (["evaluate", "--tune_on=tuning"], "add --allow_tuning_labels"),
        *(
            (["train", f"{RECIPE}:emoji", f"--profile_steps={steps}"], pattern)
            for steps, pattern in {
                "100": "--profile_steps=100 is not FIRST:LAST with FIRST below LAST",
                "105:100": "100:105 traces the five updates after step 100",
                "5:5": "not FIRST:LAST",
                "-1:5": "not FIRST:LAST",
                "a:b": "not FIRST:LAST",
                "1:2:3": "not FIRST:LAST",
            }.items()
        ),
        (
            ["adapt"],
            "trains the weights on labels of the target domain; "
            "add --allow_tuning_labels",
        ),
        (["adapt", "--allow_tuning_labels"], "--workdir is missing"),
        (["adapt", "--allow_tuning_labels", "--workdir=x"], "--output is missing"),
        (["adapt", "--train=first_layer"], "<all|last_layer>"),
        (
            ["predict", "--decoder=best"],
            "<threshold|per_class|top_k|embedding|",
        ),
    ],
)
def test_a_command_line_that_cannot_be_is_refused(refused, words, pattern):
    refused(words, pattern)


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["--config"], "--config= is not a file"),
        (["--config=configs/none.py"], "--config=configs/none.py is not a file; give"),
        (["--config=configs"], "is not a file; give a recipe such as"),
        (
            [f"{RECIPE}:emojis"],
            "py:emojis: there is no such preset; the nearest is emoji; use one of "
            "toy_regions, emoji, ",
        ),
        (
            [RECIPE, "--config.optimiser.peak_lr=1"],
            "--config.optimiser.peak_lr is not a field; use optimizer.peak_lr",
        ),
        (
            [RECIPE, "--config.optimizer.peek_lr=1"],
            "--config.optimizer.peek_lr is not a field; use optimizer.peak_lr",
        ),
        ([RECIPE, "--config.zzz=1"], "use data, .*label_embedding"),
        ([RECIPE, "--config.seed=abc"], "--config.seed=abc: .* like the default, 0"),
        ([RECIPE, "--config.optimizer.peak_lr="], "like the default, 0.15"),
        ([RECIPE, "--config.model=50"], "--config.model=50: .* is not a dict"),
        ([RECIPE, "--config.stages=50"], "config.stages contains 50; use a dict"),
        ([RECIPE, "--config.stages[0].num_epoch=5"], r"use stages\[0\].num_epochs"),
        ([RECIPE, "--config.stages[7].num_epochs=5"], "lacks the stage or term"),
        ([RECIPE, "--config.stages[0].terms.bcee=5"], "lacks the stage or term"),
        ([RECIPE, "--config.stages[1].peak_lr_scale=-5"], r"use a value in \["),
        ([RECIPE, "--config.model.depth=20"], "use one of 18, 26, 34, 50, 101, 152"),
        ([RECIPE, "--config.optimizer.peak_lr=nan"], r"use a value in \["),
        ([RECIPE, "--config.global_batch_size=-8"], r"use a value in \[1, "),
        (["--config.seed=1", RECIPE], "before a value for --config"),
        (["--config.seed=1"], "config"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(refused, words, pattern):
    refused(words, pattern)


@pytest.mark.parametrize(
    ("source", "pattern"),
    [
        ("def get_config(:\n", "SyntaxError: .*line 1"),
        ("import nothing_of_this_name\n", "ModuleNotFoundError: .*nothing.*line 1"),
        ("def get_config():\n    return 1 / 0\n", "ZeroDivisionError: .*line 2"),
        ("def get_config():\n    pass\n", r"get_config\(\) does not return a config"),
        ("x = 1\n", "get_config"),
        (
            "from jaxii.config import default_config\n\n\n"
            "def get_config():\n    config = default_config()\n"
            "    config.optimizer.peek_lr = 1\n    return config\n",
            '"peek_lr" does not exist.*line 6',
        ),
        (
            "from jaxii.config import default_config\n\n\n"
            "def get_config():\n    return default_config()\n",
            "at least one stage",
        ),
    ],
)
def test_a_recipe_that_fails_is_refused_with_its_line(
    refused, tmp_path, source, pattern
):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(source)
    refused([f"--config={recipe}"], pattern)


@pytest.mark.parametrize("name", ["", *dispatch.COMMANDS])
def test_help_has_an_example_and_imports_no_jax(name):
    script = (
        "import sys; from jaxii import main; code = main.main(sys.argv); "
        "assert 'jax' not in sys.modules; assert 'polars' not in sys.modules; "
        "sys.exit(code)"
    )
    words = [name, "--help"] if name else ["--help"]
    found = subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    assert f"python -m jaxii.main {name}" in found.stdout
    assert found.stderr == ""


@pytest.mark.parametrize("command", dispatch.COMMANDS)
def test_the_help_of_a_command_lists_its_flags_with_their_defaults(command):
    values = dispatch.declared(command).values
    text = dispatch.help_text([command])
    described = dict(re.findall(r"^--(\w+)(.*(?:\n {25}.*)*)", text, re.MULTILINE))
    assert list(described) == list(values)
    for name, words in described.items():
        default = values[name].default
        if default not in (None, "", [], False):
            shown = ",".join(default) if isinstance(default, list) else default
            assert words.endswith(f"[{shown}]"), name


ALL_FLAGS = sorted({f for c in dispatch.COMMANDS for f in dispatch.declared(c).values})


@pytest.mark.parametrize("command", dispatch.COMMANDS)
def test_a_flag_of_other_commands_is_refused_with_their_names(command):
    own = dispatch.declared(command).values
    for name in set(ALL_FLAGS) - set(own):
        owners = [c for c in dispatch.COMMANDS if name in dispatch.declared(c).values]
        with pytest.raises(InputError) as caught:
            dispatch.parse(command, ["jaxii", f"--{name}=3"])
        assert str(caught.value) == (
            f"{command} does not take --{name}; it is a flag of {', '.join(owners)}; "
            f"see {command} --help."
        )


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["evaluate", "--num_epochs=3"], "not take --num_epochs; .* flag of adapt;"),
        (
            ["compare", "--noverify"],
            "not take --noverify; .* train, evaluate, hold_out",
        ),
        (["export", RECIPE, "--config.seed=1"], "export does not take --config; .*"),
        (["plan", "--coordinator=a:1"], "--coordinator; .*train, evaluate, hold_out"),
    ],
)
def test_a_flag_that_would_be_ignored_is_refused(refused, words, pattern):
    refused(words, pattern)


@pytest.mark.parametrize("command", dispatch.COMMANDS)
def test_sigterm_is_kept_for_the_commands_that_save(command):
    source = inspect.getsource(dispatch.COMMANDS[command])
    saves = "preemption_notice()" in source
    assert ("start_jax(flags, saves_on_sigterm=True)" in source) == saves
    assert saves == (command in ("train", "hold_out", "adapt"))


@pytest.mark.parametrize("command", dispatch.COMMANDS)
def test_every_flag_that_a_command_declares_is_read_by_it(command):
    shared = "".join(map(inspect.getsource, (cli_flags, start)))
    source = inspect.getsource(dispatch.COMMANDS[command]) + shared
    for name in dispatch.declared(command).values:
        reads = rf"flags\.{name}\b|\(flags, \"{name}\"|LAYOUT_FILES = .*\"{name}\""
        assert re.search(reads, source), name


def test_the_decoder_flag_offers_the_decoders_there_are():
    assert DECODERS == NAMES


def test_the_label_separator_flag_offers_those_that_cells_can_have():
    assert ("", *cli_flags.SEPARATORS) == rows.CHOICES


def test_a_flags_value_is_not_taken_for_the_command(refused):
    refused(["--workdir", "train", "predict"], "--images is missing")
    refused(["--onnx", "export"], "--workdir is missing")
    refused(["--noonnx", "--workdir", "a", "export"], "--output is missing")


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """The environment without a folder for compiled programs, restored afterwards."""
    monkeypatch.setenv(start.CACHE, "")
    monkeypatch.delenv(start.CACHE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return os.environ


def test_compiled_programs_are_kept_in_the_users_cache(environment, tmp_path):
    start.keep_compiled_programs()
    folder = tmp_path / "cache" / "jaxii" / "compiled"
    assert environment[start.CACHE] == str(folder)
    # The programs are executed, so nobody else may write there.
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("given", ["", "elsewhere", "gs://bucket/compiled"])
def test_compiled_programs_are_kept_where_and_only_if_jax_was_told(
    environment, tmp_path, given, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    environment[start.CACHE] = given
    start.keep_compiled_programs()
    assert environment[start.CACHE] == given
    assert not (tmp_path / "cache").exists()


def test_a_named_folder_for_compiled_programs_is_made_for_this_user_alone(
    environment, tmp_path
):
    environment[start.CACHE] = str(tmp_path / "elsewhere")
    start.keep_compiled_programs()
    assert (tmp_path / "elsewhere").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
@pytest.mark.parametrize("named", [False, True])
def test_programs_that_others_could_have_put_there_are_not_run(
    environment, tmp_path, mode, named, capsys
):
    folder = tmp_path / ("elsewhere" if named else "cache/jaxii/compiled")
    folder.mkdir(parents=True)
    folder.chmod(mode)
    if named:
        environment[start.CACHE] = str(folder)
    start.keep_compiled_programs()
    assert environment[start.CACHE] == ""
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert f"chmod go-w {folder}" in warning
    folder.chmod(mode & 0o755)
    if named:
        environment[start.CACHE] = str(folder)
    else:
        del environment[start.CACHE]
    start.keep_compiled_programs()
    assert environment[start.CACHE] == str(folder)


def test_compiled_programs_of_another_user_are_not_run(
    environment, tmp_path, monkeypatch, capsys
):
    start.keep_compiled_programs()
    folder = environment[start.CACHE]
    if os.getuid() == 0:
        os.chown(folder, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    start.keep_compiled_programs()
    assert environment[start.CACHE] == ""
    assert "not used for compiled programs" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_done_without(environment, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    start.keep_compiled_programs()
    assert start.CACHE not in environment


def test_a_cache_that_cannot_be_made_is_done_without(environment, tmp_path):
    (tmp_path / "cache").write_text("a file")
    start.keep_compiled_programs()
    assert start.CACHE not in environment


def test_a_cache_without_a_home_folder_is_done_without(environment, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    start.keep_compiled_programs()
    assert start.CACHE not in environment


def test_programs_that_cannot_be_kept_give_no_warning(monkeypatch, tmp_path):
    monkeypatch.setenv(start.CACHE, str(tmp_path / "compiled"))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        start.keep_compiled_programs()
        start_of = "Error writing persistent compilation cache entry for"
        warnings.warn(f"{start_of} 'jit_step': MemoryError", stacklevel=1)
        assert not found
        warnings.warn("another", stacklevel=1)
    assert len(found) == 1


def test_starting_to_train_loads_no_library_that_only_the_report_needs():
    script = (
        "import sys; from jaxii.prepare import kaggle; from jaxii.runs import adapt, "
        "evaluate, hold_out, plan, predict, train; "
        "sys.exit(' '.join({'matplotlib', 'scipy.stats', 'sklearn', 'apache_beam'} "
        "& set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True
    )
    assert found.stderr.strip() == ""


def test_a_failed_save_ends_with_1_and_one_line(run, monkeypatch, tmp_path):
    def fail(*args, **more):
        raise FailedSave(epath.Path(tmp_path), 7, OSError(28, "No space left"))

    monkeypatch.setattr("jaxii.runs.train.train", fail)
    code, _, err = run("train", f"{RECIPE}:emoji", f"--workdir={tmp_path}")
    assert code == 1
    assert re.fullmatch(r"jaxii: saving the checkpoint of step 7 .*\n", err)


@pytest.mark.parametrize(("file", "logged"), [("orbax/save.py", 0), ("mine.py", 1)])
def test_only_tasks_of_orbax_leave_no_traceback(run, caplog, file, logged):
    assert run("--help")[0] == 0
    scope = {}
    exec(compile("async def save(): raise OSError(28, 'full')", file, "exec"), scope)

    async def leave():
        asyncio.ensure_future(scope["save"]())  # noqa: RUF006 (nobody awaits it)
        await asyncio.sleep(0)

    asyncio.run(leave())
    gc.collect()
    assert caplog.text.count("Task exception was never retrieved") == logged


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: np.empty(1 << 55),
        lambda: cv2.resize(np.zeros((1, 1), np.uint8), (1 << 30, 1 << 24)),
        lambda: jax.numpy.zeros(1 << 45).block_until_ready(),
    ],
)
def test_want_of_memory_ends_with_1_and_one_line(run, monkeypatch, tmp_path, allocate):
    monkeypatch.setattr("jaxii.runs.train.train", lambda *_, **__: allocate())
    code, _, err = run("train", f"{RECIPE}:emoji", f"--workdir={tmp_path}")
    assert code == 1
    assert re.fullmatch(
        r"jaxii: out of memory \(.*\); raise the memory limit .*\n", err
    )


def matplotlib_without_a_folder():
    error = "a temporary directory could not be created; set the MPLCONFIGDIR"
    raise OSError(error)


@pytest.mark.parametrize(
    "write", [tempfile._get_default_tempdir, matplotlib_without_a_folder]
)
def test_want_of_a_temporary_folder_ends_with_1_and_one_line(
    run, monkeypatch, tmp_path, write
):
    monkeypatch.setattr("jaxii.runs.train.train", lambda *_, **__: write())
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/dev/null/x"])
    code, _, err = run("train", f"{RECIPE}:emoji", f"--workdir={tmp_path}")
    assert code == 1
    assert re.fullmatch(
        r"jaxii: no folder for temporary files \(.*\); set TMPDIR .*\n", err
    )


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["trian"], 2),
        ([RECIPE, "--config.optimizer.peek_lr=1"], 2),
        (["--config=configs/none.py", "--config.seed=1"], 2),
    ],
)
def test_the_process_exits_with_the_code_and_one_line(words, code):
    found = subprocess.run(
        [sys.executable, "-m", "jaxii.main", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert found.returncode == code
    assert found.stdout == ""
    assert re.fullmatch(r"jaxii: [^\n]+\n", found.stderr), found.stderr


# Unusual outputs, names and signals.

HOSTILE = "te\x1b[31mst"


def jaxii(*words, before="", **environment):
    """Runs jaxii as a process; a shell runs `before` in it first."""
    line = f'{before} exec "$@"'
    python = sys.executable, "-m", "jaxii.main"
    return subprocess.run(
        ["bash", "-c", line, "bash", *python, *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_no_name_of_a_run_reaches_the_terminal_as_a_command(tmp_path):
    one = write_run(tmp_path / "one")
    two = write_run(
        tmp_path / HOSTILE,
        dataset=HOSTILE,
        splits={"validation": split_metrics(0.3), HOSTILE: split_metrics(0.2)},
    )
    for flag in ("--markdown", "--nomarkdown"):
        found = jaxii("compare", one, two, flag)
        assert found.stderr == ""
        assert r"te\x1b[31mst" in found.stdout.replace("\\\\", "\\")
        assert "\x1b" not in found.stdout


@pytest.mark.parametrize(
    "words", [["compare", HOSTILE], [f"--{HOSTILE}=1"], [HOSTILE], ["new", HOSTILE]]
)
def test_no_word_that_was_given_comes_back_as_a_command(run, words):
    code, _, errors = run(*words)
    assert code == 2
    assert r"te\x1b[31mst" in errors and "\x1b" not in errors


def test_an_output_need_not_have_all_characters_nor_be_open(tmp_path):
    splits = {"validation": split_metrics(0.3), "tést": split_metrics(0.2)}
    path = write_run(tmp_path / "run", splits=splits)
    # The locale C, without Python's coercion to UTF-8.
    ascii = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    found = jaxii("compare", path, **ascii)
    assert (found.returncode, found.stderr) == (0, "")
    assert r"F2 t\xe9st" in found.stdout
    for closed in (">&-;", ">&- 2>&-;"):
        found = jaxii("compare", path, before=f"exec {closed}")
        assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


def test_an_interrupt_is_one_line_and_ends_the_shells_script_too(tmp_path):
    recipe = tmp_path / "recipe.py"
    waits = "import time\ntime.sleep(60)"
    recipe.write_text(f"print('begun', flush=True)\n{waits}\n")
    with subprocess.Popen(
        [sys.executable, "-m", "jaxii.main", f"--config={recipe}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout.readline() == b"begun\n"
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
    assert (process.returncode, errors) == (-signal.SIGINT, b"jaxii: interrupted.\n")


INTERRUPTED_IMPORT = """
import signal, sys
class Finder:
    def find_spec(name, *_):
        if name == "absl":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder)
from jaxii import main
main.run()
"""
# Python prints what a callback raises, and continues.
INTERRUPTED_CALLBACK = """
import gc, signal, sys, time
from jaxii import main
def wait(argv):
    gc.callbacks.append(lambda *_: signal.raise_signal(signal.SIGINT))
    gc.collect()
    time.sleep(60)
main.main = wait
main.run()
"""


def test_an_interrupt_of_the_first_process_of_a_container_is_no_success():
    # The kernel sends such a process no signal that it does not handle.
    script = f"import os\nos.kill = lambda *_: None\n{INTERRUPTED_CALLBACK}"
    found = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=50)
    assert found.returncode == 128 + signal.SIGINT


STARTED_AGAIN = """
import os, sys
from pathlib import Path
from jaxii import main
main.HUGE_PAGES = Path(sys.argv[1])
main.use_huge_pages()
print(os.getpid(), sys.flags.optimize, sys.argv[1:], os.environ.get(main.ALLOCATOR))
"""


@pytest.mark.parametrize(
    ("offered", "given", "setting"),
    [
        ("always [madvise] never", None, "glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "", ""),
        ("[always] madvise never", None, None),
        (None, None, None),
    ],
)
def test_a_command_starts_again_if_linux_gives_huge_pages_on_request(
    tmp_path, offered, given, setting
):
    file = tmp_path / "enabled"
    if offered is not None:
        file.write_text(offered)
    environment = {n: v for n, v in os.environ.items() if n != main.ALLOCATOR}
    if given is not None:
        environment[main.ALLOCATOR] = given
    words = ["-O", "-c", STARTED_AGAIN, str(file), "a b"]
    with subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        told = process.stdout.read()
    assert told == f"{process.pid} 1 {[str(file), 'a b']} {setting}\n"


@pytest.mark.parametrize("index", [0, 3])
def test_every_process_says_why_it_refuses(monkeypatch, capsys, index):
    def refuse(flags):
        flags.place = ProcessInfo(coordinator="host:1", count=4, index=index)
        raise InputError("no such folder")

    monkeypatch.setattr(dispatch.doctor, "run", refuse)
    assert main.main(["jaxii", "doctor"]) == 2
    who = "process 3 of 4: " if index else ""
    assert capsys.readouterr().err == f"jaxii: {who}no such folder\n"


@pytest.mark.parametrize("script", [INTERRUPTED_IMPORT, INTERRUPTED_CALLBACK])
def test_an_interrupt_of_an_import_or_a_callback_is_one_line(script):
    words = sys.executable, "-c", script, "--help"
    found = subprocess.run(words, cwd=ROOT, capture_output=True, timeout=50)
    assert found.stderr == b"jaxii: interrupted.\n"
    assert found.returncode == -signal.SIGINT


# `prepare`: accepted label files and images.


@pytest.fixture
def files(tmp_path):
    return small_layout.write(tmp_path / "files")


def prepare_words(files):
    return "prepare", f"--input_dir={files}", f"--data_dir={files.parent / 'data'}"


def append(path, *rows):
    with path.open("a") as file:
        file.writelines(row + "\n" for row in rows)


def wrong_header(files):
    path = files / "train_human_labels.csv"
    path.write_text(path.read_text().replace("LabelName", "Label"))


def no_images(files):
    for path in (files / "train" / "part_0").iterdir():
        path.unlink()


def unknown_codes(files):
    append(files / "train_human_labels.csv", "train00,verification,/m/strange,1")


def bad_confidence(files):
    append(files / "train_human_labels.csv", "train00,verification,/m/cat,2")


def two_of_a_class(files):
    append(files / "classes-trainable.csv", "/m/cat")


def no_classes(files):
    (files / "classes-trainable.csv").unlink()


def header_in_tuning(files):
    path = files / "tuning_labels.csv"
    path.write_text("image_id,labels\n" + path.read_text())


def output_in_use(files):
    (files.parent / "data").mkdir()
    (files.parent / "data" / "mine.txt").write_text("")


def output_is_a_file(files):
    (files.parent / "data").write_text("")


@pytest.mark.parametrize(
    ("spoil", "pattern"),
    [
        (wrong_header, "has the header ImageID,Source,Label,.*needs the columns"),
        (no_images, "no training image is left .*ids in the label file"),
        (unknown_codes, "1 of 7 rows have an unknown label code.*'/m/strange'"),
        (bad_confidence, "'2'; it must be a number from 0 to 1"),
        (two_of_a_class, "/m/cat is listed twice"),
        (no_classes, "classes-trainable.csv is missing"),
        (header_in_tuning, "starts with a header.*delete its first line"),
        (output_in_use, "is not empty .*choose an empty or new folder"),
        (output_is_a_file, "is a file; use a new folder"),
    ],
)
def test_files_that_cannot_be_prepared_are_refused(refused, files, spoil, pattern):
    spoil(files)
    refused(prepare_words(files), pattern)


def test_a_folder_that_another_process_prepares_is_refused(refused, files):
    with held(files.parent / "data"):
        refused(prepare_words(files), r"data is in use by process \d+ on .* since")


def test_a_folder_that_is_not_there_cannot_be_prepared(refused, tmp_path):
    refused(
        prepare_words(tmp_path / "absent"), "is not a folder; use the one that contains"
    )


def test_metadata_that_is_not_there_is_refused(refused, files):
    refused(
        (*prepare_words(files), "--train_metadata=none.csv"), "none.csv is not a file"
    )


def test_few_odd_rows_and_images_are_counted_and_left_out(run, tmp_path):
    files = small_layout.write(tmp_path / "files", num_train=40)
    labels = files / "train_human_labels.csv"
    append(labels, "train00,verification,/m/cat,1")
    append(labels, "train01,verification,/m/strange,1")
    append(labels, "absent,verification,/m/cat,1")
    image = files / "train" / "part_0" / "train02.jpg"
    image.write_bytes(image.read_bytes()[:200])
    (files / "stage_1_test_images" / "test1.jpg").unlink()
    code, text, errors = run(*prepare_words(files))
    assert (code, errors) == (0, "")
    for words in (
        "1 repeated",
        "1 unknown label code",
        "1 image missing",
        "1 unreadable",
        "1 listed but missing",
        "absent",
        "train02",
        "test1",
    ):
        assert words in text
    counts = json.loads((tmp_path / "data" / "counts.json").read_text())
    assert counts
    assert (tmp_path / "data" / "dataset_info.json").exists()


def test_files_that_are_not_used_are_named_first(run, files):
    append(files / "train_bounding_box.csv", "ImageID")
    code, text, _ = run(*prepare_words(files))
    assert code == 0
    first, second, *_ = text.splitlines()
    assert first.startswith("not found (optional): train_bounding_boxes.csv, ")
    assert second == "not used: train_bounding_box.csv"


def test_grey_cmyk_and_png_images_are_all_accepted(run, files):
    folder = files / "train" / "part_0"
    pixels = np.full((24, 32, 3), 99, np.uint8)
    cv2.imwrite(str(folder / "train00.jpg"), pixels[..., 0])
    Image.fromarray(pixels).convert("CMYK").save(folder / "train01.jpg", "JPEG")
    png = cv2.imencode(".png", pixels)[1].tobytes()
    (folder / "train02.jpg").write_bytes(png)
    code, text, _ = run(*prepare_words(files))
    assert code == 0
    assert "unreadable" not in text


# Data and workdirs of training.


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A prepared dataset of 24 training images, 3 labelled test images."""
    root = tmp_path_factory.mktemp("dataset")
    files = small_layout.write(root / "files", num_train=24)
    small_layout.lines(
        files / "test_labels.csv", "image_id,labels", "test0,/m/cat", "test1,/m/dog"
    )
    return prepared_from(files)


def prepared_from(files):
    prepare(Layout.find(files), files.parent / "data", num_workers=1)
    return files.parent / "data"


def train_words(data, workdir, *more):
    return (*SETTINGS, f"--data_dir={data}", f"--workdir={workdir}", *more)


def test_a_batch_that_does_not_divide_is_refused(refused, dataset, tmp_path):
    words = train_words(dataset, tmp_path / "run", "--config.global_batch_size=60")
    refused(words, "global_batch_size=60 .* 8 devices; use 56 or 64")


def test_a_process_of_eight_devices_refuses_a_batch_of_sixty(dataset, tmp_path):
    words = train_words(dataset, tmp_path / "run", "--config.global_batch_size=60")
    found = subprocess.run(
        [sys.executable, "-m", "jaxii.main", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        },
    )
    assert found.returncode == 2
    assert re.fullmatch(r"jaxii: [^\n]*use 56 or 64.\n", found.stderr), found.stderr
    assert not (tmp_path / "run").exists()


def never(*_, **__):
    pytest.fail("the dataset is being drawn")


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (["--config.global_batch_size=60"], "use 56 or 64"),
        (["--config.stages[0].name=classifier"], "two stages are named 'classifier'"),
    ],
)
def test_what_needs_no_data_is_refused_before_any_is_drawn(
    refused, monkeypatch, tmp_path, change, pattern
):
    monkeypatch.setenv("JAXII_DATA_DIR", str(tmp_path / "drawn"))
    monkeypatch.setattr("jaxii.prepare.toy_regions.writer.write", never)
    refused([RECIPE, f"--workdir={tmp_path / 'run'}", *change], pattern)


def test_a_misspelt_field_of_a_stage_is_refused_by_name(refused, dataset, tmp_path):
    recipe = tmp_path / "recipe.py"
    text = (ROOT / "configs" / "f2_multitask.py").read_text()
    recipe.write_text(text.replace('"embedding_head": True', '"embeding_head": True'))
    words = (f"--config={recipe}", *train_words(dataset, tmp_path / "run")[1:])
    refused(
        words,
        "has no field 'embeding_head'; the nearest is embedding_head; the fields are",
    )


def test_a_misspelt_term_of_a_stage_is_refused_by_name(refused, dataset, tmp_path):
    recipe = tmp_path / "recipe.py"
    text = (ROOT / "configs" / "f2_multitask.py").read_text()
    recipe.write_text(text.replace('"soft_f":', '"soft_f2":'))
    words = (f"--config={recipe}", *train_words(dataset, tmp_path / "run")[1:])
    refused(words, "term 'soft_f2' does not exist; the nearest is soft_f; use")


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        (lambda data: None, "is not a folder; prepare a dataset there first"),
        (lambda data: data.mkdir(), "has no dataset_info.json"),
        (output_in_use, "has no dataset_info.json"),
    ],
)
def test_a_data_folder_without_a_dataset_is_refused(refused, tmp_path, make, pattern):
    data = tmp_path / "data"
    make(tmp_path / "x" if make is output_in_use else data)
    refused(train_words(data, tmp_path / "run"), pattern)


def test_a_preparation_that_was_interrupted_is_told(refused, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "preparation.json").write_text('{"fingerprint": ""}')
    refused(
        train_words(tmp_path / "data", tmp_path / "run"), "did not finish; run it again"
    )


def test_data_that_is_not_drawn_needs_a_folder(refused, tmp_path):
    words = [f"{RECIPE}:emoji", f"--workdir={tmp_path / 'run'}"]
    refused(words, "config.data.directory is empty.*prepare --help.*--data_dir")


def test_the_embedded_dataset_is_not_drawn_over_something_else(refused, tmp_path):
    output_in_use(tmp_path / "x")
    words = [RECIPE, f"--data_dir={tmp_path / 'data'}", f"--workdir={tmp_path / 'r'}"]
    refused(words, "contains something other than toy_regions")


@pytest.mark.parametrize("fraction", ["0.001", "0.0", "1.0"])
def test_a_validation_fraction_that_leaves_nothing_is_refused(
    refused, dataset, tmp_path, fraction
):
    override = f"--config.data.validation_fraction={fraction}"
    words = train_words(dataset, tmp_path / "run", override)
    refused(words, f"validation_fraction={fraction}.*(fraction closer|use a value in)")


def test_an_embedding_longer_than_there_are_labels_is_refused(
    refused, dataset, tmp_path
):
    words = train_words(dataset, tmp_path / "run", "--config.label_embedding.dim=99")
    refused(words, "dim.*99.*3")


# A trained run as training leaves it, with initial parameters.


def fresh_state(plan, step, sharding):
    """Returns a state of numbers from NumPy, which needs no compilation."""
    rng = np.random.default_rng(step)

    def fresh(key):
        params, batch_stats = plan.init(key)
        return new_state(
            params=params,
            batch_stats=batch_stats,
            optimizer=plan.settings.optimizer,
            step=step,
            with_average=False,
        )

    def fill(leaf):
        return np.asarray(rng.uniform(0.1, 0.2, leaf.shape)).astype(leaf.dtype)

    shapes = jax.eval_shape(fresh, jax.random.key(0))
    return jax.device_put(jax.tree.map(fill, shapes), sharding)


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    workdir = Workdir(tmp_path_factory.mktemp("trained") / "run")
    argv = ["jaxii", *train_words(dataset, workdir.path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        config = config_of(dispatch.parse("train", argv))
    run = begin(config, workdir)
    for step, plan in enumerate(run.plans, start=1):
        state = fresh_state(plan, step, replicated(run.mesh))
        save_checkpoint(run, plan.stage.name, step, state, first_step=step - 1)
    run.checkpoints.close()
    return workdir.path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(13):
        encoded = small_layout.jpeg(20 + 15 * i)
        cut = len(encoded) // 2 if i == 4 else len(encoded)
        (folder / f"photo{i:02d}.jpg").write_bytes(encoded[:cut])
    return folder


def predict_words(workdir, photos, *more):
    return "predict", f"--workdir={workdir}", f"--images={photos}", *more


def test_predict_before_evaluate_is_refused(refused, trained, photos):
    if (trained / "metrics.json").exists():
        pytest.skip("evaluated already: run in the file's order")
    refused(
        predict_words(trained, photos),
        "metrics.json does not exist.*run evaluate",
        folder=trained,
    )


def test_compare_of_a_run_that_was_not_evaluated_is_refused(refused, tmp_path):
    refused(["compare", tmp_path], "metrics.json does not exist.*first")
    refused(["compare", tmp_path / "none"], "none is not a workdir; give the folder")


@pytest.mark.parametrize("command", ["evaluate", "predict", "hold_out"])
def test_a_folder_without_a_run_is_refused(refused, photos, tmp_path, command):
    words = [command, f"--workdir={tmp_path}"]
    words += [f"--images={photos}"] if command == "predict" else []
    refused(words, "is not the folder of a run")


def test_a_run_that_was_never_trained_is_refused(refused, dataset, trained, tmp_path):
    for name in ("config.json", "labels.csv", "label_embedding.npz"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    refused(["evaluate", f"--workdir={tmp_path}"], "no checkpoint yet; train first")


def test_a_workdir_of_another_configuration_is_refused(refused, dataset, trained):
    words = train_words(dataset, trained, "--config.seed=4")
    refused(words, r"another configuration \(seed: 0 -> 4\)", folder=trained)


def test_a_workdir_in_which_another_process_trains_is_refused(
    refused, dataset, trained
):
    with held(trained):
        refused(
            train_words(dataset, trained),
            r"run is in use by process \d+ on .* since",
            folder=trained,
        )


def test_one_batch_again_and_again_does_not_go_on_with_a_real_run(
    refused, dataset, trained
):
    words = train_words(dataset, trained, "--config.data.reuse_batch=True")
    refused(words, "data.reuse_batch: False -> True", trained)


def test_a_workdir_of_other_labels_is_refused(refused, trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    files = small_layout.write(tmp_path / "files", num_train=24)
    small_layout.lines(
        files / "classes-trainable.csv", "label_code", "/m/dog", "/m/cat", "/m/boat"
    )
    words = train_words(prepared_from(files), copy)
    refused(words, "trained on labels .* use the data it was", folder=copy)


def test_a_stage_that_was_not_trained_is_refused(refused, trained):
    words = ["evaluate", f"--workdir={trained}", "--stage=bonus"]
    refused(
        words,
        "--stage=bonus has no checkpoint; use one of multitask, classifier",
        trained,
    )


def test_asked_to_stop_in_the_final_evaluation_it_exits_75_and_resumes(
    run, dataset, trained, tmp_path, monkeypatch
):
    copy = shutil.copytree(trained, tmp_path / "copy")
    (copy / "metrics.json").unlink(missing_ok=True)
    answers = iter([False, True])
    with monkeypatch.context() as patch:
        patch.setattr(
            processes, "preemption_notice", lambda: lambda step: next(answers)
        )
        code, _, errors = run(*train_words(dataset, copy))
    assert code == 75
    assert errors == (
        "jaxii: training is complete, but the evaluation was stopped; run the same "
        "command again to resume.\n"
    )
    assert not (copy / "metrics.json").exists()
    assert run(*train_words(dataset, copy))[0] == 0
    assert (copy / "metrics.json").exists()


@pytest.fixture(scope="module")
def evaluated(trained):
    """The trained run, evaluated by the command."""
    evaluation.evaluate(
        Workdir(trained), data_dir="", stage="multitask", tune_on="validation"
    )
    return trained


def test_evaluate_leaves_figures_report_and_submission(evaluated):
    assert json.loads((evaluated / "metrics.json").read_text())["splits"]
    names = {path.name for path in evaluated.iterdir()}
    assert {"report.html", "submission.csv", "label_figures.csv"} <= names
    assert not [name for name in names if name.endswith(".part")]


def test_an_evaluation_that_could_not_be_kept_is_not_begun(
    refused, evaluated, monkeypatch
):
    monkeypatch.setattr(os, "access", lambda path, mode: path != evaluated)
    words = ["evaluate", f"--workdir={evaluated}"]
    for more in ([], ["--images=configs"]):
        refused([*words, *more], "run is read-only, but .* copy the folder", evaluated)


def test_the_files_of_an_evaluation_agree_on_slices_labels_and_images(evaluated):
    metrics = json.loads((evaluated / "metrics.json").read_text())
    labels = by_label.load(evaluated / by_label.FILE)
    assert list(labels.splits) == list(metrics["splits"])
    for split, whole in metrics["splits"].items():
        for entry in (whole, *whole["slices"].values()):
            low, high = entry["interval"]
            assert 0 <= low <= entry["f2"] + 1e-9
            assert entry["f2"] - 1e-9 <= high <= 1
        figures = labels.splits[split]
        mean = np.nanmean(figures.average_precision)
        assert mean == pytest.approx(whole["map"], abs=1e-5)
        per_image = figures.support.sum() / whole["num_images"]
        assert per_image == pytest.approx(whole["labels_per_image_true"])
    page = (evaluated / "report.html").read_text()
    num_images = list(metrics["splits"].values())[-1]["num_images"]
    assert page.count('src="data:image/jpeg;base64,') == min(num_images, 18)
    assert "was not recorded" in page


def test_an_evaluation_that_ends_between_its_files_is_not_used(
    run, refused, evaluated, photos, tmp_path, monkeypatch
):
    copy = shutil.copytree(evaluated, tmp_path / "copy")
    metrics = (copy / "metrics.json").read_bytes()

    def killed(path, value):
        raise RuntimeError(path.name)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="metrics"):
        patch.setattr("jaxii.runs.results.write_json", killed)
        run("evaluate", f"--workdir={copy}", "--stage=classifier")
    assert (copy / "metrics.json").read_bytes() == metrics
    for words in (
        predict_words(copy, photos),
        ["export", f"--workdir={copy}", f"--output={tmp_path / 'exported'}"],
        ["compare", copy],
    ):
        refused(words, r"evaluation.json is missing; run .?evaluate.? .* again")


@pytest.mark.parametrize("decoder", NAMES)
def test_predict_writes_a_row_for_every_image(
    run, evaluated, photos, tmp_path, decoder
):
    output = tmp_path / "answers.csv"
    words = (f"--decoder={decoder}", f"--output={output}")
    code, text, errors = run(*predict_words(evaluated, photos, *words))
    assert code == 0
    assert errors.splitlines() == [
        "damaged  photo04.jpg: truncated or damaged JPEG (no image header)"
    ]
    header, *rows = output.read_text().splitlines()
    assert header == "image_id,labels"
    assert [row.split(",")[0] for row in rows] == sorted(
        p.stem for p in photos.iterdir()
    )
    assert all(row.split(",")[1] for row in rows)
    assert "13 images, 1 of them damaged (predicted as the most frequent" in text
    assert f"decoder {decoder}" in text
    constant = json.loads((evaluated / "metrics.json").read_text())["constant"]
    assert rows[4] == f"photo04,{' '.join(constant['labels'])}"


@pytest.mark.parametrize("decoder", NAMES)
def test_images_of_which_none_can_be_read_are_refused(
    refused, evaluated, tmp_path, decoder
):
    for i in range(9):
        (tmp_path / f"{i}.jpg").write_bytes(b"version https://git-lfs.github.com")
    words = f"--output={tmp_path / 'a.csv'}", f"--decoder={decoder}"
    refused(
        predict_words(evaluated, tmp_path, *words),
        "none of the 9 images can be read.*a Git LFS pointer.*nothing was written",
    )


def test_mixed_files_get_a_row_each_and_the_damaged_are_named(run, evaluated, tmp_path):
    scene = Image.fromarray(np.arange(3 * 60 * 80, dtype=np.uint8).reshape(60, 80, 3))
    files = tmp_path / "files"
    written = mixed_images.write(files, [scene], 60, 12)
    damaged = [one.name for one in written if one.is_damaged]
    output, page = tmp_path / "a.jsonl", tmp_path / "a.html"
    words = f"--output={output}", f"--sheet={page}"
    code, text, errors = run(*predict_words(evaluated, files, *words))
    assert code == 0
    assert "60 images, 12 of them damaged; decoder expected_f2" in text
    lines = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert [line["file"] for line in lines] == [one.name for one in written]
    assert [line["file"] for line in lines if "error" in line] == damaged
    assert all(line["labels"] or "error" in line for line in lines)
    assert len([line for line in errors.splitlines() if "damaged  " in line]) == 12
    assert page.read_text("utf-8").count("<img") == 48

    backwards = [f"files/{one.name}" for one in reversed(written)]
    with (tmp_path / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path"], *([name] for name in backwards)])
    output = tmp_path / "b.jsonl"
    words = "--decoder=top_k", f"--output={output}"
    code, text, _ = run(*predict_words(evaluated, tmp_path / "list.csv", *words))
    lines = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert [line["file"] for line in lines] == backwards
    assert sum("error" in line for line in lines) == 12


def test_a_shell_may_have_made_words_of_a_pattern(run, evaluated, photos, tmp_path):
    page = tmp_path / "a.html"
    words = [photos / f"photo{i:02d}.jpg" for i in (3, 2, 0)]
    code, text, _ = run(*predict_words(evaluated, *words, f"--sheet={page}"))
    assert code == 0 and "3 images, 0 of them damaged" in text
    names = re.findall(r"photo\d\d.jpg</bdi></p>", page.read_text("utf-8"))
    assert [name[5:7] for name in names] == ["03", "02", "00"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


def test_predict_closes_the_checkpoints_that_it_opens(
    run, evaluated, photos, tmp_path, monkeypatch
):
    opened, closed = [], []
    make, close = Checkpoints.__init__, Checkpoints.close

    def note(where, act):
        def noted(self, *args, **kwargs):
            where.append(id(self))
            return act(self, *args, **kwargs)

        return noted

    monkeypatch.setattr(Checkpoints, "__init__", note(opened, make))
    monkeypatch.setattr(Checkpoints, "close", note(closed, close))
    code, *_ = run(*predict_words(evaluated, photos, f"--output={tmp_path / 'a.csv'}"))
    assert (code, opened) == (0, closed) and opened
    code, *_ = run(*predict_words(evaluated, photos, "--decoder=embedding"))
    assert opened == closed


def test_processes_that_find_other_images_are_refused(
    refused, evaluated, photos, monkeypatch
):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        processes.multihost_utils,
        "process_allgather",
        lambda own: np.stack([own, own ^ 1]),
    )
    refused(
        predict_words(evaluated, photos),
        "the images are different on process 1 than on process 0",
        folder=evaluated,
    )


def test_predict_refuses_decoders_from_before_training_went_on(
    refused, evaluated, photos, tmp_path
):
    copy = shutil.copytree(evaluated, tmp_path / "copy")
    metrics = json.loads((copy / "metrics.json").read_text()) | {"step": 0}
    (copy / "metrics.json").write_text(json.dumps(metrics))
    seal(copy)
    words = predict_words(copy, photos, f"--output={tmp_path / 'a.csv'}")
    refused(words, "fitted on step 0 of stage multitask.* run evaluate")


def test_the_decoder_in_use_makes_the_result_and_later_answers(
    run, evaluated, photos, tmp_path
):
    copy = shutil.copytree(evaluated, tmp_path / "copy")
    code, text, _ = run("evaluate", f"--workdir={copy}", "--decoder=expected_f2")
    assert code == 0 and "* expected_f2" in text
    metrics = json.loads((copy / "metrics.json").read_text())
    assert metrics["decoder"]["name"] == "expected_f2"
    assert metrics["provenance"]["calibration"]["labels"] == ["validation"]
    for figures in metrics["splits"].values():
        assert figures["f2"] == figures["decoders"]["expected_f2"]["f2"]
    output = f"--output={tmp_path / 'answers.csv'}"
    _, text, _ = run(*predict_words(copy, photos, output))
    assert "decoder expected_f2;" in text


def test_the_embedding_decoder_needs_a_stage_with_the_head(
    refused, evaluated, photos, tmp_path
):
    copy = shutil.copytree(evaluated, tmp_path / "copy")
    metrics = json.loads((copy / "metrics.json").read_text())
    with Run.open(copy, "classifier") as other:
        metrics |= {"member_hashes": [other.checkpoint_hash]}
    metrics |= {"stage": "classifier", "step": 2}
    (copy / "metrics.json").write_text(json.dumps(metrics))
    seal(copy)
    words = predict_words(copy, photos, "--decoder=embedding")
    refused(words, "needs the embedding head.*earlier --stage", folder=copy)


def test_images_may_be_given_without_a_flag(refused, evaluated):
    words = ["predict", f"--workdir={evaluated}", "none.jpg"]
    refused(words, "--images=none.jpg is not a file or a folder", folder=evaluated)


@pytest.mark.parametrize(
    ("more", "pattern"),
    [
        (["--images=none"], "--images=none is not a file or a folder"),
        (
            ["--images=configs"],
            "--images=configs contains no images; supported file endings are",
        ),
        (["--ids=none.csv"], "--ids=none.csv is not a file"),
        (
            ["--stage=multitask"],
            "predict does not take --stage; .* evaluate, adapt, plan",
        ),
        (["--output=configs"], "--output=configs is a folder"),
        (["--sheet=configs"], "--sheet=configs is a folder"),
        (["--output=a.txt"], "--output=a.txt does not end in .csv or .jsonl"),
        (["--output=a.csv", "--sheet=a.csv"], "--output and --sheet are both a.csv"),
        (["--output=LICENSE/a.csv"], "LICENSE/a.csv cannot be written"),
    ],
)
def test_a_prediction_that_cannot_be_is_refused(
    refused, evaluated, photos, more, pattern
):
    refused(predict_words(evaluated, photos, *more), pattern, folder=evaluated)


def test_checkpoints_of_other_labels_are_refused(refused, evaluated, photos, tmp_path):
    copy = shutil.copytree(evaluated, tmp_path / "copy")
    small_layout.lines(
        copy / "labels.csv", "label_code,description", "/m/a,A", "/m/b,B", "/m/c,C"
    )
    refused(predict_words(copy, photos), "labels.csv is damaged or was replaced")


def test_tuning_needs_a_split_of_that_name(run, refused, tmp_path, trained):
    files = small_layout.write(tmp_path / "files", num_train=24)
    (files / "tuning_labels.csv").unlink()
    data = prepared_from(files)
    copy = shutil.copytree(trained, tmp_path / "copy")
    words = ["evaluate", f"--workdir={copy}", f"--data_dir={data}"]
    words += ["--tune_on=tuning", "--allow_tuning_labels"]
    # The first call records the new location of the data.
    run(*words)
    refused(
        words,
        "has no images in split 'tuning'; splits with images: train",
    )


def test_a_test_without_labels_gets_a_submission_and_no_figures(run, tmp_path, trained):
    files = small_layout.write(tmp_path / "files", num_train=24)
    (files / "tuning_labels.csv").unlink()
    copy = shutil.copytree(trained, tmp_path / "copy")
    for path in copy.glob("submission*"):
        path.unlink()
    words = ("evaluate", f"--workdir={copy}", f"--data_dir={prepared_from(files)}")
    code, _, errors = run(*words)
    assert (code, errors) == (0, "")
    metrics = json.loads((copy / "metrics.json").read_text())
    assert list(metrics["splits"]) == ["validation"]
    rows = (copy / "submission.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == ["test0", "test1", "test2"]


# Full disks.


@pytest.fixture
def full(run, without_space):
    """Checks that `jaxii WORDS` ends with 1 and one line if a file has no space."""

    def full(path, *words):
        before = path.read_bytes() if path.exists() else None
        path.parent.mkdir(parents=True, exist_ok=True)
        with without_space(path):
            code, _, errors = run(*words)
        assert (code, errors) == (
            1,
            f"jaxii: {path}: No space left on device; free up disk space, then run the "
            "command again.\n",
        )
        assert before == (path.read_bytes() if path.exists() else None)

    return full


@pytest.mark.parametrize(
    "name", ["decoders.npz", "metrics.json", "label_figures.csv", "report.html"]
)
def test_an_evaluation_without_space_names_its_file(full, evaluated, tmp_path, name):
    copy = shutil.copytree(evaluated, tmp_path / "copy")
    full(copy / name, "evaluate", f"--workdir={copy}", "--stage=multitask")


@pytest.mark.parametrize("name", ["answers.csv", "answers.jsonl"])
def test_answers_without_space_name_their_file(full, evaluated, photos, tmp_path, name):
    output = tmp_path / name
    full(output, *predict_words(evaluated, photos, f"--output={output}"))


def test_a_page_of_runs_without_space_names_its_file(full, evaluated, tmp_path):
    full(tmp_path / "a.html", "compare", evaluated, f"--output={tmp_path / 'a.html'}")


@pytest.mark.parametrize("name", ["labels.csv", "config.json", "seen_images.npz"])
def test_a_training_without_space_names_its_file(full, dataset, tmp_path, name):
    full(tmp_path / "run" / name, *train_words(dataset, tmp_path / "run"))


@pytest.mark.parametrize(
    "name",
    [
        *("counts.json", "index-train.parquet", "labels.csv"),
        "labelled_images-train.array_record-00000-of-00001",
    ],
)
def test_a_preparation_without_space_names_its_file_and_goes_on(run, full, files, name):
    # Started before, because the folder of a new preparation has to be empty.
    data = files.parent / "data"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr("jaxii.prepare.build._write", Mock(side_effect=RuntimeError))
        run(*prepare_words(files))
    full(data / name, *prepare_words(files))
    assert run(*prepare_words(files))[0] == 0


@pytest.mark.slow
def test_two_interrupts_while_images_are_written_cost_nothing(run, tmp_path):
    files = small_layout.write(tmp_path / "files", num_train=4000)
    words, data = prepare_words(files), tmp_path / "data"
    command = [sys.executable, "-m", "jaxii.main", *words]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) as process:
        while not list(data.glob(".labelled_images-train*.part")):
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (-signal.SIGINT, b"jaxii: interrupted.\n")
    assert not list(data.glob("labelled_images-train*"))
    assert run(*words)[0] == 0
    assert run(*words[:-1], f"--data_dir={tmp_path / 'undisturbed'}")[0] == 0
    left, right = (
        {path.name: path.read_bytes() for path in folder.iterdir()}
        for folder in (data, tmp_path / "undisturbed")
    )
    assert left == right


# `new` and `doctor`; test_new.py and test_doctor.py test what they do.


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["new"], "new needs one name.*not none"),
        (["new", "a", "b"], "new needs one name.*not a b"),
        (["new", "a:b"], "of letters, digits"),
        (["new", "mine"], "--images is missing"),
        (["new", "mine", "--images=gs://b/photos"], "gcsfs|in a bucket"),
        (["new", "mine", "--images=no", "--label_separator=spce"], "nearest is space"),
        (["doctor", "here"], "doctor takes flags only, not 'here'"),
        (["doctor", "--data_dir=x"], "--data_dir requires a recipe"),
        (["predict", "--decoder=tresholds"], "the nearest is threshold; see --help"),
        (["--config=configs/f2_multitaks.py"], "nearest is configs/f2_multitask.py"),
    ],
)
def test_new_and_doctor_and_near_names_refuse_in_one_line(refused, words, pattern):
    refused(words, pattern)


def test_a_folder_that_is_mistyped_is_answered_with_the_one_there_is(refused, tmp_path):
    (tmp_path / "photos").mkdir()
    words = ["new", "mine", f"--images={tmp_path / 'fotos'}"]
    refused(words, f"does not exist; the nearest is {tmp_path / 'photos'}")


def test_new_writes_a_recipe_that_the_command_line_loads(run, tmp_path, monkeypatch):
    # test_speed tests the timing of the step.
    pace = Pace(images_per_second=100.0, start_seconds=1.0)
    monkeypatch.setattr(speed, "pace_of", lambda fields: pace)
    plain_data.spaces(tmp_path, [(small_layout.jpeg(9), ["a", "b"])] * 12)
    words = ("--images=" + str(tmp_path / "photos"), f"--labels={tmp_path}/labels.csv")
    code, said, errors = run(
        "new", tmp_path / "mine", *words, "--label_separator=space"
    )
    assert (code, errors) == (0, "")
    assert "--label_separator" not in said.split("\nnext\n")[1]
    code, _, errors = run("train", f"--config={tmp_path}/mine/mine.py")
    assert code == 2
    # The recipe and its data are read; one image is too few for a validation split.
    assert "validation_fraction=0.4 of the 1 training groups leaves no" in errors


def test_names_in_ones_own_data_reach_no_terminal_as_commands(
    run, tmp_path, monkeypatch
):
    pace = Pace(images_per_second=100.0, start_seconds=1.0)
    monkeypatch.setattr(speed, "pace_of", lambda fields: pace)
    (tmp_path / "photos").mkdir()
    rows = [["path", f"label{HOSTILE}", "domain", "slice", f"{HOSTILE}\n"]]
    for i in range(12):
        small_layout.put(tmp_path / "photos", f"{HOSTILE}{i}", small_layout.jpeg(9 * i))
        name = f"{HOSTILE}{i}.jpg" if i else f"{HOSTILE}none.jpg"
        rows.append([name, f"{HOSTILE} {i % 2}", HOSTILE, HOSTILE, HOSTILE])
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    words = f"--images={tmp_path / 'photos'}", f"--labels={tmp_path / 'labels.csv'}"
    said = []
    for more in ([], [f"--label_column=label{HOSTILE}"]):
        said += run("new", tmp_path / "mine", *words, *more)
    assert said[0] == 2 and said[3] == 0, said
    assert r"te\x1b[31mst" in said[1] + said[2] and r"te\x1b[31mst" in said[4]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", "".join(map(str, said)))


def test_doctor_ends_with_1_where_something_is_broken(run, monkeypatch):
    def fail(config, place):
        raise CheckFailed("problems found: 1; see the BROKEN lines above.")

    monkeypatch.setattr(doctor, "doctor", fail)
    code, _, errors = run("doctor")
    assert code == 1
    assert errors == "jaxii: problems found: 1; see the BROKEN lines above.\n"
