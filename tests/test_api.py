"""Tests of the Python API: calls from a notebook on a run made here."""

import dataclasses
import doctest
import io
import json
import subprocess
import sys
import weakref
from pathlib import Path

import cv2
import mixed_images
import numpy as np
import oracle
import pytest
import small_layout
from PIL import Image

import jaxii
from jaxii.config import Config, default_config
from jaxii.decoding import decoders as decoding
from jaxii.errors import InputError
from jaxii.evaluation.predictions import answer
from jaxii.metrics import f_beta as f_beta_of_counts
from jaxii.objective import losses
from jaxii.prepare import image_ids
from jaxii.prepare.kaggle import Layout, prepare
from jaxii.runs import api, predict
from jaxii.runs import images as images_module
from jaxii.runs.images import open_images
from jaxii.runs.inference import InferenceOptions

ROOT = Path(__file__).parent.parent
TRUTHS = ((0,), (1,), (2,))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose network knows the truth, trained through the API."""
    root = tmp_path_factory.mktemp("api")
    files = small_layout.write(root / "files", num_train=24)
    for i in range(24):
        small_layout.put(
            files / "train" / "part_0", f"train{i:02d}", oracle.image(i % 3, 3)
        )
    prepare(Layout.find(files), root / "data", num_workers=1)
    with oracle.every_network_is(oracle.network(TRUTHS)):
        config = oracle.make_config(root / "data")
        yield jaxii.train(config, workdir=root / "run")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Seven images of three sizes and two formats."""
    folder = tmp_path_factory.mktemp("photos")
    made = []
    for i in range(7):
        size = 40 + 8 * (i % 3), 40
        shade = round(oracle.DARKEST + (i % 3) * 110)
        path = folder / f"photo{i}.{'png' if i % 2 else 'jpg'}"
        pixels = np.full((*size, 3), shade, np.uint8)
        cv2.imwrite(str(path), pixels)
        made.append(path)
    return made


def arrays_of(paths):
    return [cv2.cvtColor(cv2.imread(str(p)), cv2.COLOR_BGR2RGB) for p in paths]


def commanded(run, paths, output, decoder=""):
    """Returns the output of the command `predict` for the images."""
    predict.predict(
        run.workdir,
        request=predict.Request(
            images=str(paths[0]), more=tuple(map(str, paths[1:])), output=output
        ),
        decoder=decoder,
        options=InferenceOptions(),
    )
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_import_is_quick_and_imports_no_jax():
    script = (
        "import sys, time; start = time.perf_counter(); import jaxii; "
        "taken = time.perf_counter() - start; jaxii.train, dir(jaxii); "
        "print('jax' in sys.modules, 'numpy' in sys.modules, taken < 0.2, taken)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.startswith("False False True"), done.stdout + done.stderr


def test_the_names_are_there_and_no_other():
    for name in jaxii.__all__:
        assert name in dir(jaxii)
        assert getattr(jaxii, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'loda'"):
        jaxii.loda  # noqa: B018


def test_the_package_is_typed():
    assert (ROOT / "jaxii" / "py.typed").exists()
    stub = (ROOT / "jaxii" / "__init__.pyi").read_text()
    assert all(f"{name} as {name}" in stub for name in jaxii.__all__)


def test_the_package_train_is_what_trains():
    from jaxii.train import stages

    assert callable(jaxii.train)
    assert jaxii.train.stages is stages


def test_predictions_are_those_of_the_command(run, paths, tmp_path):
    lines = commanded(run, paths, tmp_path / "answers.jsonl")
    rows = run.predict(paths)
    probs = run.predict_proba(paths)
    assert probs.dtype == np.float32
    assert probs.shape == (7, len(run.classes))
    for path, row, given, line in zip(paths, rows, probs, lines, strict=True):
        assert row.image == str(path) == line["file"]
        assert list(row.labels) == [label["code"] for label in line["labels"]]
        assert list(row.names) == [label["name"] for label in line["labels"]]
        scores = [round(score, 5) for score in row.scores]
        assert scores == [label["score"] for label in line["labels"]]
        for code, score in line["scores"].items():
            assert round(float(given[run.classes.index(code)]), 5) == score


def test_any_decoder_of_the_run_can_predict(run, paths, tmp_path):
    lines = commanded(run, paths, tmp_path / "answers.jsonl", "expected_f2")
    rows = run.predict(paths, decoder="expected_f2")
    codes = [[label["code"] for label in line["labels"]] for line in lines]
    assert [list(row.labels) for row in rows] == codes
    with pytest.raises(InputError, match="not a decoder; the nearest is expected_f2"):
        run.predict(paths, decoder="expected_f3")


def test_predictions_are_a_table(run, paths):
    frame = run.predict(paths).to_frame()
    assert frame.columns == ["image", "labels", "names", "scores"]
    assert frame["image"].to_list() == list(map(str, paths))


def test_arrays_are_seen_as_files_of_the_same_pixels(run, paths, tmp_path):
    arrays = arrays_of(paths)
    copies = []
    for i, pixels in enumerate(arrays):
        copies.append(tmp_path / f"{i}.png")
        cv2.imwrite(str(copies[-1]), cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    np.testing.assert_array_equal(run.predict_proba(arrays), run.predict_proba(copies))


def photo():
    """Returns a PIL image without symmetry."""
    small = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    return Image.fromarray(cv2.resize(small, (48, 32)))


def see_through(image):
    copy = image.copy()
    alpha = np.linspace(0, 255, image.width * image.height)
    copy.putalpha(
        Image.fromarray(alpha.reshape(image.height, image.width).astype(np.uint8))
    )
    return copy


# Files that are not upright 8-bit RGB.
ODD_FILES = {
    "turned JPEG": lambda: mixed_images.turned(photo(), 6, "JPEG"),
    "turned PNG": lambda: mixed_images.turned(photo(), 5, "PNG"),
    "turned WebP": lambda: mixed_images.turned(photo(), 8, "WEBP", lossless=True),
    "grey": lambda: mixed_images.saved(photo().convert("L"), "PNG"),
    "two colours": lambda: mixed_images.saved(photo().convert("1"), "PNG"),
    "16 bits": lambda: mixed_images.saved(
        Image.fromarray(np.arange(32 * 48, dtype=np.uint16).reshape(32, 48) * 40), "PNG"
    ),
    "palette": lambda: mixed_images.saved(photo().quantize(16), "PNG", transparency=3),
    "RGBA": lambda: mixed_images.saved(see_through(photo()), "PNG"),
    "LA": lambda: mixed_images.saved(see_through(photo().convert("L")), "PNG"),
    "CMYK": lambda: mixed_images.saved(photo().convert("CMYK"), "JPEG"),
}


@pytest.mark.parametrize("kind", ODD_FILES)
def test_bytes_and_pil_images_are_seen_as_files(kind, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(ODD_FILES[kind]())
    images = [path, path.read_bytes(), Image.open(path)]
    files = open_images(images, short_side=24)
    stored = [files.jpeg(row) for row in range(3)]
    assert stored[0] == stored[1]
    assert stored[0] == stored[2]
    names = [files.listing.shown(row) for row in range(3)]
    assert names == [str(path), "image 1", "image 2"]


def test_one_image_may_be_given_alone(run, paths):
    (pixels,) = arrays_of(paths[1:2])
    wanted = run.predict_proba(paths[1:2])
    encoded = paths[1].read_bytes()
    for image in (str(paths[1]), encoded, pixels, Image.fromarray(pixels)):
        np.testing.assert_array_equal(run.predict_proba(image), wanted)
    assert [row.image for row in run.predict(encoded)] == ["image 0"]


@pytest.mark.parametrize(
    ("images", "pattern"),
    [
        (None, "images is of type NoneType; use paths, or uint8"),
        (3, "images is of type int; use"),
        ([1], "image 0 is of type int; use"),
        ([[[1, 2], [3]]], "image 0 is of type list; use"),
        ([b"", None], "image 1 is of type NoneType; use"),
        ([Image.new("F", (8, 8))], "a PIL image of mode F; convert it to RGB"),
    ],
)
def test_what_is_of_no_allowed_type_is_refused(images, pattern):
    with pytest.raises(InputError, match=pattern):
        open_images(images, short_side=24)


def test_damaged_bytes_and_pil_images_are_told_with_the_reason():
    encoded = mixed_images.saved(photo(), "PNG")
    cut = Image.open(io.BytesIO(encoded[:-200]))
    files = open_images([b"", encoded[:-200], cut], short_side=24)
    faults = [files.fault(row) for row in range(3)]
    assert faults[0].startswith("an empty file; only JPEG, PNG and WebP")
    assert "truncated PNG" in faults[1]
    assert faults[2].startswith("damaged PIL image (")


def test_all_damaged_images_are_named_in_one_error(run, paths):
    images = [paths[0], b"", b"GIF89a", paths[1], *[b""] * 10]
    with pytest.raises(InputError) as refused:
        run.predict(images)
    text = str(refused.value)
    assert text.startswith("image 1 cannot be used: an empty file; ")
    assert "image 2 cannot be used: a GIF; " in text
    assert text.endswith("; 2 more cannot be used; leave them out.")
    assert text.count("image ") == images_module.MOST_NAMED


def test_predict_keeps_no_row_of_probabilities(run, paths, monkeypatch):
    alive, kept = [], []

    def watched(*args, **options):
        for given in answer(*args, **options):
            probs = given.probs.copy()
            alive.append(weakref.ref(probs))
            kept.append(sum(row() is not None for row in alive))
            yield dataclasses.replace(given, probs=probs)

    monkeypatch.setattr(images_module, "answer", watched)
    assert len(run.predict(paths)) == len(paths)
    # The caller still holds the previous image.
    assert max(kept) <= 3


@pytest.mark.parametrize("number", [0, 1, 3])
def test_any_number_of_images_can_be_given(run, paths, number):
    same_size = np.stack(arrays_of(paths[:1] * number or paths[:1]))[:number]
    for images in (same_size, list(same_size), paths[:number]):
        assert run.predict_proba(images).shape == (number, len(run.classes))
        assert len(run.predict(images)) == number


def test_what_is_no_image_is_refused_by_name(run, paths, tmp_path):
    damaged = tmp_path / "damaged.jpg"
    damaged.write_bytes(paths[0].read_bytes()[:50])
    with pytest.raises(InputError, match=r"damaged\.jpg cannot be used"):
        run.predict_proba([paths[0], damaged])
    for wrong in (np.zeros((2, 8, 8, 3)), np.zeros((2, 8, 8), np.uint8)):
        with pytest.raises(
            InputError, match=r"image 0 has dtype .*use paths, or uint8"
        ):
            run.predict_proba(wrong)
    with pytest.raises(InputError, match="has no pixels"):
        run.predict_proba([np.zeros((0, 8, 3), np.uint8)])


def test_features_are_a_row_an_image(run, paths):
    features = run.features(paths)
    assert features.dtype == np.float32
    # The oracle's features are its logits.
    probs = 1 / (1 + np.exp(-features.astype(np.float64)))
    np.testing.assert_allclose(probs, run.predict_proba(paths), atol=1e-6)


def test_no_images_have_no_rows_of_as_many_features(run, paths):
    for images in ([], np.zeros((0, 8, 8, 3), np.uint8)):
        features = run.features(images)
        assert features.shape == (0, run.features(paths[:1]).shape[1])
        assert features.dtype == np.float32


def test_a_run_tells_its_figures_classes_and_provenance(run):
    assert run.figures("validation") == run.workdir.metrics().splits["validation"]
    with pytest.raises(InputError, match="the nearest is validation"):
        run.figures("validatoin")
    assert run.classes == tuple(small_layout.CODES)
    assert run.provenance.clean


def test_a_trained_run_is_loaded_at_any_stage(run, paths):
    with jaxii.load(run.workdir.path, stage="only") as again:
        np.testing.assert_array_equal(
            again.predict_proba(paths), run.predict_proba(paths)
        )
    with pytest.raises(InputError, match="is not the folder of a run"):
        jaxii.load(run.workdir.path / "nowhere")


def test_a_run_is_measured_on_other_images(run, paths, tmp_path):
    names = run.vocabulary.descriptions
    rows = [f"{path.name},{names[i % 3]}" for i, path in enumerate(paths)]
    table = tmp_path / "holiday.csv"
    small_layout.lines(table, "image,label", *rows)
    found = jaxii.evaluate(run, images=paths[0].parent, labels=table, name="holiday")
    assert (found.name, found.num_images) == ("holiday", 7)
    assert found.unknown_labels == ()
    targets = np.eye(len(run.classes), dtype=bool)[np.arange(7) % 3]
    chosen = [row.labels for row in run.predict(paths)]
    decisions = np.array([[c in labels for c in run.classes] for labels in chosen])
    assert found.f2 == f_beta_of_counts(decisions, targets).mean()
    frame = found.to_frame()
    assert frame["f2"].is_sorted(descending=True)
    assert set(frame["decoder"]) == set(found.decoders)


def test_labels_that_the_run_does_not_know_are_named(run, paths, tmp_path):
    known, table = run.vocabulary.descriptions[0], tmp_path / "labels.csv"
    rows = [f"{p.name},{(known, 'unheard')[i % 2]}" for i, p in enumerate(paths)]
    small_layout.lines(table, "image,label", *rows)
    folder = paths[0].parent
    found = jaxii.evaluate(run, images=folder, labels=table)
    assert found.unknown_labels == ("unheard",)
    rows = [f"{p.name},{('unseen', 'unheard')[i % 2]}" for i, p in enumerate(paths)]
    small_layout.lines(table, "image,label", *rows)
    with pytest.raises(InputError, match="has none of the labels"):
        jaxii.evaluate(run, images=folder, labels=table)


def test_a_recipe_may_stand_for_a_configuration(tmp_path):
    with pytest.raises(InputError, match=r"f2_multitas\.py is not a file"):
        jaxii.train("configs/f2_multitas.py", workdir=tmp_path / "run")
    with pytest.raises(InputError, match="nearest is emoji"):
        jaxii.train(f"{ROOT}/configs/f2_multitask.py:emojis", workdir=tmp_path / "run")


def test_the_fields_of_a_recipe_may_stand_for_a_configuration(
    run, tmp_path, monkeypatch
):
    trained = []

    def train(config, workdir, should_stop, *, recipe, **_):
        trained.append((config, recipe))

    monkeypatch.setattr(api, "train_run", train)
    monkeypatch.setattr(api, "load", lambda path: run)
    file = f"{ROOT}/configs/f2_multitask.py:emoji"
    fields = default_config()
    fields.stages = ({"name": "only", "terms": {"bce": 1}, "num_steps": 2},)
    for given in (file, fields, fields.to_dict()):
        jaxii.train(given, tmp_path / "run")
    wanted = Config.resolve(fields)
    assert trained[1:] == [(wanted, {}), (wanted, {})]
    assert trained[0] == (api.load_recipe(file), {"name": file, "own": {}})


@pytest.mark.parametrize(
    ("source", "preset", "reason"),
    [
        ("x = 1\n", "", "it has no function get_config"),
        ("def get_config(:\n", "", r"SyntaxError: invalid syntax .*line 1"),
        ("def get_config():\n    pass\n", "", r"get_config\(\) does not return a conf"),
        ("def get_config():\n    return 1 / 0\n", "", r"ZeroDivisionError: .*line 2"),
        ("def get_config():\n    pass\n", ":foo", r"TypeError: get_config\(\) takes 0"),
    ],
)
def test_a_recipe_that_fails_is_refused_by_name(tmp_path, source, preset, reason):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(source)
    with pytest.raises(InputError, match=rf"recipe\.py{preset}: {reason}"):
        jaxii.train(f"{recipe}{preset}", workdir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_losses_metrics_and_decoders_take_arrays_alone():
    rng = np.random.default_rng(0)
    targets = (rng.uniform(size=(20, 5)) < 0.4).astype(np.float32)
    targets[:, 0] = 1  # an image without a label scores 0
    logits = (4 * targets - 2 + rng.normal(size=(20, 5))).astype(np.float32)
    probs = 1 / (1 + np.exp(-logits))
    loss = jaxii.losses.soft_f(logits, targets, beta=2.0)
    assert loss.shape == (20,)
    assert jaxii.losses is losses
    decode = jaxii.decoding.fit(probs, targets, beta=2.0)
    assert decode(probs).dtype == bool
    scores = jaxii.metrics.f_beta(decode(probs), targets, beta=2.0)
    assert scores.shape == (20,)
    assert float(scores.mean()) > 0.8
    assert jaxii.decoding.fit is decoding.fit


def test_the_examples_in_docstrings_hold():
    for module in (losses, decoding, image_ids):
        assert doctest.testmod(module).failed == 0
