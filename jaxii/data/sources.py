"""A prepared dataset -> random-access sources and their indexes, one pair a split.

Comes after preparation (or TFDS, for its `open_images_v4`) and before `pipeline`, which
gives a split's source to grain. `hold_out` takes a whole domain out of train, `carve`
the validation split.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from jaxtyping import Int64

from jaxii.data import folder, index, open_images_v4
from jaxii.data.index import Index
from jaxii.data.labels import Vocabulary
from jaxii.data.records import OpenImagesV4Records, Records
from jaxii.errors import InputError
from jaxii.files import AnyPath, at, names_in, size_of
from jaxii.nearest import nearest, nearest_path

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Split:
    """A set of images: their records, and the columns of their index.

    Args:
      name: train, validation, held_out, tuning or test.
      index: one row a record, in the same order.
      source: the records.
    """

    name: str
    index: Index
    source: Records | OpenImagesV4Records

    @property
    def num_examples(self) -> int:
        return len(self.index)

    def select(self, rows: Int64[np.ndarray, " chosen"]) -> "Split":
        """Returns the split of these rows, in their order; nothing is copied but the
        index."""
        rows = np.asarray(rows, np.int64)
        return replace(
            self, index=self.index.select(rows), source=self.source.select(rows)
        )


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset.

    Args:
      directory: where it is.
      vocabulary: what its label ids mean.
      slices: names of slices over all splits, in order.
      splits: the stored splits, by name.
    """

    directory: AnyPath
    vocabulary: Vocabulary
    slices: tuple[str, ...]
    splits: dict[str, Split]

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains of the training data, sorted."""
        return tuple(sorted(set(self.splits["train"].index.domains)))

    def hold_out(self, domain: str) -> "Dataset":
        """Returns the dataset with a domain of train as the split `held_out`.

        No image of it is left in train, nor in a validation split that is stored; what
        `carve` makes afterwards has none either, and its sides are as they were.

        Args:
          domain: one of `domains`.

        Raises:
          InputError: there is no such domain, or no other.
        """
        check_domains(self.directory, self.domains)
        if domain not in self.domains:
            raise InputError(
                f"{self.directory} has no domain {domain!r} in its training data; "
                f"{nearest(domain, self.domains)}use one of {', '.join(self.domains)}"
            )
        train = self.splits["train"]
        held_out = train.select(np.flatnonzero(train.index.domains == domain))
        others = {
            name: split.select(np.flatnonzero(split.index.domains != domain))
            for name, split in self.splits.items()
            if name in ("train", "validation")
        }
        splits = {
            **self.splits,
            **others,
            "held_out": replace(held_out, name="held_out"),
        }
        return replace(self, splits=splits)

    def carve(
        self, validation_fraction: float, seed_salt: str = ""
    ) -> dict[str, Split]:
        """Returns the splits with a validation split taken out of train.

        A group goes to validation by a hash of its own name, so that an image never
        changes sides when others are added. A validation split that is stored is used
        as it is, and train stays whole.

        Args:
          validation_fraction: expected share of the groups, in [0, 1); 0: none.
          seed_salt: another salt makes another choice.

        Raises:
          InputError: a fraction outside [0, 1), or one that leaves a side empty.
        """
        if not 0.0 <= validation_fraction < 1.0:
            raise InputError(
                f"validation_fraction={validation_fraction}; give at least 0 and less "
                "than 1"
            )
        if validation_fraction == 0.0 or "validation" in self.splits:
            return dict(self.splits)
        train = self.splits["train"]
        held_out = _hash_below(train.index.groups, validation_fraction, seed_salt)
        if held_out.all() or not held_out.any():
            raise InputError(
                f"validation_fraction={validation_fraction} of the "
                f"{len(set(train.index.groups))} groups of train leaves "
                f"{'no training' if held_out.all() else 'no validation'} image; choose "
                "a fraction nearer to one half, or add images"
            )
        validation = train.select(np.flatnonzero(held_out))
        return {
            **self.splits,
            "train": train.select(np.flatnonzero(~held_out)),
            "validation": replace(validation, name="validation"),
        }


def check_domains(directory: AnyPath, domains: tuple[str, ...]) -> None:
    """Refuses to hold out the only domain there is.

    Raises:
      InputError: how to give the training images domains.
    """
    if len(domains) == 1:
        raise InputError(
            f"every training image of {directory} has the domain {domains[0]!r}, so "
            "that none can be held out; prepare it again with a train metadata CSV "
            "(--train_metadata) that has the columns image_id and domain"
        )


def open_dataset(
    directory: str | os.PathLike[str],
    vocabulary: Vocabulary | None = None,
    *,
    on_progress: Progress | None = None,
) -> Dataset:
    """Opens a prepared dataset, or a prepared copy of TFDS's `open_images_v4`.

    Args:
      directory: with `dataset_info.json` in it, or in the one folder below that has it.
      vocabulary: the labels expected. Of a dataset of ours they must be the same; the
        labels of `open_images_v4` are mapped to them by code. None: the dataset's own.
      on_progress: called with (records, records in all, what) while an index is made,
        which happens once for an `open_images_v4`.

    Raises:
      InputError: no dataset there, an unfinished one, one in another format, other
        labels, or no training image.
    """
    path = _locate(at(directory))
    try:
        builder = tfds.builder_from_directory(os.fspath(path))
    except (ValueError, OSError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{path} is not a readable TFDS dataset ({reason}); prepare it again"
        ) from error
    features: Any = builder.info.features
    stored_as: Any = builder.info.file_format
    file_format = stored_as.value
    if file_format != "array_record":
        raise InputError(
            f"{path} is stored as {file_format}; array_record is read: convert it with "
            "`python -m tensorflow_datasets.scripts.convert_format "
            "--to_file_format=array_record` or build it with that file_format"
        )
    if open_images_v4.LABELS in features:
        dataset = _open_images_v4(path, builder, vocabulary, on_progress)
    elif {"image", "label_ids", "slice"} <= set(features):
        dataset = _ours(path, builder, vocabulary)
    else:
        raise InputError(
            f"{path} has the features {', '.join(sorted(features))}; it needs those "
            f"that `prepare` writes, or {open_images_v4.LABELS} as open_images_v4 has"
        )
    if "train" not in dataset.splits or not dataset.splits["train"].num_examples:
        raise InputError(
            f"{path} has no training image; prepare it from files with some"
        )
    return dataset


def _locate(directory: AnyPath) -> AnyPath:
    if (directory / folder.INFO_FILE).is_file():
        return directory
    if not directory.is_dir():
        near = nearest_path(directory)
        raise InputError(
            f"{directory} is not a folder; {near or 'prepare a dataset there first'}"
        )
    if (directory / folder.INPUTS_FILE).exists():
        raise InputError(
            f"the preparation of {directory} did not finish; run it again, it goes on "
            "where it was"
        )
    # TFDS puts NAME/CONFIG/VERSION below its data_dir.
    below = sorted(
        path.parent
        for depth in (1, 2, 3)
        for path in directory.glob("*/" * depth + folder.INFO_FILE)
    )
    if len(below) != 1:
        found = ", ".join(str(path) for path in below) or "none"
        raise InputError(
            f"{directory} has no {folder.INFO_FILE} (in folders below: {found}); give "
            "the folder of one prepared dataset"
        )
    return below.pop()


def _ours(path: AnyPath, builder, vocabulary: Vocabulary | None) -> Dataset:
    stored = Vocabulary.load(path / folder.LABELS_FILE)
    if tuple(builder.info.features["label_ids"].names) != stored.codes:
        raise InputError(
            f"{path / folder.LABELS_FILE} does not match the labels of the records; "
            "prepare the dataset again"
        )
    if vocabulary is not None and vocabulary.codes != stored.codes:
        raise InputError(
            f"{path} has {len(stored)} labels (hash {stored.content_hash()}), expected"
            f" are {len(vocabulary)} (hash {vocabulary.content_hash()}); use the "
            "dataset that the labels belong to"
        )
    names = [
        name for name in builder.info.splits if builder.info.splits[name].num_examples
    ]
    tables = {name: index.load(folder.index_path(path, name)) for name in names}
    slices = tuple(
        sorted({s for table in tables.values() for s in table["slice"].unique()})
    )
    splits = {}
    for name, table in tables.items():
        raw = _raw(path, builder, name, len(table))
        splits[name] = Split(name, index.columns(table, slices), Records(raw, slices))
    return Dataset(path, stored, slices, splits)


def _open_images_v4(path, builder, vocabulary, on_progress) -> Dataset:
    mapping, vocabulary = open_images_v4.read_mapping(builder.info.features, vocabulary)
    splits = {}
    for name, info in builder.info.splits.items():
        if not info.num_examples:
            continue
        raw = _raw(path, builder, name, info.num_examples)
        table = _cached_index(path, name, vocabulary, raw, mapping, on_progress)
        source = OpenImagesV4Records(raw, mapping)
        splits[name] = Split(name, index.columns(table, ("all",)), source)
    return Dataset(path, vocabulary, ("all",), splits)


def _cached_index(path, name, vocabulary, raw, mapping, on_progress) -> pl.DataFrame:
    # The sizes of the shards tell a rebuilt dataset from the one that was scanned.
    sizes = [size_of(p) for p in sorted(path.glob(f"*-{name}.array_record*"))]
    key = hashlib.sha256(f"{vocabulary.codes} {sizes}".encode()).hexdigest()[:16]
    cache = index.cache_path(path, f"index-{name}-{key}")
    if cache.exists():
        table = index.load(cache)
        if len(table) == len(raw):
            return table

    def report(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(done, total, f"index of {name}")

    table = open_images_v4.scan(raw, mapping, on_progress=report)
    index.save(table, cache)
    return table


def _raw(path: AnyPath, builder, name: str, num_examples: int) -> ArrayRecordDataSource:
    instructions = builder.info.splits[name].file_instructions
    present = names_in(path)
    absent = [i.filename for i in instructions if at(i.filename).name not in present]
    if absent:
        raise InputError(
            f"{absent[0]} is missing ({len(absent)} of {len(instructions)} shards of "
            f"{name}); copy the whole dataset or prepare it again"
        )
    raw = ArrayRecordDataSource(instructions)
    if len(raw) != num_examples:
        raise InputError(
            f"the index of {name} in {path} has {num_examples} images and its records "
            f"are {len(raw)}; prepare the dataset again"
        )
    return raw


def _hash_below(groups: np.ndarray, fraction: float, salt: str) -> np.ndarray:
    # Digests are compared as the big-endian numbers that their bytes are.
    limit = int(fraction * 2**64).to_bytes(8, "big")
    salted = hashlib.blake2b(salt.encode() + b"\x00", digest_size=8)

    def below(group: str) -> bool:
        hashed = salted.copy()
        hashed.update(group.encode())
        return hashed.digest() < limit

    return np.fromiter(map(below, groups), bool, len(groups))
