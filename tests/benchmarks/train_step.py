"""Times a train step beside those of Flax's ImageNet example and of PyTorch.

    python -m tests.benchmarks.train_step

ResNet-50 with 7,178 classes: forward, backward and update, in float32 and bfloat16, on
8 images of 224 pixels, then on 64 of 64. jaxii runs the recipe's first stage, including
both heads and augmentation, as training assembles it; the peers have one head and no
augmentation. All three take turns; PyTorch (channels last, autocast for bfloat16,
torch.compile on GPUs) runs in its own process. The figures are medians. Takes about 12
minutes.
"""

import argparse
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from configs import f2_multitask
from jaxii.config import Config
from jaxii.distributed.mesh import make_mesh
from jaxii.runs.plan import Facts
from jaxii.runs.speed import ResidentStep
from tests.benchmarks.flax_step import ResNet50, make_step
from tests.benchmarks.steps import Steps, contestants, medians, timed
from tests.benchmarks.table import Row, emit

NUM_CLASSES = 7178
SIZES = ((8, 224), (64, 64))
DTYPES = ("float32", "bfloat16")
BAR = 0.80


def our_steps(dtype: str, batch: int, size: int) -> Steps:
    """Returns steps of the recipe's train step on one resident batch."""
    config = f2_multitask.get_config("inclusive_images")
    config.model.compute_dtype = dtype
    config.data.image_size_pixels, config.global_batch_size = size, batch
    config = Config.resolve(config)
    facts = Facts(
        num_classes=NUM_CLASSES, num_slots=126, num_images=1_568_738, source="here"
    )
    return timed(ResidentStep(config, facts, make_mesh(jax.devices()[:1])))


def flax_steps(dtype: str, batch: int, size: int) -> Steps:
    """Returns steps of Flax's example on one resident batch."""
    network = ResNet50(NUM_CLASSES, jnp.dtype(dtype))
    train_step, shapes = make_step(network, make_mesh(jax.devices()[:1]), batch, size)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=shapes[3].shape), shapes[3].dtype)
    labels = jnp.asarray(rng.integers(0, NUM_CLASSES, batch), jnp.int32)
    variables = jax.jit(network.init)(jax.random.key(0), images)
    stacked = jax.tree.map(lambda x: x[None], variables["batch_stats"])
    opt_state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[2])
    kept = [(variables["params"], stacked, opt_state)]

    def step():
        *state, metrics = train_step(*kept[0], images, labels)
        kept[0] = tuple(state)
        return metrics

    return timed(step)


MAKERS = {"jaxii": our_steps, "flax": flax_steps}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--sizes", nargs="*", type=int, help="image sizes in pixels, of 224 and 64"
    )
    parser.add_argument("--no_torch", action="store_true")
    args = parser.parse_args()
    for batch, size in SIZES:
        if args.sizes and size not in args.sizes:
            continue
        seconds = {}
        for dtype in DTYPES:
            torch = None if args.no_torch else "train_step.py"
            with contestants(MAKERS, dtype, batch, size, torch=torch) as every:
                seconds[dtype] = medians(every, args.rounds, 1)
        for dtype, taken in seconds.items():
            told = ", ".join(f"{name} {each:.3f} s" for name, each in taken.items())
            print(f"{batch} images of {size} pixels, {dtype}: {told}")
        emit(row(batch, size, seconds))


def row(batch: int, size: int, seconds: Mapping[str, Mapping[str, float]]) -> Row:
    """Returns the best type of jaxii against the best type of Flax's example."""
    best = min(DTYPES, key=lambda dtype: seconds[dtype]["jaxii"])
    peer = min(DTYPES, key=lambda dtype: seconds[dtype]["flax"])
    ours, theirs = seconds[best]["jaxii"], seconds[peer]["flax"]
    return Row(
        f"train step, ResNet-50, {batch} images of {size} pixels, best type",
        f"{ours:.3f} s ({best})",
        f"Flax's example, {theirs:.3f} s ({peer})",
        ours / theirs,
        "<=",
        BAR,
    )


if __name__ == "__main__":
    main()
