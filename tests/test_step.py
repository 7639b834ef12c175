"""Tests the train step: global gradients, micro-batches, guard, average, keys."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_layers
from jax.sharding import PartitionSpec

from jaxii.distributed.mesh import (
    DATA_AXIS,
    divided,
    make_mesh,
    replicated,
    to_devices,
)
from jaxii.models.multitask import make_network
from jaxii.objective.losses import bce
from jaxii.objective.objective import make_objective
from jaxii.train.averaging import ema_rate
from jaxii.train.optimizer import OPTIMIZERS, make_optimizer
from jaxii.train.sharding import state_shardings
from jaxii.train.state import derive_key, new_state
from jaxii.train.step import StepSettings, examples, gradients_of, make_train_step

NUM_CLASSES, BATCH, SIZE, DIM = 5, 16, 16, 4
TERMS = {"bce": 1.0, "soft_f": 2.0, "embedding": 0.5}


@pytest.fixture(scope="module", autouse=True)
def few_blocks():
    with small_layers.few_blocks(1, 1, 0, 0):
        yield


class Outputs(NamedTuple):
    logits: jax.Array
    embedding: jax.Array | None


def linear_apply(params, batch_stats, images, *, train, key):
    """A network without BatchNorm and dropout, so that its arithmetic is exact."""
    pixels = images.reshape(images.shape[0], -1).astype(jnp.float32) / 255.0
    features = jnp.tanh(pixels[:, :32])
    return Outputs(features @ params["classifier"], features @ params["embedding"]), (
        batch_stats
    )


def linear_params():
    rng = np.random.default_rng(0)
    return {
        "classifier": jnp.asarray(rng.normal(size=(32, NUM_CLASSES)), jnp.float32),
        "embedding": jnp.asarray(rng.normal(size=(32, DIM)), jnp.float32),
    }


def make_batch(seed=0, masked=5):
    """Labels vary in number, some images have none; the last images are padding."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, NUM_CLASSES, (BATCH, 3)).astype(np.int32)
    ids[::3, 1:] = -1
    ids[::4] = -1
    mask = np.ones(BATCH, np.float32)
    mask[BATCH - masked :] = 0.0
    return {
        "images": rng.integers(0, 256, (BATCH, SIZE, SIZE, 3)).astype(np.uint8),
        "label_ids": ids,
        "label_confidences": np.where(ids < 0, 0.0, 1.0).astype(np.float32),
        "mask": mask,
    }


LABEL_EMBEDDINGS = np.random.default_rng(7).normal(size=(NUM_CLASSES, DIM))


def make_settings(apply=linear_apply, **more):
    schedule = optax.constant_schedule(0.1)
    settings = {
        "apply": apply,
        "objective": make_objective(TERMS, num_steps=10, num_classes=NUM_CLASSES),
        "optimizer": optax.sgd(schedule),
        "learning_rate": lambda step: jnp.float32(0.1),
    }
    return StepSettings(**{**settings, **more})


def start(params, batch_stats, settings, mesh):
    state = new_state(
        params=params,
        batch_stats=batch_stats,
        optimizer=settings.optimizer,
        step=0,
        with_average=settings.average_rate is not None,
    )
    # A copy, because the step donates its buffers.
    return jax.device_put(jax.tree.map(jnp.array, state), replicated(mesh))


def global_gradients(settings, params, batch_stats, num_devices, batch):
    mesh = make_mesh(jax.devices()[:num_devices])
    state = start(params, batch_stats, settings, mesh)
    everywhere, share = PartitionSpec(), PartitionSpec(DATA_AXIS)
    compute = jax.jit(
        jax.shard_map(
            partial(gradients_of, settings),
            mesh=mesh,
            in_specs=(everywhere, share, everywhere),
            out_specs=everywhere,
        )
    )
    vectors = jnp.asarray(LABEL_EMBEDDINGS, jnp.float32)
    return jax.device_get(compute(state, to_devices(batch, divided(mesh)), vectors))


def assert_close(tree, other, tolerance):
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        scale = max(np.abs(b).max(), 1e-6)
        np.testing.assert_allclose(a / scale, b / scale, atol=tolerance)


def test_gradients_of_eight_devices_are_those_of_one_with_an_uneven_mask():
    network = make_network(
        depth=18,
        num_classes=NUM_CLASSES,
        embedding_dim=DIM,
        width=8,
        stem="small",
        dropout=0.0,
        dtype=jnp.float32,
        bn_axis=DATA_AXIS,
        zero_init_residual=False,
    )
    params, batch_stats = network.init(jax.random.key(0))
    settings = make_settings(network.apply)
    one = global_gradients(settings, params, batch_stats, 1, make_batch())
    eight = global_gradients(settings, params, batch_stats, 8, make_batch())
    norm = optax.tree.norm(jax.tree.map(jnp.subtract, eight[0], one[0]))
    assert float(norm / optax.tree.norm(one[0])) < 1e-5
    np.testing.assert_allclose(eight[2]["objective"], one[2]["objective"], rtol=1e-5)
    assert_close(eight[1], one[1], 1e-5)


def test_gradients_are_those_of_the_objective_written_out_for_one_device():
    settings, params, batch = make_settings(), linear_params(), make_batch()
    mask, vectors = batch["mask"], jnp.asarray(LABEL_EMBEDDINGS, jnp.float32)

    def objective(params):
        outputs, _ = linear_apply(
            params, {}, jnp.asarray(batch["images"]), train=True, key=None
        )
        targets, known = settings.objective.targets(
            jnp.asarray(batch["label_ids"]), jnp.asarray(batch["label_confidences"])
        )
        losses = settings.objective.losses(
            logits=outputs.logits,
            embedding=outputs.embedding,
            targets=targets,
            known=known,
            label_embeddings=vectors,
            stage_step=jnp.int32(0),
        )
        positive = mask * (targets.sum(-1) > 0).astype(jnp.float32)
        total = TERMS["bce"] * (losses["bce"] * mask).sum() / mask.sum()
        for name in ("soft_f", "embedding"):
            total += TERMS[name] * (losses[name] * positive).sum() / positive.sum()
        return total

    expected = jax.grad(objective)(params)
    gradients, _, _ = global_gradients(settings, params, {}, 8, batch)
    assert_close(gradients, expected, 1e-5)


def test_masked_examples_do_not_change_the_gradient():
    settings, params = make_settings(), linear_params()
    batch = make_batch()
    other = {**batch, "images": batch["images"].copy()}
    other["images"][batch["mask"] == 0] = 255
    one, _, _ = global_gradients(settings, params, {}, 4, batch)
    two, _, _ = global_gradients(settings, params, {}, 4, other)
    assert_close(one, two, 0.0)


@pytest.mark.parametrize("unrolled", [False, True])
def test_gradients_of_four_micro_batches_are_those_of_one_batch(unrolled):
    params, batch = linear_params(), make_batch()
    whole = global_gradients(make_settings(), params, {}, 2, batch)
    settings = make_settings(micro_batches=4, unrolled=unrolled)
    pieces = global_gradients(settings, params, {}, 2, batch)
    assert_close(pieces[0], whole[0], 1e-5)
    np.testing.assert_allclose(pieces[2]["objective"], whole[2]["objective"], rtol=1e-5)


def sparse_batch():
    """Returns a batch in which every other image has no label."""
    batch = make_batch(masked=0)
    batch["label_ids"][::2] = -1
    batch["label_confidences"][::2] = 0.0
    return batch | {"positions": np.arange(BATCH, dtype=np.int32)}


def ignoring_unknown(**more):
    objective = make_objective(
        TERMS, num_steps=10, num_classes=NUM_CLASSES, unknown="ignored"
    )
    return make_settings(objective=objective, **more)


def test_images_without_a_known_class_count_as_padding_does():
    settings, batch = ignoring_unknown(), sparse_batch()
    masked = batch | {"mask": np.tile(np.float32([0, 1]), BATCH // 2)}
    one = global_gradients(settings, linear_params(), {}, 4, batch)
    two = global_gradients(settings, linear_params(), {}, 4, masked)
    assert_close(one[0], two[0], 1e-6)
    np.testing.assert_allclose(one[2]["loss/bce"], two[2]["loss/bce"], rtol=1e-6)


def test_mixed_images_without_a_class_known_in_both_leave_the_mean_alone():
    settings = ignoring_unknown(mix_probability=0.7)
    batch, params = sparse_batch(), linear_params()
    images, targets, known = examples(settings, jax.tree.map(jnp.asarray, batch))
    logits = linear_apply(params, {}, images, train=True, key=None)[0].logits
    each = bce(logits, targets, known)
    says_something = np.asarray(known).any(axis=1)
    assert 0 < says_something.sum() < (batch["label_ids"] >= 0).any(axis=1).sum()
    _, _, metrics = global_gradients(settings, params, {}, 1, batch)
    np.testing.assert_allclose(
        metrics["loss/bce"], each[says_something].mean(), rtol=1e-5
    )


@pytest.mark.parametrize("mix_probability", [0.0, 0.7])
def test_micro_batches_add_up_where_some_images_say_nothing(mix_probability):
    params, batch = linear_params(), sparse_batch()
    one, four = (
        global_gradients(
            ignoring_unknown(mix_probability=mix_probability, micro_batches=number),
            params,
            {},
            2,
            batch,
        )
        for number in (1, 4)
    )
    assert_close(four[0], one[0], 1e-5)
    np.testing.assert_allclose(four[2]["objective"], one[2]["objective"], rtol=1e-5)


def test_gradients_of_eight_devices_are_those_of_one_where_some_images_say_nothing():
    settings, params, batch = ignoring_unknown(), linear_params(), sparse_batch()
    one = global_gradients(settings, params, {}, 1, batch)
    eight = global_gradients(settings, params, {}, 8, batch)
    assert_close(eight[0], one[0], 1e-5)


def test_a_term_moves_in_and_out_without_compiling_again():
    terms = {
        "bce": ((0.0, 1.0), (0.5, 1.0), (0.5, 0.0)),
        "focal": {"weight": ((0.5, 0.0), (0.5, 1.0)), "gamma": 2.0},
    }
    objective = make_objective(terms, num_steps=4, num_classes=NUM_CLASSES)
    settings, mesh = make_settings(objective=objective), make_mesh()
    train_step = make_train_step(settings, mesh)
    state = start(linear_params(), {}, settings, mesh)
    batch = to_devices(make_batch(), divided(mesh))
    weights = []
    for _ in range(4):
        state, metrics = train_step(state, batch, None)
        weights.append((float(metrics["weight/bce"]), float(metrics["weight/focal"])))
    assert weights == [(1.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.0, 1.0)]
    assert train_step._cache_size() == 1


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted():
    def explode(params, batch_stats, images, *, train, key):
        outputs, stats = linear_apply(params, batch_stats, images, train=train, key=key)
        return outputs._replace(logits=outputs.logits / 0.0), stats

    settings, mesh = make_settings(explode, average_rate=ema_rate(0.9)), make_mesh()
    train_step = make_train_step(settings, mesh)
    params = linear_params()
    state = start(params, {}, settings, mesh)
    vectors = jnp.asarray(LABEL_EMBEDDINGS, jnp.float32)
    for skipped in (1, 2):
        state, metrics = train_step(
            state, to_devices(make_batch(), divided(mesh)), vectors
        )
        assert int(metrics["skipped_in_a_row"]) == skipped
    assert_close(state.params, params, 0.0)
    assert_close(state.average_params, params, 1e-7)
    assert int(state.step) == 2


def nan(logits, here):
    return jnp.where(here, jnp.nan, 0.0)


def infinite(logits, here):
    return jnp.where(here, jnp.inf, 0.0)


def steep(logits, here):
    """A finite value whose slope is not finite."""
    return jnp.sqrt(jnp.where(here, 0.0, 1.0) + 0.0 * logits)


def each_devices(tree):
    """Returns the arrays of a tree on every device."""
    return [
        [np.array(shard.data) for shard in leaf.addressable_shards]
        for leaf in jax.tree.leaves(tree)
    ]


@pytest.mark.parametrize(
    ("added", "more"),
    [
        (nan, {}),
        (infinite, {"micro_batches": 2}),
        (steep, {}),
        (steep, {"shard_state": True}),
    ],
)
def test_what_is_not_finite_on_one_device_is_skipped_on_all_alike(added, more):
    def breaks(params, batch_stats, images, *, train, key):
        outputs, _ = linear_apply(params, {}, images, train=train, key=key)
        # A white first pixel breaks device 3.
        here = (jax.lax.axis_index(DATA_AXIS) == 3) & (images[0, 0, 0, 0] == 255)
        logits = outputs.logits + added(outputs.logits, here)
        stats = {"mean": jnp.mean(outputs.logits, axis=0)}
        return outputs._replace(logits=logits), stats

    optimizer = make_optimizer(
        name="adamw", schedule=optax.constant_schedule(0.1), weight_decay=0.1
    )
    settings = make_settings(breaks, optimizer=optimizer, **more)
    mesh = make_mesh()
    stats = {"mean": jnp.zeros(NUM_CLASSES)}
    state = start(linear_params(), stats, settings, mesh)
    state = jax.device_put(state, state_shardings(state, mesh, settings.shard_state))
    train_step = make_train_step(settings, mesh)
    good, bad = make_batch(), make_batch()
    bad["images"][:, 0, 0] = 255
    good["images"][:, 0, 0] = 0
    vectors = jnp.asarray(LABEL_EMBEDDINGS, jnp.float32)
    counted = []
    for batch in (good, bad, bad, good):
        before = each_devices((state.params, state.opt_state, state.batch_stats))
        state, _ = train_step(state, to_devices(batch, divided(mesh)), vectors)
        after = each_devices((state.params, state.opt_state, state.batch_stats))
        same = jax.tree.map(np.array_equal, before, after)
        assert all(jax.tree.leaves(same)) == (batch is bad)
        for copies in each_devices((state.params, state.batch_stats)):
            assert np.isfinite(copies[0]).all()
            assert all((copy == copies[0]).all() for copy in copies)
        counters = each_devices((state.skipped_steps, state.skipped_in_a_row))
        counted.append([set(map(int, copies)) for copies in counters])
    assert counted == [[{0}, {0}], [{1}, {1}], [{2}, {2}], [{2}, {0}]]


def overflowing(rate, scale):
    """Returns a train step, its state and its mesh; the first kernel is scaled."""
    network = make_network(
        depth=18, width=8, num_classes=NUM_CLASSES, embedding_dim=0, stem="small"
    )
    params, batch_stats = network.init(jax.random.key(0))
    params["trunk"]["stem_conv"]["kernel"] *= scale
    optimizer = make_optimizer(
        name="sgd", schedule=optax.constant_schedule(rate), weight_decay=1e-4
    )
    only_bce = make_objective({"bce": 1.0}, num_steps=10, num_classes=NUM_CLASSES)
    settings = make_settings(network.apply, objective=only_bce, optimizer=optimizer)
    mesh = make_mesh()
    state = start(params, batch_stats, settings, mesh)
    return make_train_step(settings, mesh), state, mesh


def test_at_a_thousand_times_the_rate_the_state_stays_finite():
    train_step, state, mesh = overflowing(rate=100.0, scale=1.0)
    for seed in range(12):
        batch = to_devices(make_batch(seed), divided(mesh))
        state, metrics = train_step(state, batch, None)
        for leaf in jax.tree.leaves(jax.device_get(state)):
            assert np.isfinite(leaf).all()
    assert int(metrics["skipped_in_a_row"]) > 0


def test_an_update_is_skipped_if_only_a_variance_overflows():
    train_step, state, mesh = overflowing(rate=0.1, scale=1e19)
    before = jax.device_get(state.batch_stats)
    batch = to_devices(make_batch(0), divided(mesh))
    state, metrics = train_step(state, batch, None)
    assert int(metrics["skipped_in_a_row"]) == 1
    # Neither value shows it.
    assert np.isfinite(metrics["objective"]) and np.isfinite(metrics["gradient_norm"])
    jax.tree.map(
        np.testing.assert_array_equal, jax.device_get(state.batch_stats), before
    )


def test_logits_of_ten_thousand_in_bfloat16_train():
    def far(params, batch_stats, images, *, train, key):
        outputs, stats = linear_apply(params, batch_stats, images, train=train, key=key)
        logits = (outputs.logits * 1e4).astype(jnp.bfloat16).astype(jnp.float32)
        return outputs._replace(logits=logits), stats

    settings, mesh = make_settings(far), make_mesh()
    train_step = make_train_step(settings, mesh)
    state = start(linear_params(), {}, settings, mesh)
    vectors = jnp.asarray(LABEL_EMBEDDINGS, jnp.float32)
    batch = to_devices(make_batch(), divided(mesh))
    objectives = []
    for _ in range(3):
        state, metrics = train_step(state, batch, vectors)
        objectives.append(float(metrics["objective"]))
    assert int(metrics["skipped_steps"]) == 0
    assert objectives[0] > 1e4
    assert objectives[-1] < objectives[1]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_after_skipped_updates_the_rate_that_is_applied_is_the_one_that_is_logged(name):
    def schedule(step):
        return jnp.float32(0.01) * (step.astype(jnp.float32) + 1)

    def trained(schedule, *batches):
        optimizer = make_optimizer(
            name=name, schedule=schedule, weight_decay=0.0, clip_norm=10.0
        )
        settings = make_settings(optimizer=optimizer, learning_rate=schedule)
        mesh = make_mesh()
        state = start(linear_params(), {}, settings, mesh)
        train_step = make_train_step(settings, mesh)
        for batch in batches:
            vectors = jnp.asarray(LABEL_EMBEDDINGS, jnp.float32)
            state, metrics = train_step(
                state, to_devices(batch, divided(mesh)), vectors
            )
        return state, metrics

    good = make_batch()
    broken = good | {"label_confidences": good["label_confidences"] * np.float32("nan")}
    state, metrics = trained(schedule, broken, broken, good)
    assert (int(metrics["skipped_steps"]), int(state.stage_step)) == (2, 3)
    assert int(metrics["skipped_in_a_row"]) == int(state.skipped_in_a_row) == 0
    logged = float(metrics["learning_rate"])
    assert logged == pytest.approx(0.03)
    expected, _ = trained(lambda step: jnp.float32(logged), good)
    assert_close(state.params, expected.params, 1e-6)


def test_the_average_lies_between_start_and_newest_params():
    settings, mesh = make_settings(average_rate=ema_rate(0.9)), make_mesh()
    params = linear_params()
    state = start(params, {}, settings, mesh)
    train_step = make_train_step(settings, mesh)
    vectors = jnp.asarray(LABEL_EMBEDDINGS, jnp.float32)
    state, _ = train_step(state, to_devices(make_batch(), divided(mesh)), vectors)
    # The first update has a weight of 0.9: the average forgets its start quickly.
    expected = jax.tree.map(lambda a, b: a + 0.9 * (b - a), params, state.params)
    assert_close(state.average_params, expected, 1e-6)


@pytest.mark.parametrize(
    "other", [(1, "dropout", 5), (0, "init", 5), (0, "dropout", 6)]
)
def test_keys_differ_by_seed_purpose_and_step(other):
    key = jax.random.key_data(derive_key(0, "dropout", 5))
    assert (key == jax.random.key_data(derive_key(0, "dropout", 5))).all()
    assert (key != jax.random.key_data(derive_key(*other))).any()


def test_a_frozen_trunk_stays_and_the_classifier_learns_from_what_it_evaluates_to():
    network = make_network(
        depth=18, width=8, num_classes=NUM_CLASSES, embedding_dim=0, dtype=jnp.float32
    )
    params, batch_stats = network.init(jax.random.key(1))
    batch_stats = jax.tree.map(lambda x: x + jnp.float32(0.3), batch_stats)
    decay, rate = 0.5, optax.constant_schedule(0.1)
    settings = make_settings(
        network.apply,
        objective=make_objective({"bce": 1.0}, num_steps=10, num_classes=NUM_CLASSES),
        optimizer=optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate)),
        frozen=("trunk",),
    )
    batch = make_batch()
    images = jnp.asarray(batch["images"])
    outputs, _ = network.apply(params, batch_stats, images, train=False)
    before = jax.device_get((params, batch_stats, outputs))
    mesh = make_mesh()
    state = start(params, batch_stats, settings, mesh)
    state, _ = make_train_step(settings, mesh)(
        state, to_devices(batch, divided(mesh)), None
    )
    (old, old_stats, outputs), new = before, jax.device_get(state)
    jax.tree.map(np.testing.assert_array_equal, new.params["trunk"], old["trunk"])
    jax.tree.map(np.testing.assert_array_equal, new.batch_stats, old_stats)
    wrong = 1 / (1 + np.exp(-outputs.logits)) - multi_hot(batch["label_ids"])
    wrong *= batch["mask"][:, None] / batch["mask"].sum()
    for name, gradient in (
        ("kernel", outputs.features.T @ wrong),
        ("bias", wrong.sum(0)),
    ):
        value = old["classifier"][name]
        expected = value - 0.1 * (gradient + decay * value)
        assert_close(new.params["classifier"][name], expected, 1e-5)


def multi_hot(label_ids):
    targets = np.zeros((len(label_ids), NUM_CLASSES))
    for row, ids in zip(targets, label_ids, strict=True):
        row[ids[ids >= 0]] = 1
    return targets
