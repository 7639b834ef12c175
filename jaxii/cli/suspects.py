"""`suspects`: lists labels of the training data that may be wrong or missing."""

from jaxii.cli.flags import (
    Flags,
    check_two_files,
    declare_data_dir,
    existing,
    file_to_write,
)
from jaxii.cli.start import declare_processes, start_jax

HELP = """\
Lists labels of training images that are likely wrong or missing, most likely first, as
a CSV file and as a page with the images. A label is suspect if it contradicts a
confident prediction of a model that was not trained on the image (confident learning).

  python -m jaxii.main hold_out --workdir=runs/emoji --folds=4
  python -m jaxii.main suspects --workdir=runs/emoji

hold_out trains the models: each leaves out one fold, so every image has a model that
was not trained on it. Runs that hold out domains work too. Without such runs, only the
run's own validation split is examined, which needs no training. The predictions take
12 bytes of memory per image and label: 1 GB for 100,000 images and 800 labels.

Review the suspects: correct labels of objects that are hard to see are among them. Then
correct the label file, prepare it into a new folder, and train again.

{flags}

Columns of the CSV file, one row per label of an image:
  image_id, label, name
  given        1: label given (likely wrong); 0: label not given (likely missing)
  probability  of the label, by the model that was not trained on the image
  score        0 to 1: how strongly the probability contradicts the label, relative to
               images with and without this label; above 0.5 for all listed labels
  split        held_out: predicted by a run of hold_out; validation: by the run itself
  domain       of the image"""


def declare(flags: Flags) -> None:
    """Declares the command's flags."""
    flags.text("workdir", "DIR", "workdir of a trained run, or of hold_out")
    declare_data_dir(flags)
    flags.text(
        "output", "CSV", "file of the suspect labels", otherwise="WORKDIR/suspects.csv"
    )
    flags.text(
        "sheet", "HTML", "page with their images", otherwise="WORKDIR/suspects.html"
    )
    flags.integer(
        "top", "N", "largest number of labels to list", default=500, at_least=1
    )
    declare_processes(flags)


def run(flags: Flags) -> None:
    """Lists suspects."""
    workdir = existing(flags, "workdir")
    output = file_to_write(flags, "output", "labels") or workdir / "suspects.csv"
    sheet = file_to_write(flags, "sheet", "images") or workdir / "suspects.html"
    check_two_files(output, sheet)
    start_jax(flags)
    from jaxii.runs.suspects import suspects
    from jaxii.runs.workdir import Workdir

    suspects(
        Workdir(workdir),
        data_dir=flags.data_dir,
        output=output,
        sheet=sheet,
        top=flags.top,
    )
