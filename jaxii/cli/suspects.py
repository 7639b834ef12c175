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
Lists labels of training images that are likely wrong or missing, the most likely first,
as a CSV file and as one page with the images. A label is suspect where it contradicts
what a model that was not trained on the image is sure of (confident learning).

  python -m jaxii.main hold_out --workdir=runs/emoji --folds=4
  python -m jaxii.main suspects --workdir=runs/emoji

hold_out trains the models: each is not trained on a fold, so that all images have one.
Runs that held out each domain serve, too. Without them, only the images of the run's
own validation split are looked at, which takes no training.

Then correct the label file, prepare it into a new folder, and train again. Before that,
look: labels of things that are hard to see are among the suspects.

{flags}

Columns of the CSV file, a row a label of an image:
  image_id, label, name
  given        1: the image has the label (likely wrong); 0: it has not (likely missing)
  probability  of the label, by the model that was not trained on the image
  score        0 to 1: how much that contradicts the label, by what the model says of
               images with and without this label; above 0.5 for all that are listed
  split        held_out: predicted by a run of hold_out; validation: by the run itself
  domain       of the image"""


def declare(flags: Flags) -> None:
    """Declares the command's flags."""
    flags.text("workdir", "DIR", "a trained run, or that of hold_out")
    declare_data_dir(flags)
    flags.text("output", "CSV", "the labels", otherwise="WORKDIR/suspects.csv")
    flags.text("sheet", "HTML", "the images", otherwise="WORKDIR/suspects.html")
    flags.integer(
        "top", "N", "number of labels that are listed", default=500, at_least=1
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
