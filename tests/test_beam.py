import hashlib
import json
import pickle
import sys

import pytest
import small_layout
from etils import epath

from jaxii.errors import InputError
from jaxii.prepare import beam, shards
from jaxii.prepare.beam import Beam
from jaxii.prepare.kaggle import Layout, prepare

DIRECT = Beam("DirectRunner")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Two images per shard, three shards of train; two images are damaged."""
    monkeypatch.setattr(shards, "SHARD_IMAGES", 2)
    root = small_layout.write(tmp_path / "kaggle")
    folder = root / "train" / "part_0"
    (folder / "train03.jpg").write_bytes(b"no image")
    (folder / "train05.jpg").write_bytes(small_layout.jpeg(5)[:-10])
    return root


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same_dataset(folder, other):
    """Compares every file; TFDS's description contains neither folder nor time."""
    return content(folder) == content(other)


@pytest.fixture
def apache_beam():
    return pytest.importorskip("apache_beam")


def test_a_part_of_a_plan_has_the_labels_of_its_images(root, tmp_path, monkeypatch):
    plans = []
    monkeypatch.setattr(
        shards, "write", lambda output, plan, **rest: plans.append(plan) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        prepare(Layout.find(root), tmp_path / "out")
    part = plans[0].part(range(1, 3))
    assert part.table["image_id"].to_list() == ["train01", "train02"]
    assert part.table["label_ids"].to_list() == [[1, 1], [2]]
    assert len(part.paths) == len(part.facts) == len(part.table) == 2


def test_beam_writes_the_very_files_of_the_local_path(apache_beam, root, tmp_path):
    local = prepare(Layout.find(root), tmp_path / "local")
    counts = prepare(Layout.find(root), tmp_path / "beam", beam=DIRECT)
    assert same_dataset(tmp_path / "beam", tmp_path / "local")
    assert counts == local
    assert counts.split("train").dropped["unreadable"] == 2


def test_the_shards_are_written_by_the_pipeline(
    apache_beam, root, tmp_path, monkeypatch
):
    monkeypatch.setattr(shards, "write", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(Layout.find(root), tmp_path / "beam", beam=DIRECT)
    accounts = (tmp_path / "beam").glob("*-train.array_record-*.json")
    read = [json.loads(path.read_text()) for path in sorted(accounts)]
    assert [account["num_records"] for account in read] == [2, 1, 1]
    assert [row for account in read for row, _ in account["faults"]] == [3, 5]


def test_what_is_there_is_not_written_again(apache_beam, root, tmp_path, monkeypatch):
    out = tmp_path / "beam"
    with monkeypatch.context() as patch:
        patch.setattr(shards, "write", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(Layout.find(root), out, beam=DIRECT)
    lost = out / "labelled_images-train.array_record-00001-of-00003"
    lost.unlink()
    times = {path: path.stat().st_mtime_ns for path in out.glob("*-of-0000?")}
    prepare(Layout.find(root), out, beam=DIRECT)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    prepare(Layout.find(root), tmp_path / "local")
    assert same_dataset(out, tmp_path / "local")


def test_a_failed_pipeline_is_an_error_and_goes_on_locally(
    apache_beam, root, tmp_path, monkeypatch
):
    out = tmp_path / "beam"
    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_shard", lambda *_, **__: 1 / 0)
        with pytest.raises(Exception, match="division by zero"):
            prepare(Layout.find(root), out, beam=DIRECT)
    assert not list(out.glob("*-of-0000?"))
    prepare(Layout.find(root), out)
    prepare(Layout.find(root), tmp_path / "local")
    assert same_dataset(out, tmp_path / "local")


def test_progress_ends_at_the_images_of_all_splits(apache_beam, root, tmp_path):
    seen = {}
    prepare(
        Layout.find(root),
        tmp_path / "beam",
        beam=DIRECT,
        on_progress=lambda done, total, what: seen.update({what: (done, total)}),
    )
    assert seen["DirectRunner"] == (11, 11)
    assert seen["train"] == (6, 6)


@pytest.mark.parametrize(
    ("runner", "options", "pattern"),
    [
        ("Direkt", (), r"--beam_runner=Direkt: Unexpected pipeline runner"),
        (
            "DirectRunner",
            ("proyect=x",),
            "--beam_options: Apache Beam has no option proyect",
        ),
        ("DataflowRunner", (), "which Dataflow cannot access"),
    ],
)
def test_what_cannot_run_is_refused_at_once(
    apache_beam, root, tmp_path, runner, options, pattern
):
    with pytest.raises(InputError, match=pattern):
        prepare(Layout.find(root), tmp_path / "out", beam=Beam(runner, options))
    assert not (tmp_path / "out").exists()


def test_without_beam_the_message_says_what_to_install(root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(InputError, match=r"pip install 'jaxii\[beam\]'"):
        prepare(Layout.find(root), tmp_path / "out", beam=DIRECT)


def test_dataflow_is_given_no_local_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(Beam, "pipeline", lambda self: None)
    beam = Beam("DataflowRunner")
    beam.check([epath.Path("gs://bucket/data")])
    with pytest.raises(InputError, match="which Dataflow cannot access"):
        beam.check([epath.Path("gs://bucket/data"), tmp_path])


def test_an_element_that_was_written_before_is_left_alone(tmp_path):
    shard = tmp_path / "shard"
    shard.write_bytes(b"whole")
    shards.account_path(shard).write_text("{}")
    beam._write_planned((str(shard), ""), short_side=16)
    assert shard.read_bytes() == b"whole"


def test_a_plan_that_somebody_else_wrote_is_not_unpickled(tmp_path):
    class Runs:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    job = str(tmp_path / "shard"), hashlib.sha256(b"own").hexdigest()
    (tmp_path / "shard.plan").write_bytes(pickle.dumps(Runs()))
    with pytest.raises(ValueError, match="does not match the plan of this job"):
        beam._write_planned(job, short_side=16)
    assert not (tmp_path / "ran").exists()
