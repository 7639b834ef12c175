"""Measures jaxii on one GPU beside Flax's ImageNet example and PyTorch: 8 minutes.

    tests/benchmarks/on_gpu.sh OUT
    JAX_PLATFORMS=cpu tests/benchmarks/on_gpu.sh OUT --tiny      # rehearses it

Each part runs in its own process; if one fails, the others still run:

  device    the card, and the speed of its matrix unit: the ceiling of all below
  step      the train step of ResNet-50 at 224 pixels in bfloat16, in turns with the
            peers; memory; MFU, counting only multiply-adds, three times those of the
            forward pass; a trace of five steps and the kernels that take longest
  smoke     a small run trains, is stopped and continued, and equals the undisturbed
            run bit for bit; then `evaluate` and `predict`
  predict   the network of evaluation and prediction, in turns with PyTorch
  input     the input path on all cores beside torchvision's

Writes to OUT: on_gpu.json, after each part; on_gpu.md, the table; and the trace.
"""

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

SIZE, CLASSES = 224, 7178
BATCHES, ROUNDS, STEPS = (128, 256), 5, 10
PREDICT_BATCH = 256
MATRIX_SIDE = 8192
SECONDS = 460
TRACED_STEPS, LONGEST = 5, 15
ROOT = Path(__file__).parents[2]
# Steps out of the 18 of the smoke run.
STOP_AT = "step  8/"


def device(args: argparse.Namespace) -> dict:
    """Returns the device, versions, and the speed of a large matrix product."""
    import jax
    import jax.numpy as jnp

    from jaxii.planner.topology import peak_flops
    from tests.benchmarks.steps import timed

    found = jax.devices()[0]
    side = 256 if args.tiny else MATRIX_SIDE
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (side, side), jnp.bfloat16) for key in keys)
    product = jax.jit(jnp.matmul)
    steps = timed(lambda: product(a, b))
    steps(3)
    memory = (found.memory_stats() or {}).get("bytes_limit")
    return {
        "kind": found.device_kind,
        "memory_bytes": memory,
        "driver": _driver(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax")},
        "peak_flops": peak_flops(found.device_kind),
        "matmul_flops": 2 * side**3 / steps(30),
    }


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip()


def step(args: argparse.Namespace) -> dict:
    """Returns seconds of a step by batch size and trainer, memory and FLOPs."""
    from jaxii.train.telemetry.profiling import memory_bytes
    from tests.benchmarks.steps import contestants, medians
    from tests.benchmarks.train_step import MAKERS

    size = 32 if args.tiny else SIZE
    results = {"flops_an_image": _train_flops(size), "image_size": size}
    rounds, number = (2, 2) if args.tiny else (ROUNDS, STEPS)
    memory = results["memory_bytes"] = {}
    for batch in (4,) if args.tiny else BATCHES:
        given = ("bfloat16", batch, size)
        with contestants(MAKERS, *given, torch="train_step.py") as every:
            every["jaxii"](2)
            # Before Flax's step allocates memory of this process.
            ours = memory_bytes().get("device_memory_bytes")
            results[str(batch)] = medians(every, rounds, number)
            theirs = every["torch"].answer.get("memory_bytes")
            memory[batch] = {"jaxii": ours, "torch": theirs}
            print(f"batch {batch}: {results[str(batch)]}", flush=True)
            if batch == BATCHES[-1] or args.tiny:
                results["longest"] = _longest(args, every["jaxii"])
    return results


def _train_flops(size: int) -> float:
    """Returns operations per training image: multiply-adds of forward and backward.

    Norms, activations, augmentation, the embedding head and the update are not counted.
    """
    import jax
    import jax.numpy as jnp

    from tests.benchmarks.flax_step import ResNet50

    network = ResNet50(CLASSES)
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.bfloat16)
    variables = jax.eval_shape(network.init, jax.random.key(0), images)

    def forward(variables, images):
        return network.apply(variables, images, mutable=["batch_stats"])

    return 3 * 2 * _multiply_adds(jax.make_jaxpr(forward)(variables, images).jaxpr)


def _multiply_adds(jaxpr) -> int:
    """Returns the multiply-adds of the convolutions and matrix products of a jaxpr."""
    total = 0
    for equation in jaxpr.eqns:
        name, outputs = equation.primitive.name, equation.outvars[0].aval
        if name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            total += outputs.size * kernel[0] * kernel[1] * kernel[2]
        elif name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += outputs.size * math.prod(left[i] for i in contracted)
        for inner in equation.params.values():
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                total += _multiply_adds(inner)
    return total


def _longest(args: argparse.Namespace, steps: Callable[[int], float]) -> list:
    """Traces some steps; returns the longest kernels with their share of the time."""
    from tests.benchmarks.steps import traced

    number = 1 if args.tiny else TRACED_STEPS
    taken: Counter[str] = Counter()
    for event in traced(steps, number, args.out / "trace.json.gz"):
        taken[event["name"]] += event["dur"]
    total = sum(taken.values())
    return [[name, time / total] for name, time in taken.most_common(LONGEST)]


def smoke(args: argparse.Namespace) -> dict:
    """Returns whether a continued run equals the undisturbed one, and the times."""
    import jax
    import numpy as np

    from tests.many_processes import PREEMPTED, Run, prepare_folder

    with tempfile.TemporaryDirectory() as name:
        folder, seconds = Path(name), {}
        prepare_folder(folder)
        flags = {"num_devices": 1, "platforms": os.environ.get("JAX_PLATFORMS", "")}
        whole, stopped = (Run(folder, name, **flags) for name in ("whole", "stopped"))
        begun = time.monotonic()
        whole.start(1)
        _expect(whole, 0)
        seconds["train"] = time.monotonic() - begun
        stopped.start(1)
        stopped.wait_for(STOP_AT)
        stopped.preempt(0)
        _expect(stopped, PREEMPTED)
        stopped.start(1)
        _expect(stopped, 0)
        pairs = zip(
            *(jax.tree.leaves(run.last()[1]) for run in (whole, stopped)), strict=True
        )
        equal = [np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs]
        answers = [
            (run.workdir / "submission.csv").read_bytes() for run in (whole, stopped)
        ]
        begun = time.monotonic()
        words = [
            "predict",
            f"--workdir={whole.workdir}",
            f"--output={folder / 'p.csv'}",
        ]
        words += [f"--images={folder / 'files' / 'stage_1_test_images'}"]
        subprocess.run([sys.executable, "-m", "jaxii.main", *words], check=True)
        seconds["predict"] = time.monotonic() - begun
        metrics = json.loads((whole.workdir / "metrics.json").read_text())
    return {
        "arrays": len(equal),
        "equal_arrays": sum(equal),
        "equal_submissions": answers[0] == answers[1],
        "test_f2": metrics["splits"]["test"]["f2"],
        "seconds": seconds,
    }


def _expect(run, code: int) -> None:
    codes = run.wait()
    if codes != [code]:
        raise AssertionError(f"ended with {codes}, not {code}\n{run.logs()}")


def predict(args: argparse.Namespace) -> dict:
    """Returns seconds per batch, from pixels to probabilities."""
    from tests.benchmarks import predict_step

    size, batch = (32, 4) if args.tiny else (SIZE, PREDICT_BATCH)
    seconds = predict_step.measure(
        "bfloat16",
        batch,
        size,
        rounds=2 if args.tiny else ROUNDS,
        number=2 if args.tiny else STEPS,
    )
    return {"batch": batch, "image_size": size, "seconds": seconds}


def inputs(args: argparse.Namespace) -> dict:
    """Returns images per second of the input path on all cores."""
    from tests.benchmarks import input_path

    files, images = (64, 512) if args.tiny else (4096, 16384)
    return input_path.rates(files, images, workers=len(os.sched_getaffinity(0)))


# Part and its longest time in seconds.
PARTS = {
    "device": (device, 60),
    "step": (step, 220),
    "smoke": (smoke, 150),
    "predict": (predict, 100),
    "input": (inputs, 80),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--tiny", action="store_true", help="use small sizes, for a rehearsal"
    )
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    # Parts run in another folder.
    args.out = args.out.resolve()
    if args.part:
        print(json.dumps(PARTS[args.part][0](args)))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    results, begun = {}, time.monotonic()
    for name, (_, most) in PARTS.items():
        started = time.monotonic()
        left = SECONDS - (started - begun)
        results[name] = _part(args, name, 10 * most if args.tiny else min(most, left))
        results[name]["part_seconds"] = round(time.monotonic() - started, 1)
        (args.out / "on_gpu.json").write_text(json.dumps(results, indent=1))
    text = "".join(f"| {' | '.join(row)} |\n" for row in _rows(results))
    (args.out / "on_gpu.md").write_text(text)
    print(text)
    return int(any("error" in result for result in results.values()))


def _part(args: argparse.Namespace, name: str, seconds: float) -> dict:
    """Runs a part in its own process; returns its last line as JSON, or its error."""
    print(f"== {name}", flush=True)
    command = [sys.executable, "-m", "tests.benchmarks.on_gpu", str(args.out)]
    command += [f"--part={name}", *["--tiny"] * args.tiny]
    log = args.out / f"{name}.log"
    with log.open("w") as file:
        try:
            subprocess.run(
                command,
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=max(1.0, seconds),
                check=True,
            )
        except subprocess.SubprocessError as error:
            print(log.read_text()[-3000:])
            return {"error": str(error)}
    return json.loads(log.read_text().splitlines()[-1])


def _rows(results: dict) -> Iterator[tuple[str, ...]]:
    """Yields the table of the measurements."""
    yield "what", "jaxii", "Flax's example", "PyTorch", "jaxii / PyTorch"
    yield ("---",) * 5
    card, steps = results["device"], results["step"]
    for batch, seconds in steps.items():
        if not batch.isdigit():
            continue
        rates = {name: int(batch) / each for name, each in seconds.items()}
        yield _row(f"train step, batch {batch}, images/s", rates)
        peak = card.get("peak_flops") or card.get("matmul_flops")
        if peak:
            flops = steps["flops_an_image"]
            used = {name: 100 * flops * each / peak for name, each in rates.items()}
            yield _row(f"MFU, batch {batch}, %", used)
    if "seconds" in results["predict"]:
        found = results["predict"]
        rates = {k: found["batch"] / v for k, v in found["seconds"].items()}
        yield _row(f"prediction, batch {found['batch']}, images/s", rates)
    if "error" not in results["input"]:
        yield _row("input path, images/s", results["input"])
    found = results["smoke"]
    if "error" not in found:
        same = f"{found['equal_arrays']} of {found['arrays']}"
        yield "arrays of a continued run equal bit for bit", same, "", "", ""


def _row(what: str, figures: dict) -> tuple[str, ...]:
    cells = [
        f"{figures[n]:,.1f}" if n in figures else "" for n in ("jaxii", "flax", "torch")
    ]
    both = "jaxii" in figures and "torch" in figures
    return what, *cells, f"{figures['jaxii'] / figures['torch']:.2f}" if both else ""


if __name__ == "__main__":
    sys.exit(main())
