"""Tests the parts that every recipe builds from its configuration, unallocated."""

import dataclasses
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
from small_runs import changed

from jaxii.config import Config
from jaxii.data.prepared import Rows
from jaxii.errors import InputError
from jaxii.prepare.kaggle import Layout, prepare
from jaxii.prepare.toy_regions import writer
from jaxii.runs import assembly
from jaxii.runs.images import open_images
from jaxii.train.state import new_state

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = [
    (path, preset)
    for path in sorted(CONFIGS.glob("*.py"))
    for preset in runpy.run_path(str(path)).get("PRESETS", ("",))
]
NUM_CLASSES = 40


def load(path=CONFIGS / "f2_multitask.py", preset="", **changes):
    recipe = runpy.run_path(str(path))["get_config"](*[preset] * bool(preset))
    return changed(Config.resolve(recipe), **changes)


def plans_of(config, num_train=10_000):
    stages = assembly.stages_of(config, lambda split: num_train)
    dim = min(config.label_embedding.dim, NUM_CLASSES)
    return assembly.make_plans(
        config, stages, num_classes=NUM_CLASSES, embedding_dim=dim
    )


@pytest.mark.parametrize(
    ("path", "preset"), RECIPES, ids=[f"{p.stem}-{name}" for p, name in RECIPES]
)
def test_every_stage_of_a_recipe_builds(path, preset):
    config = load(path, preset)
    for plan in plans_of(config):
        params, batch_stats = jax.eval_shape(plan.init, jax.random.key(0))
        assert ("embedding" in params) == plan.stage.embedding_head
        size = config.data.image_size_pixels
        images = jax.ShapeDtypeStruct((2, size, size, 3), np.uint8)
        outputs, _ = jax.eval_shape(
            lambda p, b, x, apply=plan.settings.apply: apply(
                p, b, x, train=False, key=None
            ),
            params,
            batch_stats,
            images,
        )
        assert outputs.logits.shape == (2, NUM_CLASSES)
        assert outputs.logits.dtype == np.float32
        state = jax.eval_shape(
            lambda p, b, plan=plan: new_state(
                params=p,
                batch_stats=b,
                optimizer=plan.settings.optimizer,
                step=0,
                with_average=plan.settings.average_rate is not None,
            ),
            params,
            batch_stats,
        )
        assert state.step.shape == ()


def test_epochs_become_steps_of_the_global_batch():
    config = load(global_batch_size=50)
    for stage, given in zip(
        assembly.stages_of(config, lambda split: 1000), config.stages, strict=True
    ):
        assert stage.num_steps == round(given.num_epochs * 20)
        assert stage.in_epochs


def test_a_length_in_steps_is_that_of_the_stage():
    stage = {"name": "a", "terms": {"bce": 1.0}, "num_steps": 7}
    (made,) = assembly.stages_of(load(stages=[stage]), lambda split: 1000)
    assert (made.num_steps, made.in_epochs) == (7, False)


def test_epochs_are_those_of_the_stage_s_own_split():
    stage = {"name": "a", "terms": {"bce": 1.0}, "num_epochs": 3.0, "split": "tuning"}
    config = load(stages=[stage], global_batch_size=10)
    sizes = {"train": 400, "tuning": 5}
    (made,) = assembly.stages_of(config, sizes.__getitem__)
    assert made.num_steps == 2


def test_stages_with_the_same_heads_share_one_network():
    plans = plans_of(load())
    by_head = {}
    for plan in plans:
        by_head.setdefault(plan.stage.embedding_head, set()).add(plan.settings.apply)
    assert set(by_head) == {True, False}
    assert all(len(applies) == 1 for applies in by_head.values())


def test_a_batch_that_does_not_divide_is_refused_with_those_that_do():
    config = load(global_batch_size=60)
    with pytest.raises(
        InputError, match=r"global_batch_size=60 .* 8 devices; use 56 or 64"
    ):
        assembly.check_before_data(config)


@pytest.mark.parametrize(
    ("group", "nearest"),
    [("3", "group:2 or group:4"), ("5", "group:4 or group:8"), ("16", "group:8")],
)
def test_a_group_that_does_not_divide_is_refused_with_those_that_do(group, nearest):
    config = load(model__batch_norm=f"group:{group}")
    with pytest.raises(InputError, match=rf"group:{group} .* 8 devices; use {nearest}"):
        assembly.check_before_data(config)


def test_statistics_of_one_value_are_refused():
    """With 8 devices, and images of 32 pixels whose last maps have one."""
    small = {"data__image_size_pixels": 32, "model__stem": "imagenet"}
    one = {**small, "global_batch_size": 64, "micro_batches": 8}
    with pytest.raises(InputError, match=r"one value per channel.*batch_norm=global"):
        assembly.check_before_data(load(**one))
    for change in (
        {"micro_batches": 4},
        {"global_batch_size": 128},
        {"data__image_size_pixels": 33},
        {"model__stem": "small"},
        {"model__batch_norm": "group:2"},
        {"model__batch_norm": "global"},
    ):
        assembly.check_before_data(load(**{**one, **change}))


def test_a_frozen_trunk_needs_no_statistics_of_a_batch():
    stage = {"name": "only", "terms": {"bce": 1.0}, "num_steps": 1}
    stage |= {"embedding_head": False, "trainable": "last_layer"}
    small = {"data__image_size_pixels": 32, "model__stem": "imagenet"}
    small |= {"global_batch_size": 8}
    assembly.check_before_data(load(**small, stages=(stage,)))
    with pytest.raises(InputError, match="one value per channel"):
        assembly.check_before_data(
            load(**small, stages=(stage | {"trainable": "all"},))
        )


@pytest.mark.parametrize(
    ("base", "scale"), [(0, 1.0), (64, 1.0), (16, 4.0), (128, 0.5)]
)
def test_a_rate_meant_for_a_batch_is_in_proportion_to_the_batch(base, scale):
    config = load(optimizer__base_batch_size=base)
    for plan in plans_of(config):
        top = int(plan.stage.warmup_share * plan.stage.num_steps)
        given = plan.stage.peak_lr_scale * config.optimizer.peak_lr
        assert float(plan.settings.learning_rate(top)) == pytest.approx(scale * given)


def test_a_variant_without_its_bottleneck_is_refused_before_any_data():
    config = load(model__variant="resnext")
    with pytest.raises(
        InputError, match=r"depth=18 .* use one of the depths 26, 50, 101, 152"
    ):
        assembly.check_before_data(config)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"num_epoch": 1.0},
            "'num_epoch'; the nearest is num_epochs; the fields are name",
        ),
        (
            {"terms": {"bcee": 1.0}},
            "'bcee' does not exist; the nearest is bce; use one of",
        ),
        (
            {"terms": {"focal": {"gama": 2.0}}},
            "no parameter 'gama'; the nearest is gamma; it takes weight",
        ),
        ({"num_epochs": 0.0}, "exactly one of them to a value above 0"),
        ({"enters_from": "first"}, "use one of best, last"),
        ({"name": "classifier"}, "two stages are named 'classifier'"),
        ({"embedding_head": False}, "embedding term but no embedding head"),
    ],
)
def test_a_stage_that_cannot_be_is_refused_by_name(change, words):
    first, *others = load().to_dict()["stages"]
    with pytest.raises(InputError, match=words):
        plans_of(load(stages=[first | change, *others]))


def test_a_dataset_that_is_not_drawn_needs_a_folder():
    config = load(preset="inclusive_images")
    with pytest.raises(InputError, match=r"prepare --help.*--data_dir"):
        assembly.data_directory(config)
    config = config.moved("somewhere")
    assert assembly.data_directory(config) == Path("somewhere")


def test_the_embedded_dataset_has_a_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXII_DATA_DIR", str(tmp_path))
    folder = assembly.data_directory(load())
    assert folder.parent == tmp_path
    assert folder.name.startswith("toy_regions")


@pytest.mark.parametrize(
    ("most", "expected"), [(0, 16), (16, 16), (17, 32), (500, 126)]
)
def test_slots_fit_the_fullest_image_in_sixteens_up_to_the_limit(most, expected):
    rows = Rows(
        offsets=np.array([0, most]),
        label_ids=np.arange(most, dtype=np.int32),
        confidences=np.ones(most, np.float32),
    )
    assert assembly.slots(load(), rows) == expected


@pytest.mark.parametrize(("most", "expected"), [(0, 16), (17, 32), (500, 512)])
def test_evaluation_has_a_slot_for_every_label_whatever_the_limit(most, expected):
    rows = Rows(
        offsets=np.array([0, most]),
        label_ids=np.arange(most, dtype=np.int32),
        confidences=np.ones(most, np.float32),
    )
    assert assembly.eval_slots(rows) == expected


def test_the_batch_of_evaluation_fits_the_devices():
    assert assembly.eval_batch_size(load(global_batch_size=13)) == 16
    assert assembly.eval_batch_size(load(global_batch_size=16)) == 16


@pytest.mark.parametrize(
    ("devices", "platform", "trained", "num_images", "expected"),
    [
        (1, "cpu", 8192, 0, 1),
        (1, "cpu", 8192, 1, 1),
        (1, "cpu", 8192, 5, 8),
        (1, "cpu", 8192, 10**6, 64),
        (1, "gpu", 8192, 10**6, 256),
        (1, "rocm", 8192, 10**6, 256),
        (1, "cpu", 13, 10**6, 13),
        (6, "cpu", 8192, 7, 12),
        (64, "tpu", 8192, 10**6, 8192),
        (64, "tpu", 8192, 65, 128),
    ],
)
def test_a_batch_of_files_fits_their_number_and_the_devices(
    monkeypatch, devices, platform, trained, num_images, expected
):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    config = load(global_batch_size=trained)
    assert assembly.file_batch_size(config, num_images) == expected


def test_any_numbers_of_files_have_few_batch_sizes():
    config = load(global_batch_size=8192)
    sizes = {assembly.file_batch_size(config, n) for n in range(3000)}
    assert sizes == {8 * 2**power for power in range(7)}


def test_few_images_are_a_small_batch_but_adapt_batch_norm_in_one_of_training():
    config = load(global_batch_size=64)
    pixels = np.zeros((3, 40, 40, 3), np.uint8)
    files = open_images(pixels, short_side=40)
    (batch,) = assembly.file_batches(config, files)
    assert batch["index"].tolist() == [0, 1, 2, -1, -1, -1, -1, -1]
    (batch,) = assembly.unlabelled_batches(config, files)
    assert len(batch["images"]) == 64
    assert batch["mask"].sum() == 3


def test_the_prior_bias_gives_each_label_its_frequency():
    counts = np.array([0.0, 50.0, 99.0])
    bias = assembly.prior_bias(counts, 99)
    assert bias.dtype == np.float32
    probs = 1 / (1 + np.exp(-bias.astype(np.float64)))
    np.testing.assert_allclose(probs, (counts + 0.5) / 100, rtol=1e-5)


@pytest.fixture(scope="module")
def few_images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few")
    files = writer.write(folder / "drawn", num_train=20, num_tuning=1)
    prepare(Layout.find(files), folder / "data")
    config = load(
        data__directory=str(folder / "data"),
        data__dataset="kaggle",
        data__validation_fraction=0.3,
        global_batch_size=8,
    )
    return config, assembly.open_data(config)


def test_one_batch_again_and_again_is_the_first_from_wherever_the_run_goes_on(
    few_images,
):
    config, data = few_images
    first = next(assembly.train_batches(config, data, "train", 0))
    config = changed(config, data__reuse_batch=True)
    for start in (0, 24):
        batches = assembly.train_batches(config, data, "train", start)
        for _ in range(3):
            jax.tree.map(np.testing.assert_array_equal, next(batches), first)


def test_some_images_of_a_split_lie_evenly_in_its_order(few_images):
    config, data = few_images
    config = changed(config, global_batch_size=64)
    (every,) = assembly.eval_batches(config, data, "train")
    (some,) = assembly.eval_batches(config, data, "train", num_images=3)
    count = data.split("train").num_examples
    rows = [0, count // 3, 2 * count // 3]
    np.testing.assert_array_equal(some["mask"].nonzero()[0], [0, 1, 2])
    np.testing.assert_array_equal(some["images"][:3], every["images"][rows])
    (whole,) = assembly.eval_batches(config, data, "train", num_images=1000)
    assert whole["mask"].sum() == count


def test_some_images_of_a_split_are_taken_from_the_scored_ones(few_images):
    config, data = few_images
    config = changed(config, global_batch_size=64)
    (every,) = assembly.eval_batches(config, data, "train")
    # The truth of the first half of the images is unknown.
    rows = data.verified_rows("train")
    half = data.split("train").num_examples // 2
    offsets = np.maximum(rows.offsets, rows.offsets[half])
    known = dataclasses.replace(rows, offsets=offsets)
    data = dataclasses.replace(data)
    data._verified["train"] = known
    (masked,) = assembly.eval_batches(config, data, "train")
    count = data.split("train").num_examples
    np.testing.assert_array_equal(masked["mask"][:count], np.arange(count) >= half)
    np.testing.assert_array_equal(masked["index"], every["index"])
    (some,) = assembly.eval_batches(config, data, "train", num_images=2)
    rows = [half, half + (count - half) // 2]
    np.testing.assert_array_equal(some["images"][:2], every["images"][rows])
    assert some["mask"].sum() == 2
    (all_known,) = assembly.eval_batches(config, data, "train", num_images=1000)
    assert all_known["mask"].sum() == count - half


@pytest.mark.parametrize(
    ("platform", "cores", "training", "others"),
    [("cpu", 2, 1, 4), ("cpu", 64, 32, 16), ("gpu", 2, 4, 4), ("tpu", 96, 16, 16)],
)
def test_threads_leave_the_cores_to_a_step_on_cpus(
    monkeypatch, platform, cores, training, others
):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr("jaxii.runs.assembly.num_cores", lambda: cores)
    assert assembly.share(load(), 64, is_training=True).num_threads == training
    assert assembly.share(load(), 64).num_threads == others
    chosen = changed(load(), data__num_threads=7)
    assert assembly.share(chosen, 64, is_training=True).num_threads == 7
    assert assembly.share(chosen, 64).num_threads == 7
