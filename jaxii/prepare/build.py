"""Writes a prepared dataset from the drafts of its splits.

Image shards are written first, then indexes, counts and label list, and TFDS's
`dataset_info.json` last: a dataset with that file is complete. An interrupted build
continues where it stopped; a build with other inputs is refused.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import splits as split_lib

from jaxii import manifest
from jaxii.console import OnProgress, no_progress
from jaxii.data import folder, index, schema
from jaxii.data.labels import Vocabulary
from jaxii.errors import InputError
from jaxii.prepare import duplicates, recurring, shards
from jaxii.prepare.beam import Beam, write_with_beam
from jaxii.prepare.near_copies import SAVED_PARTS
from jaxii.prepare.shards import Written
from jaxii.prepare.tally import Counts, Tally, few
from jaxii.storage import (
    AnyPath,
    check_held,
    held,
    is_leftover,
    names_in,
    write_beside,
    write_json,
)


@dataclass(frozen=True)
class Draft:
    """A split whose images have not been read yet.

    Attributes:
      plan: Images and labels to write.
      tally: Counts of images kept and left out so far.
      submission_ids: For test, the ids that a submission lists, in its order.
    """

    plan: shards.Plan
    tally: Tally
    submission_ids: Sequence[str] = ()


def image_table(
    image_ids: Sequence[str],
    metadata: pl.DataFrame,
    *,
    rows: np.ndarray,
    labels: np.ndarray,
    confidences: np.ndarray,
    sources: np.ndarray,
) -> pl.DataFrame:
    """Returns the index of images, with labels sorted by label and source.

    The last four arguments have one entry per (image, label, source), in any order.

    Args:
      image_ids: Distinct ids.
      metadata: Columns group, domain and slice. A null group becomes the image id. A
        null domain or slice becomes "all" if the column is empty, else `no_value`.
      rows: Position of the image in `image_ids`.
      labels: Vocabulary indices.
      confidences: In [0, 1].
      sources: See `labels`.
    """
    # One integer key per entry sorts three times as fast as three columns.
    num_labels = int(labels.max(initial=0)) + 1
    key = (rows.astype(np.int64) * num_labels + labels) * 4 + sources
    order = np.argsort(key, kind="stable")
    offsets = np.zeros(len(image_ids) + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=len(image_ids)), out=offsets[1:])
    ids = pl.Series(image_ids, dtype=pl.String)
    return index.table(
        image_ids=ids,
        groups=metadata.select(pl.coalesce("group", pl.lit(ids))).to_series(),
        domains=_filled(metadata["domain"]),
        slices=_filled(metadata["slice"]),
        offsets=offsets,
        label_ids=labels[order],
        confidences=confidences[order],
        label_sources=sources[order],
    )


def no_value(kind: str) -> str:
    """Returns the domain or slice of images without one, if other images have one."""
    return f"no {kind}"


def _filled(values: pl.Series) -> pl.Series:
    return values.fill_null(no_value(values.name) if values.count() else "all")


def build(
    drafts: Sequence[Draft],
    vocabulary: Vocabulary,
    output: AnyPath,
    *,
    short_side: int,
    file_tallies: Sequence[Tally] = (),
    inputs_hash: str = "",
    near_copies: str = recurring.KEEP,
    num_workers: int | None = None,
    beam: Beam | None = None,
    on_progress: OnProgress = no_progress,
) -> Counts:
    """Writes a dataset and returns counts of what was read, kept and dropped.

    Args:
      drafts: One per split, in the order train, validation, tuning, test.
      vocabulary: The labels.
      output: The folder, created if absent. It must be empty or hold an interrupted or
        complete build of the same inputs. A complete dataset is not written again.
      short_side: Short side that larger images are reduced to, in pixels; at least 16.
      file_tallies: Counts of the label files, stored in counts.json.
      inputs_hash: Hash of input files that the drafts do not describe in full.
      near_copies: One of `recurring.CHOICES`, for near copies in other splits or
        groups.
      num_workers: Number of threads; by default one per core.
      beam: Writes the shards through Apache Beam instead of threads.
      on_progress: Called with (images done, images in all, split).

    Raises:
      InputError: If `short_side` is too small, no training image can be used, the
        output folder holds anything else, or another process writes to it or, in a
        bucket, takes it over.
    """
    if short_side < 16:
        raise InputError(
            f"short_side={short_side} is too small; use at least 16 pixels"
        )
    if near_copies != recurring.KEEP:
        inputs_hash += f" near_copies={near_copies}"
    made_of = fingerprint(drafts, vocabulary, short_side, inputs_hash)
    with _holding(output, on_progress) as on_progress:
        if _begin(output, made_of, short_side, _image_files(drafts)):
            return Counts.load(output / folder.COUNTS_FILE)
        options = {"short_side": short_side, "on_progress": on_progress}
        if beam is not None:
            plans = [draft.plan for draft in drafts]
            write_with_beam(output, plans, beam=beam, **options)
        splits, written = _write(
            output, drafts, near_copies=near_copies, num_workers=num_workers, **options
        )
        counts = Counts(tuple(file_tallies), tuple(splits))
        counts.save(output / folder.COUNTS_FILE)
        vocabulary.save(output / folder.LABELS_FILE)
        answered = [image_id for draft in drafts for image_id in draft.submission_ids]
        save_submission_ids(output, answered)
        complete(output, schema.features(vocabulary), written)
    return counts


@contextmanager
def _holding(output: AnyPath, on_progress: OnProgress) -> Iterator[OnProgress]:
    """Holds the output folder, like `held`.

    If another process takes over a folder in a bucket, it changes files that this one
    reads. The error names that process instead of the file.

    Yields:
      `on_progress`, after a check that the folder is still held.
    """

    def checked(done: int, total: int, what: str) -> None:
        check_held(output)
        on_progress(done, total, what)

    with held(output):
        try:
            yield checked
        except Exception:
            check_held(output)
            raise


def save_submission_ids(directory: AnyPath, image_ids: Sequence[str]) -> None:
    """Writes the ids that a submission lists, in its order.

    Missing and unreadable images are included, although no split has them.
    """
    table = pl.DataFrame({"image_id": image_ids}, schema={"image_id": pl.String})
    write_beside(directory / folder.SUBMISSION_FILE, table.write_csv, binary=True)


def _write(
    output: AnyPath,
    drafts: Sequence[Draft],
    *,
    short_side: int,
    near_copies: str,
    num_workers: int | None,
    on_progress: OnProgress,
) -> tuple[list[Tally], dict[str, Written]]:
    """Writes missing shards and all indexes; returns tallies and the written shards."""
    results, stored = {}, {}
    how = {
        "short_side": short_side,
        "num_workers": num_workers,
        "on_progress": on_progress,
    }
    for draft in drafts:
        plan = draft.plan
        check_held(output)
        results[plan.split] = shards.write(output, plan, **how)
        if plan.split == "train":
            check_left(_account(draft, results["train"], {}))
        stored[plan.split] = _stored(plan, results[plan.split].digests)
    leaks = duplicates.leaks(stored)
    kept = _without(stored, leaks)
    twins = duplicates.same_file(kept["train"]["digest"].to_list())
    kept["train"], merged = duplicates.merged_groups(kept["train"], twins)
    notes = {duplicates.IN_OTHER_GROUPS: merged}
    pairs = None
    if near_copies != recurring.IGNORE:
        plans = [draft.plan for draft in drafts]
        pairs = recurring.find(output, plans, results, kept, **how)
    if pairs is not None and near_copies == recurring.REMOVE:
        near = recurring.leaks(pairs, list(kept))
        leaks = {split: leaks.get(split, {}) | near.get(split, {}) for split in kept}
        kept = _without(kept, near)
        within, pairs = recurring.within_train(pairs, kept)
        kept["train"], merged = duplicates.merged_groups(kept["train"], within)
        notes[recurring.MERGED] = merged
    groups = kept["train"].select("row", "group")
    splits, written = _leave_out(output, drafts, results, leaks, groups, **how)
    for what, shown in notes.items():
        splits[0] = splits[0].with_note(what, len(shown), shown)
    splits = duplicates.note(stored, splits)
    if pairs is not None:
        index.save(pairs.select(recurring.COLUMNS), output / folder.RECURRING_FILE)
        splits = recurring.note(pairs, splits)
    return splits, written


def _leave_out(
    output: AnyPath,
    drafts: Sequence[Draft],
    results: Mapping[str, Written],
    leaks: Mapping[str, Mapping[int, tuple[str, str]]],
    groups: pl.DataFrame,
    **how: Any,
) -> tuple[list[Tally], dict[str, Written]]:
    """Leaves out images that are in later splits and writes all indexes.

    Args:
      leaks: For each split, a map from row to the reason and the image that stays.
      groups: Columns row and group of the images of train that stay.
      how: The named arguments of `shards.leave_out`.
    """
    splits, written = [], {}
    for draft in drafts:
        plan, twins = draft.plan, leaks.get(draft.plan.split, {})
        reasons = {row: f"{why} ({twin})" for row, (why, twin) in twins.items()}
        check_held(output)
        result = shards.leave_out(output, plan, results[plan.split], reasons, **how)
        tally, table = _account(draft, result, twins), plan.table.with_row_index("row")
        if plan.split == "train":
            check_left(tally)
            table = table.update(groups, on="row")
        table = table[result.rows].drop("row")
        digests = (result.digests[row] for row in result.rows)
        table = index.with_file_hashes(table, digests)
        splits.append(tally)
        if len(result.rows):
            written[plan.split] = result
            index.save(table, folder.index_path(output, plan.split))
    return splits, written


def _without(
    tables: Mapping[str, pl.DataFrame], leaving: Mapping[str, Collection[int]]
) -> dict[str, pl.DataFrame]:
    """Returns the tables of splits without the rows in `leaving`."""
    return {
        split: table.filter(~pl.col("row").is_in(list(leaving.get(split, ()))))
        for split, table in tables.items()
    }


def _stored(plan: shards.Plan, digests: Sequence[str]) -> pl.DataFrame:
    """Returns row, image_id, group, domain and digest of each readable image."""
    columns = plan.table.select("image_id", "group", "domain").with_row_index("row")
    columns = columns.with_columns(digest=pl.Series(digests, dtype=pl.String))
    return columns.filter(pl.col("digest") != "")


def _account(
    draft: Draft, result: Written, twins: Mapping[int, tuple[str, str]]
) -> Tally:
    plan, tally = draft.plan, draft.tally
    dropped, named = dict(tally.dropped), dict[str, list[str]]()
    for row, why in result.faults.items():
        image_id = plan.table["image_id"][row]
        if row in twins:
            reason, twin = twins[row]
            named.setdefault(reason, []).append(f"{image_id} = {twin}")
        else:
            named.setdefault("unreadable", []).append(f"{image_id}: {why}")
    dropped |= {reason: len(images) for reason, images in named.items()}
    examples = {**tally.examples, **{r: few(images) for r, images in named.items()}}
    entries = plan.table["label_ids"].list.len().to_numpy()[result.rows]
    notes = {"labels": int(entries.sum()), **tally.notes}
    if entries.any() and not entries.all():
        notes["without a label (not scored)"] = int(np.sum(entries == 0))
    return replace(
        tally, kept=len(result.rows), dropped=dropped, examples=examples, notes=notes
    )


def check_left(train: Tally) -> None:
    """Raises InputError if the training split has no image left."""
    if not train.kept:
        raise InputError(
            f"no training image is left ({train.line()}); at least one must be "
            "readable and have a label. Check that image names match the ids in the "
            "label file"
        )


def fingerprint(
    drafts: Iterable[Draft], vocabulary: Vocabulary, short_side: int, inputs_hash: str
) -> str:
    """Returns a hash of the inputs, with size and stamp in place of image contents."""
    digest = hashlib.sha256(f"{folder.FORMAT} {short_side}{inputs_hash}".encode())
    digest.update(json.dumps([vocabulary.codes, vocabulary.descriptions]).encode())
    for draft in drafts:
        plan, table = draft.plan, draft.plan.table
        texts = [table[c].to_list() for c in ("image_id", "group", "domain", "slice")]
        described = [plan.split, *texts, plan.facts, draft.submission_ids]
        digest.update(json.dumps(described).encode())
        lengths = table["label_ids"].list.len().to_numpy()
        digest.update(np.append(0, np.cumsum(lengths, dtype=np.int64)).tobytes())
        for name in ("label_ids", "label_confidences", "label_sources"):
            digest.update(table[name].explode().drop_nulls().to_numpy().tobytes())
    return digest.hexdigest()


def _image_files(drafts: Iterable[Draft]) -> pl.DataFrame:
    """Returns split, image_id, size_bytes and stamp of each image file.

    The table is stored so that a later build can name the files that changed.
    """
    return pl.concat(
        pl.DataFrame(
            {
                "image_id": draft.plan.table["image_id"],
                "size_bytes": [facts.size_bytes for facts in draft.plan.facts],
                "stamp": [facts.stamp for facts in draft.plan.facts],
            },
            schema={"image_id": pl.String, "size_bytes": pl.Int64, "stamp": pl.String},
        ).with_columns(split=pl.lit(draft.plan.split))
        for draft in drafts
    )


def _begin(
    output: AnyPath, fingerprint: str, short_side: int, images: pl.DataFrame
) -> bool:
    """Claims the output folder; returns whether it holds the complete dataset.

    Raises:
      InputError: If the folder holds something else or a damaged dataset.
    """
    inputs = output / folder.INPUTS_FILE
    output.mkdir(parents=True, exist_ok=True)
    if inputs.exists():
        begun = folder.read_json(inputs)
        if begun.get("format") != folder.FORMAT:
            raise InputError(
                f"{output} was prepared by another version of jaxii; choose another "
                "folder or delete this one"
            )
        if begun.get("fingerprint") != fingerprint:
            raise InputError(_difference(output, images))
        if (output / folder.INFO_FILE).exists():
            folder.check_manifest(output)
            return True
    elif not all(map(is_leftover, names_in(output))):
        raise InputError(
            f"{output} is not empty and contains no prepared dataset; choose an empty "
            "or new folder"
        )
    else:
        made_of = {"fingerprint": fingerprint, "short_side": short_side}
        write_json(inputs, {"format": folder.FORMAT, **made_of})
    write_beside(output / folder.IMAGES_FILE, images.write_parquet, binary=True)
    return False


def _difference(output: AnyPath, images: pl.DataFrame) -> str:
    """Returns a message that says how the inputs of the output folder differ."""
    stored = output / folder.IMAGES_FILE
    if stored.exists():
        before = index.load(stored)
        both = images.join(before, on=("split", "image_id"), maintain_order="left")
        changed = both.filter(
            (pl.col("size_bytes") != pl.col("size_bytes_right"))
            | (pl.col("stamp") != pl.col("stamp_right"))
        )
        if len(changed):
            examples = ", ".join(few(changed["image_id"]))
            return (
                f"{output} was started with other versions of {len(changed):,} image "
                f"files ({examples}), judging by size or modification time; choose "
                "another folder or delete this one"
            )
    return (
        f"{output} was prepared from other files or with other options; choose another "
        "folder or delete this one"
    )


def complete(
    output: AnyPath,
    features: tfds.features.FeaturesDict,
    written: Mapping[str, Written],
) -> None:
    """Writes TFDS's description and the manifest; removes temporary files."""
    check_held(output)
    for pattern in ("*.part", "*.plan"):
        for path in output.glob(pattern):
            path.unlink()
    names = [folder.LABELS_FILE, folder.COUNTS_FILE, folder.INPUTS_FILE]
    names += [folder.IMAGES_FILE, folder.SUBMISSION_FILE]
    if (output / folder.RECURRING_FILE).exists():
        names.append(folder.RECURRING_FILE)
    names += [folder.index_path(output, split).name for split in written]
    files = manifest.describe_all(output, names)
    for result in written.values():
        files |= result.files
    with tempfile.TemporaryDirectory() as draft:
        _tfds_info(output, features, written).write_to_directory(draft)
        drafts = sorted(Path(draft).iterdir())
        files |= manifest.describe_all(Path(draft), [path.name for path in drafts])
        check_held(output)
        manifest.Manifest(files).save(output / manifest.NAME)
        # The file that marks the dataset as complete comes last.
        for path in sorted(drafts, key=lambda p: p.name == folder.INFO_FILE):
            content = path.read_bytes()
            write_beside(
                output / path.name, lambda file, c=content: file.write(c), binary=True
            )
    check_held(output)
    needless = "*.array_record-*.json", "*.array_record-*.thumbnails", SAVED_PARTS
    for pattern in needless:
        for path in output.glob(pattern):
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
