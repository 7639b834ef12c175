import numpy as np
import pytest
import xxhash

from jaxii.data import index
from jaxii.data.seen import SeenImages, hashes_of
from jaxii.errors import InputError


def images(ids, files=None):
    """Returns an index of images without labels; files: a letter for each."""
    nothing = [""] * len(ids)
    frame = index.table(
        image_ids=list(ids),
        groups=list(ids),
        domains=nothing,
        slices=nothing,
        offsets=np.zeros(len(ids) + 1, np.int64),
        label_ids=np.zeros(0, np.int32),
        confidences=np.zeros(0, np.float32),
        label_sources=np.zeros(0, np.uint8),
    )
    if files is not None:
        digests = (xxhash.xxh3_128_hexdigest(file.encode()) for file in files)
        frame = index.with_file_hashes(frame, digests)
    return index.columns(frame, ("",))


def seen(**parts):
    return SeenImages({part: hashes_of([images(ids)]) for part, ids in parts.items()})


def test_images_are_found_by_their_ids_in_each_part():
    run = seen(weights=["a", "b", "c"], model_selection=["d"])
    found = run.count(images(["c", "d", "b", "x"]))
    assert found == {"weights": 2, "model_selection": 1}
    assert run.count(images(["x", "A", ""])) == {}
    assert run.count(images([])) == {}


def test_images_are_found_by_their_files_under_other_names():
    run = SeenImages({"weights": hashes_of([images("abc", "ABC")], more_ids=["d"])})
    assert run.count(images("xyz", "CQA")) == {"weights": 2}
    # An image whose id and file were both seen counts once.
    assert run.count(images("ax", "AQ")) == {"weights": 1}
    assert run.count(images("xd", "QR")) == {"weights": 1}
    assert run.count(images("xy", "QR")) == {}
    # Datasets of earlier versions have no hashes of files.
    assert run.count(images("xa")) == {"weights": 1}
    named = run.count_any(
        [["x", "y"], ["b", "x"], []], images("xyz", "ABQ").file_hashes
    )
    assert named == {"weights": 2}


def test_the_union_has_the_images_of_both():
    both = seen(weights=["a"]).union(seen(weights=["b", "a"], calibration=["c"]))
    assert both.count(images("abc")) == {"weights": 2, "calibration": 1}
    assert len(both.by_part["weights"]) == 2


def test_what_was_saved_comes_back(tmp_path):
    run = seen(weights=[f"id{i}" for i in range(1000)], model_selection=[])
    run.save(tmp_path / "seen.npz")
    again = SeenImages.load(tmp_path / "seen.npz")
    assert again.by_part.keys() == run.by_part.keys()
    for part, hashes in run.by_part.items():
        np.testing.assert_array_equal(again.by_part[part], hashes)


def test_hashes_are_those_of_the_utf_8_of_the_ids():
    expected = sorted(xxhash.xxh3_64_intdigest(i.encode()) for i in ("é", "b/1"))
    assert hashes_of([images(["b/1", "é"])], ["é"]).tolist() == expected


def test_hashes_of_files_are_the_first_half_of_their_digests():
    digest = xxhash.xxh3_128_hexdigest(b"A")
    assert images("x", "A").file_hashes.tolist() == [int(digest[:16], 16)]
    assert index.file_hash(b"A") == int(digest[:16], 16)


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04", b"\x93NUMPY"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, content):
    path = tmp_path / "seen.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"seen\.npz cannot be read"):
        SeenImages.load(path)
