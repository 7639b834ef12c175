"""Opens prepared datasets as splits of records with their index.

`Dataset.hold_out` separates a domain from train; `Dataset.carve` makes validation.
"""

import hashlib
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import polars as pl
import xxhash
from array_record.python.array_record_data_source import ArrayRecordDataSource
from jaxtyping import Bool, Int64

from jaxii import manifest
from jaxii.console import OnProgress, no_progress
from jaxii.data import folder, index, open_images_v4, schema, validation
from jaxii.data.index import Index
from jaxii.data.labels import Vocabulary
from jaxii.data.records import Records, Selectable
from jaxii.errors import InputError, nearest, nearest_path
from jaxii.storage import AnyPath, at, names_in, sizes_below

# Threads that read the first record of each shard; buckets answer in parallel.
_THREADS = 8
_FOLD = re.compile(r"fold ([1-9][0-9]*) of ([1-9][0-9]*)")


@dataclass(frozen=True)
class Split:
    """Images of a dataset; row i of the index describes record i.

    Attributes:
      name: train, validation, held_out, tuning, test, or the name of a labelled set.
    """

    name: str
    index: Index
    source: Selectable

    @property
    def num_examples(self) -> int:
        return len(self.index)

    def select(self, rows: Int64[np.ndarray, " chosen"]) -> "Split":
        """Returns the split of these rows, in the given order."""
        rows = np.asarray(rows, np.int64)
        return replace(
            self, index=self.index.select(rows), source=self.source.select(rows)
        )


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset.

    Attributes:
      vocabulary: The labels, by id.
      slices: Sorted names of the slices of all splits.
      content_hash: 32 hexadecimal digits that depend on the records, labels and their
        order, not on the folder or the time of preparation.
    """

    directory: AnyPath
    vocabulary: Vocabulary
    slices: tuple[str, ...]
    splits: dict[str, Split]
    content_hash: str

    @property
    def domains(self) -> tuple[str, ...]:
        """The sorted domains of train."""
        return tuple(sorted(set(self.splits["train"].index.domains)))

    def hold_out(self, domain: str) -> "Dataset":
        """Returns the dataset with a part of train moved to the split `held_out`.

        A domain may divide groups; a fold does not.

        Args:
          domain: A domain of train, which is also removed from a stored validation
            split; or a fold of the groups of train, one of `fold_names`.

        Raises:
          InputError: If the domain does not exist or is the only one, or there are
            fewer groups than folds.
        """
        splits, train = dict(self.splits), self.splits["train"]
        is_held_out = self._is_held_out(domain)
        held_out = train.select(np.flatnonzero(is_held_out))
        splits["held_out"] = replace(held_out, name="held_out")
        splits["train"] = train.select(np.flatnonzero(~is_held_out))
        if "validation" in splits:
            stored = splits["validation"]
            rows = np.flatnonzero(stored.index.domains != domain)
            splits["validation"] = stored.select(rows)
        return replace(self, splits=splits)

    def _is_held_out(self, domain: str) -> Bool[np.ndarray, " row"]:
        index, fold = self.splits["train"].index, _FOLD.fullmatch(domain)
        if fold and domain not in self.domains:
            part, number = int(fold[1]), int(fold[2])
            folds = validation.folds(index.groups, number)
            if folds.max() + 1 < number or part > number:
                raise InputError(
                    f"{domain!r} of {self.directory} has no images: the training data "
                    f"has {len(set(index.groups))} groups; use at most that many folds"
                )
            return folds == part - 1
        check_domains(self.directory, self.domains)
        if domain not in self.domains:
            raise InputError(
                f"{self.directory} has no domain {domain!r} in its training data; "
                f"{nearest(domain, self.domains)}use one of {', '.join(self.domains)}"
            )
        return index.domains == domain

    def carve(self, validation_fraction: float) -> dict[str, Split]:
        """Returns the splits, with a part of train as validation.

        `validation.choose` chooses that part. With a stored validation split, all
        splits are returned unchanged.

        Args:
          validation_fraction: Expected share of the groups, in [0, 1); 0 for none.

        Raises:
          InputError: If the fraction is outside [0, 1), or leaves a side empty.
        """
        if not 0.0 <= validation_fraction < 1.0:
            raise InputError(
                f"validation_fraction={validation_fraction} is out of range; use at "
                "least 0 and less than 1"
            )
        if validation_fraction == 0.0 or "validation" in self.splits:
            return dict(self.splits)
        train = self.splits["train"]
        held_out = validation.choose(train.index, validation_fraction)
        if held_out.all() or not held_out.any():
            raise InputError(
                f"validation_fraction={validation_fraction} of the "
                f"{len(set(train.index.groups))} training groups leaves "
                f"{'no training' if held_out.all() else 'no validation'} images; use "
                "a fraction closer to 0.5, or add images"
            )
        chosen = train.select(np.flatnonzero(held_out))
        return {
            **self.splits,
            "train": train.select(np.flatnonzero(~held_out)),
            "validation": replace(chosen, name="validation"),
        }


def fold_names(number: int) -> tuple[str, ...]:
    """Returns the names of the folds that divide the groups of train."""
    return tuple(f"fold {part} of {number}" for part in range(1, number + 1))


def check_domains(directory: AnyPath, domains: tuple[str, ...]) -> None:
    """Raises InputError if there is only one domain, which cannot be held out."""
    if len(domains) == 1:
        raise InputError(
            f"all training images of {directory} have the domain {domains[0]!r}, so no "
            "domain can be held out; prepare the dataset again with a column domain in "
            "the label file (new) or with --train_metadata, a CSV with the columns "
            "image_id and domain (prepare), or hold out folds (hold_out --folds=4)"
        )


def open_dataset(
    directory: str | os.PathLike[str],
    vocabulary: Vocabulary | None = None,
    *,
    verify: bool = False,
    on_progress: OnProgress = no_progress,
) -> Dataset:
    """Opens a prepared dataset, or a prepared copy of TFDS's `open_images_v4`.

    Args:
      directory: A folder with `dataset_info.json`, or above exactly one such folder.
      vocabulary: The expected labels; None accepts the dataset's. Labels of
        `open_images_v4` are mapped to them by code; other datasets must match them.
      verify: Whether to hash every byte. Sizes, indexes and the first id of each shard
        are always checked.
      on_progress: Called with (done, total, what) during verification and the first
        scan of an `open_images_v4`.

    Raises:
      InputError: If there is no dataset, or it is unfinished, damaged or in another
        format, or has other labels or no training image.
    """
    path = _locate(at(directory))
    info = folder.read_info(path)

    def report(what: str) -> Callable[[int, int], None]:
        return lambda done, total: on_progress(done, total, what)

    if open_images_v4.LABELS in info.features:
        dataset = _open_images_v4(info, vocabulary, report)
    elif {"image", "label_ids", "slice"} <= info.features:
        dataset = _ours(info, vocabulary, verify, report("files verified"))
    else:
        raise InputError(
            f"{path} has the features {', '.join(sorted(info.features))}; expected the "
            "features that `prepare` writes, or those of open_images_v4 "
            f"({open_images_v4.LABELS})"
        )
    if "train" not in dataset.splits:
        raise InputError(
            f"{path} has no training images; prepare it again with training images"
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
            f"the preparation of {directory} did not finish; run it again to continue"
        )
    # TFDS writes a dataset to NAME/CONFIG/VERSION below its data_dir.
    below = sorted(
        path.parent
        for depth in (1, 2, 3)
        for path in directory.glob("*/" * depth + folder.INFO_FILE)
    )
    if len(below) != 1:
        found = ", ".join(str(path) for path in below) or "none"
        raise InputError(
            f"{directory} has no {folder.INFO_FILE} (subfolders that have one: "
            f"{found}); give the folder of one prepared dataset"
        )
    return below.pop()


def _ours(
    info: folder.Info,
    vocabulary: Vocabulary | None,
    verify: bool,
    on_progress: Callable[[int, int], None],
) -> Dataset:
    path = info.directory
    reported = on_progress if verify else lambda done, total: None
    listed = folder.check_manifest(path, verify=verify, on_progress=reported)
    stored = Vocabulary.load(path / folder.LABELS_FILE)
    if info.names("label_ids") != stored.codes:
        raise InputError(
            f"{path / folder.LABELS_FILE} does not match the labels of the records; "
            f"{folder.PREPARE_AGAIN}"
        )
    if vocabulary is not None and vocabulary.codes != stored.codes:
        raise InputError(
            f"{path} has {len(stored)} labels (hash {stored.content_hash()}), not the "
            f"expected {len(vocabulary)} (hash {vocabulary.content_hash()}); use the "
            "dataset that has these labels"
        )
    tables = {name: index.load(folder.index_path(path, name)) for name in info.splits}
    slices = tuple(sorted(set().union(*(t["slice"].unique() for t in tables.values()))))
    slice_ids = {name: i for i, name in enumerate(slices)}
    decode, splits = partial(schema.decode, slice_ids=slice_ids), {}
    for name, table in tables.items():
        columns = index.columns(table, slices)
        described_in = folder.index_path(path, name)
        splits[name] = _split(
            info, name, columns, _raw(info, name), decode, described_in
        )
    return Dataset(path, stored, slices, splits, _content_hash(info, listed))


def _content_hash(info: folder.Info, listed: manifest.Manifest) -> str:
    names = [folder.LABELS_FILE]
    for split, shards in info.splits.items():
        names.append(folder.index_path(info.directory, split).name)
        names += [at(shard.filename).name for shard in shards]
    lines = [f"{name} {listed.files[name].xxh3}" for name in sorted(names)]
    return xxhash.xxh3_128("\n".join(lines).encode()).hexdigest()


def _open_images_v4(
    info: folder.Info,
    vocabulary: Vocabulary | None,
    report: Callable[[str], Callable[[int, int], None]],
) -> Dataset:
    path = info.directory
    mapping, vocabulary = open_images_v4.read_mapping(
        info.names(f"{open_images_v4.LABELS}-label"),
        info.names(f"{open_images_v4.LABELS}-source"),
        vocabulary,
    )
    sizes = sizes_below(path)
    decode = partial(open_images_v4.decode, mapping=mapping)
    splits, digest = {}, xxhash.xxh3_128("\n".join(vocabulary.codes).encode())
    for name, shards in info.splits.items():
        raw = _raw(info, name)
        # A rebuilt dataset has shards of other sizes.
        of_shards = [sizes[at(shard.filename).name] for shard in shards]
        table = _cached_index(path, name, of_shards, vocabulary, raw, mapping, report)
        columns = index.columns(table, ("all",))
        described_in = path / folder.INFO_FILE
        splits[name] = _split(info, name, columns, raw, decode, described_in)
        digest.update(f"{name} {of_shards} {columns.content_hash()}".encode())
    return Dataset(path, vocabulary, ("all",), splits, digest.hexdigest())


def _cached_index(path, name, sizes, vocabulary, raw, mapping, report) -> pl.DataFrame:
    key = hashlib.sha256(f"{vocabulary.codes} {sizes}".encode()).hexdigest()[:16]
    cache = index.cache_path(path, f"index-{name}-{key}")
    if cache.exists():
        table = index.load(cache)
        if len(table) == len(raw):
            return table
    table = open_images_v4.scan(
        raw, mapping, on_progress=report(f"{name} images indexed")
    )
    index.save(table, cache)
    return table


def _raw(info: folder.Info, name: str) -> ArrayRecordDataSource:
    shards, present = info.splits[name], names_in(info.directory)
    absent = [s.filename for s in shards if at(s.filename).name not in present]
    if absent:
        raise InputError(
            f"{absent[0]} is missing ({len(absent)} of {len(shards)} shards of "
            f"{name}); {folder.PREPARE_AGAIN}"
        )
    return ArrayRecordDataSource(list(shards))


def _split(info, name, columns, raw, decode, described_in) -> Split:
    """Returns a split, after checking its size and the first id of each shard."""
    records = Records(raw, decode, columns.image_ids, f"{name} of {info.directory}")
    if len(records) != len(columns):
        raise InputError(
            f"{described_in} describes {len(columns)} images, but {records} has "
            f"{len(records)} records; {folder.PREPARE_AGAIN}"
        )
    lengths = [shard.examples_in_shard for shard in info.splits[name]]
    with ThreadPoolExecutor(_THREADS) as pool:
        starts = np.cumsum([0, *lengths[:-1]]).tolist()
        list(pool.map(lambda row: records[row]["image_id"], starts))
    return Split(name, columns, records)
