"""The most memory that this process has held."""

import resource
import sys


def gigabytes() -> float:
    """Returns the peak of the resident memory so far."""
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
