"""Finds identical image files, by a hash of their bytes, between and within splits.

An image in both train and test makes test metrics too high. The same photo encoded
twice is not found.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from jaxii.prepare.tally import Tally

# Splits that lose images to later splits with the same files.
LOSING = ("train", "validation")
IN_OTHER_GROUPS = "identical files in different groups, now in one"


@dataclass(frozen=True)
class Stored:
    """Images of a split that can be records; one entry per image in each field.

    Attributes:
      rows: Rows of the plan of the split.
      image_ids: Ids.
      groups: See `schema`.
      digests: Hashes of the bytes of the files.
    """

    rows: Sequence[int]
    image_ids: Sequence[str]
    groups: Sequence[str]
    digests: Sequence[str]


@dataclass(frozen=True)
class Twin:
    """An image of another split with an identical file."""

    split: str
    image_id: str

    @property
    def reason(self) -> str:
        """The reason under which the image is counted as left out."""
        return f"identical to a file of {self.split}"


def leaks(splits: Mapping[str, Stored]) -> dict[str, dict[int, Twin]]:
    """Finds images of train and validation whose files occur in a later split.

    Args:
      splits: By name, in the order train, validation, tuning, test.

    Returns:
      For each split, the image that stays per row of the plan that is left out.
    """
    table, names = _table(splits), list(splits)
    found: dict[str, dict[int, Twin]] = {}
    for i, name in enumerate(names):
        if name not in LOSING:
            continue
        own = table.filter(pl.col("split") == name)
        found[name] = {}
        # The test comes last and so is named for an image in several splits.
        for other in names[i + 1 :]:
            pairs = own.join(
                _first(table.filter(pl.col("split") == other)), on="digest"
            )
            found[name] |= {
                row["row"]: Twin(other, row["other"]) for row in pairs.to_dicts()
            }
    return found


def merged_groups(train: Stored) -> tuple[list[str], list[str]]:
    """Merges the groups of train that share a file.

    A validation split carved out of train by groups then shares no file with train.

    Returns:
      The group of each image, and "image = image" for each image whose file occurs in
      another group.
    """
    parents = dict[str, str]()
    first = dict[str, int]()
    twins = []

    def find(group: str) -> str:
        while group in parents:
            group = parents[group]
        return group

    for i, (group, digest) in enumerate(zip(train.groups, train.digests, strict=True)):
        j = first.setdefault(digest, i)
        if group != train.groups[j]:
            twins.append(f"{train.image_ids[i]} = {train.image_ids[j]}")
            one, other = sorted((find(group), find(train.groups[j])))
            if one != other:
                parents[other] = one
    return [find(group) for group in train.groups], twins


def note(splits: Mapping[str, Stored], tallies: Sequence[Tally]) -> list[Tally]:
    """Adds a note on the files that tuning shares with test to the tally of tuning.

    Args:
      splits: By name.
      tallies: One per split.
    """
    if not {"tuning", "test"} <= splits.keys():
        return list(tallies)
    table = _table(splits)
    tuning = table.filter(pl.col("split") == "tuning")
    pairs = tuning.join(
        _first(table.filter(pl.col("split") == "test")),
        on="digest",
        maintain_order="left",
    )
    shown = [f"{row['image']} = {row['other']}" for row in pairs.head(5).to_dicts()]
    what = Twin("test", "").reason
    return [
        tally.with_note(what, len(pairs), shown) if tally.name == "tuning" else tally
        for tally in tallies
    ]


def _table(splits: Mapping[str, Stored]) -> pl.DataFrame:
    return pl.concat(
        pl.DataFrame(
            {"row": each.rows, "image": each.image_ids, "digest": each.digests},
            schema={"row": pl.Int64, "image": pl.String, "digest": pl.String},
        ).with_columns(split=pl.lit(name))
        for name, each in splits.items()
    ).filter(pl.col("digest").is_duplicated())


def _first(twins: pl.DataFrame) -> pl.DataFrame:
    first = twins.unique("digest", keep="first", maintain_order=True)
    return first.select("digest", other="image")
