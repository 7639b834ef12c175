"""Tests a checkpoint as StableHLO and ONNX: equal probabilities, without jaxii."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import cv2
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import simplejpeg
import small_layers
import small_layout
from small_runs import save_checkpoint, seal

from jaxii import main
from jaxii.config import Config, default_config
from jaxii.data.labels import Vocabulary
from jaxii.data.transforms import EvalTransform
from jaxii.decoding import decoders as decoding
from jaxii.decoding.calibration import Calibration
from jaxii.decoding.thresholds import DecoderChoice
from jaxii.distributed.mesh import divided, make_mesh, replicated, to_devices
from jaxii.errors import InputError
from jaxii.evaluation.predictor import Model, make_predict
from jaxii.export import programs
from jaxii.export.onnx_graph import to_onnx
from jaxii.models.multitask import make_network
from jaxii.prepare.kaggle import Layout, prepare
from jaxii.prepare.recode import recode
from jaxii.runs import evaluate
from jaxii.runs.begin import begin
from jaxii.runs.run import Run
from jaxii.runs.workdir import Workdir
from jaxii.train.state import new_state

pytestmark = pytest.mark.usefixtures("without_drawings")

NUM_CLASSES, BATCH = 5, 8
# Odd sizes have windows across the edge; together, these use all rules of ONNX.
NETWORKS = {
    "resnet": {"depth": 18, "stem": "imagenet", "size": 33},
    "resnet_d": {"depth": 26, "stem": "small", "size": 17},
    "se_resnet": {"depth": 26, "stem": "imagenet", "size": 32},
    "resnext": {"depth": 26, "stem": "small", "size": 16},
    "wide_resnet": {"depth": 26, "stem": "small", "size": 16},
}


@pytest.fixture(scope="module", autouse=True)
def few_blocks():
    with small_layers.few_blocks(2, 1, 1, 1):
        yield


def filled(shapes, seed=0):
    """Returns parameters or statistics under which maps neither vanish nor explode."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        kind = path[-1].key
        if kind == "kernel":
            spread = np.sqrt(2 / np.prod(leaf.shape[:-1]))
            spread *= 4 if path[-2].key == "classifier" else 1
            return rng.normal(0, spread, leaf.shape).astype(leaf.dtype)
        ranges = {"scale": (0.5, 1.0), "var": (0.5, 1.5)}
        low, high = ranges.get(kind, (-0.3, 0.3))
        # Scales of both signs, because the stem's max-pool treats them differently.
        sign = rng.choice([-1, 1], leaf.shape) if kind == "scale" else 1
        return (sign * rng.uniform(low, high, leaf.shape)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def images_of(number, size):
    """Returns images of a few large patches: with noise, all means would be equal."""
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 256, (number, 3, 3, 3)).astype(np.uint8)
    return np.kron(patches, np.ones((1, 11, 11, 1), np.uint8))[:, :size, :size]


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    """A network in the portable form, images, and their evaluated probabilities."""
    shape = dict(NETWORKS[request.param])
    size = shape.pop("size")

    def made(platform):
        return make_network(
            num_classes=NUM_CLASSES,
            embedding_dim=0,
            variant=request.param,
            width=8,
            dtype=jnp.float32,
            platform=platform,
            **shape,
        )

    evaluated, portable = made("cpu"), made("any")
    params, stats = filled(jax.eval_shape(evaluated.init, jax.random.key(0)))
    images, mesh = images_of(BATCH, size), make_mesh()
    model = Model(apply=evaluated.apply, params=params, batch_stats=stats)
    sent = to_devices({"images": images}, divided(mesh))
    probs = np.asarray(make_predict([model], mesh)(sent["images"])[0])
    # Otherwise, nothing could differ.
    assert probs.std(axis=0).max() > 0.01
    return (
        Model(apply=portable.apply, params=params, batch_stats=stats),
        images,
        probs,
    )


def check_every_batch(run, images, probs):
    for rows in (slice(1), slice(1, 4), slice(None)):
        found = run(images[rows])
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, probs[rows], rtol=0, atol=1e-5)


def test_stablehlo_gives_what_evaluation_gives_in_batches_of_any_size(
    network, tmp_path
):
    model, images, probs = network
    path = tmp_path / "model"
    path.write_bytes(programs.stablehlo(model, images.shape[1]))
    check_every_batch(programs.read_stablehlo(path), images, probs)


def test_onnx_gives_what_evaluation_gives_in_batches_of_any_size(network, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model, images, probs = network
    path = tmp_path / "model"
    path.write_bytes(programs.onnx(model, images.shape[1], {}))
    check_every_batch(programs.read_onnx(path), images, probs)


def linear_program():
    def apply(params, batch_stats, images, *, train, key):
        return Outputs(images.astype(jnp.float32)[:, 0, 0] @ params), batch_stats

    model = Model(apply=apply, params=np.ones((3, 2), np.float32), batch_stats={})
    return programs.stablehlo(model, 4)


def test_a_program_is_for_every_platform_and_multiplies_in_full_precision():
    exported = jax.export.deserialize(bytearray(linear_program()))
    assert set(exported.platforms) >= {"cpu", "cuda", "tpu"}
    # One per platform whose code differs.
    products = re.findall(r"stablehlo\.dot_general .*", exported.mlir_module())
    assert {product.count("HIGHEST") for product in products} == {2}


def test_a_program_is_the_same_again_and_names_no_folder_of_this_machine():
    limit = jax.config.jax_traceback_in_locations_limit
    program = linear_program()
    assert program == linear_program()
    assert str(Path(__file__).parent).encode() not in program
    assert jax.config.jax_traceback_in_locations_limit == limit


class Outputs(NamedTuple):
    logits: jax.Array


def constant_model(probs):
    """Returns a model that predicts the same for every image."""

    def apply(params, batch_stats, images, *, train, key):
        nothing = 0 * images.astype(jnp.float32).mean(axis=(1, 2, 3))
        return Outputs(nothing[:, None] + params[None]), batch_stats

    logits = np.log(probs) - np.log1p(-probs)
    return Model(apply=apply, params=logits.astype(np.float32), batch_stats={})


@pytest.mark.parametrize("said", [0.5002, np.nan])
def test_a_program_that_says_something_else_is_refused(tmp_path, said):
    probs = np.array([0.2, 0.5], np.float32)
    images = np.zeros((4, 8, 8, 3), np.uint8)
    expected = np.repeat(probs[None], 4, axis=0)

    def write(probs):
        return programs.write_programs(
            tmp_path, constant_model(probs), images, expected, onnx_metadata=None
        )

    assert write(probs)[programs.PROGRAM].largest_difference < 1e-6
    with pytest.raises(InputError, match=r"stablehlo differs .* at most 0.0001"):
        write(np.array([0.2, said], np.float32))


def any_image(function):
    (batch,) = jax.export.symbolic_shape("b")
    image = jax.ShapeDtypeStruct((batch, 4, 4, 3), jnp.float32)
    return jax.make_jaxpr(function)(image)


@pytest.mark.parametrize(
    ("function", "pattern"),
    [
        (
            lambda x: jnp.sin(x)[:, 0, 0],
            "operation sin .*cannot be .* without --onnx",
        ),
        (lambda x: jax.lax.slice_in_dim(x, 0, 1), "operation slice of the batch"),
        (
            lambda x: jax.lax.conv_transpose(x, jnp.ones((2, 2, 3, 3)), (2, 2), "SAME"),
            "conv_general_dilated that is transposed",
        ),
        (
            lambda x: jax.lax.reduce_window(
                x, -jnp.inf, jax.lax.max, (1, 2, 2, 3), (1, 1, 1, 1), "VALID"
            ),
            "reduce_window_max over images or channels",
        ),
        (
            lambda x: jnp.einsum("bhwc,bhwc->bc", x, x),
            "dot_general with an operand that is not a matrix",
        ),
    ],
)
def test_what_has_no_counterpart_in_onnx_is_refused_by_name(function, pattern):
    pytest.importorskip("onnx")
    with pytest.raises(InputError, match=pattern):
        to_onnx(any_image(function), {})


# The command on a run as training leaves it: bfloat16, with an embedding head, and with
# probabilities that are means over views.


def configuration(data):
    config = default_config()
    config.data.dataset = "kaggle"
    config.data.directory = str(data)
    config.data.image_size_pixels = 16
    config.data.validation_fraction = 0.4
    config.data.num_threads = 1
    config.data.test_time_augmentation = True
    config.global_batch_size = 8
    config.model.depth = 18
    config.model.width = 8
    config.model.stem = "small"
    config.label_embedding.dim = 2
    config.stages = (
        {"name": "only", "num_steps": 2, "embedding_head": True, "terms": {"bce": 1.0}},
    )
    return Config.resolve(config)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    files = small_layout.write(root / "files", num_train=24)
    prepare(Layout.find(files), root / "data", num_workers=1)
    workdir = Workdir(root / "run")
    run = begin(configuration(root / "data"), workdir)
    (plan,) = run.plans
    params, stats = filled(jax.eval_shape(plan.init, jax.random.key(0)))
    state = new_state(
        params=params,
        batch_stats=stats,
        optimizer=plan.settings.optimizer,
        step=2,
        with_average=False,
    )
    state = jax.device_put(state, replicated(run.mesh))
    save_checkpoint(run, "only", 2, state, first_step=0)
    evaluate.measure(run.at_best())
    run.checkpoints.close()
    return workdir


def run(*words):
    """Runs `jaxii WORDS` in this process; returns the exit code."""
    argv = ["jaxii", *map(str, words)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        patch.setenv("JAX_COMPILATION_CACHE_DIR", "")
        return main.main(argv)


def exported(workdir, output, *words):
    given = f"--workdir={workdir.path}", f"--output={output}"
    assert run("export", *given, *words) == 0
    return output


@pytest.fixture(scope="module")
def folder(workdir, tmp_path_factory):
    return exported(workdir, tmp_path_factory.mktemp("exported") / "folder")


def elsewhere(folder, script, *words):
    """Runs a script without jaxii and with no libraries except jax and numpy."""
    absent = "jaxii", "flax", "onnx", "onnxruntime", "grain", "jaxtyping", "cv2"
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({absent}))\n"
        f"import flatbuffers; assert {programs.RUNTIME!r} in flatbuffers.__file__\n"
        f"import json, numpy as np, load\n{script}"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *map(str, words)],
        env={
            "PATH": os.environ["PATH"],
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(
                [str(folder / programs.RUNTIME), str(folder)]
            ),
        },
        cwd=folder.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


def probs_of(workdir, images):
    """Returns the checkpoint's own probabilities in float32."""
    with Run.open(workdir.path) as run:
        predict = make_predict([run.in_float32(run.model())], run.mesh)
    return np.asarray(predict(to_devices({"i": images}, divided(run.mesh))["i"])[0])


@pytest.mark.parametrize("decoder", ["threshold", "per_class"])
def test_the_loader_answers_as_the_checkpoint_with_jax_and_numpy_alone(
    workdir, tmp_path, decoder
):
    folder = exported(workdir, tmp_path / "folder", f"--decoder={decoder}")
    images = images_of(BATCH, 16)
    np.save(tmp_path / "images.npy", images)
    script = """
images = np.load(sys.argv[1] + "/images.npy")
np.save(sys.argv[1] + "/probs.npy", load.probabilities(images))
answers = load.predict_labels(images)
for row in load.LABELS:
    row["threshold"] = "1.1"
print(json.dumps([answers, load.predict_labels(images)]))
"""
    answers, ones = json.loads(elsewhere(folder, script, tmp_path).stdout)
    probs = probs_of(workdir, images)
    found = np.load(tmp_path / "probs.npy")
    np.testing.assert_allclose(found, probs, rtol=0, atol=programs.TOLERANCE)
    decode = decoding.load(workdir.path / "decoders.npz", None).answer(decoder)
    codes = workdir.vocabulary().codes
    assert answers == [[codes[i] for i in ids] for ids in decode(probs, None)]
    # If no label reaches its threshold, the answer is the most probable label.
    assert ones == [[codes[i]] for i in probs.argmax(axis=1)]


def test_thresholds_are_those_of_the_decoder_in_the_order_of_the_labels(
    workdir, folder
):
    with (folder / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    vocabulary, metrics = workdir.vocabulary(), workdir.metrics()
    assert [row["code"] for row in rows] == list(vocabulary.codes)
    assert [row["name"] for row in rows] == list(vocabulary.descriptions)
    assert {float(r["threshold"]) for r in rows} == {metrics.decoder.choice.threshold}
    calibration = decoding.load(workdir.path / "decoders.npz", None).calibration
    assert [float(row["slope"]) for row in rows] == calibration.slopes.tolist()


def test_the_loader_predicts_labels_by_the_decoder_of_the_evaluation(workdir, folder):
    script = """
images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
print(json.dumps([load.probabilities(images).tolist(), load.predict_labels(images)]))
"""
    probs, answers = json.loads(elsewhere(folder, script).stdout)
    assert workdir.metrics().decoder.name == "expected_f2"
    decode = decoding.load(workdir.path / "decoders.npz", None).answer("expected_f2")
    codes = workdir.vocabulary().codes
    label_ids = decode(np.array(probs, np.float32), None)
    assert answers == [[codes[i] for i in ids] for ids in label_ids]
    record = json.loads((folder / "export.json").read_text())["decoder"]
    assert (record["name"], record["run_uses"]) == ("expected_f2", "expected_f2")
    assert record["confidence"] == decoding.CONFIDENCE


def decoders_of(num_classes):
    """Returns decoders with different numbers for each label."""
    rng = np.random.default_rng(1)
    return decoding.Decoders(
        choice=DecoderChoice(threshold=0.3, top_k=4),
        class_thresholds=rng.uniform(0.1, 0.6, num_classes),
        calibration=Calibration(
            rng.uniform(0.6, 1.4, num_classes), rng.normal(0, 0.5, num_classes)
        ),
        frequencies=rng.beta(0.5, 20, num_classes) + 1e-6,
    )


def random_probabilities(num_classes):
    """Returns probabilities of images with few, some and many labels; some 0 and 1."""
    rng = np.random.default_rng(2)
    shapes = (0.02, 5), (0.1, 5), (0.3, 1), (2, 2)
    parts = [rng.beta(*shape, (100, num_classes)) for shape in shapes]
    probs = np.concatenate(parts).astype(np.float32)
    probs[rng.random(probs.shape) < 0.005] = 0
    probs[rng.random(probs.shape) < 0.005] = 1
    return probs


@pytest.mark.parametrize(
    ("decoder", "num_classes"),
    [*((name, 178) for name in programs.DECODERS), ("expected_f2", 1)],
)
def test_the_loader_chooses_the_labels_that_the_decoder_chooses(
    tmp_path, decoder, num_classes
):
    folder = tmp_path / "folder"
    folder.mkdir()
    codes = tuple(f"label{i}" for i in range(num_classes))
    vocabulary, decoders = Vocabulary(codes, codes), decoders_of(num_classes)
    programs.write_labels(folder / programs.LABELS, vocabulary, decoders, decoder)
    programs.write_loader(folder)
    (folder / programs.PROGRAM).write_bytes(linear_program())
    parameters = programs.parameters_of(decoders, decoder)
    record = {"caveats": [], "decoder": {"name": decoder, **parameters}}
    (folder / "export.json").write_text(json.dumps(record))
    probs = random_probabilities(num_classes)
    np.save(tmp_path / "probs.npy", probs)
    script = """
print(json.dumps(load.labels_of(np.load(sys.argv[1] + "/probs.npy"))))
"""
    answers = json.loads(elsewhere(folder, script, tmp_path).stdout)
    expected = decoders.answer(decoder)(probs, None)
    assert answers == [[codes[i] for i in ids] for ids in expected]
    if decoder == "expected_f2" and num_classes > 1:
        assert len(set(map(len, answers))) > 20


def test_embedding_is_replaced_by_the_threshold_and_that_is_said(
    workdir, tmp_path, capsys
):
    copy = Workdir(shutil.copytree(workdir.path, tmp_path / "copy"))
    metrics = copy.metrics()
    metrics = replace(metrics, decoder=replace(metrics.decoder, name="embedding"))
    (copy.path / "metrics.json").write_text(json.dumps(metrics.to_json()))
    seal(copy.path)
    folder = exported(copy, tmp_path / "folder")
    threshold = metrics.decoder.choice.threshold
    words = f"the run uses embedding; the exported labels use threshold {threshold}\n"
    assert words in capsys.readouterr().out
    record = json.loads((folder / "export.json").read_text())["decoder"]
    assert (record["name"], record["run_uses"]) == ("threshold", "embedding")
    assert record["threshold"] == threshold


def test_the_decoder_flag_offers_what_the_loader_applies(capsys):
    assert run("export", "--help") == 0
    *first, last = programs.DECODERS
    words = " ".join(capsys.readouterr().out.split())
    assert f"({', '.join(first)} or {last})" in words


def moved(workdir, to, directory):
    """Copies a workdir, as if its dataset had been in another folder."""
    copy = Workdir(shutil.copytree(workdir.path, to))
    config = copy.config().moved(str(directory))
    copy.config_file.write_text(json.dumps(config.to_dict()))
    seal(copy.path)
    return copy


@pytest.mark.parametrize("is_there", [False, True])
def test_without_the_dataset_synthetic_images_are_checked(
    workdir, folder, tmp_path, capsys, monkeypatch, is_there
):
    checked, compare = [], programs.largest_difference

    def largest_difference(run, images, probs):
        checked.append(images)
        return compare(run, images, probs)

    monkeypatch.setattr(programs, "largest_difference", largest_difference)
    data = tmp_path / "data"
    if is_there:
        data.mkdir()
    output = exported(moved(workdir, tmp_path / "copy", data), tmp_path / "folder")
    said = capsys.readouterr().out
    assert said.count("checked on synthetic images") == 1 and str(data) in said
    assert "on 64 synthetic images" in said
    record = json.loads((output / "export.json").read_text())
    before = json.loads((folder / "export.json").read_text())
    assert record["check"]["images"] == "synthetic"
    assert before["check"]["images"] == "validation"
    for name in record.keys() - {"check", "programs"}:
        assert record[name] == before[name]
    (images,) = checked
    assert images.shape == (64, 16, 16, 3)
    # Each image varies, and its neighbouring pixels are similar.
    deviations = images.std(axis=(1, 2))
    assert deviations.min() > 20
    assert np.abs(np.diff(images.astype(int), axis=1)).mean() < deviations.mean()


@pytest.mark.parametrize(
    ("damage", "words", "pattern"),
    [
        ("label_ids.labels.txt", [], "label_ids.labels.txt"),
        ("dataset_info.json", [], "did not finish"),
        ("all", ["--data_dir={data}"], "is not a folder"),
        ("all", ["--verify"], "is not a folder"),
    ],
)
def test_a_dataset_that_is_damaged_or_asked_for_is_not_replaced(
    workdir, tmp_path, capsys, damage, words, pattern
):
    data = tmp_path / "data"
    if damage != "all":
        shutil.copytree(workdir.config().data.directory, data)
        (data / damage).unlink()
    copy = moved(workdir, tmp_path / "copy", data)
    words = [word.format(data=data) for word in words]
    output = tmp_path / "folder"
    assert run("export", f"--workdir={copy.path}", f"--output={output}", *words) == 2
    assert re.fullmatch(rf"jaxii: [^\n]*{pattern}[^\n]*\n", capsys.readouterr().err)
    assert not output.exists()


def test_how_far_the_runs_own_compute_type_is_is_told(folder):
    check = json.loads((folder / "export.json").read_text())["check"]
    assert check["compute_dtype"] == "bfloat16"
    assert 1e-5 < check["compute_dtype_difference"] < 0.2


# Preprocessing as described in export.json, with NumPy and OpenCV alone.


def decoded(data, shrink=1):
    flag = {
        1: cv2.IMREAD_COLOR_RGB,
        2: cv2.IMREAD_REDUCED_COLOR_2,
        4: cv2.IMREAD_REDUCED_COLOR_4,
        8: cv2.IMREAD_REDUCED_COLOR_8,
    }[shrink]
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    return pixels if shrink == 1 else pixels[..., ::-1]


def reduced(data, shrinks, rows, columns):
    """Decodes a JPEG at the smallest sufficient scale, other formats completely."""
    height, width = decoded(data).shape[:2]
    if data.startswith(b"\xff\xd8"):
        for shrink in shrinks:
            if -(-height // shrink) >= rows and -(-width // shrink) >= columns:
                return decoded(data, shrink)
    return decoded(data)


def view_by_the_words(told, data):
    size, share = told["side_pixels"], told["crop_share"]
    pixels = reduced(data, told["jpeg_shrinks"], int(size / share), int(size / share))
    height, width = pixels.shape[:2]
    rows, columns = max(1, round(share * height)), max(1, round(share * width))
    top, left = (height - rows) // 2, (width - columns) // 2
    middle = np.ascontiguousarray(pixels[top : top + rows, left : left + columns])
    down, across = rows / size, columns / size
    r = max(down, across)
    if down == across == 1:
        return middle
    if r > told["blurred_shrink"]:
        smaller = min(columns, size), min(rows, size)
        middle = cv2.resize(middle, smaller, interpolation=cv2.INTER_AREA)
    elif r > told["linear_shrink"]:
        is_few = r <= told["few_taps_shrink"]
        taps = told["few_taps"] if is_few else told["many_taps"]
        x, y = (np.sqrt(max(one**2 - 1, 0.001) / 6) for one in (across, down))
        middle = cv2.GaussianBlur(middle, (taps, taps), sigmaX=x, sigmaY=y)
    return cv2.resize(middle, (size, size), interpolation=cv2.INTER_LINEAR)


def by_opencv(pixels, quality, chroma):
    factors = {
        "420": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
        "444": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    }
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, factors[chroma]]
    return cv2.imencode(".jpg", pixels[..., ::-1], options)[1].tobytes()


def by_simplejpeg(pixels, quality, chroma):
    pixels = np.ascontiguousarray(pixels)
    return simplejpeg.encode_jpeg(
        pixels, quality=quality, colorsubsampling=chroma, fastdct=True
    )


def stored_by_the_words(told, data, encode):
    short, (height, width) = told["short_side_pixels"], decoded(data).shape[:2]
    whole = min(height, width)
    if whole <= short and data.startswith(b"\xff\xd8"):
        return data
    pixels, chroma = decoded(data), "444"
    if whole > short:
        pixels = reduced(data, told["jpeg_shrinks"], short, short)
        is_area = min(pixels.shape[:2]) / short > told["linear_shrink"]
        method = cv2.INTER_AREA if is_area else cv2.INTER_LINEAR
        size = round(width * short / whole), round(height * short / whole)
        pixels = cv2.resize(np.ascontiguousarray(pixels), size, interpolation=method)
        chroma = "420"
    return encode(pixels, told["jpeg_quality"], chroma)


def original(height, width, suffix):
    """Returns a file of smooth colours and noise."""
    rng = np.random.default_rng(height + width)
    coarse = rng.integers(0, 256, (height // 12, width // 12, 3)).astype(np.uint8)
    pixels = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    noise = rng.integers(-20, 21, pixels.shape)
    pixels = np.clip(pixels + noise, 0, 255).astype(np.uint8)
    return cv2.imencode(suffix, pixels)[1].tobytes()


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize(
    "shape",
    [
        (128, 128),
        (300, 200),
        (70, 70),
        (64, 64),
        (50, 40),
        (90, 160),
        (640, 480),
        (40, 700),
    ],
)
@pytest.mark.parametrize(("side", "share"), [(16, 1.0), (64, 1.0), (64, 0.875)])
def test_the_words_of_export_json_alone_give_the_pixels_of_evaluation(
    folder, shape, suffix, side, share
):
    transform = EvalTransform(size_pixels=side, crop_share=share)
    told = json.loads((folder / "export.json").read_text())["images"]["view"]
    # Those of this run, except for the values given here.
    own = json.loads(json.dumps(transform.describe()))
    assert {k for k in told if told[k] != own[k]} <= {
        "side_pixels",
        "crop_share",
        "how",
    }
    data = original(*shape, suffix)
    view = view_by_the_words(own, data).astype(int)
    assert np.abs(view - transform(data)).max() <= 1


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("shape", [(600, 400), (300, 330), (1200, 900), (60, 200)])
def test_the_words_of_export_json_alone_give_the_image_that_is_stored(
    folder, shape, suffix
):
    told = json.loads((folder / "export.json").read_text())["images"]
    data, view = original(*shape, suffix), EvalTransform(size_pixels=64)
    recoded = recode(data, short_side=told["stored"]["short_side_pixels"])
    differences = []
    for encode in (by_simplejpeg, by_opencv):
        stored = stored_by_the_words(told["stored"], data, encode)
        assert decoded(stored).shape == decoded(recoded).shape
        differences.append(np.abs(view(stored).astype(int) - view(recoded)))
    assert differences[0].max() <= 1
    assert differences[1].mean() <= 2


def test_the_words_name_the_numbers_that_go_with_them(folder):
    told = json.loads((folder / "export.json").read_text())["images"]
    assert told["stored"]["short_side_pixels"] == 256
    assert told["view"]["side_pixels"] == 16
    for part, names in (
        ("stored", ("short_side_pixels", "linear_shrink", "jpeg_quality")),
        ("view", ("side_pixels", "blurred_shrink", "linear_shrink", "many_taps")),
    ):
        words = " ".join(told[part]["how"])
        for name in names:
            assert re.search(rf"\b{told[part][name]:g}\b", words), name


def test_provenance_and_its_caveats_go_with_the_folder(workdir, tmp_path, capsys):
    copy = Workdir(shutil.copytree(workdir.path, tmp_path / "copy"))
    metrics = copy.metrics()
    record = metrics.provenance.with_("thresholds", labels=["tuning"])
    metrics = replace(metrics, provenance=record)
    (copy.path / "metrics.json").write_text(json.dumps(metrics.to_json()))
    seal(copy.path)
    has_onnx = "onnx" in sys.modules or find_spec("onnx") is not None
    folder = exported(copy, tmp_path / "folder", *["--onnx"] * has_onnx)
    caveat = "Labels of the tuning split chose the thresholds"
    said = capsys.readouterr()[0]
    assert said.startswith(f"CAVEAT     {caveat}") and record.badge() in said
    assert json.loads((folder / "export.json").read_text())["provenance"] == (
        record.to_json()
    )
    assert f"CAVEAT {caveat}" in elsewhere(folder, "").stderr
    if has_onnx:
        import onnxruntime

        run = onnxruntime.InferenceSession(folder / "model.onnx")
        kept = run.get_modelmeta().custom_metadata_map
        assert json.loads(kept["provenance"]) == record.to_json()
        assert json.loads(kept["labels"]) == list(workdir.vocabulary().codes)


def test_thresholds_of_another_checkpoint_are_refused(workdir, tmp_path, capsys):
    copy = Workdir(shutil.copytree(workdir.path, tmp_path / "copy"))
    metrics = replace(copy.metrics(), step=1)
    (copy.path / "metrics.json").write_text(json.dumps(metrics.to_json()))
    seal(copy.path)
    words = f"--workdir={copy.path}", f"--output={tmp_path / 'folder'}"
    assert run("export", *words) == 2
    errors = capsys.readouterr().err
    assert re.search(r"fitted on step 1 of stage only, but the .* step 2 of", errors)
    assert f"run evaluate --workdir={copy.path} --stage=only again first" in errors
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    ("change", "words", "pattern"),
    [
        (None, [], "--output is missing"),
        (None, ["--output={taken}"], "already exists; use the name of a new folder"),
        (None, ["--output={taken}/file/new"], "cannot be created"),
        (None, ["--output={new}", "--stage=only"], "export does not take --stage;"),
        (
            "metrics.json",
            ["--output={new}"],
            "metrics.json is missing;.* run evaluate",
        ),
        (
            "decoders.npz",
            ["--output={new}"],
            "decoders.npz is missing;.* run evaluate",
        ),
        ("evaluation.json", ["--output={new}"], "is missing; run evaluate"),
    ],
)
def test_an_export_that_cannot_be_is_refused_and_leaves_nothing(
    workdir, tmp_path, capsys, change, words, pattern
):
    run_folder = workdir.path
    if change:
        run_folder = shutil.copytree(workdir.path, tmp_path / "copy")
        (run_folder / change).unlink()
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    words = [word.format(taken=taken, new=tmp_path / "new") for word in words]
    before = sorted(tmp_path.rglob("*"))
    assert run("export", f"--workdir={run_folder}", *words) == 2
    errors = capsys.readouterr().err
    assert re.fullmatch(rf"jaxii: [^\n]*{pattern}[^\n]*\n", errors), errors
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_onnx_without_its_packages_is_refused_first_thing(
    workdir, tmp_path, capsys, monkeypatch, package
):
    monkeypatch.setitem(sys.modules, package, None)
    words = f"--workdir={workdir.path}", f"--output={tmp_path / 'folder'}", "--onnx"
    assert run("export", *words) == 2
    assert "pip install 'jaxii[onnx]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_fails_its_check_leaves_no_folder(
    workdir, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(programs, "TOLERANCE", -1.0)
    words = f"--workdir={workdir.path}", f"--output={tmp_path / 'folder'}"
    assert run("export", *words) == 2
    assert "differs from the checkpoint's by" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
