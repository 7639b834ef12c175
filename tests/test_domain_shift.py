"""Estimates of F2 on new domains, from validation and from held-out domains."""

import dataclasses

import numpy as np
import pytest

from jaxii.errors import InputError
from jaxii.evaluation.domain_shift import estimate, pool
from jaxii.evaluation.result import Bootstrap, SplitMetrics

GRID = [0.1, 0.2, 0.3, 0.4]


def figures(f2_by_threshold, **others):
    """Figures of a split, of which only a few are looked at."""
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
