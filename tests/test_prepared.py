"""Tests resolved labels of whole splits, and the carved-out validation split."""

import dataclasses
import shutil

import numpy as np
import pytest
import small_layout

from jaxii.data import dataset
from jaxii.data.labels import BOX, HUMAN, MACHINE
from jaxii.data.prepared import Rows, open_prepared
from jaxii.errors import InputError
from jaxii.prepare import kaggle
from jaxii.prepare.label_files import read_codes
from jaxii.prepare.toy_regions import writer
from jaxii.prepare.toy_regions.writer import prepare_toy_regions

# 3 images: {0: present, 2: absent}, nothing, {1: machine 0.5, 2: 0.3, 0: present}
ROWS = Rows(
    offsets=np.array([0, 2, 2, 5]),
    label_ids=np.array([0, 2, 1, 2, 0], np.int32),
    confidences=np.array([1.0, 0.0, 0.5, 0.3, 1.0], np.float32),
)


def prepared(root, *, num_train=24, edit=None):
    """Prepares the small layout after `edit(folder)` has changed it."""
    files = small_layout.write(root / "files", num_train=num_train)
    if edit is not None:
        edit(files)
    kaggle.prepare(kaggle.Layout.find(files), root / "data", num_workers=1)
    return root / "data"


def opened(directory, **choice):
    choice = {
        "validation_fraction": 0.3,
        "machine_labels": "ignored",
        "machine_threshold": 0.5,
    } | choice
    return open_prepared(directory, **choice)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("prepared"))


def test_present_keeps_what_is_at_least_one_half_likely():
    offsets, label_ids = ROWS.present()
    np.testing.assert_array_equal(offsets, [0, 1, 1, 3])
    np.testing.assert_array_equal(label_ids, [0, 1, 0])


def test_present_is_what_a_loop_finds():
    rng = np.random.default_rng(1)
    lengths = rng.integers(0, 6, 50)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rows = Rows(
        offsets=offsets,
        label_ids=rng.integers(0, 9, offsets[-1]).astype(np.int32),
        confidences=rng.random(offsets[-1]).astype(np.float32),
    )
    starts, label_ids = rows.present()
    for i in range(50):
        one = slice(offsets[i], offsets[i + 1])
        expected = rows.label_ids[one][rows.confidences[one] >= 0.5]
        np.testing.assert_array_equal(label_ids[starts[i] : starts[i + 1]], expected)


def test_multi_hot_tells_what_is_present_and_what_is_listed():
    present, listed = ROWS.multi_hot(4)
    assert present.astype(int).tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
    assert listed.astype(int).tolist() == [[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 0]]


def test_class_counts_add_a_machines_confidence():
    np.testing.assert_allclose(ROWS.class_counts(4), [2.0, 0.5, 0.3, 0.0], atol=1e-6)


def test_most_labels_is_that_of_the_fullest_image():
    assert ROWS.most_labels() == 3
    none = np.zeros(0)
    empty = Rows(
        offsets=np.array([0]), label_ids=none.astype(np.int32), confidences=none
    )
    assert empty.most_labels() == 0


def test_an_image_is_scored_that_has_an_entry_though_of_an_absence():
    rows = Rows(
        offsets=np.array([0, 0, 2, 2, 3, 3]),
        label_ids=np.array([0, 2, 1], np.int32),
        confidences=np.array([1.0, 0.0, 0.0], np.float32),
    )
    assert rows.scored().tolist() == [False, True, False, True, False]
    kept = rows.of_scored()
    assert kept.offsets.tolist() == [0, 2, 3]
    starts, label_ids = kept.present()
    assert (starts.tolist(), label_ids.tolist()) == ([0, 1, 1], [0])


def test_machine_labels_alone_are_no_truth(tmp_path):
    def machine_only(files):
        (files / "train" / "extra.jpg").write_bytes(small_layout.jpeg(9))
        with (files / "train_machine_labels.csv").open("a") as file:
            file.write("extra,machine,/m/cat,0.9\n")
        rows = "image_id", "extra", "train01"
        small_layout.lines(files / "validation_ids.csv", *rows)

    data = opened(prepared(tmp_path, edit=machine_only))
    assert data.without_truth("validation") == 1
    data.check_truth("validation")
    alone = data.split("validation").select(np.array([0]))
    data = dataclasses.replace(data, splits={**data.splits, "validation": alone})
    assert not data.has_truth("validation")
    with pytest.raises(InputError, match="none of the 1 images in split 'validation'"):
        data.check_truth("validation")


def test_validation_is_carved_out_of_train_and_nothing_is_lost(directory):
    whole = dataset.open_dataset(directory).splits["train"]
    data = opened(directory)
    parts = [set(data.split(n).index.image_ids) for n in ("train", "validation")]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == set(whole.index.image_ids)
    assert data.split("train").num_examples + data.split("validation").num_examples == (
        whole.num_examples
    )


def test_train_rows_belong_to_what_is_left_of_train(directory):
    data = opened(directory)
    train = data.split("train")
    assert len(data.train_rows.offsets) == train.num_examples + 1
    # small_layout gives image i the label i % 3.
    expected = [int(image_id[-2:]) % 3 for image_id in train.index.image_ids]
    np.testing.assert_array_equal(data.train_rows.label_ids, expected)


def test_groups_are_never_divided(tmp_path):
    def in_groups_of_three(files):
        rows = [f"train{i:02d},pair{i // 3}" for i in range(30)]
        small_layout.lines(files / "train_meta.csv", "image_id,group", *rows)

    data = opened(prepared(tmp_path, num_train=30, edit=in_groups_of_three))
    groups = [set(data.split(n).index.groups) for n in ("train", "validation")]
    assert all(groups)
    assert not groups[0] & groups[1]
    assert data.split("validation").num_examples % 3 == 0


def test_another_image_moves_none_from_one_side_to_the_other(tmp_path, directory):
    before = opened(directory)
    after = opened(prepared(tmp_path, num_train=27))
    for name in ("train", "validation"):
        kept = set(after.split(name).index.image_ids)
        assert set(before.split(name).index.image_ids) <= kept


def test_labels_in_another_order_than_the_dataset_has_are_refused(directory, tmp_path):
    codes = dataset.open_dataset(directory).vocabulary.codes
    file = tmp_path / "labels.csv"
    small_layout.lines(file, "label_code", *codes)
    assert (
        opened(directory, vocabulary=read_codes(file, None).vocabulary).vocabulary.codes
        == codes
    )
    small_layout.lines(file, "label_code", *reversed(codes))
    with pytest.raises(InputError, match="use the dataset that has these labels"):
        opened(directory, vocabulary=read_codes(file, None).vocabulary)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"machine_labels": "ignored"}, {0: 1.0}),
        # The machine's 0.7 for /m/boat, in addition to the verified cat.
        ({"machine_labels": "soft"}, {0: 1.0, 2: 0.7}),
        ({"machine_labels": "thresholded"}, {0: 1.0, 2: 1.0}),
    ],
)
def test_machine_labels_train_as_the_configuration_says(directory, choice, expected):
    # The fraction is so small that train00, which has machine labels, stays in train.
    data = opened(directory, validation_fraction=0.15, **choice)
    row = list(data.split("train").index.image_ids).index("train00")
    rows = data.train_rows
    one = slice(rows.offsets[row], rows.offsets[row + 1])
    found = dict(zip(rows.label_ids[one], rows.confidences[one], strict=True))
    assert found == pytest.approx(expected)


def with_others(files):
    """Adds images without a present human label, and without any used label."""
    human = "absent,verification,/m/cat,0"
    machine = "sure,machine,/m/cat,0.9", "unsure,machine,/m/cat,0.4"
    rows = {"train_human_labels.csv": [human], "train_machine_labels.csv": machine}
    for name, added in rows.items():
        with (files / name).open("a") as file:
            file.writelines(row + "\n" for row in added)
    for shade, image_id in enumerate(("absent", "sure", "unsure")):
        small_layout.put(files / "train", image_id, small_layout.jpeg(shade))


@pytest.mark.parametrize(
    ("machine_labels", "left_out"),
    [
        ("ignored", {"sure", "unsure"}),
        ("thresholded", {"unsure"}),
        ("soft", set()),
    ],
)
def test_training_images_without_a_used_label_are_left_out(
    tmp_path, machine_labels, left_out
):
    directory = prepared(tmp_path, edit=with_others)
    whole = dataset.open_dataset(directory).splits["train"]
    data = opened(directory, machine_labels=machine_labels)
    train, validation = data.split("train"), data.split("validation")
    ids = [*train.index.image_ids, *validation.index.image_ids]
    assert set(whole.index.image_ids) - set(ids) == left_out
    assert len(set(ids)) == len(ids)
    assert data.num_unlabelled == len(left_out)
    assert data.train_rows.scored().all()
    records = [train.source[row]["image_id"] for row in range(train.num_examples)]
    assert records == train.index.image_ids.tolist()


def test_images_without_a_used_label_move_no_other_image(tmp_path, directory):
    before, after = opened(directory), opened(prepared(tmp_path, edit=with_others))
    for name in ("train", "validation"):
        ids = set(after.split(name).index.image_ids) - {"absent"}
        assert ids == set(before.split(name).index.image_ids)


def test_training_images_of_which_none_has_a_used_label_are_refused(tmp_path):
    def machine_only(files):
        rows = [f"train{i:02d},machine,/m/cat,0.9" for i in range(23)]
        header = "ImageID,Source,LabelName,Confidence"
        small_layout.lines(files / "train_machine_labels.csv", header, *rows)
        row = "train23,verification,/m/cat,1"
        small_layout.lines(files / "train_human_labels.csv", header, row)
        small_layout.lines(files / "validation_ids.csv", "image_id", "train23")

    directory = prepared(tmp_path, edit=machine_only)
    assert opened(directory, machine_labels="soft").split("train").num_examples == 23
    words = r"none of the 23 training images .* \(machine_labels='ignored'\); prepare"
    with pytest.raises(InputError, match=words):
        opened(directory)


def test_verified_rows_never_hold_what_a_machine_says(directory):
    data = opened(directory, machine_labels="soft", validation_fraction=0.15)
    index = data.split("train").index
    assert MACHINE in index.label_sources
    assert set(np.unique(index.label_sources)) <= {HUMAN, MACHINE, BOX}
    verified = data.verified_rows("train")
    assert len(verified.label_ids) == data.split("train").num_examples


def test_a_split_without_labels_has_no_truth(directory):
    data = opened(directory)
    assert data.split("test").num_examples == 3
    assert not data.has_truth("test")
    assert data.has_truth("tuning")
    assert not data.has_truth("holdout")


def test_a_split_that_is_not_there_is_named_with_those_that_are(directory):
    with pytest.raises(InputError, match=r"'holdout'.*train.*validation|tuning"):
        opened(directory).split("holdout")


def test_without_a_tuning_split_the_message_says_where_one_comes_from(tmp_path):
    def without_tuning(files):
        (files / "tuning_labels.csv").unlink()

    data = opened(prepared(tmp_path, edit=without_tuning))
    words = "'tuning'; .*new takes .* column split, prepare .* tuning_labels.csv"
    with pytest.raises(InputError, match=words):
        data.split("tuning")
    with pytest.raises(InputError, match=r"with images: [a-z, ]+\.$"):
        data.split("holdout")


@pytest.mark.parametrize("fraction", [0.000001, 0.999999])
def test_a_fraction_that_leaves_a_side_empty_is_refused(directory, fraction):
    with pytest.raises(InputError, match=r"validation_fraction=.*fraction closer"):
        opened(directory, validation_fraction=fraction)


def test_the_embedded_dataset_is_left_alone_once_it_is_there(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    prepare_toy_regions(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["dataset_info.json"]
    assert not tmp_path.with_name(f"{tmp_path.name}_files").exists()


def test_train_alone_is_enough(tmp_path):
    def without_the_rest(files):
        (files / "tuning_labels.csv").unlink()
        (files / "stage_1_sample_submission.csv").unlink()
        for image in (files / "stage_1_test_images").iterdir():
            image.unlink()

    data = opened(prepared(tmp_path, edit=without_the_rest))
    assert set(data.splits) == {"train", "validation"}
    assert not data.has_truth("test")


def test_the_embedded_dataset_is_not_drawn_beside_other_files(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "mine.txt").write_text("")
    with pytest.raises(InputError, match="contains something other"):
        prepare_toy_regions(folder)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.fixture(scope="module")
def with_domains(tmp_path_factory):
    def in_three_domains(files):
        rows = [f"train{i:02d},{('eu', 'asia', 'us')[i // 10]}" for i in range(30)]
        small_layout.lines(files / "train_meta.csv", "image_id,domain", *rows)

    root = tmp_path_factory.mktemp("domains")
    return prepared(root, num_train=30, edit=in_three_domains)


def test_without_a_held_out_domain_validation_chooses(with_domains):
    data = opened(with_domains)
    assert data.choosing_split == "validation"
    assert not data.has_images("held_out")


def test_a_held_out_domain_chooses_and_trains_nothing(with_domains):
    data = opened(with_domains, held_out_domain="asia")
    assert data.choosing_split == "held_out"
    assert data.domains == ("asia", "eu", "us")
    assert set(data.split("train").index.domains) == {"eu", "us"}
    assert set(data.split("validation").index.domains) <= {"eu", "us"}
    assert data.split("held_out").num_examples == 10
    assert len(data.train_rows.offsets) == data.split("train").num_examples + 1
    assert len(data.verified_rows("held_out").label_ids) == 10


def test_toy_regions_that_are_drawn_again_go_on_being_prepared(tmp_path, monkeypatch):
    draw = writer.write
    small = {"num_train": 30, "num_tuning": 2, "num_test": 2}
    monkeypatch.setattr(
        writer,
        "write",
        lambda directory, on_progress=None: draw(directory, **small),
    )

    def interrupt(done, total, what):
        if what == "tuning":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_toy_regions(tmp_path / "toy", interrupt)
    shutil.rmtree(tmp_path / "toy_files")
    prepare_toy_regions(tmp_path / "toy")
    assert (tmp_path / "toy" / "dataset_info.json").exists()
