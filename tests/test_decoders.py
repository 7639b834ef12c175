"""Tests decoders that are fitted on one split, saved, and scored on another."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.metrics import fbeta_score

from jaxii.decoding.calibration import calibrate
from jaxii.decoding.decoders import (
    NAMES,
    embedding_decoder,
    expected_f2_decoder,
    fit,
    fit_decoders,
    label_lists,
    load,
    threshold_decoder,
    top_k_decoder,
)
from jaxii.decoding.label_shift import frequencies
from jaxii.decoding.thresholds import DEFAULT_THRESHOLDS, choose, class_thresholds
from jaxii.errors import InputError
from jaxii.metrics import streaming
from jaxii.metrics.f_beta import f_beta

NUM_CLASSES = 12
RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(NUM_CLASSES, 4)).astype(np.float32)


def split(num_images, seed):
    """Returns probabilities that are far too high, embeddings, labels and slices."""
    rng = np.random.default_rng(seed)
    true = rng.beta(0.3, 1.2, (num_images, NUM_CLASSES))
    targets = rng.random(true.shape) < true
    embedding = targets @ VECTORS + rng.normal(0, 0.5, (num_images, 4))
    slices = 2 * rng.integers(0, 2, num_images)
    probs = np.sqrt(true).astype(np.float32)
    return probs, embedding.astype(np.float32), targets, slices


@pytest.fixture(scope="module")
def sums():
    probs, embedding, targets, _ = split(600, 1)
    acc = streaming.empty(NUM_CLASSES, DEFAULT_THRESHOLDS)
    return jax.device_get(
        jax.jit(streaming.update)(
            acc,
            jnp.asarray(probs),
            jnp.asarray(targets),
            None,
            jnp.ones(600),
            jnp.asarray(embedding),
            jnp.asarray(VECTORS),
        )
    )


@pytest.fixture(scope="module")
def decoders(sums):
    return fit_decoders(sums, choose(sums), label_embeddings=VECTORS)


def answers(decoders, seed=2):
    probs, embedding, _, _ = split(400, seed)
    return decoders.decisions(decoders.names(has_head=True), probs, embedding)


def test_each_decoder_gets_what_was_fitted_for_it(sums, decoders):
    probs, _, _, _ = split(400, 2)
    choice, got = choose(sums), answers(decoders)
    histogram = np.asarray(sums.sums.histogram)
    calibration = calibrate(histogram, DEFAULT_THRESHOLDS)
    home = frequencies(histogram, DEFAULT_THRESHOLDS, calibration)
    logits = 0.8 * logit(calibration(probs)) + 0.2 * logit(home)
    likely = threshold_decoder(probs, threshold=choice.threshold, at_least_one=True)
    own = class_thresholds(sums, choice.threshold)
    want = {
        "threshold": likely,
        "per_class": threshold_decoder(probs, threshold=own, at_least_one=True),
        "expected_f2": expected_f2_decoder(expit(logits)),
    }
    for name, chosen in want.items():
        np.testing.assert_array_equal(got[name], chosen, err_msg=name)
    assert np.all(got["top_k"].sum(axis=1) == choice.top_k)
    assert np.all(got["embedding"].sum(axis=1) == choice.embedding_k)


def test_no_decoder_leaves_an_image_without_a_label(decoders):
    probs = np.zeros((3, NUM_CLASSES), np.float32)
    embedding = np.zeros((3, 4), np.float32)
    for chosen in decoders.decisions(NAMES, probs, embedding).values():
        assert np.all(chosen.any(axis=1))


def test_calibration_raises_the_f2_of_the_expected_f2_decoder(decoders):
    probs, _, targets, _ = split(400, 2)
    raw, calibrated = expected_f2_decoder(probs), answers(decoders)["expected_f2"]
    f2s = [
        fbeta_score(targets, chosen, beta=2, average="samples", zero_division=0)
        for chosen in (raw, calibrated)
    ]
    assert f2s[1] > f2s[0] + 0.01


def test_answers_are_label_ids_the_most_probable_first(decoders):
    probs = np.array([[0.1] * 10 + [0.9, 0.8]], np.float32)
    ids = decoders.answer("top_k")(probs, None)
    assert ids[0][:2].tolist() == [10, 11]
    assert len(ids[0]) == decoders.choice.top_k


def test_decoders_are_the_same_after_saving(decoders, tmp_path):
    path = tmp_path / "decoders.npz"
    offsets = {"expected_f2": 0.1, "threshold": -0.2}
    decoders = dataclasses.replace(decoders, expected_f2_offsets=offsets)
    decoders.save(path)
    again = load(path, VECTORS)
    assert again.choice == decoders.choice
    assert again.expected_f2_offsets == offsets
    want = answers(decoders)
    for name, chosen in answers(again).items():
        np.testing.assert_array_equal(chosen, want[name])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_without_an_embedding_its_decoder_is_missing(sums, decoders, tmp_path):
    choice = dataclasses.replace(choose(sums), embedding_k=None)
    plain = fit_decoders(sums, choice, label_embeddings=None)
    plain.save(tmp_path / "d.npz")
    names = load(tmp_path / "d.npz", None).names(has_head=True)
    assert set(NAMES) - set(names) == {"embedding"}
    assert set(NAMES) - set(decoders.names(has_head=False)) == {"embedding"}


def test_the_offset_of_a_decoder_is_added_to_what_it_expects(decoders):
    probs, _, _, _ = split(50, 2)
    chosen = answers(decoders)["threshold"][:50]
    offsets = {"threshold": 0.25, "top_k": 0.5}
    moved = dataclasses.replace(decoders, expected_f2_offsets=offsets)
    raw = decoders.expected_f2("threshold", probs, chosen)
    np.testing.assert_array_equal(raw, decoders.expected_f2("top_k", probs, chosen))
    got = moved.expected_f2("threshold", probs, chosen)
    np.testing.assert_array_equal(got, raw + 0.25)


def test_a_decoder_that_cannot_answer_is_refused(decoders):
    with pytest.raises(InputError, match=r"needs the embedding head.*earlier --stage"):
        decoders.check("embedding", decoders.names(has_head=False))


@pytest.mark.parametrize("has_head", [False, True])
def test_a_decoder_that_does_not_exist_is_refused_by_name(decoders, has_head):
    reason = "'expected_f3' is not a decoder; the nearest is expected_f2; use one of"
    with pytest.raises(InputError, match=reason):
        decoders.check("expected_f3", decoders.names(has_head=has_head))


@pytest.mark.parametrize("text", [None, b"", b"PK\x03\x04 no more", b"text"])
def test_a_file_that_holds_no_decoders_is_refused(tmp_path, text):
    path = tmp_path / "decoders.npz"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(InputError, match="run evaluate with the same --workdir first"):
        load(path, None)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("threshold", np.nan, "threshold is outside"),
        ("threshold", 1.5, "threshold is outside"),
        ("class_thresholds", np.full(NUM_CLASSES, np.nan), "class_thresholds is out"),
        ("slopes", np.full(NUM_CLASSES, np.inf), "slopes has a non-finite"),
        ("top_k", 0, "top_k is below 1 or embedding_k is below 0"),
        ("embedding_k", -1, "top_k is below 1 or embedding_k is below 0"),
        ("threshold", -0.01, "threshold is outside"),
        ("class_thresholds", np.full(NUM_CLASSES, 1.01), "class_thresholds is out"),
        ("intercepts", np.full(NUM_CLASSES, -np.inf), "intercepts has a non-finite"),
        ("frequencies", np.full(NUM_CLASSES, np.nan), "frequencies has a non-finite"),
        ("offsets", [np.nan], "offsets has a non-finite"),
    ],
)
def test_parameters_that_no_fit_gives_are_refused(
    decoders, tmp_path, name, value, reason
):
    path = tmp_path / "decoders.npz"
    dataclasses.replace(decoders, expected_f2_offsets={"top_k": 0.0}).save(path)
    with np.load(path) as stored:
        arrays = dict(stored)
    arrays[name] = np.asarray(value, arrays[name].dtype)
    np.savez(path, **arrays)
    with pytest.raises(InputError, match=reason):
        load(path, None)


def test_thresholds_of_0_and_1_are_read_back(decoders, tmp_path):
    ends = np.linspace(0.0, 1.0, NUM_CLASSES)
    for threshold in (0.0, 1.0):
        choice = dataclasses.replace(decoders.choice, threshold=threshold)
        kept = dataclasses.replace(decoders, choice=choice, class_thresholds=ends)
        kept.save(tmp_path / "d.npz")
        assert load(tmp_path / "d.npz", VECTORS).choice == choice


def test_the_expected_f2_is_that_of_calibrated_probabilities(sums, decoders):
    probs, chosen = split(30, 3)[0], answers(decoders, 3)["threshold"][:30]
    calibrated = calibrate(np.asarray(sums.sums.histogram), DEFAULT_THRESHOLDS)(probs)
    rng = np.random.default_rng(0)
    drawn = rng.random((4000, *probs.shape)) < calibrated
    f2 = f_beta(np.broadcast_to(chosen, drawn.shape), drawn).mean(axis=0)
    expected = decoders.expected_f2("threshold", probs, chosen)
    np.testing.assert_allclose(expected, f2, atol=0.03)


def test_a_decoder_tells_its_parameter(decoders):
    choice = decoders.choice
    assert decoders.parameter("threshold") == {"threshold": choice.threshold}
    assert decoders.parameter("top_k") == {"k": choice.top_k}
    assert decoders.parameter("embedding") == {"k": choice.embedding_k}
    assert decoders.parameter("expected_f2") == {}


# Single decoders.


def scores_of(*rows):
    return np.asarray(rows, np.float32)


def test_a_score_on_the_threshold_is_predicted():
    scores = scores_of([0.1, np.nextafter(np.float32(0.1), 0)])
    assert threshold_decoder(scores, threshold=0.1).tolist() == [[True, False]]


def test_at_least_one_gives_the_best_label_of_an_empty_answer_only():
    scores = scores_of([0.1, 0.3, 0.2], [0.6, 0.1, 0.7], [np.nan, np.nan, np.nan])
    got = threshold_decoder(scores, threshold=0.5, at_least_one=True)
    assert got.astype(int).tolist() == [[0, 1, 0], [1, 0, 1], [1, 0, 0]]


def test_every_class_can_have_a_threshold_of_its_own():
    scores = scores_of([0.5, 0.5, 0.5], [0.1, 0.7, 0.2])
    thresholds = np.array([0.2, 0.6, 0.5])
    got = threshold_decoder(scores, threshold=thresholds, at_least_one=True)
    assert got.astype(int).tolist() == [[1, 0, 1], [0, 1, 0]]


def test_without_at_least_one_an_answer_may_be_empty():
    assert not threshold_decoder(scores_of([0.1, 0.2]), threshold=0.5).any()


def test_no_images_give_no_answers():
    none = np.zeros((0, 3), np.float32)
    got = threshold_decoder(none, threshold=0.5, at_least_one=True)
    assert got.shape == (0, 3)
    assert top_k_decoder(none, k=2).shape == (0, 3)


@pytest.mark.parametrize("k", [1, 3, 7, 9])
def test_top_k_equals_a_stable_sort(k):
    scores = np.random.default_rng(0).integers(0, 4, (50, 7)).astype(np.float32)
    got = top_k_decoder(scores, k=k)
    want = np.zeros_like(got)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    np.put_along_axis(want, order, True, axis=1)
    np.testing.assert_array_equal(got, want)


def test_a_score_without_a_number_is_the_last_of_all():
    scores = scores_of([np.nan, -3.0, 0.0, np.nan])
    assert top_k_decoder(scores, k=2).tolist() == [[False, True, True, False]]


def test_every_image_can_have_a_k_of_its_own():
    scores = np.random.default_rng(1).integers(0, 4, (50, 7)).astype(np.float32)
    ks = np.random.default_rng(2).integers(1, 10, 50)
    got = top_k_decoder(scores, k=ks)
    want = [
        top_k_decoder(row[None], k=int(k))[0] for row, k in zip(scores, ks, strict=True)
    ]
    np.testing.assert_array_equal(got, want)


def test_top_k_of_less_than_one_is_refused():
    with pytest.raises(InputError, match="k=0"):
        top_k_decoder(scores_of([0.1]), k=0)


def test_embedding_decoder_does_not_depend_on_lengths():
    labels = scores_of([1, 0], [0, 100], [-1, -1])
    got = embedding_decoder(scores_of([3, 0.1]), label_embeddings=labels, k=1)
    assert got.tolist() == [[True, False, False]]


def test_embedding_decoder_takes_zero_vectors():
    labels = scores_of([0, 0], [-1, 0])
    got = embedding_decoder(scores_of([1, 0], [0, 0]), label_embeddings=labels, k=1)
    assert got.tolist() == [[True, False], [True, False]]


def test_label_lists_are_ordered_by_score_when_scores_are_given():
    scores = scores_of([0.6, 0.1, 0.7], [0.1, 0.2, 0.1])
    chosen = scores >= 0.5
    assert [ids.tolist() for ids in label_lists(chosen)] == [[0, 2], []]
    assert [ids.tolist() for ids in label_lists(chosen, scores)] == [[2, 0], []]


# Fitting on plain arrays.


@pytest.mark.parametrize("name", ["threshold", "per_class", "top_k", "expected_f2"])
def test_a_decoder_fitted_on_arrays_is_that_of_the_sums(sums, decoders, name):
    probs, _, targets, _ = split(600, 1)
    new = split(400, 2)[0]
    got = fit(probs, targets, decoder=name)(new)
    np.testing.assert_array_equal(got, decoders.decisions([name], new, None)[name])
    on_devices = fit(jnp.asarray(probs), jnp.asarray(targets), decoder=name)
    np.testing.assert_array_equal(on_devices(jnp.asarray(new)), got)


def test_a_decoder_is_fitted_on_lists_too():
    probs, _, targets, _ = split(30, 1)
    decode = fit(probs.tolist(), targets.tolist())
    np.testing.assert_array_equal(decode(probs.tolist()), fit(probs, targets)(probs))


def test_a_larger_beta_gives_more_labels():
    probs, _, targets, _ = split(600, 1)
    counts = [fit(probs, targets, beta)(probs).sum() for beta in (0.5, 1.0, 2.0)]
    assert counts[0] < counts[1] < counts[2]


def test_the_threshold_of_a_fit_is_the_best_of_the_grid_for_its_beta():
    probs, _, targets, _ = split(600, 1)

    def score(chosen):
        return fbeta_score(targets, chosen, beta=1, average="samples", zero_division=0)

    best = max(score(probs >= np.float32(t)) for t in DEFAULT_THRESHOLDS)
    found = fit(probs, targets, 1.0)(probs)
    assert score(found) == pytest.approx(best, abs=0.01)


@pytest.mark.parametrize(
    ("shape", "changes", "reason"),
    [
        (
            (3, 4),
            {"decoder": "embedding"},
            "decoder='embedding' .* use one of expected_f2",
        ),
        ((3, 4), {"decoder": "expected_f2", "beta": 1.0}, "expected_f2 maximises F2"),
        ((3, 5), {}, r"probs has shape \(3, 4\) and targets has shape \(3, 5\)"),
        ((0, 4), {}, "at least one image"),
        ((3, 4), {"beta": 0.0}, "beta=0.0 is not allowed; use a finite number above"),
        ((3, 4), {"beta": -1.0}, "finite number above 0"),
        ((3, 4), {"beta": np.nan}, "finite number above 0"),
        ((3, 4), {"beta": np.inf}, "finite number above 0"),
    ],
)
def test_arrays_that_cannot_be_fitted_are_refused(shape, changes, reason):
    probs = np.full((min(shape[0], 3), 4), 0.5, np.float32)
    with pytest.raises(InputError, match=reason):
        fit(probs, np.zeros(shape, bool), **changes)


def test_arrays_of_one_dimension_are_refused():
    probs, _, targets, _ = split(30, 1)
    with pytest.raises(InputError, match=r"shape \(12,\).*\[image, class\]"):
        fit(probs[0], targets[0])
    decode = fit(probs, targets)
    for wrong in (probs[0], probs[:, 1:]):
        with pytest.raises(InputError, match=r"shape \(.*\[image, 12\]"):
            decode(wrong)


@pytest.mark.parametrize("number", [-0.1, 1.1, np.nan, np.inf])
@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_numbers_that_are_no_probabilities_are_refused(number, array):
    probs, _, targets, _ = split(30, 1)
    decode = fit(probs, targets)
    probs[7, 3] = number
    with pytest.raises(InputError, match=r"outside \[0, 1\].*sigmoid"):
        fit(array(probs), targets)
    with pytest.raises(InputError, match=r"outside \[0, 1\].*sigmoid"):
        decode(array(probs))


def test_no_images_are_decoded_to_no_rows():
    probs, _, targets, _ = split(30, 1)
    assert fit(probs, targets)(probs[:0]).shape == (0, NUM_CLASSES)
