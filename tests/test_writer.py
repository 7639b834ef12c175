"""Tests the embedded dataset: its files, its statistics and its reproducibility."""

import csv
import hashlib
import json
import os
from collections import Counter, defaultdict
from functools import cache

import cv2
import numpy as np
import pytest

from jaxii.errors import InputError
from jaxii.prepare.toy_regions import scenes, shapes, writer
from jaxii.prepare.toy_regions.annotators import label_code

SMALL = {"num_train": 60, "num_tuning": 5, "num_test": 12}
CODES = {label_code(name): name for name in scenes.LABELS}


def read(path, *, header=True):
    with path.open(newline="") as file:
        return list(csv.reader(file))[header:]


def digest(directory):
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return writer.write(tmp_path_factory.mktemp("toy") / "small", **SMALL)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """The files for 4,000 / 200 / 1,000 images, without the images."""
    directory = tmp_path_factory.mktemp("toy") / "labelled"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "_draw", lambda image, seed: b"")
        return writer.write(directory)


def human_labels(directory):
    table = defaultdict(set)
    for image_id, _, code, confidence in read(directory / "train_human_labels.csv"):
        assert confidence == "1"
        if code in CODES:
            table[image_id].add(CODES[code])
    return table


@cache
def true_labels(split, count):
    return {
        image.image_id: set(scenes.labels(image.scene))
        for image in writer._plan(split, count, 0)
    }


def solution(directory):
    rows = read(directory / "truth" / "solution.csv")
    return [{CODES[code] for code in labels.split()} for _, labels in rows]


def test_the_layout_is_complete(small):
    names = {path.name for path in small.iterdir()}
    assert names == {
        "train", "stage_1_test_images", "truth", "train_human_labels.csv",
        "train_machine_labels.csv", "train_bounding_boxes.csv", "train_meta.csv",
        "class-descriptions.csv", "classes-trainable.csv", "tuning_labels.csv",
        "stage_1_sample_submission.csv", "toy_regions.json",
    }  # fmt: skip
    assert len(list((small / "train" / "images").glob("*.jpg"))) == 60
    assert len(list((small / "stage_1_test_images").glob("*.jpg"))) == 17
    assert len(read(small / "tuning_labels.csv", header=False)) == 5
    assert len(read(small / "stage_1_sample_submission.csv")) == 12


def test_every_listed_image_exists_and_decodes(small):
    listed = [row[0] for row in read(small / "train_meta.csv")]
    other = [row[0] for row in read(small / "truth" / "test_meta.csv")]
    paths = [small / "train" / "images" / f"{name}.jpg" for name in listed]
    paths += [small / "stage_1_test_images" / f"{name}.jpg" for name in other]
    assert len(set(paths)) == 77
    for path in paths:
        image = cv2.imread(str(path))
        assert min(image.shape[:2]) == 96 and image.std() > 5


def test_the_same_seed_gives_the_same_bytes(small, tmp_path):
    again = writer.write(tmp_path / "again", **SMALL)
    assert digest(again) == digest(small)


def test_another_seed_gives_other_images(small, tmp_path):
    other = writer.write(tmp_path / "other", seed=1, **SMALL)
    names = {path.name for path in (small / "train" / "images").iterdir()}
    assert not names & {path.name for path in (other / "train" / "images").iterdir()}


def test_a_larger_dataset_begins_with_the_smaller_one(small, tmp_path):
    more = writer.write(tmp_path / "more", num_train=70, num_tuning=5, num_test=12)
    both = read(more / "train_human_labels.csv"), read(small / "train_human_labels.csv")
    assert both[0][: len(both[1])] == both[1]
    old, new = digest(small / "train"), digest(more / "train")
    assert old.items() <= new.items()


def test_a_second_call_draws_nothing(small, monkeypatch):
    monkeypatch.setattr(writer, "_write_all", None)
    assert writer.write(small, **SMALL) == small


def test_a_directory_with_something_else_is_refused(small, tmp_path):
    with pytest.raises(InputError, match="another directory"):
        writer.write(small, num_train=61, num_tuning=5, num_test=12)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="something other than"):
        writer.write(tmp_path, **SMALL)
    assert (tmp_path / "mine.txt").exists()


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(image, seed):
        raise OSError("disk full")

    monkeypatch.setattr(writer, "_draw", fail)
    with pytest.raises(OSError, match="disk full"):
        writer.write(tmp_path / "toy", **SMALL)
    assert not list(tmp_path.iterdir())


def test_an_empty_directory_is_filled(tmp_path):
    writer.write(tmp_path, num_train=2, num_tuning=1, num_test=1)
    made_with = json.loads((tmp_path / "toy_regions.json").read_text())
    assert made_with["num_images"] == {"train": 2, "tuning": 1, "test": 1}


def test_the_files_are_as_open_as_the_umask_says(tmp_path):
    old = os.umask(0o027)
    try:
        writer.write(tmp_path / "toy", num_train=1, num_tuning=1, num_test=1)
    finally:
        os.umask(old)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {0o640, 0o750}


def test_progress_counts_every_image(tmp_path):
    calls = []
    writer.write(
        tmp_path / "toy", num_train=3, num_tuning=1, num_test=2,
        on_progress=lambda *call: calls.append(call),
    )  # fmt: skip
    assert [call[:2] for call in calls] == [(done, 6) for done in range(1, 7)]


def test_train_images_have_about_four_labels_and_test_images_two_and_a_half(labelled):
    human = human_labels(labelled)
    assert len(human) == 4000
    assert 3.9 < np.mean([len(labels) for labels in human.values()]) < 4.5
    assert 2.2 < np.mean([len(labels) for labels in solution(labelled)]) < 2.6


def test_human_labels_are_true_and_a_quarter_is_missing(labelled):
    human, true = human_labels(labelled), true_labels("train", 4000)
    assert all(human[image_id] <= true[image_id] for image_id in true)
    noted = sum(len(labels) for labels in human.values())
    assert 0.2 < 1 - noted / sum(len(labels) for labels in true.values()) < 0.3


def test_machine_confidences_tell_true_from_false_and_find_missing_labels(labelled):
    human, true = human_labels(labelled), true_labels("train", 4000)
    right, wrong, recovered = [], [], 0
    for image_id, _, code, confidence in read(labelled / "train_machine_labels.csv"):
        label = CODES[code]
        (right if label in true[image_id] else wrong).append(float(confidence))
        recovered += label in true[image_id] - human[image_id]
    assert all(0.0 < confidence < 1.0 for confidence in right + wrong)
    assert np.mean(right) > np.mean(wrong) + 0.2
    assert len(wrong) > 2000 and recovered > 2000


def test_every_class_is_described_and_some_described_ones_are_not_trainable(labelled):
    trainable = [row[0] for row in read(labelled / "classes-trainable.csv")]
    described = dict(read(labelled / "class-descriptions.csv"))
    assert len(trainable) == len(set(trainable)) == 60
    assert set(trainable) < set(described)
    assert len(set(described.values())) < len(described)


def test_the_frequencies_have_a_long_tail_but_no_rare_class(labelled):
    counts = Counter(x for labels in human_labels(labelled).values() for x in labels)
    assert len(counts) == 60
    assert min(counts.values()) >= 30
    assert max(counts.values()) >= 15 * min(counts.values())
    assert max(counts.values()) < 0.3 * 4000


def test_boats_go_with_water_and_imply_a_vehicle():
    true = true_labels("train", 2000).values()
    boats = [labels for labels in true if "Boat" in labels]
    assert all("Vehicle" in labels for labels in boats)
    assert np.mean(["Water" in labels for labels in boats]) > 0.8
    assert np.mean(["Water" in labels for labels in true]) < 0.4


def test_no_constant_answer_is_strong_on_the_test(labelled):
    truth = solution(labelled)

    def f2(answer):
        return np.mean(
            [5 * len(answer & t) / (4 * len(t) + len(answer)) for t in truth]
        )

    answer, best = set(), 0.0
    while True:
        score, label = max((f2(answer | {name}), name) for name in scenes.LABELS)
        if score <= best:
            break
        answer, best = answer | {label}, score
    assert 0.1 < best < 0.35


def test_domains_of_train_and_test_are_different_and_slices_name_the_quality(labelled):
    train = read(labelled / "train_meta.csv")
    test = read(labelled / "truth" / "test_meta.csv")
    assert {row[2] for row in train} == {"north", "east", "west"}
    assert {row[1] for row in test} == {"south", "islands"}
    slices = Counter(row[2] for row in test)
    assert len(slices) == 6 and min(slices.values()) > 100
    assert all(row[2].split("/")[0] == row[1] for row in test)


def test_some_scenes_are_seen_twice_with_the_same_true_labels(labelled):
    groups = defaultdict(list)
    for image_id, group, *_ in read(labelled / "train_meta.csv"):
        groups[group].append(image_id)
    sizes = Counter(map(len, groups.values()))
    assert set(sizes) == {1, 2} and sizes[2] > 400
    true = true_labels("train", 4000)
    assert all(true[ids[0]] == true[ids[-1]] for ids in groups.values())


def test_boxes_lie_within_the_image_and_name_what_is_there(labelled):
    true = true_labels("train", 4000)
    rows = read(labelled / "train_bounding_boxes.csv")
    assert len(rows) > 2000
    for image_id, _, code, _, *numbers in rows:
        left, right, top, bottom = map(float, numbers[:4])
        assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
        assert CODES[code] in true[image_id]


@pytest.mark.parametrize("name", shapes.NAMES)
def test_a_drawing_stays_in_its_frame(name):
    for variant in range(2):
        points = np.vstack([s.points for s in shapes.drawing(name, variant)])
        assert np.abs(points).max() <= 1.05
        assert np.ptp(points, axis=0).min() > 0.5


def test_every_object_appears_in_some_table():
    tables = (*scenes.ON_GROUND.values(), *scenes.IN_SKY.values())
    assert set().union(*tables) == set(shapes.NAMES)


def test_files_that_are_drawn_again_have_the_same_times(small, tmp_path):
    again = writer.write(tmp_path / "again", **SMALL)
    times = [
        [path.stat().st_mtime_ns for path in sorted(folder.rglob("*.jpg"))]
        for folder in (small, again)
    ]
    assert times[0] and times[0] == times[1]
