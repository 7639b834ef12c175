"""Tests that each way in which tuning or test data can reach a result is recorded.

One small run is used by the real commands. Each row of the README's table "How clean is
a figure" has a test here, in the same order.
"""

import contextlib
import hashlib
import io
import json
import pickle
import re
import shutil
import sys
from pathlib import Path
from types import MappingProxyType

import jax
import numpy as np
import pytest
import small_layout
import torch_files
from test_torch_pickle import hostile

import jaxii
from jaxii import main
from jaxii.data.dataset import open_dataset
from jaxii.data.seen import SeenImages
from jaxii.distributed import processes
from jaxii.distributed.mesh import make_mesh
from jaxii.errors import InputError
from jaxii.models import resnet
from jaxii.prepare.kaggle import Layout, prepare
from jaxii.runs.run import Run

pytestmark = pytest.mark.usefixtures("without_drawings")

# With the stem of ImageNet, the last maps have one pixel, and a device has one image.
NORM_OVER_ALL = "--config.model.batch_norm=global"
RECIPE = """
from jaxii.config import default_config


def get_config(split="train"):
    config = default_config()
    config.data.dataset = "kaggle"
    config.data.image_size_pixels = 16
    config.data.validation_fraction = 0.4
    config.data.augmentation = 0.0
    config.data.num_threads = 1
    config.global_batch_size = 8
    config.model.depth = 18
    config.model.width = 8
    config.model.stem = "small"
    config.model.compute_dtype = "float32"
    config.stages = (
        {"name": "only", "num_steps": 2, "split": split, "terms": {"bce": 1.0}},
    )
    return config
"""


def dataset(root, *, tuning=("/m/cat /m/dog", "/m/boat"), test=("/m/cat",) * 3):
    """Prepares 24 training, 2 tuning and 3 test images with these labels."""
    files = small_layout.write(root / "files", num_train=24)
    rows = [f"tune{i},{labels}" for i, labels in enumerate(tuning)]
    small_layout.lines(files / "tuning_labels.csv", *rows)
    rows = [f"test{i},{labels}" for i, labels in enumerate(test)]
    solution = small_layout.lines(root / "solution.csv", "image_id,labels", *rows)
    prepare(Layout.find(files, test_labels=solution), root / "data", short_side=16)
    return root / "data"


class Runs:
    """A folder of runs; calling it with words runs the command line."""

    def __init__(self, folder):
        self.folder = folder
        self.data = dataset(folder / "first")
        self.recipe = folder / "recipe.py"
        self.recipe.write_text(RECIPE)

    def __call__(self, *words, code=0):
        """Runs `jaxii WORDS` and returns its output."""
        argv = ["jaxii", *map(str, words)]
        printed = io.StringIO()
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
        ):
            patch.setattr(sys, "argv", argv)
            patch.setattr(processes, "preemption_notice", lambda: lambda step: False)
            found = main.main(argv)
        assert found == code, printed.getvalue()
        return printed.getvalue()

    def train(self, name, *words, split="train", data=None, code=0):
        return self(
            "train",
            f"--config={self.recipe}:{split}",
            f"--workdir={self.folder / name}",
            f"--data_dir={data or self.data}",
            *words,
            code=code,
        )

    def evaluate(self, name, *words, code=0):
        return self("evaluate", f"--workdir={self.folder / name}", *words, code=code)

    def predict(self, name, *words, code=0):
        """Predicts the test images; returns the output and the record."""
        output = self.folder / "answers.csv"
        said = self(
            "predict",
            f"--workdir={self.folder / name}",
            f"--images={self.folder / 'first' / 'files' / 'stage_1_test_images'}",
            f"--output={output}",
            *words,
            code=code,
        )
        beside = json.loads(Path(f"{output}.provenance.json").read_text())
        # test_held_out.py tests its value.
        assert set(beside.pop("expected_f2")) == {"mean", "error"}
        return said, beside

    def predict_refused(self, name):
        """Predicts with a run that is refused; returns the message."""
        images = self.folder / "first" / "files" / "stage_1_test_images"
        words = f"--workdir={self.folder / name}", f"--images={images}"
        return self("predict", *words, code=2)

    def seen(self, name):
        """Returns the index of the images that trained a run."""
        train = open_dataset(self.data).carve(0.4)["train"]
        seen = SeenImages.load(self.folder / name / "seen_images.npz")
        assert seen.count(train.index)["weights"] == train.num_examples
        return train.index

    def adapt(self, name, output, *words, code=0):
        return self(
            "adapt",
            f"--workdir={self.folder / name}",
            f"--output={self.folder / output}",
            *words,
            code=code,
        )

    def checkpoint(self, name, stage):
        """Returns the metadata of the last checkpoint of a stage."""
        folder = self.folder / name / "checkpoints" / stage
        last = max(folder.glob("*/metadata/metadata"), key=lambda p: int(p.parts[-3]))
        return json.loads(last.read_text())

    def arrays(self, name):
        """Returns the last checkpoint's metadata and arrays."""
        found = Run.open(self.folder / name)
        model = jax.device_get(
            found.checkpoints.restore_model(
                found.saved, jax.sharding.SingleDeviceSharding(jax.devices()[0])
            )
        )
        metadata = found.checkpoints.metadata(found.saved)
        found.close()
        return metadata, model

    def copy(self, name, of="clean"):
        """Copies a run, as if the same command had trained it there."""
        return shutil.copytree(self.folder / of, self.folder / name)

    def metrics(self, name, file="metrics.json"):
        return json.loads((self.folder / name / file).read_text())

    def provenance(self, name, file="metrics.json"):
        return self.metrics(name, file)["provenance"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with `clean`, a trained run, and `adapted`, which continues from it."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        # One block on one device, compiled once for all commands: compilation would
        # take longer than everything else.
        patch.setitem(resnet.DEPTHS, 18, ((1, 0, 0, 0), False))
        one = make_mesh(jax.devices()[:1])
        patch.setattr("jaxii.runs.run.make_mesh", lambda: one)
        made = Runs(folder)
        made.train("clean")
        made.adapt("clean", "adapted", "--num_epochs=8", "--allow_tuning_labels")
        yield made


def influence(labels=(), images=()):
    return {"labels": list(labels), "images": list(images)}


CAVEAT = "CAVEAT     Labels of the tuning split shaped the weights"


# Weights.


def test_a_run_on_the_training_split_is_clean(runs):
    record = runs.provenance("clean")
    assert record["clean"] is True
    assert record["weights"] == influence(["train"])
    assert record["model_selection"] == influence(["validation"])
    assert record["thresholds"] == influence(["validation"])
    assert record["calibration"] == influence(["validation"])
    assert "CAVEAT" not in runs.evaluate("clean")


def test_adapt_trains_the_weights_on_tuning_labels_and_everything_says_so(runs):
    record = runs.provenance("adapted")
    assert record["clean"] is False
    assert record["weights"] == influence(["train", "tuning"])
    assert record["model_selection"] == influence(["validation"])
    text = (runs.folder / "adapted" / "report.html").read_text()
    assert "tuning labels" in text.lower()
    beside = (runs.folder / "adapted" / "submission.csv.provenance.json").read_text()
    assert json.loads(beside) == record
    assert "tuning labels" in runs("compare", runs.folder / "adapted")
    said, beside = runs.predict("adapted")
    assert said.startswith(CAVEAT)
    assert beside == record
    checkpoint = runs.checkpoint("adapted", "adapt")
    assert checkpoint["provenance"]["weights"] == influence(["train", "tuning"])


def test_evaluating_an_adapted_model_says_so_first(runs):
    assert runs.evaluate("adapted").startswith(CAVEAT)


def test_adapt_is_refused_without_the_flag(runs):
    said = runs.adapt("clean", "refused", code=2)
    assert "add --allow_tuning_labels" in said
    assert not (runs.folder / "refused").exists()


def test_a_stage_on_tuning_is_refused_without_the_flag(runs):
    said = runs.train("refused", split="tuning", code=2)
    assert "add --allow_tuning_labels" in said
    assert not (runs.folder / "refused").exists()


def test_a_run_that_starts_from_an_adapted_one_keeps_its_past(runs):
    start = f"--config.start_from={runs.folder / 'adapted'}"
    assert "add --allow_tuning_labels" in runs.train("heir", start, code=2)
    assert not (runs.folder / "heir").exists()
    said = runs.train("heir", start, "--allow_tuning_labels")
    assert "of stage adapt of" in said
    assert runs.provenance("heir")["weights"] == influence(["train", "tuning"])
    # The run that it started from is no longer needed.
    (runs.folder / "adapted").rename(runs.folder / "elsewhere")
    try:
        assert runs.evaluate("heir").startswith(CAVEAT)
    finally:
        (runs.folder / "elsewhere").rename(runs.folder / "adapted")


def best_of_clean(runs, step=2):
    """Returns a checkpoint of `clean`, as named by a run that starts from it."""
    with Run.open(runs.folder / "clean") as clean:
        assert clean.saved.step == step
        digest = clean.checkpoint_hash[:16]
    return f"step {step} of stage only of {runs.folder / 'clean'} (checkpoint {digest})"


def test_a_run_records_the_checkpoint_that_it_started_from(runs):
    start = best_of_clean(runs)
    said = runs.train("heir_of_clean", f"--config.start_from={runs.folder / 'clean'}")
    assert f"start     {start}" in said.splitlines()
    folder = runs.folder / "heir_of_clean"
    record = json.loads((folder / "start.json").read_text())
    assert (record["stage"], record["step"], record["part"]) == ("only", 2, "network")
    assert start in (folder / "report.html").read_text()
    assert "start.json" in runs.checkpoint("heir_of_clean", "only")["files"]
    (folder / "start.json").unlink()
    assert "start.json is missing" in runs.evaluate("heir_of_clean", code=2)


@pytest.mark.parametrize("field", ["start_from", "model.pretrained"])
def test_a_run_without_a_checkpoint_starts_only_from_the_same_checkpoint(runs, field):
    other = runs.copy(f"other_{field}")
    words = (f"runs_on_{field}", f"--config.{field}={other}")
    runs.train(*words)
    shutil.rmtree(runs.folder / words[0] / "checkpoints")
    runs.train(*words)
    # The other run is trained again, with a different result.
    shutil.rmtree(runs.folder / words[0] / "checkpoints")
    shutil.rmtree(other)
    runs.train(other.name, "--config.seed=1")
    said = runs.train(*words, code=2)
    assert re.search(
        r"started from .*step 2 .*but the best .* is now .*; use anot", said
    )
    assert not (runs.folder / words[0] / "checkpoints").exists()
    assert "belongs to another config" in runs.train(*words, "--config.seed=7", code=2)


@pytest.fixture(scope="module")
def other_labels(runs):
    """A dataset of other images, with the labels in another order."""
    codes = "/m/dog", "/m/cat", "/m/boat"
    return rearranged(runs.folder / "eighth", lambda name: f"new_{name}", codes=codes)


def test_the_trunk_of_a_run_is_a_start_for_other_labels(runs, other_labels):
    start = f"--config.model.pretrained={runs.folder / 'clean'}"
    words = start, "--config.optimizer.peak_lr=1e-8"
    said = runs.train("other_heads", *words, data=other_labels)
    assert f"start     trunk of {best_of_clean(runs)}" in said.splitlines()
    assert "stage only: starting from the trunk of step 2 of stage only" in said
    (old, before), (_, after) = map(runs.arrays, ("clean", "other_heads"))
    for part in (before, after):
        assert set(part["params"]) == {"trunk", "classifier"}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        before["params"]["trunk"],
        after["params"]["trunk"],
    )
    kernels = [part["params"]["classifier"]["kernel"] for part in (before, after)]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-3
    record = runs.provenance("other_heads")
    assert (record["clean"], record["pretrained"]) == (True, "")
    assert old.data_hash in record["datasets"]
    assert len(record["datasets"]) == 2
    report = (runs.folder / "other_heads" / "report.html").read_text()
    assert f"trunk of {best_of_clean(runs)}" in report
    # The images that `clean` has seen are still recorded.
    seen = SeenImages.load(runs.folder / "other_heads" / "seen_images.npz")
    assert "weights" in seen.count(runs.seen("clean"))


def test_a_trunk_that_learned_from_tuning_labels_is_never_clean(runs, other_labels):
    start = f"--config.model.pretrained={runs.folder / 'adapted'}"
    said = runs.train("heads_of_adapted", start, data=other_labels, code=2)
    assert "tuning labels: weights" in said
    assert not (runs.folder / "heads_of_adapted").exists()
    words = start, "--allow_tuning_labels"
    said = runs.train("heads_of_adapted", *words, data=other_labels)
    assert "CAVEAT    Labels of the tuning split shaped the weights" in said
    record = runs.provenance("heads_of_adapted")
    assert record["weights"] == influence(["train", "tuning"])


def test_a_trunk_that_was_trained_on_the_test_is_not_clean(runs, exchanged):
    start = f"--config.model.pretrained={runs.folder / 'clean'}"
    said = runs.train("trunk_of_the_test", start, data=exchanged, code=2)
    assert "(test labels: weights" in said


def test_a_trunk_that_was_trained_on_validation_images_is_refused(runs):
    words = (
        f"--config.model.pretrained={runs.folder / 'clean'}",
        "--config.data.validation_fraction=0.8",
    )
    said = runs.train("refused", *words, code=2)
    assert re.search(r"clean was trained on \d+ of the \d+ images of split val", said)
    assert not (runs.folder / "refused").exists()


@pytest.mark.parametrize(
    ("field", "value"), [("width", 16), ("stem", "imagenet"), ("variant", "resnet_d")]
)
def test_a_trunk_of_another_architecture_is_refused(runs, field, value):
    start = f"--config.model.pretrained={runs.folder / 'clean'}"
    words = start, f"--config.model.{field}={value}", NORM_OVER_ALL
    said = runs.train("refused", *words, code=2)
    assert re.search(rf"clean has a trunk with model.{field}=.*; use the same v", said)
    assert not (runs.folder / "refused").exists()


def test_a_start_whose_stem_differs_only_in_its_strides_is_refused(runs):
    deep = "--config.model.variant=resnet_d"
    runs.train("deep_stem", deep)
    start = f"--config.start_from={runs.folder / 'deep_stem'}"
    words = deep, start, "--config.model.stem=imagenet", NORM_OVER_ALL
    said = runs.train("refused", *words, code=2)
    assert "deep_stem has a trunk with model.stem='small', but this run has" in said
    assert not (runs.folder / "refused").exists()


def network_weights():
    """Returns weights of `RECIPE`'s network in `runs`, with torchvision's names."""
    rng = np.random.default_rng(0)
    arrays = {"fc.weight": np.ones((3, 8), np.float32), "fc.bias": np.ones(3, "f4")}
    for at, number, in_channels in ("", 1, 3), ("layer1.0.", 1, 8), ("layer1.0.", 2, 8):
        arrays |= layer(rng, f"{at}conv{number}", f"{at}bn{number}", in_channels)
    return arrays


def layer(rng, conv, norm, in_channels):
    arrays = {f"{conv}.weight": rng.normal(size=(8, in_channels, 3, 3))}
    for leaf in ("weight", "bias", "running_mean", "running_var"):
        arrays[f"{norm}.{leaf}"] = rng.uniform(0.5, 1.5, 8)
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def test_pretrained_weights_are_a_start_that_every_file_names(runs):
    arrays = network_weights()
    path = torch_files.save(runs.folder / "resnet.pth", arrays)
    words = (f"--config.model.pretrained={path}", "--config.optimizer.peak_lr=1e-8")
    said = runs.train("pretrained", *words)
    origin = f"resnet.pth (sha256 {hashlib.sha256(path.read_bytes()).hexdigest()})"
    assert said.startswith(f"CAVEAT    The initial weights came from {origin}")
    assert f"trunk from {origin}" in said
    assert "fc.weight [3, 8] and fc.bias [3] not used" in said
    assert f"stage only: starting from {origin}" in said
    record = runs.provenance("pretrained")
    assert record["pretrained"] == origin
    folder = runs.folder / "pretrained"
    beside = (folder / "submission.csv.provenance.json").read_text()
    assert json.loads(beside) == record
    assert origin in (folder / "report.html").read_text()
    metadata, model = runs.arrays("pretrained")
    assert metadata.provenance["pretrained"] == origin
    kernel = model["params"]["trunk"]["stem_conv"]["kernel"].transpose(3, 2, 0, 1)
    np.testing.assert_allclose(kernel, arrays["conv1.weight"], atol=1e-6)
    assert np.abs(model["params"]["classifier"]["kernel"] - 1.0).min() > 0.1
    # The weight file is not read again to continue or to evaluate.
    path.unlink()
    assert "trunk from" not in runs.train("pretrained", *words)
    assert runs.evaluate("pretrained").startswith("CAVEAT     The initial weights came")
    runs.adapt("pretrained", "heir_of_it", "--allow_tuning_labels", "--num_epochs=4")
    assert runs.provenance("heir_of_it")["pretrained"] == origin


def test_a_malicious_file_is_refused_before_anything_runs_or_is_written(runs):
    marker = runs.folder / "marker"
    value, name = hostile(marker)["system"]
    path = runs.folder / "evil.pth"
    evil = torch_files.Code(pickle.dumps(value, 2)[2:-1])
    path.write_bytes(torch_files.zip_file({"conv1.weight": evil}, {}))
    said = runs.train("refused", f"--config.model.pretrained={path}", code=2)
    assert re.search(rf"evil\.pth cannot be used as weights.* refers to {name}", said)
    assert "Traceback" not in said
    assert not marker.exists()
    assert not (runs.folder / "refused").exists()


def test_two_starts_are_refused(runs):
    words = "--config.start_from=a", "--config.model.pretrained=b"
    said = runs.train("refused", *words, code=2)
    assert "the first stage starts from only one; clear one of them" in said


def test_batch_norm_of_the_target_is_recorded_as_images(runs):
    said = runs.evaluate("clean", "--adapt_bn")
    assert said.startswith("CAVEAT     Images without labels of the test split")
    record = runs.provenance("clean", "metrics_adabn.json")
    assert record["weights"] == influence(["train"], ["test"])
    assert runs.provenance("clean")["clean"] is True
    _, record = runs.predict("clean", "--adapt_bn")
    assert record["weights"] == influence(["train"], ["predicted"])


# The choice of a checkpoint.


def test_no_checkpoint_is_chosen_on_tuning(runs):
    last = runs.checkpoint("adapted", "adapt")
    assert (last["metric"], last["step"]) == (None, 2)
    assert runs.metrics("adapted")["step"] == 2


# Thresholds and calibration.


def test_decoders_fitted_on_tuning_labels_are_recorded(runs):
    assert "add --allow_tuning_labels" in runs.evaluate(
        "clean", "--tune_on=tuning", code=2
    )
    runs.evaluate("clean", "--tune_on=tuning", "--allow_tuning_labels")
    record = runs.provenance("clean", "metrics_tuned_on_tuning.json")
    assert record["thresholds"] == influence(["tuning"])
    assert record["calibration"] == influence(["tuning"])
    assert record["weights"] == influence(["train"])


def test_a_shift_of_labels_is_recorded_as_images(runs):
    runs.evaluate("clean", "--label_shift", "--adapt_bn")
    record = runs.provenance("clean", "metrics_adabn_label_shift.json")
    assert record["calibration"] == influence(["validation"], ["test"])
    assert record["weights"] == influence(["train"], ["test"])
    _, record = runs.predict("clean", "--label_shift")
    assert record["calibration"] == influence(["validation"], ["predicted"])


# Several models.


def test_an_ensemble_has_seen_what_any_of_its_members_has(runs):
    words = ("clean", f"--ensemble={runs.folder / 'adapted'}")
    assert "has learned from labels" in runs.evaluate(*words, code=2)
    said = runs.evaluate(*words, "--allow_tuning_labels")
    assert said.startswith(CAVEAT)
    record = runs.provenance("clean", "metrics_ensemble.json")
    assert record["weights"] == influence(["train", "tuning"])
    said, beside = runs.predict(*words, "--allow_tuning_labels")
    assert said.startswith(CAVEAT)
    assert beside == record


@pytest.fixture(scope="module")
def pair(runs):
    """Evaluates `one` with `two` as an ensemble; returns the folder of `two`."""
    runs.copy("one")
    runs.evaluate("one", f"--ensemble={runs.copy('two')}")
    return runs.folder / "two"


def test_a_member_may_move_after_the_evaluation(runs, pair, tmp_path, monkeypatch):
    shutil.copytree(pair, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    _, record = runs.predict("one", "--ensemble=moved")
    assert record == runs.provenance("one", "metrics_ensemble.json")


def test_a_member_that_was_trained_again_is_another_one(runs, pair, tmp_path):
    runs.train("trained_again", "--config.seed=1")
    pair.rename(tmp_path / "kept")
    try:
        runs.copy("two", of="trained_again")
        said, _ = runs.predict("one", f"--ensemble={pair}", code=2)
    finally:
        shutil.rmtree(pair)
        (tmp_path / "kept").rename(pair)
    assert "are not the same; run evaluate with the same --ensemble first" in said


def test_a_run_that_was_trained_again_is_not_used_with_its_old_decoders(runs):
    runs.train("another_seed", "--config.seed=1")
    folder = runs.copy("retrained")
    record, step = runs.metrics("retrained"), runs.metrics("another_seed")["step"]
    assert record["step"] == step
    shutil.rmtree(folder / "checkpoints")
    shutil.copytree(
        runs.folder / "another_seed" / "checkpoints", folder / "checkpoints"
    )
    fields = runs.folder / "another_seed" / "config.json"
    shutil.copy(fields, folder)
    used = rf"fitted on step {step} of stage .*, but the checkpoint to use is another"
    assert re.search(used, runs.predict_refused("retrained"))
    with jaxii.load(folder) as run:
        for use in (lambda: run.decoders, lambda: run.figures("validation")):
            with pytest.raises(InputError, match=used):
                use()


def test_a_prediction_has_seen_what_any_member_has(runs, pair, monkeypatch):
    own = Run.provenance.fget

    def provenance(run):
        labels = ["tuning"] * (run.workdir.path == pair)
        return own(run).with_("weights", labels=labels)

    monkeypatch.setattr(Run, "provenance", property(provenance))
    words = f"--ensemble={pair}", "--allow_tuning_labels"
    _, record = runs.predict("one", *words)
    assert record["clean"] is False
    assert record["weights"] == influence(["train", "tuning"])


# Labels that are not read.


def test_tuning_and_test_labels_change_nothing_that_does_not_ask_for_them(runs):
    others = dataset(
        runs.folder / "second", tuning=("/m/boat", "/m/cat"), test=("/m/dog",) * 3
    )
    runs.train("other_labels", data=others)
    one, other = runs.metrics("clean"), runs.metrics("other_labels")
    assert one["splits"]["validation"] == other["splits"]["validation"]
    assert one["decoder"] == other["decoder"]
    assert one["constant"]["labels"] == other["constant"]["labels"]
    assert one["splits"]["test"] != other["splits"]["test"]
    (_, weights), (_, other_weights) = map(runs.arrays, ("clean", "other_labels"))
    jax.tree.map(np.testing.assert_array_equal, weights, other_weights)
    answers = [
        (runs.folder / name / "submission.csv").read_text()
        for name in ("clean", "other_labels")
    ]
    assert answers[0] == answers[1]


def test_nothing_is_fitted_on_the_test(runs):
    assert "<validation|held_out|tuning>" in runs.evaluate(
        "clean", "--tune_on=test", "--allow_tuning_labels", code=2
    )


# Other datasets.


def rearranged(
    root, rename, *, copies=MappingProxyType({}), validation=(), codes=(), short_side=16
):
    """Prepares images with other ids: `rename` maps the usual ones.

    Args:
      copies: Usual id of a copy -> usual id of its original. Other images with new ids
        are new files.
      codes: The labels, if different from the usual ones in the usual order.
    """
    files = small_layout.write(root / "files", num_train=24)
    usual = {path.stem: (path, path.read_bytes()) for path in files.rglob("*.jpg")}
    for image_id, (path, content) in usual.items():
        name = rename(image_id)
        if image_id in copies:
            content = usual[copies[image_id]][1]
        elif name != image_id:
            content = small_layout.named(content, name)
        path.unlink()
        path.with_name(f"{name}.jpg").write_bytes(content)
    for path in files.glob("*.csv"):
        ids = r"\b(train|test|tune)\d+\b"
        text = re.sub(ids, lambda found: rename(found[0]), path.read_text())
        path.write_text(text)
    rows = [f"{rename(f'test{i}')},/m/cat" for i in range(3)]
    solution = small_layout.lines(root / "solution.csv", "image_id,labels", *rows)
    if validation:
        small_layout.lines(files / "validation_ids.csv", "image_id", *validation)
    if codes:
        small_layout.lines(files / "classes-trainable.csv", "label_code", *codes)
    layout = Layout.find(files, test_labels=solution)
    prepare(layout, root / "data", short_side=short_side)
    return root / "data"


def test_a_run_does_not_go_on_with_another_dataset(runs):
    data = rearranged(runs.folder / "fourth", lambda name: f"new_{name}")
    said = runs.train("clean", data=data, code=2)
    assert re.search("clean was trained on a dataset with .* as --data_dir", said)


def test_a_start_that_came_to_no_checkpoint_leaves_nothing_of_its_data(runs):
    runs.copy("first_start")
    shutil.rmtree(runs.folder / "first_start" / "checkpoints")
    data = rearranged(runs.folder / "seventh", lambda name: f"new_{name}")
    runs.train("first_start", data=data)
    seen = SeenImages.load(runs.folder / "first_start" / "seen_images.npz")
    train = open_dataset(data).carve(0.4)["train"].index
    assert seen.count(train) == {"weights": len(train)}
    assert "weights" not in seen.count(runs.seen("clean"))


@pytest.fixture(scope="module")
def knows_the_test(runs, exchanged):
    """The name of a run that was trained on `exchanged`."""
    runs.train("knows_the_test", data=exchanged)
    return "knows_the_test"


@pytest.fixture(scope="module")
def exchanged(runs):
    """A dataset whose test images are training images of `clean`, and vice versa."""
    trained_on = list(runs.seen("clean").image_ids[:3])

    def rename(name):
        pairs = {f"test{i}": other for i, other in enumerate(trained_on)}
        return {**pairs, **{v: k for k, v in pairs.items()}}.get(name, f"new_{name}")

    return rearranged(runs.folder / "exchanged", rename)


def test_a_run_measured_on_images_that_it_was_trained_on_is_not_clean(runs, exchanged):
    words = "clean", f"--data_dir={exchanged}"
    said = runs.evaluate(*words, code=2)
    assert re.search("has learned from images of .*test labels: weights.*add --a", said)
    assert runs.provenance("clean")["clean"] is True
    runs.copy("measured_elsewhere")
    words = "measured_elsewhere", f"--data_dir={exchanged}", "--allow_tuning_labels"
    said = runs.evaluate(*words)
    assert said.startswith("CAVEAT     Labels of the test split shaped the weights")
    record = runs.provenance("measured_elsewhere")
    assert (record["clean"], record["weights"]) == (False, influence(["test", "train"]))


def test_a_member_of_an_ensemble_that_was_trained_on_the_test_is_not_clean(
    runs, knows_the_test
):
    assert runs.provenance(knows_the_test)["clean"] is True
    words = "clean", f"--ensemble={runs.folder / knows_the_test}"
    said = runs.evaluate(*words, code=2)
    assert re.search(r"learned from labels .*\(test labels: weights, model.*add", said)
    runs.evaluate(*words, "--allow_tuning_labels")
    record = runs.provenance("clean", "metrics_ensemble.json")
    assert (record["clean"], record["weights"]) == (False, influence(["test", "train"]))


def test_a_run_that_starts_from_one_that_knows_the_test_is_not_clean(
    runs, knows_the_test
):
    start = f"--config.start_from={runs.folder / knows_the_test}"
    said = runs.train("heir_of_the_test", start, code=2)
    assert "test labels: weights" in said
    runs.train("heir_of_the_test", start, "--allow_tuning_labels")
    assert runs.provenance("heir_of_the_test")["clean"] is False
    assert len(runs.provenance("heir_of_the_test")["datasets"]) == 2


def test_thresholds_are_not_chosen_on_images_that_trained_the_run(runs):
    known = list(runs.seen("clean").image_ids[:4])
    data = rearranged(runs.folder / "fifth", lambda name: name, validation=known)
    said = runs.evaluate("clean", f"--data_dir={data}", code=2)
    assert re.search("was trained on 4 of the 4 images of split validation", said)


def test_another_dataset_of_new_images_is_clean(runs):
    data = rearranged(runs.folder / "sixth", lambda name: f"new_{name}")
    runs.copy("elsewhere")
    runs.evaluate("elsewhere", f"--data_dir={data}")
    assert runs.provenance("elsewhere")["clean"] is True
    assert runs.metrics("elsewhere")["data_hash"] != runs.metrics("clean")["data_hash"]


def test_images_that_trained_the_run_are_found_under_other_names(runs):
    known = runs.seen("clean").image_ids
    data = rearranged(
        runs.folder / "copied_test",
        lambda name: f"new_{name}",
        copies={f"test{i}": known[i] for i in range(3)},
    )
    said = runs.evaluate("clean", f"--data_dir={data}", code=2)
    assert re.search("has learned from images of .*test labels: weights.*add --a", said)


def test_thresholds_are_not_chosen_on_copies_of_images_that_trained_the_run(runs):
    known = list(runs.seen("clean").image_ids[:4])
    data = rearranged(
        runs.folder / "copied_validation",
        lambda name: f"new_{name}",
        copies={name: name for name in known[:3]},
        validation=[f"new_{name}" for name in known],
    )
    said = runs.evaluate("clean", f"--data_dir={data}", code=2)
    assert re.search("was trained on 3 of the 4 images of split validation", said)


def test_images_are_predicted_alike_after_an_evaluation_on_another_dataset(runs):
    def rename(name):
        return f"large_{name}"

    folder = runs.copy("small_images")
    images = runs.folder / "first" / "files" / "stage_1_test_images"
    with jaxii.load(folder) as run:
        before = run.predict_proba(images)
    data = rearranged(runs.folder / "eleventh", rename, short_side=64)
    runs.evaluate("small_images", f"--data_dir={data}")
    with jaxii.load(folder) as run:
        assert run.short_side_pixels == 16
        np.testing.assert_array_equal(run.predict_proba(images), before)


def test_a_labelled_set_that_fitted_the_decoders_is_not_clean(runs, tmp_path):
    data = rearranged(runs.folder / "ninth", lambda name: f"set_{name}")
    runs.copy("fitted_elsewhere")
    runs.evaluate("fitted_elsewhere", f"--data_dir={data}")
    ids = open_dataset(data).carve(0.4)["validation"].index.image_ids
    files = {path.stem: path for path in (data.parent / "files").rglob("*.jpg")}
    for image_id in ids:
        shutil.copy(files[image_id], tmp_path)
    rows = [f"{image_id}.jpg,/m/cat" for image_id in ids]
    labels = small_layout.lines(tmp_path / "labels.csv", "path,label", *rows)
    for name, seen in (("fitted_elsewhere", True), ("clean", False)):
        with jaxii.load(runs.copy(f"{name}_measured", of=name)) as run:
            found = jaxii.evaluate(run, images=tmp_path, labels=labels, name="ours")
        counts = {"calibration": len(ids), "thresholds": len(ids)}
        assert found.num_seen == (counts if seen else {})
        assert found.provenance.clean is not seen
        if seen:
            assert found.provenance.badge() == "ours labels: calibration, thresholds"


@pytest.fixture(scope="module")
def chosen_on_the_test(runs):
    """The name of a run whose checkpoint was chosen on test images of `clean`."""
    names = {f"train{i:02d}": f"test{i}" for i in range(3)}
    names |= {f"test{i}": f"other{i}" for i in range(3)}
    data = rearranged(
        runs.folder / "tenth",
        lambda name: names.get(name, f"new_{name}"),
        validation=[f"test{i}" for i in range(3)],
    )
    runs.train("chosen_on_the_test", data=data)
    return "chosen_on_the_test"


def test_a_checkpoint_that_was_chosen_on_the_test_is_refused(runs, chosen_on_the_test):
    badge = r"\(test labels: model selection\); add --allow_tuning_labels"
    other = runs.folder / chosen_on_the_test
    said = runs.evaluate("clean", f"--ensemble={other}", code=2)
    assert re.search(badge, said)
    said = runs.train("heir_of_a_choice", f"--config.start_from={other}", code=2)
    assert re.search(badge, said)


# Modified files of the run.


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("model", "stem", "imagenet"),
        ("model", "width", 16),
        ("data", "image_size_pixels", 24),
        ("data", "crop_share", 0.5),
    ],
)
def test_an_edited_configuration_is_refused(runs, tmp_path, section, field, value):
    copy = runs.copy(f"edited_{field}")
    config = json.loads((copy / "config.json").read_text())
    before, config[section][field] = config[section][field], value
    (copy / "config.json").write_text(json.dumps(config))
    for said in (runs.evaluate(copy.name, code=2), runs.predict_refused(copy.name)):
        assert "config.json is not the config" in said
        assert f"{section}.{field}: {before} -> {value}" in said
    assert "config.json is damaged" in runs("compare", copy, code=2)


def test_a_label_list_with_permuted_descriptions_is_refused(runs):
    copy = runs.copy("permuted")
    text = (copy / "labels.csv").read_text()
    swapped = text.replace("Cat", "?").replace("Dog", "Cat").replace("?", "Dog")
    (copy / "labels.csv").write_text(swapped)
    for said in (runs.evaluate("permuted", code=2), runs.predict_refused("permuted")):
        assert "labels.csv is damaged" in said


def test_decoders_of_another_evaluation_are_refused(runs):
    copy = runs.copy("mixed")
    with np.load(copy / "decoders.npz") as stored:
        arrays = {**stored, "threshold": stored["threshold"] / 2}
    np.savez(copy / "decoders.npz", **arrays)
    assert "decoders.npz is damaged or was replaced" in runs.predict_refused("mixed")
    runs.evaluate("mixed")
    runs.predict("mixed")


def test_an_interrupted_evaluation_is_not_used(runs):
    copy = runs.copy("interrupted")
    (copy / "evaluation.json").unlink()
    for said in (
        runs.predict_refused("interrupted"),
        runs("compare", copy, code=2),
        runs("export", f"--workdir={copy}", f"--output={copy / 'out'}", code=2),
    ):
        assert re.search("evaluation.json is missing; run .?evaluate", said)


def test_a_damaged_history_is_said_and_never_shown(runs):
    copy = runs.copy("history")
    text = (copy / "history.jsonl").read_text()
    (copy / "history.jsonl").write_text(text.replace('"step": 2', '"step": 1', 1))
    assert "history.jsonl is missing or damaged" in runs("compare", copy, code=2)
    said = runs.evaluate("history")
    assert "history.jsonl is damaged; the report has no training curves" in said
    runs.train("history", "--config.seed=7", code=2)
    assert not (copy / "history.damaged.jsonl").exists()
    said = runs.train("history")
    assert "history.jsonl is damaged; a damaged history is kept as history.da" in said
    assert runs.metrics("history")["splits"] == runs.metrics("clean")["splits"]


# Invalid starts.


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["--config.model.width=16"], r"clean does not fit.* is \[8, 3\] there"),
        (
            ["--config.data.validation_fraction=0.3"],
            "data.validation_fraction=0.4, but",
        ),
        (["--config.start_from=nowhere"], "nowhere is not the folder of a run"),
        (
            ["--config.start_from_stage=first"],
            "--stage=first has no checkpoint; use one of only",
        ),
    ],
)
def test_a_start_that_cannot_be_is_refused_before_anything_is_written(
    runs, words, pattern
):
    clean = runs.folder / "clean"
    words = [word.replace("{clean}", str(clean)) for word in words]
    said = runs.train("refused", f"--config.start_from={clean}", *words, code=2)
    assert re.search(pattern, said), said
    assert not (runs.folder / "refused").exists()


def test_a_start_with_other_labels_is_refused(runs):
    files = small_layout.write(runs.folder / "third", num_train=24)
    codes = "/m/dog", "/m/cat", "/m/boat"
    small_layout.lines(files / "classes-trainable.csv", "label_code", *codes)
    data = runs.folder / "third_data"
    prepare(Layout.find(files), data, short_side=16)
    start = f"--config.start_from={runs.folder / 'clean'}"
    said = runs.train("refused", start, data=data, code=2)
    assert re.search(
        "clean was trained on labels with hash .*, not .*; use a run", said
    )


@pytest.mark.parametrize(
    ("field", "value"), [("image_size_pixels", 24), ("validation_fraction", 0.2)]
)
def test_runs_on_other_pixels_or_data_are_not_averaged(runs, field, value):
    other = runs.folder / f"other_{field}"
    runs.train(other.name, f"--config.data.{field}={value}")
    said = runs.evaluate("clean", f"--ensemble={other}", code=2)
    assert f"has data.{field}={value}, but this run" in said


def test_the_mean_of_a_run_and_itself_is_that_run(runs, tmp_path):
    copy = shutil.copytree(runs.folder / "clean", tmp_path / "copy")
    runs.evaluate("clean", f"--ensemble={copy}")
    metrics = runs.metrics("clean", "metrics_ensemble.json")
    assert metrics["splits"] == runs.metrics("clean")["splits"]
    assert metrics["provenance"]["clean"] is True
    assert len(metrics["members"]) == 2
    said, _ = runs.predict("clean", f"--ensemble={copy},{copy}", code=2)
    assert "run evaluate with the same --ensemble first" in said


def test_the_last_layer_alone_learns(runs):
    words = ("--train=last_layer", "--num_epochs=4", "--allow_tuning_labels")
    runs.adapt("clean", "last_layer", *words)
    (before, old), (after, new) = (
        runs.arrays(name) for name in ("clean", "last_layer")
    )
    assert before.provenance != after.provenance
    jax.tree.map(np.testing.assert_array_equal, new["batch_stats"], old["batch_stats"])
    jax.tree.map(
        np.testing.assert_array_equal, new["params"]["trunk"], old["params"]["trunk"]
    )
    classifiers = [one["params"]["classifier"]["kernel"] for one in (old, new)]
    assert np.abs(classifiers[0] - classifiers[1]).max() > 1e-5
