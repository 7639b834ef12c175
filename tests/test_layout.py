import pytest
import small_layout
from small_layout import lines

from jaxii.errors import InputError
from jaxii.prepare.image_files import find_images
from jaxii.prepare.kaggle import Layout


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


def test_files_can_be_given_by_hand(root, tmp_path):
    truth = lines(tmp_path / "truth.csv", "image_id,labels")
    layout = Layout.find(root, test_labels=str(truth), machine_labels=None)
    assert layout.test_labels == truth
    assert layout.machine_labels is None


def test_a_missing_required_file_is_refused(root):
    (root / "classes-trainable.csv").unlink()
    with pytest.raises(InputError, match=r"classes-trainable.csv is missing"):
        Layout.find(root)


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
    with pytest.raises(InputError, match="no folder of training images"):
        Layout.find(root)


def test_images_are_found_in_folders_of_folders_by_id(root):
    (root / "train" / "note.txt").write_text("no image")
    (root / "train" / "aa.PNG").write_bytes(b"x")
    images = find_images((root / "train",))
    assert images.ids == ["aa", *(f"train{i:02d}" for i in range(6))]
    assert images.paths[1] == root / "train" / "part_0" / "train00.jpg"
    assert images.facts[0].size_bytes == 1


def test_a_second_file_of_an_id_is_told(root):
    (root / "train" / "part_0" / "train01.png").write_bytes(b"x")
    images = find_images((root / "train",))
    assert images.repeated == ("train01",)
    assert images.paths[1].name == "train01.jpg"
