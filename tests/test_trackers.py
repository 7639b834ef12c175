"""Tests that trackers run beside the training, in order, without disturbing it."""

import json
import sys
import threading
import time
from typing import get_args, get_type_hints

import numpy as np
import pytest

from jaxii.config import Config
from jaxii.errors import InputError
from jaxii.runs.train import COMPARED
from jaxii.train.telemetry import trackers as tracking
from jaxii.train.telemetry.images import Images
from jaxii.train.telemetry.services import SERVICES, check_tracker, open_trackers
from jaxii.train.telemetry.trackers import Facts, Trackers, flat

PIXELS = np.zeros((2, 3, 3), np.uint8)


class Recorder:
    """A tracker that keeps its inputs in order; on request, it waits or fails."""

    def __init__(self, *, gate=None, fails=()):
        self.told, self.threads = [], set()
        self._gate, self._fails = gate, fails

    def _take(self, *entry):
        if self._gate is not None:
            self._gate.wait(10.0)
        self.told.append(entry)
        self.threads.add(threading.current_thread())
        if entry[0] in self._fails:
            raise ConnectionError("nobody answers.\nat all")

    def scalars(self, step, values):
        self._take("scalars", step, values)

    def images(self, step, name, images):
        self._take("images", step, name, images.pixels.shape, images.captions)

    def result(self, step, figures):
        self._take("result", step, figures)

    def flush(self):
        self._take("flush")

    def close(self):
        self._take("close")


def tell(trackers):
    trackers.scalars(1, {"train/objective": 2.0})
    trackers.images(1, "images/f2", Images(PIXELS, ("dog",)))
    trackers.flush()
    trackers.result(2, {"result/test/f2": 0.5})


TOLD = [
    ("scalars", 1, {"train/objective": 2.0}),
    ("images", 1, "images/f2", (2, 3, 3), ("dog",)),
    ("flush",),
    ("result", 2, {"result/test/f2": 0.5}),
    ("close",),
]


def test_every_tracker_is_told_everything_in_order_and_closed():
    one, other, said = Recorder(), Recorder(), []
    with Trackers({"one": lambda: one, "other": lambda: other}, said.append) as both:
        tell(both)
    assert one.told == other.told == TOLD
    assert said == []


def test_a_tracker_is_called_in_one_thread_of_its_own():
    one, other = Recorder(), Recorder()
    with Trackers({"one": lambda: one, "other": lambda: other}, print) as both:
        tell(both)
    assert len(one.threads) == len(other.threads) == 1
    assert one.threads != other.threads
    assert threading.current_thread() not in one.threads | other.threads


def test_what_fails_is_said_once_and_the_rest_is_still_handed_over():
    broken, sound, said = Recorder(fails=("scalars", "flush", "close")), Recorder(), []
    makers = {"broken": lambda: broken, "sound": lambda: sound}
    with Trackers(makers, said.append) as trackers:
        tell(trackers)
    assert broken.told == sound.told == TOLD
    (line,) = said
    assert line.startswith("broken: ConnectionError: nobody answers. Training cont")


def test_a_tracker_that_cannot_be_opened_is_tried_again_at_the_next_entry():
    recorder, said, tries = Recorder(), [], []

    def make():
        tries.append(1)
        if len(tries) < 3:
            raise ConnectionError("not yet")
        return recorder

    with Trackers({"late": make}, said.append) as trackers:
        tell(trackers)
    assert recorder.told == TOLD[1:]
    assert len(said) == 1


def test_a_tracker_that_hangs_holds_nobody_up_and_its_loss_is_said(monkeypatch):
    monkeypatch.setattr(tracking, "MOST_WAITING", 10)
    gate, said = threading.Event(), []
    slow, quick = Recorder(gate=gate), Recorder()
    makers = {"slow": lambda: slow, "quick": lambda: quick}
    begun = time.monotonic()
    trackers = Trackers(makers, said.append, close_seconds=0.2)
    for done in range(1, 6):
        tell(trackers)
        # A tracker that keeps up loses nothing.
        while len(quick.told) < 4 * done:
            time.sleep(0.001)
    trackers.close()
    trackers.close()
    assert time.monotonic() - begun < 5.0
    assert slow.told == []
    assert quick.told == TOLD[:4] * 5 + TOLD[4:]
    assert len(said) == 2
    assert said[0].startswith("slow: too slow; some values were dropped")
    assert said[1].startswith("slow: some values were not sent in time")
    gate.set()


def test_a_tracker_is_opened_before_the_first_entry():
    opened = threading.Event()

    def make():
        opened.set()
        return Recorder()

    with Trackers({"one": make}, print):
        assert opened.wait(10.0)


def test_tensorboard_is_always_there(tmp_path):
    facts = Facts(name="run", settings={"seed": 0}, about={"data": "here"})
    said = []
    with open_trackers(tmp_path, facts, warn=said.append) as trackers:
        tell(trackers)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    assert said == []


def test_the_services_are_those_that_a_configuration_can_name():
    assert get_args(get_type_hints(Config)["track"]) == ("", *SERVICES)
    check_tracker("")


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_that_is_not_installed_is_refused_with_what_to_install(
    service, monkeypatch
):
    monkeypatch.setitem(sys.modules, service, None)
    with pytest.raises(InputError, match=rf"pip install 'jaxii\[{service}\]'"):
        check_tracker(service)


FIELDS = {
    "seed": 3,
    "data": {"mirror": True, "size": [2, 4]},
    "stages": [
        {"name": "warm", "terms": {"bce": 1.0}, "num_epochs": 2.0},
        {"name": "main", "terms": {"bce": {"weight": 0.5}}},
    ],
}


def test_every_field_has_its_place_and_a_stage_goes_by_its_name():
    assert flat(FIELDS) == {
        "seed": 3,
        "data.mirror": True,
        "data.size": "[2, 4]",
        "stages": "warm, main",
        "stages.warm.terms": json.dumps({"bce": 1.0}),
        "stages.warm.num_epochs": 2.0,
        "stages.main.terms": json.dumps({"bce": {"weight": 0.5}}),
    }


def test_fields_that_are_compared_come_first():
    assert list(flat(FIELDS, ["stages", "absent", "seed"]))[:2] == ["stages", "seed"]


def test_what_train_compares_by_are_fields_of_a_configuration():
    stage = {"name": "only", "terms": {"bce": 1.0}, "num_steps": 2}
    config = Config.resolve({"stages": [stage]})
    fields = flat(config.to_dict(), COMPARED)
    assert tuple(fields)[: len(COMPARED)] == COMPARED
