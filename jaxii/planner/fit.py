"""The largest batch that fits a device's memory, from few compiles.

Comes after a step has been compiled at the batch that was asked for.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

# Batches in eights: the tiles of a TPU's memory.
STEP = 8


@dataclass(frozen=True, kw_only=True)
class Largest:
    """The largest batch that was found to fit, and how.

    Attributes:
      device_batch_size: images a device.
      total_bytes: memory that a step of it takes.
      fitted: the two batches through whose memory a line was drawn.
      refused: batches that were compiled and do not fit.
    """

    device_batch_size: int
    total_bytes: float
    fitted: tuple[int, int]
    refused: tuple[int, ...]


def largest_batch(
    total_bytes: Callable[[int], float | None],
    *,
    start: int,
    hbm_bytes: float,
    micro_batches: int = 1,
) -> Largest | None:
    """Returns the largest batch a device that a compile has shown to fit.

    The memory of two batches gives a line; what it predicts is compiled, and, where the
    compiler refuses, an eighth less, and so on. No second line through larger batches:
    close to the limit XLA looks for what to compute twice, for a quarter of an hour.

    Args:
      total_bytes: compiles for so many images a device; memory, None: does not fit.
      start: images a device to begin with, a multiple of `micro_batches`.
      hbm_bytes: memory of a device.
      micro_batches: divides what is tried.

    Returns:
      None where not even one image a micro-batch fits.
    """
    unit = math.lcm(STEP, micro_batches)
    refused, known = [], {}

    def fits(size: int) -> bool:
        if size not in known:
            known[size] = total_bytes(size)
        if known[size] is None:
            refused.append(size)
        return known[size] is not None

    def halved(size: int) -> int:
        return max(size // 2 // micro_batches, 1) * micro_batches

    while not fits(start):
        if start <= micro_batches:
            return None
        start = halved(start)
    low = halved(start)
    if low == start or not fits(low):
        low, start = start, 2 * start
        if not fits(start):
            return _largest(low, known, (low, low), refused)
    slope = (known[start] - known[low]) / (start - low)
    free = hbm_bytes - known[start]
    size = (start + int(free / max(slope, 1.0))) // unit * unit
    while size > start and not fits(size):
        size = size * 7 // 8 // unit * unit
    return _largest(max(size, start), known, (low, start), refused)


def _largest(size, known, fitted, refused) -> Largest:
    return Largest(
        device_batch_size=size,
        total_bytes=known[size],
        fitted=fitted,
        refused=tuple(refused),
    )
