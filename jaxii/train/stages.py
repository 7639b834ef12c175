"""Which stage runs next, and when it ends: pure functions of what is on disk. No JAX.

Comes between the configuration (a tuple of stage dicts) and the loop, which asks
`next_action` at every start and `has_ended` after every evaluation.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from jaxii.errors import InputError, nearest

ENTERS_FROM = ("best", "last")
SPLITS = ("train", "tuning")
TRAINABLE = ("all", "last_layer")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of a run: an objective, a length, and which heads are trained.

    Attributes:
      name: names its folder of checkpoints; unique.
      terms: objective, as `jaxii.objective.objective.make_objective` takes it.
      num_epochs: length in passes over `split`; or
      num_steps: length in updates. Exactly one of the two is above 0.
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
    num_epochs: float = 0.0
    num_steps: int = 0
    embedding_head: bool = False
    split: str = "train"
    trainable: str = "all"
    peak_lr: float = 0.0
    warmup_share: float = 0.05
    enters_from: str = "best"
    plateau_evaluations: int = 0
    plateau_min_delta: float = 0.001


def make_stages(
    dicts: Sequence[Mapping[str, Any]], *, steps_per_epoch: Callable[[str], float]
) -> tuple[Stage, ...]:
    """Checks the configuration's stages and turns epochs into steps.

    Args:
      dicts: one dict of `Stage` fields a stage, in running order.
      steps_per_epoch: updates in one pass over a split, by its name.

    Returns:
      The stages, each with `num_steps` above 0.

    Raises:
      InputError: a misspelt field, a missing or doubled name, an impossible length.
    """
    if not dicts:
        raise InputError("config.stages is empty; give at least one stage.")
    stages = tuple(_make_stage(dict(d), steps_per_epoch) for d in dicts)
    names = [stage.name for stage in stages]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two stages are named {name!r}; give each its own name.")
    for before, after in itertools.pairwise(stages):
        if after.embedding_head and not before.embedding_head:
            raise InputError(
                f"stage {after.name!r} has an embedding head and {before.name!r} "
                "before it has none; a head can be dropped, not added."
            )
    return stages


def _make_stage(
    given: dict[str, Any], steps_per_epoch: Callable[[str], float]
) -> Stage:
    allowed = [f.name for f in fields(Stage)]
    label = f"stage {given.get('name', '?')!r}"
    for key in given:
        if key not in allowed:
            raise InputError(
                f"{label} has no field {key!r}; {nearest(key, allowed)}fields are "
                f"{', '.join(allowed)}."
            )
    for key in ("name", "terms"):
        if not given.get(key):
            raise InputError(f"{label} lacks {key!r}; add it.")
    stage = Stage(**given)
    if not stage.name.replace("_", "").isalnum():
        raise InputError(f"{label}: use letters, digits and _ in the name.")
    if (stage.num_epochs > 0) == (stage.num_steps > 0):
        raise InputError(
            f"{label}: num_epochs={stage.num_epochs}, num_steps={stage.num_steps}; set "
            "exactly one of them above 0."
        )
    for key, choices in (
        ("enters_from", ENTERS_FROM),
        ("split", SPLITS),
        ("trainable", TRAINABLE),
    ):
        if getattr(stage, key) not in choices:
            raise InputError(
                f"{label}: {key}={getattr(stage, key)!r}; use {' or '.join(choices)}."
            )
    if not 0.0 <= stage.warmup_share < 1.0:
        raise InputError(
            f"{label}: warmup_share={stage.warmup_share}; use a share in [0, 1)."
        )
    if "embedding" in stage.terms and not stage.embedding_head:
        raise InputError(
            f"{label} has an embedding term and no head for it; set "
            "embedding_head=True or remove the term."
        )
    if stage.trainable == "last_layer" and stage.embedding_head:
        raise InputError(
            f"{label} trains the classifier alone and has an embedding head; set "
            "embedding_head=False or trainable='all'."
        )
    steps = stage.num_steps
    if not steps:
        steps = max(1, round(stage.num_epochs * steps_per_epoch(stage.split)))
    return Stage(**{**given, "num_steps": steps, "num_epochs": 0.0})


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
