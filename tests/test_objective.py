"""Tests targets from sparse labels, weights of images in terms, and invalid terms."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxii.errors import InputError
from jaxii.objective import losses
from jaxii.objective.objective import make_objective, targets_from_labels

NUM_CLASSES = 7
VECTORS = np.eye(NUM_CLASSES)


def sparse(*rows, slots=4):
    """Returns label_ids and confidences from rows of (label, confidence) pairs."""
    ids = np.full((len(rows), slots), -1, np.int32)
    confidences = np.zeros((len(rows), slots), np.float32)
    for i, row in enumerate(rows):
        for j, (label, confidence) in enumerate(row):
            ids[i, j], confidences[i, j] = label, confidence
    return jnp.asarray(ids), jnp.asarray(confidences)


def targets_of(*rows, unknown="negative"):
    pair = targets_from_labels(*sparse(*rows), num_classes=NUM_CLASSES, unknown=unknown)
    return tuple(np.asarray(array) for array in pair)


def by_loop(ids, confidences, unknown):
    targets = np.zeros((len(ids), NUM_CLASSES), np.float32)
    known = np.full_like(targets, unknown == "negative")
    for i in range(len(ids)):
        for label, confidence in zip(ids[i], confidences[i], strict=True):
            if label >= 0:
                targets[i, label] = max(targets[i, label], confidence)
                known[i, label] = 1.0
    return targets, known


def objective_of(terms, num_steps=100, unknown="negative"):
    return make_objective(
        terms, num_steps=num_steps, num_classes=NUM_CLASSES, unknown=unknown
    )


def weights_of(objective, *rows, mask=None, vectors=VECTORS):
    """Returns the weights of images with these rows of (label, confidence) pairs."""
    targets, known = objective.targets(*sparse(*rows))
    return objective.example_weights(
        targets=targets,
        known=known,
        mask=jnp.asarray(mask or [1.0] * len(rows), jnp.float32),
        label_embeddings=None if vectors is None else jnp.asarray(vectors, jnp.float32),
    )


def step(number):
    return jnp.asarray(number, jnp.int32)


@pytest.mark.parametrize("unknown", ["negative", "ignored"])
def test_targets_are_those_of_a_loop(unknown):
    rng = np.random.default_rng(0)
    ids = rng.integers(-1, NUM_CLASSES, (16, 5)).astype(np.int32)
    confidences = rng.random((16, 5)).astype(np.float32)
    targets, known = targets_from_labels(
        jnp.asarray(ids),
        jnp.asarray(confidences),
        num_classes=NUM_CLASSES,
        unknown=unknown,
    )
    expected_targets, expected_known = by_loop(ids, confidences, unknown)
    np.testing.assert_array_equal(targets, expected_targets)
    np.testing.assert_array_equal(known, expected_known)


def test_a_label_listed_twice_takes_its_larger_confidence():
    for row in ([(2, 0.3), (2, 0.9)], [(2, 0.9), (2, 0.3)], [(2, 0.9), (2, 0.0)]):
        targets, _ = targets_of(row)
        assert targets[0, 2] == np.float32(0.9)


def test_padding_touches_no_class():
    targets, known = targets_of([(0, 1.0)], [], unknown="ignored")
    np.testing.assert_array_equal(targets.sum(axis=1), [1.0, 0.0])
    np.testing.assert_array_equal(known.sum(axis=1), [1.0, 0.0])


def test_the_last_class_is_not_confused_with_padding():
    targets, _ = targets_of([(NUM_CLASSES - 1, 1.0)], [])
    np.testing.assert_array_equal(targets[:, -1], [1.0, 0.0])


def test_an_unknown_class_trains_as_negative_or_not_at_all():
    _, negative = targets_of([(1, 1.0)], unknown="negative")
    _, ignored = targets_of([(1, 1.0)], unknown="ignored")
    np.testing.assert_array_equal(negative[0], np.ones(NUM_CLASSES))
    np.testing.assert_array_equal(ignored[0], np.eye(NUM_CLASSES)[1])


def test_verified_absent_is_known_and_zero():
    targets, known = targets_of([(3, 0.0)], unknown="ignored")
    assert targets[0, 3] == 0.0
    assert known[0, 3] == 1.0


def test_without_a_positive_label_an_image_counts_in_cross_entropy_alone():
    objective = objective_of({"bce": 1.0, "soft_f": 1.0, "embedding": 1.0})
    weights = weights_of(objective, [(1, 1.0)], [(2, 0.0)], [])
    np.testing.assert_array_equal(weights["bce"], [1.0, 1.0, 1.0])
    np.testing.assert_array_equal(weights["soft_f"], [1.0, 0.0, 0.0])
    np.testing.assert_array_equal(weights["embedding"], [1.0, 0.0, 0.0])


def test_padding_counts_in_no_term():
    objective = objective_of({"bce": 1.0, "focal": 1.0, "soft_f": 1.0, "embedding": 1})
    weights = weights_of(objective, [(1, 1.0)], [(1, 1.0)], mask=[1.0, 0.0])
    for name, weight in weights.items():
        np.testing.assert_array_equal(weight, [1.0, 0.0], err_msg=name)


@pytest.mark.parametrize("name", ["bce", "focal", "asl"])
def test_an_image_without_a_known_class_has_weight_zero_in_terms_over_classes(name):
    objective = objective_of({name: 1.0}, unknown="ignored")
    weights = weights_of(objective, [(1, 1.0)], [(2, 0.0)], [])
    np.testing.assert_array_equal(weights[name], [1.0, 1.0, 0.0])


def test_a_positive_label_that_is_not_known_gives_no_weight_to_soft_f():
    objective = objective_of({"soft_f": 1.0}, unknown="ignored")
    targets = jnp.eye(2, NUM_CLASSES)
    weights = objective.example_weights(
        targets=targets,
        known=targets.at[1].set(0.0),
        mask=jnp.ones(2),
        label_embeddings=None,
    )
    np.testing.assert_array_equal(weights["soft_f"], [1.0, 0.0])


def test_an_image_whose_label_embeddings_sum_to_zero_has_no_embedding_weight():
    objective = objective_of({"bce": 1.0, "embedding": 1.0})
    vectors = np.eye(NUM_CLASSES, 3, dtype=np.float32)
    vectors[5], vectors[6] = 0.0, -vectors[1]
    weights = weights_of(
        objective,
        [(1, 1.0)],
        [(5, 1.0)],
        [(1, 1.0), (6, 1.0)],
        [(1, 1.0), (5, 1.0)],
        vectors=vectors,
    )
    np.testing.assert_array_equal(weights["bce"], [1.0, 1.0, 1.0, 1.0])
    np.testing.assert_array_equal(weights["embedding"], [1.0, 0.0, 0.0, 1.0])


@pytest.mark.parametrize("unknown", ["negative", "ignored"])
def test_each_term_is_its_loss_for_every_image(unknown):
    objective = objective_of(
        {"bce": 1.0, "focal": {"gamma": 1.5, "alpha": None}, "soft_f": {"beta": 1.0}},
        unknown=unknown,
    )
    targets, known = objective.targets(*sparse([(1, 1.0), (2, 0.5)], [(0, 1.0)]))
    logits = jax.random.normal(jax.random.key(0), targets.shape)
    values = objective.losses(
        logits=logits,
        embedding=None,
        targets=targets,
        known=known,
        label_embeddings=None,
        stage_step=step(0),
    )
    expected = {
        "bce": losses.bce(logits, targets, known),
        "focal": losses.LOSSES["focal"](logits, targets, known, gamma=1.5, alpha=None),
        "soft_f": losses.LOSSES["soft_f"](logits, targets, known, beta=1.0),
    }
    assert list(values) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(values[name], value, rtol=1e-6, err_msg=name)


def test_the_embedding_aims_at_the_sum_of_embeddings_by_confidence():
    objective = objective_of({"embedding": 1.0})
    vectors = jax.random.normal(jax.random.key(1), (NUM_CLASSES, 3))
    targets, known = objective.targets(*sparse([(1, 1.0), (4, 0.5)]))
    goal = vectors[1] + jnp.float32(0.5) * vectors[4]
    for guess, expected in ((goal, 0.0), (-goal, 2.0)):
        values = objective.losses(
            logits=jnp.zeros(targets.shape),
            embedding=jnp.float32(3.0) * guess[None],
            targets=targets,
            known=known,
            label_embeddings=vectors,
            stage_step=step(0),
        )
        np.testing.assert_allclose(values["embedding"], [expected], atol=1e-5)


def test_an_embedding_term_without_label_embeddings_is_an_error():
    with pytest.raises(ValueError, match="needs label embeddings"):
        weights_of(objective_of({"embedding": 1.0}), [(1, 1.0)], vectors=None)


def test_an_embedding_term_without_a_head_is_an_error():
    objective = objective_of({"embedding": 1.0})
    targets, known = objective.targets(*sparse([(1, 1.0)]))
    with pytest.raises(ValueError, match="embedding head"):
        objective.losses(
            logits=targets,
            embedding=None,
            targets=targets,
            known=known,
            label_embeddings=None,
            stage_step=step(0),
        )


def test_weights_move_with_the_step_inside_one_compiled_program():
    objective = objective_of(
        {"bce": ((0.0, 1.0), (0.4, 1.0), (0.6, 0.0)), "focal": ((0.4, 0.0), (0.6, 2.0))}
    )
    weights = jax.jit(objective.weights)
    values = [
        {name: float(value) for name, value in weights(step(number)).items()}
        for number in (0, 40, 50, 60, 99)
    ]
    np.testing.assert_allclose([v["bce"] for v in values], [1, 1, 0.5, 0, 0])
    np.testing.assert_allclose([v["focal"] for v in values], [0, 0, 1, 2, 2])
    assert weights._cache_size() == 1


@pytest.mark.parametrize(
    ("name", "parameter", "first", "last", "others"),
    [
        ("focal", "gamma", 0.0, 2.0, {"alpha": None}),
        ("focal", "alpha", 0.0, 1.0, {}),
        ("asl", "gamma_pos", 0.0, 2.0, {}),
        ("asl", "gamma_neg", 0.0, 4.0, {}),
        ("asl", "clip", 0.0, 0.1, {}),
        ("soft_f", "beta", 1.0, 2.0, {}),
    ],
)
def test_a_parameter_of_a_loss_may_move_too(name, parameter, first, last, others):
    moving = {parameter: ((0.0, first), (1.0, last)), **others}
    objective = objective_of({name: moving})
    targets, known = objective.targets(*sparse([(1, 1.0)]))
    logits = jnp.full(targets.shape, 0.3, jnp.float32)

    @jax.jit
    def losses_at(stage_step):
        return objective.losses(
            logits=logits,
            embedding=None,
            targets=targets,
            known=known,
            label_embeddings=None,
            stage_step=stage_step,
        )

    for number, value in ((0, first), (50, (first + last) / 2), (100, last)):
        expected = losses.LOSSES[name](
            logits, targets, known, **{parameter: value}, **others
        )
        found = losses_at(step(number))[name]
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_term_whose_weight_is_always_zero_is_left_out():
    objective = objective_of(
        {"bce": 1.0, "focal": 0.0, "asl": ((0.0, 0.0), (1.0, 0.0))}
    )
    assert [term.name for term in objective.terms] == ["bce"]


def test_a_term_given_as_a_dict_has_weight_one_by_default():
    objective = objective_of({"focal": {"gamma": 2.0}})
    assert float(objective.weights(step(3))["focal"]) == 1.0


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ({"bcee": 1.0}, "'bcee'.*use one of bce"),
        ({"focal": {"gama": 2.0}}, "no parameter 'gama'.*gamma"),
        ({"embedding": {"beta": 2.0}}, "no parameter 'beta'"),
        ({"bce": 0.0}, "at least one of bce"),
        ({}, "at least one of bce"),
        ({"bce": -1.0}, "at least 0"),
        ({"bce": "much"}, "must be a number or"),
        ({"bce": ((0.5, 1.0), (0.2, 0.0))}, "ascending order"),
    ],
)
def test_a_term_that_cannot_be_is_refused(terms, words):
    with pytest.raises(InputError, match=words):
        objective_of(terms)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(
    ("name", "parameter", "value", "allowed"),
    [
        ("focal", "gamma", -2.0, "finite and at least 0"),
        ("focal", "gamma", math.nan, "finite and at least 0"),
        ("focal", "alpha", 2.0, "from 0 to 1, or None"),
        ("asl", "gamma_pos", math.inf, "finite and at least 0"),
        ("asl", "gamma_neg", -1.0, "finite and at least 0"),
        ("asl", "clip", 5, "at least 0 and below 1"),
        ("asl", "clip", 1.0, "at least 0 and below 1"),
        ("soft_f", "beta", 0.0, "finite and above 0"),
    ],
)
def test_a_parameter_outside_its_range_is_refused(
    name, parameter, value, allowed, pairs
):
    given = ((0.0, 0.5), (1.0, value)) if pairs else value
    words = f"{parameter} of term '{name}': value {value} must be .*{allowed}"
    with pytest.raises(InputError, match=words):
        objective_of({name: {parameter: given}})


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("focal", "gamma"),
        ("asl", "gamma_pos"),
        ("asl", "gamma_neg"),
        ("asl", "clip"),
        ("soft_f", "beta"),
    ],
)
@pytest.mark.parametrize("value", [None, True])
def test_a_parameter_that_is_no_number_is_refused(name, parameter, value):
    words = f"{parameter} of term '{name}'={value} must be a number or"
    with pytest.raises(InputError, match=words):
        objective_of({name: {parameter: value}})


@pytest.mark.parametrize("name", losses.LOSSES)
def test_the_defaults_of_a_loss_are_in_range(name):
    defaults = {
        parameter.name: parameter.default
        for parameter in inspect.signature(losses.LOSSES[name]).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    (term,) = objective_of({name: defaults}).terms
    assert term.params == defaults


@pytest.fixture
def added(monkeypatch):
    """Adds a loss to the table for one test."""

    def add(loss):
        monkeypatch.setitem(losses.LOSSES, "poly", loss)

    return add


def test_an_added_loss_is_called_with_its_own_parameter(added):
    def poly(logits, targets, known=None, *, epsilon=1.0):
        return epsilon * losses.bce(logits, targets, known)

    added(poly)
    objective = objective_of({"poly": {"weight": 0.5, "epsilon": -2.0}})
    logits = jnp.ones((2, NUM_CLASSES))
    (found,) = objective.losses(
        logits=logits,
        embedding=None,
        targets=logits,
        known=logits,
        label_embeddings=None,
        stage_step=step(0),
    ).values()
    np.testing.assert_array_equal(found, -2.0 * losses.bce(logits, logits, logits))
    for value in (math.nan, math.inf):
        words = f"epsilon of term 'poly': value {value} must be finite; the default is"
        with pytest.raises(InputError, match=words):
            objective_of({"poly": {"epsilon": value}})


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (lambda logits, targets: logits, "too many positional arguments"),
        (
            lambda logits, targets, known=None, *, epsilon: logits,
            "missing a required .*argument: 'epsilon'",
        ),
    ],
)
def test_an_added_loss_of_another_signature_is_refused(added, loss, reason):
    added(loss)
    words = rf"'poly' .* signature \(logits, .*{reason}.*use \(logits, targets, known"
    with pytest.raises(InputError, match=words):
        objective_of({"poly": 1.0})


def test_another_use_of_unknown_classes_is_refused():
    with pytest.raises(InputError, match="use one of negative, ignored"):
        objective_of({"bce": 1.0}, unknown="positive")


def test_a_message_about_a_weight_names_its_term():
    with pytest.raises(InputError, match="soft_f"):
        objective_of({"bce": 1.0, "soft_f": ((0.0, 1.0), (2.0, 0.0))})
