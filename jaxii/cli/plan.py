"""`plan`: predicts what a configuration needs of devices that need not be there."""

from jaxii.cli.flags import Flags, config_of
from jaxii.cli.start import start_jax

HELP = """\
Compiles the train step for a TPU slice and prints what it needs per chip (memory,
arithmetic, traffic, collectives), an upper bound on its speed, and the largest batch
that fits. It needs no TPU, trains nothing and writes nothing. For kaggle and
open_images_v4 without --data_dir, it assumes the numbers of the published Open Images.

  pip install 'jaxii[tpu]'
  python -m jaxii.main plan --config configs/f2_multitask.py:inclusive_images \\
      --topology=v5e:16x16 --device_batch_size=128
  python -m jaxii.main plan --config configs/f2_multitask.py:inclusive_images \\
      --topology=v5e:2x2,v5e:4x4,v5e:8x8,v5e:16x16 --device_batch_size=128

{flags}

A ResNet-50 takes minutes to compile, and the search for the largest batch compiles it
two or three more times. Whether a batch fits is the compiler's answer, not an estimate.
Times are lower bounds (a roofline model); the assumptions are printed with them.

Exit codes: 0 the batch fits; 2 the batch does not fit, or the input is invalid."""


def declare(flags: Flags) -> None:
    """Declares the command's flags."""
    flags.takes_config()
    flags.texts(
        "topology",
        "NAMES",
        "TPU slices (v4, v5e, v5p or v6e) such as v5e:4x4; for several, a table shows "
        "how training scales; local stands for the devices of this machine",
        default=("local",),
    )
    flags.integer(
        "device_batch_size",
        "N",
        "images per chip",
        at_least=1,
        otherwise="global_batch_size / number of chips of the first topology",
    )
    flags.text(
        "stage",
        "NAME",
        "stage whose step to compile",
        otherwise="the stage with the embedding head and the most terms",
    )
    flags.text(
        "data_dir",
        "DIR",
        "prepared dataset, for the numbers of classes, labels and images",
        otherwise="7,178 classes for a kaggle dataset, 7,186 for open_images_v4",
    )
    flags.switch("quick", "compile once, without searching for the largest batch")


def run(flags: Flags) -> None:
    """Plans."""
    config = config_of(flags)
    start_jax(flags)
    from jaxii.runs.plan import plan

    plan(
        config,
        topology=flags.topology,
        device_batch_size=flags.device_batch_size or 0,
        stage=flags.stage,
        quick=flags.quick,
    )
