"""The files of a prepared dataset and how they are checked.

TFDS's `dataset_info.json` is written last, so a dataset that has it is complete.
`manifest.json` lists every other file with its hash.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl
from google.protobuf import json_format
from tensorflow_datasets.core.proto import dataset_info_pb2

from jaxii import manifest
from jaxii.errors import InputError
from jaxii.storage import AnyPath

# Version of all files, including those of an unfinished preparation.
FORMAT = 2
INFO_FILE = "dataset_info.json"
LABELS_FILE = "labels.csv"
COUNTS_FILE = "counts.json"
INPUTS_FILE = "preparation.json"
IMAGES_FILE = "preparation.parquet"
SUBMISSION_FILE = "submission_ids.csv"
RECURRING_FILE = "recurring.parquet"
FEATURES_FILE = "features.json"
# TFDS's default names of shards.
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
PREPARE_AGAIN = "delete the folder and prepare it again, or restore it from a copy"
# Feature types of prepared datasets and of TFDS's `open_images_v4`.
FEATURE_TYPES = frozenset(
    f"tensorflow_datasets.core.features.{name}"
    for name in (
        "bounding_boxes.BBoxFeature",
        "class_label_feature.ClassLabel",
        "features_dict.FeaturesDict",
        "image_feature.Image",
        "sequence_feature.Sequence",
        "tensor_feature.Tensor",
        "text_feature.Text",
    )
)
# Protocol buffer classes are made at run time.
_Info: Any = dataset_info_pb2.DatasetInfo  # pyright: ignore[reportAttributeAccessIssue]


def index_path(directory: AnyPath, split: str) -> AnyPath:
    return directory / f"index-{split}.parquet"


def short_side(directory: AnyPath) -> int | None:
    """Returns the short side of reduced images in pixels; None if unknown."""
    inputs = directory / INPUTS_FILE
    return read_json(inputs).get("short_side") if inputs.exists() else None


def submission_ids(directory: AnyPath) -> tuple[str, ...]:
    """Returns the ids that a submission lists; empty for TFDS's `open_images_v4`."""
    path = directory / SUBMISSION_FILE
    if not path.exists():
        return ()
    return tuple(pl.read_csv(path.read_bytes(), infer_schema=False)["image_id"])


def recurring(directory: AnyPath) -> pl.DataFrame | None:
    """Returns the pairs of near copies: split, image_id, other_split and other_id.

    Each pair is listed in both directions. None if preparation did not search for them.
    """
    path = directory / RECURRING_FILE
    return pl.read_parquet(path.read_bytes()) if path.exists() else None


def check_manifest(
    directory: AnyPath,
    *,
    verify: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> manifest.Manifest:
    """Checks files against the manifest and returns it. Indexes are always hashed.

    Args:
      directory: The folder of the dataset.
      verify: Whether to hash every file.
      on_progress: Called with (files hashed, files to hash).

    Raises:
      InputError: If a file is missing or differs.
    """
    path = directory / manifest.NAME
    listed = manifest.Manifest.load(path, fix=PREPARE_AGAIN)
    listed.check(
        directory,
        by=path,
        fix=PREPARE_AGAIN,
        verify=verify,
        hashed=[name for name in listed.files if name.endswith(".parquet")],
        on_progress=on_progress,
    )
    return listed


@dataclass
class Shard:
    """A file of records, in the form that `ArrayRecordDataSource` accepts."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


@dataclass(frozen=True)
class Info:
    """The parts of TFDS's description that reading a dataset needs.

    Attributes:
      features: Names of the fields of a record.
      splits: Shards of each split that is not empty, in order.
    """

    features: frozenset[str]
    splits: Mapping[str, tuple[Shard, ...]]
    directory: AnyPath

    def names(self, feature: str) -> tuple[str, ...]:
        """Returns the class names of a label feature, such as "label_ids".

        Raises:
          InputError: If the file of the names is missing or damaged.
        """
        path = self.directory / f"{feature}.labels.txt"
        lines = _read_text(path).split("\n")
        return tuple(line.strip() for line in lines if line.strip())


def read_info(directory: AnyPath) -> Info:
    """Reads `dataset_info.json` and `features.json` without TFDS.

    TFDS imports the modules that `features.json` names, which could run foreign code.
    This function imports none; feature types outside `FEATURE_TYPES` are refused.

    Raises:
      InputError: If a file is missing, damaged or in another format, or names an
        unknown feature type or a file outside the folder.
    """
    features = read_json(directory / FEATURES_FILE)
    unknown = set(_feature_types(features)) - FEATURE_TYPES
    if unknown:
        raise InputError(
            f"{directory / FEATURES_FILE} has the feature type {min(unknown)}; only "
            f"{', '.join(sorted(name.rpartition('.')[2] for name in FEATURE_TYPES))} "
            f"of TFDS are supported; {PREPARE_AGAIN}."
        )
    path, info = directory / INFO_FILE, _Info()
    try:
        fields = features["featuresDict"]["features"]
        json_format.Parse(_read_text(path), info, ignore_unknown_fields=True)
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{directory / FEATURES_FILE} is damaged: it describes no fields; "
            f"{PREPARE_AGAIN}."
        ) from error
    except json_format.ParseError as error:
        raise InputError(
            f"{path} is damaged: not a TFDS description; {PREPARE_AGAIN}."
        ) from error
    if info.file_format != "array_record":
        raise InputError(
            f"{path} has the file format {info.file_format or 'tfrecord'}, not "
            "array_record; convert it with `python -m tensorflow_datasets.scripts."
            "convert_format --to_file_format=array_record`"
        )
    splits = {split.name: _shards(path, info.name, split) for split in info.splits}
    filled = {name: shards for name, shards in splits.items() if shards}
    return Info(frozenset(fields), filled, directory)


def _shards(path: AnyPath, dataset: str, split: Any) -> tuple[Shard, ...]:
    template = split.filepath_template or _TEMPLATE
    number, found = len(split.shard_lengths), []
    for i, length in enumerate(split.shard_lengths):
        name = template
        for key, value in {
            "DATASET": dataset,
            "SPLIT": split.name,
            "FILEFORMAT": "array_record",
            "SHARD_X_OF_Y": f"{i:05d}-of-{number:05d}",
        }.items():
            name = name.replace(f"{{{key}}}", value)
        if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
            raise InputError(
                f"{path} lists the file {name!r} in split {split.name!r}, which is not "
                f"the plain name of a file in the same folder; {PREPARE_AGAIN}."
            )
        if length > 0:
            found.append(Shard(os.fspath(path.parent / name), 0, length, length))
    return tuple(found)


def _feature_types(tree: Any) -> Iterator[str]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key == "pythonClassName":
                yield str(value)
            yield from _feature_types(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _feature_types(value)


def read_json(path: AnyPath) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
        if isinstance(value, dict):
            return value
        reason: object = f"it holds a {type(value).__name__}"
    except (ValueError, RecursionError) as error:
        reason = error
    raise InputError(
        f"{path} is damaged: not a JSON object ({reason}); {PREPARE_AGAIN}."
    )


def _read_text(path: AnyPath) -> str:
    try:
        return path.read_bytes().decode()
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; {PREPARE_AGAIN}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged ({error}); {PREPARE_AGAIN}.") from error
