"""Tests that an unknown name is answered with the nearest known one."""

from jaxii.errors import nearest, nearest_path


def test_the_nearest_name_is_found_whatever_its_case():
    assert nearest("TRIAN", ["train", "plan"]) == "the nearest is train; "
    assert nearest("zebra", ["train", "plan"]) == ""


def test_a_path_that_is_there_has_no_nearest_one(tmp_path):
    (tmp_path / "labels.csv").touch()
    assert nearest_path(tmp_path / "labels.csv") == ""
    near = nearest_path(tmp_path / "lables.csv")
    assert near == f"the nearest is {tmp_path / 'labels.csv'}."
    assert nearest_path(tmp_path / "absent" / "labels.csv") == ""
    assert nearest_path(tmp_path / "photos") == ""
