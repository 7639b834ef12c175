"""Tests that a result is clean only if no held-out label or image was used."""

import json
from dataclasses import replace

import pytest

from jaxii.errors import InputError
from jaxii.evaluation.provenance import (
    PARTS,
    Influence,
    Provenance,
    provenance_by_stage,
)
from jaxii.train.stages import Stage

HOME = (
    Provenance(label_hash="0123456789abcdef")
    .with_("weights", labels=["train"])
    .with_("label_embedding", labels=["train"])
    .with_("model_selection", labels=["validation"])
    .with_("thresholds", labels=["validation"])
)


def test_a_record_of_training_and_validation_data_is_clean():
    assert HOME.clean
    assert HOME.badge() == "clean"
    assert HOME.caveats() == []


def test_one_batch_again_and_again_is_no_result_and_is_not_forgotten():
    record = replace(HOME, one_batch=True)
    assert not record.clean
    assert record.badge() == "no result: one batch"
    assert "none of its figures is a result" in record.caveats()[0]
    assert Provenance.from_json(record.to_json()) == record
    assert HOME.union(record).one_batch
    assert record.with_("weights", labels=["train"]).one_batch
    assert "one_batch" not in HOME.to_json()


def test_changed_batch_sizes_stay_clean_and_are_said():
    one = replace(HOME, batch_sizes=("8 images, then 4 images after step 5",))
    assert one.clean
    assert one.badge() == "clean"
    assert one.caveats() == [
        "The weights were trained with batches of 8 images, then 4 images after step "
        "5; the configuration has only the last batch size."
    ]
    assert Provenance.from_json(json.loads(json.dumps(one.to_json()))) == one
    other = replace(HOME, batch_sizes=("16 images",))
    assert one.union(other).batch_sizes == ("16 images", *one.batch_sizes)
    assert HOME.union(one) == one
    assert "batch_sizes" not in HOME.to_json()


def test_an_empty_record_is_clean():
    assert Provenance().clean


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["labels", "images"])
@pytest.mark.parametrize("split", ["tuning", "test", "another_country"])
def test_any_touch_of_a_held_out_split_breaks_clean(part, kind, split):
    touched = HOME.with_(part, **{kind: [split]})
    assert not touched.clean
    assert split in touched.badge()
    assert part.replace("_", " ") in touched.badge()
    assert len(touched.caveats()) == 1
    assert PARTS[part] in touched.caveats()[0]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["labels", "images"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_home_splits_never_break_clean(part, kind, split):
    assert HOME.with_(part, **{kind: [split]}).clean


def test_the_badge_names_split_kind_and_parts():
    touched = (
        HOME.with_("thresholds", labels=["tuning"])
        .with_("weights", labels=["tuning"])
        .with_("weights", images=["test"])
    )
    assert touched.badge() == (
        "test images without labels: weights; tuning labels: weights, thresholds"
    )


def test_deriving_leaves_the_first_record_alone():
    HOME.with_("weights", labels=["tuning"])
    assert HOME.clean


def test_with_adds_to_what_a_part_already_saw():
    assert HOME.with_("weights", labels=["tuning"]).weights == Influence(
        labels=("train", "tuning")
    )


def test_order_and_repeats_do_not_matter():
    one = HOME.with_("weights", labels=["tuning", "test", "tuning"])
    other = HOME.with_("weights", labels=["test"]).with_("weights", labels=["tuning"])
    assert one == other


def test_pretrained_weights_stay_clean_and_are_said():
    pretrained = Provenance(pretrained="resnet50.safetensors")
    assert pretrained.clean
    assert "resnet50.safetensors" in pretrained.caveats()[0]


@pytest.mark.parametrize(
    "record",
    [
        Provenance(),
        HOME,
        HOME.with_("calibration", labels=["tuning"], images=["test"]),
        Provenance(pretrained="weights.npz"),
    ],
)
def test_a_record_survives_json(record):
    assert Provenance.from_json(json.loads(json.dumps(record.to_json()))) == record


def broken(**changes):
    return {**HOME.to_json(), **changes}


@pytest.mark.parametrize(
    ("record", "word"),
    [
        (broken(weight={}), "weight"),
        ({}, "^provenance has the keys one_batch; .* with .*clean"),
        ({k: v for k, v in HOME.to_json().items() if k != "thresholds"}, "thresholds"),
        (broken(weights={"labels": ["train"]}), "images"),
        (broken(weights={"labels": "train", "images": []}), "weights.labels"),
        (broken(weights={"labels": [3], "images": []}), "3"),
        (broken(weights=["train"]), "weights"),
        (broken(weights=None), "provenance.weights has the keys none"),
        (broken(clean=False), "clean"),
        (broken(clean=1), "clean"),
        (broken(thresholds={"labels": ["tuning"], "images": []}), "clean"),
        (broken(pretrained=None), "pretrained"),
    ],
)
def test_a_record_that_is_not_exact_is_refused_by_name(record, word):
    with pytest.raises(InputError, match=word) as caught:
        Provenance.from_json(record)
    assert "\n" not in str(caught.value)


def test_a_misspelt_part_is_refused():
    with pytest.raises(InputError, match=r"weigths.*model_selection"):
        HOME.with_("weigths", labels=["train"])


def test_splits_may_come_from_a_generator():
    made = HOME.with_("weights", labels=(s for s in ["tuning"]))
    assert made.weights.labels == ("train", "tuning")


def test_a_lone_string_is_not_taken_for_letters():
    with pytest.raises(InputError, match="list of names"):
        HOME.with_("weights", labels="train")


def test_the_union_has_what_either_had():
    one = HOME.with_("weights", labels=["tuning"])
    other = Provenance(pretrained="a.npz", label_hash=HOME.label_hash).with_(
        "calibration", images=["test"]
    )
    both = one.union(other)
    assert both == other.union(one)
    assert both.weights == Influence(labels=("train", "tuning"))
    assert both.calibration == Influence(images=("test",))
    assert (both.pretrained, both.label_hash) == ("a.npz", HOME.label_hash)
    assert not both.clean


def test_the_union_of_a_record_with_itself_is_that_record():
    record = Provenance(pretrained="a.npz", label_hash="1f").with_(
        "weights", labels=["train"], images=["test"]
    )
    assert record.union(record) == record


def test_records_of_other_labels_have_no_union():
    with pytest.raises(InputError, match=r"labels \(hashes 1f and 2e\)"):
        Provenance(label_hash="2e").union(Provenance(label_hash="1f"))


def test_the_caveats_are_whole_sentences():
    touched = (
        replace(HOME, one_batch=True, pretrained="a.npz")
        .with_("thresholds", labels=["tuning"])
        .with_("weights", labels=["tuning"], images=["test"])
        .with_("calibration", labels=["tuning"])
    )
    assert touched.caveats() == [
        "The weights were trained on a single batch repeatedly (reuse_batch); this "
        "measures speed, and none of its figures is a result.",
        "Images without labels of the test split shaped the weights; figures on test "
        "represent images that the model may see before it predicts them.",
        "Labels of the tuning split shaped the weights, calibrated the probabilities "
        "and chose the thresholds; figures on tuning do not represent unseen data, "
        "and no figure represents a domain without labels.",
        "The initial weights came from a.npz; this record does not cover the images "
        "they were trained on. The Inclusive Images Challenge forbids such weights.",
    ]


def test_a_stage_has_its_own_record_and_those_of_the_stages_before():
    def stage(name, **how):
        return Stage(name=name, terms={}, num_steps=1, **how)

    stages = [
        stage("both", embedding_head=True),
        stage("pure"),
        stage("tuned", split="tuning"),
    ]
    start = Provenance(pretrained="a.npz")
    found = provenance_by_stage(start, stages, "held_out")
    both = (
        start.with_("weights", labels=["train"])
        .with_("model_selection", labels=["held_out"])
        .with_("label_embedding", labels=["train"])
    )
    tuned = both.with_("weights", labels=["tuning"])
    assert found == {"both": both, "pure": both, "tuned": tuned}
    (pure,) = provenance_by_stage(start, [stage("pure")], "validation").values()
    assert pure.label_embedding == Influence()


def test_a_union_names_all_weights_and_data_once():
    one = Provenance(pretrained="a.npz", datasets=("2", "3"))
    other = Provenance(pretrained="b.npz", datasets=("1", "3"))
    both = one.union(other)
    assert (both.pretrained, both.datasets) == ("a.npz, b.npz", ("1", "2", "3"))
    assert both.label_hash == ""
