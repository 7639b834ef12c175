"""A prepared dataset, opened: splits are made of train and labels are resolved.

Comes after `sources` (what is on disk) and before `pipeline`; the embedded dataset is
drawn and prepared here at its first use.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Int64

from jaxii.data import folder, label_files, open_images, sources, toy_regions
from jaxii.data.labels import Vocabulary, resolve_rows
from jaxii.errors import InputError
from jaxii.files import AnyPath, locked

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
    """

    directory: AnyPath
    vocabulary: Vocabulary
    slices: tuple[str, ...]
    domains: tuple[str, ...]
    splits: Mapping[str, sources.Split]
    train_rows: Rows
    content_hash: str
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

    def split(self, name: str) -> sources.Split:
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
        """Says whether a split is there and labelled, so that it can be scored."""
        return self.has_images(name) and len(self.splits[name].index.label_ids) > 0

    def verified_rows(self, name: str) -> Rows:
        """Returns a split's labels as people verified them, resolved once."""
        if name not in self._verified:
            self._verified[name] = _resolve(
                self.split(name), machine_labels="ignored", machine_threshold=0.5
            )
        return self._verified[name]


def prepare_toy_regions(
    directory: AnyPath, on_progress: Progress | None = None
) -> None:
    """Draws the embedded dataset and prepares it, unless that has been done.

    Raises:
      InputError: the folder holds something else.
    """
    if (directory / folder.INFO_FILE).exists():
        return
    if not isinstance(directory, Path):
        raise InputError(
            f"{directory} is not on this machine, where toy_regions is drawn; give a "
            "local folder"
        )
    # Two runs, or two processes of one, may want it at the same time.
    with locked(directory.parent):
        _prepare_toy_regions(directory, on_progress)


def _prepare_toy_regions(directory: Path, on_progress: Progress | None) -> None:
    if (directory / folder.INFO_FILE).exists():
        return
    # Asked before minutes of drawing, not by `prepare` after them.
    begun = (directory / folder.INPUTS_FILE).exists()
    if directory.is_file() or (
        directory.is_dir() and any(directory.iterdir()) and not begun
    ):
        raise InputError(
            f"{directory} holds something else than toy_regions; give an empty or new "
            "folder to draw it in, or the recipe's preset for the data that is there."
        )
    drawn = directory.parent / f"{directory.name}_files"
    toy_regions.write(drawn, on_progress=on_progress)
    layout = open_images.Layout.find(
        drawn,
        test_labels=drawn / "truth" / "solution.csv",
        test_metadata=drawn / "truth" / "test_meta.csv",
    )
    open_images.prepare(layout, directory, on_progress=on_progress)


def open_prepared(
    directory: AnyPath,
    *,
    labels_file: str = "",
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
      labels_file: CSV with the column label_code: the labels and their order; "" takes
        the dataset's own.
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
    vocabulary = None
    if labels_file:
        vocabulary = label_files.read_codes(Path(labels_file), None).vocabulary
    dataset = sources.open_dataset(
        directory, vocabulary, verify=verify, on_progress=on_progress
    )
    domains = dataset.domains
    if held_out_domain:
        dataset = dataset.hold_out(held_out_domain)
    splits = dataset.splits
    if "validation" not in splits:
        splits = dataset.carve(validation_fraction)
    train = _resolve(
        splits["train"],
        machine_labels=machine_labels,
        machine_threshold=machine_threshold,
    )
    data = Data(
        directory=directory,
        vocabulary=dataset.vocabulary,
        slices=dataset.slices,
        domains=domains,
        splits=splits,
        train_rows=train,
        content_hash=dataset.content_hash,
    )
    data.split("train")
    data.split("validation")
    return data


def _resolve(split: sources.Split, **choice: Any) -> Rows:
    index = split.index
    offsets, label_ids, confidences = resolve_rows(
        index.offsets, index.label_ids, index.confidences, index.label_sources, **choice
    )
    return Rows(offsets=offsets, label_ids=label_ids, confidences=confidences)
