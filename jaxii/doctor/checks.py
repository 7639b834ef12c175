"""Checks of software, devices and disk."""

import platform
import shutil
import sys
import tempfile
from collections import Counter
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

GIB, GB = 2**30, 1e9
# Files present on a machine with an accelerator, and the extra that JAX needs.
DRIVERS = (
    (("/proc/driver/nvidia/version",), "an NVIDIA GPU", "jaxii[cuda]"),
    (("/dev/accel0", "/dev/accel/accel0"), "a TPU", "jaxii[tpu]"),
)
# A few checkpoints of a large network fill a disk with less free space.
LOW_SPACE_BYTES = 2 * GB


@dataclass
class Finding:
    """The result of one check: facts, and problems with their fixes."""

    lines: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


def versions() -> Finding:
    """Returns the versions of Python and the main dependencies."""
    modules = {
        "jax": jax.__version__,
        "jaxlib": jaxlib_version,
        "flax": flax.__version__,
        "optax": optax.__version__,
        "orbax": orbax.checkpoint.__version__,
        "grain": grain.__version__,
        "numpy": np.__version__,
    }
    shown = ", ".join(f"{name} {version}" for name, version in modules.items())
    return Finding([f"versions  Python {platform.python_version()}, {shown}"])


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
            f"{what} is present but JAX runs on the CPU; pip install -U '{extra}', or "
            "unset JAX_PLATFORMS"
            for signs, what, extra in DRIVERS
            if any(Path(sign).exists() for sign in signs)
        ]
    return found


def _memory(device: Any) -> str:
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return f", {limit / GIB:.1f} GiB for programs" if limit else ""


def disk(folder: Path) -> Finding:
    """Checks that the disk of a folder is writable and has space.

    Args:
      folder: Need not exist; its nearest existing parent is checked.
    """
    place = folder.absolute()
    while not place.is_dir():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            free = shutil.disk_usage(place).free
    except OSError as error:
        return Finding(
            broken=[f"{place} cannot be written ({error.strerror}); give --workdir"]
        )
    found = Finding([f"disk      {place}: {free / GB:,.0f} GB free"])
    if free < LOW_SPACE_BYTES:
        found.broken.append(
            f"{place} has {free / GB:.1f} GB free; make room for the checkpoints, or "
            "give another --workdir"
        )
    return found
