"""A lower bound on the time of a train step, from its figures and a chip's peaks."""

from collections.abc import Iterable
from dataclasses import dataclass

from jaxii.planner.compiled import Figures
from jaxii.planner.hlo import Collective
from jaxii.planner.topology import Topology


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """Lower bounds on the parts of a step, in seconds.

    Source: Williams, Waterman and Patterson 2009, Roofline,
      https://doi.org/10.1145/1498765.1498785
    """

    compute_seconds: float
    memory_seconds: float
    network_seconds: float

    @property
    def step_seconds(self) -> float:
        """Bound on the step: compute and memory overlap; the network follows."""
        return max(self.compute_seconds, self.memory_seconds) + self.network_seconds

    @property
    def longest(self) -> str:
        """The name of the longest part."""
        parts = {
            "arithmetic": self.compute_seconds,
            "memory traffic": self.memory_seconds,
            "collectives": self.network_seconds,
        }
        return max(parts, key=lambda name: parts[name])

    @property
    def efficiency(self) -> float:
        """The share of the step that is not collectives."""
        return 1.0 - self.network_seconds / self.step_seconds


def roofline(figures: Figures, topology: Topology) -> Roofline | None:
    """Returns the bound, or None if the chip's peaks are unknown."""
    chip, bandwidth = topology.chip, topology.network_bandwidth
    if chip is None or bandwidth is None:
        return None
    sent = sent_bytes(figures.collectives, topology.num_devices)
    return Roofline(
        compute_seconds=figures.flops / chip.flops,
        memory_seconds=figures.hbm_bytes / chip.hbm_bandwidth,
        network_seconds=sent / bandwidth if sent else 0.0,
    )


def sent_bytes(collectives: Iterable[Collective], num_devices: int) -> float:
    """Returns the fewest bytes that a device can send for all collectives of a step.

    Source: Patarasuk and Yuan 2009, Bandwidth optimal all-reduce algorithms,
      https://doi.org/10.1016/j.jpdc.2008.09.002
    """
    total = 0.0
    for collective in collectives:
        size = collective.group_size or num_devices
        others = (size - 1) / size
        factor = {
            "all-reduce": 2.0 * others,
            "all-gather": others,
            # The result of a reduce-scatter is one device's share.
            "reduce-scatter": size * others,
            "all-to-all": others,
            "collective-permute": 1.0,
        }[collective.kind]
        total += factor * collective.num_bytes * collective.times
    return total
