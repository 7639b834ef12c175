"""The devices to plan for: TPU slices that need not be present, or local devices.

Peaks, bandwidths and shapes are from the pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU
v6e" of https://cloud.google.com/tpu/docs. Memory sizes are those that libtpu's compiler
reports as available to a program.
"""

import difflib
import os
from dataclasses import dataclass

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxii.distributed.mesh import make_mesh
from jaxii.errors import InputError

LOCAL = "local"
GIB = 2**30
_PLANE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4"),
    *("4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16"),
)


@dataclass(frozen=True, kw_only=True)
class Chip:
    """A TPU generation.

    Attributes:
      name: Name in topologies, for example "v5e".
      device_kind: JAX's name for the generation.
      flops: Peak bfloat16 operations per second.
      hbm_bytes: Memory available to a program.
      hbm_bandwidth: Bytes per second between the chip and its memory.
      link_bandwidth: Bytes per second and direction of one link; an axis has two.
      slices: Shapes of the available slices.
    """

    name: str
    device_kind: str
    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    slices: tuple[str, ...]

    def wraps(self, sides: tuple[int, ...], axis: int) -> bool:
        """Returns whether an axis is a ring, whose two ends are neighbors."""
        if len(sides) == 2:
            return sides[axis] == 16
        return all(side % 4 == 0 for side in sides)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            device_kind="TPU v4",
            flops=275e12,
            hbm_bytes=30.75 * GIB,
            hbm_bandwidth=1200e9,
            link_bandwidth=50e9,
            slices=_CUBES,
        ),
        Chip(
            name="v5e",
            device_kind="TPU v5 lite",
            flops=197e12,
            hbm_bytes=15.75 * GIB,
            hbm_bandwidth=819e9,
            link_bandwidth=50e9,
            slices=_PLANE,
        ),
        Chip(
            name="v5p",
            device_kind="TPU v5",
            flops=459e12,
            hbm_bytes=95.73 * GIB,
            hbm_bandwidth=2765e9,
            link_bandwidth=100e9,
            slices=_CUBES,
        ),
        Chip(
            name="v6e",
            device_kind="TPU v6 lite",
            flops=918e12,
            hbm_bytes=31.24 * GIB,
            hbm_bandwidth=1638e9,
            link_bandwidth=100e9,
            slices=_PLANE,
        ),
    )
}

# Dense bfloat16 peaks of GPUs, by the start of JAX's name for them (NVIDIA's data
# sheets of H100, H200, A100 and L4). Longer names come first.
GPU_FLOPS = {
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L4": 121e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Returns peak bfloat16 operations per second of a kind of device, if known.

    The peak of a MIG slice, which is a part of a GPU, is not known.
    """
    known = {chip.device_kind: chip.flops for chip in CHIPS.values()}
    if device_kind in known:
        return known[device_kind]
    words = device_kind.replace("-", " ") + " "
    if " MIG " in words:
        return None
    names = [name for name in GPU_FLOPS if words.startswith(f"{name} ")]
    return GPU_FLOPS[names[0]] if names else None


def parse(topology: str) -> tuple[Chip, tuple[int, ...]]:
    """Returns the chip and the sides of a topology such as "v5e:4x4".

    Raises:
      InputError: If the chip or the slice does not exist. The TPU compiler would abort
        the process without a message.
    """
    name, _, shape = topology.partition(":")
    every = [f"{chip.name}:{shape}" for chip in CHIPS.values() for shape in chip.slices]
    if topology not in every:
        of_chip = [known for known in every if known.startswith(f"{name}:")]
        near = difflib.get_close_matches(topology, every, n=1)
        raise InputError(
            f"--topology={topology} is not a TPU slice; use local or "
            + ", ".join(of_chip or every)
            + (f"; the nearest is {near[0]}." if near else ".")
        )
    return CHIPS[name], tuple(int(side) for side in shape.split("x"))


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: For example "v5e:4x4", or "local".
      chip: The TPU generation; None if it is not in `CHIPS`.
      sides: Number of devices along each axis of the interconnect.
      mesh: The devices.
      hbm_bytes: Memory of a device available to a program; None if unknown.
    """

    name: str
    chip: Chip | None
    sides: tuple[int, ...]
    mesh: Mesh
    hbm_bytes: float | None

    @property
    def num_devices(self) -> int:
        """Number of devices in the mesh."""
        return self.mesh.size

    @property
    def device_kind(self) -> str:
        """JAX's name for the devices."""
        return self.mesh.devices.flat[0].device_kind

    @property
    def network_bandwidth(self) -> float | None:
        """Bytes per second that a chip sends in an optimal all-reduce.

        All axes are used at once. A ring sends in both directions. A line counts as one
        link, because the chips at its ends have one neighbor.
        """
        if self.chip is None:
            return None
        links = sum(
            2 if self.chip.wraps(self.sides, axis) else 1
            for axis, side in enumerate(self.sides)
            if side > 1
        )
        return links * self.chip.link_bandwidth


def local() -> Topology:
    """Returns the local devices."""
    devices = jax.devices()
    kind = devices[0].device_kind
    chip = next((c for c in CHIPS.values() if c.device_kind == kind), None)
    stats = devices[0].memory_stats() or {}
    sides = (len(devices),)
    if chip is not None:
        places = [device.coords for device in devices]
        sides = tuple(len(set(axis)) for axis in zip(*places, strict=True))
        sides = sides[: chip.slices[0].count("x") + 1]
    return Topology(
        name=LOCAL,
        chip=chip,
        sides=sides,
        mesh=make_mesh(devices),
        hbm_bytes=stats.get("bytes_limit"),
    )


def absent(name: str) -> Topology:
    """Returns a TPU slice such as "v5e:16x16" to compile for; no TPU is needed.

    Restricts this process to its CPU and disables the persistent compilation cache.

    Raises:
      InputError: If there is no such slice, or the TPU compiler is not installed.
    """
    chip, sides = parse(name)
    jax.config.update("jax_platforms", "cpu")
    # Programs for absent devices cannot be read back from the cache.
    jax.config.update("jax_enable_compilation_cache", False)
    # libtpu opens no TPU here, so it needs no TPU metadata and no lock.
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(variable, value)
    # Without this option a v4 counts each of its two cores as a device.
    options = {"chip_config_name": "megacore"} if chip.name == "v4" else {}
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=name, **options
        )
    except RuntimeError as error:
        if "not installed" not in str(error):
            raise
        raise InputError(
            f"--topology={name} needs the TPU compiler, which is not installed; "
            "pip install 'jaxii[tpu]' (no TPU is needed), or use --topology=local."
        ) from error
    return Topology(
        name=name,
        chip=chip,
        sides=sides,
        mesh=make_mesh(found.devices),
        hbm_bytes=chip.hbm_bytes,
    )
