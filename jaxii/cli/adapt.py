"""`adapt`: fine-tunes a trained run on the tuning split."""

from jaxii.cli.flags import (
    Flags,
    declare_data_dir,
    declare_verify,
    existing,
    required,
)
from jaxii.cli.start import declare_processes, start_jax
from jaxii.config import ADAPT_EPOCHS, ADAPT_LR_SHARES
from jaxii.errors import InputError

HELP = """\
Fine-tunes a trained run on the labels of the tuning split, in a new workdir, and
evaluates it there. These labels come from the target domain; all resulting figures and
files state this in their provenance. Run the same command again to resume.

The tuning split has the images with tuning in the column split of the label file (new),
or those in tuning_labels.csv (prepare). As it is small, a batch has at most 64 images,
or one per device.

  python -m jaxii.main adapt --workdir=runs/emoji --output=runs/emoji_adapted \\
      --allow_tuning_labels

{flags}"""


def declare(flags: Flags) -> None:
    """Declares the command's flags."""
    parts = tuple(ADAPT_EPOCHS)
    flags.text("workdir", "DIR", "workdir of a trained run")
    flags.text("output", "DIR", "workdir of the adapted run")
    flags.choice("train", "PART", parts, "layers to train", default=parts[0])
    flags.number(
        "num_epochs",
        "NUMBER",
        "passes over the tuning split",
        otherwise=", ".join(f"{ADAPT_EPOCHS[part]:g} for {part}" for part in parts),
    )
    flags.number(
        "peak_lr",
        "RATE",
        "highest learning rate",
        otherwise="the highest of the run's stages, times "
        + ", ".join(f"{ADAPT_LR_SHARES[part]:g} for {part}" for part in parts),
    )
    flags.text(
        "stage",
        "NAME",
        "stage whose best checkpoint to start from",
        otherwise="the last stage",
    )
    declare_data_dir(flags)
    declare_verify(flags)
    flags.switch(
        "allow_tuning_labels", "required, as the weights learn from the target domain"
    )
    flags.switch(
        "change_batch_size",
        "resume with another batch size, because the number of devices has changed",
    )
    declare_processes(flags)


def run(flags: Flags) -> None:
    """Adapts."""
    if not flags.allow_tuning_labels:
        raise InputError(
            "adapt trains the weights on labels of the target domain; add "
            "--allow_tuning_labels to allow this."
        )
    workdir, output = existing(flags, "workdir"), required(flags, "output")
    start_jax(flags, saves_on_sigterm=True)
    from jaxii.distributed import processes
    from jaxii.runs.adapt import adapt
    from jaxii.runs.workdir import Workdir

    adapt(
        Workdir(workdir),
        output=output,
        stage=flags.stage,
        trainable=flags.train,
        num_epochs=flags.num_epochs or 0.0,
        peak_lr=flags.peak_lr or 0.0,
        data_dir=flags.data_dir,
        should_stop=processes.preemption_notice(),
        change_batch_size=flags.change_batch_size,
        verify=flags.verify,
    )
