"""What TPU chips can do: the constants of every prediction, and the slices there are.

Comes first in planning. Peaks, bandwidths and sides are those of the pages "TPU v4",
"TPU v5e", "TPU v5p" and "TPU v6e" of https://cloud.google.com/tpu/docs; the memory is
what libtpu's compiler leaves to a program, as it says when one does not fit.
"""

import difflib
from dataclasses import dataclass

from jaxii.errors import InputError

GIB = 2**30
_PLANE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4"),
    *("4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16"),
)


@dataclass(frozen=True, kw_only=True)
class Chip:
    """A kind of chip.

    Attributes:
      name: as topologies are named, "v5e".
      device_kind: as JAX names it.
      flops: bfloat16 operations a second, at most.
      hbm_bytes: memory a program can have.
      hbm_bandwidth: bytes a second between the chip and its memory.
      link_bandwidth: bytes a second that one link to a neighbour carries each way; two
        links an axis.
      slices: the shapes it comes in.
    """

    name: str
    device_kind: str
    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    slices: tuple[str, ...]

    def wraps(self, sides: tuple[int, ...], axis: int) -> bool:
        """Says whether the ends of an axis are neighbours: a ring and not a line."""
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

# Of GPUs, dense, by the start of JAX's name for them: NVIDIA's data sheets of H100,
# H200, A100 and L4. The longer name comes first.
GPU_FLOPS = {
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L4": 121e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Returns the bfloat16 operations a second of a device; None if it is not known.

    Args:
      device_kind: as JAX names it.
    """
    known = {chip.device_kind: chip.flops for chip in CHIPS.values()}
    if device_kind in known:
        return known[device_kind]
    words = device_kind.replace("-", " ") + " "
    names = [name for name in GPU_FLOPS if words.startswith(f"{name} ")]
    return GPU_FLOPS[names[0]] if names else None


def parse(topology: str) -> tuple[Chip, tuple[int, ...]]:
    """Returns the chip and the sides of a topology such as "v5e:4x4".

    Raises:
      InputError: there is no such chip or no such slice of it; the compiler would not
        say so but abort.
    """
    name, _, shape = topology.partition(":")
    every = [f"{chip.name}:{shape}" for chip in CHIPS.values() for shape in chip.slices]
    if topology not in every:
        of_chip = [known for known in every if known.startswith(f"{name}:")]
        near = difflib.get_close_matches(topology, every, n=1)
        raise InputError(
            f"--topology={topology} is not a slice of TPUs; use local or "
            + ", ".join(of_chip or every)
            + (f"; the nearest is {near[0]}." if near else ".")
        )
    return CHIPS[name], tuple(int(side) for side in shape.split("x"))
