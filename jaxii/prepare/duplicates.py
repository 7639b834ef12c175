"""Finds identical image files, by a hash of their bytes, between and within splits.

Images in both train and test make test metrics too high. `recurring` finds photos that
were encoded twice.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import polars as pl

from jaxii.prepare.tally import Tally

# Splits that leave out images whose files are also in a later split.
LOSING = ("train", "validation")
IDENTICAL = "identical to a file of {}"
IN_OTHER_GROUPS = "identical files in different groups, now in one"


def leaks(splits: Mapping[str, pl.DataFrame]) -> dict[str, dict[int, tuple[str, str]]]:
    """Finds images of train and validation whose files occur in a later split.

    Args:
      splits: Columns row, image_id and digest (the hash of the file) of the images of
        train, validation, tuning and test, in this order.

    Returns:
      For each split, a map from each row to leave out to the reason and the image that
      stays.
    """
    names = list(splits)
    found: dict[str, dict[int, tuple[str, str]]] = {}
    for i, name in enumerate(names):
        if name in LOSING:
            # Later splits replace earlier ones, so test is named if it has the image.
            found[name] = {
                row["row"]: (IDENTICAL.format(other), row["other"])
                for other in names[i + 1 :]
                for row in _twins(splits[name], splits[other]).to_dicts()
            }
    return found


def same_file(digests: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yields the row of each repeated file, and the first row with that file."""
    first = dict[str, int]()
    for row, digest in enumerate(digests):
        before = first.setdefault(digest, row)
        if before != row:
            yield row, before


def merged_groups(
    train: pl.DataFrame, pairs: Iterable[tuple[int, int]]
) -> tuple[pl.DataFrame, list[str]]:
    """Merges the groups of images of train that are copies.

    A validation split carved out of train by groups then shares no copies with train.

    Args:
      train: Columns image_id and group.
      pairs: Pairs of rows whose images are copies.

    Returns:
      The table with the merged groups, and "image = image" for each pair of different
      groups.
    """
    parents = dict[str, str]()
    image_ids, groups = train["image_id"], train["group"]
    merged = []

    def find(group: str) -> str:
        while group in parents:
            group = parents[group]
        return group

    for row, before in pairs:
        if groups[row] != groups[before]:
            merged.append(f"{image_ids[row]} = {image_ids[before]}")
            one, other = sorted((find(groups[row]), find(groups[before])))
            if one != other:
                parents[other] = one
    found = pl.Series("group", [find(group) for group in groups], pl.String)
    return train.with_columns(found), merged


def note(splits: Mapping[str, pl.DataFrame], tallies: Sequence[Tally]) -> list[Tally]:
    """Adds a note to the tally of tuning on the files that it shares with test."""
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
    """Returns rows of `own` whose files are in `other`, with the first such image."""
    first = other.unique("digest", keep="first", maintain_order=True)
    first = first.select("digest", other="image_id")
    return own.join(first, on="digest", maintain_order="left")
