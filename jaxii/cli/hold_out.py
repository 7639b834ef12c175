"""`hold_out`: measures a configuration on data that it was not trained on, in turn."""

from jaxii.cli.flags import (
    Flags,
    config_of,
    declare_data_dir,
    declare_verify,
    recipe_of,
    required,
)
from jaxii.cli.start import declare_processes, start_jax

HELP = """\
Trains a run's configuration once without each domain of its training data and evaluates
it on that domain. This gives an estimate of F2 on new domains, and decoders for them,
without any target data. Run the same command again to resume.

  python -m jaxii.main hold_out --workdir=runs/emoji
  python -m jaxii.main evaluate --workdir=runs/emoji --tune_on=held_out

A run without one of N domains is nearly as long as the run on all data. --length makes
these runs shorter; their figures are then estimates for shorter training.

  python -m jaxii.main hold_out --workdir=runs/emoji --length=0.25

With --folds, it holds out folds of the images instead (cross-validation). From these
runs, `suspects` lists labels that may be wrong.

  python -m jaxii.main hold_out --workdir=runs/emoji --folds=4
  python -m jaxii.main suspects --workdir=runs/emoji

{flags}"""


def declare(flags: Flags) -> None:
    """Declares the command's flags."""
    flags.text(
        "workdir",
        "DIR",
        "workdir of the run on all data; the others are in DIR/held_out",
    )
    flags.takes_config("configuration of the run, if it has not been trained yet")
    flags.integer(
        "folds",
        "N",
        "hold out each of N folds instead; all images of a group are in one fold",
        at_least=2,
        otherwise="each domain",
    )
    flags.number(
        "length",
        "SHARE",
        "length of each run as a share of that of the run on all data, at most 1",
        otherwise="1",
    )
    flags.switch(
        "change_batch_size",
        "continue interrupted runs with the batch size that the run on all data has "
        "now; finished ones stay as they are",
    )
    declare_data_dir(flags)
    declare_verify(flags)
    declare_processes(flags)


def run(flags: Flags) -> None:
    """Trains and measures without each domain or fold."""
    workdir = required(flags, "workdir")
    recipe = recipe_of(flags)
    config = None if flags.config is None else config_of(flags)
    start_jax(flags, saves_on_sigterm=True)
    from jaxii.distributed import processes
    from jaxii.runs.hold_out import hold_out
    from jaxii.runs.workdir import Workdir

    hold_out(
        Workdir(workdir),
        config=config,
        data_dir=flags.data_dir,
        should_stop=processes.preemption_notice(),
        folds=flags.folds or 0,
        length=1.0 if flags.length is None else flags.length,
        change_batch_size=flags.change_batch_size,
        verify=flags.verify,
        recipe=recipe,
    )
