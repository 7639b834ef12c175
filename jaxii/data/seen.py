"""Stores which images influenced a run, to find them in another dataset.

A run keeps an 8-byte hash of the id of each image, for each part of a result that the
image influenced. Comparing a million images with ten thousand gives a false match with
probability 5e-10.
"""

import io
import itertools
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from jaxtyping import Int64, UInt64

from jaxii.errors import InputError
from jaxii.storage import AnyPath, write_beside

Hashes = UInt64[np.ndarray, " image"]


@dataclass(frozen=True)
class SeenImages:
    """Sorted hashes of image ids by part of a result (`provenance.PARTS`)."""

    by_part: Mapping[str, Hashes]

    @classmethod
    def of(cls, parts: Iterable[str], image_ids: Iterable[str]) -> "SeenImages":
        """Returns the same images for each part."""
        return cls(dict.fromkeys(parts, hashes_of(image_ids)))

    def union(self, other: "SeenImages") -> "SeenImages":
        """Returns the images of both."""
        merged = dict(self.by_part)
        for part, hashes in other.by_part.items():
            merged[part] = np.union1d(merged.get(part, hashes), hashes)
        return SeenImages(dict(sorted(merged.items())))

    def count(self, image_ids: Iterable[str]) -> dict[str, int]:
        """Returns how many images influenced each part, for parts with at least one."""
        hashes = hashes_of(image_ids)
        return self._count(hashes, np.arange(len(hashes)))

    def count_any(self, image_ids: Iterable[Iterable[str]]) -> dict[str, int]:
        """Counts like `count` images that may each have any of several ids."""
        each = [[_hash_of(image_id) for image_id in ids] for ids in image_ids]
        hashes = np.fromiter(itertools.chain.from_iterable(each), np.uint64)
        return self._count(hashes, np.repeat(np.arange(len(each)), [*map(len, each)]))

    def _count(
        self, hashes: Hashes, images: Int64[np.ndarray, " image"]
    ) -> dict[str, int]:
        """Counts the images, given by number, of which any hash was seen."""
        counts = {
            part: len(np.unique(images[np.isin(hashes, known)]))
            for part, known in self.by_part.items()
        }
        return {part: count for part, count in counts.items() if count}

    def save(self, path: AnyPath) -> None:
        arrays: dict[str, Any] = dict(self.by_part)
        write_beside(path, lambda file: np.savez(file, **arrays), binary=True)

    @classmethod
    def load(cls, path: AnyPath) -> "SeenImages":
        """Reads a file that `save` wrote.

        Raises:
          InputError: If the file is missing or damaged.
        """
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
                return cls({part: arrays[part] for part in arrays.files})
        except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise InputError(
                f"{path} cannot be read ({error}); restore it from a copy, or train "
                "again in another workdir."
            ) from error


def hashes_of(image_ids: Iterable[str]) -> Hashes:
    """Returns the sorted, distinct hashes of image ids."""
    return np.unique(np.fromiter(map(_hash_of, image_ids), np.uint64))


def _hash_of(image_id: str) -> int:
    return xxhash.xxh3_64_intdigest(image_id.encode(errors="surrogateescape"))
