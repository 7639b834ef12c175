import doctest
import math

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from scipy import special

from jaxii.errors import InputError
from jaxii.objective import losses
from jaxii.objective.losses import (
    LOSSES,
    asl,
    bce,
    embedding,
    focal,
    has_direction,
    has_known,
    has_positive,
    soft_f,
)

ALL = sorted(LOSSES)


def example(num_images=5, num_classes=7, seed=0):
    rng = np.random.default_rng(seed)
    shape = (num_images, num_classes)
    logits = rng.normal(0.0, 3.0, shape).astype(np.float32)
    targets = rng.choice([0.0, 0.0, 1.0, 0.3], shape).astype(np.float32)
    known = rng.choice([0.0, 1.0, 1.0], shape).astype(np.float32)
    return logits, targets, known


def on_device(*arrays):
    return [jnp.asarray(array) for array in arrays]


def looped(cell):
    """Returns the sum over known classes of cell(p, y), one Python float at a time."""

    def loss(logits, targets, known):
        rows = []
        for row in range(logits.shape[0]):
            total = 0.0
            for column in range(logits.shape[1]):
                if known[row, column]:
                    p = 1.0 / (1.0 + math.exp(-float(logits[row, column])))
                    total += cell(p, float(targets[row, column]))
            rows.append(total)
        return np.array(rows, np.float64)

    return loss


def bce_cell(p, y):
    return -y * math.log(p) - (1 - y) * math.log(1 - p)


def focal_cell(gamma, alpha):
    positive_weight, negative_weight = (1, 1) if alpha is None else (alpha, 1 - alpha)

    def cell(p, y):
        positive = positive_weight * (1 - p) ** gamma * -math.log(p)
        negative = negative_weight * p**gamma * -math.log(1 - p)
        return y * positive + (1 - y) * negative

    return cell


def asl_cell(gamma_pos, gamma_neg, clip):
    def cell(p, y):
        q = max(p - clip, 0.0)
        positive = (1 - p) ** gamma_pos * -math.log(p)
        negative = q**gamma_neg * -math.log(1 - q)
        return y * positive + (1 - y) * negative

    return cell


def soft_f_looped(logits, targets, known, beta):
    rows = []
    for x, y, k in zip(logits, targets, known, strict=True):
        p = [1.0 / (1.0 + math.exp(-float(value))) for value in x]
        counted = [c for c in range(len(p)) if k[c]]
        hits = sum(p[c] * float(y[c]) for c in counted)
        below = beta**2 * sum(float(y[c]) for c in counted) + sum(p[c] for c in counted)
        rows.append(1 - (1 + beta**2) * hits / below)
    return np.array(rows, np.float64)


def test_bce_equals_the_looped_formula():
    arrays = example()
    expected = looped(bce_cell)(*arrays)
    np.testing.assert_allclose(bce(*on_device(*arrays)), expected, rtol=2e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1, 2.0, 5.0])
@pytest.mark.parametrize("alpha", [None, 0.0, 0.25])
def test_focal_equals_the_looped_formula(gamma, alpha):
    arrays = example()
    actual = focal(*on_device(*arrays), gamma=gamma, alpha=alpha)
    expected = looped(focal_cell(gamma, alpha))(*arrays)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("gamma_pos", "gamma_neg", "clip"),
    [(0.0, 4.0, 0.05), (1, 4, 0.0), (0.0, 0.0, 0.2), (0.5, 0.5, 0.1), (0.5, 0.5, 0)],
)
def test_asl_equals_the_looped_formula(gamma_pos, gamma_neg, clip):
    arrays = example()
    actual = asl(
        *on_device(*arrays), gamma_pos=gamma_pos, gamma_neg=gamma_neg, clip=clip
    )
    expected = looped(asl_cell(gamma_pos, gamma_neg, clip))(*arrays)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [1, 2.0])
def test_soft_f_equals_the_looped_formula(beta):
    arrays = example()
    actual = soft_f(*on_device(*arrays), beta=beta)
    np.testing.assert_allclose(actual, soft_f_looped(*arrays, beta), atol=1e-6)


def test_soft_f_of_faint_targets_and_guesses_is_the_formula_too():
    arrays = np.full((1, 3), -6.0), np.full((1, 3), 0.01), np.ones((1, 3))
    found = soft_f(*on_device(*map(np.float32, arrays)), beta=1.0)
    np.testing.assert_allclose(found, soft_f_looped(*arrays, 1.0), rtol=1e-5)


def test_the_default_parameters_are_those_of_the_papers():
    arrays = example()
    expected = {
        "focal": looped(focal_cell(2.0, None))(*arrays),
        "asl": looped(asl_cell(0.0, 4.0, 0.05))(*arrays),
        "soft_f": soft_f_looped(*arrays, 2.0),
    }
    for name, values in expected.items():
        found = LOSSES[name](*on_device(*arrays))
        np.testing.assert_allclose(found, values, rtol=1e-5, atol=1e-6, err_msg=name)


def test_soft_f_of_a_certain_prediction_is_one_minus_f2():
    # 2 hits of 3 true labels, 1 false alarm: F2 = 5*2 / (5*2 + 4*1 + 1) = 2/3.
    logits = jnp.array([[50.0, 50.0, -50.0, 50.0, -50.0]])
    targets = jnp.array([[1.0, 1.0, 1.0, 0.0, 0.0]])
    loss = soft_f(logits, targets, jnp.ones_like(targets))
    np.testing.assert_allclose(loss, [1 / 3], rtol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_focal_with_gamma_zero_is_bce_exactly(compiled):
    arrays = on_device(*example(64, 33))
    actual_loss = jax.jit(focal) if compiled else focal
    expected_loss = jax.jit(bce) if compiled else bce
    actual = actual_loss(*arrays, gamma=jnp.float32(0.0))
    np.testing.assert_array_equal(actual, expected_loss(*arrays))


def test_focal_with_gamma_zero_has_the_gradient_of_bce_where_p_is_one():
    logits = jnp.array([[100.0, -100.0, 30.0, 0.0, -2.0]])
    targets = jnp.array([[1.0, 0.0, 1.0, 1.0, 0.0]])
    known = jnp.ones_like(targets)
    slope = jax.grad(lambda x: focal(x, targets, known, gamma=0.0).sum())(logits)
    expected = jax.grad(lambda x: bce(x, targets, known).sum())(logits)
    np.testing.assert_allclose(slope, expected, rtol=1e-6)


def test_a_traced_gamma_compiles_once():
    arrays = on_device(*example())
    traces = []

    @jax.jit
    def loss(gamma):
        traces.append(gamma)
        return focal(*arrays, gamma=gamma)

    for gamma in (0.0, 1.0, 2.0):
        loss(jnp.float32(gamma))
    assert len(traces) == 1


def test_focal_has_a_finite_gradient_in_gamma_at_extreme_logits():
    logits = jnp.array([[100.0, -100.0, 100.0, -100.0]])
    targets = jnp.array([[1.0, 0.0, 0.0, 1.0]])

    def total(gamma):
        return focal(logits, targets, jnp.ones_like(targets), gamma=gamma).sum()

    for gamma in (0.0, 2.0):
        assert np.isfinite(jax.grad(total)(jnp.float32(gamma)))


def test_asl_without_clip_and_equal_gammas_is_focal():
    arrays = on_device(*example())
    actual = asl(*arrays, gamma_pos=2.0, gamma_neg=2.0, clip=0.0)
    np.testing.assert_allclose(actual, focal(*arrays, gamma=2.0), rtol=1e-6)


@pytest.mark.parametrize("clip", [0.0, 1e-9, 3e-8, 5e-8, 6e-8, 1e-7, 1e-6])
def test_asl_is_finite_at_a_probability_of_1(clip):
    logits, targets = jnp.array([[20.0, 50.0]]), jnp.zeros((1, 2))
    value, slope = jax.value_and_grad(lambda x: asl(x, targets, clip=clip).sum())(
        logits
    )
    assert np.isfinite(value)
    assert np.isfinite(slope).all()


def test_asl_forgives_negatives_below_the_clip():
    logits = jnp.full((1, 4), -4.0)
    targets, known = jnp.zeros((1, 4)), jnp.ones((1, 4))
    value, slope = jax.value_and_grad(
        lambda x: asl(x, targets, known, gamma_neg=0.5, clip=0.05).sum()
    )(logits)
    assert value == 0.0
    np.testing.assert_array_equal(slope, np.zeros((1, 4)))


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_asl_with_a_traced_clip_is_that_with_a_constant(clip):
    logits = np.array([[-200.0, -4.0, -1.0, 0.0, 3.0, 200.0]], np.float32)
    targets = np.array([[0.0, 0.0, 1.0, 0.0, 0.0, 0.0]], np.float32)

    def total(logits, clip):
        return asl(logits, targets, gamma_neg=2.0, clip=clip).sum()

    traced = jax.jit(jax.value_and_grad(total))(logits, clip)
    constant = jax.jit(jax.value_and_grad(lambda x: total(x, clip)))(logits)
    jax.tree.map(lambda *pair: np.testing.assert_allclose(*pair), traced, constant)
    assert np.isfinite(traced[1]).all()


def test_asl_forgives_a_negative_exactly_at_the_clip():
    logits, targets = jnp.zeros((1, 1)), jnp.zeros((1, 1))
    value, slope = jax.value_and_grad(
        lambda x: asl(x, targets, gamma_neg=0.5, clip=0.5).sum()
    )(logits)
    assert (float(value), float(slope[0, 0])) == (0.0, 0.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("bce", {}),
        ("soft_f", {}),
        ("focal", {}),
        ("focal", {"gamma": 0.5, "alpha": 0.25}),
        ("asl", {}),
        ("asl", {"gamma_pos": 0.5, "gamma_neg": 0.5}),
        ("asl", {"gamma_pos": 0.5, "gamma_neg": 0.5, "clip": 0.0}),
    ],
)
def test_values_and_gradients_are_finite_at_extreme_logits(name, dtype, params):
    extremes = np.array([100.0, -100.0, 0.0, 88.0, -104.0])
    logits = jnp.asarray(np.tile(extremes, (4, 1)), dtype)
    # All right, all wrong, soft, and without any label.
    right = (extremes > 0).astype(np.float32)
    targets = np.stack([right, 1 - right, np.full(5, 0.3), np.zeros(5)])
    targets = jnp.asarray(targets, dtype)
    known = jnp.ones_like(targets)

    def total(logits, targets):
        return LOSSES[name](logits, targets, known, **params).sum()

    value = LOSSES[name](logits, targets, known, **params)
    slopes = jax.grad(total, argnums=(0, 1))(logits, targets)
    assert value.dtype == jnp.float32
    assert np.all(np.isfinite(value))
    for slope in slopes:
        assert slope.dtype == dtype
        assert np.all(np.isfinite(np.asarray(slope, np.float32)))


# At logits of up to +-10,000, against formulas in float64 that do not overflow.

EXTREMES = np.array([1e4, -1e4, 1e3, -1e3, 99.0, -99.0, 30.0, -30.0, 2.0, -2.0, 0.0])
# All right, all wrong, soft, everything present, nothing present.
EXTREME_TARGETS = np.stack(
    [EXTREMES > 0, EXTREMES <= 0, np.full(11, 0.3), np.ones(11), np.zeros(11)]
).astype(np.float64)


def bce64(x, y):
    """Returns the value of each cell and its slope in the logit."""
    value = y * np.logaddexp(0, -x) + (1 - y) * np.logaddexp(0, x)
    return value, special.expit(x) - y


def focal64(gamma, alpha):
    weight, rest = (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)

    def loss(x, y):
        p, q = special.expit(x), special.expit(-x)
        log_p, log_q = -np.logaddexp(0, -x), -np.logaddexp(0, x)
        value = -weight * y * q**gamma * log_p - rest * (1 - y) * p**gamma * log_q
        up = rest * (1 - y) * p**gamma * (p - gamma * q * log_q)
        down = weight * y * q**gamma * (q - gamma * p * log_p)
        return value, up - down

    return loss


def asl64(gamma_pos, gamma_neg, clip):
    def loss(x, y):
        positive, down = focal64(gamma_pos, None)(x, 1.0)
        negative, up = focal64(gamma_neg, None)(x, 0.0)
        if clip > 0:
            q = np.maximum(special.expit(x) - clip, 0.0)
            rises = special.expit(x) * special.expit(-x)
            negative = -(q**gamma_neg) * np.log1p(-q)
            up = q**gamma_neg / (1 - q) - gamma_neg * q ** (gamma_neg - 1) * np.log1p(
                -q
            )
            up *= rises
        return y * positive + (1 - y) * negative, y * down + (1 - y) * up

    return loss


def soft_f64(x, y):
    p = special.expit(x)
    hits, below = (p * y).sum(), 4.0 * y.sum() + p.sum()
    rises = p * special.expit(-x)
    slope = -5.0 * rises * (y * below - hits) / max(below, 1e-6) ** 2
    return 1.0 - 5.0 * hits / max(below, 1e-6), slope


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("name", "params", "reference"),
    [
        ("bce", {}, bce64),
        ("focal", {}, focal64(2.0, None)),
        ("focal", {"gamma": 0.5, "alpha": 0.25}, focal64(0.5, 0.25)),
        ("asl", {}, asl64(0.0, 4.0, 0.05)),
        ("asl", {"gamma_pos": 1, "gamma_neg": 1, "clip": 0.0}, asl64(1.0, 1.0, 0.0)),
        ("soft_f", {}, soft_f64),
    ],
)
def test_values_and_slopes_at_logits_of_ten_thousand_are_those_of_float64(
    name, params, reference, dtype
):
    logits = jnp.asarray(np.tile(EXTREMES, (5, 1)), dtype)
    targets = jnp.asarray(EXTREME_TARGETS, jnp.float32)
    rows = zip(np.asarray(logits, np.float64), np.float64(targets), strict=True)
    expected, slopes = zip(*(reference(x, y) for x, y in rows), strict=True)
    loss = LOSSES[name]
    value = loss(logits, targets, **params)
    found = jax.grad(lambda x: loss(x, targets, **params).sum())(logits)
    assert (value.dtype, found.dtype) == (jnp.float32, dtype)
    found = np.asarray(found, np.float64)
    assert np.isfinite(found).all()
    if name != "soft_f":
        expected = np.sum(expected, axis=1)
    np.testing.assert_allclose(value, np.array(expected), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found, slopes, rtol=1e-2, atol=1e-6)
    large = np.abs(slopes) > 1e-9
    np.testing.assert_array_equal(np.sign(found)[large], np.sign(slopes)[large])


@pytest.mark.parametrize("name", ALL)
def test_ignored_classes_change_neither_the_value_nor_the_gradient(name):
    logits, targets, known = example()
    other = np.where(known > 0, logits, 77.0).astype(np.float32)
    flipped = np.where(known > 0, targets, 1 - targets).astype(np.float32)
    loss = LOSSES[name]
    known = jnp.asarray(known)
    before = loss(*on_device(logits, targets), known)
    after = loss(*on_device(other, flipped), known)
    np.testing.assert_array_equal(before, after)
    slope = jax.grad(lambda x: loss(x, jnp.asarray(flipped), known).sum())(
        jnp.asarray(other)
    )
    np.testing.assert_array_equal(np.asarray(slope)[np.asarray(known) == 0], 0.0)


@pytest.mark.parametrize("name", ALL)
def test_an_example_without_known_classes_is_finite_with_gradient_zero(name):
    logits, targets, _ = on_device(*example())
    known = jnp.zeros_like(targets)
    value, slope = jax.value_and_grad(lambda x: LOSSES[name](x, targets, known).sum())(
        logits
    )
    assert np.isfinite(value)
    np.testing.assert_array_equal(slope, np.zeros_like(slope))


@pytest.mark.parametrize("name", ALL)
def test_gradients_equal_finite_differences(name):
    logits, targets, known = example(2, 4, seed=3)
    loss = jax.jit(LOSSES[name])
    targets, known = on_device(targets, known)
    slope = jax.grad(lambda x: loss(x, targets, known).sum())(jnp.asarray(logits))
    step = 1e-2
    for index in np.ndindex(*logits.shape):
        up, down = logits.copy(), logits.copy()
        up[index] += step
        down[index] -= step
        ends = [float(loss(jnp.asarray(x), targets, known).sum()) for x in (up, down)]
        estimate = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(slope[index], estimate, atol=2e-3)


@pytest.mark.parametrize("name", ALL)
def test_bfloat16_inputs_are_computed_in_float32(name):
    low = [jnp.asarray(array, jnp.bfloat16) for array in example()]
    high = [array.astype(jnp.float32) for array in low]
    np.testing.assert_array_equal(LOSSES[name](*low), LOSSES[name](*high))


@pytest.mark.parametrize("name", ALL)
def test_each_example_depends_on_itself_alone(name):
    arrays = on_device(*example())
    together = LOSSES[name](*arrays)
    alone = LOSSES[name](*(array[2:3] for array in arrays))
    np.testing.assert_allclose(alone, together[2:3], rtol=1e-6)


def embeddings(seed=0):
    rng = np.random.default_rng(seed)
    return on_device(*rng.normal(size=(2, 6, 9)).astype(np.float32))


def test_embedding_loss_equals_one_minus_the_cosine():
    predicted, target = embeddings()
    expected = []
    for p, t in zip(np.float64(predicted), np.float64(target), strict=True):
        expected.append(1 - p @ t / (np.linalg.norm(p) * np.linalg.norm(t)))
    np.testing.assert_allclose(embedding(predicted, target), expected, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_embedding_loss_does_not_depend_on_either_length(scale):
    predicted, target = embeddings()
    base = embedding(predicted, target)
    np.testing.assert_allclose(embedding(scale * predicted, target), base, atol=1e-6)
    np.testing.assert_allclose(embedding(predicted, scale * target), base, atol=1e-6)


def test_embedding_loss_is_between_zero_and_two():
    predicted, _ = embeddings()
    np.testing.assert_allclose(embedding(predicted, predicted), 0.0, atol=1e-6)
    np.testing.assert_allclose(embedding(predicted, -predicted), 2.0, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("zero", ["predicted", "target", "both"])
def test_embedding_loss_of_a_zero_vector_is_one_with_finite_gradient(zero, dtype):
    predicted, target = (array.astype(dtype) for array in embeddings())
    predicted = predicted if zero == "target" else jnp.zeros_like(predicted)
    target = target if zero == "predicted" else jnp.zeros_like(target)
    np.testing.assert_array_equal(embedding(predicted, target), np.ones(6))
    slopes = jax.grad(lambda p, t: embedding(p, t).sum(), argnums=(0, 1))(
        predicted, target
    )
    for slope in slopes:
        assert np.all(np.isfinite(np.asarray(slope, np.float32)))


def test_the_gradient_of_a_zero_prediction_has_length_ten_thousand():
    predicted, target = embeddings()
    slope = jax.grad(lambda p: embedding(p, target).sum())(jnp.zeros_like(predicted))
    np.testing.assert_allclose(np.linalg.norm(slope, axis=1), 1e4, rtol=1e-5)


def test_a_target_has_a_direction_from_a_millionth_on():
    lengths = np.array([[0.0], [0.9e-6], [1.1e-6], [1.0]], np.float32)
    found = has_direction(jnp.asarray(lengths * np.array([[0.6, -0.8]], np.float32)))
    np.testing.assert_array_equal(found, [0.0, 0.0, 1.0, 1.0])
    unit = jnp.asarray([[0.6, -0.8]])
    for length, expected in ((1.1e-6, 0.0), (0.5e-6, 0.5)):
        loss = embedding(unit, jnp.float32(length) * unit)
        np.testing.assert_allclose(loss, expected, atol=1e-5)


def test_a_zero_target_does_not_move_the_prediction():
    predicted, target = embeddings()
    slope = jax.grad(lambda p: embedding(p, jnp.zeros_like(target)).sum())(predicted)
    np.testing.assert_array_equal(slope, np.zeros_like(slope))


def test_has_positive_is_zero_only_without_any_label():
    targets = jnp.array([[0.0, 0.0], [0.0, 1.0], [0.2, 0.0]])
    np.testing.assert_array_equal(has_positive(targets), [0.0, 1.0, 1.0])
    np.testing.assert_array_equal(has_known(targets), [0.0, 1.0, 1.0])


@pytest.mark.parametrize("name", ALL)
def test_without_known_every_class_counts(name):
    logits, targets, _ = on_device(*example())
    expected = LOSSES[name](logits, targets, known=jnp.ones_like(targets))
    np.testing.assert_array_equal(LOSSES[name](logits, targets), expected)


@pytest.mark.parametrize("name", ALL)
def test_numpy_arrays_and_integer_targets_give_the_same_as_jax_arrays(name):
    logits, targets, known = example()
    targets = (targets > 0.5).astype(np.int64)
    expected = LOSSES[name](*on_device(logits, np.float32(targets), known))
    found = LOSSES[name](np.float64(logits), targets, known > 0)
    np.testing.assert_array_equal(found, expected)


@pytest.fixture
def without_shape_checks():
    """Calls functions as in production, where annotations are not checked."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_arrays_are_not_broadcast(name, compiled):
    logits, targets, known = on_device(*example())
    loss = jax.jit(LOSSES[name]) if compiled else LOSSES[name]
    shapes = r"logits has shape \(5, 7\) and {} has shape \({}\); use arrays of"
    for other, shape in ((targets[0], "7,"), (targets[:1], "1, 7")):
        with pytest.raises(InputError, match=shapes.format("targets", shape)):
            loss(logits, other, known)
    with pytest.raises(InputError, match=shapes.format("known", "7,")):
        loss(logits, targets, known[0])


@pytest.mark.usefixtures("without_shape_checks")
def test_embeddings_are_not_broadcast():
    predicted, target = embeddings()
    with pytest.raises(InputError, match=r"predicted has shape .* and target has"):
        embedding(predicted, target[0])


def test_the_examples_in_the_docstrings_are_true():
    results = doctest.testmod(losses)
    assert results.failed == 0 and results.attempted == 10


def test_the_losses_are_a_visible_table():
    assert ALL == ["asl", "bce", "focal", "soft_f"]
