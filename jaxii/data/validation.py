"""Chooses the images of train that become validation, and divides train into folds."""

import hashlib

import numpy as np
from jaxtyping import Bool, Int, Shaped, UInt64

from jaxii.data.index import Index
from jaxii.data.labels import MACHINE

# Labels in fewer groups may be missing in train or validation.
MIN_GROUPS = 10


def choose(index: Index, fraction: float) -> Bool[np.ndarray, " row"]:
    """Returns which images are validation; groups are never divided.

    A group is in validation if the hash of its name is below the fraction, independent
    of other images. If a side (train or validation) then lacks a label that is verified
    as present in at least ten groups, the group of that label with the hash nearest to
    the fraction moves to that side. Rarer labels come first, and no move takes the last
    group of another such label from a side. The choice depends only on the data.

    Cost: one hash per image; one sort of the labels if a side lacks a label.

    Args:
      index: The images of train.
      fraction: Expected share of the groups, in (0, 1).

    Source: Sechidis, Tsoumakas and Vlahavas 2011, "On the Stratification of Multi-Label
      Data", algorithm 1, with groups and hashes in place of examples and random draws.
    """
    hashes = _hashes(index.groups)
    chosen = hashes < np.uint64(int(fraction * 2**64))
    present = (index.label_sources != MACHINE) & (index.confidences >= 0.5)
    rows = np.repeat(np.arange(len(index)), np.diff(index.offsets))[present]
    labels = index.label_ids[present]
    if chosen.all() or not chosen.any() or not _lacks_a_side(chosen[rows], labels):
        return chosen
    # Positions in `keys` are groups in the order of their hashes.
    keys, groups = np.unique(hashes, return_inverse=True)
    sides = np.zeros(len(keys), bool)
    sides[groups] = chosen
    return _stratify(sides, groups[rows], labels)[groups]


def folds(groups: Shaped[np.ndarray, " row"], number: int) -> Int[np.ndarray, " row"]:
    """Returns the fold of each image, 0 to number - 1; groups are never divided.

    Groups are assigned to folds in turn, in the order of their hashes. So the sizes of
    folds differ by at most one group, and `choose`'s groups are spread evenly.
    """
    _, places = np.unique(_hashes(groups), return_inverse=True)
    return places % number


def _hashes(groups: Shaped[np.ndarray, " row"]) -> UInt64[np.ndarray, " row"]:
    salted = hashlib.blake2b(b"\x00", digest_size=8)

    def digest(group: str) -> int:
        hashed = salted.copy()
        hashed.update(group.encode())
        return int.from_bytes(hashed.digest(), "big")

    return np.fromiter(map(digest, groups), np.uint64, len(groups))


def _lacks_a_side(
    is_validation: Bool[np.ndarray, " entry"], labels: Int[np.ndarray, " entry"]
) -> bool:
    """Returns whether a side lacks a label with at least `MIN_GROUPS` entries."""
    total = np.bincount(labels)
    validation = np.bincount(labels[is_validation], minlength=len(total))
    lacking = (validation == 0) | (validation == total)
    return bool(np.any(lacking & (total >= MIN_GROUPS)))


def _stratify(
    sides: Bool[np.ndarray, " group"],
    groups: Int[np.ndarray, " entry"],
    labels: Int[np.ndarray, " entry"],
) -> Bool[np.ndarray, " group"]:
    """Moves groups so that both sides have every label in at least `MIN_GROUPS` groups.

    Groups are numbered in the order of their hashes; `groups` and `labels` are columns
    of the verified labels.
    """
    num_labels = int(labels.max()) + 1
    pairs = np.unique(groups * num_labels + labels)
    groups, labels = pairs // num_labels, pairs % num_labels
    # A stable sort keeps each label's groups in order.
    by_label = np.argsort(labels, kind="stable")
    num_groups = np.bincount(labels, minlength=num_labels)
    counted = num_groups >= MIN_GROUPS
    counts = np.stack(
        [np.bincount(labels[sides[groups] == side], minlength=num_labels)
         for side in (False, True)]
    )  # fmt: skip
    sides = sides.copy()
    for label in np.argsort(num_groups, kind="stable"):
        for to_validation in (True, False):
            if not counted[label] or counts[int(to_validation), label]:
                continue
            first = np.searchsorted(labels[by_label], label)
            candidates = groups[by_label[first : first + num_groups[label]]]
            for group in candidates if to_validation else candidates[::-1]:
                start, end = np.searchsorted(groups, (group, group + 1))
                own = labels[start:end]
                left = counts[int(not to_validation), own] - 1
                if np.all(left[counted[own]] > 0):
                    sides[group] = to_validation
                    counts[int(to_validation), own] += 1
                    counts[int(not to_validation), own] -= 1
                    break
    return sides
