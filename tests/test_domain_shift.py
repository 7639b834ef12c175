"""Tests estimates of F2 on new domains, from validation and from held-out domains."""

import dataclasses

import numpy as np
import pytest
from small_runs import decoder_in_use, result

from jaxii.errors import InputError
from jaxii.evaluation.domain_shift import estimate, pool, table
from jaxii.evaluation.held_out import HeldOut
from jaxii.evaluation.result import Bootstrap, SplitMetrics

GRID = [0.1, 0.2, 0.3, 0.4]


def figures(f2_by_threshold, **others):
    """Returns figures of a split, of which the tests use only a few."""
    metrics = SplitMetrics(
        num_images=10,
        num_images_without_truth=0,
        f2=0.34,
        interval=None,
        bootstrap=Bootstrap(by="image", level=0.95, resamples=10),
        coverage=1,
        labels_per_image_predicted=1.0,
        labels_per_image_true=1.0,
        slices={},
        worst_slice="",
        decoders={},
        threshold=0.1,
        micro_f2=0.0,
        macro_f2=0.0,
        thresholds=GRID,
        f2_by_threshold=f2_by_threshold,
        best_threshold=0.1,
        best_f2=0.7,
        map=0.0,
        map_num_classes=1,
        recall_at_5=0.0,
        bce=0.0,
        calibration_error=0.0,
        reliability=[],
    )
    return dataclasses.replace(metrics, **others)


EU = figures([0.1, 0.5, 0.4, 0.2])
ASIA = figures([0.1, 0.2, 0.4, 0.3])
VALIDATION = figures([0.7, 0.0, 0.0, 0.0])
TEST = figures([0.2, 0.3, 0.35, 0.34])


def test_the_pooled_threshold_is_best_for_the_mean_over_domains():
    pooled = pool({"eu": EU, "asia": ASIA})
    means = np.mean([EU.f2_by_threshold, ASIA.f2_by_threshold], axis=0)
    assert pooled.threshold == GRID[int(np.argmax(means))] == 0.3
    assert pooled.f2 == pytest.approx(max(means))
    assert pooled.domains == {"eu": 0.4, "asia": 0.4}


def test_a_domain_counts_as_one_however_many_images_it_has():
    many = dataclasses.replace(EU, num_images=1000)
    assert pool({"eu": many, "asia": ASIA}) == pool({"eu": EU, "asia": ASIA})


def test_one_domain_gives_its_own_best_threshold():
    assert pool({"eu": EU}).threshold == 0.2


def test_different_grids_are_not_pooled():
    other = figures([0.0] * 4, thresholds=[0.5, 0.6, 0.7, 0.8])
    with pytest.raises(InputError, match=r"eu, asia .* evaluate each of them again"):
        pool({"eu": EU, "asia": other})


def result_of(f2s, **splits):
    """Returns the result of a run that held out a domain or a fold."""
    record = HeldOut(adaptation_gains={}, expected_f2_errors={}, f2s=f2s)
    decoder = decoder_in_use("top_k", "held_out")
    return result(splits=splits, decoder=decoder, held_out=record if f2s else None)


def test_the_table_has_the_decoder_in_use_beside_the_best_threshold():
    f2s = {
        "eu": {"validation": {"top_k": 0.61}, "held_out": {"top_k": 0.41}},
        "asia": {"validation": {"top_k": 0.63}, "held_out": {"top_k": 0.43}},
    }
    runs = {
        domain: result_of({domain: f2s[domain]}, held_out=held_out, validation=EU)
        for domain, held_out in (("eu", EU), ("asia", ASIA))
    }
    decoder, caveat, head, *rows = table(runs)
    assert decoder == "decoder    top_k, fitted on validation"
    assert "the checkpoints and the thresholds of best and at 0.30 are chosen" in caveat
    assert "optimistic" in caveat
    assert head.split("  ")[-1] == "at 0.30"
    assert [" ".join(row.split()) for row in rows] == [
        "eu 10 0.6100 0.4100 0.7000 at 0.10 0.4000",
        "asia 10 0.6300 0.4300 0.7000 at 0.10 0.4000",
        "mean 0.6200 0.4200 0.7000 0.4000",
    ]
    columns = {row.index(" 0.7000") for row in rows}
    assert columns == {head.index(" best")}


def test_the_table_says_that_a_decoder_was_fitted_on_the_held_out_images():
    validation = dataclasses.replace(EU, f2=0.5)
    runs = {"fold 1 of 2": result_of({}, held_out=EU, validation=validation)}
    decoder, caveat, _, row, _ = table(runs)
    assert decoder == "decoder    top_k, fitted on held_out"
    assert "the checkpoints, the decoders and the thresholds of best" in caveat
    assert row.split()[5:7] == ["0.5000", "0.3400"]


def test_an_estimate_is_compared_with_the_test_at_its_own_threshold():
    found = estimate(VALIDATION, {"eu": EU, "asia": ASIA}, TEST).to_json()
    assert found["validation"] == {"f2": 0.7, "threshold": 0.1, "test_f2": 0.2}
    held_out = found["held_out_domains"]
    assert held_out["f2"] == pytest.approx(0.4)
    assert (held_out["threshold"], held_out["test_f2"]) == (0.3, 0.35)
    assert held_out["domains"] == {"eu": 0.4, "asia": 0.4}
    assert found["test"] == {"f2": 0.34}


@pytest.mark.parametrize(
    ("validation_f2", "closer"), [(0.7, "held_out_domains"), (0.21, "validation")]
)
def test_the_closer_estimate_is_named(validation_f2, closer):
    validation = dataclasses.replace(VALIDATION, best_f2=validation_f2)
    found = estimate(validation, {"eu": EU, "asia": ASIA}, TEST)
    assert found.closer == found.to_json()["closer"] == closer
    assert found.line().endswith(f"closer: {closer.replace('_', ' ')}")


def test_a_threshold_off_the_grid_is_refused():
    with pytest.raises(InputError, match="not on the evaluation grid"):
        EU.f2_at(0.25)
