"""Tests near copies: found, counted, removed on request, and left out of figures."""

import json
import shutil
import threading

import cv2
import numpy as np
import polars as pl
import pytest
import simplejpeg
import small_layout
import threadpoolctl
from small_layers import few_blocks
from small_layout import lines

import jaxii
from jaxii.config import Config, default_config
from jaxii.data import folder
from jaxii.data.dataset import open_dataset
from jaxii.data.folder import RECURRING_FILE
from jaxii.data.prepared import open_prepared
from jaxii.prepare import build, near_copies, recurring, shards
from jaxii.prepare.kaggle import Layout, prepare
from jaxii.prepare.toy_regions import writer
from jaxii.runs.evaluate import evaluate
from jaxii.runs.inference import InferenceOptions
from jaxii.runs.workdir import Workdir


def scene(seed, height=120, width=160):
    """Returns an image of a few coloured shapes."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), rng.integers(60, 200, 3), np.uint8)
    for _ in range(8):
        centre = (int(rng.integers(width)), int(rng.integers(height)))
        axes = (int(rng.integers(8, 40)), int(rng.integers(8, 40)))
        colour = rng.integers(0, 256, 3).tolist()
        cv2.ellipse(image, centre, axes, float(rng.integers(180)), 0, 360, colour, -1)
    return image


def encoded(image, quality=92):
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=quality)


def altered(seed):
    """Returns copies of one scene: recompressed, cropped, smaller and larger."""
    image = scene(seed)
    height, width, _ = image.shape
    sizes = (width // 2, height // 2), (width * 2, height * 2)
    return [
        encoded(image, quality=30),
        encoded(image[16:110, 3:140], quality=60),
        *(encoded(cv2.resize(image, size), quality=50) for size in sizes),
    ]


def pairs(images, kinds=None, **how):
    small = [near_copies.read(data).decode(256, 256) for data in images]
    thumbnails = np.stack([near_copies.thumbnail(image) for image in small])
    found = near_copies.find(
        [lambda: thumbnails[:5], lambda: thumbnails[5:]],
        np.arange(len(images)) if kinds is None else np.array(kinds),
        lambda number: images[number],
        **how,
    )
    assert found.tolist() == sorted(found.tolist())
    return {tuple(pair) for pair in found.tolist()}


def opened(directory, *, validation_fraction=0.35, **choice):
    return open_prepared(
        directory,
        validation_fraction=validation_fraction,
        machine_labels="ignored",
        machine_threshold=0.5,
        **choice,
    )


@pytest.fixture
def root(tmp_path):
    """The small layout: train01 and 04 are near copies of test2, train03 of train05."""
    root = small_layout.write(tmp_path / "kaggle")
    train, test = root / "train/part_0", root / "stage_1_test_images"
    for number in range(6):
        small_layout.put(train, f"train{number:02d}", encoded(scene(number)))
    for number in range(3):
        small_layout.put(test, f"test{number}", encoded(scene(10 + number)))
    copies = altered(12)
    small_layout.put(train, "train01", copies[0])
    small_layout.put(train, "train04", copies[1])
    small_layout.put(train, "train03", altered(5)[2])
    return root


def test_recompressed_cropped_and_resized_images_are_found():
    images = [encoded(scene(i)) for i in range(12)]
    found = pairs([*images, *altered(3), *altered(7)])
    for original, copies in ((3, range(12, 16)), (7, range(16, 20))):
        assert {(original, copy) for copy in copies} <= found
    assert all(other >= 12 for _, other in found)


def test_other_colours_or_another_detail_make_another_image():
    image = scene(3)
    other_detail = image.copy()
    cv2.circle(other_detail, (80, 60), 12, (255, 255, 0), -1)
    assert not pairs([encoded(image), encoded(image[..., ::-1]), encoded(other_detail)])


def test_images_of_one_kind_and_flat_images_are_not_compared():
    image, flat = encoded(scene(3)), encoded(np.full((90, 90, 3), 200, np.uint8))
    assert not pairs([image, image, flat, flat], kinds=[0, 0, 1, 2])
    assert pairs([image, image], kinds=[0, 1]) == {(0, 1)}


def test_the_number_of_threads_changes_no_pair(monkeypatch):
    monkeypatch.setattr(near_copies, "PAIRS_AT_ONCE", 1)
    images = [*map(encoded, map(scene, range(4))), *altered(3), *altered(1)]
    assert len(pairs(images, num_workers=1)) >= 8
    assert pairs(images, num_workers=1) == pairs(images, num_workers=3)


def test_blocks_are_searched_at_the_same_time(monkeypatch):
    find, both = near_copies._InvertedFile.candidates, threading.Barrier(2, timeout=60)

    def candidates(*args):
        both.wait()
        return find(*args)

    monkeypatch.setattr(near_copies._InvertedFile, "candidates", candidates)
    assert not pairs([encoded(scene(i)) for i in range(6)], num_workers=2)


def test_numpy_starts_no_threads_of_its_own(monkeypatch):
    find, seen = near_copies._InvertedFile.candidates, []

    def candidates(*args):
        found = threadpoolctl.threadpool_info()
        seen.extend(x["num_threads"] for x in found if x["user_api"] == "blas")
        return find(*args)

    monkeypatch.setattr(near_copies._InvertedFile, "candidates", candidates)
    with threadpoolctl.threadpool_limits(2, "blas"):
        pairs([encoded(scene(i)) for i in range(6)])
    assert set(seen) == {1}


def test_a_search_uses_no_damaged_part_and_none_of_other_images(tmp_path, monkeypatch):
    images = [*map(encoded, map(scene, range(4))), *altered(3)]
    others = [*map(encoded, map(scene, range(4))), *altered(1)]
    whole = pairs(images, folder=tmp_path)
    assert pairs(others, folder=tmp_path) == pairs(others) != whole
    assert pairs(images, folder=tmp_path) == whole
    saved = sorted(tmp_path.glob(near_copies.SAVED_PARTS))
    assert len(saved) == 3
    for path in saved:
        path.write_bytes(path.read_bytes()[:-1])
    assert pairs(images, folder=tmp_path) == whole
    # The files are complete again, so nothing is searched.
    monkeypatch.setattr(near_copies._InvertedFile, "candidates", raise_interrupt)
    monkeypatch.setattr(near_copies, "_is_copy", raise_interrupt)
    assert pairs(images, folder=tmp_path) == whole


def test_near_copies_are_counted_and_listed(root, tmp_path):
    counts = prepare(Layout.find(root), tmp_path / "out")
    test, train = counts.split("test"), counts.split("train")
    assert test.notes["near copies of images of train"] == 1
    assert test.examples["near copies of images of train"] == ("test2 = train01",)
    assert train.notes["near copies of images of other groups or domains"] == 4
    assert train.kept == 6
    assert (tmp_path / "out" / RECURRING_FILE).exists()
    assert not list((tmp_path / "out").glob("*.thumbnails"))


def test_near_copies_can_be_removed_from_train(root, tmp_path):
    out = tmp_path / "out"
    train = prepare(Layout.find(root), out, near_copies="remove").split("train")
    assert (train.kept, train.dropped["near copy of an image of test"]) == (4, 2)
    assert train.notes["near copies in different groups, now in one"] == 1
    index = open_dataset(out).splits["train"].index
    assert index.image_ids.tolist() == ["train00", "train02", "train03", "train05"]
    assert index.groups.tolist() == ["train00", "train02", "train03", "train03"]


def raise_interrupt(*args, **more):
    raise KeyboardInterrupt


@pytest.mark.parametrize("num_rewritten", [1, 2])
def test_an_interrupted_removal_goes_on_to_the_same_dataset(
    root, tmp_path, monkeypatch, num_rewritten
):
    monkeypatch.setattr(shards, "SHARD_IMAGES", 2)
    (root / "train/part_0/train02.jpg").write_bytes(b"no image")
    shutil.copy(
        root / "stage_1_test_images/tune0.jpg", root / "train/part_0/train05.jpg"
    )
    out, write_shard, rewritten = tmp_path / "out", shards.write_shard, []

    def interrupted(path, part, **more):
        if more.get("left_out"):
            if len(rewritten) == num_rewritten:
                raise KeyboardInterrupt
            rewritten.append(path)
        return write_shard(path, part, **more)

    def again():
        return prepare(Layout.find(root), out, near_copies="remove", num_workers=1)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards, "write_shard", interrupted)
        patch.setattr(build, "complete", raise_interrupt)
        again()
    assert len(rewritten) == num_rewritten
    kept = {path: path.stat().st_mtime_ns for path in rewritten}
    counts = again()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    whole = prepare(Layout.find(root), tmp_path / "whole", near_copies="remove")
    assert counts == whole
    assert whole.split("train").dropped["near copy of an image of test"] == 2
    names = [
        sorted(p.name for p in each.iterdir()) for each in (out, tmp_path / "whole")
    ]
    assert names[0] == names[1]
    for name in names[0]:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("owner", "name"),
    [(near_copies._InvertedFile, "candidates"), (near_copies, "_is_copy")],
)
def test_an_interrupted_search_goes_on_where_it_stopped(
    root, tmp_path, monkeypatch, owner, name
):
    monkeypatch.setattr(shards, "SHARD_IMAGES", 2)
    monkeypatch.setattr(near_copies, "PAIRS_AT_ONCE", 1)
    part, calls, limit = getattr(owner, name), [], [100]

    def counted(*args, **more):
        calls.append(name)
        if len(calls) > limit[0]:
            raise KeyboardInterrupt
        return part(*args, **more)

    monkeypatch.setattr(owner, name, counted)
    whole, out = prepare(Layout.find(root), tmp_path / "whole"), tmp_path / "out"
    total, limit[0] = len(calls), 2
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        prepare(Layout.find(root), out, num_workers=1)
    limit[0] = total
    calls.clear()
    assert prepare(Layout.find(root), out, num_workers=1) == whole
    assert len(calls) == total - 2 > 0
    assert not list(out.glob(near_copies.SAVED_PARTS))
    for file in (RECURRING_FILE, folder.COUNTS_FILE):
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize(("choice", "count"), [("keep", 6), ("remove", 4)])
def test_copies_in_a_held_out_domain_are_listed(root, tmp_path, choice, count):
    # train03 is a near copy of train05, and train00 is the same file as train02.
    train = root / "train/part_0"
    shutil.copy(train / "train02.jpg", train / "train00.jpg")
    rows = (f"train{i:02d},{'eu' if i in (2, 3) else 'asia'}" for i in range(6))
    lines(root / "train_meta.csv", "image_id,domain", *rows)
    counts = prepare(Layout.find(root), tmp_path / "out", near_copies=choice)
    assert counts.split("train").notes[recurring.WITHIN] == count
    data = opened(tmp_path / "out", held_out_domain="asia")
    found = data.is_recurring("held_out", ["train", "validation"])
    image_ids = data.split("held_out").index.image_ids[found].tolist()
    assert image_ids == ["train00", "train05"]


def test_copies_of_one_domain_and_group_are_not_listed(root, tmp_path):
    prepare(Layout.find(root), tmp_path / "out", near_copies="remove")
    listed = opened(tmp_path / "out").recurring
    assert listed is not None and "train" not in listed["split"].to_list()


def test_near_copies_of_one_group_are_no_leak(root, tmp_path):
    rows = "train03,one", "train05,one", "train01,two", "train04,two"
    lines(root / "train_meta.csv", "image_id,group", *rows)
    train = prepare(Layout.find(root), tmp_path / "out").split("train")
    assert set(train.notes) == {"labels"}


def test_a_split_is_given_without_its_near_copies(root, tmp_path):
    prepare(Layout.find(root), tmp_path / "out")
    data = opened(tmp_path / "out", validation_fraction=0.5)
    alone = data.without_recurring("test", ["train"])
    assert alone is not None
    assert alone.index.image_ids.tolist() == ["test0", "test1"]
    assert data.without_recurring("test", ["tuning"]) is None


def test_a_split_of_near_copies_only_has_no_part_without_them(root, tmp_path):
    for number, twin in enumerate((0, 2, 5)):
        copy = encoded(scene(twin), quality=60)
        small_layout.put(root / "stage_1_test_images", f"test{number}", copy)
    prepare(Layout.find(root), tmp_path / "out")
    data = opened(tmp_path / "out")
    among = ["train", "validation"]
    assert data.is_recurring("test", among).tolist() == [True] * 3
    assert data.without_recurring("test", among) is None


def test_they_are_not_looked_for_on_request(root, tmp_path):
    out = tmp_path / "out"
    counts = prepare(Layout.find(root), out, near_copies="ignore")
    listed = {"listed in stage_1_sample_submission.csv", "labels"}
    notes = [set(tally.notes) for tally in counts.splits]
    assert notes == [{"labels"}, {"labels"}, listed]
    assert not (out / RECURRING_FILE).exists()


# Evaluation.


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run on toy_regions; 3 of its 12 test images are near copies of train's."""
    root = tmp_path_factory.mktemp("recurring")
    files = writer.write(root / "files", num_train=40, num_tuning=2, num_test=12)
    train = sorted((files / "train").rglob("*.jpg"))
    for path, original in zip(
        sorted((files / "stage_1_test_images").iterdir())[:3], train, strict=False
    ):
        pixels = simplejpeg.decode_jpeg(original.read_bytes())
        path.write_bytes(encoded(pixels[4:, 6:], quality=60))
    labels = files / "truth" / "solution.csv"
    layout = Layout.find(files, test_labels=labels)
    prepare(layout, root / "data", short_side=64)
    config = default_config()
    config.data.dataset, config.data.directory = "kaggle", str(root / "data")
    config.data.image_size_pixels, config.data.validation_fraction = 32, 0.2
    config.data.num_threads = 1
    config.model.depth, config.model.width, config.model.stem = 18, 8, "small"
    config.label_embedding.dim, config.global_batch_size = 8, 8
    config.stages = ({"name": "only", "terms": {"bce": 1.0}, "num_steps": 2},)
    with few_blocks(1, 1, 1, 1):
        jaxii.train(Config.resolve(config), workdir=root / "run")
    return root / "run"


@pytest.mark.usefixtures("without_drawings")
def test_evaluation_gives_every_figure_without_near_copies_too(measured):
    metrics = json.loads((measured / "metrics.json").read_text())
    whole, alone = (metrics["splits"][n] for n in ("test", "test_without_recurring"))
    copies = metrics["recurring"]["test"]
    assert copies == whole["num_images"] - alone["num_images"] > 0
    assert alone.keys() == whole.keys()
    # The decoders and the best constant are those of the split with near copies.
    assert alone["threshold"] == whole["threshold"]
    assert "test_without_recurring" in metrics["constant"]["f2"]


@pytest.mark.usefixtures("without_drawings")
def test_the_report_names_the_number_of_near_copies(measured):
    page = (measured / "report.html").read_text()
    assert "images of test are near copies of training images" in page
    assert "test_without_recurring" in (measured / "label_figures.csv").read_text()


@pytest.mark.usefixtures("without_drawings")
def test_images_that_models_adapt_to_are_not_images_that_trained_them(
    measured, tmp_path, monkeypatch
):
    workdir = Workdir(shutil.copytree(measured, tmp_path / "run"))
    splits = opened(measured.parent / "data", validation_fraction=0.2).splits
    names = "validation", "test"
    pair = [(name, splits[name].index.image_ids[0]) for name in names]
    pairs = [(*pair[0], *pair[1]), (*pair[1], *pair[0])]
    listed = pl.DataFrame(pairs, schema=list(recurring.COLUMNS), orient="row")
    monkeypatch.setattr(folder, "recurring", lambda directory: listed)
    options = InferenceOptions(adapt_bn=True)
    with few_blocks(1, 1, 1, 1):
        evaluate(workdir, data_dir="", stage="", tune_on="", options=options)
    metrics = json.loads((workdir.path / "metrics_adabn.json").read_text())
    assert metrics["provenance"]["weights"]["images"] == ["test"]
    assert metrics["recurring"] == {"validation": 0, "test": 0}
    assert set(metrics["splits"]) == {"validation", "test"}


@pytest.mark.usefixtures("without_drawings")
def test_a_test_of_near_copies_only_is_reported(measured, tmp_path, monkeypatch, capfd):
    workdir = Workdir(shutil.copytree(measured, tmp_path / "run"))
    splits = open_dataset(measured.parent / "data").splits
    tests, trains = (splits[name].index.image_ids for name in ("test", "train"))
    pairs = [("test", one, "train", other) for one in tests for other in trains]
    listed = pl.DataFrame(pairs, schema=list(recurring.COLUMNS), orient="row")
    monkeypatch.setattr(folder, "recurring", lambda directory: listed)
    with few_blocks(1, 1, 1, 1):
        evaluate(workdir, data_dir="", stage="", tune_on="")
    metrics = json.loads((workdir.path / "metrics.json").read_text())
    assert metrics["recurring"]["test"] == metrics["splits"]["test"]["num_images"]
    assert "test_without_recurring" not in metrics["splits"]
    note = "near copies of training images; without them, no scored image of test"
    assert note in capfd.readouterr().out
    assert note in (workdir.path / "report.html").read_text()
