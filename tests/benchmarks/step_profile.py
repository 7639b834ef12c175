"""Shows where a train step's time goes on a CPU, by kind of operation, beside PyTorch.

    python -m tests.benchmarks.step_profile

The step of the default recipe (ResNet-18 of half the width, 64 images of 64 pixels),
and ResNet-50 on 8 images of 224 pixels in float32, are traced by jax.profiler;
PyTorch's steps of the same networks, with one head and no augmentation, by
torch.profiler. All run on one core, so that times are processor time; the speed of a
large matrix product is the ceiling. jaxii's operations are sorted by the names that JAX
and XLA's CPU backend give them. Takes three minutes.
"""

import argparse
import os
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np

from configs import f2_multitask
from jaxii.config import Config
from jaxii.distributed.mesh import make_mesh
from jaxii.runs.plan import Facts
from jaxii.runs.speed import ResidentStep
from tests.benchmarks import peers
from tests.benchmarks.steps import timed, traced

# Preset, batch, and name in the table.
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
    step = ResidentStep(config, facts, make_mesh(jax.devices()[:1]))
    text = step.train_step.lower(step.state, *step.given).compile().as_text()
    steps = timed(step)
    steps(2)
    seconds, events = steps(TRACED), traced(steps, TRACED)
    kinds = {
        found[1]: kind_of(found[1], found[3], name[1] if name else "")
        for found in map(_INSTRUCTION.match, text.splitlines())
        if found
        for name in [_NAME.search(found[4])]
    }
    taken: Counter[str] = Counter()
    for event in events:
        if event["args"]["hlo_op"] in kinds:
            taken[kinds[event["args"]["hlo_op"]]] += event["dur"] / 1e6 / TRACED
    return seconds, taken


def gemm_flops() -> float:
    """Returns the operations per second of a large matrix product on one core."""
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
    # Before JAX and PyTorch count the cores for their threads.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    print(f"matrix product: {gemm_flops() / 1e9:.0f} GFLOP/s on one core")
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
