"""Runs the benchmarks one after the other and writes one table of all results.

    python -m tests.benchmarks                     # all: hours on two quiet cores
    python -m tests.benchmarks train_step loop     # some
    python -m tests.benchmarks --out=table.md

Each benchmark runs in its own process, beside its peers. Nothing else should run on the
machine: the load before each is printed. Exit code 1 if a bar is not met.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

from tests.benchmarks.table import ROWS_FILE, markdown, read

NAMES = (
    "train_step",
    "predict_step",
    "whole_run",
    "step_profile",
    "input_path",
    "input_memory",
    "loop",
    "accumulators",
    "decoding",
    "label_files",
    "pmi_embedding",
    "prepare",
    "start_up",
    "blocked_by_saves",
    "manifest_cost",
    "compiled_step",
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"any of {', '.join(NAMES)}")
    parser.add_argument("--out", type=Path, help="file for the table, in Markdown")
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(NAMES))
    if unknown:
        parser.error(f"{', '.join(unknown)}: unknown; use {', '.join(NAMES)}")
    failed, loads = [], []
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "rows.jsonl"
        environment = {**os.environ, ROWS_FILE: str(path)}
        for name in args.names or NAMES:
            loads.append(os.getloadavg()[0])
            print(f"== {name}, load {loads[-1]:.2f} before it", flush=True)
            command = [sys.executable, "-m", f"tests.benchmarks.{name}"]
            if subprocess.run(command, env=environment, check=False).returncode:
                failed.append(name)
        rows = read(path)
    facts = (
        f"{os.cpu_count()} cores, Python {platform.python_version()}, jax "
        f"{jax.__version__}; load before each: {', '.join(f'{x:.1f}' for x in loads)}"
    )
    text = f"{markdown(rows)}\n{facts}\n"
    text += f"\nfailed: {', '.join(failed)}\n" * bool(failed)
    print(text)
    if args.out:
        args.out.write_text(text)
    return 0 if rows and not failed and all(row.is_met for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
