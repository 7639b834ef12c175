"""Finds identical image files by a hash of their bytes, between splits and in train.

An image that is in train and in test makes the figures of the test too good. Files are
compared as they were read; the same photo encoded twice is not found.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from jaxii.data.counts import Tally

IN_OTHER_GROUPS = "identical files in different groups"


@dataclass(frozen=True)
class Stored:
    """The images of a split that became records; one entry an image in each field.

    Args:
      image_ids: text.
      groups: see `schema`.
      digests: of the bytes of the files.
    """

    image_ids: Sequence[str]
    groups: Sequence[str]
    digests: Sequence[str]


def note(splits: Mapping[str, Stored], tallies: Sequence[Tally]) -> list[Tally]:
    """Returns the accounts of the splits with what is identical in them.

    An image is counted once for each later split that has its file. Within train,
    images are counted whose file is there in another group too: a validation split that
    is carved out of train by groups may have one of the two.

    Args:
      splits: by name; pairs are counted at the earlier one.
      tallies: one a split.
    """
    table = pl.concat(
        pl.DataFrame(
            {"image": each.image_ids, "group": each.groups, "digest": each.digests},
            schema=dict.fromkeys(("image", "group", "digest"), pl.String),
        ).with_columns(split=pl.lit(name))
        for name, each in splits.items()
    )
    twins = table.filter(pl.col("digest").is_duplicated())
    noted = {tally.name: tally for tally in tallies}
    names = list(splits)
    for i, name in enumerate(names):
        own = twins.filter(pl.col("split") == name)
        for other in names[i + 1 :]:
            pairs = own.join(
                _first(twins.filter(pl.col("split") == other)),
                on="digest",
                maintain_order="left",
            )
            what = f"identical to a file of {other}"
            noted[name] = noted[name].with_note(what, len(pairs), _shown(pairs))
        if name == "train":
            divided = own.filter(pl.col("group").n_unique().over("digest") > 1)
            others = divided.join(
                _first(divided), on="digest", maintain_order="left"
            ).filter(pl.col("image") != pl.col("other"))
            noted[name] = noted[name].with_note(
                IN_OTHER_GROUPS, len(divided), _shown(others)
            )
    return [noted[tally.name] for tally in tallies]


def _first(twins: pl.DataFrame) -> pl.DataFrame:
    first = twins.unique("digest", keep="first", maintain_order=True)
    return first.select("digest", other="image")


def _shown(pairs: pl.DataFrame) -> list[str]:
    return [f"{row['image']} = {row['other']}" for row in pairs.head(5).to_dicts()]
