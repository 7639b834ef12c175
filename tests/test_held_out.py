"""Tests decoders of pooled domains, errors of expected F2, and effects of adapting."""

import dataclasses

import numpy as np
import pytest

from jaxii.decoding.decoders import fit_decoders
from jaxii.decoding.thresholds import choose, f2_by_threshold
from jaxii.errors import InputError
from jaxii.evaluation.held_out import (
    HeldOut,
    Predictions,
    adaptation_gains,
    errors_of_pools,
    expected_f2_errors,
    fit,
    pool,
)

NUM_LABELS = 6


def domain(num_images=400, *, seed=0, rate=0.25, shift=0.0):
    """Returns predictions for a domain, whose logits are off by `shift`."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(np.log(rate / (1 - rate)), 2, (num_images, NUM_LABELS))
    truth = rng.random(logits.shape) < 1 / (1 + np.exp(-logits))
    return Predictions(
        image_ids=np.array([f"{seed}-{i}" for i in range(num_images)]),
        probs=(1 / (1 + np.exp(-logits - shift))).astype(np.float32),
        truth=truth,
    )


def test_what_is_kept_is_read_back(tmp_path):
    kept = domain(13)
    kept.save(tmp_path / "kept.npz", "abc")
    read = Predictions.load(tmp_path / "kept.npz", "abc")
    for field in dataclasses.fields(kept):
        before, after = getattr(kept, field.name), getattr(read, field.name)
        np.testing.assert_array_equal(before, after)
        assert before.dtype == after.dtype


def test_predictions_of_other_labels_are_refused(tmp_path):
    domain(3).save(tmp_path / "kept.npz", "abc")
    with pytest.raises(
        InputError, match=r"labels with hash abc, .* of the run have hash def"
    ):
        Predictions.load(tmp_path / "kept.npz", "def")
    (tmp_path / "kept.npz").write_bytes(b"no zip")
    with pytest.raises(InputError, match=r"is not a file of predictions .* hold_out"):
        Predictions.load(tmp_path / "kept.npz", "abc")


def test_a_pool_weighs_domains_alike_and_as_much_as_there_are_images():
    large, small = domain(600, seed=1).sums(), domain(100, seed=2, shift=1).sums()
    pooled = pool([large, small])
    curves = [f2_by_threshold(sums) for sums in (large, small)]
    np.testing.assert_allclose(f2_by_threshold(pooled), np.mean(curves, axis=0))
    histogram = np.asarray(pooled.sums.histogram)
    assert histogram[:, 0].sum() == pytest.approx(700)


def test_a_pool_of_one_domain_is_that_domain():
    sums = domain(shift=1).sums()
    alone = fit_decoders(sums, choose(sums), label_embeddings=None)
    pooled = fit([domain(shift=1)])
    np.testing.assert_array_equal(alone.calibration, pooled.calibration)
    np.testing.assert_array_equal(alone.class_thresholds, pooled.class_thresholds)
    assert alone.choice == pooled.choice


def test_the_expected_f2_of_a_domain_like_the_others_is_right():
    found = {name: domain(2000, seed=i) for i, name in enumerate("abc")}
    errors = errors_of_pools(found)
    assert set(errors) == set(found)
    for of_domain in errors.values():
        assert set(of_domain) == {"threshold", "per_class", "top_k", "expected_f2"}
        assert max(map(abs, of_domain.values())) < 0.03


def test_labels_that_occur_together_do_not_bias_the_expected_f2():
    found = [labels_in_pairs(seed) for seed in range(3)]
    decoders = fit(found[:2])
    raw = dataclasses.replace(decoders, expected_f2_offsets={})
    # Two labels that are wrong together cost more than two wrong on different images.
    assert expected_f2_errors(raw, found[2])["expected_f2"] > 0.03
    assert abs(expected_f2_errors(decoders, found[2])["expected_f2"]) < 0.01


def labels_in_pairs(seed):
    alone = domain(3000, seed=seed)
    return dataclasses.replace(
        alone,
        probs=np.repeat(alone.probs, 2, axis=1),
        truth=np.repeat(alone.truth, 2, axis=1),
    )


def test_the_offset_is_the_mean_over_domains_however_large_they_are():
    large, small = domain(900, seed=1), domain(90, seed=2, shift=2)
    decoders = fit([large, small])
    errors = [expected_f2_errors(decoders, found) for found in (large, small)]
    for name, offset in decoders.expected_f2_offsets.items():
        assert errors[0][name] + errors[1][name] == pytest.approx(0, abs=1e-12)
        assert offset != 0


def test_the_expected_f2_of_a_domain_of_surer_scores_is_too_high():
    decoders = fit([domain(2000, seed=1)])
    errors = expected_f2_errors(decoders, domain(2000, seed=2, shift=2))
    assert errors["expected_f2"] > 0.05


def test_correcting_label_frequencies_helps_where_only_they_differ():
    decoders = fit([domain(2000, seed=1)])
    # The same images, scored by a network for another label frequency.
    shifted = domain(2000, seed=2, shift=2)
    gains = adaptation_gains(decoders, shifted, shifted.probs)
    assert set(gains) == {"adabn", "label_shift", "adabn_label_shift"}
    assert set(gains["adabn"].values()) == {0.0}
    assert gains["label_shift"] == gains["adabn_label_shift"]


def test_an_error_is_a_root_mean_square_and_needs_two_domains():
    one = HeldOut(
        adaptation_gains={"a": {"adabn": {"top_k": -0.3}}},
        expected_f2_errors={"a": {"top_k": 0.3}},
    )
    other = HeldOut(
        adaptation_gains={"b": {"adabn": {"top_k": 0.1}}},
        expected_f2_errors={"b": {"top_k": -0.4}},
        f2s={"b": {"validation": {"top_k": 0.6}, "held_out": {"top_k": 0.4}}},
    )
    assert one.expected_f2_error("top_k") is None
    assert one.adaptation_gain("adabn", "top_k") is None
    both = one.union(other)
    assert both.f2s == other.f2s
    assert both.expected_f2_error("top_k") == pytest.approx(np.sqrt(0.125))
    assert both.expected_f2_error("embedding") is None
    mean, deviation = both.adaptation_gain("adabn", "top_k")
    assert (mean, deviation) == (pytest.approx(-0.1), pytest.approx(0.2 * np.sqrt(2)))
