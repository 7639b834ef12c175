"""Reads the files of Kaggle's Inclusive Images challenge and prepares a dataset.

Any labelled image collection in that layout works. `prepare` decides which images with
which labels make up each split, and counts what is left out and why.
"""

import os
import tempfile
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl

from jaxii.console import OnProgress, no_progress
from jaxii.data.labels import BOX, HUMAN, MACHINE
from jaxii.errors import InputError
from jaxii.prepare import image_ids, label_files, shards
from jaxii.prepare.beam import Beam
from jaxii.prepare.build import Draft, build, check_left, image_table, no_value
from jaxii.prepare.image_files import Images, find_images
from jaxii.prepare.recode import SHORT_SIDE
from jaxii.prepare.recurring import KEEP
from jaxii.prepare.tally import Counts, Tally, few
from jaxii.storage import AnyPath, at

TEST_IMAGES = "stage_1_test_images"
# Fields of `Layout`, and the file names by which `Layout.find` finds them.
FILES = {
    "classes": "classes-trainable.csv",
    "human_labels": "train_human_labels.csv",
    "machine_labels": "train_machine_labels.csv",
    "bounding_boxes": "train_bounding_boxes.csv",
    "descriptions": "class-descriptions.csv",
    "tuning_labels": "tuning_labels.csv",
    "sample_submission": "stage_1_sample_submission.csv",
    "test_labels": "test_labels.csv",
    "train_metadata": "train_meta.csv",
    "test_metadata": "test_meta.csv",
    "validation_ids": "validation_ids.csv",
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Paths of the files, local or gs://; None or () for an absent one.

    Attributes:
      train_images: Folders, searched recursively. The image id is the file name without
        its suffix .jpg, .jpeg, .png or .webp.
      classes: CSV with the column label_code, in the order of the classes.
      human_labels: CSV with the columns ImageID,Source,LabelName,Confidence.
      test_images: Folders of the images of tuning and test.
      machine_labels: The same columns as human_labels.
      bounding_boxes: The same columns and more; a box makes its label present.
      descriptions: CSV with the columns label_code,description.
      tuning_labels: CSV without a header: image id, label codes separated by spaces.
      sample_submission: CSV with the columns image_id,labels; lists the test images.
      test_labels: CSV with the columns image_id,labels.
      train_metadata: CSV with the column image_id and any of group, domain, slice.
      test_metadata: The same columns, for images of tuning and test.
      validation_ids: CSV with the column image_id: the training images that form the
        validation split. Without it, validation is carved out of train on opening.
    """

    train_images: tuple[AnyPath, ...]
    classes: AnyPath
    human_labels: AnyPath
    test_images: tuple[AnyPath, ...] = ()
    machine_labels: AnyPath | None = None
    bounding_boxes: AnyPath | None = None
    descriptions: AnyPath | None = None
    tuning_labels: AnyPath | None = None
    sample_submission: AnyPath | None = None
    test_labels: AnyPath | None = None
    train_metadata: AnyPath | None = None
    test_metadata: AnyPath | None = None
    validation_ids: AnyPath | None = None

    @classmethod
    def find(cls, directory: str | os.PathLike[str], **overrides) -> "Layout":
        """Finds the files in a folder.

        Args:
          directory: Contains files named as in `FILES`, folders of training images
            whose names start with "train", and a folder "stage_1_test_images".
          **overrides: Replace fields: a path, relative to the current directory, or a
            tuple of paths for folders of images. None leaves a file out.

        Raises:
          InputError: If a required file or folder is missing, or an override is not a
            field of this class.
        """
        root = at(directory)
        if not root.is_dir():
            file = FILES["human_labels"]
            raise InputError(
                f"{root} is not a folder; use the one that contains {file}"
            )
        folders = [path for path in sorted(root.iterdir()) if path.is_dir()]
        found: dict[str, object] = {
            "train_images": tuple(p for p in folders if p.name.startswith("train")),
            "test_images": tuple(p for p in folders if p.name == TEST_IMAGES),
        }
        for name, file in FILES.items():
            found[name] = root / file if (root / file).is_file() else None
        for name, value in overrides.items():
            if name not in found:
                raise InputError(
                    f"{name} is not a field of Layout; allowed: {', '.join(found)}"
                )
            found[name] = _given(name, value)
        for name in ("classes", "human_labels"):
            if found[name] is None:
                raise InputError(
                    f"{root / FILES[name]} is missing but required; add it (in Python, "
                    f"{name}=PATH names another file)"
                )
        if not found["train_images"]:
            raise InputError(
                f"{root} has no folder of training images; add one whose name starts "
                "with train (in Python, train_images=PATH names another folder)"
            )
        return cls(**found)  # type: ignore[arg-type]

    def notes(self, directory: str | os.PathLike[str]) -> list[str]:
        """Returns lines with the optional files that are absent, and unused CSV files.

        Args:
          directory: The folder given to `find`.
        """
        given = {name: getattr(self, name) for name in FILES}
        absent = [FILES[name] for name, path in given.items() if path is None]
        used = {path.resolve() for path in given.values() if path is not None}
        unused = [
            path.name
            for path in sorted(at(directory).iterdir())
            if path.name.lower().endswith(".csv") and path.resolve() not in used
        ]
        found = {"not found (optional)": absent, "not used": unused}
        return [f"{what}: {', '.join(names)}" for what, names in found.items() if names]

    def fetch(self, scratch: Path) -> "Layout":
        """Returns the layout with label files in buckets copied into a local folder."""
        copies = {}
        for name in FILES:
            path = getattr(self, name)
            if path is not None and not isinstance(path, Path):
                copies[name] = scratch / name / path.name
                copies[name].parent.mkdir()
                path.copy(copies[name])
        return replace(self, **copies)


def prepare(
    layout: Layout,
    output_dir: str | os.PathLike[str],
    *,
    short_side: int = SHORT_SIDE,
    near_copies: str = KEEP,
    num_workers: int | None = None,
    beam: Beam | None = None,
    on_progress: OnProgress = no_progress,
) -> Counts:
    """Writes the dataset of a layout: train, a listed validation, tuning and test.

    Args:
      layout: The files.
      output_dir: See `build.build` for this and the other arguments.

    Returns:
      Counts of what was read, kept and dropped; also written to counts.json.

    Raises:
      InputError: If a file cannot be used, no training image is left, the output folder
        holds something else, or Apache Beam cannot run as requested.
    """
    output = at(output_dir)
    if beam is not None:
        beam.check([output, *layout.train_images, *layout.test_images])
    with tempfile.TemporaryDirectory() as scratch:
        layout = layout.fetch(Path(scratch))
        codes = label_files.read_codes(layout.classes, layout.descriptions)
        train, test = find_images(layout.train_images), find_images(layout.test_images)
        drafts, tallies = draft_splits(layout, codes, train, test)
    return build(
        drafts,
        codes.vocabulary,
        output,
        short_side=short_side,
        near_copies=near_copies,
        file_tallies=tallies,
        num_workers=num_workers,
        beam=beam,
        on_progress=on_progress,
    )


def draft_splits(
    layout: Layout,
    codes: label_files.Codes,
    train_images: Images,
    test_images: Images,
) -> tuple[list[Draft], list[Tally]]:
    """Reads the local files of a layout and drafts the splits.

    Returns:
      Drafts of train and, if present, validation, tuning and test; tallies of files.

    Raises:
      InputError: If a file cannot be used, or no training image has a label.
    """
    later, later_tallies, listed = _evaluations(layout, codes, test_images)
    drafts, tallies = _train(layout, codes, train_images, listed)
    return [*drafts, *later], [*tallies, *later_tallies]


def _train(
    layout: Layout,
    codes: label_files.Codes,
    images: Images,
    listed: Mapping[str, Sequence[str]],
) -> tuple[list[Draft], list[Tally]]:
    """Drafts train and a listed validation, without images of tuning and test."""
    ids = pl.Series(images.ids, dtype=pl.String)
    parts, tallies = _train_labels(layout, codes, ids)
    metadata = _metadata(layout.train_metadata, ids, tallies)
    table = _image_table(images, metadata, parts)
    labelled = (table["label_ids"].list.len() > 0).arg_true().to_numpy()
    splits = {"train": np.ones(len(ids), bool)}
    if layout.validation_ids is not None:
        splits["validation"], tally = label_files.read_validation(
            layout.validation_ids, ids, table["group"]
        )
        tallies.append(tally)
        splits["train"] = ~splits["validation"]
    drafts = []
    for split, is_in in splits.items():
        rows, read = labelled[is_in[labelled]], int(is_in.sum())
        dropped = {"without a label": read - len(rows)}
        rows, also = _without_listed(rows, ids, listed)
        dropped |= {reason: len(found) for reason, found in also.items()}
        examples = {reason: few(found) for reason, found in also.items()}
        tally = Tally(split, "images", read, len(rows), dropped, examples)
        if split == "train":
            tally = _with_file_notes(tally, images)
            check_left(tally)
        drafts.append(Draft(_plan(split, rows, images, table), tally))
    return drafts, tallies


def _train_labels(
    layout: Layout, codes: label_files.Codes, ids: pl.Series
) -> tuple[list[tuple[label_files.Entries, int]], list[Tally]]:
    parts, tallies = [], []
    files = (
        (layout.human_labels, HUMAN),
        (layout.machine_labels, MACHINE),
        (layout.bounding_boxes, BOX),
    )
    for path, source in files:
        if path is None:
            continue
        entries, tally = label_files.read_labels(path, codes, ids)
        if source == HUMAN and not tally.read:
            raise InputError(f"{path} has a header but no label rows; add at least one")
        parts.append((entries, source))
        tallies.append(tally)
    return parts, tallies


def _image_table(
    images: Images,
    metadata: pl.DataFrame,
    parts: Sequence[tuple[label_files.Entries, int]],
) -> pl.DataFrame:
    """Returns the index of images with labels of several sources."""
    none = label_files.Entries(
        np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32)
    )
    parts = [(none, HUMAN), *parts]
    return image_table(
        images.ids,
        metadata,
        rows=np.concatenate([entries.rows for entries, _ in parts]),
        labels=np.concatenate([entries.labels for entries, _ in parts]),
        confidences=np.concatenate([entries.confidences for entries, _ in parts]),
        sources=np.concatenate(
            [np.full(len(entries.rows), source, np.uint8) for entries, source in parts]
        ),
    )


def _without_listed(
    rows: np.ndarray, ids: pl.Series, listed: Mapping[str, Sequence[str]]
) -> tuple[np.ndarray, dict[str, list[str]]]:
    """Returns rows that no later split lists, and the ids of the others by reason."""
    also = {}
    for split, names in listed.items():
        found, _ = image_ids.find_rows(pl.Series(names, dtype=pl.String), ids)
        is_listed = np.isin(rows, found.drop_nulls().to_numpy())
        if is_listed.any():
            also[f"also in {split}"] = ids.gather(rows[is_listed]).to_list()
            rows = rows[~is_listed]
    return rows, also


def _evaluations(
    layout: Layout, codes: label_files.Codes, images: Images
) -> tuple[list[Draft], list[Tally], dict[str, list[str]]]:
    """Drafts tuning and test; the third result holds the ids that each lists."""
    ids = pl.Series(images.ids, dtype=pl.String)
    drafts: list[Draft] = []
    tallies: list[Tally] = []
    listed: dict[str, list[str]] = {}
    metadata = _metadata(layout.test_metadata, ids, tallies)
    if layout.tuning_labels is not None:
        labels, names = _listed(layout.tuning_labels, codes, ids, tallies, False)
        listed["tuning"] = names
        drafts.append(_evaluation("tuning", names, labels, images, metadata))
    tuning = set(listed.get("tuning", ()))
    names, labels, answered = _test_names(layout, codes, ids, tallies, tuning)
    if names:
        listed["test"] = names
        draft = _evaluation("test", names, labels, images, metadata)
        file = layout.sample_submission or layout.test_labels
        if file is not None:
            others = sorted(set(images.ids).difference(names, tuning))
            tally = draft.tally.with_note(f"listed in {file.name}", len(names))
            tally = tally.with_note("not listed (not used)", len(others), others)
            draft = replace(draft, tally=tally)
        drafts.append(replace(draft, submission_ids=answered))
    return drafts, tallies, listed


def _listed(
    path: AnyPath,
    codes: label_files.Codes,
    ids: pl.Series,
    tallies: list[Tally],
    header: bool,
) -> tuple[label_files.Entries, list[str]]:
    entries, tally, names = label_files.read_image_labels(
        path, codes, ids, header=header
    )
    tallies.append(tally)
    return entries, _meant(names, image_ids.find_rows(names, ids)[0], ids)


def _meant(names: pl.Series, rows: pl.Series, ids: pl.Series) -> list[str]:
    """Returns the distinct image ids that names mean; unknown names are kept."""
    table = pl.DataFrame({"name": names.str.strip_chars(), "row": rows}).join(
        image_ids.numbered(ids), on="row", how="left", maintain_order="left"
    )
    meant = table.select(pl.coalesce("image", "name")).to_series()
    return meant.unique(maintain_order=True).to_list()


def _test_names(
    layout: Layout,
    codes: label_files.Codes,
    ids: pl.Series,
    tallies: list[Tally],
    tuning: Container[str],
) -> tuple[list[str], label_files.Entries | None, list[str]]:
    """Returns the ids of test, its labels, and the ids that a submission lists."""
    # Test has the images of the sample submission; without one, the images with test
    # labels; without those, all images. Images of tuning are always left out. A
    # submission lists all rows of the sample, in their order.
    labels = None
    names: list[str] = ids.to_list()
    answered: list[str] = []
    if layout.test_labels is not None:
        labels, names = _listed(layout.test_labels, codes, ids, tallies, True)
    if layout.sample_submission is not None:
        given = label_files.read_rows(layout.sample_submission, header=True)["image_id"]
        rows, num_suffixed = image_ids.find_rows(given, ids)
        names = _meant(given, rows, ids)
        answered = given.str.strip_chars().unique(maintain_order=True).to_list()
        file, repeated = layout.sample_submission.name, len(given) - len(names)
        tally = Tally(file, "rows", len(given), len(names), {"repeated": repeated})
        tallies.append(tally.with_note(image_ids.SUFFIX_NOTE, num_suffixed))
    names = [name for name in names if name not in tuning]
    return names, labels, answered or sorted(names)


def _evaluation(
    split: str,
    names: Sequence[str],
    labels: label_files.Entries | None,
    images: Images,
    metadata: pl.DataFrame,
) -> Draft:
    position = {image_id: i for i, image_id in enumerate(images.ids)}
    rows = np.array(sorted(position[i] for i in names if i in position), np.int64)
    missing = sorted(i for i in names if i not in position)
    table = _image_table(images, metadata, [(labels, HUMAN)] if labels else [])
    reason = "listed but missing"
    dropped, examples = {reason: len(missing)}, {reason: few(missing)}
    tally = Tally(split, "images", len(names), len(rows), dropped, examples)
    if split == "test":
        tally = _with_file_notes(tally, images)
    return Draft(_plan(split, rows, images, table), tally)


def _plan(
    split: str, rows: np.ndarray, images: Images, table: pl.DataFrame
) -> shards.Plan:
    return shards.Plan(
        split=split,
        table=table[rows],
        paths=[images.paths[row] for row in rows],
        facts=[images.facts[row] for row in rows],
    )


def _metadata(
    path: AnyPath | None, ids: pl.Series, tallies: list[Tally]
) -> pl.DataFrame:
    """Returns group, domain and slice, one row per image; null if unknown."""
    if path is None:
        nothing = pl.repeat(None, len(ids), dtype=pl.String, eager=True)
        return pl.DataFrame(dict.fromkeys(label_files.METADATA, nothing))
    table, tally = label_files.read_metadata(path, ids)
    for kind in ("domain", "slice"):
        if table[kind].count():
            note = f"images without a {kind}, stored as {no_value(kind)!r}"
            tally = tally.with_note(note, table[kind].null_count())
    tallies.append(tally)
    return table


def _with_file_notes(tally: Tally, images: Images) -> Tally:
    """Adds notes about unusual file names to the tally of a split."""
    notes = (
        ("ids with a second file (not read)", images.repeated),
        ("files whose name is not UTF-8 (not read)", images.unnamed),
        ("hidden files and folders (not read)", images.hidden),
        ("links to folders that are read by another path", images.reached_again),
        (image_ids.CASE_NOTE, image_ids.case_twins(images.ids)),
    )
    for what, found in notes:
        tally = tally.with_note(what, len(found), found)
    return tally


def _given(name: str, value):
    if name in ("train_images", "test_images"):
        given = (value,) if isinstance(value, str | os.PathLike) else (value or ())
        paths = tuple(at(path) for path in given)
        for path in paths:
            if not path.is_dir():
                raise InputError(f"{name}={path} is not a folder; pass a folder")
        return paths
    if value is None:
        return None
    path = at(value)
    if not path.is_file():
        raise InputError(f"{name}={path} is not a file; pass an existing CSV file")
    return path
