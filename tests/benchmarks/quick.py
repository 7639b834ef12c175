"""Compares the main ratios with those of the last release, in three minutes.

    python -m tests.benchmarks.quick              # before every release
    python -m tests.benchmarks.quick --record     # after it: writes quick.json

Each ratio is jaxii's speed over that of a peer, measured in turns in one process, on
two otherwise idle cores; greater is better. Exit code 1 if a ratio has lost 15 % or
more. Ratios also depend on the CPU: the same code reads input at 0.54 of bare decoding
on one CPU and at 0.46 on another. Compare on the recorded CPU, or run both versions.
"""

import argparse
import json
import platform
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

from jaxii.data.transforms import TrainTransform
from jaxii.models.cpu import CPU_INFO
from jaxii.prepare.threads import num_cores
from tests.benchmarks import input_path, predict_step, train_step
from tests.benchmarks.steps import contestants, medians

RECORD = Path(__file__).with_name("quick.json")
MOST_LOST = 0.15
ROUNDS = 5
FILES, IMAGES = 2048, 2048


def ratios() -> Iterator[tuple[str, float]]:
    """Yields what is measured, and jaxii's speed over the peer's."""
    with contestants(train_step.MAKERS, "float32", 32, 64, torch=None) as every:
        seconds = medians(every, ROUNDS, 1)
    yield "train step, ResNet-50, 64 pixels / Flax's example", _ratio(seconds, "flax")
    seconds = predict_step.measure(
        "float32", 8, 224, rounds=ROUNDS, number=1, torch=False
    )
    yield "prediction, ResNet-50, 224 pixels / onnxruntime", _ratio(seconds, "onnx")
    images = input_path.images_of(input_path.SMALL, None)
    with input_path.opened(images, FILES) as (_, source):
        crop = TrainTransform(size_pixels=input_path.SIZE).crop
        jobs = input_path.decodes(source, 512)
        found = [
            input_path.jaxii(source, IMAGES, crop) / input_path.bare(jobs, IMAGES)
            for _ in range(ROUNDS)
        ]
    yield "input path, 224 pixels / bare decoding", statistics.median(found)


def cpu() -> str:
    """Returns the number and the name of this machine's cores."""
    text = CPU_INFO.read_text() if CPU_INFO.exists() else ""
    found = re.search(r"model name\s*: (.*)", text)
    name = found[1] if found else platform.processor()
    return f"{num_cores()} x {name}"


def _ratio(seconds: dict[str, float], peer: str) -> float:
    return seconds[peer] / seconds["jaxii"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", action="store_true", help="write quick.json")
    args = parser.parse_args()
    release = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    recorded, here = release.get("ratios", {}), {"jax": jax.__version__, "cpu": cpu()}
    for what, value in here.items():
        if recorded and release.get(what) != value:
            print(f"{what}: {value}, but the last release has {release.get(what)}")
    measured, lost = {}, []
    for name, ratio in ratios():
        measured[name] = round(ratio, 3)
        before = recorded.get(name)
        print(f"{name}: {ratio:.2f} (last release {before})", flush=True)
        if before is not None and ratio < (1 - MOST_LOST) * before:
            lost.append(name)
    if args.record:
        written = {**here, "ratios": measured}
        RECORD.write_text(json.dumps(written, indent=1) + "\n")
        return 0
    print(*(f"lost 15 % or more: {name}" for name in lost), sep="\n")
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main())
