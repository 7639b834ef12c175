"""Times the second start, from the command to the first training step.

    python -m tests.benchmarks.start_up [--runs=5]

`python -m jaxii.main --config configs/f2_multitask.py` runs in its own process, each
time in a new workdir. The clock stops when the loop prints the figures of step 1, which
it does after that step (with one line per step; all else is the default). The dataset
is drawn first if it is missing. The first run finds an empty cache of compiled programs
(XDG_CACHE_HOME is a new folder) and compiles; the other runs use that cache. Their
median is compared with the bar. Takes two minutes at most, including drawing the data.
"""

import argparse
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jaxii.config import Config
from jaxii.runs.assembly import data_root, open_data
from tests.benchmarks.table import Row, emit

ROOT = Path(__file__).parents[2]
CONFIG = "configs/f2_multitask.py"
BAR_SECONDS = 12.0
FIRST_STEP = "step   1/"
# Phases by the line that the command prints at their end.
PHASES = {
    "imports, data": "run       ",
    "parameters": "starting from",
    "step": FIRST_STEP,
}


def start(folder: Path, environment: dict[str, str]) -> dict[str, float]:
    """Returns phase -> seconds until its end, for one run that is then ended.

    Raises:
      RuntimeError: The command ended before its first step; with its output.
    """
    command = [sys.executable, "-u", "-m", "jaxii.main", "--config", CONFIG]
    command += [f"--workdir={folder}", "--config.log_every_steps=1"]
    begun, over, said = time.monotonic(), {}, []
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        for line in process.stdout:
            said.append(line)
            for phase, text in PHASES.items():
                if text in line:
                    over.setdefault(phase, time.monotonic() - begun)
            if FIRST_STEP in line:
                return over
    finally:
        process.kill()
        process.wait()
    raise RuntimeError("no first step:\n" + "".join(said))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5, help="runs after the first")
    args = parser.parse_args()
    environment = {**os.environ, "JAXII_DATA_DIR": str(data_root())}
    # So that the default is measured.
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    # Draws the dataset if it is missing.
    open_data(Config.resolve(runpy.run_path(str(ROOT / CONFIG))["get_config"]()))
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        environment["XDG_CACHE_HOME"] = f"{place}/cache"
        first, *others = (
            start(place / f"run{i}", environment) for i in range(args.runs + 1)
        )
    seconds = sorted(over["step"] for over in others)
    for phase in PHASES:
        print(
            f"{phase} over after {first[phase]:.1f} s the first time, "
            f"{statistics.median(over[phase] for over in others):.1f} s later"
        )
    emit(
        Row(
            what="command to first training step, default configuration, second run",
            ours=f"{statistics.median(seconds):.1f} s ({seconds[0]:.1f} to "
            f"{seconds[-1]:.1f} s; the first run, which compiles: "
            f"{first['step']:.1f} s)",
            peer="",
            figure=statistics.median(seconds),
            relation="<=",
            bar=BAR_SECONDS,
            unit="s",
        )
    )


if __name__ == "__main__":
    main()
