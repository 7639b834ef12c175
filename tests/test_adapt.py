"""The configuration of an adaptation; what comes of it is in test_provenance_paths."""

import pytest

from jaxii.runs.adapt import final_terms


@pytest.mark.parametrize(
    ("terms", "final"),
    [
        ({"bce": 1.0}, {"bce": 1.0}),
        ({"bce": ((0.0, 1.0), (0.6, 0.5))}, {"bce": 0.5}),
        ({"bce": ((0.0, 1.0), (0.6, 0.5)), "embedding": 1.0}, {"bce": 0.5}),
        (
            {
                "focal": {
                    "weight": ((0.4, 0.0), (0.6, 1.0)),
                    "gamma": 2.0,
                    "alpha": None,
                }
            },
            {"focal": {"weight": 1.0, "gamma": 2.0, "alpha": None}},
        ),
        ({"embedding": 1.0}, {"bce": 1.0}),
    ],
)
def test_an_adaptation_trains_with_the_objective_as_it_ended(terms, final):
    assert final_terms(terms) == final
