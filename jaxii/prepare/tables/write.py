"""Labelled images -> the label files that `prepare` reads; no image is copied."""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from jaxii.prepare.layout import FILES
from jaxii.prepare.tables.labelled import Labelled

META = ("group", "domain", "slice")


def write(found: Labelled, folder: Path) -> None:
    """Writes the label files of a layout (see `data.layout`) into a new folder.

    Args:
      found: images and labels.
      folder: is made.
    """
    folder.mkdir(parents=True)
    validation, test = found.split("validation"), found.split("test")
    train = sorted(found.split("train") + validation)
    _save(folder, "classes", label_code=found.codes)
    _save(folder, "descriptions", label_code=found.codes, description=found.labels)
    _save(folder, "train_image_paths", **_images(found, train))
    pairs = [(i, label, c) for i in train for label, c in found.entries[i].items()]
    _save(
        folder,
        "human_labels",
        ImageID=[found.ids[i] for i, _, _ in pairs],
        Source=["verification"] * len(pairs),
        LabelName=[found.codes[label] for _, label, _ in pairs],
        Confidence=[f"{confidence:g}" for _, _, confidence in pairs],
    )
    _save_metadata(found, folder, "train_metadata", train)
    if validation:
        _save(folder, "validation_ids", image_id=[found.ids[i] for i in validation])
    if test:
        _save(folder, "test_image_paths", **_images(found, test))
        _save(
            folder,
            "test_labels",
            image_id=[found.ids[i] for i in test],
            labels=[_present(found, i) for i in test],
        )
        _save_metadata(found, folder, "test_metadata", test)


def _images(found: Labelled, numbers: Sequence[int]) -> dict[str, list[str]]:
    return {
        "image_id": [found.ids[i] for i in numbers],
        "path": [found.files[i] for i in numbers],
    }


def _present(found: Labelled, number: int) -> str:
    entry = found.entries[number]
    return " ".join(found.codes[label] for label, c in entry.items() if c >= 0.5)


def _save_metadata(
    found: Labelled, folder: Path, name: str, numbers: Sequence[int]
) -> None:
    given = {kind: found.extra[kind] for kind in META if kind in found.extra}
    if given:
        columns = {kind: [each[i] for i in numbers] for kind, each in given.items()}
        _save(folder, name, image_id=[found.ids[i] for i in numbers], **columns)


def _save(folder: Path, name: str, **columns: Sequence[str]) -> None:
    pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.String)).write_csv(
        folder / FILES[name]
    )
