"""Opens a prepared dataset for training: carves splits and resolves labels."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Int64

from jaxii.data import folder
from jaxii.data.dataset import Split, open_dataset
from jaxii.data.labels import Vocabulary, resolve_rows
from jaxii.errors import InputError
from jaxii.storage import AnyPath

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Resolved labels of a split; image i has entries offsets[i]:offsets[i + 1]."""

    offsets: Int[np.ndarray, " row_plus_1"]
    label_ids: Int[np.ndarray, " entry"]
    confidences: Float[np.ndarray, " entry"]

    def present(
        self,
    ) -> tuple[Int64[np.ndarray, " row_plus_1"], Int[np.ndarray, " kept"]]:
        """Returns offsets and ids of the labels with confidence of at least 0.5."""
        kept = self.confidences >= 0.5
        before = np.concatenate([[0], np.cumsum(kept)])
        return before[self.offsets].astype(np.int64), self.label_ids[kept]

    def class_counts(self, num_classes: int) -> Float[np.ndarray, " class"]:
        """Returns the sum of the confidences of each label over the images."""
        return np.bincount(
            self.label_ids, weights=self.confidences, minlength=num_classes
        ).astype(np.float64)

    def most_labels(self) -> int:
        """Returns the largest number of labels of an image."""
        return int(np.diff(self.offsets).max(initial=0))

    def scored(self) -> Bool[np.ndarray, " row"]:
        """Returns whether each image can be scored: whether it has a label.

        A label may be present or absent. An image without any is not known to show
        nothing, even if a truth file lists it with an empty row.
        """
        return np.diff(self.offsets) > 0

    def of_scored(self) -> "Rows":
        """Returns the rows of the scored images, in order."""
        # Other images have no entry: only offsets change.
        starts = np.append(self.scored(), True)
        return replace(self, offsets=self.offsets[starts])


@dataclass(frozen=True, kw_only=True)
class Data:
    """A prepared dataset, with its validation split carved out of train.

    Attributes:
      directory: Where it was opened.
      vocabulary: The labels.
      slices: Names of the slices that metrics are computed for.
      domains: Domains of the training data, including a held-out one.
      splits: train, validation and, if present, held_out, tuning and test.
      train_rows: Labels of the training split, as used for training.
      content_hash: Hash of all records and labels.
      submission_ids: Ids that a submission lists, in order, including those of missing
        and unreadable images. Empty if the dataset has none.
    """

    directory: AnyPath
    vocabulary: Vocabulary
    slices: tuple[str, ...]
    domains: tuple[str, ...]
    splits: Mapping[str, Split]
    train_rows: Rows
    content_hash: str
    submission_ids: tuple[str, ...]
    # Cached for repeated evaluation; not copied by `replace`.
    _verified: dict[str, Rows] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def choosing_split(self) -> str:
        """The default split for choosing checkpoint and threshold.

        A held-out domain shows the effect of a domain shift, unlike validation.
        """
        return "held_out" if "held_out" in self.splits else "validation"

    def split(self, name: str) -> Split:
        """Returns a split by name.

        Raises:
          InputError: If the split is missing or empty.
        """
        if self.has_images(name):
            return self.splits[name]
        filled = [n for n, s in self.splits.items() if s.num_examples > 0]
        raise InputError(
            f"{self.directory} has no images in split {name!r}; it has "
            f"{', '.join(filled)}."
        )

    def has_images(self, name: str) -> bool:
        """Returns whether a split exists and has images."""
        return name in self.splits and self.splits[name].num_examples > 0

    def has_truth(self, name: str) -> bool:
        """Returns whether a split has an image that can be scored."""
        return self.has_images(name) and bool(self.verified_rows(name).scored().any())

    def check_truth(self, name: str) -> None:
        """Raises InputError if no image of a split has a verified label."""
        count = self.split(name).num_examples
        if not self.has_truth(name):
            raise InputError(
                f"none of the {count} images of split {name!r} of {self.directory} has "
                "a label verified by a person or a box, and machine labels are not "
                "used for evaluation; prepare the data with human labels for it."
            )

    def without_truth(self, name: str) -> int:
        """Returns the number of images of a split that cannot be scored."""
        return int(np.count_nonzero(~self.verified_rows(name).scored()))

    def training_rows(self, name: str) -> Rows:
        """Returns a split's labels as used for training."""
        return self.train_rows if name == "train" else self.verified_rows(name)

    def verified_rows(self, name: str) -> Rows:
        """Returns a split's verified labels, without machine labels.

        They are the truth for evaluation. Results are cached.
        """
        if name not in self._verified:
            self._verified[name] = _resolve(
                self.split(name), machine_labels="ignored", machine_threshold=0.5
            )
        return self._verified[name]


def open_prepared(
    directory: AnyPath,
    *,
    vocabulary: Vocabulary | None = None,
    validation_fraction: float,
    held_out_domain: str = "",
    machine_labels: str,
    machine_threshold: float,
    verify: bool = False,
    on_progress: Progress | None = None,
) -> Data:
    """Opens a prepared dataset.

    Args:
      directory: Written by `prepare`, `new` or TFDS.
      vocabulary: The labels and their order; None takes the dataset's own.
      validation_fraction: Share of the groups of train that become `validation`, unless
        the dataset has a validation split.
      held_out_domain: Domain of train that becomes the split `held_out`; "" for none.
      machine_labels: Their use in training; see `labels.resolve_labels`.
      machine_threshold: See `labels.resolve_labels`.
      verify: Whether to read and hash every byte first.
      on_progress: Called with (done, total, what) while a dataset without an index is
        scanned for the first time, and while bytes are verified.

    Raises:
      InputError: If there is no such dataset or domain, or train or validation is
        empty.
    """
    opened = open_dataset(directory, vocabulary, verify=verify, on_progress=on_progress)
    domains = opened.domains
    if held_out_domain:
        opened = opened.hold_out(held_out_domain)
    splits = opened.splits
    if "validation" not in splits:
        splits = opened.carve(validation_fraction)
    train = _resolve(
        splits["train"],
        machine_labels=machine_labels,
        machine_threshold=machine_threshold,
    )
    data = Data(
        directory=directory,
        vocabulary=opened.vocabulary,
        slices=opened.slices,
        domains=domains,
        splits=splits,
        train_rows=train,
        content_hash=opened.content_hash,
        submission_ids=folder.submission_ids(opened.directory),
    )
    data.split("train")
    data.split("validation")
    return data


def _resolve(split: Split, **choice: Any) -> Rows:
    index = split.index
    offsets, label_ids, confidences = resolve_rows(
        index.offsets, index.label_ids, index.confidences, index.label_sources, **choice
    )
    return Rows(offsets=offsets, label_ids=label_ids, confidences=confidences)
