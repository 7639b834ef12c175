import pytest
from etils import epath

from jaxii.errors import InputError
from jaxii.storage import local_draft_folder, user_cache, write_beside, write_json


def test_json_is_whole_or_not_there(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"f2": float("nan")})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("binary", "what"), [(True, b"\r\n"), (False, "\u00e4\r\n")])
def test_a_file_is_what_was_written_and_replaces_the_old_one(tmp_path, binary, what):
    path = tmp_path / "new" / "file"
    write_beside(path, lambda file: file.write(what[:1]), binary=binary)
    write_beside(path, lambda file: file.write(what), binary=binary)
    assert path.read_bytes() == (what if binary else what.encode())
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(file):
        file.write("new")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_beside(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_users_cache_is_where_the_xdg_specification_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert str(user_cache()) == "/elsewhere/jaxii"
    for ignored in ("", "not/absolute"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert user_cache() == tmp_path / ".cache" / "jaxii"


@pytest.mark.parametrize("kind", [lambda path: path, epath.Path])
def test_a_folder_is_whole_or_not_there_and_replaces_none(tmp_path, kind):
    path = kind(tmp_path / "new" / "folder")
    with pytest.raises(RuntimeError), local_draft_folder(path) as draft:
        (draft / "file").write_text("half")
        raise RuntimeError
    assert not path.exists()
    with local_draft_folder(path) as draft:
        (draft / "file").write_text("whole")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["folder"]
    assert (path / "file").read_text() == "whole"
    with pytest.raises(InputError, match="already exists"), local_draft_folder(path):
        pass
