"""The folder of a prepared dataset: its file names, how it is begun and completed.

`open_images` begins it before it writes shards and completes it after them; `sources`
reads the files named here. TFDS's `dataset_info.json` is written last: where it is, the
dataset is whole.
"""

import io
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import polars as pl
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import splits as split_lib

from jaxii.data import schema
from jaxii.data.counts import few
from jaxii.data.shards import Written
from jaxii.errors import InputError
from jaxii.files import AnyPath, names_in, write_beside, write_json

INFO_FILE = "dataset_info.json"
LABELS_FILE = "labels.csv"
COUNTS_FILE = "counts.json"
INPUTS_FILE = "preparation.json"
IMAGES_FILE = "preparation.parquet"
# Changes with what the files of an unfinished preparation mean.
FORMAT = 2


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
      short_side: pixels that larger pictures are reduced to.
      images: the columns split, image_id, size_bytes and stamp (see
        `image_files.FileFacts`) of the files; kept to name those that change.

    Raises:
      InputError: something else is in it.
    """
    inputs = output / INPUTS_FILE
    output.mkdir(parents=True, exist_ok=True)
    if inputs.exists():
        begun = json.loads(inputs.read_text())
        if begun.get("format") != FORMAT:
            raise InputError(
                f"{output} was prepared by another version of jaxii; choose another "
                "folder, or delete it"
            )
        if begun.get("fingerprint") != fingerprint:
            raise InputError(_difference(output, images))
        return (output / INFO_FILE).exists()
    if names_in(output):
        raise InputError(
            f"{output} is not empty and no preparation was begun in it; choose an "
            "empty or new folder"
        )
    claim = {"format": FORMAT, "fingerprint": fingerprint, "short_side": short_side}
    write_json(inputs, claim)
    write_beside(output / IMAGES_FILE, images.write_parquet, binary=True)
    return False


def _difference(output: AnyPath, images: pl.DataFrame) -> str:
    """Returns why a folder is not that of these inputs."""
    stored = output / IMAGES_FILE
    if stored.exists():
        before = pl.read_parquet(io.BytesIO(stored.read_bytes()))
        both = images.join(before, on=("split", "image_id"), maintain_order="left")
        changed = both.filter(
            (pl.col("size_bytes") != pl.col("size_bytes_right"))
            | (pl.col("stamp") != pl.col("stamp_right"))
        )
        if len(changed):
            examples = ", ".join(few(changed["image_id"]))
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
    """Returns the pixels that pictures were reduced to; None where it is not known."""
    inputs = directory / INPUTS_FILE
    return json.loads(inputs.read_text()).get("short_side") if inputs.exists() else None


def complete(
    output: AnyPath,
    features: tfds.features.FeaturesDict,
    written: Mapping[str, Written],
) -> None:
    """Writes TFDS's description of the dataset and removes what its making left."""
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
    for pattern in ("*.part", "*.plan"):
        for path in output.glob(pattern):
            path.unlink()
    with tempfile.TemporaryDirectory() as draft:
        info.write_to_directory(draft)
        # The file that says "complete" comes last.
        for path in sorted(Path(draft).iterdir(), key=lambda p: p.name == INFO_FILE):
            content = path.read_bytes()
            write_beside(
                output / path.name, lambda file, c=content: file.write(c), binary=True
            )
    for path in output.glob("*.array_record-*.json"):
        path.unlink()
