"""`evaluate`: measures a trained run."""

from jaxii.cli.flags import (
    DECODERS,
    Flags,
    declare_data_dir,
    declare_inference,
    declare_verify,
    existing,
    inference_of,
)
from jaxii.cli.start import declare_processes, start_jax
from jaxii.errors import InputError

HELP = """\
Measures the best checkpoint of a run on validation and test, with every decoder fitted
on one split; writes metrics.json, label_figures.csv, report.html and submission.csv.

  python -m jaxii.main evaluate --workdir=runs/emoji

{flags}"""


def declare(flags: Flags) -> None:
    """Declares the command's flags."""
    flags.text("workdir", "DIR", "a trained run")
    flags.text(
        "stage",
        "NAME",
        "the stage whose best checkpoint is measured",
        otherwise="the last",
    )
    declare_data_dir(flags)
    declare_verify(flags)
    flags.choice(
        "decoder",
        "NAME",
        DECODERS,
        "the decoder that makes the result and the submission",
        default=DECODERS[0],
    )
    flags.choice(
        "tune_on",
        "SPLIT",
        ("validation", "held_out", "tuning"),
        "the split that decoders are fitted on; after hold_out, held_out takes the "
        "threshold found there",
        otherwise="held_out if a domain is held out, else validation",
    )
    declare_inference(flags, "each split's images")
    flags.switch(
        "allow_tuning_labels",
        "needed with --tune_on=tuning, with an ensemble of which a run has learnt from "
        "tuning labels, and with a run that was trained on test images; the results "
        "say so",
    )
    declare_processes(flags)


def run(flags: Flags) -> None:
    """Evaluates."""
    if flags.tune_on == "tuning" and not flags.allow_tuning_labels:
        raise InputError(
            "--tune_on=tuning lets labels of the target domain choose the threshold; "
            "add --allow_tuning_labels if that is meant."
        )
    workdir = existing(flags, "workdir")
    start_jax(flags)
    from jaxii.runs.evaluate import evaluate
    from jaxii.runs.workdir import Workdir

    evaluate(
        Workdir(workdir),
        data_dir=flags.data_dir,
        stage=flags.stage,
        tune_on=flags.tune_on or "",
        decoder=flags.decoder,
        options=inference_of(flags),
        verify=flags.verify,
    )
