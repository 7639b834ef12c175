"""Pictures on disk to a submission: every file a row, in order, damaged ones too."""

import csv
import io
import json

import cv2
import jax.numpy as jnp
import numpy as np
import pytest
import small_layout
from PIL import Image

from jaxii.data.images import EvalTransform
from jaxii.data.labels import Vocabulary
from jaxii.data.pipeline import LabelPolicy, Share, eval_batches
from jaxii.errors import InputError
from jaxii.infer import predict
from jaxii.infer.models import Model, make_predict
from jaxii.model.multitask import Outputs
from jaxii.train.mesh import make_mesh

VOCABULARY = Vocabulary(("/m/dark", "/m/light", "/m/any"), ("Dark", "Light", "Any"))
PROVENANCE = {"clean": True}


def apply(params, batch_stats, images, *, train, key):
    """Says whether a picture is dark or light."""
    shade = jnp.mean(images.astype(jnp.float32), axis=(1, 2, 3)) / 255 - 0.5
    logits = jnp.stack([-20 * shade, 20 * shade, 0 * shade], axis=-1)
    return Outputs(logits=logits, embedding=None, features=logits), batch_stats


def decode(probs, embedding):
    return [np.array([row.argmax()]) for row in probs]


def read(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


@pytest.fixture
def pictures(tmp_path):
    """13 files: dark and light in turn; 3 is cut short, 7 empty, 12 no picture."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(13):
        encoded = small_layout.picture(30 if i % 2 == 0 else 220, 40, 40)
        encoded = {3: encoded[: len(encoded) // 2], 7: b"", 12: b"GIF89a"}.get(
            i, encoded
        )
        (folder / f"p{i:02d}.jpg").write_bytes(encoded)
    return folder


def answers_of(files, progress=lambda *_: None):
    mesh = make_mesh()
    batches = eval_batches(
        files,
        transform=EvalTransform(size_pixels=16),
        policy=LabelPolicy(num_slots=1),
        share=Share(global_batch_size=8, num_threads=2),
        mask_damaged=True,
    )
    return predict.answer(
        make_predict([Model(apply=apply, params={}, batch_stats={})], mesh),
        batches,
        num_rows=len(files),
        decode=decode,
        mesh=mesh,
        on_progress=progress,
    )


def test_every_file_has_a_row_in_order_and_damaged_ones_the_fallback(pictures):
    found = predict.find_pictures(pictures)
    seen = []
    answers = answers_of(
        predict.Files(tuple(found.values())), lambda *progress: seen.append(progress)
    )
    labels, damaged = answers.complete(np.array([2, 0]))
    assert list(found) == [f"p{i:02d}" for i in range(13)]
    assert damaged == [3, 7, 12]
    expected = [[2, 0] if i in damaged else [i % 2] for i in range(13)]
    assert [list(ids) for ids in labels] == expected
    assert seen == [(8, 13, "predict"), (13, 13, "predict")]


def test_an_id_without_a_file_takes_the_fallback(pictures):
    found = predict.find_pictures(pictures)
    answers = answers_of(predict.Files((found["p01"], None, found["p00"])))
    labels, damaged = answers.complete(np.array([2]))
    assert [list(ids) for ids in labels] == [[1], [2], [0]]
    assert damaged == [1]


def encoded_as(kind):
    pixels = np.full((40, 40, 3), 220, np.uint8)
    if kind == "grey":
        return cv2.imencode(".jpg", pixels[..., 0])[1].tobytes()
    if kind == "cmyk":
        file = io.BytesIO()
        Image.fromarray(pixels).convert("CMYK").save(file, "JPEG")
        return file.getvalue()
    return cv2.imencode(f".{kind}", pixels)[1].tobytes()


@pytest.mark.parametrize("kind", ["grey", "cmyk", "png", "webp"])
def test_other_kinds_of_picture_under_a_jpg_name_are_read(pictures, kind):
    (pictures / "p03.jpg").write_bytes(encoded_as(kind))
    answers = answers_of(predict.Files((pictures / "p03.jpg",)))
    labels, damaged = answers.complete(np.array([2]))
    assert damaged == []
    assert list(labels[0]) == [1]


def test_pictures_are_found_by_their_endings_whatever_the_case(tmp_path):
    for name in ("b.JPG", "a.png", "c.jpeg", "d.webp", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert list(predict.find_pictures(tmp_path)) == ["a", "b", "c", "d"]


def test_two_pictures_with_one_id_are_refused_by_name(tmp_path):
    for name in ("a.jpg", "a.png"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"a.jpg and a.png share the id a; rename"):
        predict.find_pictures(tmp_path)


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"has no picture; files may end in .jpg"):
        predict.find_pictures(tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        predict.find_pictures(tmp_path / "absent")


def test_ids_keep_the_order_of_the_sample_submission(tmp_path):
    path = small_layout.lines(tmp_path / "s.csv", "image_id,labels", "b,", "a,/m/x")
    assert predict.read_ids(path) == ["b", "a"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ImageId,labels\na,\n", "starts with 'ImageId,labels'; its header"),
        ("", "starts with 'nothing'"),
        ("image_id,labels\n", "lists no image"),
        ("image_id,labels\na,\nb,\na,\n", "lists a more than once"),
        ("image_id,labels\n\xff,\n", "cannot be read as CSV"),
    ],
)
def test_a_list_of_ids_that_cannot_be_used_is_refused(tmp_path, text, words):
    path = tmp_path / "ids.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=words):
        predict.read_ids(path)


def write(path, labels, ids=("a", "b")):
    predict.write_submission(
        path, ids, [np.array(x, int) for x in labels], VOCABULARY, PROVENANCE
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
