"""Decides which stage of a run is next and when a stage ends, without JAX."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

ENTERS_FROM = ("best", "last")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of a run: an objective, a length, and the trained heads.

    Attributes:
      name: Unique name, also of the stage's checkpoint folder.
      terms: Loss terms, as in `jaxii.objective.objective.make_objective`.
      num_steps: Length in updates.
      in_epochs: Whether the length was given in epochs. `num_steps` then depends on the
        batch size, and a run that changes it counts the updates so far by examples.
      embedding_head: Whether there is a label-embedding head; if not, the one of the
        previous stage is dropped.
      split: Split to train on, "train" or "tuning". A stage on "tuning" results in its
        last checkpoint, because `validation` would choose the least adapted one.
      trainable: "all", or "last_layer" for the classifier alone, with a frozen trunk
        that normalises by BatchNorm's running statistics.
      peak_lr_scale: Highest learning rate, as a multiple of `optimizer.peak_lr`.
      warmup_share: Share of the stage during which the learning rate rises.
      enters_from: Checkpoint of the previous stage to start from: "best" by the
        validation metric, or "last".
      plateau_evaluations: Number of evaluations without a rise of `plateau_min_delta`
        after which the stage ends early; 0 never ends early.
    """

    name: str
    terms: Mapping[str, Any]
    num_steps: int
    in_epochs: bool = False
    embedding_head: bool = False
    split: str = "train"
    trainable: str = "all"
    peak_lr_scale: float = 1.0
    warmup_share: float = 0.05
    enters_from: str = "best"
    plateau_evaluations: int = 0
    plateau_min_delta: float = 0.001

    def steps_done(self, saved: "Saved", global_batch_size: int) -> int:
        """Returns the updates of the stage so far, of `num_steps`.

        The stage may have begun with another batch size. If its length is in epochs,
        returns as many updates of this batch size as its examples would take.
        """
        if not self.in_epochs:
            return saved.step - saved.first_step
        return (saved.example - saved.first_example) // global_batch_size


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Metadata of one complete checkpoint.

    Attributes:
      step: Updates done in the whole run.
      first_step: Updates done before the stage began.
      example: Training examples used in the whole run.
      first_example: Examples used before the stage began.
      metric: Validation metric at this step; None if not evaluated.
      evaluations: Every (step, metric) of the stage so far, in order.
      finished: Whether the stage had ended.
    """

    stage: str
    step: int
    first_step: int
    example: int = 0
    first_example: int = 0
    metric: float | None = None
    evaluations: tuple[tuple[int, float], ...] = ()
    finished: bool = False


class BatchSize(NamedTuple):
    """The batch size of a run from one update on.

    Attributes:
      step: Updates done before the first of this size.
      global_batch_size: Examples in one update.
      micro_batches: Slices of a device's batch.
    """

    step: int
    global_batch_size: int
    micro_batches: int

    def in_words(self) -> str:
        """Returns for example `64 images in 2 micro-batches`."""
        slices = f" in {self.micro_batches} micro-batches"
        return f"{self.global_batch_size} images{slices * (self.micro_batches > 1)}"


class Origin(TypedDict, total=False):
    """The recipe of a run's configuration; empty if unknown.

    Attributes:
      name: File of the recipe, and its preset after a colon.
      own: The recipe's values of the fields that the command line changed.
    """

    name: str
    own: dict[str, object]


@dataclass(frozen=True)
class Enter:
    """Start a stage, from fresh parameters or a checkpoint of the previous stage."""

    stage: Stage
    start: Saved | None
    step: int = 0
    example: int = 0


@dataclass(frozen=True)
class Resume:
    """Continue a stage from its last checkpoint."""

    stage: Stage
    start: Saved


@dataclass(frozen=True)
class Done:
    """Every stage has ended; `last` is the final stage's last checkpoint."""

    last: Saved


def next_action(
    stages: Sequence[Stage], saved: Mapping[str, Sequence[Saved]]
) -> Enter | Resume | Done:
    """Returns the next action, from the complete checkpoints of each stage.

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

    Metrics that are None or NaN are ignored. Retention on disk uses the same rule.
    """
    ordered = sorted(checkpoints, key=lambda s: s.step)
    measured = [s for s in ordered if s.metric is not None and not math.isnan(s.metric)]
    if which == "last" or not measured:
        return ordered[-1]
    return max(measured, key=lambda s: (s.metric, s.step))


def batches_in_words(sizes: Sequence[BatchSize]) -> str:
    """Returns for example `64 images, then 32 images after step 500`."""
    first, *others = sizes
    rest = [f", then {size.in_words()} after step {size.step}" for size in others]
    return first.in_words() + "".join(rest)


def has_ended(
    stage: Stage, stage_step: int, evaluations: Sequence[tuple[int, float]]
) -> bool:
    """Returns whether a stage has done its steps or its metric is on a plateau."""
    if stage_step >= stage.num_steps:
        return True
    patience = stage.plateau_evaluations
    if patience <= 0 or len(evaluations) <= patience:
        return False
    metrics = [metric for _, metric in evaluations]
    best_before = max(metrics[:-patience])
    return max(metrics[-patience:]) < best_before + stage.plateau_min_delta
