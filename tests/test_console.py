"""What a person who waits is told: how far, how fast, how long yet."""

import pytest

from jaxii import console


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
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


def test_a_warning_goes_to_stderr_unless_another_process_tells(monkeypatch, capsys):
    monkeypatch.setattr(console, "_muted", False)
    console.warn("damaged  a.jpg")
    monkeypatch.setattr(console, "_muted", True)
    console.warn("damaged  b.jpg")
    assert capsys.readouterr() == ("", "damaged  a.jpg\n")
