"""Tests TensorBoard's files by reading their framing, without TensorFlow."""

import time
import xml.etree.ElementTree as ElementTree

import cv2
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from jaxii.train.telemetry.images import Images
from jaxii.train.telemetry.tensorboard import TensorBoard, as_markdown, as_table
from jaxii.train.telemetry.trackers import Facts

FACTS = Facts(
    name="run",
    settings={
        "optimizer.peak_lr": 0.05,
        "data.mirror": True,
        "model.variant": "resnet",
    },
    about={"data": "a|b <script>alert(1)</script>", "provenance f2": "clean"},
)
HOSTILE = {
    "script": "<script>alert('x')</script>",
    "image": '<img src=x onerror="alert(1)">',
    "link": "[dog](javascript:alert(1)) **bold** `code` _under_ # head",
    "table": "a | b",
    "entity": "&lt;b&gt; &amp;",
    "emoji": "👩🏽‍💻 dog",
    "Hebrew": "כלב (dog)",
    "lines": "one\ntwo",
}


def read_events(directory):
    """Returns the events of all files; their framing is length, crc, payload, crc."""
    events = []
    for path in sorted(directory.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            event = Event()
            event.ParseFromString(data[at + 12 : at + 12 + length])
            events.append(event)
            at += length + 16
    return events


def values(workdir):
    return [
        (value.tag, event.step, value)
        for event in read_events(workdir / "tensorboard")
        for value in event.summary.value
    ]


def value_of(workdir, tag):
    return next(value for name, _, value in values(workdir) if name == tag)


def hparams(workdir, tag):
    value = value_of(workdir, f"_hparams_/{tag}")
    assert value.metadata.plugin_data.plugin_name == "hparams"
    data = HParamsPluginData()
    data.ParseFromString(value.metadata.plugin_data.content)
    return getattr(data, tag)


def write(workdir, start_step=0, steps=(10,)):
    tracker = TensorBoard(workdir, FACTS, start_step=start_step)
    for step in steps:
        tracker.scalars(step, {"train/objective": 2.5, "validation/f2": 0.25})
    return tracker


def test_curves_hold_the_scalars(tmp_path):
    write(tmp_path).close()
    found = {(tag, step): value.simple_value for tag, step, value in values(tmp_path)}
    assert found["train/objective", 10] == 2.5
    assert found["validation/f2", 10] == 0.25


def test_what_is_flushed_can_be_read_while_the_run_goes_on(tmp_path):
    tracker = write(tmp_path)
    tracker.flush()
    assert ("train/objective", 10) in [(tag, step) for tag, step, _ in values(tmp_path)]
    tracker.close()


def test_a_resumed_run_purges_what_came_after_its_step_and_a_first_one_nothing(
    tmp_path,
):
    write(tmp_path, steps=(10, 20, 30)).close()
    write(tmp_path, start_step=20, steps=(30,)).close()
    events = read_events(tmp_path / "tensorboard")
    assert [e.step for e in events if e.HasField("session_log")] == [21]


def test_files_are_read_in_their_order_though_the_clock_was_set_back(
    tmp_path, monkeypatch
):
    for i in range(12):
        monkeypatch.setattr(time, "time", lambda i=i: 2e9 - 1e8 * i)
        write(tmp_path, start_step=10 * i, steps=(10 * i + 10,)).close()
    steps = [step for tag, step, _ in values(tmp_path) if tag == "train/objective"]
    assert steps == list(range(10, 130, 10))


def test_runs_can_be_compared_by_their_settings_and_result(tmp_path):
    tracker = write(tmp_path)
    tracker.result(40, {"result/validation/f2": 0.6, "result/test/f2": 0.4})
    tracker.close()
    experiment = hparams(tmp_path, "experiment")
    assert {info.name for info in experiment.hparam_infos} == set(FACTS.settings)
    metrics = [info.name.tag for info in experiment.metric_infos]
    assert metrics == ["result/validation/f2", "result/test/f2"]
    settings = hparams(tmp_path, "session_start_info").hparams
    assert settings["optimizer.peak_lr"].number_value == 0.05
    assert settings["data.mirror"].bool_value is True
    assert settings["model.variant"].string_value == "resnet"
    assert hparams(tmp_path, "session_end_info").status == 1
    result = value_of(tmp_path, "result/test/f2").simple_value
    assert result == pytest.approx(0.4)


def test_a_run_without_a_result_has_no_end_yet(tmp_path):
    write(tmp_path).close()
    tags = {tag for tag, _, _ in values(tmp_path)}
    assert "_hparams_/session_start_info" in tags
    assert "_hparams_/session_end_info" not in tags


def test_losses_and_weights_by_term_are_laid_out_side_by_side(tmp_path):
    write(tmp_path).close()
    layout = value_of(tmp_path, "custom_scalars__config__").tensor.string_val[0]
    assert rb"train/loss/.*" in layout
    assert rb"train/weight/.*" in layout


def test_images_come_back_pixel_by_pixel_with_their_labels(tmp_path):
    tracker = write(tmp_path)
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    images = Images(pixels, ("dog, cat", HOSTILE["script"]))
    tracker.images(7, "train/f2", images)
    tracker.close()
    image = value_of(tmp_path, "train/f2").image
    assert (image.height, image.width) == (4, 6)
    encoded = np.frombuffer(image.encoded_image_string, np.uint8)
    np.testing.assert_array_equal(cv2.imdecode(encoded, 1)[..., ::-1], pixels)
    text = value_of(tmp_path, "train/f2/text_summary").tensor.string_val[0].decode()
    assert "| 1 | dog&#44; cat |" in text
    assert "<script>" not in text


def test_the_facts_of_a_run_are_a_table_without_markup(tmp_path):
    write(tmp_path).close()
    text = value_of(tmp_path, "run/text_summary").tensor.string_val[0].decode()
    assert "| provenance f2 | clean |" in text
    assert "<" not in text
    assert text.count("|") == 4 * 3


@pytest.mark.parametrize("name", HOSTILE)
def test_any_text_is_shown_as_it_is_by_tensorboard(name):
    plugin_util = pytest.importorskip("tensorboard.plugin_util")
    html = plugin_util.markdown_to_safe_html(as_table({name: HOSTILE[name]}, ("", "")))
    cells = list(ElementTree.fromstring(html).iter("td"))
    assert len(cells) == 2
    assert len(cells[1]) == 0, "an element where there is to be text"
    shown = HOSTILE[name].replace("\n", "\\u000a")
    assert cells[1].text.strip("\u2068\u2069") == shown


def test_text_from_right_to_left_does_not_reorder_its_neighbours():
    assert as_markdown("כלב") == "\u2068כלב\u2069"
    assert as_markdown("dog") == "dog"


def test_what_reorders_or_cannot_be_encoded_is_spelt_out():
    assert as_markdown("a\u202eb") == "a&#92;u202eb"
    assert as_markdown("a\u2069b") == "a&#92;u2069b"
    assert as_markdown("caf\udce9") == "caf&#92;udce9"
