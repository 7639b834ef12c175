import errno
import os
import platform
import resource
import stat
import subprocess
import sys

import pytest
from etils import epath

from jaxii.errors import InputError
from jaxii.storage import (
    LOCK,
    at,
    check_writable,
    held,
    local_draft,
    local_draft_folder,
    user_cache,
    write_beside,
    write_json,
)


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


@pytest.mark.parametrize("kind", [local_draft, local_draft_folder])
def test_two_drafts_of_one_path_have_two_names(tmp_path, kind):
    # As for processes of two containers, whose numbers may be equal.
    path = tmp_path / "file"
    with kind(path) as one, pytest.raises(RuntimeError), kind(path) as other:
        assert one != other
        assert {one.parent, other.parent} == {tmp_path}
        one.touch()
        raise RuntimeError
    assert path.exists()


def test_the_users_cache_is_where_the_xdg_specification_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert str(user_cache()) == "/elsewhere/jaxii"
    for ignored in ("", "not/absolute"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert user_cache() == tmp_path / ".cache" / "jaxii"


def test_a_user_without_a_home_folder_is_told_to_name_a_cache(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    # As expanduser does for a user that the system does not know.
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(InputError, match="set XDG_CACHE_HOME"):
        user_cache()


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


# Folders held by one process.

HOLD = """
import sys
from pathlib import Path
from jaxii.storage import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
CONTEND = """
import os, sys
from pathlib import Path
from jaxii.errors import InputError
from jaxii.storage import held
folder, times = Path(sys.argv[1]), 0
while times < 40:
    try:
        with held(folder):
            os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
            times += 1
            (folder / "inside").unlink()
    except InputError:
        pass
"""


def start(program, folder):
    words = [sys.executable, "-c", program, str(folder)]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True)


def test_a_held_folder_is_refused_with_its_holder_until_that_is_killed(tmp_path):
    with start(HOLD, tmp_path) as holder:
        assert holder.stdout.readline() == "held\n"
        for _ in range(2):
            with (
                pytest.raises(
                    InputError,
                    match=f"in use by process {holder.pid} on {platform.node()} since "
                    r"\d{4}-.*wait until it ends, stop it",
                ),
                held(tmp_path),
            ):
                pass
        holder.kill()
        holder.wait()
    assert (tmp_path / LOCK).exists()
    with held(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / LOCK).read_text()
    assert not (tmp_path / LOCK).exists()


def test_no_two_processes_hold_a_folder_at_once(tmp_path):
    contenders = [start(CONTEND, tmp_path) for _ in range(3)]
    for process in contenders:
        process.communicate()
    assert [process.returncode for process in contenders] == [0, 0, 0]


def test_what_is_refused_while_it_holds_a_new_folder_leaves_none(tmp_path):
    with pytest.raises(RuntimeError), held(tmp_path / "new" / "run"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with held(tmp_path / "new" / "run"):
        (tmp_path / "new" / "run" / "file").touch()
    assert [path.name for path in (tmp_path / "new" / "run").iterdir()] == ["file"]


def test_a_folder_that_cannot_be_written_is_not_held(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match=r"cannot be written \("), held(folder):
            pass


def test_a_folder_without_space_for_the_lock_is_named_and_left_as_it_was(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(OSError) as caught, held(tmp_path / "new"):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(tmp_path / "new" / LOCK)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_a_read_only_folder_is_refused_before_it_is_computed(
    tmp_path, monkeypatch
):
    check_writable(tmp_path / "new" / "file")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "new")
    with pytest.raises(InputError, match=r"new/file cannot be written \(its folder is"):
        check_writable(tmp_path / "new" / "file")


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_what_is_written_is_as_open_as_the_umask_says(tmp_path, umask):
    old = os.umask(umask)
    try:
        write_json(tmp_path / "new" / "text.json", {})
        write_beside(tmp_path / "bytes", lambda file: file.write(b"x"), binary=True)
        with local_draft_folder(tmp_path / "folder") as folder:
            (folder / "file").touch()
        with held(tmp_path / "run"):
            (tmp_path / "run" / "result").touch()
            lock = (tmp_path / "run" / LOCK).stat().st_mode
    finally:
        os.umask(old)
    found = [path.stat().st_mode for path in tmp_path.rglob("*")]
    files = {stat.S_IMODE(mode) for mode in (*found, lock) if stat.S_ISREG(mode)}
    assert files == {0o666 & ~umask}
    folders = {stat.S_IMODE(mode) for mode in found if stat.S_ISDIR(mode)}
    assert folders == {0o777 & ~umask}


@pytest.mark.parametrize("path", ["s3://b/run", "file:///x", "hdfs://a/b"])
def test_a_place_of_another_kind_is_refused(path):
    with pytest.raises(
        InputError, match=f"{path} is neither a local path nor a gs:// path"
    ):
        at(path)
