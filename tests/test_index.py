import numpy as np
import pytest

from jaxii.data import index
from jaxii.errors import InputError


def small():
    return index.table(
        image_ids=["a", "b", "c"],
        groups=["a", "b", "c"],
        domains=["x", "y", "x"],
        slices=["dark", "light", "dark"],
        offsets=np.array([0, 2, 2, 3]),
        label_ids=np.array([5, 1, 3], np.int32),
        confidences=np.array([1.0, 0.0, 0.5], np.float32),
        label_sources=np.array([0, 0, 1], np.uint8),
    )


def test_an_index_survives_a_file(tmp_path):
    index.save(small(), tmp_path / "i.parquet")
    columns = index.columns(index.load(tmp_path / "i.parquet"), ("dark", "light"))
    assert columns.image_ids.tolist() == ["a", "b", "c"]
    assert columns.domains.tolist() == ["x", "y", "x"]
    assert columns.slice_ids.tolist() == [0, 1, 0]
    assert columns.offsets.tolist() == [0, 2, 2, 3]
    assert columns.label_ids.tolist() == [5, 1, 3]
    assert columns.confidences.tolist() == [1.0, 0.0, 0.5]
    assert columns.label_sources.tolist() == [0, 0, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["i.parquet"]


def test_selected_rows_keep_their_labels():
    columns = index.columns(small(), ("dark", "light"))
    chosen = columns.select(np.array([2, 1, 0, 2], np.int64))
    assert chosen.image_ids.tolist() == ["c", "b", "a", "c"]
    assert chosen.offsets.tolist() == [0, 1, 1, 3, 4]
    assert chosen.label_ids.tolist() == [3, 5, 1, 3]
    assert chosen.label_sources.tolist() == [1, 0, 0, 1]


def test_an_index_without_any_label_is_read():
    none = np.zeros(0)
    frame = index.table(
        image_ids=["a", "b"],
        groups=["g", "g"],
        domains=["x", "x"],
        slices=["all", "all"],
        offsets=np.zeros(3, np.int64),
        label_ids=none.astype(np.int32),
        confidences=none.astype(np.float32),
        label_sources=none.astype(np.uint8),
    )
    columns = index.columns(frame, ("all",))
    assert columns.offsets.tolist() == [0, 0, 0]
    assert columns.groups.tolist() == ["g", "g"]


def test_no_rows_is_an_index():
    assert len(index.columns(small().head(0), ("dark",))) == 0


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "i.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="prepare it again"):
        index.load(tmp_path / "i.parquet")


def test_the_cache_is_beside_the_data_where_that_is_writable(tmp_path):
    assert index.cache_path(tmp_path, "i") == tmp_path / "i.parquet"


def test_the_cache_of_a_read_only_folder_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index.os, "access", lambda *_: False)
    path = index.cache_path(tmp_path / "data", "i")
    assert path.parent.parent == tmp_path / "cache" / "jaxii"
    assert path.parent.is_dir()


def test_a_cache_without_any_writable_folder_is_refused(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index.os, "access", lambda *_: False)
    with pytest.raises(InputError, match="set XDG_CACHE_HOME"):
        index.cache_path(tmp_path / "data", "i")
