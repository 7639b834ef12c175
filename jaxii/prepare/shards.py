"""Writes the ArrayRecord shards of a split: reads, recodes and serializes images.

Each thread works on one shard (decoding, resizing and encoding release the GIL). A
shard appears under its name only when complete, and a later run skips it.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import polars as pl
import xxhash
from array_record.python.array_record_module import ArrayRecordWriter

from jaxii import manifest
from jaxii.console import OnProgress, no_progress
from jaxii.data import schema
from jaxii.prepare import image_files
from jaxii.prepare.image_files import FileFacts
from jaxii.prepare.near_copies import THUMBNAIL_SHAPE, Thumbnails, thumbnail
from jaxii.prepare.recode import recode_and_decode
from jaxii.prepare.threads import in_threads, num_cores
from jaxii.storage import AnyPath, local_draft, names_in, write_beside, write_json

SHARD_IMAGES = 1024
MAX_SHARDS = 512


@dataclass(frozen=True)
class Plan:
    """The images of a split, in the order of their records.

    Attributes:
      split: Name of the split.
      table: The index of the split; see `index.table`.
      paths: One per image.
      facts: Size and stamp of each file.
    """

    split: str
    table: pl.DataFrame
    paths: Sequence[AnyPath]
    facts: Sequence[FileFacts]

    def __len__(self) -> int:
        return len(self.paths)

    def shards(self) -> list[range]:
        """Returns the rows of each shard: 1,024 images, more in large splits."""
        # Training keeps a file handle per shard open.
        size = max(SHARD_IMAGES, -(-len(self) // MAX_SHARDS))
        rows = range(len(self))
        return [rows[i : i + size] for i in range(0, len(self), size)]

    def part(self, rows: range) -> "Plan":
        """Returns the plan of some rows."""
        span = slice(rows.start, rows.stop)
        return Plan(self.split, self.table[span], self.paths[span], self.facts[span])


@dataclass(frozen=True)
class Account:
    """A written shard.

    Attributes:
      num_records: Number of records in the shard.
      faults: Row (in the split) and fault of each image without a record.
      digests: One per image; see `Written`.
      file: Size and hash of the shard.
    """

    num_records: int
    faults: Sequence[tuple[int, str]]
    digests: Sequence[str]
    file: manifest.File


@dataclass(frozen=True)
class Written:
    """The written shards of a split.

    Attributes:
      rows: Rows of the plan that became records, ascending.
      shard_lengths: Number of records per shard.
      num_bytes: Size of all shards.
      faults: Fault of each image without a record, by its row in the plan.
      files: Size and hash of each shard, by name.
      digests: Hash of the image file of each row; "" if it cannot be read.
      accounts: One per shard.
    """

    rows: np.ndarray
    shard_lengths: list[int]
    num_bytes: int
    faults: dict[int, str]
    files: dict[str, manifest.File]
    digests: list[str]
    accounts: Sequence[Account]


def shard_paths(directory: AnyPath, plan: Plan) -> list[AnyPath]:
    """Returns the paths at which TFDS expects the shards of a plan."""
    number = len(plan.shards())
    name = f"{schema.NAME}-{plan.split}.array_record"
    return [directory / f"{name}-{i:05d}-of-{number:05d}" for i in range(number)]


def account_path(shard: AnyPath) -> AnyPath:
    """Returns the path of a shard's account, kept until the dataset is complete."""
    return shard.with_name(shard.name + ".json")


def thumbnails_path(shard: AnyPath) -> AnyPath:
    """Returns the path of the thumbnails of a shard's images, kept like its account."""
    return shard.with_name(shard.name + ".thumbnails")


def read_thumbnails(shard: AnyPath) -> Thumbnails:
    """Returns the thumbnail of each image of a shard's plan; zeros if unreadable."""
    data = thumbnails_path(shard).read_bytes()
    return np.frombuffer(data, np.uint8).reshape(-1, *THUMBNAIL_SHAPE)


def write(
    directory: AnyPath,
    plan: Plan,
    *,
    short_side: int,
    num_workers: int | None = None,
    on_progress: OnProgress = no_progress,
) -> Written:
    """Writes the missing shards of a split, and returns all its shards.

    Args:
      directory: An existing folder, without shards or with shards of the same plan.
      plan: The images.
      short_side: See `recode.recode`.
      num_workers: Number of threads; by default one per available core, more for images
        in a bucket.
      on_progress: Called from this thread with (images done, images in all, split).
    """
    paths = shard_paths(directory, plan)
    present = names_in(directory)

    def work(path: AnyPath, rows: range, advance: Callable[[int], None]) -> Account:
        if {path.name, account_path(path).name} <= present:
            account = _finished(path, len(rows))
            if account is not None:
                advance(len(rows))
                return account
        return write_shard(
            path,
            plan.part(rows),
            first_row=rows.start,
            short_side=short_side,
            advance=lambda: advance(1),
        )

    jobs = list(zip(paths, plan.shards(), strict=True))
    workers = _num_threads(plan, num_workers)
    accounts = in_threads(work, jobs, workers, on_progress, plan.split)
    return _written(len(plan), paths, accounts)


def _finished(path: AnyPath, num_images: int) -> Account | None:
    """Returns the account of an existing shard; None if it must be written again.

    Size and hash are compared, because a crash of the machine may truncate a file.
    """
    try:
        stored = json.loads(account_path(path).read_text())
        stored["file"] = manifest.File(**stored["file"])
        stored["faults"] = [(row, why) for row, why in stored["faults"]]
        account = Account(**stored)
        whole = account.file == manifest.describe(path)
        return account if whole and len(read_thumbnails(path)) == num_images else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _written(
    num_rows: int, paths: Sequence[AnyPath], parts: Sequence[Account]
) -> Written:
    faults = {row: why for part in parts for row, why in part.faults}
    return Written(
        rows=np.array([row for row in range(num_rows) if row not in faults], np.int64),
        shard_lengths=[part.num_records for part in parts],
        num_bytes=sum(part.file.size_bytes for part in parts),
        faults=faults,
        files={path.name: part.file for path, part in zip(paths, parts, strict=True)},
        digests=[digest for part in parts for digest in part.digests],
        accounts=parts,
    )


def leave_out(
    directory: AnyPath,
    plan: Plan,
    written: Written,
    rows: Mapping[int, str],
    *,
    short_side: int,
    num_workers: int | None = None,
    on_progress: OnProgress = no_progress,
) -> Written:
    """Rewrites shards without some images, and returns all shards of the split.

    Args:
      directory: See `write` for this and the other arguments.
      plan: The images.
      written: All shards of the split. They may lack images that an interrupted
        preparation left out.
      rows: Maps each row to leave out to the reason, which becomes the row's fault.
      short_side: See `recode.recode`.
      num_workers: Number of threads.
      on_progress: Called with (images done, images of the shards to rewrite, "split
        without copies"); not called if no shard is rewritten.
    """
    paths = shard_paths(directory, plan)
    accounts = dict(zip(paths, written.accounts, strict=True))
    # An image without a record has a digest if its file can be read.
    absent = {row for row in written.faults if written.digests[row]}
    changed = absent ^ rows.keys()

    def work(path: AnyPath, span: range, advance: Callable[[int], None]) -> Account:
        return write_shard(
            path,
            plan.part(span),
            first_row=span.start,
            short_side=short_side,
            advance=lambda: advance(1),
            left_out=rows,
        )

    spans = zip(paths, plan.shards(), strict=True)
    jobs = [(path, span) for path, span in spans if not changed.isdisjoint(span)]
    workers, what = _num_threads(plan, num_workers), f"{plan.split} without copies"
    rewritten = in_threads(work, jobs, workers, on_progress, what)
    accounts |= zip((path for path, _ in jobs), rewritten, strict=True)
    return _written(len(plan), paths, list(accounts.values()))


def _num_threads(plan: Plan, num_workers: int | None) -> int:
    # Reading from a bucket is bound by latency.
    is_local = all(isinstance(path, Path) for path in plan.paths[:1])
    return num_workers or num_cores() * (1 if is_local else 8)


def write_shard(
    path: AnyPath,
    part: Plan,
    *,
    first_row: int,
    short_side: int,
    advance: Callable[[], None],
    left_out: Mapping[int, str] = MappingProxyType({}),
) -> Account:
    """Writes one shard, then its thumbnails and its account.

    Args:
      path: The shard.
      part: The plan of the shard's images.
      first_row: Row of the shard's first image in the plan of the split.
      short_side: See `recode.recode`.
      advance: Called after each image; its exceptions stop the work.
      left_out: Rows of the split to write no record for, each with the reason.
    """
    faults: list[tuple[int, str]] = []
    digests: list[str] = []
    thumbnails = np.zeros((len(part), *THUMBNAIL_SHAPE), np.uint8)
    with local_draft(path) as draft:
        # JPEG does not compress further.
        writer = ArrayRecordWriter(os.fspath(draft), "group_size:1,uncompressed")
        try:
            for i, fields in enumerate(part.table.iter_rows(named=True)):
                row, data, digest = first_row + i, b"", ""
                try:
                    source = image_files.read(part.paths[i], part.facts[i].size_bytes)
                    data, pixels = recode_and_decode(source, short_side=short_side)
                    thumbnails[i] = thumbnail(pixels)
                    digest = xxhash.xxh3_128_hexdigest(source)
                    fault = left_out.get(row, "")
                except ValueError as error:
                    fault = str(error)
                if fault:
                    faults.append((row, fault))
                else:
                    fields["slice_name"] = fields.pop("slice")
                    writer.write(schema.serialize(image=data, **fields))
                digests.append(digest)
                advance()
        finally:
            writer.close()
        account = Account(
            num_records=len(part) - len(faults),
            faults=faults,
            digests=digests,
            # Hashed here, while the file is in the page cache.
            file=manifest.describe(draft),
        )
        small = thumbnails.tobytes()
        write_beside(thumbnails_path(path), lambda file: file.write(small), binary=True)
        write_json(account_path(path), asdict(account))
    return account
