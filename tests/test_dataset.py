import json
import pickle
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import grain
import numpy as np
import pytest
import small_layout
from small_layout import lines

from jaxii import manifest
from jaxii.data import index
from jaxii.data.dataset import Dataset, fold_names, open_dataset
from jaxii.data.labels import Vocabulary
from jaxii.errors import InputError
from jaxii.prepare.kaggle import Layout, prepare

NUM_TRAIN = 60


def prepared_in(root, *domains):
    """Prepares images, two per group, whose domains alternate."""
    small_layout.write(root / "kaggle", num_train=NUM_TRAIN)
    rows = [
        f"train{i:02d},g{i // 2},{domains[i % len(domains)]}" for i in range(NUM_TRAIN)
    ]
    lines(root / "kaggle" / "train_meta.csv", "image_id,group,domain", *rows)
    prepare(Layout.find(root / "kaggle"), root / "prepared")
    return root / "prepared"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepared_in(tmp_path_factory.mktemp("data"), "eu")


@pytest.fixture(scope="module")
def dataset(prepared) -> Dataset:
    return open_dataset(prepared)


def ids(split):
    return [split.source[i]["image_id"] for i in range(len(split.source))]


def test_a_record_has_the_promised_fields(dataset):
    record = dataset.splits["train"].source[1]
    assert {name: type(value).__name__ for name, value in record.items()} == {
        "image": "bytes",
        "image_id": "str",
        "label_ids": "ndarray",
        "label_confidences": "ndarray",
        "label_sources": "ndarray",
        "slice_id": "int",
    }
    dtypes = [record[n].dtype for n in record if n.startswith("label_")]
    assert dtypes == [np.int32, np.float32, np.uint8]


def test_the_index_equals_the_records(dataset):
    split = dataset.splits["train"]
    assert ids(split) == split.index.image_ids.tolist()
    for i in range(split.num_examples):
        record = split.source[i]
        entries = slice(split.index.offsets[i], split.index.offsets[i + 1])
        np.testing.assert_array_equal(
            split.index.label_ids[entries], record["label_ids"]
        )
        np.testing.assert_array_equal(
            split.index.confidences[entries], record["label_confidences"]
        )
        np.testing.assert_array_equal(
            split.index.label_sources[entries], record["label_sources"]
        )
        assert split.index.slice_ids[i] == record["slice_id"]


def test_positions_outside_are_an_error(dataset):
    with pytest.raises(IndexError):
        dataset.splits["train"].source[NUM_TRAIN]


def test_a_selection_of_a_selection_keeps_records_and_index_together(dataset):
    train = dataset.splits["train"]
    part = train.select(np.array([9, 4, 30, 7])).select(np.array([2, 0]))
    assert ids(part) == ["train30", "train09"] == part.index.image_ids.tolist()
    assert part.num_examples == len(part.source) == 2


def test_a_source_survives_pickling(dataset):
    train = dataset.splits["train"].select(np.array([3, 1]))
    copy = pickle.loads(pickle.dumps(train.source))
    assert copy[0]["image_id"] == "train03"
    assert copy[1]["image"] == train.source[1]["image"]


def test_a_source_is_read_by_many_threads(dataset):
    source = pickle.loads(pickle.dumps(dataset.splits["train"].source))
    rows = list(range(NUM_TRAIN)) * 20
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda row: source[row]["image_id"], rows))
    assert found == [f"train{row:02d}" for row in rows]


def test_grain_reads_a_source(dataset):
    data = grain.MapDataset.source(dataset.splits["train"].source).shuffle(seed=1)
    found = [record["image_id"] for record in data.to_iter_dataset()]
    assert sorted(found) == [f"train{i:02d}" for i in range(NUM_TRAIN)]


def test_carving_divides_train_and_nothing_else(dataset):
    splits = dataset.carve(0.3)
    assert set(splits) == {"train", "validation", "tuning", "test"}
    together = sorted(ids(splits["train"]) + ids(splits["validation"]))
    assert together == ids(dataset.splits["train"])
    assert splits["test"] is dataset.splits["test"]
    assert splits["validation"].name == "validation"


def test_carving_never_divides_a_group(dataset):
    splits = dataset.carve(0.3)
    train = set(splits["train"].index.groups)
    assert not train & set(splits["validation"].index.groups)
    assert 0 < splits["validation"].num_examples < NUM_TRAIN / 2


def test_an_image_keeps_its_side_when_others_go(dataset):
    held_out = set(ids(dataset.carve(0.3)["validation"]))
    half = dataset.splits["train"].select(np.arange(0, NUM_TRAIN, 2))
    smaller = replace(dataset, splits={"train": half})
    kept = set(ids(smaller.carve(0.3)["validation"]))
    assert kept == held_out & set(ids(half))


def test_a_larger_fraction_holds_out_more_of_the_same(dataset):
    small = set(ids(dataset.carve(0.2)["validation"]))
    assert small < set(ids(dataset.carve(0.5)["validation"]))


def test_carving_nothing_changes_nothing(dataset):
    assert dataset.carve(0.0) == dataset.splits


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_a_fraction_outside_the_range_is_refused(dataset, fraction):
    with pytest.raises(InputError, match="validation_fraction"):
        dataset.carve(fraction)


def test_a_fraction_that_leaves_a_side_empty_is_refused(dataset):
    with pytest.raises(InputError, match="no validation image"):
        dataset.carve(1e-6)


def test_the_same_vocabulary_is_accepted(prepared, dataset):
    assert open_dataset(prepared, dataset.vocabulary).vocabulary == dataset.vocabulary


def test_another_vocabulary_is_refused_with_both_hashes(prepared, dataset):
    turned = Vocabulary(dataset.vocabulary.codes[::-1], ("", "", ""))
    hashes = f"{dataset.vocabulary.content_hash()}.*{turned.content_hash()}"
    with pytest.raises(InputError, match=hashes):
        open_dataset(prepared, turned)


def test_an_absent_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="prepare a dataset there first"):
        open_dataset(tmp_path / "none")


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"has no dataset_info.json"):
        open_dataset(tmp_path)


def test_a_missing_shard_is_refused_by_name(prepared, tmp_path):
    for path in prepared.iterdir():
        if "tuning.array_record" not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(InputError, match=r"tuning.array_record.* is missing"):
        open_dataset(tmp_path)


@pytest.fixture(scope="module")
def two_domains(tmp_path_factory):
    return open_dataset(prepared_in(tmp_path_factory.mktemp("domains"), "eu", "asia"))


def test_a_domain_that_is_held_out_is_whole_and_in_no_other_split_of_train(two_domains):
    splits = two_domains.hold_out("asia").carve(0.3)
    asia = [i for i in range(NUM_TRAIN) if i % 2]
    assert ids(splits["held_out"]) == [f"train{i:02d}" for i in asia]
    rest = ids(splits["train"]) + ids(splits["validation"])
    assert sorted(rest) == [f"train{i:02d}" for i in range(0, NUM_TRAIN, 2)]


def test_holding_a_domain_out_moves_no_other_image(two_domains):
    before = two_domains.carve(0.3)
    after = two_domains.hold_out("asia").carve(0.3)
    for name in ("train", "validation"):
        kept = before[name].index.domains == "eu"
        assert ids(after[name]) == before[name].index.image_ids[kept].tolist()


def test_a_held_out_split_goes_by_its_name(two_domains):
    assert two_domains.hold_out("eu").splits["held_out"].name == "held_out"


def test_an_unknown_domain_is_refused_with_those_there_are(two_domains):
    assert two_domains.domains == ("asia", "eu")
    with pytest.raises(InputError, match=r"no domain 'Asia'.*use one of asia, eu"):
        two_domains.hold_out("Asia")


def test_the_only_domain_is_not_held_out(dataset):
    with pytest.raises(InputError, match=r"have the domain 'eu'.*columns image_id and"):
        dataset.hold_out("eu")


def test_folds_are_every_image_once_and_divide_no_group(two_domains):
    parts = [two_domains.hold_out(name).splits for name in fold_names(3)]
    every = [image_id for part in parts for image_id in ids(part["held_out"])]
    assert sorted(every) == sorted(ids(two_domains.splits["train"]))
    for part in parts:
        groups = [set(part[name].index.groups) for name in ("train", "held_out")]
        assert not groups[0] & groups[1]
        assert len(groups[1]) == NUM_TRAIN // 2 // 3


def test_validation_of_a_fold_is_that_of_all_data(two_domains):
    whole = set(ids(two_domains.carve(0.3)["validation"]))
    for name in fold_names(3):
        assert set(ids(two_domains.hold_out(name).carve(0.3)["validation"])) < whole


def test_a_fold_that_does_not_exist_is_refused(dataset):
    for name in ("fold 1 of 31", "fold 3 of 2"):
        with pytest.raises(InputError, match=f"'{name}' .* has no image.* 30 groups"):
            dataset.hold_out(name)


# Files that do not belong to the dataset.


@pytest.fixture
def copies(prepared, tmp_path):
    """A copy of the dataset, and one of other images with equal counts."""
    shutil.copytree(prepared, tmp_path / "copy")
    other = small_layout.write(tmp_path / "kaggle", num_train=NUM_TRAIN)
    for path in sorted((other / "train" / "part_0").iterdir(), reverse=True):
        path.rename(path.with_name(f"x{path.name}"))
    for name in ("train_human_labels.csv", "train_machine_labels.csv"):
        text = (other / name).read_text().replace("train", "xtrain")
        (other / name).write_text(text)
    prepare(Layout.find(other), tmp_path / "other")
    return tmp_path / "copy", tmp_path / "other"


def shard(folder, split="train"):
    (path,) = folder.glob(f"*-{split}.array_record*")
    return path


def accept(folder):
    """Updates the manifest for the current files: only other checks can fail."""
    listed = manifest.Manifest.load(folder / manifest.NAME, fix="")
    files = {name: manifest.describe(folder / name) for name in listed.files}
    manifest.Manifest(files).save(folder / manifest.NAME)


def test_shards_of_another_dataset_are_refused(copies):
    copy, other = copies
    shutil.copy(shard(other), shard(copy))
    with pytest.raises(InputError, match=r"array_record.* is damaged or"):
        open_dataset(copy)


def test_shards_of_another_dataset_are_told_by_their_first_id(copies):
    copy, other = copies
    shutil.copy(shard(other), shard(copy))
    accept(copy)
    with pytest.raises(
        InputError, match="record 0 holds image xtrain00, but the index lists train00"
    ):
        open_dataset(copy)


def test_an_index_of_another_dataset_is_refused(copies):
    copy, other = copies
    name = "index-train.parquet"
    shutil.copy(other / name, copy / name)
    with pytest.raises(InputError, match=r"index-train\.parquet is damaged"):
        open_dataset(copy)


def test_an_index_with_reversed_rows_is_refused(copies):
    copy, _ = copies
    path = copy / "index-train.parquet"
    index.save(index.load(path).reverse(), path)
    with pytest.raises(InputError, match=r"index-train\.parquet is damaged"):
        open_dataset(copy)
    accept(copy)
    with pytest.raises(InputError, match="train00, but the index lists train59"):
        open_dataset(copy)


def test_an_index_with_two_rows_exchanged_is_told_when_they_are_read(copies):
    copy, _ = copies
    path = copy / "index-train.parquet"
    rows = np.arange(NUM_TRAIN)
    rows[[4, 5]] = 5, 4
    index.save(index.load(path)[rows], path)
    accept(copy)
    source = open_dataset(copy).splits["train"].source
    with pytest.raises(InputError, match=r"record 4 holds .* lists train05"):
        source[4]


def test_permuted_descriptions_of_labels_are_refused(copies):
    copy, _ = copies
    text = (copy / "labels.csv").read_text()
    swapped = text.replace("Cat", "?").replace("Dog", "Cat").replace("?", "Dog")
    (copy / "labels.csv").write_text(swapped)
    with pytest.raises(InputError, match=r"labels\.csv is damaged"):
        open_dataset(copy)


def flip(path, places):
    content = bytearray(path.read_bytes())
    for place in places:
        content[place] ^= 0x55
    path.write_bytes(content)


def test_flipped_bytes_of_a_large_shard_are_found_by_verify(copies, monkeypatch):
    copy, _ = copies
    monkeypatch.setattr(manifest, "SMALL_BYTES", 1000)
    # In the rest of the last block, which holds no record.
    flip(shard(copy), [-1])
    open_dataset(copy)
    with pytest.raises(InputError, match=r"array_record.* is damaged"):
        open_dataset(copy, verify=True)


def test_a_record_with_flipped_bytes_is_an_error_where_it_is_read(copies):
    copy, _ = copies
    content = shard(copy).read_bytes()
    flip(shard(copy), [content.index(b"train30") + 40])
    accept(copy)
    source = open_dataset(copy).splits["train"].source
    with pytest.raises(InputError, match=r"record 30 cannot be read.*prepare"):
        source[30]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"splits": 3}', "\x00"])
@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_a_description_that_cannot_be_parsed_is_one_line(copies, name, content):
    copy, _ = copies
    (copy / name).write_text(content)
    with pytest.raises(InputError, match=re.escape(name)):
        open_dataset(copy)


@pytest.mark.parametrize("name", ["manifest.json", "index-test.parquet", "labels.csv"])
def test_a_missing_file_is_named(copies, name):
    copy, _ = copies
    (copy / name).unlink()
    with pytest.raises(InputError, match=f"{re.escape(name)} is missing"):
        open_dataset(copy)


def test_a_module_that_features_name_is_never_imported(copies, monkeypatch):
    copy, _ = copies
    (copy / "evil.py").write_text("import pathlib\npathlib.Path('ran').touch()\n")
    monkeypatch.chdir(copy)
    monkeypatch.syspath_prepend(copy)
    path = copy / "features.json"
    text = path.read_text().replace(
        "tensorflow_datasets.core.features.text_feature.Text", "evil.Text", 1
    )
    path.write_text(text)
    accept(copy)
    with pytest.raises(InputError, match=r"feature type evil\.Text; only .*Text"):
        open_dataset(copy)
    assert not (copy / "ran").exists()
    assert "evil" not in sys.modules


@pytest.mark.parametrize(
    "template", ["../other/{DATASET}-{SPLIT}.x", "/etc/passwd", "{SPLIT}/x", ".hidden"]
)
def test_a_shard_outside_of_the_folder_is_refused(copies, template):
    copy, _ = copies
    path = copy / "dataset_info.json"
    stored = json.loads(path.read_text())
    stored["splits"][0]["filepathTemplate"] = template
    path.write_text(json.dumps(stored))
    accept(copy)
    with pytest.raises(InputError, match="not the plain name of a file in"):
        open_dataset(copy)


def test_the_content_hash_is_that_of_the_content(copies, dataset):
    copy, other = copies
    assert open_dataset(copy).content_hash == dataset.content_hash
    assert open_dataset(other).content_hash != dataset.content_hash
    assert len(dataset.content_hash) == 32
