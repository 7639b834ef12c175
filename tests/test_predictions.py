"""Tests submissions from images on disk: a row per file, in order, also if damaged."""

import csv
import dataclasses
import json

import jax.numpy as jnp
import mixed_images
import numpy as np
import pytest
import small_layout

from jaxii.data.labels import Vocabulary
from jaxii.data.pipeline import LabelPolicy, ShardSpec, eval_batches
from jaxii.data.transforms import EvalTransform
from jaxii.distributed.mesh import make_mesh
from jaxii.evaluation import image_records, predictions
from jaxii.evaluation.image_records import ImageFiles
from jaxii.evaluation.predictor import Model, make_predict
from jaxii.evaluation.provenance import Provenance
from jaxii.models.multitask import Outputs

VOCABULARY = Vocabulary(("/m/dark", "/m/light", "/m/any"), ("Dark", "Light", "Any"))
PROVENANCE = {"clean": True}


def apply(params, batch_stats, images, *, train, key):
    """Predicts whether an image is dark or light."""
    shade = jnp.mean(images.astype(jnp.float32), axis=(1, 2, 3)) / 255 - 0.5
    logits = jnp.stack([-20 * shade, 20 * shade, 0 * shade], axis=-1)
    return Outputs(logits=logits, embedding=None, features=logits), batch_stats


def decode(probs, embedding):
    return [np.array([row.argmax()]) for row in probs]


def read(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


@pytest.fixture
def images(tmp_path):
    """13 files: dark and light in turn; 3 is truncated, 7 empty, 12 no image."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(13):
        encoded = small_layout.jpeg(30 if i % 2 == 0 else 220, 40, 40)
        encoded = {3: encoded[: len(encoded) // 2], 7: b"", 12: b"GIF89a"}.get(
            i, encoded
        )
        (folder / f"p{i:02d}.jpg").write_bytes(encoded)
    return folder


def files_of(given, more=()):
    return ImageFiles(image_records.find(str(given), more), 256)


def answers_of(files, progress=lambda *_: None):
    mesh = make_mesh()
    batches = eval_batches(
        files,
        transform=EvalTransform(size_pixels=16),
        policy=LabelPolicy(num_slots=1),
        shard=ShardSpec(global_batch_size=8, num_threads=2),
        mask_damaged=True,
    )
    return list(
        predictions.answer(
            make_predict([Model(apply=apply, params={}, batch_stats={})], mesh),
            batches,
            num_rows=len(files),
            decode=decode,
            fault=files.fault,
            mesh=mesh,
            on_progress=progress,
        )
    )


def test_every_file_has_an_answer_in_order_and_damaged_ones_a_fault(images):
    seen = []
    answers = answers_of(files_of(images), lambda *progress: seen.append(progress))
    assert [given.row for given in answers] == list(range(13))
    expected = [[] if i in (3, 7, 12) else [i % 2] for i in range(13)]
    assert [list(given.label_ids) for given in answers] == expected
    faults = {given.row: given.fault for given in answers if given.fault}
    assert list(faults) == [3, 7, 12]
    assert "truncated" in faults[3] and "empty" in faults[7] and "GIF" in faults[12]
    assert seen == [(8, 13, "predict"), (13, 13, "predict")]


def test_an_id_without_a_file_is_damaged(images):
    chosen = files_of(images).listing.select(["p01", "gone", "p00"])
    answers = answers_of(ImageFiles(chosen, 256))
    assert [list(given.label_ids) for given in answers] == [[1], [], [0]]
    assert [given.fault for given in answers] == ["", "no file with this id", ""]


def test_answers_come_while_images_are_still_unread(images):
    files = files_of(images)
    seen = []
    mesh = make_mesh()

    def batches():
        for i in range(3):
            seen.append(i)
            yield {
                "images": np.zeros((8, 16, 16, 3), np.uint8),
                "index": np.arange(8 * i, 8 * i + 8, dtype=np.int32),
                "mask": np.ones(8, np.float32),
            }

    answers = predictions.answer(
        make_predict([Model(apply=apply, params={}, batch_stats={})], mesh),
        batches(),
        num_rows=24,
        decode=decode,
        fault=files.fault,
        mesh=mesh,
        on_progress=lambda *_: None,
    )
    assert next(answers).row == 0
    # One batch is being computed beside the one that is answered; the third is unread.
    assert seen == [0, 1]


def write(path, labels, ids=("a", "b")):
    predictions.write_submission(
        path, ids, [np.array(x, int) for x in labels], VOCABULARY, lambda: PROVENANCE
    )


def test_a_submission_has_codes_and_its_provenance_beside_it(tmp_path):
    path = tmp_path / "new" / "answers.csv"
    write(path, [[1, 0], [2]])
    assert read(path) == [
        ["image_id", "labels"],
        ["a", "/m/light /m/dark"],
        ["b", "/m/any"],
    ]
    beside = path.with_name("answers.csv.provenance.json")
    assert json.loads(beside.read_text()) == PROVENANCE
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, beside.name]


@pytest.mark.parametrize("labels", [[[1], []], [[1]]])
def test_a_submission_that_would_be_wrong_leaves_the_old_one(tmp_path, labels):
    path = tmp_path / "answers.csv"
    write(path, [[0], [0]])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"no label|shorter"):
        write(path, labels)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_a_name_that_is_no_utf8_does_not_end_a_submission(tmp_path):
    path = tmp_path / "answers.csv"
    write(path, [[0], [1]], ids=("\udcff", 'a, "b"\nc'))
    assert read(path)[1:] == [["\\udcff", "/m/dark"], ['a, "b"\nc', "/m/light"]]


FACTS = predictions.Facts(
    source="photos",
    run="step 1",
    provenance=Provenance(),
    constant=("/m/any",),
    constant_names=("Any",),
    decoder="top_k",
    parameter={"k": 5},
)


def lines_of(tmp_path, answers, names):
    path = tmp_path / "answers.jsonl"
    ids = [f"id of {name}" for name in names]
    predictions.write_json_lines(path, ids, names, answers, VOCABULARY, FACTS)
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def given(row, label_ids, probs, fault=""):
    return predictions.Answer(
        row=row,
        label_ids=np.array(label_ids, int),
        probs=np.array(probs, np.float32),
        fault=fault,
    )


def test_json_lines_have_names_and_scores_of_what_is_chosen_and_of_what_is_likely(
    tmp_path,
):
    (line,) = lines_of(tmp_path, [given(0, [1, 0], [0.25, 0.5, 0.3])], ["a.jpg"])
    assert line == {
        "image_id": "id of a.jpg",
        "file": "a.jpg",
        "decoder": "top_k",
        "labels": [
            {"code": "/m/light", "name": "Light", "score": 0.5},
            {"code": "/m/dark", "name": "Dark", "score": 0.25},
        ],
        "scores": {"/m/light": 0.5, "/m/any": 0.3, "/m/dark": 0.25},
    }
    assert list(line["scores"]) == ["/m/light", "/m/any", "/m/dark"]
    record = json.loads((tmp_path / "answers.jsonl.provenance.json").read_text())
    assert record == Provenance().to_json()


def test_scores_below_the_floor_are_left_out_but_for_labels_that_were_chosen(tmp_path):
    (line,) = lines_of(tmp_path, [given(0, [0], [0.001, 0.5, 0.009])], ["a.jpg"])
    assert line["labels"][0]["score"] == 0.001
    assert line["scores"] == {"/m/light": 0.5}


def test_nothing_is_said_of_a_damaged_image_but_that_it_is(tmp_path):
    (line,) = lines_of(tmp_path, [given(0, [], [0.9] * 3, "truncated")], ["a.jpg"])
    assert (line["labels"], line["scores"]) == ([], {})
    assert line["error"] == "truncated"


def test_odd_names_come_back_from_json_lines_as_they_were(tmp_path):
    names = [*mixed_images.NAMES, mixed_images.NO_UTF8]
    answers = [given(row, [0], [0.5] * 3) for row in range(len(names))]
    assert [line["file"] for line in lines_of(tmp_path, answers, names)] == names
    assert "😀" in (tmp_path / "answers.jsonl").read_text("utf-8")


def test_json_lines_of_too_few_answers_leave_the_old_ones(tmp_path):
    lines_of(tmp_path, [given(0, [0], [0.5] * 3)], ["a.jpg"])
    before = (tmp_path / "answers.jsonl").read_bytes()
    with pytest.raises(ValueError, match="shorter"):
        lines_of(tmp_path, [given(0, [0], [0.5] * 3)], ["a.jpg", "b.jpg"])
    assert (tmp_path / "answers.jsonl").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_a_message_names_at_most_ten_labels():
    names = [f"label {i}" for i in range(12)]
    assert predictions.shortened(names[:10]) == ", ".join(names[:10])
    assert predictions.shortened(names) == ", ".join(names[:10]) + " and 2 more"


def test_a_decoder_is_told_with_its_parameter():
    assert FACTS.decoder_words == "top_k (k 5)"
    threshold = {"decoder": "threshold", "parameter": {"threshold": 0.3}}
    assert dataclasses.replace(FACTS, **threshold).decoder_words == "threshold 0.3"
