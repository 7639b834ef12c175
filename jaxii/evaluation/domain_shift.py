"""What training data alone says of F2 on new domains, and how far off it was.

Two estimates: the validation split, of the domains trained on, and domains that were
held out in turn, each of a model that never saw it. Comes after `summary` has made
the figures of every split; `result` prints what is made here and the report draws it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxii.decoding.thresholds import best_threshold
from jaxii.errors import InputError
from jaxii.evaluation.summary import threshold_index

Summary = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """The threshold that is best over domains that were held out.

    Attributes:
      threshold: where the mean over domains of mean F2 is largest; a domain counts as
        one, however many images it has.
      f2: that mean.
      domains: domain -> mean F2 over its images at the threshold.
    """

    threshold: float
    f2: float
    domains: Mapping[str, float]


def pool(held_out: Mapping[str, Summary]) -> Pooled:
    """Chooses one threshold for all domains.

    Args:
      held_out: domain -> figures on it of the model trained without it, as `summarise`
        makes them; at least one.

    Raises:
      InputError: they were measured at different thresholds.
    """
    grids = {tuple(summary["thresholds"]) for summary in held_out.values()}
    if len(grids) != 1:
        raise InputError(
            f"the runs that held out {', '.join(held_out)} were measured on "
            f"{len(grids)} different grids of thresholds; evaluate each of them again."
        )
    curves = np.array([summary["f2_by_threshold"] for summary in held_out.values()])
    threshold, f2 = best_threshold(grids.pop(), curves.mean(axis=0))
    domains = {name: f2_at(summary, threshold) for name, summary in held_out.items()}
    return Pooled(threshold=threshold, f2=f2, domains=domains)


def estimate(
    validation: Summary, held_out: Mapping[str, Summary], test: Summary
) -> dict[str, Any]:
    """Returns both estimates of F2 on new domains beside the test's, and the closer.

    An estimate is an F2 and the threshold that gives it, so it is compared with the
    test's F2 at the same threshold, `test_f2`, whichever threshold the result uses.

    Args:
      validation: figures of the validation split.
      held_out: see `pool`.
      test: figures of the test split.
    """
    pooled = pool(held_out)
    threshold = validation["best_threshold"]
    estimates: dict[str, dict[str, Any]] = {
        "validation": {
            "f2": validation["best_f2"],
            "threshold": threshold,
            "test_f2": f2_at(test, threshold),
        },
        "held_out_domains": {
            "f2": pooled.f2,
            "threshold": pooled.threshold,
            "test_f2": f2_at(test, pooled.threshold),
            "domains": dict(pooled.domains),
        },
    }
    closer = min(
        estimates, key=lambda e: abs(estimates[e]["f2"] - estimates[e]["test_f2"])
    )
    return {**estimates, "test": {"f2": test["f2"]}, "closer": closer}


def line(estimates: Mapping[str, Any]) -> str:
    """Returns the estimates in one line for a person."""
    said = [
        f"{name.replace('_', ' ')} {estimates[name]['f2']:.4f} at "
        f"{estimates[name]['threshold']:.2f} (test there "
        f"{estimates[name]['test_f2']:.4f})"
        for name in ("validation", "held_out_domains")
    ]
    closer = estimates["closer"].replace("_", " ")
    return f"estimates  {', '.join(said)}; closer: {closer}"


def table(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns lines that show how runs did on the domains that they held out.

    Args:
      results: domain -> content of `metrics.json` of the run that held it out.
    """
    splits = {domain: result["splits"] for domain, result in results.items()}
    pooled = pool({domain: s["held_out"] for domain, s in splits.items()})
    width = max(len(name) for name in ("held out", "mean", *splits))
    rows = [
        f"{'held out':{width}}  {'images':>7}  {'F2 in domain':14}  "
        f"{'F2 held out':14}  at {pooled.threshold:.2f}"
    ]
    for domain, s in splits.items():
        both = "  ".join(
            f"{s[split]['best_f2']:.4f} at {s[split]['best_threshold']:.2f}"
            for split in ("validation", "held_out")
        )
        rows.append(
            f"{domain:{width}}  {s['held_out']['num_images']:>7}  {both}  "
            f"{pooled.domains[domain]:.4f}"
        )
    means = "  ".join(
        f"{np.mean([s[split]['best_f2'] for s in splits.values()]):<14.4f}"
        for split in ("validation", "held_out")
    )
    return [*rows, f"{'mean':{width}}  {'':7}  {means}  {pooled.f2:.4f}"]


def f2_at(summary: Summary, threshold: float) -> float:
    """Returns a split's mean F2 at a threshold of its grid."""
    index = threshold_index(summary["thresholds"], threshold)
    return float(summary["f2_by_threshold"][index])
