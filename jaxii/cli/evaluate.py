"""`evaluate`: measures a trained run."""

from jaxii.cli.flags import (
    DECODERS,
    Flags,
    declare_data_dir,
    declare_inference,
    declare_label_file,
    declare_verify,
    existing,
    inference_of,
    label_file_of,
    local,
)
from jaxii.cli.start import declare_processes, start_jax
from jaxii.errors import InputError
from jaxii.storage import AnyPath

HELP = """\
Evaluates the best checkpoint of a run on validation and test, with all decoders fitted
on one split, and writes metrics.json, label_figures.csv, report.html and
submission.csv. With --images, measures an evaluated run on other labelled images.
Nothing is fitted on them: weights, calibration and thresholds are those of the run. The
figures are added to report.html and to the columns of compare; all files are in
WORKDIR/sets.

  python -m jaxii.main evaluate --workdir=runs/emoji
  python -m jaxii.main evaluate --workdir=runs/emoji --images=holiday \\
      --labels=holiday.csv --name=holiday

{flags}

The columns slice (or else domain) and group of the label file are used as in `new`:
figures are reported per slice, and intervals resample whole groups. Labels that the run
does not have and images that cannot be read are counted, listed and left out."""
# Flags that say how the run's own splits are evaluated.
OF_SPLITS = (
    *("stage", "data_dir", "verify", "decoder", "tune_on"),
    *("ensemble", "adapt_bn", "label_shift", "allow_tuning_labels"),
)
# Flags that say which images are measured instead, and how their labels are read.
OF_SET = (
    *("labels", "name", "path_column"),
    *("label_column", "label_separator", "fold_case"),
)


def declare(flags: Flags) -> None:
    """Declares the command's flags."""
    flags.text("workdir", "DIR", "workdir of a trained run")
    flags.text(
        "stage",
        "NAME",
        "stage whose best checkpoint to evaluate",
        otherwise="the last stage",
    )
    declare_data_dir(flags)
    declare_verify(flags)
    flags.choice(
        "decoder",
        "NAME",
        DECODERS,
        "decoder of the result and the submission",
        default=DECODERS[0],
    )
    flags.choice(
        "tune_on",
        "SPLIT",
        ("validation", "held_out", "tuning"),
        "split to fit the decoders on; after hold_out, held_out contains all domains, "
        "each predicted by the run trained without it",
        otherwise="held_out if a domain is held out, else validation",
    )
    declare_inference(flags, "the images of each split but validation")
    flags.switch(
        "allow_tuning_labels",
        "required for --tune_on=tuning, for an ensemble with a run that has learned "
        "from tuning labels, and for a run that was trained on test images; the "
        "results state this",
    )
    flags.text(
        "images", "DIR", "evaluate on the labelled images of this folder instead"
    )
    flags.text(
        "name", "NAME", "name of these images in results", otherwise="the folder's name"
    )
    declare_label_file(flags)
    declare_processes(flags)


def run(flags: Flags) -> None:
    """Evaluates."""
    _check(flags)
    workdir = existing(flags, "workdir")
    if flags.images:
        _evaluate_set(flags, workdir)
        return
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


def _evaluate_set(flags: Flags, workdir: AnyPath) -> None:
    images = local("--images", existing(flags, "images"))
    labels = local("--labels", existing(flags, "labels")) if flags.labels else None
    start_jax(flags)
    from jaxii.runs.labelled_set import evaluate_set
    from jaxii.runs.run import Run
    from jaxii.runs.workdir import Workdir

    stage = Workdir(workdir).metrics().stage
    options = label_file_of(flags)
    with Run.open(workdir, stage) as run:
        evaluate_set(run, images=images, labels=labels, name=flags.name, **options)


def _check(flags: Flags) -> None:
    """Raises InputError if flags do not fit together."""
    others = OF_SPLITS if flags.images else OF_SET
    given = [name for name in others if flags.values[name].present]
    if given and flags.images:
        raise InputError(
            f"--{given[0]} applies only to the run's own splits; --images uses the "
            "checkpoint and the decoders of the run's evaluation and fits nothing. "
            f"Remove --{given[0]}, or run evaluate without --images first."
        )
    if given:
        raise InputError(
            f"--{given[0]} requires --images=DIR, the folder of labelled images; add "
            "it."
        )
    if flags.tune_on == "tuning" and not flags.allow_tuning_labels:
        raise InputError(
            "--tune_on=tuning chooses the threshold with labels of the target domain; "
            "add --allow_tuning_labels to allow this."
        )
