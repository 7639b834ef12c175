"""`train`: every stage that is left, then figures, report and answers.

Called by `main` with a checked configuration; returns when all files are on disk.
"""

from collections.abc import Callable
from functools import partial

import jax

from jaxii import assemble, processes
from jaxii import config as configuration
from jaxii.commands.evaluate import measure
from jaxii.console import say
from jaxii.infer.models import Model, make_predict
from jaxii.networks import pretrained_start
from jaxii.session import Session, describe, open_session
from jaxii.train import loop
from jaxii.train.batch_norm import reestimate
from jaxii.train.run import Run, StagePlan, Start
from jaxii.train.state import TrainState, Tree
from jaxii.train.telemetry import Telemetry
from jaxii.workdir import Workdir

# Training images over which BatchNorm is measured for averaged parameters (SWA).
BATCH_NORM_IMAGES = 2048


def train(
    config: configuration.Config,
    workdir: Workdir,
    wanted_back: Callable[[int], bool],
    *,
    allow_tuning_labels: bool = False,
    change_batch_size: bool = False,
) -> None:
    """Trains every stage that is left, then evaluates, reports and writes answers.

    Args:
      config: checked.
      workdir: of the run.
      wanted_back: says, after a step, whether to save and leave.
      allow_tuning_labels: let the weights learn from labels of `tuning`.
      change_batch_size: let a run go on with batches of another size.
    """
    assemble.check_before_data(config)
    session = open_session(
        config,
        workdir,
        allow_tuning_labels=allow_tuning_labels,
        change_batch_size=change_batch_size,
    )
    for line in describe(session):
        say(line)
    run = _make_run(session, wanted_back)
    saved = [s for found in session.checkpoints.saved().values() for s in found]
    telemetry = Telemetry(
        workdir.path,
        total_steps=sum(plan.stage.num_steps for plan in session.plans),
        start_step=max((s.step for s in saved), default=0),
        is_lead=processes.is_lead(),
    )
    with telemetry:
        loop.train(run, telemetry)
    measure(session)
    session.checkpoints.close()


def _make_run(session: Session, wanted_back: Callable[[int], bool]) -> Run:
    config, data = session.config, session.data
    evaluator = session.evaluator()
    # In this order: the first figures are printed.
    splits = dict.fromkeys((data.choosing_split, "validation"), 0)
    if config.evaluate_train_images:
        splits["train"] = config.evaluate_train_images
    verified = {split: session.verified_absent(split) for split in splits}

    def evaluate(settings, params, batch_stats):
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

    start = session.start
    return Run(
        plans=session.plans,
        mesh=session.mesh,
        checkpoints=session.checkpoints,
        batches=partial(assemble.train_batches, config, data),
        statistics=partial(_statistics, session),
        evaluate=evaluate,
        metric=f"{data.choosing_split}/f2",
        label_embeddings=session.vectors(),
        start=None if start is None else Start(name=start.name, model=start.restored),
        pretrained=pretrained_start(config),
        metadata={
            stage: {
                "provenance": provenance.to_json(),
                "config_hash": configuration.content_hash(config),
            }
            for stage, provenance in session.provenance.items()
        },
        global_batch_size=config.global_batch_size,
        evaluate_every_steps=config.evaluate_every_steps,
        log_every_steps=config.log_every_steps,
        most_skipped_steps=config.most_skipped_steps,
        go_on_after_failed_save=(
            config.on_failed_save == "go_on" and jax.process_count() == 1
        ),
        seed=config.seed,
        wanted_back=wanted_back,
    )


def _statistics(session: Session, plan: StagePlan, state: TrainState) -> Tree:
    """Returns the BatchNorm statistics to evaluate a state with.

    An average of weights never saw a batch: its own are measured on training images,
    except where the stage trains no layer before a BatchNorm.
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
