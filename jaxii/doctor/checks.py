"""Checks of software, devices, disk and compilation cache."""

import os
import platform
import shutil
import sys
import tempfile
import time
import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax
import grain
import jax
import numpy as np
import optax
import orbax.checkpoint
from jaxlib.version import __version__ as jaxlib_version

GIB, GB, MB = 2**30, 1e9, 1e6
# Files present on a machine with an accelerator, and the extra that JAX needs.
DRIVERS = (
    (("/proc/driver/nvidia/version",), "an NVIDIA GPU", "jaxii[cuda]"),
    (("/dev/accel0", "/dev/accel/accel0"), "a TPU", "jaxii[tpu]"),
)
# A few checkpoints of a large network fill a disk with less free space.
LOW_SPACE_BYTES = 2 * GB
WRITTEN_BYTES = 64 * 2**20
# Upper limit on reading cached programs.
CACHE_SECONDS = 3.0


@dataclass
class Finding:
    """The result of one check.

    Attributes:
      lines: Facts.
      broken: Problems, each with its fix.
    """

    lines: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


def versions() -> Finding:
    """Checks the versions of the main dependencies and of JAX's accelerator plugins."""
    modules = {
        "jax": jax.__version__,
        "jaxlib": jaxlib_version,
        "flax": flax.__version__,
        "optax": optax.__version__,
        "orbax": orbax.checkpoint.__version__,
        "grain": grain.__version__,
        "numpy": np.__version__,
    }
    plugins = _plugins()
    shown = ", ".join(f"{name} {version}" for name, version in modules.items())
    found = Finding([f"versions  Python {platform.python_version()}, {shown}"])
    if plugins:
        shown = ", ".join(f"{name} {version}" for name, version in plugins.items())
        found.lines.append(f"plugins   {shown}")
    for name, version in plugins.items():
        # A CUDA plugin is built with jaxlib; libtpu has its own version numbers.
        fits = name == "libtpu" or _release(version) == _release(jaxlib_version)
        if not fits:
            found.broken.append(
                f"{name} {version} does not match jaxlib {jaxlib_version}; pip "
                f"install -U 'jaxii[cuda]'"
            )
    return found


def _plugins() -> dict[str, str]:
    """Returns the versions of the installed accelerator plugins."""
    found = {}
    with suppress(ImportError):
        from jax_cuda13_plugin import (  # pyright: ignore[reportMissingImports]
            version as cuda13,
        )

        found["jax_cuda13_plugin"] = cuda13.__version__
    with suppress(ImportError):
        from jax_cuda12_plugin import (  # pyright: ignore[reportMissingImports]
            version as cuda12,
        )

        found["jax_cuda12_plugin"] = cuda12.__version__
    with suppress(ImportError):
        import libtpu  # pyright: ignore[reportMissingImports]

        found["libtpu"] = getattr(libtpu, "__version__", "of unknown version")
    return found


def _release(version: str) -> str:
    """Returns the leading numbers of a version, the part that JAX compares."""
    return version[: len(version) - len(version.lstrip("0123456789."))].rstrip(".")


def devices() -> Finding:
    """Checks which devices JAX uses, and whether it misses an accelerator."""
    try:
        every = jax.devices()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        return Finding(
            broken=[
                f"JAX finds no device ({reason}); unset JAX_PLATFORMS, or install the "
                "extra for the accelerator (jaxii[cuda], jaxii[tpu])"
            ]
        )
    kinds = Counter(
        (device.platform, device.device_kind, _memory(device)) for device in every
    )
    found = Finding(
        [
            f"devices   {number} x {kind} ({name}{memory})"
            for (name, kind, memory), number in kinds.items()
        ]
    )
    if sys.platform == "linux" and every[0].platform == "cpu":
        found.broken += [
            f"{what} is present but JAX runs on the CPU; pip install '{extra}', or "
            "unset JAX_PLATFORMS"
            for signs, what, extra in DRIVERS
            if any(Path(sign).exists() for sign in signs)
        ]
    return found


def _memory(device: Any) -> str:
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return f", {limit / GIB:.1f} GiB for programs" if limit else ""


def disk(folder: Path) -> Finding:
    """Checks free space and write speed of the disk that holds a folder.

    Args:
      folder: Need not exist; its nearest existing parent is measured.
    """
    place = folder.absolute()
    found = Finding()
    try:
        while not place.is_dir():
            place = place.parent
        free = shutil.disk_usage(place).free
        speed = _write_speed(place, min(WRITTEN_BYTES, free // 4))
    except OSError as error:
        return Finding(
            broken=[f"{place} cannot be written ({error.strerror}); give --workdir"]
        )
    found.lines.append(
        f"disk      {place}: {free / GB:,.0f} GB free, writes {speed / MB:,.0f} MB/s"
    )
    if free < LOW_SPACE_BYTES:
        found.broken.append(
            f"{place} has {free / GB:.1f} GB free; make room for the checkpoints, or "
            "give another --workdir"
        )
    return found


def _write_speed(place: Path, size: int) -> float:
    """Returns bytes per second, including the time to flush to the disk."""
    block = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=place) as file:
        start = time.perf_counter()
        for _ in range(max(1, size >> 20)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return max(1, size >> 20) * len(block) / (time.perf_counter() - start)


def compilation_cache(folder: str) -> Finding:
    """Checks JAX's persistent compilation cache for truncated entries.

    Args:
      folder: Of the cache; "" for no cache.
    """
    if not folder:
        return Finding(
            ["programs  no cache (JAX_COMPILATION_CACHE_DIR): every start recompiles"]
        )
    if "://" in folder or not Path(folder).is_dir():
        return Finding([f"programs  cached in {folder}"])
    entries = sorted(
        (path for path in Path(folder).glob("*-cache") if path.is_file()),
        key=lambda path: path.stat().st_mtime,
        reverse=True,
    )
    size = sum(path.stat().st_size for path in entries)
    end = time.monotonic() + CACHE_SECONDS
    broken, checked = [], 0
    for path in entries:
        if time.monotonic() > end:
            break
        checked += 1
        try:
            if not _is_whole(path.read_bytes()):
                broken.append(
                    f"{path} is truncated: JAX warns and recompiles it at every start; "
                    "delete it"
                )
        except OSError as error:
            broken.append(
                f"{path} cannot be read ({error.strerror}); set "
                "JAX_COMPILATION_CACHE_DIR to a folder of your own"
            )
    part = "" if checked == len(entries) else f", the newest {checked} checked"
    line = f"programs  {folder}: {len(entries)} cached, {size / MB:,.1f} MB{part}"
    return Finding([line], broken)


def _is_whole(data: bytes) -> bool:
    """Returns whether a cache entry is complete; zstd entries are not decompressed.

    JAX compresses with zlib, or with zstd where Python has it (3.14, or the package
    zstandard).
    """
    if data[:4] == b"\x28\xb5\x2f\xfd":
        return True
    decompress = zlib.decompressobj()
    try:
        decompress.decompress(data)
    except zlib.error:
        return False
    return decompress.eof
