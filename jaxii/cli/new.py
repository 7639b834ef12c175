"""`new`: prepares images of one's own and writes a recipe for them."""

import re
from pathlib import Path

from jaxii.cli.flags import Flags, existing
from jaxii.cli.start import start_jax
from jaxii.errors import InputError
from jaxii.storage import AnyPath, at

HELP = """\
Inspects images and a label file as you have them, prints what it finds and assumes,
and writes NAME/: a recipe, NAME.py, and the prepared dataset, NAME/data. Images are not
changed. It ends with the command that trains. The same command again continues an
interrupted one.

  python -m jaxii.main new mydata --images=photos --labels=labels.csv
  python -m jaxii.main train --config=mydata/mydata.py --workdir=runs/mydata

{flags}

Columns called split (train, validation, test), group, domain, slice and confidence are
used as such; see prepare --help."""
# The same as `prepare.tables.rows.CHOICES` without "", which imports Polars.
SEPARATORS = ("none", "|", ";", ",", "space", "json")


def declare(flags: Flags) -> None:
    """Declares the command's flags."""
    flags.takes_words("NAME")
    flags.text("images", "DIR", "images, in subfolders or not")
    flags.text(
        "labels",
        "FILE",
        "CSV, TSV, Parquet or JSON Lines with a column of paths or ids, and labels: "
        "one row per label, or one row per image with several labels in a cell (also "
        "as a list), or a column of 0 and 1 for each label",
        otherwise="folders are labels",
    )
    flags.text(
        "path_column",
        "NAME",
        "the column that names the images",
        otherwise="the one whose cells name most",
    )
    flags.text(
        "label_column",
        "NAME",
        "the column with the labels",
        otherwise="by its name, or the only one left",
    )
    flags.choice(
        "label_separator",
        "CHAR",
        SEPARATORS,
        "between labels in a cell",
        otherwise="found from all cells; the rule is printed",
    )
    flags.switch("fold_case", "merge labels that differ only in case")
    flags.integer(
        "min_images",
        "N",
        "leave out labels with fewer training images",
        default=1,
        at_least=1,
    )
    flags.integer(
        "short_side",
        "PIXELS",
        "reduce larger images to this short side",
        at_least=16,
        otherwise="by the image size of the recipe",
    )


def run(flags: Flags) -> None:
    """Prepares the data and writes the recipe."""
    words = flags.words
    if len(words) != 1 or not re.fullmatch(r"[\w-]+", Path(words[0]).name):
        raise InputError(
            f"new needs one name, of letters, digits, _ and -, not "
            f"{' '.join(words) or 'none'}; it is the folder that is made: new mydata "
            "--images=DIR --labels=FILE."
        )
    folder = _local("NAME", at(words[0]))
    images = _local("--images", existing(flags, "images"))
    labels = _local("--labels", existing(flags, "labels")) if flags.labels else None
    start_jax(flags)
    import jax

    from jaxii.prepare.new import new

    new(
        folder,
        images=images,
        labels=labels,
        path_column=flags.path_column,
        label_column=flags.label_column,
        label_separator=flags.label_separator or "",
        fold_case=flags.fold_case,
        min_images=flags.min_images,
        short_side=flags.short_side or 0,
        platform=jax.default_backend(),
        num_devices=jax.device_count(),
    )


def _local(name: str, path: AnyPath) -> Path:
    if isinstance(path, Path):
        return path
    raise InputError(
        f"{name}={path} is in a bucket; new reads local files: mount it, or "
        "copy it to this machine."
    )
