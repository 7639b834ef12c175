"""Finds identical image files by a hash of their bytes, between splits and in train.

An image that is in train and in test makes the figures of the test too good. Files are
compared as they were read; the same photo encoded twice is not found.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from jaxii.prepare.tally import Tally

# Splits that lose an image to a later one that has the same file.
LOSING = ("train", "validation")
IN_OTHER_GROUPS = "identical files in different groups, now in one"


@dataclass(frozen=True)
class Stored:
    """The images of a split that can be records; one entry an image in each field.

    Args:
      rows: of the plan of the split.
      image_ids: text.
      groups: see `schema`.
      digests: of the bytes of the files.
    """

    rows: Sequence[int]
    image_ids: Sequence[str]
    groups: Sequence[str]
    digests: Sequence[str]


@dataclass(frozen=True)
class Twin:
    """An image of another split with the same file."""

    split: str
    image_id: str

    @property
    def reason(self) -> str:
        """Why the image is left out, for counting."""
        return f"identical to a file of {self.split}"


def leaks(splits: Mapping[str, Stored]) -> dict[str, dict[int, Twin]]:
    """Returns the images of train and validation whose file a later split has.

    Args:
      splits: by name, in the order train, validation, tuning, test.

    Returns:
      Name of the split -> row of its plan -> the image that stays.
    """
    table, names = _table(splits), list(splits)
    found: dict[str, dict[int, Twin]] = {}
    for i, name in enumerate(names):
        if name not in LOSING:
            continue
        own = table.filter(pl.col("split") == name)
        found[name] = {}
        # The test last, so that it is what is told of an image in several splits.
        for other in names[i + 1 :]:
            pairs = own.join(
                _first(table.filter(pl.col("split") == other)), on="digest"
            )
            found[name] |= {
                row["row"]: Twin(other, row["other"]) for row in pairs.to_dicts()
            }
    return found


def merged_groups(train: Stored) -> tuple[list[str], list[str]]:
    """Returns the groups of train, those that share a file being one.

    A validation split that is carved out of train by groups then has no file that is
    in train too.

    Returns:
      One group an image; and `image = image` for each that had a file of another group.
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
    """Returns the accounts of the splits with the files that tuning shares with test.

    Args:
      splits: by name.
      tallies: one a split.
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
