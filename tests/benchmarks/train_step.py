"""Times a train step beside those of Flax's ImageNet example and of PyTorch.

    python -m tests.benchmarks.train_step

ResNet-50 with 7,178 classes, forward, backward and update, float32 and bfloat16: 8
images of 224 pixels, then 64 of 64. jaxii runs the recipe's first stage, both heads and
augmentation included, as training assembles it; the peers have one head and no
augmentation. jaxii's and Flax's steps alternate in one process; PyTorch's (channels
last, autocast for bfloat16) come after, in another. Medians; about 12 minutes.
"""

import argparse
import statistics
import time
from collections.abc import Callable

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
Step = Callable[[], object]


def our_step(dtype: str, batch: int, size: int) -> Step:
    """Returns a function that trains one step of the recipe and keeps the state."""
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
        return jax.block_until_ready((kept[0], metrics))

    return step


def flax_step(dtype: str, batch: int, size: int) -> Step:
    """Returns a function that trains one step of Flax's example."""
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
        return jax.block_until_ready((state, metrics))

    return step


def medians(steps: list[Step], rounds: int) -> list[float]:
    """Returns the median seconds of each, run in turns; the first round compiles."""
    seconds: list[list[float]] = [[] for _ in steps]
    for number in range(rounds + 2):
        for step, taken in zip(steps, seconds, strict=True):
            start = time.perf_counter()
            step()
            if number > 1:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]


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
        ours, flax = {}, {}
        for dtype in DTYPES:
            steps = [our_step(dtype, batch, size), flax_step(dtype, batch, size)]
            ours[dtype], flax[dtype] = medians(steps, args.rounds)
            print(f"{size} {dtype}: jaxii {ours[dtype]:.3f} s, flax {flax[dtype]:.3f}")
        best, peer = min(ours, key=ours.get), min(flax, key=flax.get)
        what = f"train step, ResNet-50, {batch} images of {size} pixels"
        emit(
            Row(
                f"{what}, best type",
                f"{ours[best]:.3f} s ({best})",
                f"Flax's example, {flax[peer]:.3f} s ({peer})",
                ours[best] / flax[peer],
                "<=",
                BAR,
            )
        )
        if not args.no_torch:
            torch_rows(what, ours, batch, size, args.rounds)


def torch_rows(what, ours, batch, size, rounds) -> None:
    """Prints what PyTorch takes; the aim, not the bar."""
    for dtype in DTYPES:
        seconds = peers.run("train_step.py", dtype, str(batch), str(size), str(rounds))
        ratio = ours[dtype] / seconds["seconds"]
        print(
            f"{what}, {dtype}: jaxii {ours[dtype]:.3f} s, PyTorch "
            f"{seconds['seconds']:.3f} s, ratio {ratio:.2f} (aim 1)"
        )


if __name__ == "__main__":
    main()
