"""Manifests: JSON files that list the files of a folder with sizes and XXH3 hashes.

A manifest also holds its own hash. It is not a signature: anyone who can write the
files can also write the manifest.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import xxhash

from jaxii.errors import InputError
from jaxii.storage import AnyPath, sizes_below, write_json

NAME = "manifest.json"
# Files up to this size are hashed at every check: metadata, label files and decoders.
# Hashing shards and weights too would delay each start by minutes.
SMALL_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 20
# xxhash releases the interpreter lock; a network disk serves many reads in parallel.
_THREADS = 8
_SELF = "manifest_xxh3"


@dataclass(frozen=True)
class File:
    """Size in bytes and XXH3 hash (32 hexadecimal digits) of a file."""

    size_bytes: int
    xxh3: str


@dataclass(frozen=True)
class Manifest:
    """Files by name, relative to the folder of the manifest."""

    files: Mapping[str, File]

    def save(self, path: AnyPath) -> None:
        """Writes the manifest atomically."""
        files = {name: asdict(file) for name, file in sorted(self.files.items())}
        content = {"files": files}
        write_json(path, {**content, _SELF: _hash_of(content)})

    @classmethod
    def load(cls, path: AnyPath, *, fix: str) -> "Manifest":
        """Reads a manifest.

        Raises:
          InputError: If the manifest is missing or damaged; the text ends with `fix`.
        """
        try:
            stored = json.loads(path.read_bytes())
            found = stored.pop(_SELF)
            files = {name: File(**entry) for name, entry in stored["files"].items()}
        except FileNotFoundError as error:
            raise InputError(f"{path} is missing; {fix}.") from error
        except OSError as error:
            raise InputError(
                f"{path} cannot be read ({error.strerror or error}); {fix}."
            ) from error
        except (
            KeyError,
            TypeError,
            AttributeError,
            ValueError,
            RecursionError,
        ) as error:
            raise InputError(f"{path} is damaged: not a manifest; {fix}.") from error
        if found != _hash_of(stored):
            raise InputError(f"{path} is damaged: its own hash does not match; {fix}.")
        return cls(files)

    def content_hash(self) -> str:
        """Returns a hexadecimal digest of the names and contents of the files."""
        words = sorted(f"{name} {file.xxh3}" for name, file in self.files.items())
        text = "\0".join(words)
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()

    def check(
        self,
        folder: AnyPath,
        *,
        by: object,
        fix: str,
        names: Iterable[str] | None = None,
        verify: bool = False,
        hashed: Iterable[str] = (),
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Raises an error if files differ from the manifest.

        Sizes are always compared. Hashes are compared for files of at most
        `SMALL_BYTES`, for the files in `hashed`, and with `verify` for all files.

        Args:
          folder: Folder of the files.
          by: The path of the manifest, for the error.
          fix: The fix, for the error.
          names: Files to check; None for all.
          verify: Whether to hash all files.
          hashed: Larger files to hash.
          on_progress: Called with (files hashed, files to hash).

        Raises:
          InputError: If a file is missing or differs; names the file.
        """
        wanted = self.files.keys() if names is None else set(names)
        files = {name: file for name, file in self.files.items() if name in wanted}
        fault, also = _wrong_size(folder, files), set(hashed)
        to_hash = {
            name: file
            for name, file in files.items()
            if verify or file.size_bytes <= SMALL_BYTES or name in also
        }
        if not fault:
            with ThreadPoolExecutor(_THREADS) as pool:
                faults = pool.map(
                    lambda item: _wrong_hash(folder / item[0], item[1]), to_hash.items()
                )
                for done, fault in enumerate(faults, 1):
                    on_progress(done, len(to_hash))
                    if fault:
                        pool.shutdown(wait=False, cancel_futures=True)
                        break
        if fault:
            raise InputError(f"{fault}; it is listed in {by}; {fix}.")


class Digest:
    """Size and hash of a growing file; starts with a file's content, or empty."""

    def __init__(self, path: AnyPath | None = None):
        self._digest, self._size = xxhash.xxh3_128(), 0
        if path is not None:
            self.update(path.read_bytes())

    def update(self, content: bytes) -> None:
        """Adds content that is appended to the file."""
        self._digest.update(content)
        self._size += len(content)

    def file(self) -> File:
        """Returns size and hash so far."""
        return File(self._size, self._digest.hexdigest())


def describe(path: AnyPath, first_bytes: int | None = None) -> File:
    """Returns size and hash of a file, or of its first bytes. Cost: one read."""
    digest, size = xxhash.xxh3_128(), 0
    # The buffer stays in the processor's cache between reading and hashing.
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    opened: Any = path.open("rb")
    with opened as file:
        while True:
            left = _CHUNK_BYTES if first_bytes is None else first_bytes - size
            count = file.readinto(buffer[: min(left, _CHUNK_BYTES)])
            if not count:
                return File(size, digest.hexdigest())
            digest.update(buffer[:count])
            size += count


def describe_all(folder: AnyPath, names: Iterable[str]) -> dict[str, File]:
    """Returns name -> size and hash of files below a folder; reads in parallel."""
    listed = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: describe(folder / name), listed)
        return dict(zip(listed, found, strict=True))


def _wrong_size(folder: AnyPath, files: Mapping[str, File]) -> str:
    present = sizes_below(folder)
    for name, file in files.items():
        if name not in present:
            return f"{folder / name} is missing"
        if present[name] != file.size_bytes:
            return (
                f"{folder / name} is damaged or was replaced: it has "
                f"{present[name]:,} bytes instead of {file.size_bytes:,}"
            )
    return ""


def _wrong_hash(path: AnyPath, file: File) -> str:
    try:
        found = describe(path)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror or error})"
    if found == file:
        return ""
    return f"{path} is damaged or was replaced: its hash does not match"


def _hash_of(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128(text.encode()).hexdigest()
