"""Runs an exported checkpoint in environments with only the documented packages.

    python -m tests.benchmarks.export_elsewhere --workdir=RUN [--data_dir=DIR]

Exports the run and makes two fresh virtual environments: one with jax and numpy, one
with onnxruntime and numpy. In each, the probabilities of test images, in batches of 1,
of 3 and of all of them, are compared with the checkpoint's own. In the first, the
answers of the loader are also compared with those of the checkpoint's decoder. Packages
come from PyPI.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import jax
import numpy as np
from absl import logging

from jaxii.decoding import decoders as decoding
from jaxii.evaluation.predictor import make_predict
from jaxii.export import programs
from jaxii.runs import assembly
from jaxii.runs.run import Run
from jaxii.runs.workdir import Workdir
from jaxii.storage import at
from tests.benchmarks.apart import run
from tests.benchmarks.table import Row, emit

ROOT = Path(__file__).parents[2]
NUM_IMAGES = 100
# Each prints the largest difference.
COMPARE = """
images, probs = np.load("images.npy"), np.load("probs.npy")
parts = [slice(0, 1), slice(1, 4), slice(None)]
found = [np.abs(program(images[part]) - probs[part]).max() for part in parts]
result = {"difference": float(np.max(found)), "labels_that_differ": 0}
"""
WITH_JAX = f"""
import json, sys, numpy as np
sys.path.insert(0, "exported")
import load
program = load.probabilities
{COMPARE}
answers = json.load(open("answers.json"))
pairs = zip(load.predict_labels(images), answers, strict=True)
result["labels_that_differ"] = sum(len(set(a) ^ set(b)) for a, b in pairs)
print(json.dumps(result))
"""
WITH_ONNX = f"""
import json, numpy as np, onnxruntime
session = onnxruntime.InferenceSession("exported/{programs.ONNX}")
def program(images):
    return session.run(["probabilities"], {{"images": images}})[0]
{COMPARE}
print(json.dumps(result))
"""
ENVIRONMENTS = {"jax": WITH_JAX, "onnxruntime": WITH_ONNX}


def checkpoint_answers(workdir: Workdir, data_dir: str, folder: Path) -> None:
    """Writes images and the checkpoint's answers for them."""
    run = Run.open(workdir.path, workdir.metrics().stage, data_dir=data_dir)
    mesh, predict = run.mesh, make_predict([run.in_float32(run.model())], run.mesh)
    batches = assembly.eval_batches(run.config, run.data, "test", NUM_IMAGES)
    with jax.default_matmul_precision(programs.PRECISION):
        images, probs = programs.checkpoint_predictions(predict, batches, mesh)
    decoders = decoding.load(workdir.result_file("decoders.npz"), None)
    codes = workdir.vocabulary().codes
    answers = decoders.answer("threshold")(probs, None)
    (folder / "answers.json").write_text(
        json.dumps([[codes[i] for i in ids] for ids in answers])
    )
    np.save(folder / "images.npy", images)
    np.save(folder / "probs.npy", probs)


def environment(folder: Path, package: str) -> tuple[Path, str]:
    """Makes a virtual environment; returns its Python and its installed packages."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", package, "numpy"], check=True)
    listed = subprocess.run(
        [*pip, "list", "--format=freeze", "--exclude=pip", "--exclude=setuptools"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return python, ", ".join(listed.stdout.split())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="a trained and evaluated run")
    parser.add_argument("--data_dir", default="", help="its dataset, if it has moved")
    args = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        words = [f"--workdir={args.workdir}", f"--output={folder / 'exported'}"]
        words += [f"--data_dir={args.data_dir}"] * bool(args.data_dir)
        words += ["--onnx", "--decoder=threshold"]
        subprocess.run(
            [sys.executable, "-m", "jaxii.main", "export", *words], cwd=ROOT, check=True
        )
        checkpoint_answers(Workdir(at(args.workdir)), args.data_dir, folder)
        # The environments must not see this checkout or settings of this process.
        os.environ.pop("PYTHONPATH", None)
        os.chdir(folder)
        for package, script in ENVIRONMENTS.items():
            python, installed = environment(folder / package, package)
            print(f"{package}: {installed}", flush=True)
            found = run([str(python), "-c", script])
            difference = found["difference"]
            what = f"probabilities with {package} and numpy alone, {NUM_IMAGES} images"
            emit(
                Row(what, f"{difference:.1e}", "", difference, "<=", programs.TOLERANCE)
            )
            differing = found["labels_that_differ"]
            if package == "jax":
                print(f"labels that differ in the loader's answers: {differing}")
            if differing or not difference <= programs.TOLERANCE:
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
