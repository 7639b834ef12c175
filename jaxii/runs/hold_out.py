"""`hold_out`: trains one configuration once without each part of its training data.

The parts are its domains, whose figures estimate a domain shift, or folds of its
groups. The runs lie below the workdir of the run on all data, whose `evaluate` reads
the figures on domains. `suspects` predicts each image with a run not trained on it.
"""

from collections.abc import Callable
from dataclasses import replace

from jaxii.config import Config
from jaxii.console import say
from jaxii.data.dataset import check_domains, fold_names
from jaxii.distributed import processes
from jaxii.errors import InputError
from jaxii.evaluation import domain_shift
from jaxii.evaluation.held_out import FILE
from jaxii.runs import assembly
from jaxii.runs.train import train
from jaxii.runs.workdir import Workdir
from jaxii.train.checkpoint import Checkpoints


def hold_out(
    workdir: Workdir,
    *,
    config: Config | None,
    data_dir: str,
    should_stop: Callable[[int], bool],
    folds: int = 0,
    verify: bool = False,
) -> None:
    """Trains and evaluates without each part in turn, then compares.

    Args:
      workdir: Workdir of the run on all data, which may be trained before or after.
      config: The run configuration; None reads that of the workdir.
      data_dir: Folder of the dataset, if it has moved; "" otherwise.
      should_stop: Called with each step; returns whether to save and stop.
      folds: Number of folds of the groups; 0 for the domains.
      verify: Whether to hash every byte of the data first.

    Raises:
      InputError: If there is nothing to hold out, or the folder has runs of another
        configuration.
    """
    config = (workdir.config() if config is None else config).moved(data_dir)
    if config.data.held_out_domain:
        raise InputError(
            f"config.data.held_out_domain={config.data.held_out_domain!r} is given and "
            "hold_out sets it to each part in turn; leave it empty."
        )
    assembly.check_before_data(config)
    data = assembly.open_data(config, verify=verify)
    if not folds:
        check_domains(data.directory, data.domains)
    parts = fold_names(folds) if folds else data.domains
    workdir.check_labels(data.vocabulary)
    workdir.check(config)
    if processes.is_lead():
        workdir.claim_labels(data.vocabulary)
        workdir.claim(config)
    for number, part in enumerate(parts, 1):
        run = workdir.held_out(part)
        without = replace(config, data=replace(config.data, held_out_domain=part))
        done = _is_done(run, without, is_domain=not folds)
        say(
            f"held out  {part} ({number} of {len(parts)}): {run.path}"
            f"{', done before' if done else ''}"
        )
        if not done:
            train(without, run, should_stop)
    found = workdir.held_out_metrics()
    for line in domain_shift.table({part: found[part] for part in parts}):
        say(line)
    if folds:
        say(f"`suspects --workdir={workdir.path}` lists labels that may be wrong")
    else:
        say(
            f"`evaluate --workdir={workdir.path} --tune_on=held_out` fits all decoders "
            "on these domains"
        )


def _is_done(run: Workdir, config: Config, *, is_domain: bool) -> bool:
    """Returns whether a run has finished and its figures are of its best checkpoint."""
    # Predictions for folds are not saved, as decoders are fitted on domains only.
    files = ("metrics.json", FILE) if is_domain else ("metrics.json",)
    if not all(run.result_file(name).exists() for name in files):
        return False
    run.check(config)
    try:
        metrics, last = run.metrics(), config.stages[-1].name
    except InputError:  # its evaluation was interrupted, or is damaged
        return False
    checkpoints = Checkpoints(
        run.path, [last], run.vocabulary().content_hash(), read_only=True
    )
    saved = checkpoints.saved().get(last)
    done = (
        bool(saved)
        and saved[-1].finished
        and (metrics.stage, metrics.step) == (last, checkpoints.best_of().step)
    )
    checkpoints.close()
    return done
