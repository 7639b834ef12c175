"""Tests the one function that reads image files: faults are named, nothing hangs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import fsspec
import odd_files
import pytest
import small_layout
from etils import epath

from jaxii.errors import InputError
from jaxii.prepare import image_files, shards
from jaxii.prepare.image_files import FileFacts
from jaxii.prepare.kaggle import Layout, prepare
from jaxii.prepare.tables import images
from jaxii.prepare.tables.notes import Notes

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """Messages of `prepare`, `new` and `predict` about odd files, in one process."""
    root = odd_files.write(tmp_path_factory.mktemp("odd") / "kaggle")
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "odd_files.py", root],
        env={**os.environ, "PYTHONPATH": f"{ROOT}", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_prepare_counts_files_that_are_no_images_and_names_them(said):
    train = next(line for line in said["counts"] if line.startswith("train:"))
    assert "13 images read, 6 kept; 7 unreadable" in train
    assert "a_pipe: not a regular file" in train
    assert "dangling: no such file" in train
    test = next(line for line in said["counts"] if line.startswith("test:"))
    assert "5 images read, 3 kept; 2 unreadable" in test


def test_prepare_leaves_out_names_that_are_not_utf8_and_counts_them(said):
    train = next(line for line in said["counts"] if line.startswith("train:"))
    assert "files whose name is not UTF-8 (not read) 1 (" in train
    assert "not_utf8_\\udcff.jpg" in train


def test_new_names_files_that_are_no_images(said):
    assert "7 broken images" in said["new"]
    assert "'part_0/a_pipe.jpg: not a regular file'" in said["new"]
    assert "1 images whose names are not UTF-8" in said["new"]


def test_images_of_which_no_name_is_utf8_are_refused_with_the_fix(tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/not_utf8_\xff.jpg")).touch()
    with pytest.raises(InputError, match=r"not_utf8_\\udcff\.jpg.*PYTHONUTF8=1"):
        images.find(tmp_path, Notes())


def test_reading_headers_alone_finds_the_same_faults(said):
    assert list(said["headers"].values()) == list(odd_files.FAULTS.values())


def test_predict_names_files_that_are_no_images(said):
    found = {name: said["predict"][f"'{name}'"] for name in odd_files.FAULTS}
    assert found == odd_files.FAULTS


def test_predict_reads_a_name_that_is_not_utf8(said):
    assert said["predict"]["'not_utf8_\\udcff.jpg'"].startswith("could not be read at")


def test_paths_without_an_image_file_are_named_by_their_fault(tmp_path):
    (tmp_path / "a_folder.jpg").mkdir()
    for text, fault in odd_files.LISTED_FAULTS.items():
        path = Path(text)
        if text == "a_folder.jpg":
            path = tmp_path / text
        with pytest.raises(ValueError, match=re.escape(fault)):
            image_files.read(path)


def test_a_file_is_too_large_by_its_size_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "MAX_FILE_BYTES", 2**20)
    path = tmp_path / "a.jpg"
    path.write_bytes(b"x" * 2**20)
    assert len(image_files.read(path)) == 2**20
    path.write_bytes(b"x" * (2**20 + 1))
    with pytest.raises(ValueError, match="1,048,577 bytes; at most 1 MiB are read"):
        image_files.read(path)


def test_an_object_in_a_bucket_is_refused_by_its_listed_size():
    with pytest.raises(ValueError, match="at most 256 MiB"):
        image_files.read(epath.Path("gs://nobody/a.jpg"), 10**12)


def test_a_storage_that_fails_is_not_the_fault_of_a_file(tmp_path, monkeypatch):
    def fail(path):
        raise OSError(5, "Input/output error")

    (tmp_path / "a.jpg").write_bytes(b"")
    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(OSError, match="Input/output"):
        image_files.read(tmp_path / "a.jpg")


def names_below(*folders):
    """Returns the paths of the files below folders, relative to the first's parent."""
    paths = [path for path, _, _ in image_files.files_below(folders)]
    return sorted(os.path.relpath(path, folders[0].parent) for path in paths)


def test_links_add_only_folders_without_a_path_of_their_own(tmp_path):
    for name in ("in/a/1.jpg", "in/b/2.jpg", "out/3.jpg", "out/deep/4.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for link, target in (
        *(("in/a/to_b", "in/b"), ("in/b/to_a", "in/a"), ("out/to_in", "in")),
        *(("in/z", "out"), ("in/a/y", "out")),
    ):
        (tmp_path / link).symlink_to(tmp_path / target)
    wanted = ["in/a/1.jpg", "in/a/y/3.jpg", "in/a/y/deep/4.jpg", "in/b/2.jpg"]
    assert names_below(tmp_path / "in") == wanted
    skipped = image_files.Skipped()
    list(image_files.files_below((tmp_path / "in",), skipped))
    again = sorted(os.path.relpath(path, tmp_path) for path in skipped.reached_again)
    assert again == ["in/a/to_b", "in/a/y/to_in", "in/b/to_a", "in/z"]


def test_of_several_folders_those_that_are_links_come_last(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "1.jpg").touch()
    link = tmp_path / "early"
    link.symlink_to("train")
    assert names_below(link, tmp_path / "train") == ["train/1.jpg"]
    assert names_below(link) == ["early/1.jpg"]


def test_a_link_to_a_hidden_folder_is_read_by_its_own_name(tmp_path):
    (tmp_path / "in" / ".store" / "cat").mkdir(parents=True)
    (tmp_path / "in" / ".store" / "cat" / "1.jpg").touch()
    (tmp_path / "in" / "cat").symlink_to(".store/cat")
    assert names_below(tmp_path / "in") == ["in/cat/1.jpg"]


def test_hidden_objects_of_a_bucket_are_left_out(monkeypatch):
    system = fsspec.filesystem("memory")
    root = epath.Path("gs://.hidden")
    monkeypatch.setattr(fsspec, "url_to_fs", lambda path: (system, "/.hidden"))
    for name in ("a.jpg", ".thumbs/b.jpg", "x/__MACOSX/c.jpg", "x/._d.jpg", "x/e.jpg"):
        system.pipe_file(f"/.hidden/{name}", b"x")
    skipped = image_files.Skipped()
    names = [name for _, name, _ in image_files.files_below((root,), skipped)]
    assert sorted(names) == ["a.jpg", "e.jpg"]
    assert len(skipped.hidden) == 3


def test_facts_change_with_the_time_of_a_file_and_are_empty_for_none(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"abc")
    os.utime(path, ns=(0, 1_234_567_891))
    assert image_files.facts(path) == FileFacts(3, "1234567891")
    assert image_files.facts(tmp_path / "gone.jpg") == FileFacts(0, "")
    assert image_files.facts(Path("x" * 5000)) == FileFacts(0, "")
    assert image_files.facts(Path("a\0b")) == FileFacts(0, "")


@pytest.mark.parametrize(
    ("info", "stamp"),
    [
        ({"generation": "7", "etag": "e"}, "7"),
        ({"etag": "e", "md5Hash": "m"}, "e"),
        ({"md5Hash": "m"}, "m"),
        ({"mtime": 12}, "12"),
        ({}, ""),
    ],
)
def test_the_facts_of_a_listed_object_are_its_size_and_what_changes(info, stamp):
    assert image_files.facts_listed({"size": 5, **info}) == FileFacts(5, stamp)


def test_shards_are_written_from_what_this_module_reads(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(
        shards.image_files, "read", lambda path, size: read.append(size) or b""
    )
    root = small_layout.write(tmp_path)
    with pytest.raises(Exception, match="no training image is left"):
        prepare(Layout.find(root), tmp_path / "out")
    assert len(read) == 6 and all(read)
