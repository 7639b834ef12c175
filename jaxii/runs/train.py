"""`train`: trains the remaining stages, then evaluates and reports."""

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import jax

from jaxii.config import Config
from jaxii.console import say
from jaxii.distributed import processes
from jaxii.errors import InputError
from jaxii.evaluation.predictor import Model, make_predict
from jaxii.evaluation.result import hardware
from jaxii.planner.topology import peak_flops
from jaxii.runs import assembly
from jaxii.runs.begin import begin, describe, in_words
from jaxii.runs.evaluate import measure
from jaxii.runs.run import Run
from jaxii.runs.workdir import Workdir
from jaxii.storage import held
from jaxii.train.batch_norm import reestimate
from jaxii.train.stages import Origin
from jaxii.train.state import TrainState, Tree
from jaxii.train.step import StepSettings
from jaxii.train.telemetry.images import make_images
from jaxii.train.telemetry.profiling import Profiler, memory_bytes
from jaxii.train.telemetry.services import check_tracker, open_trackers
from jaxii.train.telemetry.telemetry import Telemetry
from jaxii.train.telemetry.trackers import Facts, Trackers, flat, result_name
from jaxii.train.trainer import StagePlan, Trainer

# Number of training images for the BatchNorm statistics of averaged parameters (SWA).
BATCH_NORM_IMAGES = 2048

TrainBatches = Callable[[str, int], assembly.Batches]

# Fields in which runs differ most often.
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
    should_stop: Callable[[int], bool],
    *,
    allow_tuning_labels: bool = False,
    change_batch_size: bool = False,
    profile_steps: tuple[int, int] = (0, 0),
    verify: bool = False,
    recipe: Origin | None = None,
) -> None:
    """Trains the remaining stages, evaluates, and writes report and submission.

    Args:
      should_stop: Called after each step, and each batch of the final evaluation, with
        the step; returns whether to save and stop.
      allow_tuning_labels: Whether weights may learn from labels of `tuning`.
      change_batch_size: Whether a resumed run may have another batch size.
      profile_steps: Steps after which a trace starts and ends; equal ones for none.
      verify: Whether to hash every byte of the data first.
      recipe: The recipe of the configuration, for the report.

    Raises:
      InputError: If a check fails, or another process trains in the workdir (in a
        bucket: if it started later).
      Preempted: If `should_stop` returned True; a second run resumes.
    """
    assembly.check_before_data(config)
    processes.check_on_lead(lambda: check_tracker(config.track))
    profiler = _profiler(workdir, profile_steps)
    with ExitStack() as lock:
        processes.check_on_lead(lambda: lock.enter_context(held(workdir.path)))
        run = begin(
            config,
            workdir,
            allow_tuning_labels=allow_tuning_labels,
            change_batch_size=change_batch_size,
            verify=verify,
        )
        _train(run, should_stop, profiler, recipe or {})


def _train(
    run: Run,
    should_stop: Callable[[int], bool],
    profiler: Profiler,
    recipe: Origin,
) -> None:
    """Trains an assembled run, evaluates it and closes its checkpoints."""
    for line in describe(run):
        say(line)
    saved = [s for found in run.checkpoints.saved().values() for s in found]
    start_step = max((s.step for s in saved), default=0)
    with _trackers(run, start_step) as trackers:
        with _telemetry(run, start_step, trackers) as telemetry:
            trainer = make_trainer(
                run,
                telemetry,
                batches=_shown_batches(run, telemetry),
                should_stop=should_stop,
                profiler=profiler,
                recipe=recipe,
            )
            try:
                trainer.run()
            finally:
                run.checkpoints.finish()
        result = measure(run.at_best(), should_stop=should_stop)
        f2s = {result_name(name): split.f2 for name, split in result.splits.items()}
        trackers.result(result.step, f2s)
    run.checkpoints.close()


def _telemetry(run: Run, start_step: int, trackers: Trackers) -> Telemetry:
    return Telemetry(
        run.workdir.path,
        total_steps=sum(plan.stage.num_steps for plan in run.plans),
        start_step=start_step,
        is_lead=processes.is_lead(),
        tracker=trackers,
        memory=memory_bytes,
        peak_flops=peak_flops(jax.devices()[0].device_kind),
    )


def _trackers(run: Run, start_step: int) -> Trackers:
    """Opens the trackers of a run; only the lead process has any."""
    if not processes.is_lead():
        return Trackers({}, say)
    config = run.config
    about = {
        "workdir": str(run.workdir.path),
        "data": in_words(run.data),
        "hardware": hardware(),
        "configuration": config.content_hash(),
    }
    for stage, provenance in run.stage_provenance.items():
        about[f"provenance {stage}"] = provenance.badge()
    last = run.stage_provenance[run.plans[-1].stage.name]
    if last.caveats():
        about["caveats"] = " ".join(last.caveats())
    facts = Facts(
        name=run.workdir.path.name,
        settings=flat(config.to_dict(), COMPARED),
        about=about,
    )
    return open_trackers(
        run.workdir.path,
        facts,
        track=config.track,
        start_step=start_step,
        warn=say,
    )


def _shown_batches(run: Run, telemetry: Telemetry) -> TrainBatches:
    """Returns `batches(split, start_example)`, which logs the first batch as images."""
    batches = partial(assembly.train_batches, run.config, run.data)
    if not processes.is_lead():
        return batches
    # Augmentation is the same in all stages, so it is compiled once.
    show = make_images(run.plans[0].settings, run.data.vocabulary.descriptions)

    def shown(split: str, start_example: int) -> assembly.Batches:
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
            f"--profile_steps writes its trace to {workdir.path}, which is not a local "
            "folder; use a local --workdir."
        )
    return Profiler(workdir.path / "profile", *steps)


def make_trainer(
    run: Run,
    telemetry: Telemetry,
    *,
    batches: TrainBatches,
    should_stop: Callable[[int], bool],
    profiler: Profiler | None = None,
    recipe: Origin,
) -> Trainer:
    """Assembles the trainer of a run; see `Trainer`."""
    config, data = run.config, run.data
    return Trainer(
        plans=run.plans,
        mesh=run.mesh,
        checkpoints=run.checkpoints,
        telemetry=telemetry,
        batches=batches,
        evaluate=_evaluate(run),
        metric=f"{data.choosing_split}/f2",
        batch_stats=partial(_batch_stats, run),
        initial_weights=run.initial_weights,
        label_embeddings=run.vectors(),
        metadata=partial(run.metadata, recipe=recipe, files=run.workdir.own_files()),
        global_batch_size=config.global_batch_size,
        evaluate_every_steps=config.evaluate_every_steps,
        log_every_steps=config.log_every_steps,
        most_skipped_steps=config.most_skipped_steps,
        continue_after_failed_save=(
            config.on_failed_save == "go_on" and jax.process_count() == 1
        ),
        seed=config.seed,
        should_stop=should_stop,
        profiler=profiler or Profiler(),
    )


def _evaluate(
    run: Run,
) -> Callable[[StepSettings, Tree, Tree], dict[str, float]]:
    """Returns a function that evaluates a state on the splits watched in training."""
    config, data = run.config, run.data
    evaluator = run.evaluator()
    # The order matters: only the first figures are printed.
    splits = dict.fromkeys((data.choosing_split, "validation"), 0)
    if config.evaluate_train_images and data.has_truth("train"):
        splits["train"] = config.evaluate_train_images
    verified = {split: data.verified_absent(split) for split in splits}

    def evaluate(
        settings: StepSettings, params: Tree, batch_stats: Tree
    ) -> dict[str, float]:
        model = Model(
            apply=settings.apply,
            params=params,
            batch_stats=batch_stats,
            compiler_options=settings.compiler_options,
        )
        predict = make_predict([model], run.mesh)
        figures: dict[str, float] = {}
        for split, num_images in splits.items():
            sums = evaluator.run(
                predict,
                assembly.eval_batches(config, data, split, num_images),
                verified_absent=verified[split],
            )
            figures |= evaluator.figures(sums, split)
        f2s = {name: figures[name] for name in (f"{split}/f2" for split in splits)}
        return f2s | figures

    return evaluate


def _batch_stats(run: Run, plan: StagePlan, state: TrainState) -> Tree:
    """Returns the BatchNorm statistics to evaluate a state with.

    Averaged weights (SWA) have no running statistics, so their statistics are computed
    on training images, unless the stage trains no layer before a BatchNorm.
    """
    if run.config.optimizer.average != "swa" or plan.settings.frozen:
        return state.batch_stats
    source = run.data.split(plan.stage.split).source
    return reestimate(
        plan.settings.apply,
        state.average_params,
        state.batch_stats,
        assembly.unlabelled_batches(run.config, source, BATCH_NORM_IMAGES),
        run.mesh,
        compiler_options=plan.settings.compiler_options,
    )
