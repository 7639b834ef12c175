"""A plan as lines of text."""

from jaxii.planner.compiled import Figures, Largest
from jaxii.planner.roofline import Roofline, roofline
from jaxii.planner.topology import GIB, Topology

ASSUMED = (
    "assumed   arithmetic at the chip's bfloat16 peak and memory traffic at its full "
    "bandwidth, overlapping;",
    "          then the collectives: an all-reduce of n bytes over d chips sends "
    "2 n (d - 1) / d from each chip, on all",
    "          axes of the slice at once; input is never waited for. This is a bound: "
    "real runs are slower.",
)
HEADER = (
    f"{'topology':10} {'chips':>5} {'images/step':>13} {'GiB/chip':>15} "
    f"{'MB/image':>11} {'collectives':>11} {'ms/step':>9} {'images/s':>9} "
    f"{'efficiency':>10}"
)
# Collective sizes that are listed one by one.
MOST_SIZES = 4


def report(
    figures: Figures, topology: Topology, device_batch_size: int, run_images: int
) -> list[str]:
    """Returns memory, work and bound of a step on one topology.

    Args:
      figures: Of the step on one device.
      topology: The devices.
      device_batch_size: Images per device.
      run_images: Images of all stages of the run.
    """
    gflop = figures.flops / device_batch_size / 1e9
    megabytes = figures.hbm_bytes / device_batch_size / 1e6
    accessed = figures.accessed_bytes / device_batch_size / 1e6
    lines = [
        f"memory    {_memory(figures, topology)}",
        f"          arguments {figures.argument_bytes / GIB:.2f}, extra outputs "
        f"{figures.output_bytes / GIB:.2f}, temporaries "
        f"{figures.temporary_bytes / GIB:.2f}, program "
        f"{figures.program_bytes / GIB:.2f}",
        f"compute   {gflop:.3g} GFLOP per image",
        f"traffic   {megabytes:.0f} MB per image between a device and its memory "
        f"({accessed:.0f} MB by XLA's count, with transfers within the chip)",
        *(f"network   {line}" for line in _collectives(figures)),
    ]
    bound = roofline(figures, topology)
    if bound is None:
        return [
            *lines,
            f"roofline  none: the peaks of {topology.device_kind} are unknown",
        ]
    rate = device_batch_size * topology.num_devices / bound.step_seconds
    hours = run_images / rate / 3600
    return [
        *lines,
        f"roofline  {1e3 * bound.step_seconds:.1f} ms per step, {rate:,.0f} images/s, "
        f"{rate / topology.num_devices:,.0f} per chip; bound by {bound.longest}",
        *_parts(bound, topology),
        f"the run   {run_images:,} images: {hours:.2f} hours, "
        f"{hours * topology.num_devices:.1f} chip hours, without evaluation",
        *ASSUMED,
    ]


def row(figures: Figures | None, topology: Topology, device_batch_size: int) -> str:
    """Returns a topology's row under `HEADER`; `figures` is None if it does not fit."""
    num_images = device_batch_size * topology.num_devices
    start = f"{topology.name:10} {topology.num_devices:5} {num_images:13,} "
    if figures is None:
        return f"{start}{'does not fit':>15}"
    memory = f"{figures.total_bytes / GIB:.2f}"
    if topology.hbm_bytes is not None:
        memory += f" of {topology.hbm_bytes / GIB:.2f}"
    megabytes = figures.hbm_bytes / device_batch_size / 1e6
    count = sum(collective.times for collective in figures.collectives)
    start += f"{memory:>15} {megabytes:11.0f} {count:11} "
    bound = roofline(figures, topology)
    if bound is None:
        return f"{start}{'-':>9} {'-':>9} {'-':>10}"
    rate = num_images / bound.step_seconds
    return (
        f"{start}{1e3 * bound.step_seconds:9.1f} {rate:9,.0f} {bound.efficiency:10.1%}"
    )


def found(largest: Largest) -> list[str]:
    """Returns the largest batch that fits, and the sizes that do not."""
    lines = [
        f"largest   {largest.device_batch_size} images per device fit, in "
        f"{largest.total_bytes / GIB:.2f} GiB (compiled)"
    ]
    if largest.refused:
        refused = ", ".join(str(size) for size in largest.refused)
        lines.append(f"          compiled and too large: {refused}")
    return lines


def _memory(figures: Figures, topology: Topology) -> str:
    total = f"{figures.total_bytes / GIB:.2f} GiB per device"
    if topology.hbm_bytes is None:
        return f"{total}; the device's memory is unknown"
    share = figures.total_bytes / topology.hbm_bytes
    return f"{total} of {topology.hbm_bytes / GIB:.2f} ({share:.0%}): fits"


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
        lines.append(f"{times} {kind} per step: {listed} bytes")
    return lines


def _parts(bound: Roofline, topology: Topology) -> list[str]:
    chip, bandwidth = topology.chip, topology.network_bandwidth
    if chip is None or bandwidth is None:
        return []
    return [
        f"          arithmetic {1e3 * bound.compute_seconds:.1f} ms at "
        f"{chip.flops / 1e12:.0f} TFLOP/s, memory traffic "
        f"{1e3 * bound.memory_seconds:.1f} ms at {chip.hbm_bandwidth / 1e9:,.0f} GB/s, "
        f"collectives {1e3 * bound.network_seconds:.2f} ms at "
        f"{bandwidth / 1e9:.0f} GB/s per chip"
    ]
