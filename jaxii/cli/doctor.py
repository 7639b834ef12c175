"""`doctor`: checks this machine and measures its speed."""

from jaxii.cli.flags import Flags, config_of
from jaxii.cli.start import start_jax
from jaxii.errors import InputError
from jaxii.storage import at

HELP = """\
Checks this machine and says what would limit a run: versions, devices, disk, the speed
of the input pipeline and of a train step. Trains nothing and keeps nothing but the
step's compiled program; takes seconds.

  python -m jaxii.main doctor
  python -m jaxii.main doctor --config=mydata/mydata.py

{flags}

Exit codes: 0 all is well; 1 something is broken, each such line with its fix."""


def declare(flags: Flags) -> None:
    """Declares the command's flags."""
    flags.takes_config("measure the input and the step of this recipe")
    flags.text(
        "data_dir",
        "DIR",
        "with the images of this dataset",
        otherwise="the recipe's, or images in memory, of the size that prepare stores",
    )
    flags.text("workdir", "DIR", "the folder whose disk is measured", default="runs")


def run(flags: Flags) -> None:
    """Examines the machine."""
    if flags.config is None and flags.data_dir:
        raise InputError(
            "--data_dir needs the recipe that is to train on it; add --config."
        )
    config = None if flags.config is None else config_of(flags)
    start_jax(flags)
    from jaxii.runs.doctor import doctor

    doctor(config, place=at(flags.workdir))
