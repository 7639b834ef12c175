"""Trains one small run in real processes over loopback, as a user would start it.

The run is a ResNet-18 of width 8 on images of 32 pixels in float32, so that effects of
a topology can be distinguished from rounding. Shared by the tests and by the rehearsals
in `benchmarks`.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from jaxii.distributed.mesh import make_mesh, replicated
from jaxii.prepare.kaggle import Layout, prepare
from jaxii.prepare.toy_regions import writer
from jaxii.runs.workdir import Workdir
from jaxii.train.checkpoint import Checkpoints

ROOT = Path(__file__).parent.parent
STAGE = "only"
PREEMPTED = 75
MOST_SECONDS = 240.0
# `recorded_main` writes the examples of each process there.
RECORDS = "RECORDS_OF_EXAMPLES"
RECIPE = """
from jaxii.config import default_config

def get_config(name=""):
    config = default_config()
    config.model.depth = 18
    config.model.width = 8
    config.model.compute_dtype = "float32"
    config.data.image_size_pixels = 32
    config.data.num_threads = 2
    config.global_batch_size = 32
    config.label_embedding.dim = 8
    config.optimizer.peak_lr = 0.02
    config.evaluate_every_steps = 6
    config.log_every_steps = 1
    config.stages = (
        {
            "name": "only",
            "num_steps": 18,
            "embedding_head": True,
            "terms": {"bce": 1.0, "embedding": 1.0},
        },
    )
    return config
"""


def prepare_folder(folder, *, num_train=120, num_test=29):
    """Writes the recipe and the data that the runs in a folder share."""
    (folder / "recipe.py").write_text(RECIPE)
    files = writer.write(
        folder / "files", num_train=num_train, num_tuning=10, num_test=num_test
    )
    truth = files / "truth"
    layout = Layout.find(
        files,
        test_labels=truth / "solution.csv",
        test_metadata=truth / "test_meta.csv",
    )
    prepare(layout, folder / "prepared")


class Run:
    """A workdir that can be trained by any number of processes.

    Args:
      folder: A prepared folder; also holds the logs.
      name: Name of the workdir in it.
      num_devices: Number over all processes.
      flags: Flags of jaxii, besides recipe, data and workdir.
      is_recorded: Record the examples of every step of each process.
      most_seconds: Time limit when waiting for a line or for the end.
      platforms: JAX_PLATFORMS of the processes.
    """

    def __init__(
        self,
        folder,
        name,
        *,
        num_devices=4,
        flags=(),
        is_recorded=False,
        most_seconds=MOST_SECONDS,
        platforms="cpu",
    ):
        self.folder, self.workdir = folder, folder / name
        self.most_seconds, self.platforms = most_seconds, platforms
        self.num_devices, self.flags = num_devices, flags
        self.module = "tests.recorded_main" if is_recorded else "jaxii.main"
        self.records = folder / f"{name}_records"
        self.processes, self.port = [], 0

    def start(self, count, *, evaluates=False):
        """Starts `count` processes that train, or that evaluate the trained run."""
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port = one.getsockname()[1]
        devices = self.num_devices // count
        environment = {
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
            **os.environ,
            "JAX_PLATFORMS": self.platforms,
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} "
            f"--xla_force_host_platform_device_count={devices}",
            RECORDS: str(self.records),
        }
        words = [
            *(sys.executable, "-m", self.module, "evaluate" if evaluates else "train"),
            f"--workdir={self.workdir}",
        ]
        if not evaluates:
            words += [
                f"--config={self.folder / 'recipe.py'}",
                f"--data_dir={self.folder / 'prepared'}",
                *self.flags,
            ]
        self.processes = []
        for index in range(count):
            place = [
                f"--coordinator=127.0.0.1:{self.port}",
                f"--num_processes={count}",
                f"--process_id={index}",
            ]
            with self._log_file(index).open("w") as log:
                self.processes.append(
                    subprocess.Popen(
                        words + place * (count > 1),
                        cwd=ROOT,
                        env=environment,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )

    def wait(self, seconds=None):
        """Waits for all and returns their exit codes; None for killed ones."""
        deadline = time.monotonic() + (seconds or self.most_seconds)
        codes = []
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0.0))
            codes.append(process.poll())
        self.stop()
        return codes

    def stop(self):
        """Ends processes that still run."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def preempt(self, index):
        self.processes[index].send_signal(signal.SIGTERM)

    def _log_file(self, index):
        return self.folder / f"{self.workdir.name}_{index}.log"

    def log(self, index=0):
        return self._log_file(index).read_text()

    def logs(self):
        """Returns the last lines of every log, for error messages."""
        return "\n".join(
            f"--- process {i}\n" + "\n".join(self.log(i).splitlines()[-8:])
            for i in range(len(self.processes))
        )

    def wait_for(self, text):
        deadline = time.monotonic() + self.most_seconds
        while text not in self.log():
            assert time.monotonic() < deadline, self.logs()
            assert self.processes[0].poll() is None, self.logs()
            time.sleep(0.05)

    def saved(self):
        """Returns the complete checkpoints, by step."""
        if not (self.workdir / "checkpoints").exists():
            return []
        hash_of_labels = Workdir(self.workdir).vocabulary().content_hash()
        checkpoints = Checkpoints(self.workdir, [STAGE], hash_of_labels, read_only=True)
        found = checkpoints.saved().get(STAGE, [])
        checkpoints.close()
        return found

    def last(self):
        """Returns the last checkpoint: its metadata and all its arrays."""
        saved = self.saved()[-1]
        folder = self.workdir / "checkpoints" / STAGE / str(saved.step)
        whole = replicated(make_mesh(jax.devices()[:1]))
        with ocp.StandardCheckpointer() as checkpointer:
            arrays = {}
            for part in ("model", "training"):
                shapes = checkpointer.metadata(folder / part).item_metadata
                like = jax.tree.map(
                    lambda leaf: jax.ShapeDtypeStruct(
                        leaf.shape, leaf.dtype, sharding=whole
                    ),
                    getattr(shapes, "tree", shapes),
                )
                arrays[part] = checkpointer.restore(folder / part, like)
        return saved, arrays

    def examples(self):
        """Returns step -> process -> the (positions, indices) it trained on.

        If a step was repeated after a process was killed, the last time counts.
        """
        steps = {}
        for path in self.records.glob("*.jsonl"):
            for line in path.read_text().splitlines():
                row = json.loads(line)
                by_process = steps.setdefault(row["step"], {})
                by_process[row["process"]] = row["positions"], row["index"]
        return steps
