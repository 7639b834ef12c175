from pathlib import Path

import pytest
import small_layout
from small_layout import lines

from jaxii.cli import dispatch
from jaxii.cli.prepare import LAYOUT_FILES
from jaxii.errors import InputError
from jaxii.prepare import kaggle
from jaxii.prepare.image_files import find_images
from jaxii.prepare.kaggle import FILES, Layout, prepare


@pytest.fixture
def root(tmp_path):
    return small_layout.write(tmp_path / "kaggle")


def test_files_are_found_by_their_names(root):
    layout = Layout.find(root)
    assert layout.human_labels.name == "train_human_labels.csv"
    assert layout.machine_labels.name == "train_machine_labels.csv"
    assert layout.train_images == (root / "train",)
    assert layout.test_images == (root / "stage_1_test_images",)
    assert layout.bounding_boxes is None


def test_the_readme_and_the_help_name_the_files_that_are_found():
    page = Path(kaggle.__file__).with_name("README.md").read_text()
    for file in FILES.values():
        assert f"`{file}`" in page
    text = dispatch.help_text(["prepare"])
    for name in LAYOUT_FILES:
        assert f"[{FILES[name]}]" in text


def test_files_can_be_given_by_hand(root, tmp_path):
    truth = lines(tmp_path / "truth.csv", "image_id,labels")
    layout = Layout.find(root, test_labels=str(truth), machine_labels=None)
    assert layout.test_labels == truth
    assert layout.machine_labels is None


def test_a_missing_required_file_is_refused(root):
    (root / "classes-trainable.csv").unlink()
    words = r"classes-trainable.csv is missing but required; add it \(in Python, cl"
    with pytest.raises(InputError, match=words):
        Layout.find(root)


def test_files_that_are_absent_or_not_used_are_named(root, tmp_path):
    for name in ("train_bounding_box.csv", "Machine.CSV", "labels.csv"):
        lines(root / name, "image_id,labels")
    absent, unused = Layout.find(root, test_labels=root / "labels.csv").notes(root)
    assert absent == (
        "not found (optional): train_bounding_boxes.csv, train_meta.csv, "
        "test_meta.csv, validation_ids.csv"
    )
    assert unused == "not used: Machine.CSV, train_bounding_box.csv"
    truth = lines(tmp_path / "truth.csv", "image_id,labels")
    _, unused = Layout.find(root, test_labels=truth).notes(root)
    assert unused == "not used: Machine.CSV, labels.csv, train_bounding_box.csv"


def test_files_given_by_another_path_are_used(root, monkeypatch):
    lines(root / "truth.csv", "image_id,labels")
    monkeypatch.chdir(root)
    (absent,) = Layout.find(root, test_labels="truth.csv").notes(root)
    assert "test_labels.csv" not in absent


def test_a_misspelt_override_is_refused(root):
    with pytest.raises(InputError, match="tests_labels is not a field of Layout"):
        Layout.find(root, tests_labels="x.csv")


def test_an_override_that_does_not_exist_is_refused(root):
    with pytest.raises(InputError, match=r"none.csv is not a file"):
        Layout.find(root, test_labels="none.csv")


def test_an_absent_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        Layout.find(tmp_path / "none")


def test_no_training_images_is_refused(root):
    (root / "train").rename(root / "images")
    words = r"no folder of training images; add one whose name .* \(in Python, train_"
    with pytest.raises(InputError, match=words):
        Layout.find(root)


def test_images_are_found_in_folders_of_folders_by_id(root):
    (root / "train" / "note.txt").write_text("no image")
    (root / "train" / "aa.PNG").write_bytes(b"x")
    images = find_images((root / "train",))
    assert images.ids == ["aa", *(f"train{i:02d}" for i in range(6))]
    assert images.paths[1] == root / "train" / "part_0" / "train00.jpg"
    assert images.facts[0].size_bytes == 1


def test_hidden_images_and_links_to_what_is_read_are_told(root):
    part = root / "train" / "part_0"
    (root / "train" / ".thumbs").mkdir()
    (root / "train" / ".thumbs" / "train00.jpg").write_bytes(b"x")
    (root / "train" / "again").symlink_to(part)
    images = find_images((root / "train",))
    assert images.paths[0] == part / "train00.jpg"
    assert images.repeated == ()
    assert images.hidden == (str(root / "train" / ".thumbs"),)
    assert images.reached_again == (str(root / "train" / "again"),)
    line = prepare(Layout.find(root), root / "out").split("train").line()
    assert "hidden files and folders (not read) 1 (" in line
    assert "links to folders that are read by another path 1 (" in line


def test_a_second_file_of_an_id_is_told(root):
    (root / "train" / "part_0" / "train01.png").write_bytes(b"x")
    images = find_images((root / "train",))
    assert images.repeated == ("train01",)
    assert images.paths[1].name == "train01.jpg"
