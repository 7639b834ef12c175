import importlib.resources
import importlib.resources.abc
import importlib.util
import io
import sys

import numpy as np
import pytest
import small_layout
from tensorflow_datasets.datasets.open_images_v4 import (
    open_images_v4_dataset_builder as published,
)

from jaxii.data import open_images_v4
from jaxii.data.dataset import open_dataset
from jaxii.data.labels import Vocabulary
from jaxii.data.prepared import open_prepared
from jaxii.errors import InputError


def _examples(self, number):
    codes = self.info.features["objects_trainable"]["label"].names
    for i in range(number):
        name = f"{i:016x}.jpg"
        objects = [
            {"label": codes[i], "confidence": 10, "source": "verification"},
            {"label": codes[i + 1], "confidence": 7, "source": "machine"},
            {"label": codes[9], "confidence": 0, "source": "crowdsource-verification"},
        ]
        image = small_layout.jpeg(40 + i)
        yield (
            name,
            {
                "image": io.BytesIO(image),
                "image/filename": name,
                "objects": objects,
                "objects_trainable": objects if i else [],
                "bobjects": [],
            },
        )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A small copy made by TFDS's own builder; only its download is replaced."""
    root = tmp_path_factory.mktemp("tfds")
    with pytest.MonkeyPatch.context() as patch:
        # TFDS needs this back-port of a standard module, but does not install it.
        if importlib.util.find_spec("importlib_resources") is None:
            patch.setitem(sys.modules, "importlib_resources", importlib.resources)
        patch.setattr(
            published.Builder,
            "_split_generators",
            lambda self, _: {
                "train": _examples(self, 6),
                "validation": _examples(self, 2),
            },
        )
        builder = published.Builder(
            config="300k", data_dir=root, file_format="array_record"
        )
        builder.download_and_prepare()
    return root


def test_the_folder_above_a_copy_opens_it(prepared):
    dataset = open_dataset(prepared)
    assert dataset.directory == prepared / "open_images_v4" / "300k" / "2.0.0"
    assert {k: v.num_examples for k, v in dataset.splits.items()} == {
        "train": 6,
        "validation": 2,
    }


def test_its_own_labels_are_the_default(prepared):
    assert len(open_dataset(prepared).vocabulary) == 7186


def test_confidences_and_sources_are_converted(prepared):
    train = open_dataset(prepared).splits["train"]
    row = train.index.image_ids.tolist().index(f"{2:016x}")
    record = train.source[row]
    assert record["image_id"] == f"{2:016x}"
    assert record["label_ids"].tolist() == [2, 3, 9]
    np.testing.assert_allclose(record["label_confidences"], [1.0, 0.7, 0.0])
    assert record["label_sources"].tolist() == [0, 1, 0]


def test_labels_are_mapped_by_code(prepared):
    codes = open_dataset(prepared).vocabulary.codes
    wanted = Vocabulary((codes[3], "/m/other", codes[2]), ("a", "b", "c"))
    train = open_dataset(prepared, wanted).splits["train"]
    row = train.index.image_ids.tolist().index(f"{2:016x}")
    assert train.source[row]["label_ids"].tolist() == [2, 0]
    assert train.source[row]["label_sources"].tolist() == [0, 1]


def test_the_index_equals_the_records(prepared):
    train = open_dataset(prepared).splits["train"]
    for i in range(6):
        record = train.source[i]
        entries = slice(train.index.offsets[i], train.index.offsets[i + 1])
        assert train.index.image_ids[i] == record["image_id"]
        np.testing.assert_array_equal(
            train.index.label_ids[entries], record["label_ids"]
        )
        np.testing.assert_array_equal(
            train.index.confidences[entries], record["label_confidences"]
        )


def test_training_images_without_a_label_are_left_out(prepared):
    data = open_prepared(
        prepared,
        validation_fraction=0.1,
        machine_labels="ignored",
        machine_threshold=0.5,
    )
    assert f"{0:016x}" not in data.split("train").index.image_ids
    assert (data.split("train").num_examples, data.num_unlabelled) == (5, 1)


def test_records_are_scanned_once(prepared, monkeypatch):
    open_dataset(prepared)
    monkeypatch.setattr(open_images_v4, "scan", None)
    assert open_dataset(prepared).splits["train"].num_examples == 6


def test_a_scan_reports_progress(prepared):
    words = Vocabulary(("/m/0108_09c",), ("one",))
    seen = []
    open_dataset(prepared, words, on_progress=lambda *event: seen.append(event))
    assert seen == [
        (6, 6, "train images indexed"),
        (2, 2, "validation images indexed"),
    ]


def test_other_codes_are_refused(prepared):
    with pytest.raises(InputError, match="none of the 1 label codes"):
        open_dataset(prepared, Vocabulary(("cat",), ("Cat",)))


def test_a_stored_validation_split_is_used_as_it_is(prepared):
    splits = open_dataset(prepared).carve(0.5)
    assert {name: split.num_examples for name, split in splits.items()} == {
        "train": 6,
        "validation": 2,
    }
