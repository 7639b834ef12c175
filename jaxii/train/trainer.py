"""The training loop: runs stages in order, resuming where the run stopped.

The order of a step is a contract: batch, update, log, then (at the evaluation cadence,
at the end of a stage, or when the process is asked to stop) evaluate and save. A
checkpoint's metadata therefore holds the evaluation of the state that is saved with it.

Between evaluations, the loop waits for the device only to log (every n steps) and to
bound how far the host runs ahead. Checkpoints are written in the background; a failed
save is detected after the next update.
"""

import collections
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxii.distributed.mesh import divided, replicated, to_devices
from jaxii.errors import InputError
from jaxii.train.checkpoint import CheckpointMetadata, Checkpoints, FailedSave
from jaxii.train.initial_weights import (
    CheckpointWeights,
    FreshWeights,
    Init,
    InitialWeights,
)
from jaxii.train.sharding import make_state, state_shapes
from jaxii.train.stages import (
    Done,
    Enter,
    Resume,
    Saved,
    Stage,
    has_ended,
    next_action,
)
from jaxii.train.state import TrainState, Tree, at_stage_step, derive_key, new_state
from jaxii.train.step import StepSettings, make_train_step
from jaxii.train.telemetry.profiling import Profiler, step_flops
from jaxii.train.telemetry.telemetry import Telemetry

# Steps that the host may run ahead of the device; enough to hide dispatch and transfer.
STEPS_AHEAD = 2

Batch = dict[str, np.ndarray]
Metrics = dict[str, jax.Array]


class Preempted(Exception):
    """The process was asked to stop; everything up to this step is saved."""


class Diverged(Exception):
    """Too many updates in a row were not finite; names the last good step."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """A stage with its train step settings and initialisation.

    Attributes:
      stage: Name, length, start and end of the stage.
      settings: Network, objective and optimizer of its train step.
      init: `init(key) -> (params, batch_stats)`.
    """

    stage: Stage
    settings: StepSettings
    init: Init

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


@dataclass(frozen=True, kw_only=True, eq=False)
class Trainer:
    """Trains a run's stages one after another.

    Attributes:
      plans: The stages in order.
      mesh: The devices.
      checkpoints: The run's checkpoints; training resumes from the last one.
      telemetry: Receives the logs and figures.
      batches: `batches(split, start_example)`, an endless iterator of host batches.
      evaluate: `evaluate(settings, params, batch_stats) -> figures by name`.
      metric: Name of the figure that chooses a stage's best checkpoint and ends the
        stage on a plateau. Greater is better.
      batch_stats: `batch_stats(plan, state)`, the BatchNorm statistics with which a
        state is evaluated and saved.
      initial_weights: Initial weights of the first stage.
      label_embeddings: [class, embed] float32; None without an embedding head.
      metadata: `metadata(saved, history=, train_step_compilations=)`, the metadata of a
        checkpoint.
      global_batch_size: Examples per step.
      evaluate_every_steps: Cadence of evaluation and saving.
      log_every_steps: Cadence of the log.
      most_skipped_steps: Number of consecutive non-finite updates that ends the run.
      continue_after_failed_save: Whether to continue training if a checkpoint cannot be
        saved, instead of raising.
      seed: Seed of the initialisation.
      should_stop: `should_stop(step)`, called after every step: whether to save and
        stop. Must be the same on all processes.
      profiler: Traces some steps.
    """

    plans: Sequence[StagePlan]
    mesh: Mesh
    checkpoints: Checkpoints
    telemetry: Telemetry
    batches: Callable[[str, int], Iterator[Batch]]
    evaluate: Callable[[StepSettings, Tree, Tree], dict[str, float]]
    metric: str
    batch_stats: Callable[[StagePlan, TrainState], Tree]
    initial_weights: InitialWeights
    label_embeddings: Float[Array, "class embed"] | None
    metadata: Callable[..., CheckpointMetadata]
    global_batch_size: int
    evaluate_every_steps: int
    log_every_steps: int
    most_skipped_steps: int
    continue_after_failed_save: bool
    seed: int
    should_stop: Callable[[int], bool]
    profiler: Profiler

    def run(self) -> Saved:
        """Trains every stage that has not ended; returns the last checkpoint.

        Raises:
          Preempted: If `should_stop` returned True; a second run resumes.
          Diverged: If too many updates in a row were not finite.
          FailedSave: If a checkpoint could not be saved and the run needs it.
          InputError: If the checkpoints do not fit the run.
        """
        try:
            while True:
                action = next_action(self._stages, self.checkpoints.saved())
                if isinstance(action, Done):
                    return action.last
                self._train_stage(action)
        finally:
            outcome = self.profiler.close()
            if outcome:
                self.telemetry.note(outcome)

    @property
    def _stages(self) -> list[Stage]:
        return [plan.stage for plan in self.plans]

    def _train_stage(self, action: Enter | Resume) -> None:
        """Trains a stage to its end; raises `Preempted` if asked to stop earlier."""
        plan = self.plans[self._stages.index(action.stage)]
        state, saved = self._begin_stage(plan, action)
        self._announce(action, saved)
        train_step = make_train_step(plan.settings, self.mesh)
        batches = self.batches(plan.stage.split, saved.example)
        label_embeddings = self.label_embeddings if plan.stage.embedding_head else None
        window: list[Metrics] = []
        ahead: collections.deque[jax.Array] = collections.deque()
        while not saved.finished:
            self.profiler.at(saved.step)
            batch = self._next_batch(batches)
            # Named as TensorBoard's profile page expects it.
            traced = jax.profiler.StepTraceAnnotation("train", step_num=saved.step)
            with traced, jax.transfer_guard("disallow"):
                state, metrics = train_step(state, batch, label_embeddings)
            self._count_flops(plan, train_step, state, batch, label_embeddings)
            saved = replace(
                saved,
                step=saved.step + 1,
                example=saved.example + self.global_batch_size,
                metric=None,
            )
            self.profiler.updated(saved.step, metrics["objective"])
            window.append(metrics)
            ahead.append(metrics["objective"])
            if len(ahead) > STEPS_AHEAD:
                jax.block_until_ready(ahead.popleft())
            self._succeeds(self.checkpoints.check)
            stage_step = plan.stage.steps_done(saved, self.global_batch_size)
            stop = self.should_stop(saved.step)
            evaluate = (
                stage_step >= plan.stage.num_steps
                or stage_step % self.evaluate_every_steps == 0
            )
            if evaluate or stop or stage_step % self.log_every_steps == 0:
                self.telemetry.log_train(saved.step, _mean(window))
                self._check_finite(window[-1], saved)
                window.clear()
            if evaluate or stop:
                with self.telemetry.paused():
                    state = replace(state, batch_stats=self.batch_stats(plan, state))
                    if evaluate:
                        saved = self._evaluated(plan, state, saved)
                    self._save(state, saved, train_step, wait=stop or saved.finished)
            if stop and not (saved.finished and plan is self.plans[-1]):
                raise Preempted(
                    f"saved at step {saved.step} of stage {plan.stage.name}"
                )
        self.telemetry.note(
            f"stage {plan.stage.name}: ended at step {saved.step}, train_step compiled "
            f"{train_step._cache_size()} time(s)"
        )

    def _begin_stage(
        self, plan: StagePlan, action: Enter | Resume
    ) -> tuple[TrainState, Saved]:
        """Returns the state to continue from, and the record of the stage so far."""
        # The first of these that exists is restored:
        #   1. a checkpoint of this stage: the whole state;
        #   2. the previous stage's checkpoint, its best or its last (`enters_from`):
        #      parameters and statistics;
        #   3. `initial_weights`: another run's checkpoint (`start_from`) or pretrained
        #      weights of the trunk (`model.pretrained`);
        #   4. fresh weights.
        if isinstance(action, Resume):
            return self._resumed(plan, action.start), action.start
        saved = Saved(
            stage=plan.stage.name,
            step=action.step,
            first_step=action.step,
            example=action.example,
            first_example=action.example,
        )
        weights = self.initial_weights
        if action.start is not None:
            weights = CheckpointWeights(
                checkpoints=self.checkpoints,
                saved=action.start,
                source=f"stage {action.start.stage}",
            )
        return self._entered(plan, weights, action.step), saved

    def _resumed(self, plan: StagePlan, saved: Saved) -> TrainState:
        """Returns the state of a checkpoint of this stage."""
        key = derive_key(self.seed, "init")
        shapes = jax.eval_shape(plan.fresh_state, key)
        like = state_shapes(shapes, self.mesh, plan.settings.shard_state)
        try:
            state = self.checkpoints.restore_state(saved, like)
        except ValueError as error:
            reason = str(error).splitlines()[0].rstrip(":")
            raise InputError(
                f"step {saved.step} of stage {saved.stage} cannot be resumed "
                f"({reason}); continue with the version of jaxii that started the run, "
                "or train in another workdir."
            ) from error
        stage_step = plan.stage.steps_done(saved, self.global_batch_size)
        return at_stage_step(state, stage_step)

    def _entered(
        self, plan: StagePlan, weights: InitialWeights, step: int
    ) -> TrainState:
        """Returns the state at the start of a stage, after `step` updates in all."""
        key = derive_key(self.seed, "init")

        def make(params: Tree, batch_stats: Tree) -> TrainState:
            return plan.state_of(params, batch_stats, step)

        def make_fresh(key: jax.Array) -> TrainState:
            return make(*plan.init(key))

        where = self.mesh, plan.settings.shard_state
        if isinstance(weights, FreshWeights):
            return make_state(make_fresh, *where, key)
        loaded = weights.load(plan.init, key, replicated(self.mesh))
        return make_state(make, *where, *loaded)

    def _announce(self, action: Enter | Resume, saved: Saved) -> None:
        stage = action.stage
        left = self._stages[self._stages.index(stage) :]
        first_step = saved.step - stage.steps_done(saved, self.global_batch_size)
        ends_early = [each.plateau_evaluations > 0 for each in left]
        self.telemetry.start_stage(
            stage.name,
            first_step=first_step,
            num_steps=stage.num_steps,
            images_per_step=self.global_batch_size,
            step=saved.step,
            total_steps=first_step + sum(each.num_steps for each in left),
            may_end_early=(ends_early[0], any(ends_early)),
        )
        if isinstance(action, Resume):
            self.telemetry.saved(action.start.step, before=True)
            start = f"resuming at step {action.start.step}"
        elif action.start is not None:
            start = (
                f"starting from step {action.start.step} of stage {action.start.stage} "
                f"({stage.enters_from})"
            )
        else:
            start = f"starting from {self.initial_weights.source}"
        self.telemetry.note(f"stage {stage.name}: {start}")

    def _next_batch(self, batches: Iterator[Batch]) -> dict[str, jax.Array]:
        start = time.monotonic()
        batch = next(batches)
        self.telemetry.waited(time.monotonic() - start)
        return to_devices(batch, divided(self.mesh))

    def _count_flops(self, plan: StagePlan, train_step: Any, *args: Any) -> None:
        if self.telemetry.wants_flops:
            with self.telemetry.paused():
                flops = step_flops(train_step, *args)
                self.telemetry.step_takes(flops * plan.settings.loop_iterations)

    def _evaluated(self, plan: StagePlan, state: TrainState, saved: Saved) -> Saved:
        """Evaluates the state; returns the record, finished if the stage has ended."""
        figures = self.evaluate(
            plan.settings, state.params_to_evaluate(), state.batch_stats
        )
        metric = float(figures[self.metric])
        evaluations = (*saved.evaluations, (saved.step, metric))
        stage_step = plan.stage.steps_done(saved, self.global_batch_size)
        ended = has_ended(plan.stage, stage_step, evaluations)
        saved = replace(saved, evaluations=evaluations, finished=ended)
        if plan.stage.split == "train":
            # On "tuning" there is no metric, so the last checkpoint counts as the best.
            saved = replace(saved, metric=metric)
        self.telemetry.log_evaluation(saved.step, figures)
        return saved

    def _save(
        self, state: TrainState, saved: Saved, train_step: Any, *, wait: bool
    ) -> None:
        """Saves in the background; with `wait`, returns when the save is complete.

        With `wait` and `continue_after_failed_save`, retries a failed save once.
        """
        metadata = self.metadata(
            saved,
            history=self.telemetry.history(),
            train_step_compilations=train_step._cache_size(),
        )

        def start() -> None:
            self.checkpoints.save(metadata, state)
            self.telemetry.saved(saved.step)

        self._succeeds(self.checkpoints.wait)
        started = self._succeeds(start)
        if wait:
            if not (started and self._succeeds(self.checkpoints.wait)):
                start()
            self.checkpoints.wait()

    def _succeeds(self, act: Callable[[], None]) -> bool:
        """Runs `act`; if it raises `FailedSave` and the run continues, reports it."""
        try:
            act()
        except FailedSave as failure:
            if not self.continue_after_failed_save:
                raise
            self.telemetry.saved(failure.last)
            self.telemetry.note(f"{failure} Training continues without it.")
            return False
        return True

    def _check_finite(self, metrics: Metrics, saved: Saved) -> None:
        in_a_row = int(metrics["skipped_in_a_row"])
        if in_a_row >= self.most_skipped_steps:
            last = self.checkpoints.latest()
            kept = "no checkpoint was saved"
            if last is not None:
                kept = f"the last checkpoint (step {last.step}) is good"
            raise Diverged(
                f"{in_a_row} consecutive updates up to step {saved.step} were not "
                f"finite; step {saved.step - in_a_row} was the last good step, and "
                f"{kept}. Lower the learning rate or add gradient clipping, and train "
                "again in another workdir."
            )


def _mean(window: list[Metrics]) -> dict[str, float]:
    """Returns means over a window's steps; for counters and schedules, last values."""
    rows = jax.device_get(window)
    means = {}
    for name in rows[-1]:
        averaged = name in ("objective", "gradient_norm") or name.startswith("loss/")
        values = [row[name] for row in rows] if averaged else [rows[-1][name]]
        means[name] = float(np.mean(values))
    return means
