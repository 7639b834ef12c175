"""Label files and folders of images -> a dataset that TFDS and `sources` read.

`prepare` plans each split (which images, which labels, what is left out and why), has
`shards` write the images, and completes the dataset: indexes, label list, counts and,
last of all, TFDS's `dataset_info.json`, whose presence says that the rest is there. A
run that was interrupted goes on where it was; one with other inputs is refused.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl

from jaxii.data import folder, index, schema
from jaxii.data.folder import Written
from jaxii.data.labels import BOX, HUMAN, MACHINE
from jaxii.errors import InputError
from jaxii.prepare import duplicates, image_ids, label_files, shards
from jaxii.prepare.beam import Beam, write_with_beam
from jaxii.prepare.layout import Images, Layout, read_validation
from jaxii.prepare.tally import Counts, Tally, few
from jaxii.storage import AnyPath, at


@dataclass(frozen=True)
class Draft:
    """A split before its images are read.

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
      short_side: pixels; larger images are reduced to it, at least 16.
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
            *layout.images(),
        )
    made_of = fingerprint(drafts, codes, short_side)
    if folder.begin(output, made_of, short_side, _image_files(drafts)):
        return Counts.load(output / folder.COUNTS_FILE)
    options = {"short_side": short_side, "on_progress": on_progress}
    if beam is not None:
        plans = [draft.plan for draft in drafts]
        write_with_beam(output, plans, beam=beam, **options)
    splits, written = _write(output, drafts, num_workers=num_workers, **options)
    counts = Counts(tuple(tallies), tuple(splits))
    counts.save(output / folder.COUNTS_FILE)
    codes.vocabulary.save(output / folder.LABELS_FILE)
    answered = [image_id for draft in drafts for image_id in draft.submission_ids]
    folder.save_submission_ids(output, answered)
    folder.complete(output, schema.features(codes.vocabulary), written)
    return counts


def _write(
    output: AnyPath,
    drafts: Sequence[Draft],
    *,
    short_side: int,
    num_workers: int | None,
    on_progress: shards.Progress | None,
) -> tuple[list[Tally], dict[str, Written]]:
    """Writes shards that are not there, and indexes; returns what became of splits.

    An image of train or validation whose file a later split has is left out.
    """
    results, stored = {}, {}
    for draft in drafts:
        plan = draft.plan
        results[plan.split] = shards.write(
            output,
            plan,
            short_side=short_side,
            num_workers=num_workers,
            on_progress=on_progress,
        )
        if plan.split == "train":
            _check_left(_account(draft, results["train"], {}))
        stored[plan.split] = _stored(plan, results[plan.split].digests)
    leaks, splits, written = duplicates.leaks(stored), [], {}
    for draft in drafts:
        plan, twins = draft.plan, leaks.get(draft.plan.split, {})
        reasons = {row: f"{t.reason} ({t.image_id})" for row, t in twins.items()}
        result = shards.leave_out(
            output, plan, results[plan.split], reasons, short_side=short_side
        )
        tally, table = _account(draft, result, twins), _index_table(plan, result.rows)
        if plan.split == "train":
            _check_left(tally)
            groups, shown = duplicates.merged_groups(
                _stored(plan, result.digests, result.rows.tolist())
            )
            table = table.with_columns(group=pl.Series(groups, dtype=pl.String))
            tally = tally.with_note(duplicates.IN_OTHER_GROUPS, len(shown), shown)
        splits.append(tally)
        if len(result.rows):
            written[plan.split] = result
            index.save(table, folder.index_path(output, plan.split))
    return duplicates.note(stored, splits), written


def _stored(
    plan: shards.Plan, digests: Sequence[str], rows: Sequence[int] | None = None
) -> duplicates.Stored:
    """Returns some images of a split, or all that can be records."""
    if rows is None:
        rows = [row for row, digest in enumerate(digests) if digest]
    return duplicates.Stored(
        rows=rows,
        image_ids=[plan.image_ids[row] for row in rows],
        groups=[plan.groups[row] for row in rows],
        digests=[digests[row] for row in rows],
    )


def draft_splits(
    layout: Layout,
    codes: label_files.Codes,
    train_image_paths: Images,
    test_image_paths: Images,
) -> tuple[list[Draft], list[Tally]]:
    """Reads the label files, and says which images with which labels make the splits.

    Args:
      layout: the files, local.
      codes: what labels may be.
      train_image_paths: the training images there are.
      test_image_paths: those of tuning and test.

    Returns:
      train and, where there are some, validation, tuning and test; the account of each
      file.

    Raises:
      InputError: a file that cannot be used, or no training image with a label.
    """
    later, later_tallies, listed = _evaluations(layout, codes, test_image_paths)
    drafts, tallies = _train(layout, codes, train_image_paths, listed)
    return [*drafts, *later], [*tallies, *later_tallies]


def _train(
    layout: Layout,
    codes: label_files.Codes,
    images: Images,
    listed: Mapping[str, Sequence[str]],
) -> tuple[list[Draft], list[Tally]]:
    """Drafts train and a listed validation, without the images that others list."""
    ids = pl.Series(images.ids, dtype=pl.String)
    parts, tallies = _train_labels(layout, codes, ids)
    columns = _columns(parts, len(ids))
    labelled = np.flatnonzero(np.diff(columns[0]))
    metadata = _metadata(layout.train_metadata, ids, tallies)
    splits = {"train": np.ones(len(ids), bool)}
    if layout.validation_ids is not None:
        groups = metadata.select(pl.coalesce("group", pl.lit(ids))).to_series()
        splits["validation"], tally = read_validation(
            layout.validation_ids, ids, groups
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
            _check_left(tally)
        plan = _make_plan(split, rows, images, columns, metadata)
        drafts.append(Draft(plan, tally))
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
            raise InputError(
                f"{path} has no label row, only a header; give one row a label of an "
                "image"
            )
        parts.append((entries, source))
        tallies.append(tally)
    return parts, tallies


def _without_listed(
    rows: np.ndarray, ids: pl.Series, listed: Mapping[str, Sequence[str]]
) -> tuple[np.ndarray, dict[str, list[str]]]:
    """Leaves out the rows of images that tuning or test list.

    Args:
      rows: of training images.
      ids: of all training images.
      listed: split -> the images it lists, whether they are there or not.

    Returns:
      The rows that are left; reason -> ids of those that are not.
    """
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
    """Drafts tuning and test; the third is the images that each of them lists."""
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
    return entries, _meant(names, image_ids.find_rows(names, ids).rows, ids)


def _meant(names: pl.Series, rows: pl.Series, ids: pl.Series) -> list[str]:
    """Returns the ids of images that names mean, each once; a name of none stays."""
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
    """Returns the ids of the test, its labels, and the ids that a submission has."""
    # Who is in the test: the submission's rows; without one, the labelled images;
    # without those, every image that is not tuning. A submission answers for all rows
    # of the sample, in their order.
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
        repeated = {"repeated": len(given) - len(names)}
        tally = Tally(
            layout.sample_submission.name, "rows", len(given), len(names), repeated
        )
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
    position = images.by_id()
    rows = np.array(sorted(position[i] for i in names if i in position), np.int64)
    missing = sorted(i for i in names if i not in position)
    columns = _columns([(labels, HUMAN)] if labels else [], len(images.ids))
    reason = "listed but missing"
    tally = Tally(
        split,
        "images",
        read=len(names),
        kept=len(rows),
        dropped={reason: len(missing)},
        examples={reason: few(missing)},
    )
    if split == "test":
        tally = _with_file_notes(tally, images)
    return Draft(_make_plan(split, rows, images, columns, metadata), tally)


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


def _make_plan(
    split: str,
    rows: np.ndarray,
    images: Images,
    columns: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    metadata: pl.DataFrame,
) -> shards.Plan:
    offsets, labels, confidences, sources = columns
    lengths = np.diff(offsets)[rows]
    new_offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(lengths, out=new_offsets[1:])
    chosen = np.repeat(offsets[:-1][rows] - new_offsets[:-1], lengths)
    chosen += np.arange(new_offsets[-1], dtype=np.int64)
    ids = [images.ids[row] for row in rows]
    known = metadata[rows]
    return shards.Plan(
        split=split,
        image_ids=ids,
        paths=[images.paths[row] for row in rows],
        facts=[images.facts[row] for row in rows],
        groups=[group or i for group, i in zip(known["group"], ids, strict=True)],
        domains=[domain or "all" for domain in known["domain"]],
        slices=[name or "all" for name in known["slice"]],
        offsets=new_offsets,
        label_ids=labels[chosen],
        confidences=confidences[chosen],
        label_sources=sources[chosen],
    )


def _metadata(
    path: AnyPath | None, ids: pl.Series, tallies: list[Tally]
) -> pl.DataFrame:
    """Returns group, domain and slice, one row an image; null where not known."""
    if path is None:
        nothing = pl.repeat(None, len(ids), dtype=pl.String, eager=True)
        return pl.DataFrame(dict.fromkeys(label_files.METADATA, nothing))
    table, tally = label_files.read_metadata(path, ids)
    tallies.append(tally)
    return table


def _with_file_notes(tally: Tally, images: Images) -> Tally:
    """Returns the account of a split with what is odd about the names of its files."""
    notes = (
        ("ids with a second file (not read)", images.repeated),
        ("files whose name is not UTF-8 (not read)", images.unnamed),
        (image_ids.CASE_NOTE, image_ids.case_twins(images.ids)),
    )
    for what, found in notes:
        tally = tally.with_note(what, len(found), found)
    return tally


def _account(
    draft: Draft, result: Written, twins: Mapping[int, duplicates.Twin]
) -> Tally:
    plan, tally = draft.plan, draft.tally
    dropped, named = dict(tally.dropped), dict[str, list[str]]()
    for row, why in result.faults.items():
        image_id, twin = plan.image_ids[row], twins.get(row)
        if twin is None:
            named.setdefault("unreadable", []).append(f"{image_id}: {why}")
        else:
            named.setdefault(twin.reason, []).append(f"{image_id} = {twin.image_id}")
    dropped |= {reason: len(images) for reason, images in named.items()}
    examples = {**tally.examples, **{r: few(images) for r, images in named.items()}}
    entries = np.diff(plan.offsets)[result.rows]
    notes = {"labels": int(entries.sum()), **tally.notes}
    if entries.any() and not entries.all():
        notes["without a label (not scored)"] = int(np.sum(entries == 0))
    return replace(
        tally, kept=len(result.rows), dropped=dropped, examples=examples, notes=notes
    )


def _check_left(train: Tally) -> None:
    """Refuses a training split without an image."""
    if not train.kept:
        raise InputError(
            f"no training image is left ({train.line()}); at least one must be "
            "readable and have a label: check that images are named by the ids of the "
            "label file"
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
    digest = hashlib.sha256(f"{folder.FORMAT} {short_side}".encode())
    vocabulary = codes.vocabulary
    digest.update(json.dumps([vocabulary.codes, vocabulary.descriptions]).encode())
    for draft in drafts:
        plan = draft.plan
        texts = (plan.image_ids, plan.groups, plan.domains, plan.slices, plan.facts)
        answered = draft.submission_ids
        digest.update(json.dumps([plan.split, *texts, answered]).encode())
        for column in (
            plan.offsets,
            plan.label_ids,
            plan.confidences,
            plan.label_sources,
        ):
            digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()


def _image_files(drafts: Iterable[Draft]) -> pl.DataFrame:
    """Returns the versions of the image files, as `folder.begin` takes them."""
    return pl.concat(
        pl.DataFrame(
            {
                "image_id": draft.plan.image_ids,
                "size_bytes": [facts.size_bytes for facts in draft.plan.facts],
                "stamp": [facts.stamp for facts in draft.plan.facts],
            },
            schema={"image_id": pl.String, "size_bytes": pl.Int64, "stamp": pl.String},
        ).with_columns(split=pl.lit(draft.plan.split))
        for draft in drafts
    )
