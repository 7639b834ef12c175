"""`plan`: predicts what a configuration needs of devices that need not be there."""

from jaxii.cli.flags import Flags, config_of
from jaxii.cli.start import start_jax

HELP = """\
Compiles the train step for a TPU slice that need not be there and prints what it needs
of each chip: memory, arithmetic, traffic, collectives; the highest speed it can reach;
the largest batch that fits. Trains nothing, writes nothing, needs no TPU, and no data
where the numbers of the published Open Images will do.

  pip install 'jaxii[tpu]'
  python -m jaxii.main plan --config configs/f2_multitask.py:inclusive_images \\
      --topology=v5e:16x16 --device_batch_size=128
  python -m jaxii.main plan --config configs/f2_multitask.py:inclusive_images \\
      --topology=v5e:2x2,v5e:4x4,v5e:8x8,v5e:16x16 --device_batch_size=128

{flags}

A ResNet-50 takes minutes to compile, and the search compiles it two or three times
more. That a batch does not fit is the compiler's answer, not an estimate. Times are
lower bounds (a roofline); the assumptions are printed with them.

Exit codes: 0 it fits; 2 it does not fit, or something given cannot be used."""


def declare(flags: Flags) -> None:
    """Declares the command's flags."""
    flags.takes_config()
    flags.texts(
        "topology",
        "NAMES",
        "slices such as v5e:4x4, of v4, v5e, v5p and v6e; several are a table of how "
        "training scales; local is the devices at hand",
        default=("local",),
    )
    flags.integer(
        "device_batch_size",
        "N",
        "images a chip",
        at_least=1,
        otherwise="the recipe's global_batch_size over the chips of the first topology",
    )
    flags.text(
        "stage",
        "NAME",
        "the stage whose step is compiled",
        otherwise="the one with the embedding head and most terms",
    )
    flags.text(
        "data_dir",
        "DIR",
        "the prepared dataset, for the numbers of classes, labels and images",
        otherwise="7,178 classes for a kaggle dataset, 7,186 for open_images_v4",
    )
    flags.switch("quick", "compile once: no search for the largest batch")


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
