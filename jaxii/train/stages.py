"""Which stage runs next, and when it ends: pure functions of what is on disk. No JAX.

The loop asks `next_action` at every start and `has_ended` after every evaluation.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ENTERS_FROM = ("best", "last")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of a run: an objective, a length, and which heads are trained.

    Attributes:
      name: names its folder of checkpoints; unique.
      terms: objective, as `jaxii.objective.objective.make_objective` takes it.
      num_steps: length in updates.
      embedding_head: whether the label-embedding head exists. A stage that starts from
        one with the head and has none of its own drops it.
      split: whose images and labels it trains on, "train" or "tuning". Of a stage on
        "tuning" the last checkpoint is the result: `validation` would choose the one
        that has adapted least.
      trainable: "all", or the "last_layer" alone: the classifier. The trunk then stays
        as it is, BatchNorm's running statistics included, and normalises by them.
      peak_lr: highest learning rate; 0 takes `optimizer.peak_lr`.
      warmup_share: share of the stage during which the learning rate rises to the peak.
      enters_from: which checkpoint of the previous stage it starts from: the "best" by
        the validation metric, or the "last".
      plateau_evaluations: end early when the metric has not risen by
        `plateau_min_delta` for so many evaluations; 0 never ends early.
      plateau_min_delta: smallest rise of the metric that counts.
    """

    name: str
    terms: Mapping[str, Any]
    num_steps: int
    embedding_head: bool = False
    split: str = "train"
    trainable: str = "all"
    peak_lr: float = 0.0
    warmup_share: float = 0.05
    enters_from: str = "best"
    plateau_evaluations: int = 0
    plateau_min_delta: float = 0.001


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What the metadata of one complete checkpoint says.

    Attributes:
      stage: name of its stage.
      step: updates done in the whole run.
      first_step: updates that had been done when the stage began.
      example: training examples used in the whole run; with batches of one size, as
        many a step.
      first_example: examples that had been used when the stage began.
      metric: validation metric at this step; None where it was not evaluated.
      evaluations: every (step, metric) of the stage so far, in order.
      finished: whether the stage had ended.
    """

    stage: str
    step: int
    first_step: int
    example: int = 0
    first_example: int = 0
    metric: float | None = None
    evaluations: tuple[tuple[int, float], ...] = field(default=())
    finished: bool = False


@dataclass(frozen=True)
class Enter:
    """Start a stage: from fresh parameters, or from a checkpoint of the one before."""

    stage: Stage
    start: Saved | None
    step: int = 0
    example: int = 0


@dataclass(frozen=True)
class Resume:
    """Go on with a stage from its last checkpoint."""

    stage: Stage
    start: Saved


@dataclass(frozen=True)
class Done:
    """Every stage has ended; `last` is the final stage's last checkpoint."""

    last: Saved


def next_action(
    stages: Sequence[Stage], saved: Mapping[str, Sequence[Saved]]
) -> Enter | Resume | Done:
    """Decides what to do, from the checkpoints that exist.

    Args:
      stages: the run's stages in order.
      saved: stage name -> its complete checkpoints.

    Returns:
      `Resume` the first stage that has checkpoints and has not ended; else `Enter` the
      first stage that has none; else `Done`.
    """
    previous: list[Saved] = []
    for stage in stages:
        checkpoints = sorted(saved.get(stage.name, ()), key=lambda s: s.step)
        if not checkpoints:
            if not previous:
                return Enter(stage, None)
            start, last = choose(previous, stage.enters_from), previous[-1]
            return Enter(stage, start, last.step, last.example)
        if not checkpoints[-1].finished:
            return Resume(stage, checkpoints[-1])
        previous = checkpoints
    return Done(previous[-1])


def choose(checkpoints: Sequence[Saved], which: str) -> Saved:
    """Returns the "best" (highest metric, the latest of equals) or the "last" one.

    A metric that is None or NaN is no measurement. The checkpoints that are kept on
    disk are chosen by this rule too.
    """
    ordered = sorted(checkpoints, key=lambda s: s.step)
    measured = [s for s in ordered if s.metric is not None and not math.isnan(s.metric)]
    if which == "last" or not measured:
        return ordered[-1]
    return max(measured, key=lambda s: (s.metric, s.step))


def has_ended(
    stage: Stage, stage_step: int, evaluations: Sequence[tuple[int, float]]
) -> bool:
    """Says whether a stage is over: steps done, or its metric on a plateau."""
    if stage_step >= stage.num_steps:
        return True
    patience = stage.plateau_evaluations
    if patience <= 0 or len(evaluations) <= patience:
        return False
    metrics = [metric for _, metric in evaluations]
    best_before = max(metrics[:-patience])
    return max(metrics[-patience:]) < best_before + stage.plateau_min_delta
