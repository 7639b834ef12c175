"""The folder of a prepared dataset: its file names, how it is begun and completed.

`open_images` begins it before it writes shards and completes it after them; `sources`
reads the files named here. TFDS's `dataset_info.json` is written last: where it is, the
dataset is whole.
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import splits as split_lib

from jaxii.data import schema
from jaxii.data.shards import Written
from jaxii.errors import InputError
from jaxii.files import AnyPath, names_in, write_beside, write_json

INFO_FILE = "dataset_info.json"
LABELS_FILE = "labels.csv"
COUNTS_FILE = "counts.json"
INPUTS_FILE = "preparation.json"
SUBMISSION_FILE = "submission_ids.csv"


def index_path(directory: AnyPath, split: str) -> AnyPath:
    """Returns where the index of a split is kept."""
    return directory / f"index-{split}.parquet"


def begin(output: AnyPath, fingerprint: str, short_side: int) -> bool:
    """Claims the output folder; returns whether the dataset is complete already.

    Args:
      output: the folder.
      fingerprint: of everything the dataset is made from.
      short_side: pixels that larger pictures are reduced to.

    Raises:
      InputError: something else is in it.
    """
    inputs = output / INPUTS_FILE
    output.mkdir(parents=True, exist_ok=True)
    if inputs.exists():
        if json.loads(inputs.read_text()).get("fingerprint") != fingerprint:
            raise InputError(
                f"{output} was prepared from other files or with other options; choose "
                "another folder, or delete it"
            )
        return (output / INFO_FILE).exists()
    if names_in(output):
        raise InputError(
            f"{output} is not empty and no preparation was begun in it; choose an "
            "empty or new folder"
        )
    write_json(inputs, {"fingerprint": fingerprint, "short_side": short_side})
    return False


def short_side(directory: AnyPath) -> int | None:
    """Returns the pixels that pictures were reduced to; None where it is not known."""
    inputs = directory / INPUTS_FILE
    return json.loads(inputs.read_text()).get("short_side") if inputs.exists() else None


def save_submission_ids(directory: AnyPath, image_ids: Sequence[str]) -> None:
    """Writes the ids that a submission answers for, in its order.

    Images that are missing or cannot be read are among them, and no split has those.
    """
    if tuple(image_ids) != submission_ids(directory):
        table = pl.DataFrame({"image_id": image_ids}, schema={"image_id": pl.String})
        write_beside(directory / SUBMISSION_FILE, table.write_csv, binary=True)


def submission_ids(directory: AnyPath) -> tuple[str, ...]:
    """Returns what `save_submission_ids` wrote; empty where it never did."""
    path = directory / SUBMISSION_FILE
    if not path.exists():
        return ()
    return tuple(pl.read_csv(path.read_bytes(), infer_schema=False)["image_id"])


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
