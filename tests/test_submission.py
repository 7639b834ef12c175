"""Tests that `evaluate` and `predict --ids` write the same submission, a row per id."""

import csv
import json
import shutil

import numpy as np
import oracle
import pytest
import small_layout
import small_runs

from jaxii import storage
from jaxii.data import folder
from jaxii.decoding.decoders import load
from jaxii.errors import InputError
from jaxii.evaluation import draft
from jaxii.evaluation.image_records import ImageFiles
from jaxii.evaluation.predictions import Answer, ExpectedF2
from jaxii.prepare import build
from jaxii.prepare.kaggle import Layout, prepare
from jaxii.runs import predict
from jaxii.runs.evaluate import evaluate
from jaxii.runs.export import export
from jaxii.runs.inference import InferenceOptions
from jaxii.runs.run import Run
from jaxii.runs.train import train
from jaxii.runs.workdir import Workdir

pytestmark = pytest.mark.usefixtures("without_drawings")

NUM_TEST = 9
DAMAGED, MISSING = "test2", "test5"
# Shuffled, with tuning images between them.
SAMPLE = ("test7", "tune1", *(f"test{i}" for i in (3, 0, 8, 2, 5, 1, 6, 4)), "tune0")


def write(root):
    """Writes a layout whose test has a damaged and a missing image."""
    files = small_layout.write(root / "files", num_train=24)
    for i in range(24):
        small_layout.put(
            files / "train" / "part_0", f"train{i:02d}", oracle.image(i % 3, 3)
        )
    images = files / "stage_1_test_images"
    names = [f"test{i}" for i in range(NUM_TEST)] + ["tune0", "tune1"]
    for i, name in enumerate(names):
        encoded = small_layout.named(oracle.image(i % 3, 3), name)
        encoded = encoded[: len(encoded) // 2] if name == DAMAGED else encoded
        (images / f"{name}.jpg").write_bytes(encoded)
    (images / f"{MISSING}.jpg").unlink()
    rows = [f"{name}," for name in SAMPLE]
    small_layout.lines(
        files / "stage_1_sample_submission.csv", "image_id,labels", *rows
    )
    return files


@pytest.fixture(scope="module", autouse=True)
def knows_the_truth():
    with oracle.every_network_is(oracle.network(((0,), (1,), (2,)))):
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    root = tmp_path_factory.mktemp("submission")
    files = write(root)
    prepare(Layout.find(files), root / "data", num_workers=1)
    workdir = Workdir(root / "run")
    train(oracle.make_config(root / "data"), workdir, lambda step: False)
    return files, workdir


def predicted(files, workdir, output, *, decoder="", sheet=None, **options):
    request = predict.Request(
        images=str(files / "stage_1_test_images"),
        ids=files / "stage_1_sample_submission.csv",
        output=output,
        sheet=sheet,
    )
    options = InferenceOptions(**options)
    predict.predict(workdir, request=request, decoder=decoder, options=options)
    return output.read_bytes()


def test_evaluate_and_predict_write_the_same_submission(done, tmp_path):
    files, workdir = done
    expected = predicted(files, workdir, tmp_path / "answers.csv")
    assert (workdir.path / "submission.csv").read_bytes() == expected
    rows = list(csv.reader(expected.decode().splitlines()))
    assert [row[0] for row in rows[1:]] == list(SAMPLE)
    codes = small_layout.CODES
    assert dict(rows)["test3"] == dict(rows)["tune0"] == codes[0]
    assert dict(rows)["tune1"] == codes[1]


# The rows of the test are a batch of 8 and one of 3.


@pytest.fixture
def stop(monkeypatch):
    """Stops a prediction after its first batch, as if the process was killed."""

    def stop(*args, **options):
        def killed(path, text):
            storage.write_text(path, text)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(draft, "SAVE_SECONDS", 0.0)
            patch.setattr(draft, "write_text", killed)
            predicted(*args, **options)

    return stop


@pytest.fixture
def read_rows(monkeypatch):
    """The rows of the images that are read."""
    rows, jpeg = set(), ImageFiles.jpeg

    def noted(self, row):
        rows.add(row)
        return jpeg(self, row)

    monkeypatch.setattr(ImageFiles, "jpeg", noted)
    return rows


def evaluated_again(workdir, **changes):
    """Replaces the figures of a run by those of another evaluation."""
    path = workdir.path / "metrics.json"
    metrics = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(metrics))
    small_runs.seal(workdir.path)


@pytest.mark.parametrize("name", ["answers.csv", "answers.jsonl"])
def test_a_prediction_that_was_stopped_goes_on_as_if_it_was_not(
    done, tmp_path, stop, read_rows, capfd, name
):
    files, workdir = shutil.copytree(done[0], tmp_path / "files"), done[1]
    (files / "stage_1_test_images" / f"{SAMPLE[9]}.jpg").write_bytes(b"")
    output, again = tmp_path / name, tmp_path / "again" / name
    expected = predicted(files, workdir, output)
    said = capfd.readouterr()
    stop(files, workdir, again)
    assert [path.name for path in again.parent.iterdir()] == [f".{name}.part"]
    read_rows.clear()
    capfd.readouterr()
    assert predicted(files, workdir, again) == expected
    assert read_rows == {8, 9, 10}
    found = capfd.readouterr()
    assert found.err.replace(str(again), str(output)) == said.err
    assert said.err.count("damaged  ") == 3
    told = f"continues after 8 of 11 images; if one of them has changed, remove {again}"
    lines = [line for line in found.out.splitlines() if "/" not in line]
    assert lines == [line for line in said.out.splitlines() if "/" not in line]
    assert told.replace(name, f".{name}.part first") in found.out
    beside = f"{name}.provenance.json"
    record = output.with_name(beside).read_bytes()
    assert again.with_name(beside).read_bytes() == record
    assert sorted(path.name for path in again.parent.iterdir()) == [name, beside]


def test_a_prediction_with_label_shift_goes_on(done, tmp_path, stop, capfd):
    expected = predicted(*done, tmp_path / "answers.csv", label_shift=True)
    stop(*done, tmp_path / "again.csv", label_shift=True)
    again = predicted(*done, tmp_path / "again.csv", label_shift=True)
    assert again == expected
    assert "continues after 8 of 11 images" in capfd.readouterr().out


@pytest.mark.parametrize(
    "change", ["decoder", "label_shift", "sheet", "images", "folder", "metrics"]
)
def test_another_prediction_with_the_same_output_starts_anew(
    done, tmp_path, stop, read_rows, capfd, change
):
    (files, workdir), output = done, tmp_path / "answers.csv"
    files = shutil.copytree(files, tmp_path / "files")
    workdir = Workdir(shutil.copytree(workdir.path, tmp_path / "run"))
    stop(files, workdir, output)
    read_rows.clear()
    options = {
        "decoder": {"decoder": "top_k"},
        "label_shift": {"label_shift": True},
        "sheet": {"sheet": tmp_path / "sheet.html"},
    }.get(change, {})
    if change == "images":
        path = files / "stage_1_sample_submission.csv"
        header, *rows = path.read_text().splitlines()
        small_layout.lines(path, header, *reversed(rows))
    if change == "folder":
        # Frames of two cameras often have the same names.
        files = files.rename(tmp_path / "others")
    if change == "metrics":
        evaluated_again(workdir, created="2026-01-01T00:00:00")
    predicted(files, workdir, output, **options)
    assert read_rows == set(range(11))
    assert "continues" not in capfd.readouterr().out
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("what", ["predict", "decoders", "export"])
def test_an_evaluation_that_is_replaced_while_it_is_read_is_not_used(
    done, tmp_path, monkeypatch, what
):
    files, workdir = done
    workdir = Workdir(shutil.copytree(workdir.path, tmp_path / "run"))

    def load_replaced(path, label_embeddings):
        evaluated_again(workdir, hardware="another")
        return load(path, label_embeddings)

    monkeypatch.setattr("jaxii.runs.run.load_decoders", load_replaced)
    monkeypatch.setattr("jaxii.runs.export.decoding.load", load_replaced)
    with pytest.raises(InputError, match="evaluated again while its files were read"):
        if what == "predict":
            predicted(files, workdir, tmp_path / "answers.csv")
        elif what == "export":
            export(
                workdir, output=tmp_path / "out", decoder="", onnx=False, data_dir=""
            )
        else:
            with Run.open(workdir.path) as run:
                _ = run.decoders
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_images_that_cannot_be_read_are_not_kept(done, tmp_path, monkeypatch):
    files, workdir = done
    monkeypatch.setattr(draft, "SAVE_SECONDS", 0.0)
    files = shutil.copytree(files, tmp_path / "files")
    for path in (files / "stage_1_test_images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match="none of the 11 images can be read"):
        predicted(files, workdir, tmp_path / "out" / "answers.csv")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_process_without_the_draft_continues_at_the_same_image(done, monkeypatch):
    monkeypatch.setattr(
        predict.multihost_utils, "broadcast_one_to_all", lambda own: own + 8
    )
    decoders = load(done[1].path / "decoders.npz", label_embeddings=None)
    totals = predict.Totals(predict.Damaged(), ExpectedF2(decoders, "top_k", None))
    assert totals.restore(None) == 8
    damaged = Answer(row=8, label_ids=np.zeros(0, int), probs=np.zeros(3), fault="cut")
    # Other processes do not know which of the first images could be read.
    assert list(totals.damaged.watch([damaged])) == [damaged]


def test_two_predictions_of_one_output_do_not_mix(done, tmp_path):
    output = tmp_path / "answers.csv"
    used = pytest.raises(InputError, match="is in use by process")
    with storage.held(tmp_path / ".answers.csv.part"), used:
        predicted(*done, output)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_read_is_counted_and_given_the_best_constant(done, capfd):
    _, workdir = done
    evaluate(workdir, data_dir="", stage="", tune_on="")
    said = capfd.readouterr().out
    assert f"2 of {len(SAMPLE)} images are missing or cannot be read" in said
    with (workdir.path / "submission.csv").open() as file:
        rows = dict(csv.reader(file))
    constant = " ".join(workdir.metrics().constant.labels)
    assert rows[DAMAGED] == rows[MISSING] == constant


def test_an_adapted_submission_has_the_same_rows(done):
    _, workdir = done
    options = InferenceOptions(label_shift=True)
    evaluate(workdir, data_dir="", stage="", tune_on="", options=options)
    with (workdir.path / "submission_label_shift.csv").open() as file:
        assert [row[0] for row in csv.reader(file)] == ["image_id", *SAMPLE]


def test_without_a_sample_the_listed_images_are_submitted_in_order(tmp_path):
    files = write(tmp_path)
    truth = [f"test{i},/m/cat" for i in (5, 3, 1, 2)]
    small_layout.lines(files / "test_labels.csv", "image_id,labels", *truth)
    layout = Layout.find(files, sample_submission=None)
    prepare(layout, tmp_path / "data", num_workers=1)
    expected = "test1", "test2", "test3", "test5"
    assert folder.submission_ids(tmp_path / "data") == expected


def test_another_sample_is_another_dataset(tmp_path):
    files, data = write(tmp_path), tmp_path / "data"
    prepare(Layout.find(files), data, num_workers=1)
    path = files / "stage_1_sample_submission.csv"
    header, *rows = path.read_text().splitlines()
    small_layout.lines(path, header, *reversed(rows))
    with pytest.raises(InputError, match="prepared from other files"):
        prepare(Layout.find(files), data, num_workers=1)


def test_a_sample_with_file_names_is_answered_in_its_own_words(done, tmp_path):
    files = write(tmp_path)
    path = files / "stage_1_sample_submission.csv"
    header, *rows = path.read_text().splitlines()
    rows = [row.replace(",", ".jpg,", 1) for row in rows]
    small_layout.lines(path, header, *rows)
    prepare(Layout.find(files), tmp_path / "data", num_workers=1)
    expected = tuple(f"{image_id}.jpg" for image_id in SAMPLE)
    assert folder.submission_ids(tmp_path / "data") == expected


def test_odd_ids_are_kept(tmp_path):
    ids = ("b/été, 1", 'a"quoted"', "007", " x")
    build.save_submission_ids(tmp_path, ids)
    assert folder.submission_ids(tmp_path) == ids
