"""Compiles the train step of Flax's examples/imagenet for TPUs that are absent.

    pip install '.[tpu]'
    python -m tests.benchmarks.flax_step --topology=v5e:4x4 --device_batch_size=128

The peer of `python -m jaxii.main plan --topology=... --quick`: the network, loss and
optimizer of that example (ResNet-50 in Flax Linen, bfloat16, softmax cross-entropy with
an L2 penalty, Nesterov momentum; BatchNorm statistics per device, as in the example),
on images that are already normalised, without augmentation. Prints memory, traffic and
collectives as `plan` does. With --largest, it also prints the largest batch that fits,
found as `plan` finds it (a few more compilations).
"""

import argparse
from functools import cache, partial

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from jaxii.distributed.mesh import DATA_AXIS
from jaxii.planner.compiled import DoesNotFit, Figures, figures_of, largest_batch
from jaxii.planner.plan_text import report
from jaxii.planner.topology import absent

BLOCKS = (3, 4, 6, 3)
SIZE = 224
norm = partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)
conv = partial(nn.Conv, use_bias=False)


class Block(nn.Module):
    """A bottleneck block."""

    filters: int
    stride: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x):
        batch_norm = partial(norm, use_running_average=False, dtype=self.dtype)
        convolve = partial(conv, dtype=self.dtype)
        strides = (self.stride, self.stride)
        y = nn.relu(batch_norm()(convolve(self.filters, (1, 1))(x)))
        y = nn.relu(batch_norm()(convolve(self.filters, (3, 3), strides)(y)))
        y = convolve(4 * self.filters, (1, 1))(y)
        y = batch_norm(scale_init=nn.initializers.zeros_init())(y)
        if x.shape != y.shape:
            x = batch_norm()(convolve(4 * self.filters, (1, 1), strides)(x))
        return nn.relu(x + y)


class ResNet50(nn.Module):
    """The example's network in training mode."""

    num_classes: int
    dtype: DTypeLike = jnp.bfloat16

    @nn.compact
    def __call__(self, images):
        stem = conv(64, (7, 7), (2, 2), padding=[(3, 3), (3, 3)], dtype=self.dtype)
        x = norm(use_running_average=False, dtype=self.dtype)(stem(images))
        x = nn.relu(x)
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for stage, blocks in enumerate(BLOCKS):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = Block(64 * 2**stage, stride, self.dtype)(x)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype)(x)


def step_of(network: ResNet50, optimizer: optax.GradientTransformation):
    """Returns one device's update; gradients and metrics are averaged over devices."""

    def loss_of(params, batch_stats, images, labels):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updated = network.apply(variables, images, mutable=["batch_stats"])
        targets = jax.nn.one_hot(labels, network.num_classes)
        loss = jnp.mean(optax.softmax_cross_entropy(logits, targets))
        kernels = [x for x in jax.tree.leaves(params) if x.ndim > 1]
        loss = loss + 0.5e-4 * sum(jnp.sum(x**2) for x in kernels)
        return loss, (updated["batch_stats"], logits)

    def step(params, batch_stats, opt_state, images, labels):
        batch_stats = jax.tree.map(lambda x: x[0], batch_stats)
        (loss, (batch_stats, logits)), gradients = jax.value_and_grad(
            loss_of, has_aux=True
        )(params, batch_stats, images, labels)
        hits = jnp.mean((jnp.argmax(logits, -1) == labels).astype(jnp.float32))
        gradients = jax.lax.pmean(gradients, DATA_AXIS)
        metrics = jax.lax.pmean((loss, hits), DATA_AXIS)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
        batch_stats = jax.tree.map(lambda x: x[None], batch_stats)
        return params, batch_stats, opt_state, metrics

    return step


def make_step(network: ResNet50, mesh: Mesh, num_images: int, size: int):
    """Returns the jitted step and the shapes of its arguments."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, 100, 1000)
    optimizer = optax.sgd(schedule, 0.9, nesterov=True)
    images = jax.ShapeDtypeStruct((num_images, size, size, 3), network.dtype)
    labels = jax.ShapeDtypeStruct((num_images,), jnp.int32)
    variables = jax.eval_shape(network.init, jax.random.key(0), images)
    opt_state = jax.eval_shape(optimizer.init, variables["params"])
    stacked = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((mesh.size, *x.shape), x.dtype),
        variables["batch_stats"],
    )
    everywhere, share = PartitionSpec(), PartitionSpec(DATA_AXIS)
    step = jax.shard_map(
        step_of(network, optimizer),
        mesh=mesh,
        in_specs=(everywhere, share, everywhere, share, share),
        out_specs=(everywhere, share, everywhere, everywhere),
        check_vma=False,
    )
    shapes = (variables["params"], stacked, opt_state, images, labels)
    return jax.jit(step, donate_argnums=(0, 1, 2)), shapes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--device_batch_size", type=int, default=128)
    parser.add_argument("--num_classes", type=int, default=7178)
    parser.add_argument("--largest", action="store_true")
    args = parser.parse_args()
    topology = absent(args.topology)
    network = ResNet50(args.num_classes)

    @cache
    def figures(device_batch_size: int) -> Figures:
        num_images = device_batch_size * topology.num_devices
        step, shapes = make_step(network, topology.mesh, num_images, SIZE)
        return figures_of(step.lower(*shapes))

    first = figures(args.device_batch_size)
    for line in report(first, topology, args.device_batch_size, 0):
        print(line)
    if args.largest:

        def total_bytes(size: int) -> float | None:
            try:
                return figures(size).total_bytes
            except DoesNotFit:
                return None

        largest = largest_batch(
            total_bytes, start=args.device_batch_size, hbm_bytes=topology.hbm_bytes
        )
        print(f"largest   {largest[0]} images per device fit")


if __name__ == "__main__":
    main()
