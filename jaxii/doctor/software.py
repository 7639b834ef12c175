"""Versions and devices: what JAX sees, and whether it could see more."""

import platform
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import flax
import grain
import jax
import numpy as np
import optax
import orbax.checkpoint
from jaxlib.version import __version__ as jaxlib_version

from jaxii.doctor.finding import Finding

GIB = 2**30
# What a machine has that has such an accelerator, and what JAX needs to use it.
DRIVERS = (
    (("/proc/driver/nvidia/version",), "an NVIDIA GPU", "jaxii[cuda]"),
    (("/dev/accel0", "/dev/accel/accel0"), "a TPU", "jaxii[tpu]"),
)


def versions() -> Finding:
    """Returns the versions of what jaxii stands on, and plugins that do not fit."""
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
        # A CUDA plugin is built with jaxlib; libtpu has versions of its own.
        fits = name == "libtpu" or _release(version) == _release(jaxlib_version)
        if not fits:
            found.broken.append(
                f"{name} {version} does not fit jaxlib {jaxlib_version}; pip "
                f"install -U 'jaxii[cuda]'"
            )
    return found


def _plugins() -> dict[str, str]:
    """Returns the versions of the accelerators' plugins that are installed."""
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
    """Returns the numbers at the start of a version, all that JAX compares."""
    return version[: len(version) - len(version.lstrip("0123456789."))].rstrip(".")


def devices() -> Finding:
    """Returns the devices that JAX uses, and accelerators that it does not."""
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
    if sys.platform == "linux":
        found.broken += _unused(every[0].platform)
    return found


def _memory(device: Any) -> str:
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return f", {limit / GIB:.1f} GiB for programs" if limit else ""


def _unused(used: str) -> list[str]:
    if used != "cpu":
        return []
    return [
        f"{what} is here and JAX computes on the CPU; pip install '{extra}', or unset "
        "JAX_PLATFORMS"
        for signs, what, extra in DRIVERS
        if any(Path(sign).exists() for sign in signs)
    ]
