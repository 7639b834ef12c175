"""Tests the one rule for which image an id in a file refers to."""

import polars as pl
import pytest
import small_layout
from small_layout import lines

from jaxii.data.dataset import open_dataset
from jaxii.errors import InputError
from jaxii.evaluation import image_records
from jaxii.prepare import image_ids, label_files
from jaxii.prepare.kaggle import Layout, prepare
from jaxii.prepare.tables import labelled
from jaxii.prepare.tables.notes import Notes

IDS = ["007", "A", "a", "b", "c.jpg", "c", "d.PNG"]
# An id in a file -> the image that it refers to.
MEANT = {
    "a": "a",
    " a\t": "a",
    "A": "A",
    "b.jpg": "b",
    "b.JPEG ": "b",
    "b .webp": "b",
    # With the suffix, it is the id of another image.
    "c.jpg": "c.jpg",
    "c.png": "c",
    "d.PNG": "d.PNG",
    # Case and leading zeros matter in an id.
    "B": None,
    "d.png": None,
    "7": None,
    "007": "007",
    "007.jpg": "007",
    "b.gif": None,
    "b.jpg.jpg": None,
    "x": None,
    "": None,
    ".jpg": None,
}


def test_a_column_of_names_means_these_images():
    names, ids = pl.Series(list(MEANT)), pl.Series(IDS)
    rows, num_suffixed = image_ids.find_rows(names, ids)
    found = [None if row is None else IDS[row] for row in rows]
    assert dict(zip(MEANT, found, strict=True)) == MEANT
    assert num_suffixed == 5


@pytest.mark.parametrize("name", MEANT)
def test_a_single_name_means_the_same(name):
    expected = MEANT[name]
    assert image_ids.meant(name, IDS) == (
        name.strip() if expected is None else expected
    )


def test_ids_that_differ_by_case_alone_are_found():
    assert image_ids.case_twins(IDS) == ["A", "a"]
    assert image_ids.case_twins([]) == []


def suffixed(root):
    """Gives every id in the files of a small layout a suffix and white space."""
    for name in ("train_human_labels", "train_machine_labels"):
        path = root / f"{name}.csv"
        header, *rows = path.read_text().splitlines()
        changed = [f" {image}.jpg ,{rest}" for image, _, rest in split(rows)]
        lines(path, header, *changed)
    path = root / "tuning_labels.csv"
    rows = path.read_text().splitlines()
    lines(path, *[f"{image}.JPG,{rest}" for image, _, rest in split(rows)])
    submission = "test0.jpg,", "test1.jpg,", "test2.jpg ,"
    path = root / "stage_1_sample_submission.csv"
    lines(path, "image_id,labels", *submission)


def split(rows):
    return [row.partition(",") for row in rows]


def test_ids_with_suffix_and_white_space_give_the_dataset_of_plain_ids(tmp_path):
    plain = small_layout.write(tmp_path / "plain")
    other = small_layout.write(tmp_path / "other")
    suffixed(other)
    for root, end in ((plain, ""), (other, ".jpg ")):
        rows = [f"train{i:02d}{end},g{i // 2}" for i in range(6)]
        lines(root / "train_meta.csv", "image_id,group", *rows)
        lines(root / "validation_ids.csv", "image_id", f"train05{end}", f"train04{end}")
        rows = [f"{name}{end},paris" for name in ("tune0", "test1")]
        lines(root / "test_meta.csv", "image_id,domain", *rows)
        rows = [f"test{i}{end},/m/cat /m/dog" for i in range(3)]
        lines(root / "test_labels.csv", "image_id,labels", *rows)
        prepare(Layout.find(root), tmp_path / f"{root.name}_out")
    for name in ("train", "validation", "tuning", "test"):
        one, two = (
            open_dataset(tmp_path / f"{root}_out").splits[name].index
            for root in ("plain", "other")
        )
        assert len(one) and len(one) == len(two)
        for field in ("image_ids", "groups", "domains", "offsets", "label_ids"):
            assert getattr(one, field).tolist() == getattr(two, field).tolist(), name


def test_every_file_says_how_many_ids_were_found_without_their_suffix(tmp_path):
    root = small_layout.write(tmp_path / "kaggle")
    suffixed(root)
    counts = prepare(Layout.find(root), tmp_path / "out")
    found = [tally.notes[image_ids.SUFFIX_NOTE] for tally in counts.files]
    assert found == [6, 2, 2, 3]


def test_a_suffix_of_some_ids_leaves_the_missing_ones_counted(tmp_path):
    codes = label_files.read_codes(
        lines(tmp_path / "c.csv", "label_code", "/m/1"), None
    )
    rows = "a.jpg,v,/m/1,1", "a,v,/m/1,1", "b,v,/m/1,1", "z.jpg,v,/m/1,1"
    path = lines(tmp_path / "l.csv", "ImageID,Source,LabelName,Confidence", *rows)
    entries, tally = label_files.read_labels(path, codes, pl.Series(["a", "b"]))
    assert entries.rows.tolist() == [0, 1]
    assert (tally.kept, tally.dropped["repeated"]) == (2, 1)
    assert tally.dropped["image missing"] == 1
    assert tally.examples["image missing"] == ("z.jpg",)
    assert tally.read == tally.kept + sum(tally.dropped.values())


def test_ids_that_are_numbers_keep_their_zeros(tmp_path):
    root = small_layout.write(tmp_path / "kaggle")
    names = ["007", "7", "7.0", "1e3", "1000", "0"]
    for i, name in enumerate(names):
        path = root / "train" / "part_0" / f"train{i:02d}.jpg"
        path.rename(path.with_name(f"{name}.jpg"))
    rows = [f"{name},v,/m/cat,1" for name in names]
    header = "ImageID,Source,LabelName,Confidence"
    lines(root / "train_human_labels.csv", header, *rows)
    lines(root / "train_machine_labels.csv", header)
    rows = [f"{name},{i}" for i, name in enumerate(names)]
    lines(root / "train_meta.csv", "image_id,group", *rows)
    lines(root / "validation_ids.csv", "image_id", "007", "1e3")
    prepare(Layout.find(root), tmp_path / "out")
    splits = open_dataset(tmp_path / "out").splits
    assert splits["validation"].index.image_ids.tolist() == ["007", "1e3"]
    assert splits["train"].index.image_ids.tolist() == ["0", "1000", "7", "7.0"]
    assert splits["train"].index.groups.tolist() == ["5", "4", "1", "2"]


def test_ids_that_differ_by_case_alone_are_kept_apart_and_counted(tmp_path):
    root = small_layout.write(tmp_path / "kaggle")
    path = root / "train" / "part_0" / "TRAIN00.jpg"
    path.write_bytes(small_layout.jpeg(222))
    with (root / "train_human_labels.csv").open("a") as file:
        file.write("TRAIN00,verification,/m/boat,1\n")
    tally = prepare(Layout.find(root), tmp_path / "out").split("train")
    assert tally.kept == 7
    assert tally.notes["ids that differ only in case"] == 2
    assert tally.examples["ids that differ only in case"] == ("TRAIN00", "train00")
    index = open_dataset(tmp_path / "out").splits["train"].index
    assert index.image_ids.tolist()[:2] == ["TRAIN00", "train00"]
    assert index.label_ids[: index.offsets[1]].tolist() == [2]


@pytest.mark.parametrize(
    ("paths", "ids"),
    [
        (["x/1.jpg", "y/ 2 .PNG", "a.b.webp"], ["1", "2", "a.b"]),
        (["x/1.jpg", "y/1.jpg", "y/2.jpg"], ["x/1", "y/1", "y/2"]),
        (["1.jpg", "1.png", "x/2.jpg"], ["1.jpg", "1.png", "x/2.jpg"]),
        ([" .jpg", "x/1.jpg"], [".jpg", "1"]),
        ([], []),
    ],
)
def test_ids_are_file_names_or_else_paths(paths, ids):
    found, reason = image_ids.of_paths(paths)
    assert found == ids
    assert bool(reason) == any("x/" in name or ".png" in name for name in ids)


@pytest.mark.parametrize("second", ["y/1.jpg", "x/1.png", "y/2.jpg"])
def test_new_evaluate_and_predict_give_the_images_of_a_folder_the_same_ids(
    tmp_path, second
):
    names = ("x/1.jpg", second, "3.jpg")
    for name in names:
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(small_layout.jpeg(50))
    rows = [f"{name},{label}" for name, label in zip(names, "aba", strict=True)]
    table = lines(tmp_path / "labels.csv", "path,label", *rows)
    found = labelled.read(tmp_path / "photos", table, Notes())
    ids = dict(zip(found.files, found.ids, strict=True))
    listing = image_records.find(str(tmp_path / "photos"))
    paths = [str(listing.path(row)) for row in range(3)]
    assert dict(zip(paths, listing.image_ids, strict=True)) == ids


def test_predict_takes_ids_by_the_same_rule_and_answers_with_them(tmp_path):
    for name in ("a", "007"):
        (tmp_path / f"{name}.jpg").write_bytes(b"")
    given = lines(tmp_path / "ids.csv", "image_id,labels", "a.jpg,", " 007 ,", "7,")
    found = image_records.find(str(tmp_path)).select(image_records.read_ids(given))
    assert found.names == ["a.jpg", "007.jpg", ""]
    assert found.image_ids == ["a.jpg", "007", "7"]


def test_metadata_of_other_images_is_counted_with_examples(tmp_path):
    root = small_layout.write(tmp_path / "kaggle")
    rows = "train00,one", "train01,one", "other,two", " train01,three"
    path = lines(root / "train_meta.csv", "image_id,group", *rows)
    tally = prepare(Layout.find(root), tmp_path / "out").file(path.name)
    assert (tally.read, tally.kept) == (4, 2)
    assert tally.dropped == {"image missing": 1, "repeated": 1}
    assert tally.examples["image missing"] == ("other",)


@pytest.mark.parametrize("name", ["train_meta.csv", "test_meta.csv"])
def test_metadata_that_names_no_image_is_refused(tmp_path, name):
    root = small_layout.write(tmp_path / "kaggle")
    rows = [f"part_0/{kind}0{i},g" for i in range(3) for kind in ("train", "test")]
    lines(root / name, "image_id,group", *rows)
    with pytest.raises(
        InputError, match=rf"{name} matches no images .*6 image missing"
    ):
        prepare(Layout.find(root), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_metadata_of_tests_without_images_is_no_error(tmp_path):
    root = small_layout.write(tmp_path / "kaggle")
    lines(root / "test_meta.csv", "image_id,slice", "test0,dark")
    files = dict.fromkeys(("test_images", "tuning_labels", "sample_submission"))
    counts = prepare(Layout.find(root, **files), tmp_path / "out")
    assert [(tally.name, tally.kept) for tally in counts.splits] == [("train", 6)]
    assert counts.file("test_meta.csv").kept == 0


def test_white_space_around_a_group_is_no_part_of_it(tmp_path):
    root = small_layout.write(tmp_path / "kaggle")
    rows = "train00,one", "train01, one ", "train02,  "
    lines(root / "train_meta.csv", "image_id,group", *rows)
    prepare(Layout.find(root), tmp_path / "out")
    groups = open_dataset(tmp_path / "out").splits["train"].index.groups
    assert groups[:3].tolist() == ["one", "one", "train02"]


@pytest.mark.parametrize(
    ("root", "names"),
    [
        ("/photos", ["cat/000.jpg", "cat/001.jpg", "dog/000.jpg"]),
        ("/photos/cat", ["000.jpg", "001.jpg"]),
        ("/photos", ["a.b.png", "a.b.jpg", "c/a.b.jpg"]),
        ("/photos/odd", [".jpg", " x .jpg"]),
        ("/photos", ["a / x .jpg", "b/ x .jpg"]),
    ],
)
def test_ids_below_any_folder_include_those_of_every_folder(root, names):
    ids, _ = image_ids.of_paths(names)
    for name, image_id in zip(names, ids, strict=True):
        assert image_id in list(image_ids.below_any_folder(f"{root}/{name}"))
