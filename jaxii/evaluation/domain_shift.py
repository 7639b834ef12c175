"""Estimates F2 on new domains from training data alone.

One estimate is from the validation split, which has the training domains. The other is
from domains held out in turn, each measured with a model that was not trained on it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jaxii.decoding.thresholds import best_threshold
from jaxii.errors import InputError
from jaxii.evaluation.result import (
    DomainShiftEstimate,
    Estimate,
    EvaluationResult,
    SplitMetrics,
)


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """The best threshold over held-out domains.

    Attributes:
      threshold: maximizes the mean of F2 over domains; each domain has weight 1.
      f2: the mean at the threshold.
      domains: domain -> F2 at the threshold.
    """

    threshold: float
    f2: float
    domains: Mapping[str, float]


def pool(held_out: Mapping[str, SplitMetrics]) -> Pooled:
    """Chooses one threshold for all domains.

    Args:
      held_out: domain -> figures of the model trained without it; at least one.

    Raises:
      InputError: If the grids of thresholds differ.
    """
    grids = {tuple(figures.thresholds) for figures in held_out.values()}
    if len(grids) != 1:
        raise InputError(
            f"the runs that held out {', '.join(held_out)} were evaluated on "
            f"{len(grids)} different threshold grids; evaluate each of them again."
        )
    curves = np.array([figures.f2_by_threshold for figures in held_out.values()])
    threshold, f2 = best_threshold(grids.pop(), curves.mean(axis=0))
    domains = {name: found.f2_at(threshold) for name, found in held_out.items()}
    return Pooled(threshold=threshold, f2=f2, domains=domains)


def estimate(
    validation: SplitMetrics, held_out: Mapping[str, SplitMetrics], test: SplitMetrics
) -> DomainShiftEstimate:
    """Returns both estimates of F2 on new domains, and F2 on the test split.

    Each estimate is compared with F2 on the test split at the estimate's threshold.

    Args:
      held_out: see `pool`.
    """
    pooled, threshold = pool(held_out), validation.best_threshold
    return DomainShiftEstimate(
        validation=Estimate(
            f2=validation.best_f2, threshold=threshold, test_f2=test.f2_at(threshold)
        ),
        held_out_domains=Estimate(
            f2=pooled.f2,
            threshold=pooled.threshold,
            test_f2=test.f2_at(pooled.threshold),
        ),
        domains=pooled.domains,
        test_f2=test.f2,
    )


def table(results: Mapping[str, EvaluationResult]) -> list[str]:
    """Returns a table of runs on the domains that they held out.

    Args:
      results: domain -> figures of the run that held it out.
    """
    splits = {
        domain: {name: result.splits[name] for name in ("validation", "held_out")}
        for domain, result in results.items()
    }
    pooled = pool({domain: s["held_out"] for domain, s in splits.items()})
    width = max(len(name) for name in ("held out", "mean", *splits))
    rows = [
        f"{'held out':{width}}  {'images':>7}  {'F2 in domain':14}  "
        f"{'F2 held out':14}  at {pooled.threshold:.2f}"
    ]
    for domain, s in splits.items():
        both = "  ".join(
            f"{figures.best_f2:.4f} at {figures.best_threshold:.2f}"
            for figures in s.values()
        )
        rows.append(
            f"{domain:{width}}  {s['held_out'].num_images:>7}  {both}  "
            f"{pooled.domains[domain]:.4f}"
        )
    means = "  ".join(
        f"{np.mean([s[split].best_f2 for s in splits.values()]):<14.4f}"
        for split in ("validation", "held_out")
    )
    return [*rows, f"{'mean':{width}}  {'':7}  {means}  {pooled.f2:.4f}"]
