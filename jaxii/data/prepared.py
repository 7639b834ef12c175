"""A prepared dataset, opened: splits are made of train and labels are resolved."""

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
        """Returns offsets and ids of the labels of confidence 0.5 and more."""
        kept = self.confidences >= 0.5
        before = np.concatenate([[0], np.cumsum(kept)])
        return before[self.offsets].astype(np.int64), self.label_ids[kept]

    def class_counts(self, num_classes: int) -> Float[np.ndarray, " class"]:
        """Returns in how many images each label is present, machines' by confidence."""
        return np.bincount(
            self.label_ids, weights=self.confidences, minlength=num_classes
        ).astype(np.float64)

    def most_labels(self) -> int:
        """Returns the number of labels of the image that has most of them."""
        return int(np.diff(self.offsets).max(initial=0))

    def scored(self) -> Bool[np.ndarray, " row"]:
        """Returns whether the truth of each image is known, so that it can be scored.

        It is known where the image has at least one label, present or absent. Of an
        image without any, nobody has said that it shows nothing. An image with an empty
        row in a truth file has none either: preparation keeps labels, not rows.
        """
        return np.diff(self.offsets) > 0

    def of_scored(self) -> "Rows":
        """Returns the rows of the scored images alone, in their order."""
        # The others have no entry, so only the offsets change.
        starts = np.append(self.scored(), True)
        return replace(self, offsets=self.offsets[starts])


@dataclass(frozen=True, kw_only=True)
class Data:
    """A prepared dataset, with its validation split carved out of train.

    Attributes:
      directory: where it lies.
      vocabulary: the labels.
      slices: names of the slices that figures are cut by.
      domains: of the training data, whether held out or not.
      splits: train, validation and, where there are some, held_out, tuning and test.
      train_rows: labels of the training split as they train.
      content_hash: of all records and labels, wherever they lie.
      submission_ids: the ids that a submission answers for, in its order; missing and
        unreadable images are among them. Empty where the dataset does not have them.
    """

    directory: AnyPath
    vocabulary: Vocabulary
    slices: tuple[str, ...]
    domains: tuple[str, ...]
    splits: Mapping[str, Split]
    train_rows: Rows
    content_hash: str
    submission_ids: tuple[str, ...]
    # Every evaluation asks again; of a copy with other splits nothing is kept.
    _verified: dict[str, Rows] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def choosing_split(self) -> str:
        """The split that chooses checkpoint and threshold, unless another is asked for.

        A held-out domain foresees a shift, as a split by group cannot.
        """
        return "held_out" if "held_out" in self.splits else "validation"

    def split(self, name: str) -> Split:
        """Returns a split by name.

        Raises:
          InputError: there is none, or it is empty.
        """
        if self.has_images(name):
            return self.splits[name]
        filled = [n for n, s in self.splits.items() if s.num_examples > 0]
        raise InputError(
            f"{self.directory} has no images in split {name!r}; it has "
            f"{', '.join(filled)}."
        )

    def has_images(self, name: str) -> bool:
        """Says whether a split is there and not empty."""
        return name in self.splits and self.splits[name].num_examples > 0

    def has_truth(self, name: str) -> bool:
        """Says whether a split is there and has an image that can be scored."""
        return self.has_images(name) and bool(self.verified_rows(name).scored().any())

    def check_truth(self, name: str) -> None:
        """Refuses a split that cannot be scored.

        Raises:
          InputError: there is none, or no image of it has a verified label.
        """
        count = self.split(name).num_examples
        if not self.has_truth(name):
            raise InputError(
                f"none of the {count} images of split {name!r} of {self.directory} has "
                "a label verified by a person or a box, and machine labels are not "
                "used for evaluation; prepare the data with human labels for it."
            )

    def without_truth(self, name: str) -> int:
        """Returns the number of images of a split that are not scored."""
        return int(np.count_nonzero(~self.verified_rows(name).scored()))

    def training_rows(self, name: str) -> Rows:
        """Returns a split's labels as a stage trains on them."""
        return self.train_rows if name == "train" else self.verified_rows(name)

    def verified_rows(self, name: str) -> Rows:
        """Returns a split's labels as people verified them, resolved once.

        They are the truth that evaluation uses: machine labels are not among them.
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
      directory: as `prepare` or TFDS left it.
      vocabulary: the labels and their order; None takes the dataset's own.
      validation_fraction: share of the groups of train that become `validation`, where
        the dataset has no such split of its own.
      held_out_domain: domain of train that becomes the split `held_out`; "" for none.
      machine_labels: how the training split uses them; see `labels.resolve_labels`.
      machine_threshold: confidence from which a thresholded machine label is present.
      verify: whether to read and hash every byte first.
      on_progress: called with (done, total, what) while a dataset without an index of
        its own is scanned for the first time, and while bytes are verified.

    Raises:
      InputError: there is no dataset or no such domain, or a split that training needs
        is empty.
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
