"""`new`: images and a label file, looked at, to a recipe that trains."""

import os
import shlex
import tempfile
from pathlib import Path

from jaxii.console import progress, say
from jaxii.errors import InputError
from jaxii.prepare import recipe as recipes
from jaxii.prepare.tables import image_folder, labelled, rows, write
from jaxii.prepare.tables.labelled import Labelled
from jaxii.prepare.tables.notes import Notes


def new(
    folder: Path,
    *,
    images: Path,
    labels: Path | None,
    path_column: str,
    label_column: str,
    label_separator: str,
    fold_case: bool,
    min_images: int,
    platform: str,
    num_devices: int,
) -> None:
    """Looks at the data, says what it assumes and writes a recipe and label files.

    Args:
      folder: is made; its name is that of the data set.
      images: the folder of images, which are neither copied nor changed.
      labels: the label file; None takes folders for labels.
      path_column: the column that names the images; "" finds it.
      label_column: the column of labels; "" finds it.
      label_separator: what is between labels in a cell; "" finds it out.
      fold_case: whether labels that differ by case alone are one.
      min_images: labels with fewer training images are left out.
      platform: what the recipe will train on, as JAX names it: cpu, gpu or tpu.
      num_devices: devices of that platform.

    Raises:
      InputError: data that cannot be used; nothing is written then.
    """
    if folder.exists():
        raise InputError(f"{folder} is there already; give another name or remove it.")
    notes = Notes()
    try:
        files = image_folder.find(images, notes)
        given = _read_labels(
            labels, files, images, notes, path_column, label_column, label_separator
        )
        with progress() as on_progress:
            found = labelled.put_together(
                given,
                files,
                images,
                notes,
                fold_case=fold_case,
                min_images=min_images,
                on_progress=on_progress,
            )
    finally:
        # What was found before a refusal helps to understand it.
        for line in notes.lines:
            say(line)
    _write_recipe(folder, found, platform, num_devices)


def _read_labels(
    labels, files, images, notes, path_column, label_column, label_separator
) -> rows.Rows:
    if labels is None:
        return rows.of_folders(files, images, notes)
    return rows.of_file(
        labels,
        files,
        images,
        notes,
        path_column=path_column,
        label_column=label_column,
        label_separator=label_separator,
    )


def _write_recipe(
    folder: Path, found: Labelled, platform: str, num_devices: int
) -> None:
    facts = _facts(folder.name, found, platform, num_devices)
    chosen = recipes.choose(facts)
    for choice in chosen.choices:
        say(f"recipe    {choice.field} = {choice.value!r}: {choice.why}")
    say(f"recipe    {_stages_in_words(facts, chosen)}")
    say("recipe    images are mirrored left to right: data.mirror=False if that lies")
    commands = _commands(folder)
    _write(folder, found, recipes.text(facts, chosen, commands))
    say(f"written   {folder}: {folder.name}.py is the recipe, files/ the label files")
    say("next")
    for command in commands:
        say(f"  {command}")


def _facts(
    name: str, found: Labelled, platform: str, num_devices: int
) -> recipes.Facts:
    validation, train = found.split("validation"), found.split("train")
    groups = found.extra.get("group")
    distinct = {groups[i] or str(i) for i in train} if groups else train
    return recipes.Facts(
        name=name,
        num_images=len(train),
        num_groups=len(distinct),
        num_labels=len(found.labels),
        short_side=found.short_side,
        several_labels=found.num_pairs() / len(train),
        has_validation=bool(validation),
        platform=platform,
        num_devices=num_devices,
        num_cores=os.cpu_count() or 1,
    )


def _stages_in_words(facts: recipes.Facts, chosen: recipes.Recipe) -> str:
    epochs = " + ".join(f"{epochs:g}" for epochs in chosen.epochs)
    pairs = f"{facts.several_labels:.0%} of the images have two labels or more"
    head = "with" if chosen.has_embedding else "without"
    return f"stages of {epochs} epochs, {head} a label embedding: {pairs}"


def _commands(folder: Path) -> list[str]:
    start = "python -m jaxii.main"
    inputs, data = (shlex.quote(str(folder / name)) for name in ("files", "prepared"))
    config = shlex.quote(str(folder / f"{folder.name}.py"))
    return [
        f"{start} prepare --input_dir={inputs} --data_dir={data}",
        f"{start} train --config={config} --workdir=runs/{folder.name}",
    ]


def _write(folder: Path, found: Labelled, text: str) -> None:
    # Whole or not at all: beside its place, then renamed.
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new") as beside:
            part = Path(beside) / folder.name
            write.write(found, part / "files")
            (part / f"{folder.name}.py").write_text(text, encoding="utf-8")
            part.rename(folder)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}).") from error
