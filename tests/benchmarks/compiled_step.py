"""Compiles the train step and that of Flax's ImageNet example for a TPU slice.

    pip install '.[tpu]'
    python -m tests.benchmarks.compiled_step

No TPU is needed. v5e:4x4, 128 images a chip, 7,178 classes, both by the same libtpu,
about five minutes each on two cores: bytes to and from memory an image, the same as the
compiler counts them (with what stays on the chip), temporaries, all-reduces, and the
roofline. The largest batch a chip, in steps of the search of `plan`, takes far longer:
`python -m jaxii.main plan --topology=v5e:4x4` tells it.
"""

import re
import subprocess
import sys

from tests.benchmarks.table import Row, emit

TOPOLOGY, BATCH = "v5e:4x4", 128
BAR = 0.95
WHERE = (f"--topology={TOPOLOGY}", f"--device_batch_size={BATCH}")
OURS = (
    *("jaxii.main", "plan", "--config=configs/f2_multitask.py:inclusive_images"),
    *("--quick", *WHERE),
)
PEER = ("tests.benchmarks.flax_step", *WHERE)
# Of the lines that both print.
FIGURES = {
    "MB an image to and from memory": r"traffic\s+(\d+) MB",
    "MB an image as the compiler counts": r"memory; (\d+) as the compiler",
    "GiB of temporaries": r"temporaries ([\d.]+)",
    "ms a step at best": r"roofline\s+([\d.]+) ms",
}


def figures(words: tuple[str, ...]) -> dict[str, float]:
    """Compiles, prints what the plan says, and returns its figures."""
    command = [sys.executable, "-m", *words]
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    print(text, flush=True)
    found = {name: re.search(pattern, text) for name, pattern in FIGURES.items()}
    return {name: float(match[1]) for name, match in found.items() if match}


def main() -> None:
    ours, flax = figures(OURS), figures(PEER)
    for name in FIGURES:
        emit(
            Row(
                f"{name}, {TOPOLOGY}, {BATCH} images a chip",
                f"{ours[name]:g}",
                f"Flax's example, {flax[name]:g}",
                ours[name] / flax[name],
                "<=",
                BAR,
            )
        )


if __name__ == "__main__":
    main()
