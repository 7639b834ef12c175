"""`train`: every stage that is left, then figures, report and answers.

Called by `main` with a checked configuration; returns when all files are on disk.
"""

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxii.config import Config
from jaxii.console import say
from jaxii.distributed import processes
from jaxii.errors import InputError
from jaxii.evaluation.predictor import Model, make_predict
from jaxii.evaluation.result import hardware
from jaxii.models.pretrained import Trunk
from jaxii.planner.topology import peak_flops
from jaxii.runs import assemble
from jaxii.runs.evaluate import measure
from jaxii.runs.session import Session, describe, open_session
from jaxii.runs.trained import Trained
from jaxii.runs.workdir import Workdir
from jaxii.train.batch_norm import reestimate
from jaxii.train.initial_weights import (
    FRESH,
    CheckpointWeights,
    InitialWeights,
    PretrainedWeights,
)
from jaxii.train.state import TrainState, Tree
from jaxii.train.step import StepSettings
from jaxii.train.telemetry.facts import Facts, flat, result_name
from jaxii.train.telemetry.images import make_images
from jaxii.train.telemetry.machine import memory_bytes
from jaxii.train.telemetry.profile import Profiler
from jaxii.train.telemetry.telemetry import Telemetry
from jaxii.train.telemetry.trackers import Trackers, check_tracker, open_trackers
from jaxii.train.trainer import StagePlan, Trainer

# Training images over which BatchNorm is measured for averaged parameters (SWA).
BATCH_NORM_IMAGES = 2048

TrainBatches = Callable[[str, int], assemble.Batches]

# By what runs are told apart most often.
COMPARED = (
    "optimizer.peak_lr",
    "global_batch_size",
    "model.variant",
    "model.depth",
    "data.image_size_pixels",
)


def train(
    config: Config,
    workdir: Workdir,
    wanted_back: Callable[[int], bool],
    *,
    allow_tuning_labels: bool = False,
    change_batch_size: bool = False,
    profile_steps: tuple[int, int] = (0, 0),
    verify: bool = False,
    recipe: Mapping[str, Any] | None = None,
) -> None:
    """Trains every stage that is left, then evaluates, reports and writes answers.

    Args:
      config: checked.
      workdir: of the run.
      wanted_back: says, after a step, whether to save and leave.
      allow_tuning_labels: let the weights learn from labels of `tuning`.
      change_batch_size: let a run go on with batches of another size.
      profile_steps: first and last step of a trace; equal ones for none.
      verify: read and hash every byte of the data first.
      recipe: what the configuration came of, for the report: `name`, and `own`, its
        values of the fields that were changed.

    Raises:
      InputError: whatever cannot be used.
    """
    assemble.check_before_data(config)
    processes.check_on_lead(lambda: check_tracker(config.track))
    profiler = _profiler(workdir, profile_steps)
    session = open_session(
        config,
        workdir,
        allow_tuning_labels=allow_tuning_labels,
        change_batch_size=change_batch_size,
        verify=verify,
    )
    for line in describe(session):
        say(line)
    saved = [s for found in session.checkpoints.saved().values() for s in found]
    start_step = max((s.step for s in saved), default=0)
    with _trackers(session, start_step) as trackers:
        with _telemetry(session, start_step, trackers) as telemetry:
            trainer = make_trainer(
                session,
                telemetry,
                batches=_shown_batches(session, telemetry),
                should_stop=wanted_back,
                profiler=profiler,
                recipe=recipe or {},
            )
            try:
                trainer.run()
            finally:
                session.checkpoints.finish()
        result = measure(session)
        f2s = {result_name(name): split.f2 for name, split in result.splits.items()}
        trackers.result(result.step, f2s)
    session.checkpoints.close()


def _telemetry(session: Session, start_step: int, trackers: Trackers) -> Telemetry:
    return Telemetry(
        session.workdir.path,
        total_steps=sum(plan.stage.num_steps for plan in session.plans),
        start_step=start_step,
        is_lead=processes.is_lead(),
        tracker=trackers,
        memory=memory_bytes,
        peak_flops=peak_flops(jax.devices()[0].device_kind),
    )


def _trackers(session: Session, start_step: int) -> Trackers:
    """Opens what a run can be followed in; only the lead process has any."""
    if not processes.is_lead():
        return Trackers({}, say)
    data, config = session.data, session.config
    counts = ", ".join(f"{n} {s.num_examples}" for n, s in data.splits.items())
    about = {
        "workdir": str(session.workdir.path),
        "data": f"{data.directory}: {len(data.vocabulary)} labels; images: {counts}",
        "hardware": hardware(),
        "configuration": config.content_hash(),
    }
    for stage, provenance in session.provenance.items():
        about[f"provenance {stage}"] = provenance.badge()
    last = session.provenance[session.plans[-1].stage.name]
    if last.caveats():
        about["caveats"] = " ".join(last.caveats())
    facts = Facts(
        name=session.workdir.path.name,
        settings=flat(config.to_dict(), COMPARED),
        about=about,
    )
    return open_trackers(
        session.workdir.path,
        facts,
        track=config.track,
        start_step=start_step,
        warn=say,
    )


def _shown_batches(session: Session, telemetry: Telemetry) -> TrainBatches:
    """Returns the training batches; the first of each stage is shown as images."""
    batches = partial(assemble.train_batches, session.config, session.data)
    if not processes.is_lead():
        return batches
    # Augmentation is the same in all stages: compiled once.
    show = make_images(session.plans[0].settings, session.data.vocabulary.descriptions)

    def shown(split: str, start_example: int) -> assemble.Batches:
        inner = batches(split, start_example)
        first = next(inner)
        telemetry.images(show(first))
        return itertools.chain([first], inner)

    return shown


def _profiler(workdir: Workdir, steps: tuple[int, int]) -> Profiler:
    if steps[0] >= steps[1]:
        return Profiler()
    if not isinstance(workdir.path, Path):
        raise InputError(
            f"--profile_steps writes its trace into {workdir.path}, and that has to be "
            "a folder of this machine; use another --workdir for it."
        )
    return Profiler(workdir.path / "profile", *steps)


def make_trainer(
    session: Session,
    telemetry: Telemetry,
    *,
    batches: TrainBatches,
    should_stop: Callable[[int], bool],
    profiler: Profiler | None = None,
    recipe: Mapping[str, Any],
) -> Trainer:
    """Assembles the trainer of an open session; see `Trainer`."""
    config, data = session.config, session.data
    return Trainer(
        plans=session.plans,
        mesh=session.mesh,
        checkpoints=session.checkpoints,
        telemetry=telemetry,
        batches=batches,
        evaluate=_evaluate(session),
        metric=f"{data.choosing_split}/f2",
        batch_stats=partial(_batch_stats, session),
        initial_weights=_initial_weights(session),
        label_embeddings=session.vectors(),
        metadata=session.metadata(recipe),
        global_batch_size=config.global_batch_size,
        evaluate_every_steps=config.evaluate_every_steps,
        log_every_steps=config.log_every_steps,
        most_skipped_steps=config.most_skipped_steps,
        continue_after_failed_save=(
            config.on_failed_save == "go_on" and jax.process_count() == 1
        ),
        seed=config.seed,
        should_stop=should_stop,
        profiler=profiler,
    )


def _evaluate(
    session: Session,
) -> Callable[[StepSettings, Tree, Tree], dict[str, float]]:
    """Returns what evaluates a state, on the splits that are watched in training."""
    config, data = session.config, session.data
    evaluator = session.evaluator()
    # In this order: the first figures are printed.
    splits = dict.fromkeys((data.choosing_split, "validation"), 0)
    if config.evaluate_train_images and data.has_truth("train"):
        splits["train"] = config.evaluate_train_images
    verified = {split: session.verified_absent(split) for split in splits}

    def evaluate(
        settings: StepSettings, params: Tree, batch_stats: Tree
    ) -> dict[str, float]:
        model = Model(apply=settings.apply, params=params, batch_stats=batch_stats)
        predict = make_predict([model], session.mesh)
        figures = {}
        for split, num_images in splits.items():
            sums = evaluator.run(
                predict,
                assemble.eval_batches(config, data, split, num_images),
                verified_absent=verified[split],
            )
            figures |= evaluator.figures(sums, split)
        f2s = {name: figures[name] for name in (f"{split}/f2" for split in splits)}
        return f2s | figures

    return evaluate


def _initial_weights(session: Session) -> InitialWeights:
    match session.start:
        case Trained() as run:
            return CheckpointWeights(
                checkpoints=run.checkpoints, saved=run.saved, source=run.name
            )
        case Trunk() as trunk:
            return PretrainedWeights(
                source=trunk.origin,
                params={"trunk": trunk.params},
                batch_stats={"trunk": trunk.batch_stats},
            )
        case _:
            return FRESH


def _batch_stats(session: Session, plan: StagePlan, state: TrainState) -> Tree:
    """Returns the BatchNorm statistics to evaluate a state with.

    Averaged weights (SWA) never saw a batch, so their statistics are measured on
    training images, unless the stage trains no layer before a BatchNorm.
    """
    if session.config.optimizer.average != "swa" or plan.settings.frozen:
        return state.batch_stats
    source = session.data.split(plan.stage.split).source
    return reestimate(
        plan.settings.apply,
        state.average_params,
        state.batch_stats,
        assemble.unlabelled_batches(session.config, source, BATCH_NORM_IMAGES),
        session.mesh,
    )
