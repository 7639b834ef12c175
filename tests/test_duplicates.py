"""Tests images in two splits (dropped from one) and two groups (which are joined)."""

import json

import pytest
import small_layout
from small_layout import lines

from jaxii.data.dataset import open_dataset
from jaxii.errors import InputError
from jaxii.prepare import build, shards
from jaxii.prepare.duplicates import IN_OTHER_GROUPS
from jaxii.prepare.kaggle import Layout, prepare

# Notes of train, validation and test if no file is duplicated.
NOTES = [{"labels"}, {"labels"}, {"labels", "listed in stage_1_sample_submission.csv"}]


@pytest.fixture
def root(tmp_path):
    return small_layout.write(tmp_path / "kaggle")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "prepared"


def copy(root, source, *names):
    """Gives images the file of another."""
    for name in names:
        folder = "train/part_0" if name.startswith("train") else "stage_1_test_images"
        (root / folder / f"{name}.jpg").write_bytes(source)


def ids(out, split):
    return open_dataset(out).splits[split].index.image_ids.tolist()


# The same id.


def test_a_training_image_that_is_also_in_test_or_tuning_is_dropped_and_counted(
    root, out
):
    copy(root, small_layout.jpeg(1), "train00", "train03")
    lines(root / "tuning_labels.csv", "tune0,/m/cat", "train03,/m/boat")
    rows = "test0,", "train00.jpg,", "train01,"
    lines(root / "stage_1_sample_submission.csv", "image_id,labels", *rows)
    (root / "stage_1_test_images" / "train00.jpg").write_bytes(small_layout.jpeg(2))
    tally = prepare(Layout.find(root), out).split("train")
    assert tally.dropped == {
        "without a label": 0,
        "also in tuning": 1,
        "also in test": 2,
    }
    assert tally.examples["also in test"] == ("train00", "train01")
    assert tally.read == tally.kept + sum(tally.dropped.values())
    assert ids(out, "train") == ["train02", "train04", "train05"]
    assert ids(out, "test") == ["test0", "train00"]


def test_a_listed_validation_image_that_is_also_in_test_is_dropped(root, out):
    lines(root / "validation_ids.csv", "image_id", "train00", "train01")
    lines(root / "stage_1_sample_submission.csv", "image_id,labels", "train01,")
    tally = prepare(Layout.find(root), out).split("validation")
    assert (tally.kept, tally.dropped["also in test"]) == (1, 1)


def test_a_test_of_all_training_images_is_refused(root, out):
    rows = [f"train{i:02d}," for i in range(6)]
    lines(root / "stage_1_sample_submission.csv", "image_id,labels", *rows)
    with pytest.raises(InputError, match=r"no training image is left .*6 also in test"):
        prepare(Layout.find(root), out)


# Groups.


def test_a_group_that_is_listed_in_part_is_validation_as_a_whole(root, out):
    rows = "train00,one", "train01,one", "train02,two", "train03,one"
    lines(root / "train_meta.csv", "image_id,group", *rows)
    path = lines(root / "validation_ids.csv", "image_id", "train01", "train05")
    tally = prepare(Layout.find(root), out).file(path.name)
    assert (tally.read, tally.kept) == (2, 2)
    note = "other images of a listed group, also taken"
    assert tally.notes[note] == 2
    assert tally.examples[note] == ("train00", "train03")
    assert ids(out, "validation") == ["train00", "train01", "train03", "train05"]
    assert ids(out, "train") == ["train02", "train04"]


# The same file.


def test_a_training_image_with_a_file_of_the_test_is_dropped_and_named(root, out):
    copy(root, small_layout.jpeg(3), "train01", "train04", "test2", "tune0")
    counts = prepare(Layout.find(root), out)
    tally = counts.split("train")
    assert (tally.read, tally.kept) == (6, 4)
    assert tally.dropped["identical to a file of test"] == 2
    assert tally.examples["identical to a file of test"] == (
        "train01 = test2",
        "train04 = test2",
    )
    assert counts.split("tuning").notes["identical to a file of test"] == 1
    line = next(line for line in counts.lines() if line.startswith("train:"))
    assert "2 identical to a file of test (train01 = test2, train04 = test2)" in line
    assert ids(out, "train") == ["train00", "train02", "train03", "train05"]
    dataset = open_dataset(out)
    records = dataset.splits["train"].source
    assert [records[i]["image_id"] for i in range(4)] == ids(out, "train")
    assert ids(out, "test") == ["test0", "test1", "test2"]


def test_a_training_image_with_a_file_of_a_listed_validation_is_dropped(root, out):
    copy(root, small_layout.jpeg(3), "train01", "train04")
    lines(root / "validation_ids.csv", "image_id", "train04")
    tally = prepare(Layout.find(root), out).split("train")
    assert tally.examples["identical to a file of validation"] == ("train01 = train04",)
    assert "train01" not in ids(out, "train")
    assert ids(out, "validation") == ["train04"]


def test_a_validation_image_with_a_file_of_the_test_is_dropped(root, out):
    copy(root, small_layout.jpeg(3), "train04", "test0")
    lines(root / "validation_ids.csv", "image_id", "train03", "train04")
    prepare(Layout.find(root), out)
    assert ids(out, "validation") == ["train03"]


def test_a_training_set_that_is_all_in_the_test_is_refused(root, out):
    names = [f"train{i:02d}" for i in range(6)]
    copy(root, small_layout.jpeg(3), *names, "test0")
    with pytest.raises(InputError, match=r"no training image is left.*6 identical"):
        prepare(Layout.find(root), out)


def test_identical_files_are_in_one_group_so_that_no_split_divides_them(root, out):
    copy(root, small_layout.jpeg(3), "train01", "train04")
    copy(root, small_layout.jpeg(4), "train02", "train05")
    copy(root, small_layout.jpeg(5), "train00", "train03")
    rows = "train02,one", "train05,one", "train04,b", "train00,b", "train03,a"
    lines(root / "train_meta.csv", "image_id,group", *rows)
    tally = prepare(Layout.find(root), out).split("train")
    assert tally.notes[IN_OTHER_GROUPS] == 2
    assert tally.examples[IN_OTHER_GROUPS] == (
        "train03 = train00",
        "train04 = train01",
    )
    groups = open_dataset(out).splits["train"].index.groups.tolist()
    assert groups == ["a", "a", "one", "a", "a", "one"]


def test_different_files_are_not_counted(root, out):
    counts = prepare(Layout.find(root), out)
    assert [set(tally.notes) for tally in counts.splits] == NOTES


def test_unreadable_files_are_identical_to_none(root, out):
    copy(root, b"", "train01", "train04", "test2")
    counts = prepare(Layout.find(root), out)
    assert [set(tally.notes) for tally in counts.splits] == NOTES
    assert counts.split("train").dropped["unreadable"] == 2


def test_an_interrupted_preparation_leaves_out_what_a_whole_one_does(
    root, out, tmp_path, monkeypatch
):
    monkeypatch.setattr(shards, "SHARD_IMAGES", 2)
    copy(root, small_layout.jpeg(3), "train01", "test2")
    copy(root, b"", "train02")

    def interrupt(done, total, what):
        if what == "tuning":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(Layout.find(root), out, on_progress=interrupt)
    account = next(out.glob("*train.array_record-00001-of-00003.json"))
    assert [len(d) for d in json.loads(account.read_text())["digests"]] == [0, 32]
    # Interrupts again after images have been left out.
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build, "complete", raise_interrupt)
        prepare(Layout.find(root), out)
    counts = prepare(Layout.find(root), out)
    assert counts == prepare(Layout.find(root), tmp_path / "undisturbed")
    assert counts.split("train").dropped["identical to a file of test"] == 1
    assert counts.split("train").dropped["unreadable"] == 1
    hashes = [
        open_dataset(each).content_hash for each in (out, tmp_path / "undisturbed")
    ]
    assert hashes[0] == hashes[1]


def raise_interrupt(*args):
    raise KeyboardInterrupt


def test_shards_that_are_rewritten_are_shown_as_progress(root, out, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_IMAGES", 2)
    copy(root, small_layout.jpeg(3), "train01", "train04", "test2")
    seen = {}
    prepare(
        Layout.find(root),
        out,
        on_progress=lambda done, total, what: seen.update({what: (done, total)}),
    )
    # Two of the three shards.
    assert seen["train without copies"] == (4, 4)


def test_an_image_is_written_again_once_it_is_to_stay(root, out, monkeypatch):
    plans, results = [], []
    write = shards.write

    def noted(output, plan, **how):
        plans.append(plan)
        results.append(write(output, plan, **how))
        return results[-1]

    monkeypatch.setattr(shards, "SHARD_IMAGES", 2)
    monkeypatch.setattr(shards, "write", noted)
    prepare(Layout.find(root), out)
    without = shards.leave_out(
        out, plans[0], results[0], {1: "a", 4: "b"}, short_side=256
    )
    assert without.faults == {1: "a", 4: "b"}
    again = shards.leave_out(out, plans[0], without, {4: "b"}, short_side=256)
    assert again.faults == {4: "b"}
    assert again.shard_lengths == [2, 2, 1]
