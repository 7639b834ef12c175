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
Predicts the labels of images and writes a submission, JSON lines with scores, or a
contact sheet. It needs an evaluated workdir, but not the dataset.

  python -m jaxii.main predict --workdir=runs/emoji --images=photos --output=answers.csv
  python -m jaxii.main predict --workdir=runs/emoji --images=list.csv \\
      --output=answers.jsonl --sheet=answers.html
  python -m jaxii.main predict --workdir=runs/emoji --sheet=answers.html --images *.jpg

{flags}

--images takes one of
  DIR    all images in a folder and its subfolders (.jpg, .jpeg, .png, .webp; no hidden
         files), sorted by path
  CSV    the images listed in a .csv file with a header, in its order: one column named
         path, file, filename, file_name, image_path or image contains paths relative to
         the folder of the CSV file; an optional column image_id contains ids; a path
         that does not exist is tried again with "/" and composed letters
  FILES  images and patterns ('photos/**/*.jpg'), separated by commas, in the given
         order; words after the flags are further images

--output writes a format that depends on the suffix:
  .csv    image_id,labels
  .jsonl  one object per image: image_id, file, decoder, labels (code, name, score),
          scores (all of at least 0.01), error if the image is damaged

Images are read as in prepare. A damaged image, or an id without a file, is reported on
stderr and keeps its row: in a submission, with the most frequent training labels (the
best constant prediction, see metrics.json); in JSON lines, with an error and no labels.

Answers are saved every minute in a hidden folder beside --output. If the command is
interrupted, the same command continues after them, with any number of processes but the
same number of devices. It starts again if the list of images, the run, the evaluation
or a flag has changed, or with --sheet. An image that was replaced meanwhile keeps its
answer. --adapt_bn and --label_shift read all images first, also when it continues.

The last line is the expected F2 of these images, from calibrated probabilities. Its
error is the root mean square error on held-out domains (run hold_out, then evaluate and
predict with --tune_on=held_out).

Exit codes: 0 done, even if some images are damaged (the last lines count them); 2 the
input is invalid, or no image can be read."""
# The files that --output writes, by the ending of its name.
OUTPUTS = (".csv", ".jsonl")


def declare(flags: Flags) -> None:
    """Declares the command's flags."""
    flags.takes_words("[IMAGES]")
    flags.text("workdir", "DIR", "workdir of a trained and evaluated run")
    flags.text("images", "DIR|CSV|FILES", "images to predict, see below")
    flags.text(
        "ids",
        "CSV",
        "sample submission with the ids to predict, in order; the id of an image is "
        "its file name without folder and suffix; if files in the folder --images "
        "share names, its path below that folder without suffix (a file name that is "
        "listed means the first of identical files)",
        otherwise="all images",
    )
    flags.text(
        "output",
        "FILE",
        ".csv or .jsonl file, see below",
        otherwise="WORKDIR/predictions.csv, or none if --sheet is given",
    )
    flags.text(
        "sheet",
        "HTML",
        "contact sheet: a page with small images and their labels; shows at most 500 "
        "images, evenly spaced",
    )
    flags.choice(
        "decoder",
        "NAME",
        DECODERS,
        "decoder that chooses the labels",
        otherwise="the decoder of the evaluation",
    )
    flags.choice(
        "tune_on",
        "SPLIT",
        ("held_out", "tuning"),
        "use the decoders that evaluate --tune_on=SPLIT fitted",
        otherwise="those that evaluate fitted without --tune_on",
    )
    declare_inference(flags, "these images")
    flags.switch(
        "allow_tuning_labels",
        "required for an ensemble with a run that has learned from tuning labels",
    )
    declare_processes(flags)


def run(flags: Flags) -> None:
    """Predicts."""
    workdir = existing(flags, "workdir")
    images = [*filter(None, [flags.images]), *flags.words]
    if not images:
        raise InputError("--images is missing; see --help.")
    output = file_to_write(flags, "output", "CSV or JSON lines")
    sheet = file_to_write(flags, "sheet", "HTML")
    if output is None and sheet is None:
        output = workdir / "predictions.csv"
    if output is not None and output.suffix not in OUTPUTS:
        raise InputError(
            f"--output={output} does not end in {' or '.join(OUTPUTS)}; use .csv for a "
            "submission, or .jsonl for JSON lines with scores."
        )
    check_two_files(output, sheet)
    start_jax(flags)
    from jaxii.runs.predict import Request, predict
    from jaxii.runs.workdir import Workdir

    request = Request(
        images=images[0],
        more=tuple(images[1:]),
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
