"""`evaluate` and `predict --ids` write the same submission, a row for each id."""

import csv

import oracle
import pytest
import small_layout

from jaxii.data import folder
from jaxii.errors import InputError
from jaxii.prepare import build
from jaxii.prepare.kaggle import Layout, prepare
from jaxii.runs import predict
from jaxii.runs.evaluate import evaluate
from jaxii.runs.inference import InferenceOptions
from jaxii.runs.train import train
from jaxii.runs.workdir import Workdir

pytestmark = pytest.mark.usefixtures("without_drawings")

NUM_TEST = 9
DAMAGED, MISSING = "test2", "test5"
# Shuffled, with images of tuning between them.
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


def predicted(files, workdir, output):
    request = predict.Request(
        images=str(files / "stage_1_test_images"),
        ids=files / "stage_1_sample_submission.csv",
        output=output,
    )
    predict.predict(workdir, request=request, decoder="", options=InferenceOptions())
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
