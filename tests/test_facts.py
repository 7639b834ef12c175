"""What runs are compared by is flat, and every field is there."""

import json

from jaxii.config import Config
from jaxii.runs.train import COMPARED
from jaxii.train.telemetry.facts import flat

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
