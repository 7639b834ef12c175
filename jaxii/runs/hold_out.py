"""`hold_out`: trains one configuration once without each domain of its data.

Figures on a domain that a model never saw estimate a domain shift. The runs lie below
the workdir of the run on all domains; its `evaluate` reads their figures.
"""

from collections.abc import Callable
from dataclasses import replace

from jaxii.config import Config
from jaxii.console import say
from jaxii.data.dataset import check_domains
from jaxii.distributed import processes
from jaxii.errors import InputError
from jaxii.evaluation import domain_shift
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
    verify: bool = False,
) -> None:
    """Trains and evaluates without each domain in turn, then compares.

    Args:
      workdir: of the run that is trained on all domains, before or after.
      config: its configuration; None reads that of the workdir.
      data_dir: the dataset, if it has moved; "" otherwise.
      should_stop: Called with each step; whether to save and stop.
      verify: read and hash every byte of the data first.

    Raises:
      InputError: If there is nothing to hold out, or the folder has runs of another
        configuration.
    """
    config = (workdir.config() if config is None else config).moved(data_dir)
    if config.data.held_out_domain:
        raise InputError(
            f"config.data.held_out_domain={config.data.held_out_domain!r} is given and "
            "hold_out sets it to each domain in turn; leave it empty."
        )
    assembly.check_before_data(config)
    data = assembly.open_data(config, verify=verify)
    check_domains(data.directory, data.domains)
    workdir.check_labels(data.vocabulary)
    workdir.check(config)
    if processes.is_lead():
        workdir.claim_labels(data.vocabulary)
        workdir.claim(config)
    for number, domain in enumerate(data.domains, 1):
        run = workdir.held_out(domain)
        without = replace(config, data=replace(config.data, held_out_domain=domain))
        done = _is_done(run, without)
        say(
            f"held out  {domain} ({number} of {len(data.domains)}): {run.path}"
            f"{', done before' if done else ''}"
        )
        if not done:
            train(without, run, should_stop)
    for line in domain_shift.table(workdir.held_out_metrics()):
        say(line)
    say(f"`evaluate --workdir={workdir.path} --tune_on=held_out` takes this threshold")


def _is_done(run: Workdir, config: Config) -> bool:
    """Returns whether a run has finished and its figures are of its best checkpoint."""
    if not run.result_file("metrics.json").exists():
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
        and (metrics["stage"], metrics["step"]) == (last, checkpoints.best_of().step)
    )
    checkpoints.close()
    return done
