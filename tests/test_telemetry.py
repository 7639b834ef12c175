import io
import json
import math
import re

import numpy as np
import pytest
from etils import epath

from jaxii.errors import InputError
from jaxii.manifest import describe
from jaxii.storage import LOCK, held
from jaxii.train.telemetry.history import read_history
from jaxii.train.telemetry.images import Images
from jaxii.train.telemetry.telemetry import Telemetry, ThroughputMeter


class Clock:
    """A clock that advances only when a test sets it."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Terminal(io.StringIO):
    def isatty(self):
        return True


def open_telemetry(workdir, stream=None, clock=None, **changes):
    settings = {"total_steps": 600, "start_step": 0} | changes
    return Telemetry(
        workdir, stream=stream or io.StringIO(), clock=clock or Clock(), **settings
    )


def start(telemetry, name="multitask", first_step=0, num_steps=400, step=None):
    telemetry.start_stage(
        name, first_step=first_step, num_steps=num_steps, images_per_step=32, step=step
    )


@pytest.mark.parametrize(
    ("name", "value"), [("TERM", "dumb"), ("COLUMNS", "0"), ("TERM", "unknown")]
)
def test_a_terminal_that_cannot_draw_gets_lines(tmp_path, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    stream = Terminal()
    with open_telemetry(tmp_path, stream) as telemetry:
        start(telemetry)
        telemetry.log_train(20, {"objective": 1.0})
        telemetry.log_evaluation(20, {"validation/f2": 0.5})
        assert "step  20/600" in stream.getvalue()


def history(workdir):
    return read_history(workdir / "history.jsonl")


class Recorder:
    """A tracker that keeps its inputs in order."""

    def __init__(self):
        self.told = []

    def scalars(self, step, values):
        self.told.append(("scalars", step, dict(values)))

    def images(self, step, name, images):
        self.told.append(("images", step, name, images.captions))

    def result(self, step, figures):
        self.told.append(("result", step, dict(figures)))

    def flush(self):
        self.told.append(("flush",))

    def close(self):
        self.told.append(("close",))


def test_a_log_is_one_plain_line_where_there_is_no_terminal(tmp_path):
    stream, clock = io.StringIO(), Clock()
    with open_telemetry(tmp_path, stream, clock) as telemetry:
        start(telemetry)
        clock.sleep(8.0)
        telemetry.log_train(60, {"objective": 4.0})
        clock.sleep(10.0)
        telemetry.waited(0.2)
        telemetry.log_train(120, {"objective": 3.412})
    assert stream.getvalue().splitlines()[1] == (
        "multitask   step 120/600  objective 3.412     f2 -      images/s 192   "
        "  wait  2%  eta 1m20s"
    )


def test_plain_lines_of_one_stage_are_aligned(tmp_path):
    stream, clock = io.StringIO(), Clock()
    with open_telemetry(tmp_path, stream, clock) as telemetry:
        start(telemetry)
        for step, objective in ((5, 123.45678), (50, 0.5), (100, 1e-5)):
            clock.sleep(1.0)
            telemetry.log_train(step, {"objective": objective})
    columns = {line.index("  images/s") for line in stream.getvalue().splitlines()}
    assert len(columns) == 1


def test_plain_output_has_no_escape_codes_even_with_force_color(tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    with open_telemetry(tmp_path, stream) as telemetry:
        start(telemetry)
        telemetry.log_train(1, {"objective": 1.0})
        telemetry.note("[bold]a note[/bold]")
    assert "\x1b" not in stream.getvalue()
    assert "[bold]a note[/bold]" in stream.getvalue()


def log_on_a_terminal(tmp_path, monkeypatch, columns):
    """Returns the terminal after one evaluation and one log of a resumed stage."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    stream, clock = Terminal(), Clock()
    with open_telemetry(tmp_path, stream, clock) as telemetry:
        telemetry.start_stage(
            "multitask",
            first_step=0,
            num_steps=400,
            images_per_step=32,
            may_end_early=(True, True),
        )
        telemetry.saved(40)
        telemetry.log_evaluation(40, {"validation/f2": 0.41, "validation/map": 0.2})
        telemetry.log_evaluation(50, {"validation/f2": 0.33, "validation/map": 0.2})
        clock.sleep(1.0)
        telemetry.log_train(55, {"objective": 2.6})
        clock.sleep(5.0)
        telemetry.log_train(60, {"objective": 2.5, "skipped_steps": 3})
    return stream.getvalue().split("\x1b[2K")[-6:]


def test_a_terminal_shows_stage_and_run_figures_and_the_last_save(
    tmp_path, monkeypatch
):
    shown = "".join(log_on_a_terminal(tmp_path, monkeypatch, 120))
    for text in (
        "multitask",
        "60/400",
        "eta at most 5m40s",
        "whole run",
        "60/600",
        "eta at most 9m00s",
        "objective 2.5",
        "validation f2 0.330",
        "best 0.410 at step 40",
        "images/s 32",
        "input wait 0%",
        "saved 40, 6s ago",
        "skipped 3 non-finite updates",
    ):
        assert text in shown


@pytest.mark.parametrize("columns", [50, 60, 80])
def test_no_line_is_wider_than_the_terminal(tmp_path, monkeypatch, columns):
    lines = "".join(log_on_a_terminal(tmp_path, monkeypatch, columns)).split("\n")
    plain = [re.sub("\x1b[^A-Za-z]*[A-Za-z]|\r", "", line) for line in lines]
    assert any(line.startswith("whole run") for line in plain)
    assert any(line.endswith("validation/map 0.2") for line in plain)
    assert max(map(len, plain)) <= columns


def test_no_color_is_respected_on_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    with open_telemetry(tmp_path, stream) as telemetry:
        start(telemetry)
        telemetry.log_train(60, {"objective": 2.5})
    assert "\x1b[38;" not in stream.getvalue()
    assert "\x1b[3" not in stream.getvalue()


def test_a_square_bracket_in_a_note_is_printed_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with open_telemetry(tmp_path, stream) as telemetry:
        telemetry.note("kept [/m/0abc] as it is")
    assert "kept [/m/0abc] as it is" in stream.getvalue()


def test_an_evaluation_prints_its_figures_and_later_lines_show_its_f2(tmp_path):
    stream = io.StringIO()
    with open_telemetry(tmp_path, stream) as telemetry:
        start(telemetry)
        telemetry.log_evaluation(40, {"validation/f2": 0.4123, "validation/map": 0.3})
        telemetry.log_train(60, {"objective": 1.0})
    first, second = stream.getvalue().splitlines()
    assert first.endswith("step  40/600  validation/f2 0.4123  validation/map 0.3")
    assert "f2 0.412 " in second


def test_images_a_second_leave_evaluation_time_out():
    clock = Clock()
    meter = ThroughputMeter(clock)
    meter.open_window(10)
    clock.sleep(4.0)
    with meter.paused():
        clock.sleep(100.0)
    meter.waited(1.0)
    assert meter.close_window(30) == (pytest.approx(5.0), pytest.approx(0.25))


def test_each_window_is_measured_on_its_own():
    clock = Clock()
    meter = ThroughputMeter(clock)
    meter.open_window(0)
    meter.waited(1.0)
    clock.sleep(2.0)
    meter.close_window(10)
    clock.sleep(5.0)
    assert meter.close_window(20) == (pytest.approx(2.0), 0.0)


def test_batches_prefetched_in_an_evaluation_do_not_inflate_the_rate():
    clock = Clock()
    meter = ThroughputMeter(clock)
    meter.open_window(0)
    clock.sleep(30.0)
    meter.close_window(2)
    for step in range(3, 9):
        clock.sleep(1.0)
        meter.waited(0.5)
        assert meter.close_window(step) == (pytest.approx(1.0), pytest.approx(0.5))
    with meter.paused():
        clock.sleep(100.0)
    clock.sleep(0.01)
    rate, _ = meter.close_window(10)
    assert rate == pytest.approx(7 / 5.01)


def test_the_first_window_of_a_stage_is_not_added_to_others():
    clock = Clock()
    meter = ThroughputMeter(clock)
    for first_step in (0, 100):
        meter.open_window(first_step)
        clock.sleep(3.0)
        assert meter.close_window(first_step + 3)[0] == pytest.approx(1.0)
        clock.sleep(1.0)
        assert meter.close_window(first_step + 5)[0] == pytest.approx(2.0)


def test_time_is_left_out_also_when_the_evaluation_fails():
    clock = Clock()
    meter = ThroughputMeter(clock)
    meter.open_window(0)
    with pytest.raises(RuntimeError), meter.paused():
        clock.sleep(50.0)
        raise RuntimeError
    clock.sleep(1.0)
    assert meter.close_window(3)[0] == pytest.approx(3.0)


def test_the_eta_is_an_upper_bound_where_a_plateau_may_end_the_run(tmp_path):
    stream, clock = io.StringIO(), Clock()
    with open_telemetry(tmp_path, stream, clock, total_steps=30) as telemetry:
        telemetry.start_stage(
            "bce",
            first_step=0,
            num_steps=20,
            images_per_step=8,
            may_end_early=(False, True),
        )
        telemetry.log_train(10, {})
        clock.sleep(10.0)
        telemetry.log_train(20, {})
    first, second = stream.getvalue().splitlines()
    assert first.endswith("eta -")
    assert second.endswith("eta at most 10s")


def test_the_best_f2_is_remembered_when_a_run_is_resumed(tmp_path, monkeypatch):
    with open_telemetry(tmp_path) as telemetry:
        start(telemetry)
        for step, f2 in ((10, 0.5), (20, 0.4), (30, 0.9)):
            telemetry.log_evaluation(step, {"validation/f2": f2})
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    # Evaluations after the resumed step no longer count.
    with open_telemetry(tmp_path, stream, start_step=20) as telemetry:
        start(telemetry, step=20)
        telemetry.log_train(25, {"objective": 1.0})
    assert "validation f2 0.400  best 0.500 at step 10" in stream.getvalue()


def test_the_eta_does_not_count_the_compilation(tmp_path):
    stream, clock = io.StringIO(), Clock()
    with open_telemetry(tmp_path, stream, clock, total_steps=30) as telemetry:
        start(telemetry)
        clock.sleep(1000.0)
        telemetry.log_train(10, {})
        clock.sleep(10.0)
        telemetry.log_train(20, {})
    first, second = stream.getvalue().splitlines()
    assert first.endswith("eta -")
    assert second.endswith("eta 10s")


def test_a_resumed_stage_measures_from_the_step_it_resumed_at(tmp_path):
    clock = Clock()
    with open_telemetry(tmp_path, clock=clock, start_step=50) as telemetry:
        start(telemetry, step=50)
        clock.sleep(10.0)
        telemetry.log_train(60, {})
    assert history(tmp_path)[0]["images_per_second"] == pytest.approx(32.0)


def test_a_train_row_has_the_agreed_keys(tmp_path):
    with open_telemetry(tmp_path) as telemetry:
        start(telemetry, "finetune", first_step=100)
        telemetry.log_train(120, {"objective": 2.0, "loss/bce": 1.5})
    (row,) = history(tmp_path)
    assert row.pop("images_per_second") > 0
    assert row.pop("step_seconds") > 0
    assert row == {
        "kind": "train",
        "step": 120,
        "stage": "finetune",
        "stage_step": 20,
        "objective": 2.0,
        "loss/bce": 1.5,
        "input_wait_share": 0.0,
    }


def test_memory_and_the_share_of_the_peak_are_recorded_and_shown(tmp_path):
    stream, clock = io.StringIO(), Clock()
    more = {"memory": lambda: {"host_memory_bytes": 1.5 * 2**30}, "peak_flops": 100.0}
    with open_telemetry(tmp_path, stream, clock, **more) as telemetry:
        start(telemetry)
        assert telemetry.wants_flops
        telemetry.step_takes(20.0)
        assert not telemetry.wants_flops
        clock.sleep(4.0)
        telemetry.log_train(8, {"objective": 1.0})
        start(telemetry, "next", first_step=8)
        assert telemetry.wants_flops
    (row,) = history(tmp_path)
    assert row["mfu"] == pytest.approx(20.0 * 2 / 100.0)
    assert row["step_seconds"] == pytest.approx(0.5)
    assert row["host_memory_bytes"] == 1.5 * 2**30
    assert "mfu 40%  mem 1.5G" in stream.getvalue()


def test_where_no_peak_is_known_nobody_is_asked_for_operations(tmp_path):
    with open_telemetry(tmp_path) as telemetry:
        start(telemetry)
        assert not telemetry.wants_flops
        telemetry.log_train(8, {})
    assert "mfu" not in history(tmp_path)[0]


def test_a_row_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    with open_telemetry(tmp_path) as telemetry:
        start(telemetry)
        telemetry.log_evaluation(10, {"validation/f2": 0.5})
        assert history(tmp_path)[0]["validation/f2"] == 0.5


def test_a_metric_that_is_not_finite_is_json_null_and_reads_as_nan(tmp_path):
    with open_telemetry(tmp_path) as telemetry:
        start(telemetry)
        telemetry.log_train(10, {"objective": math.nan, "gradient_norm": math.inf})
    text = (tmp_path / "history.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["objective"] is None
    assert math.isnan(history(tmp_path)[0]["gradient_norm"])


def write_run(workdir, steps, start_step, value):
    with open_telemetry(workdir, start_step=start_step) as telemetry:
        start(telemetry, step=start_step)
        for step in steps:
            telemetry.log_train(step, {"objective": value})


def test_after_a_resume_later_rows_of_the_killed_run_no_longer_count(tmp_path):
    write_run(tmp_path, (10, 20, 30, 35), 0, 1.0)
    write_run(tmp_path, (30, 40), 20, 2.0)
    found = [(row["step"], row["objective"]) for row in history(tmp_path)]
    assert found == [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0)]


def test_of_a_kind_and_step_that_is_there_twice_the_last_counts(tmp_path):
    path = tmp_path / "history.jsonl"
    rows = [
        {"kind": "train", "step": 5, "objective": 1.0},
        {"kind": "evaluation", "step": 5, "validation/f2": 0.1},
        {"kind": "train", "step": 5, "objective": 2.0},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert sorted(read_history(path), key=lambda row: row["kind"]) == rows[1:]


def test_a_half_written_last_line_is_skipped_by_the_reader(tmp_path):
    write_run(tmp_path, (10,), 0, 1.0)
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert [row["step"] for row in history(tmp_path)] == [10]


def test_a_half_written_last_line_does_not_spoil_the_next(tmp_path):
    write_run(tmp_path, (10,), 0, 1.0)
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    write_run(tmp_path, (20,), 10, 1.0)
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert all(json.loads(line) for line in lines)
    assert [row["step"] for row in history(tmp_path)] == [10, 20]


def test_an_absent_history_has_no_rows(tmp_path):
    assert history(tmp_path) == []


def test_a_tracker_is_told_finite_figures_in_order_and_is_left_open(tmp_path):
    recorder = Recorder()
    with open_telemetry(tmp_path, tracker=recorder) as telemetry:
        start(telemetry, first_step=5)
        telemetry.images(Images(np.zeros((2, 2, 3), np.uint8), ("dog",)))
        telemetry.log_train(10, {"objective": 2.5, "gradient_norm": math.nan})
        telemetry.log_evaluation(10, {"validation/f2": 0.25})
    images, train, evaluation, flush = recorder.told
    assert images == ("images", 5, "images/multitask", ("dog",))
    assert train[:2] == ("scalars", 10)
    assert train[2]["train/objective"] == 2.5
    assert "train/gradient_norm" not in train[2]
    assert {"train/images_per_second", "train/input_wait_share"} < train[2].keys()
    assert evaluation == ("scalars", 10, {"validation/f2": 0.25})
    assert flush == ("flush",)


def test_only_the_lead_process_writes(tmp_path):
    stream = io.StringIO()
    workdir = tmp_path / "run"
    recorder = Recorder()
    with open_telemetry(workdir, stream, is_lead=False, tracker=recorder) as telemetry:
        start(telemetry)
        telemetry.images(Images(np.zeros((2, 2, 3), np.uint8), ("dog",)))
        with telemetry.paused():
            telemetry.log_evaluation(10, {"validation/f2": 0.25})
        telemetry.waited(1.0)
        telemetry.log_train(10, {"objective": 2.5})
        telemetry.saved(10)
        telemetry.note("unheard")
    assert stream.getvalue() == ""
    assert recorder.told == []
    assert not workdir.exists()


def test_closing_twice_and_logging_after_it_do_no_harm(tmp_path):
    telemetry = open_telemetry(tmp_path)
    start(telemetry)
    telemetry.close()
    telemetry.close()
    telemetry.log_train(10, {"objective": 1.0})
    assert history(tmp_path) == []


def test_what_is_said_of_the_history_is_what_is_on_disk(tmp_path):
    path = tmp_path / "history.jsonl"
    with open_telemetry(tmp_path) as telemetry:
        start(telemetry)
        telemetry.log_train(20, {"objective": 1.0})
        first = telemetry.history()
        assert first == describe(path)
        telemetry.log_train(40, {"objective": 0.5})
    with path.open("a") as file:
        file.write('{"kind": "tra')
    with open_telemetry(tmp_path, start_step=20) as telemetry:
        start(telemetry)
        telemetry.log_train(40, {"objective": 0.5})
        assert telemetry.history() == describe(path)
    assert describe(path, first.size_bytes) == first
    with open_telemetry(tmp_path, is_lead=False) as telemetry:
        assert telemetry.history() is None


@pytest.mark.parametrize("write", ["evaluation", "history", "close"])
def test_a_history_in_a_bucket_is_left_alone_when_another_run_has_begun(
    tmp_path, monkeypatch, write
):
    # Paths of etils stand in for a bucket.
    monkeypatch.setattr("jaxii.train.telemetry.telemetry.at", epath.Path)
    path, lock = tmp_path / "history.jsonl", tmp_path / LOCK
    refused = pytest.raises(InputError, match="taken over by process 1 on another host")
    with held(epath.Path(tmp_path)), open_telemetry(tmp_path) as telemetry:
        start(telemetry)
        telemetry.log_evaluation(10, {"validation/f2": 0.5})
        assert path.exists()
        lock.write_text("process 1 on another host")
        path.write_text("another run's")
        telemetry.log_train(20, {"objective": 1.0})
        if write == "evaluation":
            with refused:
                telemetry.log_evaluation(20, {"validation/f2": 0.5})
        if write == "history":
            with refused:
                telemetry.history()
    assert path.read_text() == "another run's"
