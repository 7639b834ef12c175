"""`doctor`: checks this machine and measures its speed."""

from jaxii.cli.flags import Flags, config_of
from jaxii.cli.start import start_jax
from jaxii.errors import InputError
from jaxii.storage import at

HELP = """\
Checks this machine for what would limit a run: versions, devices, disk, and the speed
of the input pipeline and of a train step. It trains nothing, keeps only the compiled
train step, and takes seconds.

  python -m jaxii.main doctor
  python -m jaxii.main doctor --config=mydata/mydata.py

{flags}

Exit codes: 0 all checks passed; 1 a check failed (each BROKEN line states the fix)."""


def declare(flags: Flags) -> None:
    """Declares the command's flags."""
    flags.takes_config("measure the input pipeline and train step of this recipe")
    flags.text(
        "data_dir",
        "DIR",
        "measure with the images of this dataset",
        otherwise="the recipe's, or JPEGs in memory of the size that prepare stores",
    )
    flags.text("workdir", "DIR", "folder whose disk to check", default="runs")


def run(flags: Flags) -> None:
    """Examines the machine."""
    if flags.config is None and flags.data_dir:
        raise InputError(
            "--data_dir requires a recipe that trains on it; add --config=FILE."
        )
    config = None if flags.config is None else config_of(flags)
    start_jax(flags)
    from jaxii.runs.doctor import doctor

    doctor(config, place=at(flags.workdir))
