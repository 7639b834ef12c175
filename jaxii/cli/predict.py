"""`predict`: writes the labels of images."""

from jaxii.cli.flags import (
    DECODERS,
    Flags,
    check_two_files,
    declare_inference,
    existing,
    file_to_write,
    inference_of,
)
from jaxii.cli.start import declare_processes, start_jax
from jaxii.errors import InputError
from jaxii.storage import at

HELP = """\
Writes the labels of images: a submission, JSON lines with scores, or a contact sheet.
Needs no dataset, only a workdir that has been evaluated.

  python -m jaxii.main predict --workdir=runs/emoji --images=photos --output=answers.csv
  python -m jaxii.main predict --workdir=runs/emoji --images=list.csv \\
      --output=answers.jsonl --sheet=answers.html
  python -m jaxii.main predict --workdir=runs/emoji --sheet=answers.html --images *.jpg

{flags}

--images takes one of
  DIR    the images in a folder and its subfolders (.jpg, .jpeg, .png, .webp; nothing
         hidden), sorted by path
  CSV    the images that a .csv lists, in its order: a header; paths in the one column
         named path, file, filename, file_name, image_path or image, relative to the
         CSV's own folder; ids in the column image_id, if there is one
  FILES  images and patterns ('photos/**/*.jpg'), with commas between them, in the order
         given; words after the flags are further images

--output writes, by the ending of its name,
  .csv    image_id,labels
  .jsonl  an object an image: image_id, file, decoder, labels (code, name, score),
          scores (all from 0.01 on), error if it is damaged

Images are read as prepare reads them. A damaged image, or an id without a file, is
named on stderr and keeps its row: in a submission with the most frequent labels of
training (as many as do best unseen, see metrics.json), in JSON lines with an error and
no label.

The last line is the F2 to expect of these images, from calibrated probabilities; its
error is the root mean square on domains held out of training (hold_out, then evaluate
and predict with --tune_on=held_out).

Exit codes: 0 done, also with damaged images, which the last lines count; 2 something
given cannot be used, or no image can be read."""
# The files that --output writes, by the ending of its name.
OUTPUTS = (".csv", ".jsonl")


def declare(flags: Flags) -> None:
    """Declares the command's flags."""
    flags.takes_words("[IMAGES]")
    flags.text("workdir", "DIR", "a trained and evaluated run")
    flags.text("images", "DIR|CSV|FILES", "the images, see below")
    flags.text(
        "ids",
        "CSV",
        "a sample submission: which ids, in which order; the id of an image is its "
        "name without folder and ending",
        otherwise="all images",
    )
    flags.text(
        "output",
        "FILE",
        "a .csv or .jsonl, see below",
        otherwise="WORKDIR/predictions.csv, unless there is a --sheet",
    )
    flags.text(
        "sheet",
        "HTML",
        "a contact sheet: one page with small images and their labels; of more than "
        "500 images it shows 500, evenly spaced",
    )
    flags.choice(
        "decoder",
        "NAME",
        DECODERS,
        "the decoder that chooses the labels",
        otherwise="that of the evaluation",
    )
    flags.choice(
        "tune_on",
        "SPLIT",
        ("held_out", "tuning"),
        "use the decoders that evaluate --tune_on fitted on this split",
        otherwise="those that evaluate fitted without it",
    )
    declare_inference(flags, "these images")
    flags.switch(
        "allow_tuning_labels",
        "needed with an ensemble of which a run has learnt from tuning labels",
    )
    declare_processes(flags)


def run(flags: Flags) -> None:
    """Predicts."""
    workdir = existing(flags, "workdir")
    if not flags.images:
        raise InputError("--images is missing; see --help of the command.")
    output = file_to_write(flags, "output", "CSV or JSON lines")
    sheet = file_to_write(flags, "sheet", "HTML")
    if output is None and sheet is None:
        output = workdir / "predictions.csv"
    if output is not None and output.suffix not in OUTPUTS:
        raise InputError(
            f"--output={output} ends in neither of {', '.join(OUTPUTS)}; its ending "
            "says what is written: a submission, or JSON lines with scores."
        )
    check_two_files(output, sheet)
    start_jax(flags)
    from jaxii.runs.predict import Request, predict
    from jaxii.runs.workdir import Workdir

    request = Request(
        images=flags.images,
        more=tuple(flags.words),
        ids=at(flags.ids) if flags.ids else None,
        output=output,
        sheet=sheet,
    )
    predict(
        Workdir(workdir),
        request=request,
        decoder=flags.decoder or "",
        options=inference_of(flags),
        tune_on=flags.tune_on or "",
    )
