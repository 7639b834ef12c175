import numpy as np
import pytest
import xxhash

from jaxii.data.seen import SeenImages, hashes_of
from jaxii.errors import InputError


def seen(**parts):
    return SeenImages({part: hashes_of(ids) for part, ids in parts.items()})


def test_images_are_found_by_their_ids_in_each_part():
    run = seen(weights=["a", "b", "c"], model_selection=["d"])
    assert run.count(["c", "d", "b", "x"]) == {"weights": 2, "model_selection": 1}
    assert run.count(["x", "A", ""]) == {}
    assert run.count([]) == {}


def test_the_union_has_the_images_of_both():
    both = seen(weights=["a"]).union(seen(weights=["b", "a"], calibration=["c"]))
    assert both.count(["a", "b", "c"]) == {"weights": 2, "calibration": 1}
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
    assert hashes_of(["b/1", "é", "é"]).tolist() == expected


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04", b"\x93NUMPY"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, content):
    path = tmp_path / "seen.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"seen\.npz cannot be read"):
        SeenImages.load(path)
