"""Times the default job, from the command to the end of training, beside PyTorch's.

    python -m tests.benchmarks.whole_run [--rounds=1] [--compute_dtype=bfloat16]

`python -m jaxii.main --config configs/f2_multitask.py` runs in a new workdir with an
empty cache of compiled programs. Start-up, compilation, training, its evaluations and
its checkpoints are timed; the time with decoders and report, which follow the last
step, is printed separately. Its peer trains a ResNet-18 of the same width with
torchvision's parts: the same images as files, the same number of epochs and batch size,
a DataLoader with two workers, less augmentation, SGD on channels-last memory, one head,
one evaluation at the end, no checkpoint. They take turns on otherwise idle cores, ten
minutes per round. Both compute in --compute_dtype, PyTorch by autocast.
"""

import argparse
import json
import os
import re
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jaxii.config import Config
from jaxii.runs.assembly import data_root, open_data
from tests.benchmarks import peers
from tests.benchmarks.table import Row, emit

ROOT = Path(__file__).parents[2]
CONFIG = "configs/f2_multitask.py"
BAR = 1.0
DTYPES = "float32", "bfloat16"
# The line that the command prints for the last step.
LAST_STEP = re.compile(r"\w+ +step +(\d+)/\1 ")


def our_seconds(folder: Path, dtype: str) -> tuple[float, float]:
    """Returns the seconds to the last step, and to the end of the command."""
    command = [sys.executable, "-u", "-m", "jaxii.main", "--config", CONFIG]
    command += [f"--workdir={folder / 'run'}", f"--config.model.compute_dtype={dtype}"]
    environment = {
        **os.environ,
        "JAXII_DATA_DIR": str(data_root()),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    start, trained = time.monotonic(), None
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if LAST_STEP.match(line):
                trained = time.monotonic() - start
    if process.returncode or trained is None:
        raise RuntimeError(f"exit code {process.returncode}, or no last step")
    return trained, time.monotonic() - start


def write_images(source, folder: Path) -> None:
    """Writes records as JPEG files, and their labels as JSON."""
    folder.mkdir(parents=True)
    labels = []
    for row in range(len(source)):
        record = source[row]
        (folder / f"{row:06d}.jpg").write_bytes(record["image"])
        present = record["label_confidences"] > 0
        labels.append(record["label_ids"][present].tolist())
    (folder / "labels.json").write_text(json.dumps(labels))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--compute_dtype", choices=DTYPES, default=DTYPES[0])
    args = parser.parse_args()
    config = Config.resolve(runpy.run_path(str(ROOT / CONFIG))["get_config"]())
    data = open_data(config)
    epochs = sum(stage.num_epochs for stage in config.stages)
    ours, whole, theirs = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        images = Path(scratch, "images")
        for split in ("train", "validation"):
            write_images(data.splits[split].source, images / split)
        words = (images, len(data.vocabulary), epochs, config.global_batch_size)
        words += (config.data.image_size_pixels, config.model.width)
        words += (args.compute_dtype,)
        for number in range(args.rounds):
            trained, ended = our_seconds(Path(scratch, str(number)), args.compute_dtype)
            ours.append(trained)
            whole.append(ended)
            start = time.monotonic()
            peers.run("whole_run.py", *map(str, words))
            theirs.append(time.monotonic() - start)
    print(
        f"the command including decoders and report: {statistics.median(whole):.0f} s"
    )
    emit(
        Row(
            f"default job in {args.compute_dtype}, command to the end of training",
            f"{statistics.median(ours):.0f} s",
            f"PyTorch, {statistics.median(theirs):.0f} s",
            statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
            "<=",
            BAR,
        )
    )


if __name__ == "__main__":
    main()
