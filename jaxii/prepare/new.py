"""Implements `new`: prepares images and labels and writes a recipe to train on them."""

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from jaxii.console import progress, say
from jaxii.data import folder as prepared
from jaxii.errors import InputError
from jaxii.prepare import recipe as recipes
from jaxii.prepare.build import build
from jaxii.prepare.recurring import KEEP
from jaxii.prepare.tables import labelled
from jaxii.prepare.tables.labelled import Labelled
from jaxii.prepare.tables.notes import Notes
from jaxii.storage import is_leftover, write_beside


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
    fast_bfloat16: bool,
    pace_of: Callable[[Mapping[str, Any]], recipes.Pace],
    minutes: float | None = None,
    short_side: int = 0,
    near_copies: str = KEEP,
) -> None:
    """Prepares images and labels as FOLDER/data and writes the recipe FOLDER/NAME.py.

    An interrupted call continues where it stopped. A dataset whose images and labels
    did not change is not prepared again, and an existing recipe is kept.

    Args:
      folder: Created if absent; its name becomes the name of the dataset.
      images: The folder of images, which are not changed.
      labels: The label file; see `tables.labelled.read` for this and the next five.
      path_column: "" detects it, like the next two.
      platform: The platform to train on: cpu, gpu or tpu.
      num_devices: Number of devices of that platform.
      fast_bfloat16: Whether CPUs compute bfloat16 faster than float32.
      pace_of: Measures the pace of a configuration, given its fields.
      minutes: Duration of training; see `recipe.choose`.
      short_side: Short side that larger images are reduced to, in pixels; 0 chooses it.
      near_copies: See `build.build`.

    Raises:
      InputError: If the data cannot be used, or the folder holds something else.
    """
    data = folder / "data"
    begun = (data / prepared.INPUTS_FILE).exists()
    if not begun and any(
        path.is_file() and not is_leftover(path.name) for path in folder.rglob("*")
    ):
        raise InputError(
            f"{folder} contains files that new did not write; use another name."
        )
    found = _read(
        images,
        labels,
        path_column=path_column,
        label_column=label_column,
        label_separator=label_separator,
        fold_case=fold_case,
        min_images=min_images,
    )
    facts = _facts(folder.name, found, platform, num_devices, fast_bfloat16)
    side = short_side or prepared.short_side(data) or recipes.short_side(facts)
    _prepare(found, data, side, near_copies, labels)
    _write_recipe(folder, facts, pace_of, minutes)


def _prepare(
    found: Labelled, data: Path, short_side: int, near_copies: str, labels: Path | None
) -> None:
    labels_hash = xxhash.xxh3_128_hexdigest(labels.read_bytes()) if labels else ""
    with progress() as on_progress:
        counts = build(
            found.drafts(),
            found.vocabulary,
            data,
            short_side=short_side,
            inputs_hash=labels_hash,
            near_copies=near_copies,
            on_progress=on_progress,
        )
    for line in counts.lines():
        say(f"prepared  {line}")


def _read(images: Path, labels: Path | None, **options: Any) -> Labelled:
    notes = Notes()
    with notes.printed(), progress() as on_progress:
        return labelled.read(images, labels, notes, on_progress=on_progress, **options)


def _facts(
    name: str, found: Labelled, platform: str, num_devices: int, fast_bfloat16: bool
) -> recipes.Facts:
    validation, train = found.split("validation"), found.split("train")
    groups, domains = found.extra.get("group"), found.extra.get("domain")
    distinct = {groups[i] or str(i) for i in train} if groups else train
    return recipes.Facts(
        name=name,
        num_images=len(train),
        num_evaluated=len(validation) + len(found.split("test")),
        num_groups=len(distinct),
        num_domains=len({domains[i] for i in train}) if domains else 1,
        num_labels=len(found.labels),
        short_side=found.short_side,
        has_validation=bool(validation),
        platform=platform,
        num_devices=num_devices,
        fast_bfloat16=fast_bfloat16,
    )


def _write_recipe(
    folder: Path,
    facts: recipes.Facts,
    pace_of: Callable[[Mapping[str, Any]], recipes.Pace],
    minutes: float | None,
) -> None:
    file, data = folder / f"{folder.name}.py", folder / "data"
    config, workdir = shlex.quote(str(file)), f"runs/{folder.name}"
    jaxii = "python -m jaxii.main"
    command = f"{jaxii} train --config={config} --workdir={workdir}"
    more = list[str]()
    if file.exists():
        say(f"recipe    {file} already exists; keeping it")
        if minutes is not None:
            say("          --minutes has no effect; delete the recipe for a new one")
    else:
        where = {"data.dataset": "kaggle", "data.directory": str(data)}
        chosen = recipes.choose(
            facts, lambda fields: pace_of({**where, **fields}), minutes=minutes
        )
        _show(chosen)
        text = recipes.text(facts, chosen, command)
        write_beside(file, lambda opened: opened.write(text.encode()), binary=True)
        say(f"written   {file} (recipe) and {data} (prepared data)")
        if chosen.hold_out_length:
            more = [
                "then, in the rest of the time, to fit decoders for new domains",
                f"  {jaxii} hold_out --workdir={workdir} "
                f"--length={chosen.hold_out_length:g}",
                f"  {jaxii} evaluate --workdir={workdir} --tune_on=held_out",
            ]
    for line in ("next", f"  {command}", *more):
        say(line)


def _show(chosen: recipes.Recipe) -> None:
    """Prints a recipe and how long it takes."""
    for choice in chosen.choices:
        say(f"recipe    {choice.field} = {choice.value!r}: {choice.why}")
    for stage in chosen.stages:
        say(f"recipe    stage {stage['name']}: {stage['num_epochs']:g} epochs")
    say("recipe    images are randomly mirrored; set data.mirror=False if left and")
    say("          right matter, for example in text")
    say(f"time      about {chosen.minutes:.0f} minutes on this machine, estimated from")
    say("          the first steps; --minutes=M changes the number of epochs")
    if any(stage["num_epochs"] >= recipes.MOST_EPOCHS for stage in chosen.stages):
        say(f"          ({recipes.MOST_EPOCHS:.0f}, as in this recipe, is the most)")
