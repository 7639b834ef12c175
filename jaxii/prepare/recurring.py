"""Handles near copies of images in other splits or groups.

They are counted, removed from training like identical files, or not searched for.
"""

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import polars as pl
from array_record.python.array_record_data_source import ArrayRecordDataSource

from jaxii.console import OnProgress, no_progress
from jaxii.data import schema
from jaxii.data.folder import Shard
from jaxii.prepare import image_files, near_copies, shards
from jaxii.prepare.duplicates import LOSING
from jaxii.prepare.near_copies import Thumbnails
from jaxii.prepare.recode import recode
from jaxii.prepare.shards import Plan, Written
from jaxii.prepare.tally import NUM_EXAMPLES, Tally
from jaxii.storage import AnyPath

# Count near copies, treat them like identical files, or do not search for them.
CHOICES = KEEP, REMOVE, IGNORE = "keep", "remove", "ignore"
NEAR = "near copies of images of {}"
REMOVED = "near copy of an image of {}"
WITHIN = "near copies of images of other groups or domains"
MERGED = "near copies in different groups, now in one"
COLUMNS = ("split", "image_id", "other_split", "other_id")
_WITHIN = (pl.col("split") == "train") & (pl.col("other_split") == "train")
_ONE_DOMAIN = pl.col("domain") == pl.col("other_domain")


def find(
    directory: AnyPath,
    plans: Sequence[Plan],
    written: Mapping[str, Written],
    stored: Mapping[str, pl.DataFrame],
    *,
    short_side: int,
    num_workers: int | None = None,
    on_progress: OnProgress = no_progress,
) -> pl.DataFrame:
    """Returns the pairs of near copies, each in both directions.

    Images are compared with images of other splits and, within train, of other groups
    or domains, which may be held out.

    Args:
      directory: The folder of the shards. Finished parts of the search are saved there.
      plans: Plans of train, validation, tuning and test, in this order.
      written: The written shards of each split.
      stored: For each split, the images to compare, with the columns row, image_id,
        group and domain.
      short_side: See `recode.recode`.
      num_workers: See `near_copies.find`.
      on_progress: Called with (images or pairs done, in all, what).

    Returns:
      A table with the columns `COLUMNS`, row, domain, other_row and other_domain.
    """
    images = pl.concat(
        pl.DataFrame({"row": np.arange(len(plan), dtype=np.uint32)})
        .join(stored[plan.split], on="row", how="left", maintain_order="left")
        .with_columns(split=pl.lit(plan.split))
        for plan in plans
    )
    blocks = list[Callable[[], Thumbnails]]()
    for plan in plans:
        kept = np.isin(np.arange(len(plan)), stored[plan.split]["row"].to_numpy())
        paths = shards.shard_paths(directory, plan)
        for path, rows in zip(paths, plan.shards(), strict=True):
            among = kept[rows.start : rows.stop]
            blocks.append(functools.partial(_thumbnails, path, among))
    readers = {
        plan.split: _reader(directory, plan, written[plan.split], short_side)
        for plan in plans
    }
    splits, rows = images["split"].to_list(), images["row"].to_list()
    pairs = near_copies.find(
        blocks,
        _kinds(images),
        lambda number: readers[splits[number]](rows[number]),
        folder=directory,
        num_workers=num_workers,
        on_progress=on_progress,
    )
    both = np.concatenate([pairs, pairs[:, ::-1]])
    names = {"split": "other_split", "image_id": "other_id"}
    names |= {"row": "other_row", "domain": "other_domain"}
    one, other = (images[side].select(*names) for side in both.T)
    return pl.concat([one, other.rename(names)], how="horizontal")


def leaks(
    pairs: pl.DataFrame, splits: Sequence[str]
) -> dict[str, dict[int, tuple[str, str]]]:
    """Finds images of train and validation with near copies in later splits.

    Returns:
      For each split, a map from each row to leave out to the reason and the image that
      stays.
    """
    found: dict[str, dict[int, tuple[str, str]]] = {}
    for split, row, other_split, other in pairs.select(
        "split", "row", "other_split", "other_id"
    ).iter_rows():
        if split in LOSING and splits.index(other_split) > splits.index(split):
            found.setdefault(split, {})[row] = REMOVED.format(other_split), other
    return found


def within_train(
    pairs: pl.DataFrame, kept: Mapping[str, pl.DataFrame]
) -> tuple[list[tuple[int, int]], pl.DataFrame]:
    """Returns the pairs within train, to merge their groups, and the pairs to list.

    Pairs of different domains are in both, because holding out a domain divides groups.

    Args:
      pairs: See `find`.
      kept: The images that stay, like `stored` in `find`. Pairs with any other image
        are dropped.

    Returns:
      The pairs within train, as rows of the table of train; and the pairs of images
      that may be in different splits of a run, with the columns of `find`.
    """
    rows = pl.concat(
        table.select(pl.lit(split).alias("split"), "row")
        for split, table in kept.items()
    )
    of_other = rows.rename({"split": "other_split", "row": "other_row"})
    pairs = pairs.join(rows, on=rows.columns, how="semi", maintain_order="left")
    pairs = pairs.join(of_other, on=of_other.columns, how="semi", maintain_order="left")
    within = pairs.filter(_WITHIN & (pl.col("row") > pl.col("other_row")))
    place = kept["train"]["row"].to_numpy()
    found = np.searchsorted(place, within.select("row", "other_row").to_numpy())
    listed = pairs.filter(~(_WITHIN & _ONE_DOMAIN))
    return [(one, other) for one, other in found.tolist()], listed


def note(pairs: pl.DataFrame, tallies: Iterable[Tally]) -> list[Tally]:
    """Adds the number of near copies to the tally of the later split of each pair."""
    noted: dict[str, Tally] = {}
    for tally in tallies:
        own = pairs.filter(pl.col("split") == tally.name)
        for other in [*noted, "train"] if tally.name == "train" else noted:
            found = own.filter(pl.col("other_split") == other)
            found = found.unique("image_id", keep="first", maintain_order=True)
            what = WITHIN if other == tally.name else NEAR.format(other)
            shown = found.select("image_id", "other_id").head(NUM_EXAMPLES).iter_rows()
            examples = [f"{image_id} = {twin}" for image_id, twin in shown]
            tally = tally.with_note(what, len(found), examples)
        noted[tally.name] = tally
    return list(noted.values())


def _kinds(images: pl.DataFrame) -> np.ndarray:
    """Returns a number per image; images with equal numbers are not compared."""
    is_train = pl.col("split") == "train"
    apart = pl.struct(
        "split",
        pl.when(is_train).then("group").alias("group"),
        pl.when(is_train).then("domain").alias("domain"),
    )
    return images.select(apart.rank("dense")).to_series().to_numpy().astype(np.int64)


def _thumbnails(path: AnyPath, among: np.ndarray) -> Thumbnails:
    return np.where(among[:, None, None, None], shards.read_thumbnails(path), 0)


def _reader(
    directory: AnyPath, plan: Plan, written: Written, short_side: int
) -> Callable[[int], bytes]:
    """Returns a function that returns the JPEG bytes of a row of a plan.

    An image that an interrupted preparation left out has no record; its file is recoded
    again, to the same bytes.
    """
    paths = shards.shard_paths(directory, plan)
    sizes = zip(paths, written.shard_lengths, strict=True)
    filled = [Shard(os.fspath(path), 0, size, size) for path, size in sizes if size]
    source = ArrayRecordDataSource(filled) if filled else None

    def encoded(row: int) -> bytes:
        if row in written.faults:
            file = image_files.read(plan.paths[row], plan.facts[row].size_bytes)
            return recode(file, short_side=short_side)
        assert source is not None
        fields = schema.parse(source[int(np.searchsorted(written.rows, row))])
        return fields["image"].bytes_list.value[0]

    return encoded
