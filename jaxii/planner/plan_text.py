"""Formats a plan as lines of text."""

from collections.abc import Sequence

from jaxii.planner.compiled import Figures
from jaxii.planner.roofline import Roofline, roofline
from jaxii.planner.topology import GIB, Topology

ASSUMED = (
    "assumed   peak bfloat16 arithmetic overlaps full memory bandwidth; all-reduces "
    "of n bytes follow,",
    "          2 n (d - 1) / d bytes from each of d chips; no input wait. Real runs "
    "are slower.",
)
HEADER = (
    f"{'topology':10} {'chips':>5} {'images/step':>13} {'GiB/chip':>15} "
    f"{'MB/image':>11} {'collectives':>11} {'ms/step':>9} {'images/s':>9} "
    f"{'efficiency':>10}"
)
# Largest number of collective sizes listed per kind.
MOST_SIZES = 4


def report(
    figures: Figures,
    topology: Topology,
    device_batch_size: int,
    run_images: int,
    left_out: Sequence[str] = (),
) -> list[str]:
    """Returns lines on memory, work and time bound of a step on one topology.

    Args:
      figures: Figures of the step on one device.
      topology: The devices.
      device_batch_size: Images per device.
      run_images: Training images in all stages of the run except `left_out`.
      left_out: Names of stages whose number of images is unknown.
    """
    lines = [
        f"memory    {_memory(figures, topology)}",
        f"          arguments {figures.argument_bytes / GIB:.2f}, extra outputs "
        f"{figures.output_bytes / GIB:.2f}, temporaries "
        f"{figures.temporary_bytes / GIB:.2f}, program "
        f"{figures.program_bytes / GIB:.2f}",
        f"work      {figures.flops / device_batch_size / 1e9:.3g} GFLOP and "
        f"{figures.hbm_bytes / device_batch_size / 1e6:.0f} MB of memory traffic per "
        "image",
        *(f"network   {line}" for line in _collectives(figures)),
    ]
    bound = roofline(figures, topology)
    if bound is None:
        kind = topology.device_kind
        return [*lines, f"roofline  none: the peaks of {kind} are unknown"]
    rate = device_batch_size * topology.num_devices / bound.step_seconds
    hours = run_images / rate / 3600
    return [
        *lines,
        f"roofline  {1e3 * bound.step_seconds:.1f} ms per step, {rate:,.0f} images/s, "
        f"{rate / topology.num_devices:,.0f} per chip; bound by {bound.longest}",
        _parts(bound),
        f"the run   {run_images:,} images: {hours:.2f} hours, "
        f"{hours * topology.num_devices:.1f} chip-hours, excluding evaluation",
        *(_left_out(name) for name in left_out),
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


def _memory(figures: Figures, topology: Topology) -> str:
    total = f"{figures.total_bytes / GIB:.2f} GiB per device"
    if topology.hbm_bytes is None:
        return f"{total}; the device's memory is unknown"
    share = figures.total_bytes / topology.hbm_bytes
    return f"{total} of {topology.hbm_bytes / GIB:.2f} ({share:.0%}): fits"


def _left_out(name: str) -> str:
    return (
        f"          without stage {name}: its number of images is unknown; add "
        "--data_dir=DIR"
    )


def _collectives(figures: Figures) -> list[str]:
    lines = []
    for kind in dict.fromkeys(c.kind for c in figures.collectives):
        of_kind = [c for c in figures.collectives if c.kind == kind]
        sizes = sorted((c.num_bytes for c in of_kind), reverse=True)
        listed = ", ".join(f"{size:,}" for size in sizes[:MOST_SIZES])
        listed += ", ..." if len(sizes) > MOST_SIZES else ""
        times = sum(c.times for c in of_kind)
        lines.append(f"{times} {kind} per step: {listed} bytes")
    return lines or ["no collectives"]


def _parts(bound: Roofline) -> str:
    return (
        f"          arithmetic {1e3 * bound.compute_seconds:.1f} ms, memory traffic "
        f"{1e3 * bound.memory_seconds:.1f} ms, collectives "
        f"{1e3 * bound.network_seconds:.2f} ms"
    )
