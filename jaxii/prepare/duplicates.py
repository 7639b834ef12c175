"""Finds identical image files, by a hash of their bytes, between and within splits.

An image in both train and test makes test metrics too high. The same photo encoded
twice is not found.
"""

from collections.abc import Mapping, Sequence

import polars as pl

from jaxii.prepare.tally import Tally

# Splits that lose images to later splits with the same files.
LOSING = ("train", "validation")
IDENTICAL = "identical to a file of {}"
IN_OTHER_GROUPS = "identical files in different groups, now in one"


def leaks(splits: Mapping[str, pl.DataFrame]) -> dict[str, dict[int, tuple[str, str]]]:
    """Finds images of train and validation whose files occur in a later split.

    Args:
      splits: Columns row, image_id and digest (the hash of the file) of the images of
        train, validation, tuning and test, in this order.

    Returns:
      For each split, the reason and the image that stays per row that is left out.
    """
    names = list(splits)
    found: dict[str, dict[int, tuple[str, str]]] = {}
    for i, name in enumerate(names):
        if name in LOSING:
            # The test comes last and so is named for an image in several splits.
            found[name] = {
                row["row"]: (IDENTICAL.format(other), row["other"])
                for other in names[i + 1 :]
                for row in _twins(splits[name], splits[other]).to_dicts()
            }
    return found


def merged_groups(train: pl.DataFrame) -> tuple[list[str], list[str]]:
    """Merges the groups of train that share a file.

    A validation split carved out of train by groups then shares no file with train.

    Args:
      train: Columns image_id, group and digest.

    Returns:
      The group of each image, and "image = image" for each image whose file occurs in
      another group.
    """
    parents = dict[str, str]()
    first = dict[str, tuple[str, str]]()
    twins = []

    def find(group: str) -> str:
        while group in parents:
            group = parents[group]
        return group

    columns = train.select("image_id", "group", "digest")
    for image_id, group, digest in columns.iter_rows():
        first_id, first_group = first.setdefault(digest, (image_id, group))
        if group != first_group:
            twins.append(f"{image_id} = {first_id}")
            one, other = sorted((find(group), find(first_group)))
            if one != other:
                parents[other] = one
    return [find(group) for group in train["group"]], twins


def note(splits: Mapping[str, pl.DataFrame], tallies: Sequence[Tally]) -> list[Tally]:
    """Adds a note on the files that tuning shares with test to the tally of tuning."""
    if not {"tuning", "test"} <= splits.keys():
        return list(tallies)
    pairs = _twins(splits["tuning"], splits["test"])
    shown = [f"{row['image_id']} = {row['other']}" for row in pairs.head(5).to_dicts()]
    what = IDENTICAL.format("test")
    return [
        tally.with_note(what, len(pairs), shown) if tally.name == "tuning" else tally
        for tally in tallies
    ]


def _twins(own: pl.DataFrame, other: pl.DataFrame) -> pl.DataFrame:
    """Returns the rows of `own` with the first image of `other` that has their file."""
    first = other.unique("digest", keep="first", maintain_order=True)
    first = first.select("digest", other="image_id")
    return own.join(first, on="digest", maintain_order="left")
