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
    """Returns a table of runs on the domains or folds that they held out.

    F2 is that of the decoder in use, fitted on validation if the runs measured it. F2
    at thresholds that the held-out images choose is beside it.

    Args:
      results: domain or fold -> figures of the run that held it out.
    """
    held_out = {part: result.splits["held_out"] for part, result in results.items()}
    pooled = pool(held_out)
    common = f"at {pooled.threshold:.2f}"
    fitted_on, f2s = _as_used(results)
    decoders = dict.fromkeys(result.decoder.name for result in results.values())
    also = ", the decoders" if fitted_on == "held_out" else ""
    width = max(len(name) for name in ("held out", "mean", *results))
    rows = [
        f"decoder    {', '.join(decoders)}, fitted on {fitted_on}",
        f"CAVEAT     the checkpoints{also} and the thresholds of best and {common} are "
        "chosen on the held-out images, so these figures are optimistic",
        f"{'held out':{width}}  {'images':>7}  F2 in domain  F2 held out  "
        f"{'best':14}  {common}",
    ]
    for part, figures in held_out.items():
        in_domain, out = f2s[part]
        best = f"{figures.best_f2:.4f} at {figures.best_threshold:.2f}"
        rows.append(
            f"{part:{width}}  {figures.num_images:>7}  {in_domain:<12.4f}  "
            f"{out:<11.4f}  {best}  {pooled.domains[part]:.4f}"
        )
    in_domain, out = np.mean([*f2s.values()], axis=0)
    best = np.mean([figures.best_f2 for figures in held_out.values()])
    rows.append(
        f"{'mean':{width}}  {'':7}  {in_domain:<12.4f}  {out:<11.4f}  {best:<14.4f}  "
        f"{pooled.f2:.4f}"
    )
    return rows


def _as_used(
    results: Mapping[str, EvaluationResult],
) -> tuple[str, dict[str, tuple[float, float]]]:
    """Returns F2 of the decoder in use on validation and on the held-out images.

    Runs that hold out folds have no figures of decoders fitted on validation.

    Returns:
      The split that the decoders were fitted on, and both F2 of each part.
    """
    by_validation: dict[str, tuple[float, float]] = {}
    by_held_out: dict[str, tuple[float, float]] = {}
    for part, result in results.items():
        splits, name = result.splits, result.decoder.name
        by_held_out[part] = splits["validation"].f2, splits["held_out"].f2
        f2s = None if result.held_out is None else result.held_out.f2s.get(part)
        if f2s is not None and name in f2s["held_out"]:
            by_validation[part] = f2s["validation"][name], f2s["held_out"][name]
    if len(by_validation) == len(results):
        return "validation", by_validation
    return "held_out", by_held_out
