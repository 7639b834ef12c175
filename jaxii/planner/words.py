"""A plan as lines for a person.

Comes last in planning: takes figures, computes the roofline, decides nothing.
"""

from jaxii.planner.chips import GIB
from jaxii.planner.compiled import Figures
from jaxii.planner.fit import Largest
from jaxii.planner.roofline import Roofline, roofline
from jaxii.planner.topology import Topology

ASSUMED = (
    "assumed   arithmetic at the chip's bfloat16 peak, traffic at its full bandwidth, "
    "both at once;",
    "          then the collectives: an all-reduce of n bytes over d chips sends "
    "2 n (d - 1) / d from each, on all axes",
    "          of the slice at once; the input is always there. A bound: no run is "
    "faster, most are slower.",
)
HEADER = (
    f"{'topology':10} {'chips':>5} {'images a step':>13} {'GiB a chip':>15} "
    f"{'MB an image':>11} {'collectives':>11} {'ms a step':>9} {'images/s':>9} "
    f"{'efficiency':>10}"
)
# Sizes of collectives that are listed one by one.
MOST_SIZES = 4


def report(
    figures: Figures, topology: Topology, device_batch_size: int, run_images: int
) -> list[str]:
    """Returns what the step takes of one topology.

    Args:
      figures: of one device's step.
      topology: the devices.
      device_batch_size: images a device.
      run_images: images of all stages of the run.
    """
    gflop = figures.flops / device_batch_size / 1e9
    megabytes = figures.hbm_bytes / device_batch_size / 1e6
    accessed = figures.accessed_bytes / device_batch_size / 1e6
    lines = [
        f"memory    {_memory(figures, topology)}",
        f"          arguments {figures.argument_bytes / GIB:.2f}, outputs "
        f"{figures.output_bytes / GIB:.2f} beside them, temporaries "
        f"{figures.temporary_bytes / GIB:.2f}, program "
        f"{figures.program_bytes / GIB:.2f}",
        f"compute   {gflop:.3g} GFLOP an image",
        f"traffic   {megabytes:.0f} MB an image between a device and its memory; "
        f"{accessed:.0f} as the compiler counts, with what stays on the chip",
        *(f"network   {line}" for line in _collectives(figures)),
    ]
    bound = roofline(figures, topology)
    if bound is None:
        kind = topology.device_kind
        return [*lines, f"roofline  none: what {kind} can do at best is not known here"]
    num_images = device_batch_size * topology.num_devices
    rate = num_images / bound.step_seconds
    hours = run_images / rate / 3600
    return [
        *lines,
        f"roofline  {1e3 * bound.step_seconds:.1f} ms a step, {rate:,.0f} images/s, "
        f"{rate / topology.num_devices:,.0f} a chip; most of it {bound.longest}",
        *_parts(bound, topology),
        f"the run   {run_images:,} images in all: {hours:.2f} hours, "
        f"{hours * topology.num_devices:.1f} chip hours, evaluation not counted",
        *ASSUMED,
    ]


def row(figures: Figures | None, topology: Topology, device_batch_size: int) -> str:
    """Returns a topology's line under `HEADER`; no figures: it does not fit."""
    num_images = device_batch_size * topology.num_devices
    start = f"{topology.name:10} {topology.num_devices:5} {num_images:13,} "
    if figures is None:
        return f"{start}{'does not fit':>15}"
    memory = f"{figures.total_bytes / GIB:.2f}"
    if topology.hbm_bytes is not None:
        memory += f" of {topology.hbm_bytes / GIB:.2f}"
    megabytes = figures.hbm_bytes / device_batch_size / 1e6
    start += f"{memory:>15} {megabytes:11.0f} {_count(figures):11} "
    bound = roofline(figures, topology)
    if bound is None:
        return f"{start}{'-':>9} {'-':>9} {'-':>10}"
    rate = num_images / bound.step_seconds
    return (
        f"{start}{1e3 * bound.step_seconds:9.1f} {rate:9,.0f} {bound.efficiency:10.1%}"
    )


def found(largest: Largest) -> list[str]:
    """Returns which batch is the largest that fits, and how it was found."""
    low, high = largest.fitted
    lines = [
        f"largest   {largest.device_batch_size} images a device fit, in "
        f"{largest.total_bytes / GIB:.2f} GiB: compiled; found on the line through "
        f"{low} and {high}"
    ]
    if largest.refused:
        refused = ", ".join(str(size) for size in largest.refused)
        lines.append(f"          compiled and too large: {refused}")
    return lines


def _memory(figures: Figures, topology: Topology) -> str:
    total = f"{figures.total_bytes / GIB:.2f} GiB a device"
    if topology.hbm_bytes is None:
        return f"{total}; how much it has is not known here"
    share = figures.total_bytes / topology.hbm_bytes
    return f"{total} of {topology.hbm_bytes / GIB:.2f} ({share:.0%}): fits"


def _count(figures: Figures) -> int:
    return sum(collective.times for collective in figures.collectives)


def _collectives(figures: Figures) -> list[str]:
    if not figures.collectives:
        return ["no collectives"]
    lines = []
    for kind in dict.fromkeys(c.kind for c in figures.collectives):
        of_kind = [c for c in figures.collectives if c.kind == kind]
        sizes = sorted((c.num_bytes for c in of_kind), reverse=True)
        listed = ", ".join(f"{size:,}" for size in sizes[:MOST_SIZES])
        listed += ", ..." if len(sizes) > MOST_SIZES else ""
        times = sum(c.times for c in of_kind)
        lines.append(f"{times} {kind} a step: {listed} bytes")
    return lines


def _parts(bound: Roofline, topology: Topology) -> list[str]:
    chip, bandwidth = topology.chip, topology.network_bandwidth
    if chip is None or bandwidth is None:
        return []
    return [
        f"          arithmetic {1e3 * bound.compute_seconds:.1f} ms at "
        f"{chip.flops / 1e12:.0f} TFLOP/s, traffic {1e3 * bound.memory_seconds:.1f} ms "
        f"at {chip.hbm_bandwidth / 1e9:,.0f} GB/s, collectives "
        f"{1e3 * bound.network_seconds:.2f} ms at {bandwidth / 1e9:.0f} GB/s a chip"
    ]
