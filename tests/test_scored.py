"""Tests that figures count all labels of images with known truth, and no other images.

They use whole runs on images whose shade encodes the truth, which an oracle predicts.
"""

import dataclasses
import json

import jax
import numpy as np
import oracle
import pytest
import small_layout
from jax.experimental import multihost_utils

from jaxii.errors import InputError
from jaxii.prepare.kaggle import Layout, prepare
from jaxii.runs.begin import begin, describe
from jaxii.runs.train import train
from jaxii.runs.workdir import Workdir
from jaxii.train.trainer import Preempted

pytestmark = pytest.mark.usefixtures("without_drawings")

CODES = tuple(f"/m/{i}" for i in range(12))
# Labels of each kind of image; the last number of labels exceeds a multiple of eight.
TRUTHS = ((0,), (3, 4), tuple(range(1, 11)))
HEADER = "ImageID,Source,LabelName,Confidence"


def write(root, *, num_train=36, unknown_validation=0, unknown_test=0):
    """Writes a layout with a listed validation split, and prepares it.

    Args:
      root: The folder.
      num_train: Images with human labels; every third is validation.
      unknown_validation: Additional validation images with only machine labels.
      unknown_test: Additional test images, with no row or an empty row in the truth.
    """
    files = root / "files"
    for folder in ("train", "stage_1_test_images"):
        (files / folder).mkdir(parents=True)

    def save(folder, image_id, kind):
        small_layout.put(files / folder, image_id, oracle.image(kind, len(TRUTHS)))

    human, machine, validation, truth, meta = [], [], [], [], []
    for i in range(num_train + unknown_validation):
        # Unknown images are between the others in the order of ids.
        name = f"{i:03d}" if i < num_train else f"{i - num_train:03d}x"
        kind = i // 3 % 3
        save("train", name, kind)
        if i >= num_train:
            machine.append(f"{name},machine,{CODES[11]},0.9")
            validation.append(name)
            continue
        human += [f"{name},verification,{CODES[label]},1" for label in TRUTHS[kind]]
        human.append(f"{name},verification,{CODES[11]},0")
        if i % 3 == 0:
            validation.append(name)
    for i in range(9 + unknown_test):
        name = f"t{i:02d}" if i < 9 else f"t{i - 9:02d}x"
        save("stage_1_test_images", name, i % 3)
        labels = " ".join(CODES[label] for label in TRUTHS[i % 3])
        if i < 9:
            truth.append(f"{name},{labels}")
        elif i % 2:
            truth.append(f"{name},")
        meta.append(f"{name},g{i // 2},{'ab'[i % 2]}")
    lines = small_layout.lines
    lines(files / "train_human_labels.csv", HEADER, *human)
    if machine:
        lines(files / "train_machine_labels.csv", HEADER, *machine)
    lines(files / "classes-trainable.csv", "label_code", *CODES)
    lines(files / "validation_ids.csv", "image_id", *validation)
    lines(files / "test_labels.csv", "image_id,labels", *truth)
    lines(files / "test_meta.csv", "image_id,group,slice", *meta)
    rows = [row.split(",")[0] + "," for row in meta]
    lines(files / "stage_1_sample_submission.csv", "image_id,labels", *rows)
    counts = prepare(Layout.find(files), root / "data", num_workers=1)
    return counts, root / "data"


@pytest.fixture(scope="module", autouse=True)
def knows_the_truth():
    with oracle.every_network_is(oracle.network(TRUTHS)):
        yield


class Result:
    """A run and its output."""

    def __init__(self, root, printed, data, **changes):
        config = oracle.make_config(data, **changes)
        config = dataclasses.replace(config, evaluate_train_images=12)
        self.workdir = Workdir(root / "run")
        train(config, self.workdir, lambda step: False)
        self.said = printed.readouterr().out
        self.metrics = json.loads((self.workdir.path / "metrics.json").read_text())
        self.splits = self.metrics["splits"]

    def followed(self, name):
        """Returns a figure of each evaluation during training."""
        rows = self.workdir.history_file.read_text().splitlines()
        return [row[name] for row in map(json.loads, rows) if name in row]

    def submitted(self):
        rows = (self.workdir.path / "submission.csv").read_text().splitlines()[1:]
        return [row.split(",")[0] for row in rows]


def is_right_everywhere(run):
    for figures in run.splits.values():
        assert figures["f2"] == pytest.approx(1)
        assert figures["map"] == pytest.approx(1)
        assert figures["recall_at_5"] == pytest.approx((1 + 1 + 0.5) / 3)
    for split in ("validation", "train"):
        assert run.followed(f"{split}/f2") == pytest.approx([1.0])


def test_the_limit_of_labels_cuts_what_trains_and_not_the_truth(tmp_path, capfd):
    _, data = write(tmp_path)
    run = Result(tmp_path, capfd, data, most_labels=4)
    is_right_everywhere(run)
    assert run.splits["test"]["labels_per_image_true"] == pytest.approx(13 / 3)
    said = "8 training images of train have more than 4 labels; training ignores"
    assert said in run.said


def assert_same(tree, other):
    """Compares, except for the order in which the host adds numbers."""
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert a == (b if isinstance(b, str) else pytest.approx(b, rel=1e-12))


@pytest.fixture(scope="module")
def with_unknown(tmp_path_factory):
    root = tmp_path_factory.mktemp("unknown")
    return write(root, unknown_validation=5, unknown_test=6)


def test_images_without_truth_are_in_no_figure_and_counted(
    with_unknown, tmp_path, capfd
):
    run = Result(tmp_path, capfd, with_unknown[1])
    is_right_everywhere(run)
    for split, known, unknown in (("validation", 12, 5), ("test", 9, 6)):
        assert run.splits[split]["num_images"] == known
        assert run.splits[split]["num_images_without_truth"] == unknown
        said = f"{unknown} of {known + unknown} images of {split} have no verified"
        assert said in run.said
        assert f"{unknown} of {known + unknown} images have no verified" in run.said
    assert "Images without verified labels, excluded" in (
        run.workdir.path / "report.html"
    ).read_text("utf-8")
    assert len(run.submitted()) == 15


def test_figures_and_decoders_are_those_of_the_data_without_such_images(
    with_unknown, tmp_path, capfd
):
    # It makes errors, different in each slice, so that no figure is trivial.
    network = oracle.network(((0, 5), (3,), (1, 2, 3)))
    _, data = write(tmp_path)
    with oracle.every_network_is(network):
        run = Result(tmp_path / "a", capfd, data)
        other = Result(tmp_path / "b", capfd, with_unknown[1])
    assert run.splits["test"]["f2"] < 0.9
    for figures in (*run.splits.values(), *other.splits.values()):
        figures.pop("num_images_without_truth")
    for part in ("splits", "constant", "decoder"):
        assert_same(run.metrics[part], other.metrics[part])
    for name in ("validation/f2", "validation/map", "validation/bce", "train/f2"):
        assert run.followed(name) == other.followed(name)
    tables = [(r.workdir.path / "label_figures.csv").read_text() for r in (run, other)]
    assert tables[0] == tables[1]
    mine, theirs = (np.load(r.workdir.path / "decoders.npz") for r in (run, other))
    with mine, theirs:
        for name in mine.files:
            np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


def test_preparation_counts_test_images_without_a_label(with_unknown):
    line = with_unknown[0].split("test").line()
    assert "without a label (not scored) 6" in line


def test_a_validation_split_that_nobody_verified_is_refused_before_training(tmp_path):
    files = small_layout.write(tmp_path / "files")
    (files / "train" / "extra.jpg").write_bytes(small_layout.jpeg(9))
    with (files / "train_machine_labels.csv").open("a") as file:
        file.write("extra,machine,/m/cat,0.9\n")
    small_layout.lines(files / "validation_ids.csv", "image_id", "extra")
    prepare(Layout.find(files), tmp_path / "data", num_workers=1)
    workdir = Workdir(tmp_path / "run")
    config = oracle.make_config(tmp_path / "data")
    with pytest.raises(InputError, match=r"none of the 1 images in split 'validation'"):
        train(config, workdir, lambda step: False)
    assert not workdir.path.exists()


@pytest.fixture
def with_unlabelled(tmp_path):
    """Yields a dataset with three training images that have only machine labels."""
    files = small_layout.write(tmp_path / "files", num_train=24)
    rows = [f"extra{i},machine,/m/cat,0.9" for i in range(3)]
    small_layout.lines(files / "train_machine_labels.csv", HEADER, *rows)
    for i in range(3):
        small_layout.put(files / "train", f"extra{i}", small_layout.jpeg(9 + i))
    prepare(Layout.find(files), tmp_path / "data", num_workers=1)
    with oracle.every_network_is(oracle.network(((0,), (1,), (2,)))):
        yield tmp_path / "data"


def test_training_images_without_a_used_label_are_counted(with_unlabelled, tmp_path):
    said = "3 training images have no label that training uses"
    for labels, is_said in (("ignored", True), ("soft", False)):
        config = oracle.make_config(with_unlabelled, machine_labels=labels)
        run = begin(config, Workdir(tmp_path / labels))
        assert (said in "\n".join(describe(run))) == is_said


def test_a_run_that_began_with_images_without_a_label_is_not_resumed(
    with_unlabelled, tmp_path, monkeypatch
):
    config = oracle.make_config(with_unlabelled)
    before, after = Workdir(tmp_path / "before"), Workdir(tmp_path / "after")
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        # As in earlier versions, which left out no image.
        patch.setattr("jaxii.data.prepared._with_labels", lambda whole, **_: whole)
        train(config, before, lambda step: step == 1)
    with pytest.raises(InputError, match=r"before was trained on \d+ images by an"):
        train(config, before, lambda step: False)
    with pytest.raises(Preempted):
        train(config, after, lambda step: step == 1)
    train(config, after, lambda step: False)


def test_validation_needs_truth_even_where_a_held_out_domain_chooses(tmp_path):
    files = small_layout.write(tmp_path / "files", num_train=9)
    small_layout.put(files / "train", "extra", small_layout.jpeg(9))
    with (files / "train_machine_labels.csv").open("a") as file:
        file.write("extra,machine,/m/cat,0.9\n")
    small_layout.lines(files / "validation_ids.csv", "image_id", "extra")
    rows = [f"train{i:02d},{('eu', 'asia')[i % 2]}" for i in range(9)]
    meta = files / "train_meta.csv"
    small_layout.lines(meta, "image_id,domain", *rows, "extra,eu")
    prepare(Layout.find(files), tmp_path / "data", num_workers=1)
    config = oracle.make_config(tmp_path / "data", held_out_domain="asia")
    with pytest.raises(InputError, match="none of the 1 images in split 'validation'"):
        begin(config, Workdir(tmp_path / "run"))


def test_processes_with_other_data_or_recipes_are_refused(tmp_path, monkeypatch):
    files = small_layout.write(tmp_path / "files", num_train=9)
    prepare(Layout.find(files), tmp_path / "data", num_workers=1)
    config = oracle.make_config(tmp_path / "data")
    sent = []

    def gather(own):
        sent.append(own)
        return np.stack([own, own ^ 1])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    workdir = Workdir(tmp_path / "run")
    for changes in ({}, {"mirror": not config.data.mirror}):
        changed = oracle.make_config(tmp_path / "data", **changes)
        with pytest.raises(
            InputError, match="recipe or dataset is different on process 1"
        ):
            begin(changed, workdir)
    assert not workdir.path.exists()
    # The compared values depend on the recipe.
    assert not np.array_equal(*sent)
