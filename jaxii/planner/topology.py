"""The devices that are planned for: a slice that is not there, or those at hand.

Comes after the table of chips and before the compiler.
"""

import os
from dataclasses import dataclass

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxii.distributed.mesh import make_mesh
from jaxii.errors import InputError
from jaxii.planner.chips import CHIPS, Chip, parse

LOCAL = "local"


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: "v5e:4x4" or "local".
      chip: its constants; None where they are not known.
      sides: devices along each axis of the network between them.
      mesh: of the devices.
      hbm_bytes: memory a device has for a program; None where it is not known.
    """

    name: str
    chip: Chip | None
    sides: tuple[int, ...]
    mesh: Mesh
    hbm_bytes: float | None

    @property
    def num_devices(self) -> int:
        """Devices of the mesh."""
        return self.mesh.size

    @property
    def device_kind(self) -> str:
        """The devices' name in JAX."""
        return self.mesh.devices.flat[0].device_kind

    @property
    def network_bandwidth(self) -> float | None:
        """Bytes a second that a chip sends in the best all-reduce there is.

        Every axis carries its share: both ways round a ring; on a line, where the
        chips at the ends have one neighbour, as one link does.
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
    """Returns the devices at hand."""
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
    """Returns a slice of TPUs that need not be there, to compile for.

    Turns this process away from the accelerators it may have.

    Args:
      name: chip and sides, "v5e:16x16".

    Raises:
      InputError: no such slice, or no compiler for it.
    """
    chip, sides = parse(name)
    jax.config.update("jax_platforms", "cpu")
    # What is compiled for absent devices cannot be read back from the cache.
    jax.config.update("jax_enable_compilation_cache", False)
    # No TPU is opened, so that neither the metadata of one nor its lock matters.
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(variable, value)
    # Without it a v4 counts each of its two cores as a device.
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
