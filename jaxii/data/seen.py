"""Stores which images influenced a run, to find them in another dataset.

A run keeps two 8-byte hashes of each image, of its id and of its file before it was
reduced, for each part of a result that the image influenced. A copy of an image under
another name is thus found, too. Comparing a million images with ten thousand gives a
false match with probability 2e-9.
"""

import io
import itertools
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from jaxtyping import UInt64

from jaxii.data.index import Index
from jaxii.errors import InputError
from jaxii.storage import AnyPath, write_beside

Hashes = UInt64[np.ndarray, " hash"]


@dataclass(frozen=True)
class SeenImages:
    """Sorted hashes of ids and files by part of a result (`provenance.PARTS`)."""

    by_part: Mapping[str, Hashes]

    def union(self, other: "SeenImages") -> "SeenImages":
        """Returns the images of both."""
        merged = dict(self.by_part)
        for part, hashes in other.by_part.items():
            merged[part] = np.union1d(merged.get(part, hashes), hashes)
        return SeenImages(dict(sorted(merged.items())))

    def count(self, images: Index) -> dict[str, int]:
        """Returns how many images influenced each part, for parts with at least one."""
        return self.count_any(([name] for name in images.image_ids), images.file_hashes)

    def count_any(
        self,
        image_ids: Iterable[Iterable[str]],
        file_hashes: Sequence[int] | UInt64[np.ndarray, " image"] | None,
    ) -> dict[str, int]:
        """Counts like `count` images that may each have any of several ids."""
        each = [[_hash_of(image_id) for image_id in ids] for ids in image_ids]
        hashes = np.fromiter(itertools.chain.from_iterable(each), np.uint64)
        numbers = np.arange(len(each))
        images = np.repeat(numbers, [*map(len, each)])
        if file_hashes is not None:
            hashes = np.append(hashes, np.asarray(file_hashes, np.uint64))
            images = np.append(images, numbers)
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


def hashes_of(images: Iterable[Index], more_ids: Iterable[str] = ()) -> Hashes:
    """Returns the sorted, distinct hashes of images, and of ids of other images."""
    hashes = [np.fromiter(map(_hash_of, more_ids), np.uint64)]
    for index in images:
        hashes.append(np.fromiter(map(_hash_of, index.image_ids), np.uint64))
        if index.file_hashes is not None:
            hashes.append(index.file_hashes)
    return np.unique(np.concatenate(hashes))


def _hash_of(image_id: str) -> int:
    return xxhash.xxh3_64_intdigest(image_id.encode(errors="surrogateescape"))
