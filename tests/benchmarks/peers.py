"""The peers' own environment: PyTorch, torchvision and timm, separate from jaxii's.

It is created at first use in the user's cache folder (several GB if pip selects a CUDA
build), or named by JAXII_PEERS_PYTHON.
"""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

from tests.benchmarks import apart

PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow")
PYTHON = "JAXII_PEERS_PYTHON"
FOLDER = Path(__file__).parent / "peer"


def python() -> str:
    """Returns the interpreter of the peers; installs them if needed."""
    named = os.environ.get(PYTHON)
    if named:
        return named
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "jaxii" / "benchmark_peers"
    interpreter, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        print(f"installing {', '.join(PACKAGES)} into {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        install = [str(interpreter), "-m", "pip", "install", "-q", *PACKAGES]
        subprocess.run(install, check=True)
        ready.touch()
    return str(interpreter)


class Steps:
    """A script of `peer/` that stays in its process and times steps on request.

    The script starts at once; the first call waits until it has compiled. It reads one
    number of steps per line, and answers each with a JSON object.

    Attributes:
      answer: The last answer.
    """

    def __init__(self, script: str, *args: str):
        self.answer: dict[str, float] = {}
        self._process = subprocess.Popen(
            [python(), str(FOLDER / script), *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, number: int) -> float:
        """Runs `number` steps; returns the seconds per step."""
        self._process.stdin.write(f"{number}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args} ended before it answered")
        self.answer = json.loads(line)
        return self.answer["seconds"]

    def close(self) -> None:
        self._process.communicate()


def run(script: str, *args: str) -> dict:
    """Runs a script of `peer/` with that interpreter; returns the last JSON object."""
    command = [python(), str(FOLDER / script), *args]
    return apart.run(command)
