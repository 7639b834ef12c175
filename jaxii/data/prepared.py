"""Opens a prepared dataset with its validation split and resolved labels."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Bool, Float, Int, Int64

from jaxii.console import OnProgress, no_progress
from jaxii.data import folder
from jaxii.data.dataset import Dataset, Split, open_dataset
from jaxii.data.labels import Vocabulary, is_used, resolve_rows
from jaxii.errors import InputError
from jaxii.storage import AnyPath

SPLITS = ("train", "validation", "held_out", "tuning", "test")
# Suffix of the name of a split whose near copies of other splits are left out.
WITHOUT_RECURRING = "_without_recurring"
TUNING_FILES = (
    " To add a tuning split, prepare the data again into a new folder: new takes the "
    "images with tuning in the label file's column split, prepare those in "
    "tuning_labels.csv."
)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Resolved labels of a split; image i has the entries offsets[i]:offsets[i + 1]."""

    offsets: Int[np.ndarray, " row_plus_1"]
    label_ids: Int[np.ndarray, " entry"]
    confidences: Float[np.ndarray, " entry"]

    def present(
        self,
    ) -> tuple[Int64[np.ndarray, " row_plus_1"], Int[np.ndarray, " kept"]]:
        """Returns offsets and ids of the labels with a confidence of at least 0.5."""
        kept = self.confidences >= 0.5
        before = np.concatenate([[0], np.cumsum(kept)])
        return before[self.offsets].astype(np.int64), self.label_ids[kept]

    def multi_hot(
        self, num_classes: int
    ) -> tuple[Bool[np.ndarray, "row class"], Bool[np.ndarray, "row class"]]:
        """Returns whether each image has each label, and whether the label is listed.

        Memory: images x labels x 2 bytes.
        """
        rows = np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))
        has = np.zeros((len(self.offsets) - 1, num_classes), bool)
        listed = has.copy()
        has[rows, self.label_ids] = self.confidences >= 0.5
        listed[rows, self.label_ids] = True
        return has, listed

    def class_counts(self, num_classes: int) -> Float[np.ndarray, " class"]:
        """Returns the sum of each label's confidences."""
        return np.bincount(
            self.label_ids, weights=self.confidences, minlength=num_classes
        ).astype(np.float64)

    def most_labels(self) -> int:
        """Returns the largest number of labels of an image."""
        return int(np.diff(self.offsets).max(initial=0))

    def scored(self) -> Bool[np.ndarray, " row"]:
        """Returns whether each image has a label, present or absent.

        Preparation keeps labels, not rows of label files, so an image whose row has no
        label is not scored.
        """
        return np.diff(self.offsets) > 0

    def of_scored(self) -> "Rows":
        """Returns the rows of the scored images."""
        # The other images have no entries.
        starts = np.append(self.scored(), True)
        return replace(self, offsets=self.offsets[starts])


@dataclass(frozen=True, kw_only=True)
class Data:
    """A prepared dataset with a validation split.

    Attributes:
      domains: Domains of the training data, including a held-out one.
      splits: train, validation and, if they exist, held_out, tuning and test.
      train_rows: Labels of train as training uses them.
      content_hash: See `dataset.Dataset`.
      submission_ids: Ids of a submission, in order, including missing and unreadable
        images; empty if unknown.
      recurring: See `folder.recurring`.
      num_unlabelled: Number of training images that are left out, because they have no
        label that training uses.
    """

    directory: AnyPath
    vocabulary: Vocabulary
    slices: tuple[str, ...]
    domains: tuple[str, ...]
    splits: Mapping[str, Split]
    train_rows: Rows
    content_hash: str
    submission_ids: tuple[str, ...]
    recurring: pl.DataFrame | None = None
    num_unlabelled: int = 0
    # Cache of `verified_rows`; copies with other splits start empty.
    _verified: dict[str, Rows] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def choosing_split(self) -> str:
        """The default split for choosing checkpoint and threshold.

        A held-out domain shows the effect of a domain shift.
        """
        return "held_out" if "held_out" in self.splits else "validation"

    def split(self, name: str) -> Split:
        """Returns a split by name.

        Raises:
          InputError: If it does not exist or is empty.
        """
        if self.has_images(name):
            return self.splits[name]
        filled = [n for n, s in self.splits.items() if s.num_examples > 0]
        raise InputError(
            f"{self.directory} has no images in split {name!r}; splits with images: "
            f"{', '.join(filled)}.{TUNING_FILES if name == 'tuning' else ''}"
        )

    def has_images(self, name: str) -> bool:
        """Returns whether a split exists and is not empty."""
        return name in self.splits and self.splits[name].num_examples > 0

    def has_truth(self, name: str) -> bool:
        """Returns whether a split has an image that can be scored."""
        return self.has_images(name) and bool(self.verified_rows(name).scored().any())

    def is_recurring(self, name: str, among: Iterable[str]) -> Bool[np.ndarray, " row"]:
        """Returns whether each image of a split has a near copy in other splits.

        False for every image if preparation did not search for near copies.

        Args:
          name: Name of the split.
          among: Names of the other splits.
        """
        image_ids = self.split(name).index.image_ids
        others = [
            pl.Series(self.splits[other].index.image_ids, dtype=pl.String)
            for other in among
            if other != name and other in self.splits
        ]
        if self.recurring is None or not others:
            return np.zeros(len(image_ids), bool)
        found = pl.col("other_id").is_in(pl.concat(others).implode())
        found = self.recurring.filter(found)["image_id"]
        return pl.Series(image_ids, dtype=pl.String).is_in(found.implode()).to_numpy()

    def without_recurring(self, name: str, among: Iterable[str]) -> Split | None:
        """Returns a split without near copies of images of other splits.

        Args:
          name: See `is_recurring`.
          among: See `is_recurring`.

        Returns:
          The split `name` + `WITHOUT_RECURRING`; None if no image or every image has a
          near copy, or if preparation did not search for near copies.
        """
        found = self.is_recurring(name, among)
        if found.all() or not found.any():
            return None
        alone = self.split(name).select(np.flatnonzero(~found))
        return replace(alone, name=name + WITHOUT_RECURRING)

    def shares_group(self, name: str, other: str) -> Bool[np.ndarray, " row"]:
        """Returns whether the group of each image of a split is in another split."""
        groups = (self.split(n).index.groups for n in (name, other))
        own, others = (pl.Series(found, dtype=pl.String) for found in groups)
        return own.is_in(others.unique().implode()).to_numpy()

    def check_truth(self, name: str) -> None:
        """Raises an error if a split cannot be scored.

        Raises:
          InputError: If the split has no image with a verified label.
        """
        count = self.split(name).num_examples
        if not self.has_truth(name):
            raise InputError(
                f"none of the {count} images in split {name!r} of {self.directory} has "
                "a human or box label, and evaluation ignores machine labels; prepare "
                "the dataset with human labels for this split."
            )

    def without_truth(self, name: str) -> int:
        """Returns the number of images of a split that are not scored."""
        return int(np.count_nonzero(~self.verified_rows(name).scored()))

    def training_rows(self, name: str) -> Rows:
        """Returns a split's labels as training uses them."""
        return self.train_rows if name == "train" else self.verified_rows(name)

    def verified_rows(self, name: str) -> Rows:
        """Returns a split's labels as evaluation uses them, without machine labels."""
        if name not in self._verified:
            self._verified[name] = _resolve(
                self.split(name), machine_labels="ignored", machine_threshold=0.5
            )
        return self._verified[name]

    def verified_absent(self, name: str) -> bool:
        """Returns whether a split has labels that people verified as absent."""
        return bool(np.any(self.verified_rows(name).confidences < 0.5))


def open_prepared(
    directory: AnyPath,
    *,
    vocabulary: Vocabulary | None = None,
    validation_fraction: float,
    held_out_domain: str = "",
    machine_labels: str,
    machine_threshold: float,
    verify: bool = False,
    on_progress: OnProgress = no_progress,
) -> Data:
    """Opens a prepared dataset.

    Images of train without a label that training uses are left out before validation
    is carved. A verified absence is a label.

    Args:
      directory: See `dataset.open_dataset`.
      vocabulary: The expected labels; None accepts the dataset's.
      validation_fraction: Share of the groups of train for validation, if the dataset
        has no validation split.
      held_out_domain: See `dataset.Dataset.hold_out`; "" for none.
      machine_labels: How training uses machine labels; see `labels.resolve_labels`.
      machine_threshold: See `labels.resolve_labels`.
      verify: Whether to hash every byte.
      on_progress: See `dataset.open_dataset`.

    Raises:
      InputError: If the dataset cannot be opened, the domain does not exist, or train
        or validation is empty, or no image of train has a label that training uses.
    """
    opened = open_dataset(directory, vocabulary, verify=verify, on_progress=on_progress)
    domains = opened.domains
    if held_out_domain:
        opened = opened.hold_out(held_out_domain)
    choice = {"machine_labels": machine_labels, "machine_threshold": machine_threshold}
    labelled = _with_labels(opened, **choice)
    splits = labelled.carve(validation_fraction)
    data = Data(
        directory=directory,
        vocabulary=opened.vocabulary,
        slices=opened.slices,
        domains=domains,
        splits=splits,
        train_rows=_resolve(splits["train"], **choice),
        content_hash=opened.content_hash,
        submission_ids=folder.submission_ids(opened.directory),
        recurring=folder.recurring(opened.directory),
        num_unlabelled=opened.splits["train"].num_examples
        - labelled.splits["train"].num_examples,
    )
    data.split("train")
    data.split("validation")
    return data


def _with_labels(dataset: Dataset, **choice: Any) -> Dataset:
    """Returns the dataset with the images of train that have a label in use."""
    train = dataset.splits["train"]
    used = is_used(train.index.confidences, train.index.label_sources, **choice)
    before = np.concatenate([[0], np.cumsum(used)])
    has_label = np.diff(before[train.index.offsets]) > 0
    if has_label.all():
        return dataset
    if not has_label.any():
        raise InputError(
            f"none of the {train.num_examples} training images of {dataset.directory} "
            f"has a label that training uses (machine_labels="
            f"{choice['machine_labels']!r}); prepare the dataset with human labels, or "
            "train on machine labels (soft or thresholded)"
        )
    rows = np.flatnonzero(has_label)
    return replace(dataset, splits={**dataset.splits, "train": train.select(rows)})


def _resolve(split: Split, **choice: Any) -> Rows:
    index = split.index
    offsets, label_ids, confidences = resolve_rows(
        index.offsets, index.label_ids, index.confidences, index.label_sources, **choice
    )
    return Rows(offsets=offsets, label_ids=label_ids, confidences=confidences)
