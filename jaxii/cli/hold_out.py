"""`hold_out`: measures a configuration on each domain that it was not trained on."""

from jaxii.cli.flags import (
    Flags,
    config_of,
    declare_data_dir,
    declare_verify,
    required,
)
from jaxii.cli.start import declare_processes, start_jax

HELP = """\
Trains a run's configuration once without each domain of its training data and measures
it there: an estimate of F2 on new domains, and a threshold for them, without any target
data. The same command again continues where it stopped.

  python -m jaxii.main hold_out --workdir=runs/emoji
  python -m jaxii.main evaluate --workdir=runs/emoji --tune_on=held_out

{flags}"""


def declare(flags: Flags) -> None:
    """Declares the command's flags."""
    flags.text(
        "workdir", "DIR", "the run on all domains; the others go into DIR/held_out"
    )
    flags.takes_config("its configuration, if it has not been trained yet")
    declare_data_dir(flags)
    declare_verify(flags)
    declare_processes(flags)


def run(flags: Flags) -> None:
    """Trains and measures without each domain."""
    workdir = required(flags, "workdir")
    config = None if flags.config is None else config_of(flags)
    start_jax(flags)
    from jaxii.distributed import processes
    from jaxii.runs.hold_out import hold_out
    from jaxii.runs.workdir import Workdir

    hold_out(
        Workdir(workdir),
        config=config,
        data_dir=flags.data_dir,
        should_stop=processes.preemption_notice(),
        verify=flags.verify,
    )
