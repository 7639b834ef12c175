"""Decoders fitted on one split, kept in a file, scored on another."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import fbeta_score

from jaxii.decoding.calibration import calibrate
from jaxii.decoding.decode import threshold_decoder
from jaxii.decoding.decoders import NAMES, fit, load
from jaxii.decoding.expected_f import expected_f2_decoder
from jaxii.decoding.thresholds import DEFAULT_THRESHOLDS, choose, class_thresholds
from jaxii.errors import InputError
from jaxii.evaluation.decoder_scores import Scores
from jaxii.metrics import streaming

NUM_CLASSES = 12
SLICES = ("light", "none of these", "dark")
RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(NUM_CLASSES, 4)).astype(np.float32)


def split(num_images, seed):
    """Probabilities that are far too high, embeddings, labels, and slices."""
    rng = np.random.default_rng(seed)
    true = rng.beta(0.3, 1.2, (num_images, NUM_CLASSES))
    targets = rng.random(true.shape) < true
    embedding = targets @ VECTORS + rng.normal(0, 0.5, (num_images, 4))
    slices = 2 * rng.integers(0, 2, num_images)
    probs = np.sqrt(true).astype(np.float32)
    return probs, embedding.astype(np.float32), targets, slices


@pytest.fixture(scope="module")
def sums():
    probs, embedding, targets, slices = split(600, 1)
    acc = streaming.empty(NUM_CLASSES, 3, DEFAULT_THRESHOLDS)
    return jax.device_get(
        jax.jit(streaming.update)(
            acc,
            jnp.asarray(probs),
            jnp.asarray(targets),
            None,
            jnp.ones(600),
            jnp.asarray(slices, jnp.int32),
            jnp.asarray(embedding),
            jnp.asarray(VECTORS),
        )
    )


@pytest.fixture(scope="module")
def decoders(sums):
    return fit(sums, choose(sums), label_embeddings=VECTORS)


def answers(decoders, seed=2):
    probs, embedding, _, _ = split(400, seed)
    return decoders.answers(decoders.names(has_head=True), probs, embedding)


def test_each_decoder_gets_what_was_fitted_for_it(sums, decoders):
    probs, _, _, _ = split(400, 2)
    choice, got = choose(sums), answers(decoders)
    histogram = np.asarray(sums.sums.histogram)
    calibrated = calibrate(histogram, DEFAULT_THRESHOLDS)(probs)
    likely = threshold_decoder(probs, threshold=choice.threshold, at_least_one=True)
    own = class_thresholds(sums, choice.threshold)
    want = {
        "threshold": likely,
        "per_class": threshold_decoder(probs, threshold=own, at_least_one=True),
        "expected_f2": expected_f2_decoder(calibrated),
    }
    for name, chosen in want.items():
        np.testing.assert_array_equal(got[name], chosen, err_msg=name)
    assert np.all(got["top_k"].sum(axis=1) == choice.top_k)
    assert np.all(got["embedding"].sum(axis=1) == choice.embedding_k)


def test_no_decoder_leaves_an_image_without_a_label(decoders):
    probs = np.zeros((3, NUM_CLASSES), np.float32)
    embedding = np.zeros((3, 4), np.float32)
    for chosen in decoders.answers(NAMES, probs, embedding).values():
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
    decoders.save(path)
    again = load(path, VECTORS)
    assert again.choice == decoders.choice
    want = answers(decoders)
    for name, chosen in answers(again).items():
        np.testing.assert_array_equal(chosen, want[name])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_without_an_embedding_its_decoder_is_missing(sums, decoders, tmp_path):
    choice = dataclasses.replace(choose(sums), embedding_k=None)
    plain = fit(sums, choice, label_embeddings=None)
    plain.save(tmp_path / "d.npz")
    names = load(tmp_path / "d.npz", None).names(has_head=True)
    assert set(NAMES) - set(names) == {"embedding"}
    assert set(NAMES) - set(decoders.names(has_head=False)) == {"embedding"}


def test_a_decoder_that_cannot_answer_is_refused(decoders):
    with pytest.raises(InputError, match=r"needs the embedding head.*earlier --stage"):
        decoders.check("embedding", decoders.names(has_head=False))


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
        ("slopes", np.full(NUM_CLASSES, np.inf), "slopes has a number"),
        ("top_k", 0, "a number of labels is below 1"),
    ],
)
def test_parameters_that_no_fit_gives_are_refused(
    decoders, tmp_path, name, value, reason
):
    path = tmp_path / "decoders.npz"
    decoders.save(path)
    with np.load(path) as stored:
        arrays = dict(stored)
    arrays[name] = np.asarray(value, arrays[name].dtype)
    np.savez(path, **arrays)
    with pytest.raises(InputError, match=reason):
        load(path, None)


def test_a_decoder_tells_its_parameter(decoders):
    choice = decoders.choice
    assert decoders.parameter("threshold") == {"threshold": choice.threshold}
    assert decoders.parameter("top_k") == {"k": choice.top_k}
    assert decoders.parameter("embedding") == {"k": choice.embedding_k}
    assert decoders.parameter("expected_f2") == {}


# Scores.


@pytest.fixture(scope="module")
def scores(decoders):
    probs, embedding, targets, slices = split(400, 2)
    offsets = np.concatenate([[0], np.cumsum(targets.sum(axis=1))])
    found = Scores(
        decoders,
        decoders.names(has_head=True),
        in_use="per_class",
        offsets=offsets,
        label_ids=np.nonzero(targets)[1].astype(np.int32),
        scored=np.ones(400, bool),
        slice_ids=slices,
        slices=SLICES,
        groups=np.arange(400) // 2,
    )
    order = np.random.default_rng(3).permutation(400).astype(np.int32)
    for start in range(0, 400, 64):
        rows = np.full(64, -1, np.int32)
        part = order[start : start + 64]
        rows[: len(part)] = part
        found.add(probs[rows], embedding[rows], rows)
    return found


def test_scores_are_those_of_scikit_learn(decoders, scores):
    targets, got = split(400, 2)[2], answers(decoders)
    figures = scores.figures()
    assert tuple(figures) == NAMES
    for name, chosen in got.items():
        mean = fbeta_score(targets, chosen, beta=2, average="samples", zero_division=0)
        both = 4 * targets.sum(axis=1) + chosen.sum(axis=1)
        each = 5 * (targets & chosen).sum(axis=1) / both
        found = figures[name]
        assert found["f2"] == pytest.approx(mean)
        assert found["standard_error"] == pytest.approx(np.std(each, ddof=1) / 20)
        assert found["coverage"] == np.count_nonzero((chosen & targets).any(axis=0))
        assert found["labels_per_image"] == pytest.approx(chosen.sum() / 400)


def test_the_summary_is_of_the_decoder_in_use(decoders, scores):
    _, _, targets, slices = split(400, 2)
    chosen = answers(decoders)["per_class"]
    summary = scores.summary()
    assert summary["f2"] == scores.figures()["per_class"]["f2"]
    assert summary["coverage"] == scores.figures()["per_class"]["coverage"]
    assert list(summary["slices"]) == ["light", "dark"]
    for number, name in enumerate(SLICES):
        rows = slices == number
        if rows.any():
            f2 = fbeta_score(
                targets[rows], chosen[rows], beta=2, average="samples", zero_division=0
            )
            assert summary["slices"][name]["f2"] == pytest.approx(f2)
            assert summary["slices"][name]["num_images"] == rows.sum()
    f2s = {name: s["f2"] for name, s in summary["slices"].items()}
    assert summary["worst_slice"] == min(f2s, key=f2s.get)


def test_images_without_truth_change_no_score(decoders):
    probs, embedding, targets, slices = split(400, 2)
    scored = np.random.default_rng(4).random(400) < 0.5
    targets &= scored[:, None]

    def scores_of(rows, scored):
        found = Scores(
            decoders,
            decoders.names(has_head=True),
            in_use="threshold",
            offsets=np.concatenate([[0], np.cumsum(targets[rows].sum(axis=1))]),
            label_ids=np.nonzero(targets[rows])[1].astype(np.int32),
            scored=scored,
            slice_ids=slices[rows],
            slices=SLICES,
            groups=rows // 2,
        )
        found.add(probs[rows], embedding[rows], np.arange(len(rows)))
        return found

    some = np.flatnonzero(scored)
    mixed = scores_of(np.arange(400), scored)
    alone = scores_of(some, np.ones(len(some), bool))
    summary, expected = mixed.summary(), alone.summary()
    assert summary.pop("num_images_without_truth") == 400 - len(some)
    assert expected.pop("num_images_without_truth") == 0
    assert summary == expected
    for kind in ("best", "worst"):
        shown, only = (getattr(s.images, kind)() for s in (mixed, alone))
        assert [i.row for i in shown] == [some[i.row] for i in only]


def test_a_batch_without_any_truth_scores_nothing(decoders):
    probs, embedding, _, slices = split(3, 2)
    found = Scores(
        decoders,
        ["threshold"],
        in_use="threshold",
        offsets=np.zeros(4, np.int64),
        label_ids=np.zeros(0, np.int32),
        scored=np.zeros(3, bool),
        slice_ids=slices,
        slices=SLICES,
        groups=np.arange(3),
    )
    found.add(probs, embedding, np.arange(3))
    assert not found.images.worst()
