"""Speed of the input pipeline and of the train step, measured on this machine."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh

from jaxii.config import Config, default_config
from jaxii.data.dataset import open_dataset
from jaxii.data.records import RandomAccess
from jaxii.data.transforms import TrainTransform
from jaxii.distributed.mesh import divided, make_mesh, replicated
from jaxii.doctor.speed import input_speed
from jaxii.prepare.recipe import Pace
from jaxii.prepare.threads import num_cores
from jaxii.runs.plan import Facts, batch_shapes, choose_stage, plan_stage
from jaxii.train.sharding import make_state
from jaxii.train.step import make_train_step

INPUT_SECONDS, STEP_SECONDS = 1.0, 1.0
# Largest number of pixels of a batch that is timed on CPUs: 64 images of 64 x 64.
CPU_PIXELS = 64 * 64**2


@dataclass(frozen=True, kw_only=True)
class Speed:
    """The measured speed of a recipe on this machine.

    Attributes:
      input: Images per second of the input pipeline.
      step: Images per second of the train step.
      first_step_seconds: Duration of the first step, which compiles.
      batch_size: Images per measured step.
    """

    input: float
    step: float
    first_step_seconds: float
    batch_size: int

    @property
    def images_per_second(self) -> float:
        """Images per second of training: on CPUs, input and step share the cores."""
        if jax.default_backend() == "cpu":
            return 1 / (1 / self.input + 1 / self.step)
        return min(self.input, self.step)


def pace_of(fields: Mapping[str, Any]) -> Pace:
    """Measures a recipe for `new` on its prepared data.

    Args:
      fields: Fields of the configuration that differ from their defaults.
    """
    recipe: Any = default_config()
    recipe.update_from_flattened_dict(dict(fields))
    config = Config.resolve(recipe)
    # Opened without carving out `validation`, which may be impossible.
    dataset = open_dataset(config.data.directory)
    source = dataset.splits["train"].source
    facts = Facts(
        num_classes=len(dataset.vocabulary),
        num_slots=8,
        num_images=len(source),
        source="",
    )
    start = time.perf_counter()
    measured = measure(config, source, facts)
    return Pace(
        images_per_second=measured.images_per_second,
        start_seconds=time.perf_counter() - start,
    )


def measure(config: Config, source: RandomAccess, facts: Facts) -> Speed:
    """Times the input and the largest stage's step.

    Args:
      config: The run's configuration.
      source: Records to decode.
      facts: Sizes of the data.
    """
    given = _input(config, source)
    if jax.default_backend() == "cpu":
        config = smaller_batch(config)
    taken, first = _step(config, facts)
    return Speed(
        input=given,
        step=taken,
        first_step_seconds=first,
        batch_size=config.global_batch_size,
    )


def smaller_batch(config: Config) -> Config:
    """Returns the configuration with at most `CPU_PIXELS` per batch.

    A step of a recipe for accelerators would take minutes on a CPU.
    """
    num_devices = jax.device_count()
    most = max(1, CPU_PIXELS // config.data.image_size_pixels**2 // num_devices)
    size = min(config.global_batch_size, most * num_devices)
    return replace(config, global_batch_size=size, micro_batches=1)


def _input(config: Config, source: RandomAccess) -> float:
    transform = TrainTransform(
        size_pixels=config.data.image_size_pixels,
        strength=config.data.augmentation,
        mirror=config.data.mirror,
    )
    # On all cores, because `Speed.images_per_second` shares them with the step.
    threads = config.data.num_threads or num_cores()
    return input_speed(source, transform, threads, INPUT_SECONDS)


def _step(config: Config, facts: Facts) -> tuple[float, float]:
    """Times the largest stage's step.

    Returns:
      Images per second, and the seconds of the first step, which compiles.
    """
    step, size = ResidentStep(config, facts, make_mesh()), config.global_batch_size
    start = time.perf_counter()
    jax.block_until_ready(step())
    first = time.perf_counter() - start
    done, start = 0, time.perf_counter()
    while (taken := time.perf_counter() - start) < STEP_SECONDS or not done:
        jax.block_until_ready(step())
        done += size
    return done / taken, first


class ResidentStep:
    """The train step of the largest stage, on a batch that stays on the devices.

    A call trains one step and returns its metrics.

    Args:
      config: The run's configuration.
      facts: Sizes of the data.
      mesh: The devices.

    Attributes:
      train_step: See `make_train_step`.
      state: The state after the steps so far.
      given: The other arguments of the train step.
    """

    def __init__(self, config: Config, facts: Facts, mesh: Mesh):
        stage = choose_stage(config, facts)
        planned, vector_shape = plan_stage(config, facts, stage)
        rng = np.random.default_rng(0)
        shapes = batch_shapes(config, facts, config.global_batch_size)
        batch = {name: np.zeros(s.shape, s.dtype) for name, s in shapes.items()}
        batch["images"] = rng.integers(0, 256, batch["images"].shape, np.uint8)
        batch["label_confidences"][:, :4] = 1.0
        batch["mask"][:] = 1.0
        vectors = None
        if vector_shape is not None:
            shape = cast(tuple[int, ...], vector_shape.shape)
            drawn = rng.normal(size=shape).astype(np.float32)
            vectors = jax.device_put(drawn, replicated(mesh))
        self.given = jax.device_put(batch, divided(mesh)), vectors
        self.train_step = make_train_step(planned.settings, mesh)
        self.state = make_state(
            planned.fresh_state, mesh, planned.settings.shard_state, jax.random.key(0)
        )

    def __call__(self) -> dict[str, jax.Array]:
        self.state, metrics = self.train_step(self.state, *self.given)
        return metrics
