"""Compiles our train step and that of Flax's ImageNet example for a TPU slice.

    pip install '.[tpu]'
    python -m tests.benchmarks.compiled_step [--largest]

No TPU is needed. Both steps are compiled by the same libtpu for v5e:4x4, with 128
images per chip and 7,178 classes, in about five minutes each on two cores. Prints
memory traffic per image, temporaries and the roofline. --largest also searches for the
largest batch per chip of both, as `plan` does: about ten minutes more each.
"""

import argparse
import re
import subprocess
import sys

from tests.benchmarks.table import Row, emit

TOPOLOGY, BATCH = "v5e:4x4", 128
BAR = 0.95
WHERE = (f"--topology={TOPOLOGY}", f"--device_batch_size={BATCH}")
OURS = (
    *("jaxii.main", "plan", "--config=configs/f2_multitask.py:inclusive_images"),
    *WHERE,
)
PEER = ("tests.benchmarks.flax_step", *WHERE)
# Patterns of the lines that both print.
FIGURES = {
    "MB per image to and from memory": r"(\d+) MB of memory traffic",
    "GiB of temporaries": r"temporaries ([\d.]+)",
    "ms per step at best": r"roofline\s+([\d.]+) ms",
}
LARGEST = {"images per chip at most": r"largest\s+(\d+) images"}


def figures(words: tuple[str, ...]) -> dict[str, float]:
    """Compiles, prints what the plan says, and returns its figures."""
    command = [sys.executable, "-m", *words]
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    print(text, flush=True)
    matches = {n: re.search(p, text) for n, p in (FIGURES | LARGEST).items()}
    return {name: float(match[1]) for name, match in matches.items() if match}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--largest", action="store_true")
    largest = parser.parse_args().largest
    ours = figures((*OURS, *(() if largest else ("--quick",))))
    flax = figures((*PEER, *(("--largest",) if largest else ())))
    for name in ours:
        emit(
            Row(
                f"{name}, {TOPOLOGY}"
                + ("" if name in LARGEST else f", {BATCH} images per chip"),
                f"{ours[name]:g}",
                f"Flax's example, {flax[name]:g}",
                ours[name] / flax[name],
                ">=" if name in LARGEST else "<=",
                1.0 if name in LARGEST else BAR,
            )
        )


if __name__ == "__main__":
    main()
