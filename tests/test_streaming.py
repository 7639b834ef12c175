import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from sklearn.metrics import average_precision_score, fbeta_score, log_loss

from jaxii.decoding.calibration import Calibration
from jaxii.decoding.decoders import Decoders
from jaxii.decoding.thresholds import DecoderChoice, f2_by_threshold
from jaxii.errors import InputError
from jaxii.evaluation.decoder_scores import DecoderScores, SplitTruth
from jaxii.evaluation.evaluator import Evaluator, split_metrics
from jaxii.evaluation.result import SplitMetrics, threshold_index
from jaxii.metrics import exact_sum, streaming
from jaxii.metrics.average_precision import average_precision
from jaxii.metrics.histogram import (
    PRESENT,
    UNKNOWN,
    bin_edges,
    bins_of,
    counts_at_least,
)

GRID = (0.1, 0.25, 0.5, 0.75, 0.9)
NUM_CLASSES = 12
update = jax.jit(streaming.update)


def example(num_images=64, num_classes=NUM_CLASSES, seed=0):
    rng = np.random.default_rng(seed)
    targets = rng.random((num_images, num_classes)) < 0.3
    logits = rng.normal(size=targets.shape) * 2 + 1.5 * targets - 1
    probs = (1 / (1 + np.exp(-logits))).astype(np.float32)
    return probs, targets


def accumulate(probs, targets, *, known=None, mask=None, **others):
    num_images, num_classes = probs.shape
    mask = np.ones(num_images, np.float32) if mask is None else mask
    acc = streaming.empty(num_classes, GRID)
    arrays = (probs, targets, known, mask)
    return update(acc, *jax.tree.map(jnp.asarray, arrays), **others)


def metrics_of(probs, targets, *, threshold=0.5, **others):
    """Returns all figures of a split, with one threshold for all classes."""
    num_images, num_classes = probs.shape
    decoders = Decoders(
        choice=DecoderChoice(threshold=threshold, top_k=3),
        class_thresholds=np.full(num_classes, threshold),
        calibration=Calibration(np.ones(num_classes), np.zeros(num_classes)),
        frequencies=np.full(num_classes, 0.5),
    )
    truth = SplitTruth(
        offsets=np.concatenate([[0], np.cumsum(targets.sum(axis=1))]),
        label_ids=np.nonzero(targets)[1],
        scored=np.ones(num_images, bool),
        slice_ids=np.zeros(num_images, np.int32),
        slices=("north", "south"),
        groups=np.arange(num_images),
    )
    scores = DecoderScores(decoders, ["threshold"], in_use="threshold", truth=truth)
    scores.add(probs, None, np.arange(num_images))
    acc = accumulate(probs, targets, **others)
    return split_metrics(acc, scores, in_use="threshold", threshold=threshold)


def assert_same(left, right):
    # Bit for bit, except that the parts of a total may differ if their sum does not.
    plain = [
        jax.tree.map(
            lambda x: exact_sum.value(x) if isinstance(x, exact_sum.Total) else x,
            acc,
            is_leaf=lambda x: isinstance(x, exact_sum.Total),
        )
        for acc in (left, right)
    ]
    jax.tree.map(np.testing.assert_array_equal, *plain)


def edge_cases():
    probs, targets = example(seed=3)
    nothing, everything = np.zeros_like(targets), np.ones_like(targets)
    yield "random", probs, targets
    yield "empty truth", probs, nothing
    yield "some empty truth", probs, targets & (np.arange(64) % 3 > 0)[:, None]
    yield "empty prediction", np.zeros_like(probs), targets
    yield "empty both", np.zeros_like(probs), nothing
    yield "all positive", np.ones_like(probs), everything
    yield "everything predicted", np.ones_like(probs), targets
    yield "on the thresholds", np.float32(GRID)[(probs * 4.9).astype(int)], targets
    yield "just below", np.full_like(probs, np.nextafter(np.float32(0.5), 0)), targets
    yield "ties", np.round(probs, 1).astype(np.float32), targets
    yield "one image", probs[:1], targets[:1]


CASES = [pytest.param(p, t, id=name) for name, p, t in edge_cases()]


@pytest.mark.parametrize(("probs", "targets"), CASES)
def test_f2_of_every_kind_equals_scikit_learn(probs, targets):
    score = functools.partial(fbeta_score, targets, beta=2, zero_division=0)
    for threshold in GRID:
        metrics = metrics_of(probs, targets, threshold=threshold)
        predicted = probs >= np.float32(threshold)
        got = {
            "samples": metrics.f2_at(threshold),
            "micro": metrics.micro_f2,
            "macro": metrics.macro_f2,
        }
        for average, found in got.items():
            want = score(predicted, average=average)
            assert found == pytest.approx(want, abs=1e-6), (threshold, average)


@pytest.mark.parametrize(("probs", "targets"), CASES)
def test_map_is_within_a_thousandth_of_scikit_learn(probs, targets):
    got = metrics_of(probs, targets)
    some = targets.any(axis=0)
    assert got.map_num_classes == some.sum()
    if some.any():
        want = average_precision_score(targets[:, some], probs[:, some])
        assert got.map == pytest.approx(want, abs=1e-3)


def test_map_from_the_wide_bins_of_7178_classes_is_within_a_thousandth():
    rng = np.random.default_rng(0)
    edges = bin_edges(tuple(step / 100 for step in range(1, 100)), 7178)
    shares = 10 ** rng.uniform(-2.5, -1, 40)
    targets = rng.random((4000, 40)) < shares
    logits = rng.normal(np.log(shares) - 1, 1.2, targets.shape)
    logits += targets * rng.normal(3.5, 1.2, targets.shape)
    probs = (1 / (1 + np.exp(-logits))).astype(np.float32)
    histogram = np.zeros((3, 40, len(edges) + 1), np.int32)
    bins = np.searchsorted(edges, probs, side="right")
    kind = np.where(targets, PRESENT, UNKNOWN)
    np.add.at(histogram, (kind, np.arange(40)[None], bins), 1)
    want = average_precision_score(targets, probs)
    assert average_precision(histogram).mean() == pytest.approx(want, abs=1e-3)


@pytest.mark.parametrize("num_classes", [1, 60, 7178, 100_000])
def test_bins_are_those_of_a_binary_search(num_classes):
    edges = bin_edges(GRID, num_classes)
    beside = [np.nextafter(edges, np.float32(side)) for side in (0, 1)]
    odd = np.array([0, 1e-45, 1e-30, 0.5, 1], np.float32)
    even = np.random.default_rng(0).random(10_000, np.float32)
    probs = np.concatenate([edges, *beside, odd, even, even**8, 1 - even**8])
    want = np.searchsorted(edges, probs, side="right")
    np.testing.assert_array_equal(bins_of(jnp.asarray(probs), edges), want)


def test_map_of_equal_saturated_scores_is_the_share_of_positives():
    for edge in (0, -1):
        histogram = np.zeros((3, 1, 500), np.int32)
        histogram[PRESENT, 0, edge], histogram[UNKNOWN, 0, edge] = 3, 7
        assert average_precision(histogram).tolist() == pytest.approx([0.3])


def test_map_ranks_annotated_entries_only_where_absences_are_verified():
    probs, targets = example()
    # No bin has two different scores, so only equal scores are ties.
    probs = np.round(probs, 2).astype(np.float32)
    known = targets | (np.random.default_rng(1).random(targets.shape) < 0.3)
    known[:, 0] = targets[:, 0]
    histogram = np.asarray(accumulate(probs, targets, known=known).sums.histogram)
    got = average_precision(histogram)
    for class_id in range(NUM_CLASSES):
        rows = known[:, class_id] if class_id else slice(None)
        truth, scores = targets[rows, class_id], probs[rows, class_id]
        want = average_precision_score(truth, scores)
        assert got[class_id] == pytest.approx(want, abs=1e-6)


def test_a_probability_on_the_threshold_is_predicted():
    probs = np.full((1, NUM_CLASSES), 0.1, np.float32)
    targets = np.ones((1, NUM_CLASSES), bool)
    got = metrics_of(probs, targets, threshold=0.1)
    assert got.f2_at(0.1) == got.f2 == 1
    assert got.labels_per_image_predicted == NUM_CLASSES


def test_recall_at_5_is_the_mean_over_images_with_truth():
    probs, targets = example()
    targets[::4] = False
    got = metrics_of(probs, targets).recall_at_5
    best = np.argsort(-probs, axis=1)[:, :5]
    hits = np.take_along_axis(targets, best, axis=1).sum(axis=1)
    some = targets.any(axis=1)
    assert got == pytest.approx(np.mean(hits[some] / targets[some].sum(axis=1)))


def rank_reference(scores, targets, k):
    predicted = np.zeros_like(targets)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    np.put_along_axis(predicted, order, True, axis=1)
    return fbeta_score(targets, predicted, beta=2, average="samples", zero_division=0)


def mean_f2(ranking):
    return exact_sum.value(ranking.f2) / int(ranking.num_images)


@pytest.mark.parametrize("digits", [1, 7], ids=["ties", "no ties"])
def test_top_k_takes_the_best_k_and_of_equals_the_lower_id(digits):
    probs, targets = example(num_images=9)
    probs = np.round(probs, digits).astype(np.float32)
    got = mean_f2(accumulate(probs, targets).sums.top_k)
    want = [rank_reference(probs, targets, k) for k in range(1, NUM_CLASSES + 1)]
    assert got == pytest.approx(want, abs=1e-6)


def test_embedding_decoder_ranks_by_cosine():
    probs, targets = example(num_images=9)
    rng = np.random.default_rng(5)
    labels = rng.normal(size=(NUM_CLASSES, 6)).astype(np.float32)
    predicted = rng.normal(size=(9, 6)).astype(np.float32) * 3
    acc = accumulate(
        probs,
        targets,
        embedding=jnp.asarray(predicted),
        label_embeddings=jnp.asarray(labels),
    )
    cosines = predicted @ (labels / np.linalg.norm(labels, axis=1, keepdims=True)).T
    want = [rank_reference(cosines, targets, k) for k in range(1, NUM_CLASSES + 1)]
    assert mean_f2(acc.sums.embedding) == pytest.approx(want, abs=1e-6)


def test_without_an_embedding_there_is_no_embedding_ranking():
    assert accumulate(*example()).sums.embedding.num_images == 0


def test_fewer_than_ten_classes_work():
    probs, targets = example(num_classes=3)
    assert metrics_of(probs, targets).recall_at_5 == pytest.approx(1.0)


def test_coverage_counts_classes_rightly_predicted_once():
    probs, targets = example(num_images=6)
    got = Evaluator.figures(accumulate(probs, targets), "validation")
    best = np.float32(got["validation/threshold"])
    right = ((probs >= best) & targets).any(axis=0)
    assert got["validation/coverage"] == right.sum()


def test_labels_per_image_are_those_predicted_and_those_true():
    probs, targets = example()
    got, chosen = metrics_of(probs, targets), (probs >= 0.5).sum(axis=1)
    submitted = np.maximum(chosen, 1).mean()
    assert got.labels_per_image_predicted == pytest.approx(submitted)
    assert got.labels_per_image_true == pytest.approx(targets.sum(axis=1).mean())


def test_calibration_error_equals_a_plain_computation():
    probs, targets = example()
    probs[0, :3] = [0, 1, np.float32(1 / 3)]
    got = metrics_of(probs, targets)
    edges = (np.arange(1, 15) / 15).astype(np.float32)
    bins = np.digitize(probs, edges)
    error = 0.0
    for index in range(15):
        inside = bins == index
        gap = probs[inside].sum(dtype=np.float64) - targets[inside].sum()
        error += abs(gap) / probs.size
    assert got.calibration_error == pytest.approx(error, abs=1e-6)
    assert sum(row[2] for row in got.reliability) == probs.size


@pytest.mark.parametrize("num_classes", [NUM_CLASSES, 7178])
def test_cross_entropy_from_the_bins_is_within_a_hundredth_of_scikit_learn(num_classes):
    probs, targets = example(num_images=8, num_classes=num_classes, seed=5)
    got = metrics_of(probs, targets)
    exact = log_loss(targets.ravel(), probs.ravel().astype(np.float64)) * num_classes
    assert got.bce == pytest.approx(exact, rel=0.01)


def test_cross_entropy_counts_a_verified_absence_once():
    probs, targets = example(seed=6)
    known = (np.arange(NUM_CLASSES) % 2 == 0) * np.ones_like(probs)
    plain = metrics_of(probs, targets).bce
    assert metrics_of(probs, targets, known=known).bce == plain


def test_padding_changes_nothing():
    probs, targets = example()
    labels = np.random.default_rng(2).normal(size=(NUM_CLASSES, 5)).astype(np.float32)
    predicted = targets @ labels
    padding = np.full((9, NUM_CLASSES), 0.7, np.float32)
    padding[0] = np.nan
    padded = accumulate(
        np.concatenate([probs, padding]),
        np.concatenate([targets, padding > 0]),
        mask=np.concatenate([np.ones(64, np.float32), np.zeros(9, np.float32)]),
        embedding=jnp.asarray(np.concatenate([predicted, np.ones((9, 5), np.float32)])),
        label_embeddings=jnp.asarray(labels),
    )
    plain = accumulate(
        probs,
        targets,
        embedding=jnp.asarray(predicted),
        label_embeddings=jnp.asarray(labels),
    )
    assert_same(padded, plain)


def test_two_halves_added_are_the_whole():
    probs, targets = example()
    halves = [accumulate(probs[at], targets[at]) for at in np.split(np.arange(64), 2)]
    added = jax.tree.map(jnp.add, *halves)
    assert_same(added, accumulate(probs, targets))


def test_one_batch_after_the_other_is_the_whole():
    probs, targets = example()
    acc = streaming.empty(NUM_CLASSES, GRID)
    for at in np.split(np.arange(64), 4):
        acc = update(
            acc,
            jnp.asarray(probs[at]),
            jnp.asarray(targets[at]),
            None,
            jnp.ones(16),
        )
    assert_same(acc, accumulate(probs, targets))


def test_a_psum_over_eight_devices_is_the_whole():
    probs, targets = example()
    known = np.ones_like(targets)
    mask = (np.arange(64) < 59).astype(np.float32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    labels = jnp.asarray(np.eye(NUM_CLASSES, dtype=np.float32))

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P())
    def evaluate(probs, targets, known, mask):
        acc = streaming.empty(NUM_CLASSES, GRID)
        acc = streaming.update(
            acc,
            probs,
            targets,
            known,
            mask,
            embedding=probs,
            label_embeddings=labels,
        )
        return jax.lax.psum(acc, "data")

    whole = accumulate(
        probs,
        targets,
        known=known,
        mask=mask,
        embedding=jnp.asarray(probs),
        label_embeddings=labels,
    )
    assert_same(evaluate(probs, targets, known, mask), whole)


def test_sums_kept_apart_by_device_and_added_at_the_end_are_the_whole():
    probs, targets = example()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    mask = np.ones(64, np.float32)
    start = jax.tree.map(
        lambda x: jnp.zeros((8, *x.shape), x.dtype),
        streaming.empty(NUM_CLASSES, GRID),
    )

    @functools.partial(jax.jit, donate_argnums=0)
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P("data")
    )
    def add_batch(acc, probs, targets, mask):
        mine = jax.tree.map(lambda x: x[0], acc)
        mine = streaming.update(mine, probs, targets, None, mask)
        return jax.tree.map(lambda x: x[None], mine)

    apart = add_batch(start, probs, targets, mask)
    together = jax.tree.map(lambda x: x.sum(axis=0), apart)
    assert_same(together, accumulate(probs, targets))


def test_sums_keep_small_steps_beyond_what_float32_holds():
    acc = streaming.empty(1, (0.5,))
    large = acc.sums.f2._replace(whole=jnp.full(1, 2**24, jnp.int32))
    acc = streaming.Accumulators(acc.sums._replace(f2=large), acc.thresholds)
    ones = jnp.ones((3, 1))
    acc = update(acc, ones, ones, None, ones[:, 0])
    assert exact_sum.value(acc.sums.f2)[0] == 2**24 + 3


def test_more_classes_than_sixteen_bits_count_are_counted():
    num_classes = 2**16
    ones = np.ones((1, num_classes), np.float32)
    acc = streaming.empty(num_classes, (0.5,))
    acc = update(acc, jnp.asarray(ones), jnp.asarray(ones), None, jnp.ones(1))
    assert exact_sum.value(acc.sums.f2)[0] == 1.0


def test_nan_probabilities_are_never_predicted():
    _, targets = example()
    acc = accumulate(np.full(targets.shape, np.nan, np.float32), targets)
    assert not f2_by_threshold(acc).any()
    edges = bin_edges(GRID, NUM_CLASSES)
    counts = counts_at_least(np.asarray(acc.sums.histogram), edges, np.float32(GRID))
    assert not counts.any()


def test_the_histogram_of_7178_classes_stays_within_its_memory():
    grid = tuple(step / 100 for step in range(1, 100))
    num_bins = len(bin_edges(grid, 7178)) + 1
    assert num_bins > 1000 and 3 * 4 * num_bins * 7178 <= 100e6


@pytest.mark.parametrize("num_classes", [1, 7178, 1_000_000])
def test_edges_are_even_in_the_logit_and_as_many_as_memory_allows(num_classes):
    edges = bin_edges(GRID, num_classes)
    fixed = [*GRID, *(k / 15 for k in range(1, 15))]
    most = 100_000_000 // (3 * 4 * num_classes) - len(fixed)
    logits = np.linspace(-16, 14, min(max(most, 64), 16384))
    even = [1 / (1 + np.exp(-x)) for x in logits]
    np.testing.assert_array_equal(edges, np.unique(np.float32([*even, *fixed])))


def test_average_precision_of_a_class_does_not_depend_on_how_many_there_are():
    histogram = np.random.default_rng(0).integers(0, 3, (3, 1100, 9))
    alone = [average_precision(histogram[:, [i]])[0] for i in range(1100)]
    np.testing.assert_array_equal(average_precision(histogram), alone)


def test_every_figure_is_a_plain_number():
    def check(node):
        if isinstance(node, dict):
            assert all(type(key) is str for key in node)
            node = list(node.values())
        if isinstance(node, list):
            for child in node:
                check(child)
        else:
            assert type(node) in (int, float, str, bool)

    check(json.loads(json.dumps(metrics_of(*example()).to_json())))


def test_figures_are_the_same_after_json():
    metrics = metrics_of(*example())
    again = SplitMetrics.from_json(json.loads(json.dumps(metrics.to_json())))
    assert again.to_json() == json.loads(json.dumps(metrics.to_json()))


@pytest.mark.parametrize("grid", [(), (0.5, 0.4), (0.5, 0.5), (-0.1, 0.5), (0.5, 1.1)])
def test_a_grid_that_does_not_ascend_within_0_and_1_is_refused(grid):
    with pytest.raises(InputError, match="strictly ascending"):
        streaming.empty(3, grid)


def test_a_grid_may_reach_from_0_to_1():
    assert streaming.empty(3, (0.0, 1.0)).thresholds == (0.0, 1.0)
    with pytest.raises(InputError, match="at least 1 class, not 0"):
        streaming.empty(0, GRID)


def test_a_target_of_one_half_is_present():
    probs, targets = example(num_images=9)
    soft = np.where(targets, 0.5, 0.49).astype(np.float32)
    assert_same(accumulate(probs, soft), accumulate(probs, targets))


def test_the_cosine_with_a_zero_vector_is_0():
    labels = jnp.asarray([[0.0, 0.0], [3.0, 4.0]])
    found = streaming.cosine(jnp.asarray([[6.0, 8.0], [0.0, 0.0]]), labels)
    np.testing.assert_allclose(found, [[0, 1], [0, 0]], atol=1e-6)


def test_a_threshold_off_the_grid_is_refused_with_the_nearest():
    with pytest.raises(InputError, match=r"the nearest is 0\.25"):
        threshold_index(GRID, 0.3)
    with pytest.raises(InputError, match=r"the nearest is 0\.25"):
        metrics_of(*example(), threshold=0.3)


def test_a_split_without_images_is_refused():
    with pytest.raises(InputError, match="at least 1"):
        Evaluator.figures(streaming.empty(3, GRID), "validation")
    with pytest.raises(InputError, match="at least 1"):
        metrics_of(np.zeros((0, 3), np.float32), np.zeros((0, 3), bool))
