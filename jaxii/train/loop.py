"""The run: stages one after another, each a loop over steps, from wherever it stopped.

Comes after everything is assembled and before the final evaluation. Nothing in the loop
waits for the device except the log (every n steps) and a bound on how far the host may
run ahead; saving happens in the background.

The order of a step is a contract: batch, update, log, then (at the stage's cadence, at
its end, or when the machine is wanted back) evaluate and save. A checkpoint's metadata
therefore holds the evaluation of the very state beside it. A save that fails in the
background is noticed after the next update.
"""

import collections
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

import jax
import numpy as np

from jaxii.distributed.mesh import divided, replicated, to_devices
from jaxii.errors import InputError
from jaxii.train.checkpoint import evaluated_params
from jaxii.train.failed_save import FailedSave
from jaxii.train.run import Pretrained, Run, StagePlan, Start
from jaxii.train.sharding import state_shapes, state_shardings
from jaxii.train.stages import (
    Done,
    Enter,
    Resume,
    Saved,
    Stage,
    has_ended,
    next_action,
)
from jaxii.train.state import TrainState, Tree, at_stage_step, derive_key
from jaxii.train.step import make_train_step
from jaxii.train.telemetry.machine import step_flops
from jaxii.train.telemetry.telemetry import Telemetry

# Steps the host may be ahead of the device: enough to hide dispatch and transfer.
STEPS_AHEAD = 2
EMBEDDING_HEAD = "embedding"


class Preempted(Exception):
    """The machine is wanted back; everything up to this step is saved."""


class Diverged(Exception):
    """Too many gradients in a row were not finite; the last checkpoint is good."""


def train(run: Run, telemetry: Telemetry) -> Saved:
    """Runs every stage that has not ended yet; returns the last checkpoint.

    Raises:
      Preempted: the machine was wanted back; the same call later goes on.
      Diverged: gradients stopped being finite.
      FailedSave: a checkpoint could not be saved, and the run does not go on without.
      InputError: checkpoints that do not fit the run.
    """
    try:
        return _train(run, telemetry)
    finally:
        said = run.profiler.close()
        if said:
            telemetry.note(said)


def _train(run: Run, telemetry: Telemetry) -> Saved:
    stages = [plan.stage for plan in run.plans]
    plans = {plan.stage.name: plan for plan in run.plans}
    while True:
        action = next_action(stages, run.checkpoints.saved())
        if isinstance(action, Done):
            return action.last
        plan = plans[action.stage.name]
        state, saved = _begin(run, plan, action)
        telemetry.start_stage(
            plan.stage.name,
            first_step=saved.step - _stage_step(run, saved),
            num_steps=plan.stage.num_steps,
            images_per_step=run.global_batch_size,
            step=saved.step,
            total_steps=saved.step
            - _stage_step(run, saved)
            + _steps_from(stages, plan.stage),
            may_end_early=_may_end_early(stages, plan.stage),
        )
        if isinstance(action, Resume):
            telemetry.saved(action.start.step, before=True)
        telemetry.note(_describe(run, action))
        _run_stage(run, plan, state, saved, telemetry)


def _stage_step(run: Run, saved: Saved) -> int:
    """Returns the updates of a stage that its examples amount to.

    Those that were done, unless the batch had another size before.
    """
    return (saved.example - saved.first_example) // run.global_batch_size


def _steps_from(stages: list[Stage], first: Stage) -> int:
    return sum(stage.num_steps for stage in stages[stages.index(first) :])


def _may_end_early(stages: list[Stage], first: Stage) -> tuple[bool, bool]:
    ends = [s.plateau_evaluations > 0 for s in stages[stages.index(first) :]]
    return ends[0], any(ends)


def _describe(run: Run, action: Enter | Resume) -> str:
    name = action.stage.name
    if isinstance(action, Resume):
        return f"stage {name}: resuming at step {action.start.step}"
    if action.start is None:
        start = "fresh parameters" if run.start is None else run.start.name
        return f"stage {name}: starting from {start}"
    return (
        f"stage {name}: starting from step {action.start.step} of stage "
        f"{action.start.stage} ({action.stage.enters_from})"
    )


def _begin(
    run: Run, plan: StagePlan, action: Enter | Resume
) -> tuple[TrainState, Saved]:
    """Returns the state to go on from and what is known of the stage so far.

    Precedence:
      1. a checkpoint of this stage: the whole state;
      2. the parameters of the stage before;
      3. those of another run (`start_from`), which keeps what it knows of its past, or
         fresh ones with pretrained weights put into them (`model.pretrained`);
      4. fresh ones.
    """
    whole = replicated(run.mesh)

    def started(params, batch_stats):
        step = action.start.step if isinstance(action, Resume) else action.step
        return plan.state_of(params, batch_stats, step)

    def fresh(key):
        return started(*plan.init(key))

    def layout(make, *given):
        shapes = jax.eval_shape(make, *given)
        return state_shardings(shapes, run.mesh, plan.settings.shard_state)

    key = derive_key(run.seed, "init")
    if isinstance(action, Resume):
        shapes = jax.eval_shape(fresh, key)
        like = state_shapes(shapes, run.mesh, plan.settings.shard_state)
        state = _restored(run, action.start, like)
        return at_stage_step(state, _stage_step(run, action.start)), action.start
    saved = Saved(
        stage=plan.stage.name,
        step=action.step,
        first_step=action.step,
        example=action.example,
        first_example=action.example,
    )
    like = jax.eval_shape(plan.init, key)[0]
    if action.start is not None:
        model = run.checkpoints.restore_model(action.start, whole)
        params, batch_stats = inherit(model, like, f"stage {action.start.stage}")
    elif isinstance(run.start, Start):
        params, batch_stats = inherit(run.start.model(whole), like, run.start.name)
    elif isinstance(run.start, Pretrained):
        params, batch_stats = run.start.into(*plan.init(key))
    else:
        return jax.jit(fresh, out_shardings=layout(fresh, key))(key), saved
    shardings = layout(started, params, batch_stats)
    return jax.jit(started, out_shardings=shardings)(params, batch_stats), saved


def _restored(run: Run, saved: Saved, like: TrainState) -> TrainState:
    try:
        return run.checkpoints.restore_state(saved, like)
    except ValueError as error:
        reason = str(error).splitlines()[0].rstrip(":")
        raise InputError(
            f"step {saved.step} of stage {saved.stage} cannot be resumed ({reason}); "
            "go on with the version of jaxii that began the run, or train in another "
            "workdir."
        ) from error


def inherit(model: Mapping[str, Tree], like: Tree, origin: str) -> tuple[Tree, Tree]:
    """Returns parameters and statistics for a stage, from an earlier checkpoint.

    The averaged parameters are taken where there are some: they are what was evaluated.
    The embedding head is dropped where the new stage has none.

    Args:
      model: `params`, `batch_stats`, perhaps `average_params`, as a checkpoint holds
        them, or their shapes.
      like: shapes of the new stage's parameters.
      origin: the checkpoint in words, for the error.

    Raises:
      InputError: the shapes do not fit.
    """
    params = dict(evaluated_params(model))
    if EMBEDDING_HEAD not in like:
        params.pop(EMBEDDING_HEAD, None)
    shapes, wanted = _shapes(params), _shapes(like)
    if shapes != wanted:
        (path, *_) = (
            path for path in (*wanted, *shapes) if shapes.get(path) != wanted.get(path)
        )
        raise InputError(
            f"the network of {origin} does not fit the stage that is to start from it: "
            f"{path} is {shapes.get(path, 'absent')} there and "
            f"{wanted.get(path, 'absent')} here; keep variant, depth, width and heads "
            "the same, or start from something else."
        )
    return params, model["batch_stats"]


def _shapes(tree: Tree) -> dict[str, str]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): str(list(leaf.shape))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _run_stage(
    run: Run, plan: StagePlan, state: TrainState, saved: Saved, telemetry: Telemetry
) -> None:
    """Trains until the stage has ended; raises `Preempted` after saving if asked to."""
    stage = plan.stage
    train_step = make_train_step(plan.settings, run.mesh)
    batches = run.batches(stage.split, saved.example)
    sharding = divided(run.mesh)
    label_embeddings = run.label_embeddings if stage.embedding_head else None
    window: list[dict[str, jax.Array]] = []
    ahead: collections.deque[jax.Array] = collections.deque()
    while not saved.finished:
        run.profiler.at(saved.step, list(ahead))
        start = time.monotonic()
        batch = next(batches)
        telemetry.waited(time.monotonic() - start)
        batch = to_devices(batch, sharding)
        # Steps as TensorBoard's profile page counts them.
        traced = jax.profiler.StepTraceAnnotation("train", step_num=saved.step)
        with traced, jax.transfer_guard("disallow"):
            state, metrics = train_step(state, batch, label_embeddings)
        if telemetry.wants_flops:
            with telemetry.paused():
                given = state, batch, label_embeddings
                flops = step_flops(train_step, *given)
                telemetry.step_takes(flops * plan.settings.micro_batches)
        saved = replace(
            saved,
            step=saved.step + 1,
            example=saved.example + run.global_batch_size,
            metric=None,
        )
        stage_step = _stage_step(run, saved)
        window.append(metrics)
        ahead.append(metrics["objective"])
        if len(ahead) > STEPS_AHEAD:
            jax.block_until_ready(ahead.popleft())
        _succeeds(run, telemetry, run.checkpoints.check)
        last = stage_step >= stage.num_steps
        leave = run.wanted_back(saved.step)
        evaluate = last or stage_step % run.evaluate_every_steps == 0
        if evaluate or leave or stage_step % run.log_every_steps == 0:
            telemetry.log_train(saved.step, _mean(window))
            _check_finite(run, window[-1], saved)
            window.clear()
        if evaluate or leave:
            with telemetry.paused():
                state = replace(state, batch_stats=run.statistics(plan, state))
                if evaluate:
                    saved = _evaluate(run, plan, state, saved, telemetry)
                _save(run, state, saved, telemetry, train_step, leave)
        if leave and not saved.finished:
            raise Preempted(f"saved at step {saved.step} of stage {stage.name}")
    telemetry.note(
        f"stage {stage.name}: ended at step {saved.step}, train_step compiled "
        f"{train_step._cache_size()} time(s)"
    )


def _evaluate(run, plan, state, saved, telemetry) -> Saved:
    figures = run.evaluate(plan.settings, state.params_to_evaluate(), state.batch_stats)
    metric = float(figures[run.metric])
    evaluations = (*saved.evaluations, (saved.step, metric))
    ended = has_ended(plan.stage, _stage_step(run, saved), evaluations)
    saved = replace(saved, evaluations=evaluations, finished=ended)
    if plan.stage.split == "train":
        # Without a metric the last checkpoint of a stage is its best.
        saved = replace(saved, metric=metric)
    telemetry.log_evaluation(saved.step, figures)
    return saved


def _save(run, state, saved, telemetry, train_step, leave) -> None:
    """Saves in the background; at the end of a stage or of the run until it is there.

    Whoever goes on from the end needs it: what failed there is tried once more.
    """
    history = telemetry.history()
    metadata = {
        **run.metadata[saved.stage],
        "train_step_compilations": train_step._cache_size(),
        "history": None if history is None else asdict(history),
    }

    def start():
        run.checkpoints.save(saved, state, metadata)
        telemetry.saved(saved.step)

    _succeeds(run, telemetry, run.checkpoints.wait)
    done = _succeeds(run, telemetry, start)
    if leave or saved.finished:
        if not (done and _succeeds(run, telemetry, run.checkpoints.wait)):
            start()
        run.checkpoints.wait()


def _succeeds(run: Run, telemetry: Telemetry, act: Callable[[], None]) -> bool:
    """Does what may find out that a save failed; says so where the run goes on."""
    try:
        act()
    except FailedSave as failure:
        if not run.go_on_after_failed_save:
            raise
        telemetry.saved(failure.last)
        telemetry.note(f"{failure} Training goes on without it.")
        return False
    return True


def _mean(window: list[dict[str, jax.Array]]) -> dict[str, float]:
    """Means over the steps of a window; counters and schedules as they stand now."""
    rows = jax.device_get(window)
    means = {}
    for name in rows[-1]:
        averaged = name in ("objective", "gradient_norm") or name.startswith("loss/")
        values = [row[name] for row in rows] if averaged else [rows[-1][name]]
        means[name] = float(np.mean(values))
    return means


def _check_finite(run: Run, metrics: Mapping[str, jax.Array], saved: Saved) -> None:
    in_a_row = int(metrics["skipped_in_a_row"])
    if in_a_row >= run.most_skipped_steps:
        raise Diverged(
            f"{in_a_row} updates in a row up to step {saved.step} had gradients that "
            "are not finite; the last checkpoint is good: lower the learning rate, add "
            "clipping, and start again in another workdir."
        )
