import json
import os

import pytest

from jaxii import manifest
from jaxii.errors import InputError
from jaxii.manifest import Digest, File, Manifest, describe

FIX = "make it again"


@pytest.fixture
def folder(tmp_path):
    """A folder with a file and a file in a subfolder, and their manifest."""
    (tmp_path / "below").mkdir()
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "below" / "b.bin").write_bytes(bytes(range(256)) * 8)
    names = "a.txt", "below/b.bin"
    files = {name: describe(tmp_path / name) for name in names}
    Manifest(files).save(tmp_path / manifest.NAME)
    return tmp_path


def check(folder, **options):
    loaded = Manifest.load(folder / manifest.NAME, fix=FIX)
    loaded.check(folder, by="the list", fix=FIX, **options)
    return loaded


def test_a_folder_as_it_was_written_is_accepted(folder):
    assert check(folder, verify=True).files.keys() == {"a.txt", "below/b.bin"}


def test_files_that_are_not_listed_do_not_matter(folder):
    (folder / "more.txt").write_text("x")
    check(folder, verify=True)


def test_the_hash_is_xxh3_of_128_bits(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    # The first test vector of the reference implementation: no bytes, seed 0.
    assert describe(tmp_path / "empty") == File(0, "99aa06d3014798d86001c324468d497f")


def test_a_missing_file_is_named(folder):
    (folder / "below" / "b.bin").unlink()
    with pytest.raises(InputError, match=r"b\.bin is missing; .*the list; make"):
        check(folder)


def test_another_size_is_named_without_reading(folder, monkeypatch):
    monkeypatch.setattr(manifest, "describe", None)
    os.truncate(folder / "below" / "b.bin", 1024)
    with pytest.raises(InputError, match=r"damaged.*1,024 bytes instead of 2,048"):
        check(folder)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_one_flipped_bit_of_a_small_file_is_found(folder):
    flip(folder / "a.txt")
    with pytest.raises(InputError, match=r"a\.txt is damaged"):
        check(folder)


@pytest.mark.parametrize("options", [{"verify": True}, {"hashed": ["below/b.bin"]}])
def test_one_flipped_bit_of_a_large_file_is_found_where_it_is_read(
    folder, monkeypatch, options
):
    monkeypatch.setattr(manifest, "SMALL_BYTES", 100)
    flip(folder / "below" / "b.bin")
    check(folder)
    with pytest.raises(InputError, match=r"b\.bin is damaged"):
        check(folder, **options)


def test_only_named_files_are_checked(folder):
    flip(folder / "a.txt")
    check(folder, names=["below/b.bin"], verify=True)
    with pytest.raises(InputError, match=r"a\.txt"):
        check(folder, names=["a.txt"])


def test_progress_counts_the_files_that_are_read(folder):
    seen = []
    check(folder, verify=True, on_progress=lambda *event: seen.append(event))
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'"x"', b'{"files": 1}', b"\xff\xfe\x00"]
)
def test_what_is_no_manifest_is_refused(folder, content):
    (folder / manifest.NAME).write_bytes(content)
    with pytest.raises(InputError, match=r"manifest\.json is damaged.*make it again"):
        check(folder)


def test_an_edited_manifest_is_refused(folder):
    path = folder / manifest.NAME
    stored = json.loads(path.read_text())
    stored["files"]["a.txt"]["size_bytes"] = 6
    path.write_text(json.dumps(stored))
    with pytest.raises(InputError, match=r"manifest\.json is damaged: its own hash"):
        check(folder)


def test_a_missing_manifest_is_refused(folder):
    (folder / manifest.NAME).unlink()
    with pytest.raises(InputError, match=r"manifest\.json is missing; make it again"):
        check(folder)


def test_a_digest_follows_a_file_that_grows(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"one\n")
    digest = Digest(path)
    with path.open("ab") as file:
        file.write(b"two\n")
    digest.update(b"two\n")
    assert digest.file() == describe(path) == describe(path, first_bytes=8)


def test_the_first_bytes_of_a_file_are_described_alone(tmp_path):
    (tmp_path / "whole").write_bytes(b"one\ntwo\n")
    (tmp_path / "first").write_bytes(b"one\n")
    assert describe(tmp_path / "whole", 4) == describe(tmp_path / "first")
