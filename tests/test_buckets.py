"""Tests datasets and runs in a bucket, against a local emulator of Google's storage.

Skipped without it: pip install 'jaxii[gcs]' gcp-storage-emulator
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_layout

from jaxii.data.dataset import open_dataset
from jaxii.errors import InputError
from jaxii.evaluation import draft
from jaxii.prepare import shards
from jaxii.prepare.beam import Beam
from jaxii.prepare.kaggle import Layout, prepare
from jaxii.storage import (
    LOCK,
    at,
    check_held,
    held,
    local_draft,
    names_in,
    size_of,
    write_beside,
)
from jaxii.train.telemetry.history import read_history

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def bucket():
    """A bucket; gcsfs and array_record find it through the environment."""
    objects = pytest.importorskip("gcp_storage_emulator.handlers.objects")
    pytest.importorskip("gcsfs")
    plain = objects.download

    def download(request, response, storage, *words, **named):
        # The real service sends this header and TensorStore needs it; the emulator
        # omits it.
        plain(request, response, storage, *words, **named)
        if response.status < 300:
            place = request.params["bucket_name"], request.params["object_id"]
            generation = storage.get_file_obj(*place).get("generation")
            response["x-goog-generation"] = generation or "1"

    objects.download = download
    from gcp_storage_emulator import server

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    emulator = server.create_server(
        "127.0.0.1", port, in_memory=True, default_bucket="images"
    )
    emulator.start()
    with pytest.MonkeyPatch.context() as patch:
        for name in (
            "STORAGE_EMULATOR_HOST",
            "CLOUD_STORAGE_EMULATOR_ENDPOINT",
            "TENSORSTORE_GCS_HTTP_URL",
        ):
            patch.setenv(name, f"http://127.0.0.1:{port}")
        yield "gs://images"
    emulator.stop()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = small_layout.write(tmp_path_factory.mktemp("local") / "kaggle")
    (root / "train" / "part_0" / "train03.jpg").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def uploaded(bucket, root):
    for path in root.rglob("*"):
        if path.is_file():
            name = path.relative_to(root).as_posix()
            at(f"{bucket}/kaggle/{name}").write_bytes(path.read_bytes())
    return f"{bucket}/kaggle"


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_IMAGES", 2)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("beam", [None, Beam("DirectRunner")])
def test_a_dataset_prepared_in_a_bucket_has_the_local_files(
    bucket, uploaded, root, tmp_path, beam
):
    if beam is not None:
        pytest.importorskip("apache_beam")
    out = at(f"{bucket}/{'threads' if beam is None else 'beam'}")
    counts = prepare(Layout.find(uploaded), out, beam=beam)
    assert counts == prepare(Layout.find(root), tmp_path / "local")
    there, here = content(out), content(tmp_path / "local")
    # These record versions of the read files, which differ between disk and bucket.
    for name in ("preparation.json", "preparation.parquet", "manifest.json"):
        assert there.pop(name) and here.pop(name)
    assert there == here
    datasets = open_dataset(out, verify=True), open_dataset(tmp_path / "local")
    assert datasets[0].content_hash == datasets[1].content_hash


def test_a_dataset_in_a_bucket_opens_and_reads_as_the_local_one(
    bucket, uploaded, root, tmp_path
):
    prepare(Layout.find(uploaded), f"{bucket}/read")
    prepare(Layout.find(root), tmp_path / "local")
    there = open_dataset(f"{bucket}/read").splits["train"]
    here = open_dataset(tmp_path / "local").splits["train"]
    assert there.index.image_ids.tolist() == here.index.image_ids.tolist()
    for i in range(len(here.source)):
        for name, value in here.source[i].items():
            np.testing.assert_array_equal(there.source[i][name], value)


def test_a_complete_dataset_in_a_bucket_is_left_alone(bucket, uploaded):
    out = at(f"{bucket}/again")
    first = prepare(Layout.find(uploaded), out)
    times = {path.name: path.stat().mtime for path in out.iterdir()}
    assert prepare(Layout.find(uploaded), out) == first
    assert {path.name: path.stat().mtime for path in out.iterdir()} == times


def test_an_object_that_changed_at_the_same_size_is_named(bucket, root):
    there = at(f"{bucket}/changing")
    for path in root.rglob("*"):
        if path.is_file():
            name = path.relative_to(root).as_posix()
            (there / name).write_bytes(path.read_bytes())
    prepare(Layout.find(there), f"{bucket}/changed")
    data = bytearray((there / "train/part_0/train01.jpg").read_bytes())
    data[-10] ^= 1
    (there / "train/part_0/train01.jpg").write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"versions of 1 image files \(train01\)"):
        prepare(Layout.find(there), f"{bucket}/changed")


def test_an_interrupted_preparation_in_a_bucket_goes_on(bucket, uploaded):
    out = at(f"{bucket}/stopped")

    def interrupt(done, total, what):
        if what == "tuning":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(Layout.find(uploaded), out, on_progress=interrupt)
    with pytest.raises(InputError, match="did not finish"):
        open_dataset(out)
    prepare(Layout.find(uploaded), out)
    assert len(open_dataset(out).splits["train"].source) == 5


@pytest.mark.parametrize("when", ["train", "near copies"])
def test_a_preparation_in_a_bucket_stops_when_another_has_begun(bucket, uploaded, when):
    out = at(f"{bucket}/taken/{when.replace(' ', '_')}")

    def take_over(done, total, what):
        if what == when and done == total:
            (out / LOCK).write_text("process 1 on another host")

    with pytest.raises(InputError, match="taken over by process 1 on another host"):
        prepare(Layout.find(uploaded), out, on_progress=take_over)
    assert (out / LOCK).read_text() == "process 1 on another host"
    names = names_in(out)
    assert any(name.endswith(".thumbnails") for name in names)
    assert not any(name.startswith("index-") for name in names)
    # The process that took over completes the dataset.
    prepare(Layout.find(uploaded), out)
    assert len(open_dataset(out).splits["train"].source) == 5


RECIPE = """
from jaxii.config import default_config

def get_config(name=""):
    config = default_config()
    config.model.depth = 18
    config.model.width = 8
    config.model.compute_dtype = "float32"
    config.data.image_size_pixels = 32
    config.data.validation_fraction = 0.25
    config.global_batch_size = 4
    config.label_embedding.dim = 2
    config.evaluate_every_steps = 4
    config.log_every_steps = 1
    config.stages = (
        {
            "name": "only",
            "num_steps": 12,
            "embedding_head": True,
            "terms": {"bce": 1.0, "embedding": 1.0},
        },
    )
    return config
"""


def start(*words):
    return subprocess.Popen(
        [sys.executable, "-m", "jaxii.main", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(*words):
    """Runs a command to its end."""
    with start(*words) as process:
        said = process.stdout.read()
    assert process.returncode == 0, said


def figures(workdir):
    metrics = json.loads((workdir / "metrics.json").read_text())
    rows = [
        (row["kind"], row["step"], row.get("objective"), row.get("validation/f2"))
        for row in read_history(workdir / "history.jsonl")
    ]
    return metrics["splits"], rows


def test_a_run_in_a_bucket_that_is_killed_goes_on_as_one_on_disk(bucket, tmp_path):
    root = small_layout.write(tmp_path / "kaggle", num_train=24)
    recipe, data = tmp_path / "recipe.py", tmp_path / "prepared"
    recipe.write_text(RECIPE)
    prepare(Layout.find(root), data)
    words = "train", f"--config={recipe}", f"--data_dir={data}"
    here, there = tmp_path / "run", at(f"{bucket}/runs/a run")
    finish(*words, f"--workdir={here}")
    with start(*words, f"--workdir={there}") as killed:
        for line in killed.stdout:
            if "saved 4" in line:
                break
        killed.kill()
    assert not (there / "metrics.json").exists()
    finish(*words, f"--workdir={there}")
    assert any(row["step"] < 4 for row in read_history(there / "history.jsonl"))
    assert figures(there) == figures(here)
    same = "config.json", "labels.csv", "submission.csv"
    for name in same:
        assert (there / name).read_bytes() == (here / name).read_bytes()
    assert list((there / "tensorboard").iterdir())

    answers = there / "answers.csv"
    images = root / "stage_1_test_images"
    words = "predict", f"--workdir={there}", f"--images={images}"
    finish(*words, f"--output={answers}")
    assert answers.read_text().startswith("image_id,labels")
    finish("compare", there, here, f"--output={there / 'page.html'}")
    assert "<html" in (there / "page.html").read_text()


HOLD = """
import sys
from jaxii.storage import at, check_held, held
with held(at(sys.argv[1])):
    check_held(at(sys.argv[1]))
    print("held", flush=True)
    sys.stdin.read()
"""


def test_of_two_that_hold_a_folder_in_a_bucket_the_first_is_refused(bucket):
    folder = at(f"{bucket}/held")
    with held(folder):
        check_held(folder)
        words = [sys.executable, "-c", HOLD, str(folder)]
        pipe = subprocess.PIPE
        with subprocess.Popen(words, stdin=pipe, stdout=pipe) as other:
            assert other.stdout.readline() == b"held\n"
            told = f"held was taken over by process {other.pid} on .* since "
            with pytest.raises(InputError, match=told):
                check_held(folder)
            other.stdin.close()
        assert other.returncode == 0
        with pytest.raises(InputError, match="taken over by a process that has ended"):
            check_held(folder)
    with held(folder):
        check_held(folder)
    assert names_in(folder) == set()


def test_the_rows_of_an_unfinished_output_are_kept_in_a_bucket(bucket, monkeypatch):
    monkeypatch.setattr(draft, "SAVE_SECONDS", 0.0)
    rows, output = [f"row {i}\n" for i in range(6)], at(f"{bucket}/out/answers.csv")

    def opened():
        rest = {"state": lambda: {"sum": 1.5}, "batch_size": 2, "num_rows": 6}
        return draft.open_draft(output, "a", **rest)

    with opened() as first:
        first.completed(rows[:3])
        (first.folder / LOCK).write_text("process 1 on another host")
        with pytest.raises(InputError, match="was taken over by process 1"):
            first.completed(rows[3:])
    with opened() as second:
        assert (second.num_rows, second.found) == (2, {"sum": 1.5})
        assert "".join(second.completed(rows[2:])) == "".join(rows)
        second.remove()
    assert names_in(second.folder) == set()


def test_a_training_in_a_bucket_stops_when_another_has_begun(bucket, tmp_path):
    root = small_layout.write(tmp_path / "kaggle", num_train=24)
    recipe, data = tmp_path / "recipe.py", tmp_path / "prepared"
    recipe.write_text(RECIPE)
    prepare(Layout.find(root), data)
    workdir = at(f"{bucket}/runs/taken")
    words = "train", f"--config={recipe}", f"--data_dir={data}"
    with start(*words, f"--workdir={workdir}") as older:
        for line in older.stdout:
            if "step  1/12" in line:
                (workdir / LOCK).write_text("process 1 on another host")
    assert older.returncode == 2
    assert not (workdir / "metrics.json").exists()
    assert (workdir / LOCK).read_text() == "process 1 on another host"


def test_a_prefix_with_something_else_is_refused(bucket, uploaded):
    at(f"{bucket}/letters/letter.txt").write_text("dear")
    with pytest.raises(InputError, match="is not empty"):
        prepare(Layout.find(uploaded), f"{bucket}/letters")


def test_a_missing_shard_is_named(bucket, uploaded):
    out = at(f"{bucket}/missing")
    prepare(Layout.find(uploaded), out)
    (out / "labelled_images-train.array_record-00001-of-00003").unlink()
    with pytest.raises(InputError, match=r"00001-of-00003 is missing;.*delete"):
        open_dataset(out)


def test_a_failed_write_leaves_no_object(bucket):
    folder = at(f"{bucket}/failed")
    with pytest.raises(ZeroDivisionError):
        write_beside(folder / "a.txt", lambda file: file.write("half") and 1 / 0)
    with pytest.raises(ZeroDivisionError), local_draft(folder / "b") as draft:
        draft.write_text("half")
        _ = 1 / 0
    assert names_in(folder) == set()


def test_size_and_names_are_those_of_the_objects(bucket):
    folder = at(f"{bucket}/sizes")
    write_beside(folder / "a.txt", lambda file: file.write("four"))
    with local_draft(folder / "b.bin") as draft:
        draft.write_bytes(b"seven..")
    assert names_in(folder) == {"a.txt", "b.bin"}
    assert [size_of(folder / name) for name in ("a.txt", "b.bin")] == [4, 7]


def test_paths_know_where_they_are(bucket, tmp_path):
    assert at(str(tmp_path)) == tmp_path
    assert str(at(f"{bucket}/data") / "x") == f"{bucket}/data/x"


def test_without_gcsfs_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(InputError, match=r"pip install 'jaxii\[gcs\]'"):
        at("gs://bucket/data")
