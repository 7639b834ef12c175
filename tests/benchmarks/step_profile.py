"""Where a train step's time goes on a CPU, by kind of operation, beside PyTorch.

    python -m tests.benchmarks.step_profile

The step of the default recipe (ResNet-18 of half the width, 64 images of 64 pixels),
and ResNet-50 on 8 images of 224 pixels in float32, traced by jax.profiler; PyTorch's of
the same networks, with one head and no augmentation, by torch.profiler. One thread
each, so that times are processor time; the speed of a large matrix product is the
ceiling. Kinds of jaxii's operations are told by the names that JAX and XLA's CPU
backend give them. Three minutes.
"""

import argparse
import gzip
import json
import re
import tempfile
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from configs import f2_multitask
from jaxii.config import Config
from jaxii.distributed.mesh import make_mesh
from jaxii.runs.plan import Facts, batch_shapes, choose_stage, plan_stage
from jaxii.train.step import make_train_step
from tests.benchmarks import peers
from tests.benchmarks.train_step import timed

# Preset, batch, and what it is called.
STEPS = {
    "toy_regions": (64, "ResNet-18, width 32, 64 images of 64 pixels"),
    "inclusive_images": (8, "ResNet-50, width 64, 8 images of 224 pixels"),
}
TRACED = 3
SIDE = 2048
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)")
_NAME = re.compile(r'op_name="([^"]*)"')


def kind_of(name: str, opcode: str, op_name: str) -> str:
    """Returns the kind of an instruction of the compiled step."""
    way = "backward" if "transpose(" in op_name else "forward"
    if opcode == "convolution" or name.startswith("ynn_fusion"):
        if "conv_general_dilated" in op_name:
            return "convolutions, " + ("data gradient" if way == "backward" else way)
        # XLA rewrites a weight gradient to a convolution without a name.
        return f"matrix products, {way}" if op_name else "convolutions, weight gradient"
    if opcode == "dot":
        return f"matrix products, {way}"
    if "transpose" in name or name.startswith("copy"):
        return "transposed copies"
    return "norms, activations, pooling, augmentation, update"


def profile(preset: str, batch_size: int) -> tuple[float, Counter[str]]:
    """Returns the seconds of a step, and of each kind of operation in it."""
    config = f2_multitask.get_config(preset)
    config.global_batch_size, config.model.compute_dtype = batch_size, "float32"
    config = Config.resolve(config)
    facts = Facts(num_classes=60, num_slots=16, num_images=3000, source="")
    stage = choose_stage(config, facts)
    planned, vectors = plan_stage(config, facts, stage)
    train_step = make_train_step(planned.settings, make_mesh(jax.devices()[:1]))
    rng = np.random.default_rng(0)
    shapes = batch_shapes(config, facts, batch_size)
    batch = {name: np.ones(s.shape, s.dtype) for name, s in shapes.items()}
    batch["images"] = rng.integers(0, 256, batch["images"].shape, np.uint8)
    batch["label_ids"] = rng.integers(0, 60, batch["label_ids"].shape, np.int32)
    batch = jax.tree.map(jnp.asarray, batch)
    embedding = jnp.asarray(rng.normal(size=vectors.shape), jnp.float32)
    kept = [jax.jit(planned.fresh_state)(jax.random.key(0))]
    text = train_step.lower(kept[0], batch, embedding).compile().as_text()

    def step():
        kept[0], metrics = train_step(kept[0], batch, embedding)
        return metrics

    steps = timed(step)
    steps(2)
    seconds = steps(TRACED)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            steps(TRACED)
        (written,) = Path(folder).rglob("*.trace.json.gz")
        with gzip.open(written) as file:
            events = json.load(file)["traceEvents"]
    kinds = {
        found[1]: kind_of(found[1], found[3], name[1] if name else "")
        for found in map(_INSTRUCTION.match, text.splitlines())
        if found
        for name in [_NAME.search(found[4])]
    }
    taken: Counter[str] = Counter()
    for event in events:
        name = event.get("args", {}).get("hlo_op")
        if event.get("ph") == "X" and name in kinds:
            taken[kinds[name]] += event["dur"] / 1e6 / TRACED
    return seconds, taken


def gemm_flops() -> float:
    """Returns the operations a second of a large matrix product on one thread."""
    a = jnp.asarray(np.random.default_rng(0).normal(size=(SIDE, SIDE)), jnp.float32)
    product = jax.jit(jnp.matmul)
    steps = timed(lambda: product(a, a))
    steps(2)
    return 2 * SIDE**3 / steps(5)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    print(f"matrix product: {gemm_flops() / 1e9:.0f} GFLOP/s on one thread")
    for preset, (batch, what) in STEPS.items():
        seconds, ours = profile(preset, batch)
        theirs = peers.run("step_profile.py", preset, str(batch))
        print(f"\n{what}: jaxii {seconds:.3f} s, PyTorch {theirs['seconds']:.3f} s")
        for name, kinds in {"jaxii": ours, "PyTorch": theirs["kinds"]}.items():
            print(f"  {name}")
            for kind, taken in Counter(kinds).most_common():
                print(f"    {taken:7.3f} s  {taken / sum(kinds.values()):4.0%}  {kind}")


if __name__ == "__main__":
    main()
