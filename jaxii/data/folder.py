"""The folder of a prepared dataset: its file names, how it is begun, completed, read.

`open_images` begins it before it writes shards and completes it after them; `sources`
reads the files named here. TFDS's `dataset_info.json` is written last: where it is, the
dataset is whole. `manifest.json` lists every file with its hash.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import tensorflow_datasets as tfds
from etils import epath
from google.protobuf import json_format
from tensorflow_datasets.core import splits as split_lib
from tensorflow_datasets.core.proto import dataset_info_pb2

from jaxii import manifest
from jaxii.data import index, schema
from jaxii.errors import InputError
from jaxii.storage import AnyPath, names_in, write_beside, write_json

# Of the files that are written, also by a preparation that is not finished.
FORMAT = 2
INFO_FILE = "dataset_info.json"
LABELS_FILE = "labels.csv"
COUNTS_FILE = "counts.json"
INPUTS_FILE = "preparation.json"
FEATURES_FILE = "features.json"
DEFAULT_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
PREPARE_AGAIN = "delete the folder and prepare it again, or restore it from a copy"
# Of the datasets that `prepare` writes and of TFDS's `open_images_v4`.
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
# Protocol buffer classes are made at run time, out of a type checker's sight.
_Info: Any = dataset_info_pb2.DatasetInfo  # pyright: ignore[reportAttributeAccessIssue]
IMAGES_FILE = "preparation.parquet"
SUBMISSION_FILE = "submission_ids.csv"


@dataclass(frozen=True)
class Written:
    """What became of a split.

    Args:
      rows: rows of the plan that became records, ascending.
      shard_lengths: records in each shard.
      num_bytes: of all shards.
      faults: row -> why its image could not be used.
      files: name of each shard -> its size and hash.
      digests: a hash of the bytes of the file of each row of the plan; "" where the
        image cannot be a record.
      accounts: what was written beside each shard; see `write_shard`.
    """

    rows: np.ndarray
    shard_lengths: list[int]
    num_bytes: int
    faults: dict[int, str]
    files: dict[str, manifest.File]
    digests: list[str]
    accounts: list[dict]


def index_path(directory: AnyPath, split: str) -> AnyPath:
    """Returns where the index of a split is kept."""
    return directory / f"index-{split}.parquet"


def begin(
    output: AnyPath, fingerprint: str, short_side: int, images: pl.DataFrame
) -> bool:
    """Claims the output folder; returns whether the dataset is complete already.

    Args:
      output: the folder.
      fingerprint: of everything the dataset is made from.
      short_side: pixels that larger images are reduced to.
      images: the columns split, image_id, size_bytes and stamp (see
        `image_files.FileFacts`) of the files; kept to name those that change.

    Raises:
      InputError: If something else is in it, or the dataset there is damaged.
    """
    inputs = output / INPUTS_FILE
    output.mkdir(parents=True, exist_ok=True)
    if inputs.exists():
        begun = _read_json(inputs)
        if begun.get("format") != FORMAT:
            raise InputError(
                f"{output} was prepared by another version of jaxii; choose another "
                "folder, or delete it"
            )
        if begun.get("fingerprint") != fingerprint:
            raise InputError(_difference(output, images))
        if (output / INFO_FILE).exists():
            check_manifest(output)
            return True
    elif names_in(output):
        raise InputError(
            f"{output} is not empty and no preparation was begun in it; choose an "
            "empty or new folder"
        )
    claim = {"format": FORMAT, "fingerprint": fingerprint, "short_side": short_side}
    if not inputs.exists():
        write_json(inputs, claim)
    write_beside(output / IMAGES_FILE, images.write_parquet, binary=True)
    return False


def _difference(output: AnyPath, images: pl.DataFrame) -> str:
    """Returns why a folder is not that of these inputs."""
    stored = output / IMAGES_FILE
    if stored.exists():
        before = index.load(stored)
        both = images.join(before, on=("split", "image_id"), maintain_order="left")
        changed = both.filter(
            (pl.col("size_bytes") != pl.col("size_bytes_right"))
            | (pl.col("stamp") != pl.col("stamp_right"))
        )
        if len(changed):
            examples = ", ".join(changed["image_id"].head(5))
            return (
                f"{output} was begun with other versions of {len(changed):,} image "
                f"files ({examples}), by their size or time of change; choose another "
                "folder, or delete it"
            )
    return (
        f"{output} was prepared from other files or with other options; choose another "
        "folder, or delete it"
    )


def short_side(directory: AnyPath) -> int | None:
    """Returns the pixels that images were reduced to; None where it is not known."""
    inputs = directory / INPUTS_FILE
    return _read_json(inputs).get("short_side") if inputs.exists() else None


def save_submission_ids(directory: AnyPath, image_ids: Sequence[str]) -> None:
    """Writes the ids that a submission answers for, in its order.

    Images that are missing or cannot be read are among them, and no split has those.
    """
    table = pl.DataFrame({"image_id": image_ids}, schema={"image_id": pl.String})
    write_beside(directory / SUBMISSION_FILE, table.write_csv, binary=True)


def submission_ids(directory: AnyPath) -> tuple[str, ...]:
    """Returns what `save_submission_ids` wrote; empty for TFDS's `open_images_v4`."""
    path = directory / SUBMISSION_FILE
    if not path.exists():
        return ()
    return tuple(pl.read_csv(path.read_bytes(), infer_schema=False)["image_id"])


def complete(
    output: AnyPath,
    features: tfds.features.FeaturesDict,
    written: Mapping[str, Written],
) -> None:
    """Writes TFDS's description and the manifest; removes what preparation left."""
    for pattern in ("*.part", "*.plan"):
        for path in output.glob(pattern):
            path.unlink()
    names = [LABELS_FILE, COUNTS_FILE, INPUTS_FILE, IMAGES_FILE, SUBMISSION_FILE]
    names += [index_path(output, split).name for split in written]
    files = manifest.describe_all(output, names)
    for result in written.values():
        files |= result.files
    with tempfile.TemporaryDirectory() as draft:
        _tfds_info(output, features, written).write_to_directory(draft)
        drafts = sorted(Path(draft).iterdir())
        files |= manifest.describe_all(Path(draft), [path.name for path in drafts])
        manifest.Manifest(files).save(output / manifest.NAME)
        # The file that says "complete" comes last.
        for path in sorted(drafts, key=lambda p: p.name == INFO_FILE):
            content = path.read_bytes()
            write_beside(
                output / path.name, lambda file, c=content: file.write(c), binary=True
            )
    for path in output.glob("*.array_record-*.json"):
        path.unlink()


def _tfds_info(
    output: AnyPath,
    features: tfds.features.FeaturesDict,
    written: Mapping[str, Written],
) -> tfds.core.DatasetInfo:
    identity = tfds.core.DatasetIdentity(
        name=schema.NAME,
        version=tfds.core.Version(schema.VERSION),
        data_dir=os.fspath(output),
        module_name="",
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        features=features,
        description="Images with labels from people, boxes and a machine.",
    )
    info.set_file_format("array_record")
    template = tfds.core.ShardedFileTemplate(
        data_dir=epath.Path(output),
        dataset_name=schema.NAME,
        filetype_suffix="array_record",
    )
    info.set_splits(
        split_lib.SplitDict(
            tfds.core.SplitInfo(
                name=name,
                shard_lengths=result.shard_lengths,
                num_bytes=result.num_bytes,
                filename_template=template.replace(split=name),
            )
            for name, result in written.items()
        )
    )
    return info


def check_manifest(
    directory: AnyPath,
    *,
    verify: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> manifest.Manifest:
    """Refuses a dataset whose files are not those of its manifest, which it returns.

    Indexes are hashed in any case: they are read whole.

    Args:
      directory: of the dataset.
      verify: whether to hash every byte.
      on_progress: called with (files hashed, files to hash).

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
    """A file of records, as `ArrayRecordDataSource` takes it."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


@dataclass(frozen=True)
class Info:
    """TFDS's description of a dataset, as far as reading it needs.

    Attributes:
      features: names of the fields of a record.
      splits: name -> shards in order; splits without an example are left out.
      directory: of the dataset.
    """

    features: frozenset[str]
    splits: Mapping[str, tuple[Shard, ...]]
    directory: AnyPath

    def names(self, feature: str) -> tuple[str, ...]:
        """Returns the class names of a label feature, such as "label_ids".

        Raises:
          InputError: If they cannot be read.
        """
        path = self.directory / f"{feature}.labels.txt"
        lines = _read_text(path).split("\n")
        return tuple(line.strip() for line in lines if line.strip())


def read_info(directory: AnyPath) -> Info:
    """Reads `dataset_info.json` and `features.json`.

    TFDS would import the module of every feature that `features.json` names: a file
    from elsewhere could run any code. Here nothing is imported or built; a feature type
    that is none of `FEATURE_TYPES` is refused.

    Raises:
      InputError: If a file is missing, damaged or of another format, or names a feature
        type that is not known or a shard outside of the folder.
    """
    features = _read_json(directory / FEATURES_FILE)
    unknown = set(_feature_types(features)) - FEATURE_TYPES
    if unknown:
        raise InputError(
            f"{directory / FEATURES_FILE} names the feature type {min(unknown)}; only "
            f"{', '.join(sorted(name.rpartition('.')[2] for name in FEATURE_TYPES))} "
            f"of TFDS are read; {PREPARE_AGAIN}."
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
            f"{path} says that records are stored as {info.file_format or 'tfrecord'}; "
            "array_record is read: convert it with "
            "`python -m tensorflow_datasets.scripts.convert_format "
            "--to_file_format=array_record` or build it with that file_format"
        )
    splits = {split.name: _shards(path, info.name, split) for split in info.splits}
    filled = {name: shards for name, shards in splits.items() if shards}
    return Info(frozenset(fields), filled, directory)


def _shards(path: AnyPath, dataset: str, split: Any) -> tuple[Shard, ...]:
    """Returns the files of a split, with at least one record each."""
    template = split.filepath_template or DEFAULT_TEMPLATE
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
                f"{path} says that split {split.name!r} is in {name!r}, which is no "
                f"plain name of a file beside it; {PREPARE_AGAIN}."
            )
        if length > 0:
            found.append(Shard(os.fspath(path.parent / name), 0, length, length))
    return tuple(found)


def _feature_types(tree: Any) -> Iterator[str]:
    """Yields every `pythonClassName` in the JSON of a feature."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key == "pythonClassName":
                yield str(value)
            yield from _feature_types(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _feature_types(value)


def _read_json(path: AnyPath) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
        if isinstance(value, dict):
            return value
        reason: object = f"it holds a {type(value).__name__}"
    except (ValueError, RecursionError) as error:
        reason = error
    raise InputError(f"{path} is damaged: no JSON object ({reason}); {PREPARE_AGAIN}.")


def _read_text(path: AnyPath) -> str:
    try:
        return path.read_bytes().decode()
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; {PREPARE_AGAIN}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged ({error}); {PREPARE_AGAIN}.") from error
