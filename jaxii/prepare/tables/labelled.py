"""Combines the rows of each image into its labels, split and group.

Notes name every label and image that is left out, and possible mistakes in the data.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from jaxii.console import OnProgress, no_progress
from jaxii.data.labels import HUMAN, Vocabulary
from jaxii.errors import InputError
from jaxii.prepare import image_files, image_ids
from jaxii.prepare.build import Draft, image_table, no_value
from jaxii.prepare.label_files import METADATA
from jaxii.prepare.shards import Plan
from jaxii.prepare.tables import images
from jaxii.prepare.tables.images import absolute
from jaxii.prepare.tables.known import KnownLabels
from jaxii.prepare.tables.notes import Notes, shown
from jaxii.prepare.tables.rows import LabelRows, clean, of_file, of_folders
from jaxii.prepare.tally import Tally
from jaxii.storage import AnyPath

# Labels with fewer training images are noted as too rare to learn.
FEW_IMAGES = 10
# Codes have no white space or control characters: spaces separate them in submissions.
_UNFIT = re.compile(r"[\s\x00-\x1f\x7f-\x9f]")
NO_VALUES = ("nan", "none", "null", "n/a", "na", "<na>", "-")


@dataclass(frozen=True)
class Labelled:
    """Usable images and their labels.

    Attributes:
      files: Absolute paths of the images.
      ids: Id of each image in reports and predictions.
      labels: All labels, sorted, or those of a trained run in its order.
      codes: Code of each label, without white space.
      entries: For each image, position in `labels` and confidence of each label.
      extra: Values of split, group, domain and slice per image, if given; for none, ""
        or `build.no_value`.
      short_side: Median short side of the images, in pixels.
      file_hashes: See `index.file_hash`; None unless all images were decoded.
      unused: Labels that are left out.
      broken: Labelled images that cannot be read, each with the reason.
      num_unlabelled: Number of other listed images, which have no used label.
    """

    files: Sequence[str]
    ids: Sequence[str]
    labels: Sequence[str]
    codes: Sequence[str]
    entries: Sequence[Mapping[int, float]]
    extra: Mapping[str, Sequence[str]]
    short_side: int
    file_hashes: Sequence[int] | None
    unused: Sequence[str]
    broken: Sequence[str]
    num_unlabelled: int

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(tuple(self.codes), tuple(self.labels))

    def split(self, name: str) -> list[int]:
        """Returns the positions of the images of a split."""
        splits = self.extra.get("split")
        if splits is None:
            return list(range(len(self.files))) if name == "train" else []
        return [i for i, split in enumerate(splits) if split == name]

    def table(self, numbers: Sequence[int], *, is_test: bool) -> pl.DataFrame:
        """Returns the index of images; see `data.index.table`.

        Args:
          numbers: Positions of the images.
          is_test: Whether to list only the present labels, as for tuning and test.
        """
        entries = [
            (row, label, 1.0 if is_test else confidence)
            for row, i in enumerate(numbers)
            for label, confidence in self.entries[i].items()
            if confidence >= 0.5 or not is_test
        ]
        # float64 is exact: row and label numbers are below 2**53.
        rows, labels, confidences = np.array(entries, np.float64).reshape(-1, 3).T
        nothing = [""] * len(self.files)
        metadata = {
            name: [self.extra.get(name, nothing)[i] or None for i in numbers]
            for name in METADATA
        }
        return image_table(
            [self.ids[i] for i in numbers],
            pl.DataFrame(metadata, schema=dict.fromkeys(METADATA, pl.String)),
            rows=rows.astype(np.int64),
            labels=labels.astype(np.int64),
            confidences=confidences,
            sources=np.full(len(rows), HUMAN, np.uint8),
        )

    def drafts(self) -> list[Draft]:
        """Returns drafts of the splits that have images, in the order of `build`."""
        names = ("train", "validation", "tuning", "test")
        return [_draft(self, name) for name in names if self.split(name)]


def read(
    root: Path,
    labels: Path | None,
    notes: Notes,
    *,
    path_column: str = "",
    label_column: str = "",
    label_separator: str = "",
    fold_case: bool = False,
    min_images: int = 1,
    vocabulary: Vocabulary | None = None,
    on_progress: OnProgress = no_progress,
) -> Labelled:
    """Finds the images of a folder and reads their labels.

    Args:
      root: The folder of images, searched recursively.
      labels: The label file. None uses the folders of the images as labels.
      notes: Collects what was found, assumed and left out.
      path_column: See `columns.find`.
      label_column: See `columns.find`.
      label_separator: See `rows.labels_of`.
      fold_case: Whether labels that differ only in case are one label.
      min_images: Labels with fewer training images are left out.
      vocabulary: The labels of a trained run, by code or name; other labels are left
        out, and all images are decoded. None uses the labels of the training images.
      on_progress: Called with (images checked, images in all, what).

    Raises:
      InputError: If the label file cannot be understood, no image can be used, or fewer
        than two labels are left; with a vocabulary, if it has none of the labels.
    """
    known = None
    if vocabulary is not None:
        known = KnownLabels(vocabulary, fold_case=fold_case)
    files = images.find(root, notes)
    if labels is None:
        rows = of_folders(files, root, notes)
    else:
        rows = of_file(
            labels,
            files,
            root,
            notes,
            path_column=path_column,
            label_column=label_column,
            label_separator=label_separator,
            is_known=None if known is None else known.has,
        )
    entries = _entries(rows, _spellings(rows, notes, fold_case, known), notes)
    return _combine(rows, entries, files, root, notes, min_images, known, on_progress)


def _combine(
    rows: LabelRows,
    entries: Mapping[int, Mapping[str, float]],
    files: Sequence[str],
    root: Path,
    notes: Notes,
    min_images: int,
    known: KnownLabels | None,
    on_progress: OnProgress,
) -> Labelled:
    """Checks the images and leaves out rare or unknown labels."""
    below = [os.path.relpath(file, root) for file in files]
    names = _ids(below, notes)
    no_label = sorted(set(rows.numbers) - entries.keys())
    notes.left_out(
        "images",
        [below[i] for i in no_label],
        " without a label; to keep them as negative examples, give them their own "
        "label, such as none",
    )
    checked = images.check(
        [files[i] for i in sorted(entries)], on_progress, decode=known is not None
    )
    used, broken = _readable(checked, sorted(entries), below, notes)
    extra = {kind: _one_each(kind, rows, used, notes) for kind in rows.extra}
    everywhere = {label for i in used for label in entries[i]}
    if known is not None:
        labels, codes = known.vocabulary.descriptions, known.vocabulary.codes
        index = known.index(everywhere, notes)
    else:
        if "split" in extra:
            extra["split"] = [split or "train" for split in extra["split"]]
        splits = extra.get("split") or ["train"] * len(used)
        _check_divided(extra.get("group", []), splits, notes)
        taught = [i for i, split in zip(used, splits, strict=True) if split == "train"]
        labels = _labels(entries, taught, everywhere, notes, min_images)
        codes, index = _codes(labels), {label: i for i, label in enumerate(labels)}
    in_use = [{index[k]: c for k, c in entries[i].items() if k in index} for i in used]
    emptied = [below[i] for i, entry in zip(used, in_use, strict=True) if not entry]
    notes.left_out("images", emptied, " whose labels are all left out")
    kept = [row for row, entry in enumerate(in_use) if entry]
    hashes = checked.file_hashes
    return Labelled(
        files=[absolute(files[used[row]]) for row in kept],
        ids=[names[used[row]] for row in kept],
        labels=labels,
        codes=codes,
        entries=[in_use[row] for row in kept],
        extra={kind: [each[row] for row in kept] for kind, each in extra.items()},
        short_side=int(np.median(checked.short_sides)),
        file_hashes=None if hashes is None else hashes[kept].tolist(),
        unused=sorted(everywhere - index.keys()),
        broken=broken,
        num_unlabelled=len(set(rows.numbers)) - len(kept) - len(broken),
    )


def _spellings(
    rows: LabelRows, notes: Notes, fold_case: bool, known: KnownLabels | None
) -> dict[str, str]:
    """Returns the label of each spelling."""
    counts = Counter(label for labels in rows.labels for label in labels)
    spelling = {written: clean(written) for written in counts}
    _note_changed({w: label for w, label in spelling.items() if label}, "labels", notes)
    by_folded: dict[str, Counter[str]] = defaultdict(Counter)
    for written, label in spelling.items():
        by_folded[label.casefold()][label] += counts[written]
    several = {key: found for key, found in by_folded.items() if len(found) > 1}
    # Labels of the run that differ only in case stay different labels.
    apart = {
        key: found
        for key, found in several.items()
        if not fold_case or (known is not None and known.num_fitting(key) > 1)
    }
    merged = {key: found for key, found in several.items() if key not in apart}
    if merged:
        notes.assumed(
            f"labels that differ only in case are merged: {_counted(merged.values())}"
        )
        usual = {key: c.most_common(1)[0][0] for key, c in merged.items()}
        spelling = {w: usual.get(s.casefold(), s) for w, s in spelling.items()}
    if apart:
        why = ", as in the run" if fold_case else " (--fold_case merges them)"
        notes.check(
            f"{len(apart):,} sets of labels differ only in case and are kept "
            f"separate{why}: {_counted(apart.values())}"
        )
    absent = [label for label in by_folded if label in NO_VALUES]
    if absent:
        notes.check(f"labels that may mean that there is no label: {shown(absent)}")
    return spelling


def _counted(spellings: Iterable[Counter[str]]) -> str:
    return shown(" ".join(f"{k} ({n})" for k, n in c.items()) for c in spellings)


def _entries(
    rows: LabelRows, spelling: Mapping[str, str], notes: Notes
) -> dict[int, dict[str, float]]:
    entries: dict[int, dict[str, float]] = {}
    repeated, contradictions = 0, []
    for number, labels, confidence in zip(
        rows.numbers, rows.labels, rows.confidences, strict=True
    ):
        for written in labels:
            label = spelling[written]
            if not label:
                continue
            before = entries.setdefault(number, {})
            if before.get(label, confidence) != confidence:
                contradictions.append(label)
            elif label in before:
                repeated += 1
            before[label] = max(confidence, before.get(label, 0.0))
    if repeated:
        notes.found(f"{repeated:,} labels are repeated for the same image")
    if contradictions:
        notes.assumed(
            f"if a label of an image has different confidences, the largest is used "
            f"({len(contradictions):,} times): {shown(contradictions)}"
        )
    return entries


def _ids(below: Sequence[str], notes: Notes) -> list[str]:
    ids, paths = image_ids.of_paths(below)
    twins = image_ids.case_twins(ids)
    if twins:
        notes.check(
            f"{len(twins):,} {image_ids.CASE_NOTE} are different images; a file "
            f"system that ignores case cannot hold both: {shown(twins)}"
        )
    if paths:
        stems = Counter(map(image_ids.stem, below))
        twice = [name for name, number in stems.items() if number > 1]
        notes.assumed(f"the image id is the {paths}: {shown(twice)}")
    return ids


def _readable(
    checked: images.Checked, numbers: Sequence[int], below: Sequence[str], notes: Notes
) -> tuple[list[int], list[str]]:
    """Returns the readable images, and the broken ones with their faults."""
    broken = [f"{below[numbers[i]]}: {why}" for i, why in checked.broken.items()]
    notes.left_out(
        "broken images", broken, "" if checked.decoded else ", checked by header only"
    )
    whole = [number for i, number in enumerate(numbers) if i not in checked.broken]
    if not whole:
        raise InputError("no readable image has a label; see the notes above.")
    sides = checked.short_sides
    how = "all decoded" if checked.decoded else "checked by header only"
    notes.found(
        f"{len(sides):,} readable images with labels, {how}; short side "
        f"{sides.min()} to {sides.max()} pixels, median {int(np.median(sides))}"
    )
    return whole, broken


def _check_divided(groups: Sequence[str], splits: Sequence[str], notes: Notes) -> None:
    sides: dict[str, set[str]] = defaultdict(set)
    for group, split in zip(groups, splits, strict=False):
        sides[group].add(split)
    divided = [group for group, found in sides.items() if group and len(found) > 1]
    if divided:
        notes.check(
            f"{len(divided):,} groups have images in more than one split, so metrics "
            f"will be too high: {shown(divided)}"
        )


def _one_each(
    kind: str, rows: LabelRows, used: Sequence[int], notes: Notes
) -> list[str]:
    """Returns the first value of each image; `no_value` or "" for none."""
    spelling = _values(kind, rows.extra[kind], notes)
    first: dict[int, str] = {}
    others = []
    for number, written in zip(rows.numbers, rows.extra[kind], strict=True):
        text = spelling[written]
        if text and first.setdefault(number, text) != text:
            others.append(text)
    if others:
        notes.check(
            f"{len(others):,} rows have a different {kind} from the first row of their "
            f"image; the first is used: {shown(others)}"
        )
    values = [first.get(number, "") for number in used]
    if kind in ("domain", "slice") and any(values) and "" in values:
        notes.assumed(
            f"{values.count(''):,} images without a {kind} get the {kind} "
            f"{no_value(kind)!r}"
        )
        values = [value or no_value(kind) for value in values]
    counts = Counter(values)
    few = ", ".join(f"{value or 'none'} {n:,}" for value, n in counts.most_common(5))
    notes.found(f"{kind}: {len(counts):,} distinct values ({few})")
    return values


def _values(kind: str, texts: Iterable[str], notes: Notes) -> dict[str, str]:
    """Returns the value of each spelling."""
    spelling = {written: clean(written) for written in texts}
    _note_changed(spelling, f"column {kind}", notes)
    twins = image_ids.case_twins(sorted(set(spelling.values())))
    if twins:
        notes.check(
            f"{len(twins):,} values of column {kind} differ only in case and are kept "
            f"separate: {shown(twins)}"
        )
    return spelling


def _note_changed(spelling: Mapping[str, str], where: str, notes: Notes) -> None:
    """Notes the spellings that `clean` changed."""
    changed = [written for written, value in spelling.items() if value != written]
    if changed:
        notes.assumed(
            f"extra spaces and the encoding of accents are ignored in {where}; "
            f"{len(changed):,} spellings were changed: {shown(changed)}"
        )


def _labels(
    entries: Mapping[int, Mapping[str, float]],
    taught: Sequence[int],
    everywhere: Set[str],
    notes: Notes,
    min_images: int,
) -> list[str]:
    if not taught:
        raise InputError(
            "no image in the train split has a label; see the notes above."
        )
    counts = Counter(
        label for i in taught for label, c in entries[i].items() if c >= 0.5
    )
    untaught = sorted(everywhere - counts.keys())
    notes.left_out("labels", untaught, " without a training image")
    rare = sorted(label for label, n in counts.items() if n < min_images)
    notes.left_out("labels", rare, f" with fewer than {min_images} training images")
    labels = sorted(counts.keys() - set(rare))
    if len(labels) < 2:
        raise InputError(
            f"{len(labels)} labels are left ({shown(labels)}); training needs at least "
            "two. If cells are split incorrectly, set --label_separator."
        )
    common = counts.most_common()
    most, middle, least = common[0], common[len(common) // 2], common[len(labels) - 1]
    notes.found(
        f"{len(labels):,} labels, {sum(counts[k] for k in labels) / len(taught):.1f} "
        f"per training image; most frequent {most[0]!r} ({most[1]:,} images), median "
        f"{middle[1]:,} images, least frequent {least[0]!r} ({least[1]:,})"
    )
    tail = [label for label in labels if counts[label] < FEW_IMAGES]
    if tail:
        notes.check(
            f"{len(tail):,} labels have fewer than {FEW_IMAGES} training images, too "
            f"few to learn; --min_images={FEW_IMAGES} leaves them out: {shown(tail)}"
        )
    return labels


def _codes(labels: Sequence[str]) -> list[str]:
    """Returns a distinct code without white space for each label."""
    # A label that is a valid code is its own code.
    codes: dict[str, None] = {}
    taken = {label for label in labels if not _UNFIT.search(label)}
    for label in labels:
        code = plain = _UNFIT.sub("_", label)
        number = 2
        while code in codes or (code in taken and code != label):
            code, number = f"{plain}_{number}", number + 1
        codes[code] = None
    return list(codes)


def _draft(found: Labelled, split: str) -> Draft:
    numbers = sorted(found.split(split), key=lambda i: found.ids[i])
    table = found.table(numbers, is_test=split in ("tuning", "test"))
    paths: list[AnyPath] = [Path(found.files[i]) for i in numbers]
    plan = Plan(split, table, paths, [image_files.facts(path) for path in paths])
    tally = Tally(split, "images", read=len(numbers), kept=len(numbers))
    ids = [found.ids[i] for i in numbers]
    return Draft(plan, tally, submission_ids=ids if split == "test" else ())
