"""Tests the progress shown to users: counts, speed and remaining time."""

import ast
import io
import subprocess
import sys
from pathlib import Path

import pytest

from jaxii import console


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(console, "_muted", False)
    return now


def test_lines_of_a_log_have_rate_and_time_left(clock, capsys):
    with console.progress() as move:
        for seconds, done in ((0, 64), (5, 500), (12, 664), (30, 1864), (31, 2000)):
            clock[0] = 100.0 + seconds
            move(done, 2000, "predict")
    assert capsys.readouterr().out.splitlines() == [
        "predict  64/2000",
        "predict  664/2000  50/s  0:00:27 left",
        "predict  1864/2000  60/s  0:00:02 left",
        "predict  2000/2000  62/s",
    ]


def test_slow_work_has_a_rate_too(clock, capsys):
    with console.progress() as move:
        move(0, 4, "train without a")
        clock[0] += 20
        move(1, 4, "train without a")
    assert "1/4  0.1/s  0:01:00 left" in capsys.readouterr().out


def test_work_that_is_done_at_once_has_no_rate(clock, capsys):
    with console.progress() as move:
        move(3, 3, "predict")
    assert capsys.readouterr().out == "predict  3/3\n"


def test_work_that_is_reported_all_at_once_has_no_rate(clock, capsys):
    with console.progress() as move:
        move(1, 100, "files hashed")
        clock[0] += 0.001
        move(100, 100, "files hashed")
    assert capsys.readouterr().out.splitlines()[-1] == "files hashed  100/100"


def test_a_bar_has_a_rate_only_after_a_while(clock, monkeypatch):
    bars = console.Progress(console._RateColumn(), get_time=lambda: clock[0])
    task = bars.add_task("predict", total=100)
    for seconds, done in ((0.1, 10), (0.2, 50), (2.0, 80)):
        clock[0] = 100.0 + seconds
        bars.update(task, completed=done)
        shown = console._RateColumn().render(bars.tasks[0]).plain
        assert bool(shown) == (seconds > 1)


def test_a_second_pass_has_its_own_rate(clock, capsys):
    with console.progress() as move:
        for seconds, done in ((0, 64), (20, 100), (500, 64), (520, 84)):
            clock[0] = 100.0 + seconds
            move(done, 100, "adapt to test")
    assert capsys.readouterr().out.splitlines() == [
        "adapt to test  64/100",
        "adapt to test  100/100  1.8/s",
        "adapt to test  64/100",
        "adapt to test  84/100  1.0/s  0:00:16 left",
    ]


def test_a_warning_goes_to_stderr_unless_another_process_tells(monkeypatch, capsys):
    monkeypatch.setattr(console, "_muted", False)
    console.warn("damaged  a.jpg")
    monkeypatch.setattr(console, "_muted", True)
    console.warn("damaged  b.jpg")
    assert capsys.readouterr() == ("", "damaged  a.jpg\n")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\nb\x1b[31m", "a\\nb\\x1b[31m"),
        ("\x9b31m\u2028", "\\x9b31m\\u2028"),
        ("x\u202egpj.exe", "x\\u202egpj.exe"),
        ("\udcff", "\\udcff"),
        ("صورة 👩‍🚀 cafe\u0301 <b>", "صورة 👩‍🚀 cafe\u0301 <b>"),
    ],
)
def test_what_a_terminal_would_obey_or_not_show_is_escaped(monkeypatch, name, shown):
    monkeypatch.setattr(console, "_muted", False)
    for tell, stream in ((console.say, "stdout"), (console.warn, "stderr")):
        monkeypatch.setattr(sys, stream, io.StringIO())
        tell(f"{name} 1")
        assert getattr(sys, stream).getvalue() == f"{shown} 1\n"
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with console.progress() as move:
        move(3, 3, name)
    assert sys.stdout.getvalue() == f"{shown}  3/3\n"


def test_only_what_escapes_prints():
    package = Path(console.__file__).parent
    printing = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    }
    # The help contains no user data.
    assert printing == {"console.py", "cli/dispatch.py"}


def test_work_goes_on_when_nobody_reads_its_output_any_more():
    work = (
        "import sys; from jaxii.console import say; say('one'); sys.stdin.read(1); "
        "say('two'); say('three'); sys.exit(7)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", work],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout.readline() == b"one\n"
        process.stdout.close()
        process.stdin.write(b".")
        process.stdin.close()
        assert (process.wait(), process.stderr.read()) == (7, b"")


def test_an_output_without_space_is_told_as_such():
    with Path("/dev/full").open("w") as full:
        with pytest.raises(OSError, match="No space left on device: 'the output'"):
            console.write_line("text", full)
        console.write_line("what is left would fail again", full)
