import numpy as np
import pytest

from jaxii.data import labels
from jaxii.data.labels import BOX, HUMAN, MACHINE, Vocabulary, resolve_labels
from jaxii.errors import InputError

WORDS = Vocabulary(("/m/a", "/m/b", "/m/c"), ("Cat", "Dog, small", "/m/c"))


def resolve(entries, machine_labels="soft", machine_threshold=0.5):
    ids, confidences, sources = zip(*entries, strict=True)
    out_ids, out = resolve_labels(
        np.array(ids, np.int32),
        np.array(confidences, np.float32),
        np.array(sources, np.uint8),
        machine_labels=machine_labels,
        machine_threshold=machine_threshold,
    )
    return dict(zip(out_ids.tolist(), out.tolist(), strict=True))


def test_index_finds_the_position_of_a_code():
    assert WORDS.index["/m/c"] == 2
    assert len(WORDS) == 3


def test_names_leave_padding_out():
    assert WORDS.names(np.array([1, 0, -1, -1])) == ["Dog, small", "Cat"]


def test_a_repeated_code_is_refused_by_name():
    with pytest.raises(InputError, match="/m/a is listed twice"):
        Vocabulary(("/m/b", "/m/a", "/m/a"), ("", "", ""))


def test_hash_depends_on_codes_and_order_only():
    other = Vocabulary(WORDS.codes, ("x", "y", "z"))
    turned = Vocabulary(WORDS.codes[::-1], WORDS.descriptions[::-1])
    assert other.content_hash() == WORDS.content_hash()
    assert turned.content_hash() != WORDS.content_hash()
    assert len(WORDS.content_hash()) == 16


def test_the_hash_is_that_of_existing_checkpoints():
    assert WORDS.content_hash() == "293507ae87313d3b"


def test_vocabulary_survives_a_file(tmp_path):
    WORDS.save(tmp_path / "labels.csv")
    assert Vocabulary.load(tmp_path / "labels.csv") == WORDS
    assert [path.name for path in tmp_path.iterdir()] == ["labels.csv"]


def test_codes_of_digits_and_empty_descriptions_survive_a_file(tmp_path):
    words = Vocabulary(("007", "08"), ("", "1.50"))
    words.save(tmp_path / "labels.csv")
    assert Vocabulary.load(tmp_path / "labels.csv") == words


def test_loading_another_file_is_refused(tmp_path):
    (tmp_path / "labels.csv").write_text("name\nCat\n")
    with pytest.raises(InputError, match="label_code,description"):
        Vocabulary.load(tmp_path / "labels.csv")


def test_loading_an_absent_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not a label file"):
        Vocabulary.load(tmp_path / "labels.csv")


def test_the_sources_have_the_numbers_of_prepared_datasets():
    assert (HUMAN, MACHINE, BOX) == (0, 1, 2)


def test_people_overrule_the_machine():
    assert resolve([(3, 0.9, MACHINE), (3, 0.0, HUMAN)]) == {3: 0.0}


def test_a_box_overrules_the_machine():
    assert resolve([(3, 0.2, MACHINE), (3, 1.0, BOX)]) == {3: 1.0}


def test_equals_are_merged_by_the_largest():
    assert resolve([(3, 0.0, HUMAN), (3, 1.0, HUMAN), (5, 0.25, 1), (5, 0.5, 1)]) == {
        3: 1.0,
        5: 0.5,
    }


def test_ignored_machine_labels_are_unknown():
    assert resolve([(3, 0.9, MACHINE), (4, 1.0, HUMAN)], "ignored") == {4: 1.0}


def test_thresholded_machine_labels_are_present_or_unknown():
    entries = [(1, 0.7, MACHINE), (2, 0.69, MACHINE)]
    assert resolve(entries, "thresholded", 0.7) == {1: 1.0}


def test_a_machine_confidence_of_zero_verifies_nothing():
    entries = [(1, 0.0, MACHINE)]
    assert resolve(entries, "soft") == {}
    assert resolve(entries, "thresholded", 0.0) == {}


def test_a_machine_confidence_of_zero_is_not_used_at_any_threshold():
    used = labels.is_used(
        np.array([0.0, 0.1], np.float32),
        np.full(2, MACHINE, np.uint8),
        machine_labels="thresholded",
        machine_threshold=0.0,
    )
    assert used.tolist() == [False, True]


def test_the_last_rows_may_be_without_labels():
    offsets, ids, _ = labels.resolve_rows(
        np.array([0, 1, 1, 1]),
        np.array([4], np.int32),
        np.ones(1, np.float32),
        np.array([HUMAN], np.uint8),
        machine_labels="soft",
        machine_threshold=0.5,
    )
    assert offsets.tolist() == [0, 1, 1, 1] and ids.tolist() == [4]


def test_label_ids_come_out_ascending():
    assert list(resolve([(9, 1.0, HUMAN), (2, 1.0, HUMAN)])) == [2, 9]


@pytest.mark.parametrize("machine_labels", labels.MACHINE_LABELS)
def test_rows_resolve_as_single_images_do(machine_labels):
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 12, 200)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    total = int(offsets[-1])
    ids = rng.integers(0, 6, total).astype(np.int32)
    confidences = rng.integers(0, 11, total).astype(np.float32) / np.float32(10)
    sources = rng.integers(0, 3, total).astype(np.uint8)
    how = {"machine_labels": machine_labels, "machine_threshold": 0.7}
    new_offsets, new_ids, new_confidences = labels.resolve_rows(
        offsets, ids, confidences, sources, **how
    )
    for i in range(len(lengths)):
        entries = slice(offsets[i], offsets[i + 1])
        expected = resolve_labels(
            ids[entries], confidences[entries], sources[entries], **how
        )
        found = slice(new_offsets[i], new_offsets[i + 1])
        np.testing.assert_array_equal(new_ids[found], expected[0])
        np.testing.assert_array_equal(new_confidences[found], expected[1])


def test_rows_without_any_label_have_none():
    offsets, ids, confidences = labels.resolve_rows(
        np.zeros(3, np.int64),
        np.zeros(0, np.int32),
        np.zeros(0, np.float32),
        np.zeros(0, np.uint8),
        machine_labels="soft",
        machine_threshold=0.5,
    )
    assert offsets.tolist() == [0, 0, 0] and offsets.dtype == np.int64
    assert (ids.dtype, confidences.dtype) == (np.int32, np.float32)
    assert len(ids) == len(confidences) == 0


def test_an_image_without_labels_has_none():
    none = np.zeros(0)
    ids, confidences = resolve_labels(
        none.astype(np.int32),
        none.astype(np.float32),
        none.astype(np.uint8),
        machine_labels="soft",
        machine_threshold=0.5,
    )
    assert ids.dtype == np.int32 and confidences.dtype == np.float32
    assert len(ids) == len(confidences) == 0
