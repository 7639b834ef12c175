"""What a run is made of: the stages with their parts, the devices, what is called when.

Assembled from the configuration and the data; `loop` works on it and on nothing else.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, Sharding
from jaxtyping import Array, Float

from jaxii.train.checkpoint import Checkpoints
from jaxii.train.stages import Stage
from jaxii.train.state import TrainState, Tree, new_state
from jaxii.train.step import StepSettings
from jaxii.train.telemetry.profile import Profiler


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """A stage with the parts it runs on.

    Attributes:
      stage: name, length, ending, where it starts from.
      settings: network, objective and optimizer of its train step.
      init: `init(key) -> (params, batch_stats)`.
    """

    stage: Stage
    settings: StepSettings
    init: Callable[[jax.Array], tuple[Tree, Tree]]

    def state_of(self, params: Tree, batch_stats: Tree, step: int) -> TrainState:
        """Returns the state at the start of the stage, after `step` updates in all."""
        return new_state(
            params=params,
            batch_stats=batch_stats,
            optimizer=self.settings.optimizer,
            step=step,
            with_average=self.settings.average_rate is not None,
        )

    def fresh_state(self, key: jax.Array) -> TrainState:
        """Returns the state of a run that starts with this stage."""
        return self.state_of(*self.init(key), step=0)


@dataclass(frozen=True, kw_only=True)
class Start:
    """A checkpoint of another run, from which the first stage starts.

    Attributes:
      name: in words.
      model: gives `params`, `batch_stats`, perhaps `average_params`, laid out as asked.
    """

    name: str
    model: Callable[[Sharding], Mapping[str, Tree]]


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """Weights of another program, from which the first stage starts.

    Attributes:
      name: in words.
      into: puts them into fresh parameters and statistics.
    """

    name: str
    into: Callable[[Tree, Tree], tuple[Tree, Tree]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything a run needs.

    Attributes:
      plans: the stages in order.
      mesh: the devices.
      checkpoints: where the run saves.
      batches: `batches(split, start_example)`, host batches without host-only arrays.
      statistics: `statistics(plan, state)` to the batch_stats that a state is evaluated
        and saved with.
      evaluate: `evaluate(settings, params, batch_stats)` to figures by name, `metric`
        among them.
      metric: the figure, greater being better, that chooses the best checkpoint of a
        stage on `train`, and ends a stage on its plateau.
      label_embeddings: [class, embed] float32, None without an embedding head.
      start: where the first stage starts; None for fresh parameters.
      metadata: stage name -> what is kept with its checkpoints.
      global_batch_size: examples a step.
      evaluate_every_steps: cadence of evaluation and saving.
      log_every_steps: cadence of the log.
      most_skipped_steps: non-finite updates in a row that end the run.
      go_on_after_failed_save: train on with the last complete checkpoint where one
        could not be saved, instead of raising.
      seed: base of the initialisation.
      wanted_back: says, of the step just done, whether to save and leave; the same
        on all processes.
      profiler: traces some steps.
    """

    plans: tuple[StagePlan, ...]
    mesh: Mesh
    checkpoints: Checkpoints
    batches: Callable[[str, int], Iterator[dict[str, np.ndarray]]]
    statistics: Callable[[StagePlan, TrainState], Tree]
    evaluate: Callable[[StepSettings, Tree, Tree], dict[str, float]]
    metric: str
    label_embeddings: Float[Array, "class embed"] | None
    start: Start | Pretrained | None
    metadata: Mapping[str, Mapping[str, Any]]
    global_batch_size: int
    evaluate_every_steps: int
    log_every_steps: int
    most_skipped_steps: int
    go_on_after_failed_save: bool
    seed: int
    wanted_back: Callable[[int], bool]
    profiler: Profiler = field(default_factory=Profiler)
