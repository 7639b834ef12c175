"""Label files and folders of pictures -> a dataset that TFDS and `sources` read.

`prepare` plans each split (which images, which labels, what is left out and why), has
`shards` write the pictures, and completes the dataset: indexes, label list, counts and,
last of all, TFDS's `dataset_info.json`, whose presence says that the rest is there. A
run that was interrupted goes on where it was; one with other inputs is refused.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from jaxii.data import beam_shards, folder, index, label_files, schema, shards
from jaxii.data.beam_shards import Beam
from jaxii.data.counts import Counts, Tally, few
from jaxii.data.labels import BOX, HUMAN, MACHINE
from jaxii.data.layout import Layout, Pictures, read_validation
from jaxii.errors import InputError
from jaxii.files import AnyPath, at

_FORMAT = 1


@dataclass(frozen=True)
class Draft:
    """A split before its pictures are read.

    Args:
      plan: images and labels to write.
      tally: images kept and left out so far.
      submission_ids: of the test: the ids that a submission answers for, in its order.
    """

    plan: shards.Plan
    tally: Tally
    submission_ids: Sequence[str] = ()


def prepare(
    layout: Layout,
    output_dir: str | os.PathLike[str],
    *,
    short_side: int = 256,
    num_workers: int | None = None,
    beam: Beam | None = None,
    on_progress: shards.Progress | None = None,
) -> Counts:
    """Writes the dataset of a layout: train, a listed validation, tuning and test.

    Args:
      layout: the files.
      output_dir: made if absent; empty, or begun by the same call before.
      short_side: pixels; larger pictures are reduced to it, at least 16.
      num_workers: threads; default: one a core.
      beam: where shards are written instead; None: by threads of this process.
      on_progress: called with (images done, images in all, split name).

    Returns:
      What was read, kept and dropped; also in counts.json.

    Raises:
      InputError: a file that cannot be used, no training image left, an output folder
        that holds something else, or Apache Beam as asked for is not there.
    """
    if short_side < 16:
        raise InputError(f"short_side={short_side} pixels; give at least 16")
    output = at(output_dir)
    if beam is not None:
        beam.check([output, *layout.train_images, *layout.test_images])
    with tempfile.TemporaryDirectory() as scratch:
        layout = layout.fetch(Path(scratch))
        codes = label_files.read_codes(layout.classes, layout.descriptions)
        drafts, tallies = draft_splits(
            layout,
            codes,
            *layout.pictures(),
        )
    complete = folder.begin(output, fingerprint(drafts, codes, short_side), short_side)
    answered = [image_id for draft in drafts for image_id in draft.submission_ids]
    folder.save_submission_ids(output, answered)
    if complete:
        return Counts.load(output / folder.COUNTS_FILE)
    options = {"short_side": short_side, "on_progress": on_progress}
    if beam is not None:
        plans = [draft.plan for draft in drafts]
        beam_shards.write(output, plans, beam=beam, **options)
    splits, written = _write(output, drafts, num_workers=num_workers, **options)
    counts = Counts(tuple(tallies), tuple(splits))
    counts.save(output / folder.COUNTS_FILE)
    codes.vocabulary.save(output / folder.LABELS_FILE)
    folder.complete(output, schema.features(codes.vocabulary), written)
    return counts


def _write(
    output: AnyPath, drafts: Sequence[Draft], **options: Any
) -> tuple[list[Tally], dict[str, shards.Written]]:
    """Writes shards that are not there, and indexes; returns what became of splits."""
    splits, written = [], {}
    for draft in drafts:
        plan = draft.plan
        result = shards.write(output, plan, **options)
        splits.append(_account(draft, result))
        if plan.split == "train" and not len(result.rows):
            raise InputError(_nothing_left(splits[-1]))
        if len(result.rows):
            written[plan.split] = result
            index.save(
                _index_table(plan, result.rows), folder.index_path(output, plan.split)
            )
    return splits, written


def draft_splits(
    layout: Layout,
    codes: label_files.Codes,
    train_pictures: Pictures,
    test_pictures: Pictures,
) -> tuple[list[Draft], list[Tally]]:
    """Reads the label files, and says which images with which labels make the splits.

    Args:
      layout: the files, local.
      codes: what labels may be.
      train_pictures: the training pictures there are.
      test_pictures: those of tuning and test.

    Returns:
      train and, where there are some, validation, tuning and test; the account of each
      file.

    Raises:
      InputError: a file that cannot be used, or no training image with a label.
    """
    drafts, tallies = _train(layout, codes, train_pictures)
    tuning_ids: list[str] = []
    metadata = _metadata(layout.test_metadata, tallies)
    if layout.tuning_labels is not None:
        labels = _listed(layout.tuning_labels, codes, test_pictures, tallies, False)
        tuning_ids = labels[1]
        drafts.append(
            _evaluation("tuning", tuning_ids, labels, test_pictures, metadata)
        )
    test_ids, labels, answered = _test_ids(
        layout, codes, test_pictures, tallies, tuning_ids
    )
    if test_ids:
        draft = _evaluation("test", test_ids, labels, test_pictures, metadata)
        drafts.append(replace(draft, submission_ids=answered))
    return drafts, tallies


def _train(
    layout: Layout, codes: label_files.Codes, pictures: Pictures
) -> tuple[list[Draft], list[Tally]]:
    ids = pl.Series(pictures.ids, dtype=pl.String)
    parts, tallies = [], []
    files = (
        (layout.human_labels, HUMAN),
        (layout.machine_labels, MACHINE),
        (layout.bounding_boxes, BOX),
    )
    for path, source in files:
        if path is not None:
            entries, tally = label_files.read_labels(path, codes, ids)
            parts.append((entries, source))
            tallies.append(tally)
    columns = _columns(parts, len(pictures.ids))
    labelled = np.flatnonzero(np.diff(columns[0]))
    metadata = _metadata(layout.train_metadata, tallies)
    splits = {"train": np.ones(len(ids), bool)}
    if layout.validation_ids is not None:
        splits["validation"], tally = read_validation(layout.validation_ids, ids)
        tallies.append(tally)
        splits["train"] = ~splits["validation"]
    drafts = []
    for split, is_in in splits.items():
        rows, read = labelled[is_in[labelled]], int(is_in.sum())
        dropped = {"without a label": read - len(rows)}
        notes = _second_files(pictures) if split == "train" else {}
        tally = Tally(split, "images", read, len(rows), dropped, notes=notes)
        if split == "train" and not len(rows):
            raise InputError(_nothing_left(tally))
        plan = _make_plan(split, rows, pictures, columns, metadata)
        drafts.append(Draft(plan, tally))
    return drafts, tallies


def _listed(path, codes, pictures, tallies, header):
    ids = pl.Series(pictures.ids, dtype=pl.String)
    entries, tally, listed = label_files.read_image_labels(
        path, codes, ids, header=header
    )
    tallies.append(tally)
    return entries, listed.to_list()


def _test_ids(layout, codes, pictures, tallies, tuning_ids):
    # Who is in the test: the submission's rows; without one, the labelled images;
    # without those, every picture that is not tuning. A submission answers for all rows
    # of the sample, in their order.
    labels = None
    ids: list[str] = pictures.ids
    if layout.test_labels is not None:
        labels = _listed(layout.test_labels, codes, pictures, tallies, True)
        ids = labels[1]
    if layout.sample_submission is not None:
        rows = label_files.read_rows(layout.sample_submission, header=True)
        ids = rows["image_id"].unique(maintain_order=True).to_list()
        name = layout.sample_submission.name
        twice = len(rows) - len(ids)
        tallies.append(Tally(name, "rows", len(rows), len(ids), {"repeated": twice}))
    tuning = set(tuning_ids)
    test_ids = [image_id for image_id in ids if image_id not in tuning]
    answered = sorted(test_ids) if layout.sample_submission is None else ids
    return test_ids, labels, answered


def _evaluation(name, ids, labels, pictures: Pictures, metadata) -> Draft:
    position = pictures.by_id()
    rows = np.array(sorted(position[i] for i in ids if i in position), np.int64)
    missing = sorted(i for i in ids if i not in position)
    columns = _columns([(labels[0], HUMAN)] if labels else [], len(pictures.ids))
    reason = "listed but missing"
    tally = Tally(
        name,
        "images",
        read=len(ids),
        kept=len(rows),
        dropped={reason: len(missing)},
        examples={reason: few(missing)},
        notes=_second_files(pictures) if name == "test" else {},
    )
    return Draft(_make_plan(name, rows, pictures, columns, metadata), tally)


def _columns(
    parts: Sequence[tuple[label_files.Entries, int]], num_images: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns offsets, label ids, confidences, sources over all images, sorted."""
    none = np.zeros(0, np.int64)
    rows = np.concatenate([none, *(entries.rows for entries, _ in parts)])
    labels = np.concatenate(
        [none.astype(np.int32), *(entries.labels for entries, _ in parts)]
    )
    confidences = np.concatenate(
        [none.astype(np.float32), *(entries.confidences for entries, _ in parts)]
    )
    sources = np.concatenate(
        [none.astype(np.uint8)]
        + [np.full(len(entries.rows), source, np.uint8) for entries, source in parts]
    )
    # One whole number an entry: three times as fast as sorting by three columns.
    num_labels = int(labels.max(initial=0)) + 1
    order = np.argsort((rows * num_labels + labels) * 4 + sources, kind="stable")
    offsets = np.zeros(num_images + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=num_images), out=offsets[1:])
    return offsets, labels[order], confidences[order], sources[order]


def _make_plan(split, rows, pictures, columns, metadata: Mapping) -> shards.Plan:
    offsets, labels, confidences, sources = columns
    lengths = np.diff(offsets)[rows]
    new_offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(lengths, out=new_offsets[1:])
    chosen = np.repeat(offsets[:-1][rows] - new_offsets[:-1], lengths)
    chosen += np.arange(new_offsets[-1], dtype=np.int64)
    ids = [pictures.ids[row] for row in rows]
    facts = [metadata.get(image_id, (None, None, None)) for image_id in ids]
    return shards.Plan(
        split=split,
        image_ids=ids,
        paths=[pictures.paths[row] for row in rows],
        sizes=[pictures.sizes[row] for row in rows],
        groups=[fact[0] or i for fact, i in zip(facts, ids, strict=True)],
        domains=[fact[1] or "all" for fact in facts],
        slices=[fact[2] or "all" for fact in facts],
        offsets=new_offsets,
        label_ids=labels[chosen],
        confidences=confidences[chosen],
        label_sources=sources[chosen],
    )


def _metadata(path: AnyPath | None, tallies: list[Tally]) -> Mapping:
    if path is None:
        return {}
    table, tally = label_files.read_metadata(path)
    tallies.append(tally)
    return {row[0]: row[1:] for row in table.iter_rows()}


def _second_files(pictures: Pictures) -> dict[str, int]:
    number = len(pictures.repeated)
    return {"ids with a second file (not read)": number} if number else {}


def _account(draft: Draft, result: shards.Written) -> Tally:
    plan, tally = draft.plan, draft.tally
    dropped, examples = dict(tally.dropped), dict(tally.examples)
    if result.faults:
        reason = "unreadable"
        dropped[reason] = len(result.faults)
        examples[reason] = few(
            f"{plan.image_ids[row]}: {why}" for row, why in result.faults.items()
        )
    entries = np.diff(plan.offsets)[result.rows]
    notes = {"labels": int(entries.sum()), **tally.notes}
    if entries.any() and not entries.all():
        notes["without a label (not scored)"] = int(np.sum(entries == 0))
    return replace(
        tally, kept=len(result.rows), dropped=dropped, examples=examples, notes=notes
    )


def _nothing_left(tally: Tally) -> str:
    return (
        f"no training image is left ({tally.line()}); at least one must be readable "
        "and have a label: check that pictures are named by the ids of the label file"
    )


def _index_table(plan: shards.Plan, rows: np.ndarray) -> pl.DataFrame:
    table = index.table(
        image_ids=plan.image_ids,
        groups=plan.groups,
        domains=plan.domains,
        slices=plan.slices,
        offsets=plan.offsets,
        label_ids=plan.label_ids,
        confidences=plan.confidences,
        label_sources=plan.label_sources,
    )
    return table[rows] if len(rows) < len(table) else table


def fingerprint(
    drafts: Iterable[Draft], codes: label_files.Codes, short_side: int
) -> str:
    """Returns a hash of all that decides what is written, but for the pixels."""
    digest = hashlib.sha256(f"{_FORMAT} {short_side}".encode())
    vocabulary = codes.vocabulary
    digest.update(json.dumps([vocabulary.codes, vocabulary.descriptions]).encode())
    for draft in drafts:
        plan = draft.plan
        texts = (plan.image_ids, plan.groups, plan.domains, plan.slices, plan.sizes)
        digest.update(json.dumps([plan.split, *texts]).encode())
        for column in (
            plan.offsets,
            plan.label_ids,
            plan.confidences,
            plan.label_sources,
        ):
            digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()
