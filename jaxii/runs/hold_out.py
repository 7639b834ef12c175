"""`hold_out`: trains one configuration once without each part of its training data.

The parts are its domains, whose figures estimate a domain shift, or folds of its
groups. The runs lie below the workdir of the run on all data, whose `evaluate` reads
the figures on domains. `suspects` predicts each image with a run not trained on it.
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from jaxii.config import Config
from jaxii.console import say
from jaxii.data.dataset import check_domains, fold_names
from jaxii.data.prepared import Data
from jaxii.distributed import processes
from jaxii.errors import InputError
from jaxii.evaluation import domain_shift
from jaxii.evaluation.held_out import FILE
from jaxii.evaluation.result import EvaluationResult
from jaxii.runs import assembly
from jaxii.runs.train import train
from jaxii.runs.workdir import CHANGE_BATCH_SIZE, HELD_OUT, Workdir
from jaxii.train.checkpoint import Checkpoints
from jaxii.train.stages import Origin, Saved, choose


def hold_out(
    workdir: Workdir,
    *,
    config: Config | None,
    data_dir: str,
    should_stop: Callable[[int], bool],
    folds: int = 0,
    length: float = 1.0,
    change_batch_size: bool = False,
    verify: bool = False,
    recipe: Origin | None = None,
) -> None:
    """Trains and evaluates without each part in turn, then compares.

    Args:
      workdir: Workdir of the run on all data, which may be trained before or after.
      config: The run configuration; None reads that of the workdir.
      data_dir: Folder of the dataset, if it has moved; "" otherwise.
      should_stop: Called with each step; returns whether to save and stop.
      folds: Number of folds of the groups; 0 for the domains.
      length: Length of each run as a share of that of `config`, above 0 and at most 1.
      change_batch_size: Whether runs that have not finished may change their batch size
        to that of `config`.
      verify: Whether to hash every byte of the data first.
      recipe: The recipe of `config`, for the reports.

    Raises:
      InputError: If there is nothing to hold out, the configuration trains on tuning
        labels, the length is out of range, or the folder has runs of another
        configuration, length or dataset.
    """
    if config is None:
        config, recipe = workdir.config(), _recipe(workdir, data_dir)
    config, recipe = config.moved(data_dir), _of_parts(recipe or {})
    _check(config, length)
    assembly.check_before_data(config)
    data = assembly.open_data(config, verify=verify)
    workdir.check_labels(data.vocabulary)
    workdir.check(config)
    runs = {part: workdir.held_out(part) for part in _parts(data, folds)}
    configs = {part: _without(config, part, length) for part in runs}
    # All are checked before any is trained.
    done = {
        part
        for part, run in runs.items()
        if _is_done(run, configs[part], data, is_domain=not folds)
    }
    for part in sorted(runs.keys() - done):
        _check_batch_size(runs[part], configs[part], data, change_batch_size)
    train_part = partial(train, change_batch_size=change_batch_size, recipe=recipe)
    if processes.is_lead():
        workdir.claim_labels(data.vocabulary)
        workdir.claim(config)
    for number, (part, run) in enumerate(runs.items(), 1):
        which = f"{part} ({number} of {len(runs)})"
        say(f"held out  {which}: {run.path}{', already done' * (part in done)}")
        if part not in done:
            train_part(configs[part], run, should_stop)
    _say_figures(runs, config.stages[-1].name)
    say(_next_command(workdir, folds))


def _without(config: Config, part: str, length: float) -> Config:
    """Returns the configuration of the run that holds a part out.

    Epochs, steps, and the steps between evaluations are multiplied by `length`.
    """

    def steps(number: int) -> int:
        return math.ceil(number * length)

    stages = [
        replace(s, num_epochs=s.num_epochs * length, num_steps=steps(s.num_steps))
        for s in config.stages
    ]
    return replace(
        config,
        data=replace(config.data, held_out_domain=part),
        stages=tuple(stages),
        evaluate_every_steps=steps(config.evaluate_every_steps),
    )


def _recipe(workdir: Workdir, data_dir: str) -> Origin:
    """Returns the recipe of a run, empty if its checkpoints have none."""
    config, recipe = workdir.config(), Origin()
    names = [stage.name for stage in config.stages]
    checkpoints = Checkpoints(workdir.path, names, "", read_only=True)
    # A damaged checkpoint, or one that a running training replaced, has no recipe.
    with contextlib.closing(checkpoints), contextlib.suppress(InputError):
        latest = checkpoints.latest()
        if latest is not None:
            recipe = checkpoints.metadata(latest).recipe
    if data_dir and "own" in recipe:
        recipe["own"].setdefault("data.directory", config.data.directory)
    return recipe


def _of_parts(recipe: Origin) -> Origin:
    """Returns the recipe of the runs, which change the field that holds a part out."""
    if "own" not in recipe:
        return {}
    return {**recipe, "own": {HELD_OUT: "", **recipe["own"]}}


def _parts(data: Data, folds: int) -> tuple[str, ...]:
    """Returns the names of the parts to hold out."""
    if folds:
        return fold_names(folds)
    check_domains(data.directory, data.domains)
    return data.domains


def _say_figures(runs: Mapping[str, Workdir], last_stage: str) -> None:
    """Prints the table, and the runs whose figures are not of the last stage."""
    metrics = {part: run.metrics() for part, run in runs.items()}
    for line in domain_shift.table(metrics):
        say(line)
    for part, figures in metrics.items():
        if figures.stage != last_stage:
            path = runs[part].path
            say(
                f"CAVEAT     the figures of {path} are of stage {figures.stage}; "
                f"evaluate --workdir={path} measures the last stage"
            )


def _next_command(workdir: Workdir, folds: int) -> str:
    if folds:
        return f"`suspects --workdir={workdir.path}` lists labels that may be wrong"
    return (
        f"`evaluate --workdir={workdir.path} --tune_on=held_out` fits all decoders on "
        "these domains"
    )


def _check(config: Config, length: float) -> None:
    """Checks that parts of the training data can be held out of a configuration.

    Raises:
      InputError: If it holds out a domain itself, a stage trains on tuning, or the
        length is out of range.
    """
    if not 0.0 < length <= 1.0:
        raise InputError(
            f"--length={length:g} is not a share of the length of a run; use a number "
            "above 0 and at most 1."
        )
    if config.data.held_out_domain:
        raise InputError(
            f"config.data.held_out_domain={config.data.held_out_domain!r} is set, but "
            "hold_out sets it to each part in turn; leave it empty."
        )
    for stage in config.stages:
        if stage.split == "tuning":
            raise InputError(
                f"stage {stage.name} trains on the split tuning, but hold_out must not "
                "use labels of the target domain; use a configuration without such "
                "stages, and a separate --workdir."
            )


def _is_done(
    run: Workdir,
    config: Config,
    data: Data,
    *,
    is_domain: bool,
) -> bool:
    """Returns whether a run has finished and has figures of a stage's best checkpoint.

    Raises:
      InputError: If the run has other labels, another configuration or another dataset,
        or is finished but was last evaluated on another dataset.
    """
    run.check_labels(data.vocabulary)
    _check_length(run, config)
    # A finished run stays as it is if the run on all data changed its batch size.
    run.check(config, change_batch_size=True)
    best = _finished(run, config, data)
    metrics = _figures(run, is_domain=is_domain)
    wanted = best.get(metrics.stage) if metrics else None
    if metrics is None or wanted is None or metrics.step != wanted.step:
        return False
    if metrics.data_hash != data.content_hash:
        raise InputError(
            f"{run.path} was last evaluated on a dataset with hash "
            f"{metrics.data_hash}, but {data.directory} has hash {data.content_hash}; "
            f"run evaluate --workdir={run.path} --data_dir={data.directory} first."
        )
    return True


def _check_length(run: Workdir, config: Config) -> None:
    """Raises InputError if a run has begun with another length."""
    if not run.config_file.exists():
        return

    def lengths(config: Config) -> list[float]:
        return [stage.num_epochs or stage.num_steps for stage in config.stages]

    found, wanted = lengths(run.config()), lengths(config)
    if found != wanted:
        raise InputError(
            f"{run.path} has stages of {found} epochs or steps, but this command gives "
            f"them {wanted}; pass the --length that it was begun with, or remove its "
            "folder to train it again."
        )


def _check_batch_size(
    run: Workdir, config: Config, data: Data, change_batch_size: bool
) -> None:
    """Raises InputError if a run that is not done may not have this batch size."""
    otherwise = CHANGE_BATCH_SIZE
    if _finished(run, config, data):
        change_batch_size = False
        otherwise = (
            "; the run has finished with its batch size, so evaluate "
            f"--workdir={run.path} completes it"
        )
    run.check(
        config,
        change_batch_size=change_batch_size,
        otherwise=otherwise,
    )


def _finished(run: Workdir, config: Config, data: Data) -> dict[str, Saved]:
    """Returns stage -> best checkpoint of a finished run; {} if it is not finished.

    Raises:
      InputError: If the run was trained on another dataset.
    """
    names, label_hash = [s.name for s in config.stages], data.vocabulary.content_hash()
    checkpoints = Checkpoints(run.path, names, label_hash, read_only=True)
    with contextlib.closing(checkpoints):
        latest = checkpoints.latest()
        if latest is None:
            return {}
        data_hash = checkpoints.metadata(latest).data_hash
        if data_hash != data.content_hash:
            raise InputError(
                f"{run.path} was trained on a dataset with hash {data_hash}, but "
                f"{data.directory} has hash {data.content_hash}; pass the dataset it "
                "was trained on as --data_dir, or remove the folder of the run to "
                "train it again."
            )
        saved = checkpoints.saved()
        last = saved.get(names[-1])
        if not (last and last[-1].finished):
            return {}
        return {name: choose(found, "best") for name, found in saved.items() if found}


def _figures(run: Workdir, *, is_domain: bool) -> EvaluationResult | None:
    """Returns the figures of a run; None if its evaluation is missing or incomplete."""
    # Predictions for folds are not saved, as decoders are fitted on domains only.
    if is_domain and not run.result_file(FILE).exists():
        return None
    try:
        return run.metrics()
    except InputError:  # its evaluation was interrupted, or is damaged
        return None
