"""Times a train step beside those of Flax's ImageNet example and of PyTorch.

    python -m tests.benchmarks.train_step

ResNet-50 with 7,178 classes, forward, backward and update, float32 and bfloat16: 8
images of 224 pixels, then 64 of 64. jaxii runs the recipe's first stage, both heads and
augmentation included, as training assembles it; the peers have one head and no
augmentation. All three take turns, PyTorch (channels last, autocast for bfloat16,
torch.compile on GPUs) in a process of its own. Medians; about 12 minutes.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from configs import f2_multitask
from jaxii.config import Config
from jaxii.distributed.mesh import make_mesh
from jaxii.runs import assembly
from jaxii.runs.plan import Facts, batch_shapes
from jaxii.train.step import make_train_step
from tests.benchmarks import peers
from tests.benchmarks.flax_step import ResNet50, make_step
from tests.benchmarks.table import Row, emit

NUM_CLASSES = 7178
SIZES = ((8, 224), (64, 64))
DTYPES = ("float32", "bfloat16")
BAR = 0.80
# Trains so many steps and returns the seconds of one.
Steps = Callable[[int], float]


def our_steps(dtype: str, batch: int, size: int) -> Steps:
    """Returns the train step of the recipe on one batch that stays in place."""
    config = f2_multitask.get_config("inclusive_images")
    config.model.compute_dtype = dtype
    config.data.image_size_pixels, config.global_batch_size = size, batch
    config = Config.resolve(config)
    facts = Facts(
        num_classes=NUM_CLASSES, num_slots=126, num_images=1_568_738, source="here"
    )
    stage = assembly.stages_of(config, lambda split: facts.num_images)[0]
    dim = config.label_embedding.dim
    (plan,) = assembly.make_plans(
        config, (stage,), num_classes=NUM_CLASSES, embedding_dim=dim
    )
    train_step = make_train_step(plan.settings, make_mesh(jax.devices()[:1]))
    rng = np.random.default_rng(0)
    arrays = {
        name: jnp.zeros(shape.shape, shape.dtype)
        for name, shape in batch_shapes(config, facts, batch).items()
    }
    images = rng.integers(0, 256, arrays["images"].shape, np.uint8)
    labels = rng.integers(0, NUM_CLASSES, arrays["label_ids"].shape)
    arrays |= {
        "images": jnp.asarray(images),
        "label_ids": jnp.asarray(labels, jnp.int32),
        # The first four slots are labels, as many as an Open Images image has.
        "label_confidences": arrays["label_confidences"].at[:, :4].set(1.0),
        "mask": jnp.ones(batch, jnp.float32),
    }
    vectors = jnp.asarray(rng.normal(size=(NUM_CLASSES, dim)), jnp.float32)
    kept = [plan.fresh_state(jax.random.key(0))]

    def step():
        kept[0], metrics = train_step(kept[0], arrays, vectors)
        return metrics

    return timed(step)


def flax_steps(dtype: str, batch: int, size: int) -> Steps:
    """Returns the train step of Flax's example on one batch that stays in place."""
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


def timed(step: Callable[[], object]) -> Steps:
    """Returns a function that runs steps and waits for the last."""

    def steps(number: int) -> float:
        start = time.perf_counter()
        for _ in range(number):
            metrics = step()
        jax.block_until_ready(metrics)
        return (time.perf_counter() - start) / number

    return steps


def medians(every: Mapping[str, Steps], rounds: int, number: int) -> dict[str, float]:
    """Returns the median seconds of a step of each, in turns of `number` steps."""
    for steps in every.values():
        steps(2)
    turns = [
        {name: steps(number) for name, steps in every.items()} for _ in range(rounds)
    ]
    return {name: statistics.median(turn[name] for turn in turns) for name in every}


@contextlib.contextmanager
def contestants(
    dtype: str, batch: int, size: int, *, torch: bool
) -> Iterator[dict[str, Steps]]:
    """Yields the steps of "jaxii", "flax" and, if asked for, "torch"."""
    with contextlib.ExitStack() as stack:
        every: dict[str, Steps] = {}
        if torch:
            # First, so that it compiles while the others do.
            peer = peers.Steps("train_step.py", dtype, str(batch), str(size))
            every["torch"] = stack.enter_context(contextlib.closing(peer))
        every["jaxii"] = our_steps(dtype, batch, size)
        every["flax"] = flax_steps(dtype, batch, size)
        yield every


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", nargs="*", type=int, help="pixels: of 224 and 64")
    parser.add_argument("--no_torch", action="store_true")
    args = parser.parse_args()
    for batch, size in SIZES:
        if args.sizes and size not in args.sizes:
            continue
        seconds = {}
        for dtype in DTYPES:
            with contestants(dtype, batch, size, torch=not args.no_torch) as every:
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
