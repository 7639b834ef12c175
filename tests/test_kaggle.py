import io
import itertools
import json
import os
import shutil

import numpy as np
import pytest
import small_layout
import tensorflow_datasets as tfds
from PIL import Image
from small_layout import lines

from jaxii.data.dataset import open_dataset
from jaxii.errors import InputError
from jaxii.prepare import build, shards
from jaxii.prepare.kaggle import Layout, prepare
from jaxii.prepare.tally import Counts
from jaxii.storage import names_in


@pytest.fixture
def root(tmp_path):
    return small_layout.write(tmp_path / "kaggle")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "prepared"


def records(out, split):
    source = open_dataset(out).splits[split].source
    return [source[i] for i in range(len(source))]


def content(out):
    return {p.name: p.read_bytes() for p in out.iterdir() if "array_record" in p.name}


def test_tfds_reads_what_was_prepared(root, out):
    prepare(Layout.find(root), out)
    builder = tfds.builder_from_directory(out)
    skip = {"image": tfds.decode.SkipDecoding()}
    source = builder.as_data_source("train", decoders=skip)
    assert len(source) == 6
    assert source[0]["image_id"] == b"train00"
    assert source[0]["image"][:2] == b"\xff\xd8"
    assert source[0]["label_ids"] == [0, 2]
    assert builder.info.features["label_ids"].feature.names == list(small_layout.CODES)


def test_tfds_decodes_the_images(root, out):
    prepare(Layout.find(root), out)
    source = tfds.builder_from_directory(out).as_data_source("test")
    assert source[0]["image"].shape == (24, 32, 3)


def test_every_split_holds_its_images(root, out):
    counts = prepare(Layout.find(root), out)
    found = {
        name: split.num_examples for name, split in open_dataset(out).splits.items()
    }
    assert found == {"train": 6, "tuning": 2, "test": 3}
    assert {tally.name: tally.kept for tally in counts.splits} == found


def test_labels_carry_confidence_and_source(root, out):
    boxes = "ImageID,Source,LabelName,Confidence,XMin", "train00,xclick,/m/dog,1,0"
    lines(root / "train_bounding_boxes.csv", *boxes)
    prepare(Layout.find(root), out)
    first = records(out, "train")[0]
    assert first["label_ids"].tolist() == [0, 1, 2]
    assert first["label_sources"].tolist() == [0, 2, 1]
    np.testing.assert_allclose(first["label_confidences"], [1.0, 1.0, 0.7])


def test_test_images_without_truth_have_no_label(root, out):
    prepare(Layout.find(root), out)
    assert all(len(record["label_ids"]) == 0 for record in records(out, "test"))


def test_truth_and_metadata_of_the_test_are_used(root, out, tmp_path):
    truth = lines(tmp_path / "t.csv", "image_id,labels", "test1,/m/dog", "test0,/m/cat")
    meta = lines(tmp_path / "m.csv", "image_id,domain,slice", "test0,paris,dark")
    prepare(Layout.find(root, test_labels=truth, test_metadata=meta), out)
    dataset = open_dataset(out)
    index = dataset.splits["test"].index
    assert index.label_ids.tolist() == [0, 1]
    assert index.domains.tolist() == ["paris", "no domain", "no domain"]
    slices = [dataset.slices[i] for i in index.slice_ids]
    assert slices == ["dark", "no slice", "no slice"]


def test_images_without_a_domain_are_counted_and_have_one_of_their_own(root, out):
    meta = "image_id,domain,slice", "train00,home,", "train01,,", "train02,away,"
    lines(root / "train_meta.csv", *meta)
    counts = prepare(Layout.find(root), out)
    index = open_dataset(out).splits["train"].index
    assert index.domains.tolist() == ["home", "no domain", "away", *["no domain"] * 3]
    assert open_dataset(out).slices == ("all",)
    line = counts.file("train_meta.csv").line()
    assert "images without a domain, stored as 'no domain' 4" in line
    assert "without a slice" not in line


def test_groups_come_from_the_metadata_or_the_id(root, out):
    lines(root / "train_meta.csv", "image_id,group", "train00,one", "train01,one")
    prepare(Layout.find(root), out)
    groups = open_dataset(out).splits["train"].index.groups
    assert groups[:3].tolist() == ["one", "one", "train02"]


def test_tuning_images_are_no_test_images(root, out):
    rows = "tune0,", "test0,", "tune1,", "test1,", "test2,"
    lines(root / "stage_1_sample_submission.csv", "image_id,labels", *rows)
    prepare(Layout.find(root), out)
    ids = open_dataset(out).splits["test"].index.image_ids
    assert ids.tolist() == ["test0", "test1", "test2"]


def test_without_a_submission_the_other_images_are_the_test(root, out):
    prepare(Layout.find(root, sample_submission=None), out)
    ids = open_dataset(out).splits["test"].index.image_ids
    assert ids.tolist() == ["test0", "test1", "test2"]


def test_the_file_that_lists_the_test_images_is_named(root, out, tmp_path):
    lines(root / "test_labels.csv", "image_id,labels", "test1,/m/dog", "test2,/m/cat")
    test = prepare(Layout.find(root), out).split("test")
    assert "listed in stage_1_sample_submission.csv 3" in test.line()
    assert "not listed" not in test.line()
    layout = Layout.find(root, sample_submission=None)
    test = prepare(layout, tmp_path / "labelled").split("test")
    assert "listed in test_labels.csv 2; not listed (not used) 1 (test0)" in test.line()
    layout = Layout.find(root, sample_submission=None, test_labels=None)
    test = prepare(layout, tmp_path / "all").split("test")
    assert (test.kept, "listed" in test.line()) == (3, False)


def test_training_files_alone_are_enough(root, out):
    layout = Layout.find(
        root, test_images=None, tuning_labels=None, sample_submission=None
    )
    prepare(layout, out)
    assert list(open_dataset(out).splits) == ["train"]


def test_images_are_reduced(root, out):
    big = small_layout.jpeg(90, 300, 400)
    (root / "train" / "part_0" / "train00.jpg").write_bytes(big)
    prepare(Layout.find(root), out, short_side=32)
    image = Image.open(io.BytesIO(records(out, "train")[0]["image"]))
    assert image.size == (43, 32)


def test_a_png_under_a_jpg_name_is_stored_as_jpeg(root, out):
    buffer = io.BytesIO()
    Image.new("L", (30, 20)).save(buffer, "PNG")
    (root / "train" / "part_0" / "train00.jpg").write_bytes(buffer.getvalue())
    prepare(Layout.find(root), out)
    assert records(out, "train")[0]["image"][:3] == b"\xff\xd8\xff"


def test_unusable_images_are_skipped_counted_and_named(root, out):
    folder = root / "train" / "part_0"
    whole = (folder / "train01.jpg").read_bytes()
    (folder / "train01.jpg").write_bytes(whole[:-10])
    (folder / "train04.jpg").write_bytes(b"no image")
    tally = prepare(Layout.find(root), out).split("train")
    assert (tally.read, tally.kept, tally.dropped["unreadable"]) == (6, 4, 2)
    assert tally.examples["unreadable"][0].startswith("train01: truncated JPEG")
    split = open_dataset(out).splits["train"]
    ids = [split.source[i]["image_id"] for i in range(4)]
    assert ids == split.index.image_ids.tolist()
    assert ids == ["train00", "train02", "train03", "train05"]


def test_a_shard_without_a_usable_image_is_no_error(root, out, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_IMAGES", 2)
    folder = root / "train" / "part_0"
    for i in (2, 3):
        (folder / f"train{i:02d}.jpg").write_bytes(b"no image")
    prepare(Layout.find(root), out)
    assert [r["image_id"][-1] for r in records(out, "train")] == ["0", "1", "4", "5"]
    source = tfds.builder_from_directory(out).as_data_source("train")
    assert source[2]["image_id"] == b"train04"


def test_images_listed_but_missing_are_skipped_and_counted(root, out):
    (root / "train" / "part_0" / "train03.jpg").unlink()
    (root / "stage_1_test_images" / "tune0.jpg").unlink()
    counts = prepare(Layout.find(root), out)
    assert counts.file("train_human_labels.csv").dropped["image missing"] == 1
    assert counts.split("train").kept == 5
    assert counts.split("tuning").dropped["listed but missing"] == 1
    assert counts.split("tuning").examples["listed but missing"] == ("tune0",)


def test_training_images_without_a_label_are_dropped_and_counted(root, out):
    (root / "train" / "extra.jpg").write_bytes(small_layout.jpeg(9))
    tally = prepare(Layout.find(root), out).split("train")
    assert (tally.kept, tally.dropped["without a label"]) == (6, 1)


def test_an_image_with_a_verified_absence_only_is_kept(root, out):
    (root / "train" / "extra.jpg").write_bytes(small_layout.jpeg(9))
    with (root / "train_human_labels.csv").open("a") as file:
        file.write("extra,verification,/m/cat,0\n")
    assert prepare(Layout.find(root), out).split("train").kept == 7


def test_no_training_image_is_refused(root, out):
    for path in (root / "train" / "part_0").iterdir():
        path.rename(path.with_name("other_" + path.name))
    with pytest.raises(InputError, match="no training image is left"):
        prepare(Layout.find(root), out)
    assert not out.exists()


def test_no_readable_training_image_is_refused(root, out):
    for path in (root / "train" / "part_0").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"no training image is left.*6 unreadable"):
        prepare(Layout.find(root), out)
    with pytest.raises(InputError, match="did not finish"):
        open_dataset(out)


def test_a_wrong_file_leaves_nothing_behind(root, out):
    lines(root / "train_human_labels.csv", "image,label", "train00,/m/cat")
    with pytest.raises(InputError, match="has the header image,label"):
        prepare(Layout.find(root), out)
    assert not out.exists()


def test_a_folder_with_something_else_in_it_is_refused(root, out):
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="is not empty"):
        prepare(Layout.find(root), out)
    assert [path.name for path in out.iterdir()] == ["letter.txt"]


def test_a_folder_prepared_from_other_inputs_is_refused(root, out):
    prepare(Layout.find(root), out)
    before = content(out)
    with pytest.raises(InputError, match="other files or with other options"):
        prepare(Layout.find(root), out, short_side=64)
    assert content(out) == before


def test_a_second_run_changes_nothing(root, out):
    first = prepare(Layout.find(root), out)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prepare(Layout.find(root), out) == first
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times


def test_an_interrupted_run_goes_on_where_it_was(root, out, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_IMAGES", 2)
    layout = Layout.find(root)
    prepare(layout, tmp_path / "undisturbed")

    def interrupt(done, total, what):
        if what == "tuning":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(layout, out, on_progress=interrupt)
    assert not (out / "dataset_info.json").exists()
    kept = {p: p.stat().st_mtime_ns for p in out.glob("*train.array_record*-00003")}
    assert len(kept) == 3
    prepare(layout, out)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert content(out) == content(tmp_path / "undisturbed")
    assert not list(out.glob("*.part")) and not list(out.glob("*.json.part"))


def test_a_preparation_checks_between_writes_that_it_holds_its_folder(
    root, out, monkeypatch
):
    seen = []
    monkeypatch.setattr(build, "check_held", lambda held: seen.append(names_in(held)))
    prepare(Layout.find(root), out)
    written = (
        "preparation.json",
        "labelled_images-train.array_record-00000-of-00001",
        "labelled_images-test.array_record-00000-of-00001",
        "index-train.parquet",
        "index-test.parquet",
        "dataset_info.json",
    )
    for before, after in itertools.pairwise(written):
        assert any(before in names and after not in names for names in seen)
    # Accounts and thumbnails are deleted last.
    assert "dataset_info.json" in seen[-1]
    thumbnails = {name for name in seen[-1] if name.endswith(".thumbnails")}
    assert thumbnails and not thumbnails & names_in(out)


@pytest.fixture
def take_over(monkeypatch):
    """Makes the check fail after the first call of `take_over`."""
    taken = []

    def check(folder):
        if taken:
            raise InputError("taken over")

    monkeypatch.setattr(build, "check_held", check)
    return lambda: taken.append(True)


@pytest.mark.parametrize("when", ["train", "near copies", "train without copies"])
def test_a_preparation_whose_folder_is_taken_over_stops(root, out, take_over, when):
    test, train = root / "stage_1_test_images", root / "train/part_0"
    shutil.copy(test / "test2.jpg", train / "train01.jpg")

    def report(done, total, what):
        if what == when and done == total:
            take_over()

    with pytest.raises(InputError, match="taken over"):
        prepare(Layout.find(root), out, on_progress=report)
    assert list(out.glob("*.thumbnails"))
    assert not (out / "index-test.parquet").exists()
    assert (when == "train") == (not list(out.glob("*-tuning.array_record*")))


def test_of_a_taken_over_folder_no_missing_file_is_named(root, out, take_over):
    def report(done, total, what):
        if what == "test" and done == total:
            take_over()
            for path in out.glob("*-train.array_record*.thumbnails"):
                path.unlink()

    with pytest.raises(InputError, match="taken over"):
        prepare(Layout.find(root), out, on_progress=report)


def test_the_number_of_threads_changes_nothing(root, out, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_IMAGES", 2)
    prepare(Layout.find(root), out, num_workers=1)
    prepare(Layout.find(root), tmp_path / "other", num_workers=4)
    assert content(out) == content(tmp_path / "other")


def test_progress_ends_at_the_total(root, out):
    seen = {}
    prepare(
        Layout.find(root),
        out,
        on_progress=lambda done, total, what: seen.update({what: (done, total)}),
    )
    splits = {"train": (6, 6), "tuning": (2, 2), "test": (3, 3)}
    assert seen == {**splits, "near copies": (11, 11)}


def test_counts_are_kept_as_json(root, out):
    counts = prepare(Layout.find(root), out)
    assert Counts.load(out / "counts.json") == counts
    assert json.loads((out / "counts.json").read_text())["splits"][0]["kept"] == 6


def test_every_image_is_accounted_for(root, out):
    (root / "train" / "extra.jpg").write_bytes(small_layout.jpeg(9))
    (root / "train" / "part_0" / "train03.jpg").write_bytes(b"no image")
    for tally in prepare(Layout.find(root), out).splits:
        assert tally.read == tally.kept + sum(tally.dropped.values())


def test_the_account_is_readable(root, out):
    text = prepare(Layout.find(root), out).lines()
    assert text[0] == "train_human_labels.csv: 6 rows read, 6 kept"
    assert text[-1].startswith("test: 3 images read, 3 kept")


def test_a_second_file_of_an_image_is_told(root, out):
    (root / "train" / "part_0" / "train03.png").write_bytes(b"never read")
    tally = prepare(Layout.find(root), out).split("train")
    assert tally.kept == 6
    assert tally.notes["ids with a second file (not read)"] == 1


def test_a_list_of_other_validation_images_is_refused(tmp_path):
    root = small_layout.write(tmp_path / "kaggle")
    small_layout.lines(root / "validation_ids.csv", "image_id", "other01.jpg")
    with pytest.raises(InputError, match="lists no training images"):
        prepare(Layout.find(root), tmp_path / "out")


def test_listed_validation_images_are_a_split_of_their_own(tmp_path):
    root = small_layout.write(tmp_path / "files")
    small_layout.lines(root / "validation_ids.csv", "image_id", "train01", "train04")
    counts = prepare(Layout.find(root), tmp_path / "data")
    assert counts.split("train").kept == 4
    assert counts.split("validation").kept == 2
    assert counts.split("train").read == 4


def test_a_label_file_of_people_without_a_row_is_refused(root, out):
    lines(root / "train_human_labels.csv", "ImageID,Source,LabelName,Confidence")
    with pytest.raises(
        InputError, match=r"human_labels.csv has a header but no label rows"
    ):
        prepare(Layout.find(root), out)
    assert not out.exists()


def test_a_machine_label_file_without_a_row_is_no_error_and_said(root, out):
    lines(root / "train_machine_labels.csv", "ImageID,Source,LabelName,Confidence")
    counts = prepare(Layout.find(root), out)
    assert "train_machine_labels.csv: 0 rows read, 0 kept" in counts.lines()
    assert counts.split("train").kept == 6


def test_a_file_that_changed_at_the_same_size_is_named(root, out):
    layout = Layout.find(root)
    prepare(layout, out)
    path = root / "train" / "part_0" / "train03.jpg"
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)
    words = r"other versions of 1 image files \(train03\), judging by size or modif"
    with pytest.raises(InputError, match=words):
        prepare(layout, out)


def test_a_file_that_changed_before_an_interrupted_run_goes_on_is_named(root, out):
    def interrupt(done, total, what):
        if what == "tuning":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(Layout.find(root), out, on_progress=interrupt)
    os.utime(root / "train" / "part_0" / "train03.jpg")
    with pytest.raises(InputError, match=r"1 image files \(train03\)"):
        prepare(Layout.find(root), out)


def test_a_copy_of_the_files_with_their_times_is_the_same_input(root, out, tmp_path):
    counts = prepare(Layout.find(root), out)
    shutil.copytree(root, tmp_path / "copy")
    assert prepare(Layout.find(tmp_path / "copy"), out) == counts


def test_a_dataset_of_another_version_of_jaxii_is_told_as_that(root, out):
    prepare(Layout.find(root), out)
    stored = json.loads((out / "preparation.json").read_text())
    del stored["format"]
    (out / "preparation.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match="by another version of jaxii"):
        prepare(Layout.find(root), out)


@pytest.mark.parametrize("name", ["preparation.json", "counts.json", "labels.csv"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff"])
def test_a_finished_dataset_that_is_damaged_is_refused(root, out, name, content):
    prepare(Layout.find(root), out)
    (out / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} is damaged.*prepare it again"):
        prepare(Layout.find(root), out)


@pytest.mark.parametrize("damaged", ["shard", "account"])
def test_an_interrupted_run_writes_damaged_shards_anew(root, out, tmp_path, damaged):
    prepare(Layout.find(root), tmp_path / "undisturbed")

    def interrupt(done, total, what):
        if what == "test":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(Layout.find(root), out, on_progress=interrupt)
    (shard,) = out.glob("*-train.array_record-00000-of-00001")
    path = shard if damaged == "shard" else shards.account_path(shard)
    path.write_bytes(path.read_bytes()[:100])
    prepare(Layout.find(root), out)
    hashes = [open_dataset(f, verify=True) for f in (out, tmp_path / "undisturbed")]
    assert hashes[0].content_hash == hashes[1].content_hash
