"""Where the files of a labelled image collection are: the layout of Inclusive Images.

`Layout.find` looks in a folder for the names that Kaggle gave them; any of them can be
given by hand. `open_images.prepare` reads what it finds.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import polars as pl
from jaxtyping import Bool

from jaxii.errors import InputError
from jaxii.prepare import image_files, image_ids
from jaxii.prepare.image_files import IMAGE_SUFFIXES, FileFacts
from jaxii.prepare.tally import Tally, few
from jaxii.storage import AnyPath, at

TEST_IMAGES = "stage_1_test_images"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Paths of the files, local or gs://; None or () where there is none.

    Args:
      train_images: folders, searched with all they contain; images are found by the
        image id before the suffix .jpg, .jpeg, .png or .webp.
      test_images: folders with the images of tuning and test.
      classes: "classes-trainable.csv", label_code: the classes in order.
      human_labels: "train_human_labels.csv", ImageID,Source,LabelName,Confidence.
      machine_labels: the same columns.
      bounding_boxes: the same and more; a box makes its label present.
      descriptions: "class-descriptions.csv", label_code,description.
      tuning_labels: no header; image id, label codes between spaces.
      sample_submission: image_id,labels: says which images are the test.
      test_labels: image_id,labels.
      train_metadata: image_id and any of group, domain, slice.
      test_metadata: the same, for tuning and test images.
      train_image_paths: "train_image_paths.csv", image_id,path: the training images, in
        place of all those in folders.
      test_image_paths: "test_image_paths.csv", the same for tuning and test.
      validation_ids: "validation_ids.csv", image_id: the training images that are
        `validation`, which is carved out of the others where there is no such list.
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
    train_image_paths: AnyPath | None = None
    test_image_paths: AnyPath | None = None
    validation_ids: AnyPath | None = None

    @classmethod
    def find(cls, directory: str | os.PathLike[str], **overrides) -> "Layout":
        """Finds the files in a folder.

        Args:
          directory: with the files under Kaggle's names; training images in folders
            whose names start with "train", the others in "stage_1_test_images".
          **overrides: fields given by hand, as a path (or a tuple of them for the
            folders of images), taken from the current directory; None leaves a file
            out. The labels and metadata of the test are only ever given so, but for
            test_labels.csv and test_meta.csv.

        Raises:
          InputError: the folder or a file that must be there is not, or an override is
            no field of this class.
        """
        root = at(directory)
        if not root.is_dir():
            raise InputError(
                f"{root} is not a folder; give the one with {HUMAN_LABELS} in it"
            )
        names = [field.name for field in fields(cls)]
        for name in overrides:
            if name not in names:
                raise InputError(
                    f"{name} is not part of a layout; allowed: {', '.join(names)}"
                )
        found: dict[str, object] = {
            "train_images": tuple(
                path
                for path in sorted(root.iterdir())
                if path.is_dir() and path.name.startswith("train")
            ),
            "test_images": tuple(
                path for path in [root / TEST_IMAGES] if path.is_dir()
            ),
        }
        for name, file in FILES.items():
            found[name] = root / file if (root / file).is_file() else None
        for name, value in overrides.items():
            found[name] = _given(name, value)
        for name in ("classes", "human_labels"):
            if found[name] is None:
                raise InputError(
                    f"{root / FILES[name]} is missing; it is required (or give "
                    f"{name}=PATH)"
                )
        if not found["train_images"] and not found["train_image_paths"]:
            raise InputError(
                f"{root} has no folder of training images; name it train, or give "
                "train_images=PATH"
            )
        return cls(**found)  # type: ignore[arg-type]

    def images(self) -> tuple["Images", "Images"]:
        """Finds the images of training, and those of tuning and test.

        Raises:
          InputError: a list of images that cannot be used.
        """
        return (
            _images(self.train_image_paths, self.train_images),
            _images(self.test_image_paths, self.test_images),
        )

    def fetch(self, scratch: Path) -> "Layout":
        """Returns the layout with label files of buckets copied into a local folder."""
        copies = {}
        for name in FILES:
            path = getattr(self, name)
            if path is not None and not isinstance(path, Path):
                copies[name] = scratch / name / path.name
                copies[name].parent.mkdir()
                path.copy(copies[name])
        return replace(self, **copies)


HUMAN_LABELS = "train_human_labels.csv"
FILES = {
    "classes": "classes-trainable.csv",
    "human_labels": HUMAN_LABELS,
    "machine_labels": "train_machine_labels.csv",
    "bounding_boxes": "train_bounding_boxes.csv",
    "descriptions": "class-descriptions.csv",
    "tuning_labels": "tuning_labels.csv",
    "sample_submission": "stage_1_sample_submission.csv",
    "test_labels": "test_labels.csv",
    "train_metadata": "train_meta.csv",
    "test_metadata": "test_meta.csv",
    "train_image_paths": "train_image_paths.csv",
    "test_image_paths": "test_image_paths.csv",
    "validation_ids": "validation_ids.csv",
}


@dataclass(frozen=True)
class Images:
    """The image files of a set of folders, by image id, ascending.

    Args:
      ids: the file names without their suffix and without white space around; unique.
      paths: one an id.
      facts: one an id.
      repeated: ids that have more than one file; the first by path is taken.
      unnamed: paths of files whose name is not UTF-8, escaped. An id is text, so that
        they are left out.
    """

    ids: list[str]
    paths: list[AnyPath]
    facts: list[FileFacts]
    repeated: tuple[str, ...] = ()
    unnamed: tuple[str, ...] = ()

    def by_id(self) -> dict[str, int]:
        """Returns the position of each id."""
        return {image_id: i for i, image_id in enumerate(self.ids)}


def _images(listed: AnyPath | None, folders: tuple[AnyPath, ...]) -> Images:
    if listed is None:
        return find_images(folders)
    table = read_listed(listed, ("image_id", "path")).sort("image_id")
    ids = table["image_id"].to_list()
    paths = [image_files.locate(path) for path in table["path"]]
    # What cannot be read is named when it is to be read.
    return Images(ids, paths, [image_files.facts(path) for path in paths])


def read_validation(
    path: AnyPath, ids: pl.Series, groups: pl.Series
) -> tuple[Bool[np.ndarray, " image"], Tally]:
    """Reads which of the training images are to be the validation split.

    A group is never divided: where a part of one is listed, all of it is taken.

    Args:
      path: a CSV file with a column image_id; see `image_ids` for what an id means.
      ids: of the training images.
      groups: of the training images; an image without one has its id.

    Returns:
      Whether each is, and an account of the file.

    Raises:
      InputError: none of them is, or it is another file.
    """
    listed = read_listed(path, ("image_id",))["image_id"]
    rows, num_suffixed = image_ids.find_rows(listed, ids)
    absent = listed.filter(rows.is_null()).to_list()
    found = rows.drop_nulls().unique().to_numpy()
    tally = Tally(
        path.name,
        "images",
        read=len(listed),
        kept=len(found),
        dropped={
            "listed but missing": len(absent),
            "repeated": len(listed) - len(absent) - len(found),
        },
        examples={"listed but missing": few(absent)},
    )
    if not tally.kept:
        raise InputError(
            f"{path} lists no training image ({tally.line()}); give ids as the label "
            "file has them"
        )
    is_listed = np.zeros(len(ids), bool)
    is_listed[found] = True
    chosen = groups.is_in(groups.filter(is_listed).unique().implode()).to_numpy()
    added = ids.filter(chosen & ~is_listed)
    note = "other images of a listed group, also taken"
    tally = tally.with_note(image_ids.SUFFIX_NOTE, num_suffixed)
    return chosen, tally.with_note(note, len(added), added)


def read_listed(path: AnyPath, columns: tuple[str, ...]) -> pl.DataFrame:
    """Reads a list of images: a CSV file whose image_id is there once and never empty.

    White space around an image_id is no part of it.

    Raises:
      InputError: it is another file.
    """
    try:
        table = pl.read_csv(os.fspath(path), columns=list(columns), infer_schema=False)
        table = table.fill_null("").with_columns(pl.col("image_id").str.strip_chars())
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{path} is no list of images ({reason}); it needs the columns "
            f"{','.join(columns)}"
        ) from error
    ids = table["image_id"]
    for wrong in (ids.filter(ids.is_duplicated()), ids.filter(ids == "")):
        if len(wrong):
            raise InputError(
                f"{path} has the image_id {wrong[0]!r} {len(wrong)} times; give each "
                "image one row and an id"
            )
    return table


def find_images(folders: tuple[AnyPath, ...]) -> Images:
    """Finds the images in folders and in all folders inside them.

    Raises:
      InputError: a folder cannot be listed.
    """
    found: dict[str, tuple[str, FileFacts]] = {}
    repeated: set[str] = set()
    unnamed = []
    for path, name, facts in files_below(folders):
        stem, suffix = os.path.splitext(name)  # noqa: PTH122 (10x faster)
        if suffix.lower() not in IMAGE_SUFFIXES:
            continue
        if not image_ids.is_text(stem):
            unnamed.append(ascii(path))
            continue
        stem = stem.strip() or stem
        before = found.get(stem)
        if before is not None:
            repeated.add(stem)
        if before is None or path < before[0]:
            found[stem] = (path, facts())
    ids = sorted(found)
    return Images(
        ids=ids,
        paths=[at(found[i][0]) for i in ids],
        facts=[found[i][1] for i in ids],
        repeated=tuple(sorted(repeated)),
        unnamed=tuple(sorted(unnamed)),
    )


def files_below(
    folders: tuple[AnyPath, ...],
) -> Iterator[tuple[str, str, Callable[[], FileFacts]]]:
    """Yields path, name and a function for the facts of each file below folders.

    Links to folders are followed; a folder that is reached twice is read once, so that
    a link upwards ends.

    Raises:
      InputError: a folder cannot be listed.
    """
    pending = [os.fspath(folder) for folder in folders]
    seen: set[tuple[int, int]] = set()
    while pending:
        folder = pending.pop()
        if "://" in folder:
            # One listing of the bucket, facts included; a request a file takes hours.
            system, root = fsspec.url_to_fs(folder)
            system.invalidate_cache()  # others may have written since
            for name, info in system.find(root, detail=True).items():
                path = str(system.unstrip_protocol(name))
                yield (
                    path,
                    path.rpartition("/")[2],
                    partial(image_files.facts_listed, info),
                )
            continue
        try:
            place = os.stat(folder)  # noqa: PTH116 (the folder is text here)
            if (place.st_dev, place.st_ino) in seen:
                continue
            seen.add((place.st_dev, place.st_ino))
            entries = os.scandir(folder)
        except OSError as error:
            raise InputError(
                f"{folder} cannot be listed ({error.strerror}); give a folder that "
                "can be read."
            ) from error
        with entries:
            for entry in entries:
                if _is_folder(entry):
                    pending.append(entry.path)
                else:
                    yield entry.path, entry.name, partial(image_files.facts, entry)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _given(name: str, value):
    if name in ("train_images", "test_images"):
        given = (value,) if isinstance(value, str | os.PathLike) else (value or ())
        paths = tuple(at(path) for path in given)
        for path in paths:
            if not path.is_dir():
                raise InputError(f"{name}={path} is not a folder; give a folder")
        return paths
    if value is None:
        return None
    path = at(value)
    if not path.is_file():
        raise InputError(f"{name}={path} does not exist; give a CSV file")
    return path
