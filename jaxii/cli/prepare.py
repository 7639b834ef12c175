"""`prepare`: writes the dataset that training reads."""

from jaxii.cli.flags import Flags, declare_near_copies, existing, required
from jaxii.errors import InputError
from jaxii.storage import at

HELP = """\
Reads a folder in the layout of Kaggle's Inclusive Images challenge (label CSVs and
images of any size, JPEG, PNG or WebP) and writes a TFDS dataset in one pass, using all
cores. Run the same command again to resume.

  python -m jaxii.main prepare --input_dir=kaggle --data_dir=data/inclusive_images

CSV files identify images by id, which is the file name without folder and suffix. Ids
are case-sensitive; white space around them is ignored. An image suffix is removed if no
image has the id with the suffix.

{flags}"""
LAYOUT_FILES = ("train_metadata", "test_labels", "test_metadata")


def declare(flags: Flags) -> None:
    """Declares the command's flags."""
    # Imported here because the module imports OpenCV.
    from jaxii.prepare.recode import SHORT_SIDE

    flags.text(
        "input_dir",
        "DIR",
        "folder with train_human_labels.csv, classes-trainable.csv and the other files",
    )
    flags.text(
        "data_dir", "DIR", "folder of the dataset; both folders may be gs://BUCKET/..."
    )
    flags.integer(
        "short_side",
        "PIXELS",
        "downscale larger images to this short side",
        default=SHORT_SIDE,
        at_least=16,
    )
    declare_near_copies(flags)
    flags.text(
        "train_metadata",
        "CSV",
        "columns image_id and any of group, domain, slice",
        otherwise="train_meta.csv",
    )
    flags.text(
        "test_labels",
        "CSV",
        "columns image_id,labels, used only for scoring; lists the test images if "
        "there is no sample submission",
        otherwise="test_labels.csv",
    )
    flags.text(
        "test_metadata",
        "CSV",
        "like train_metadata, for tuning and test images",
        otherwise="test_meta.csv",
    )
    flags.text(
        "beam_runner",
        "RUNNER",
        "write the shards with Apache Beam: DirectRunner, DataflowRunner or another "
        "runner; records and their order are the same as without Beam",
    )
    flags.texts("beam_options", "LIST", "options of the runner: project=P,region=R,...")


def run(flags: Flags) -> None:
    """Prepares the dataset."""
    directory, output = existing(flags, "input_dir"), required(flags, "data_dir")
    if flags.beam_options and not flags.beam_runner:
        raise InputError("--beam_options requires --beam_runner; give both or neither.")
    if output.exists() and not output.is_dir():
        raise InputError(f"--data_dir={output} is a file; use a new folder.")
    values = {name: flags.values[name].value for name in LAYOUT_FILES}
    from jaxii.console import progress, say
    from jaxii.prepare import kaggle
    from jaxii.prepare.beam import Beam

    beam = None
    if flags.beam_runner:
        beam = Beam(flags.beam_runner, tuple(flags.beam_options))
    layout = kaggle.Layout.find(
        directory, **{name: at(value) for name, value in values.items() if value}
    )
    for line in layout.notes(directory):
        say(line)
    with progress() as on_progress:
        counts = kaggle.prepare(
            layout,
            output,
            short_side=flags.short_side,
            near_copies=flags.near_copies,
            beam=beam,
            on_progress=on_progress,
        )
    for line in counts.lines():
        say(line)
    say(f"dataset   {output}")
