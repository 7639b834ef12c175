"""Times the network of evaluation and prediction beside PyTorch and onnxruntime.

    python -m tests.benchmarks.predict_step

ResNet-50 with 7,178 classes, from pixels to probabilities, on one resident batch of 32
uint8 images of 224 pixels. jaxii compiles it as `evaluate` and `predict` do, in float32
and bfloat16. PyTorch runs torchvision's network (channels last, inference mode,
autocast for bfloat16, torch.compile on GPUs) in its own process; onnxruntime runs the
model that `export` writes, in float32, on CPUs. All take turns; the figures are
medians. Takes two minutes.
"""

import argparse
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxii.distributed.mesh import make_mesh
from jaxii.evaluation.predictor import Model, make_predict
from jaxii.export import programs
from jaxii.export.onnx_graph import packages
from jaxii.models.multitask import make_network
from tests.benchmarks.steps import Steps, contestants, medians, timed
from tests.benchmarks.table import Row, emit
from tests.benchmarks.train_step import NUM_CLASSES

BATCH, SIZE = 32, 224
DTYPES = ("float32", "bfloat16")
BAR = 1.0


def make_model(dtype: str, platform: str | None = None) -> Model:
    """Returns ResNet-50 with random parameters, computing in `dtype`."""
    network = make_network(
        depth=50,
        num_classes=NUM_CLASSES,
        embedding_dim=0,
        dtype=jnp.dtype(dtype),
        platform=platform,
    )
    params, batch_stats = jax.jit(network.init)(jax.random.key(0))
    return Model(
        apply=network.apply,
        params=params,
        batch_stats=batch_stats,
        compiler_options=network.compiler_options,
    )


def images(batch: int, size: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (batch, size, size, 3), np.uint8)


def our_steps(dtype: str, batch: int, size: int) -> Steps:
    """Returns steps that predict one resident batch."""
    predict = make_predict([make_model(dtype)], make_mesh(jax.devices()[:1]))
    resident = jnp.asarray(images(batch, size))
    return timed(lambda: predict(resident)[0])


def onnx_steps(dtype: str, batch: int, size: int) -> Steps:
    """Returns the same steps in onnxruntime, with the model that `export` writes."""
    _, onnxruntime = packages()
    options = onnxruntime.SessionOptions()
    # Spinning threads would take cores from the next contestant.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        programs.onnx(make_model(dtype, platform="any"), size, {}),
        options,
        providers=["CPUExecutionProvider"],
    )
    resident = {programs.INPUT: images(batch, size)}
    return timed(lambda: session.run(None, resident))


def measure(
    dtype: str, batch: int, size: int, *, rounds: int, number: int, torch: bool = True
) -> dict[str, float]:
    """Returns the seconds per batch of "jaxii", "torch" and, on CPUs, "onnx"."""
    makers = {"jaxii": our_steps}
    if jax.default_backend() == "cpu" and dtype == "float32":
        makers["onnx"] = onnx_steps
    script = "predict_step.py" if torch else None
    with contestants(makers, dtype, batch, size, torch=script) as every:
        return medians(every, rounds, number)


def rows(
    batch: int, size: int, seconds: Mapping[str, Mapping[str, float]]
) -> Iterator[Row]:
    """Yields jaxii's best type against each peer's best type."""
    best = min(seconds, key=lambda dtype: seconds[dtype]["jaxii"])
    ours = seconds[best]["jaxii"]
    for peer, name in {"torch": "PyTorch", "onnx": "onnxruntime"}.items():
        taken = {dtype: each[peer] for dtype, each in seconds.items() if peer in each}
        if not taken:
            continue
        its = min(taken, key=lambda dtype: taken[dtype])
        yield Row(
            f"prediction, ResNet-50, {batch} images of {size} pixels, against {name}",
            f"{batch / ours:.1f} images/s ({best})",
            f"{name}, {batch / taken[its]:.1f} images/s ({its})",
            taken[its] / ours,
            ">=",
            BAR,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    seconds = {}
    for dtype in DTYPES:
        seconds[dtype] = measure(dtype, BATCH, SIZE, rounds=args.rounds, number=1)
        told = ", ".join(
            f"{name} {BATCH / each:.1f}" for name, each in seconds[dtype].items()
        )
        print(f"{dtype}: {told} images/s")
    emit(*rows(BATCH, SIZE, seconds))


if __name__ == "__main__":
    main()
