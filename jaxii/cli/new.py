"""`new`: prepares images of one's own and writes a recipe for them."""

import re
from pathlib import Path

from jaxii.cli.flags import (
    Flags,
    declare_label_file,
    declare_near_copies,
    existing,
    label_file_of,
    local,
)
from jaxii.cli.start import start_jax
from jaxii.errors import InputError
from jaxii.storage import at

HELP = """\
Reads a folder of images and a label file, prints its findings and assumptions, and
writes a recipe, NAME/NAME.py, and a prepared dataset, NAME/data. The images are not
changed. The output ends with the command that trains. Run the same command again to
resume.

  python -m jaxii.main new mydata --images=photos --labels=labels.csv
  python -m jaxii.main train --config=mydata/mydata.py --workdir=runs/mydata

{flags}

Columns named split (train, validation, tuning, test), group, domain, slice and
confidence are used as such; see jaxii/prepare/README.md. Labels of tuning are used only
with --allow_tuning_labels (adapt, evaluate --tune_on=tuning)."""


def declare(flags: Flags) -> None:
    """Declares the command's flags."""
    flags.takes_words("NAME")
    flags.text("images", "DIR", "folder of images; subfolders are included")
    declare_label_file(flags)
    flags.integer(
        "min_images",
        "N",
        "leave out labels with fewer training images",
        default=1,
        at_least=1,
    )
    flags.number(
        "minutes",
        "M",
        "approximate minutes of training on this machine, within 1 to 100 epochs",
        otherwise="30 on CPUs; 18 to 40 epochs on accelerators",
    )
    flags.integer(
        "short_side",
        "PIXELS",
        "downscale larger images to this short side",
        at_least=16,
        otherwise="chosen by the image size of the recipe",
    )
    declare_near_copies(flags)


def run(flags: Flags) -> None:
    """Prepares the data and writes the recipe."""
    words = flags.words
    if len(words) != 1 or not re.fullmatch(r"[\w-]+", Path(words[0]).name):
        raise InputError(
            f"new needs one name of letters, digits, _ and -, not "
            f"{' '.join(words) or 'none'}; the name is that of the folder to create: "
            "new mydata --images=DIR --labels=FILE."
        )
    folder = local("NAME", at(words[0]))
    images = local("--images", existing(flags, "images"))
    labels = local("--labels", existing(flags, "labels")) if flags.labels else None
    start_jax(flags)
    import jax

    from jaxii.models.cpu import has_fast_bfloat16
    from jaxii.prepare.new import new
    from jaxii.runs.speed import pace_of

    new(
        folder,
        images=images,
        labels=labels,
        **label_file_of(flags),
        min_images=flags.min_images,
        short_side=flags.short_side or 0,
        near_copies=flags.near_copies,
        platform=jax.default_backend(),
        num_devices=jax.device_count(),
        fast_bfloat16=has_fast_bfloat16(),
        pace_of=pace_of,
        minutes=flags.minutes,
    )
