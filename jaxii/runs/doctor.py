"""`doctor`: checks this machine and measures what would limit a run."""

# JAX's functions are partly untyped.
# pyright: reportUnknownMemberType=false

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import cast

import jax
import numpy as np

from jaxii.config import Config, default_config
from jaxii.console import say
from jaxii.data import folder
from jaxii.data.records import RandomAccess
from jaxii.data.transforms import TrainTransform
from jaxii.distributed.mesh import divided, make_mesh, replicated
from jaxii.doctor import checks, speed
from jaxii.errors import CheckFailed
from jaxii.prepare import recipe as recipes
from jaxii.runs import assembly
from jaxii.runs.plan import (
    Facts,
    batch_shapes,
    choose_stage,
    facts_of,
    plan_stage,
)
from jaxii.storage import AnyPath
from jaxii.train.sharding import state_shardings
from jaxii.train.state import TrainState
from jaxii.train.step import make_train_step

INPUT_SECONDS, STEP_SECONDS = 1.0, 1.0
# The dataset that is assumed without a recipe.
USUAL = {"num_images": 10_000, "num_labels": 100, "short_side": 256}
# Largest batch that is timed on CPUs, as 64 images of 64 pixels.
CPU_PIXELS = 64 * 64**2


def doctor(config: Config | None, *, place: AnyPath) -> None:
    """Prints versions, devices, free space, and the speed of input and step.

    Args:
      config: The run's configuration; None for a recipe as `new` would write it.
      place: The folder of the run's workdir.

    Raises:
      CheckFailed: If a check fails.
    """
    findings = [checks.versions(), checks.devices()]
    if isinstance(place, Path):
        findings.append(checks.disk(place))
    broken = [text for finding in findings for text in finding.broken]
    for line in (line for finding in findings for line in finding.lines):
        say(line)
    if findings[1].lines:
        if config is not None:
            assembly.check_before_data(config)
        what = "a usual recipe's" if config is None else "the recipe's"
        for line in _speeds(_usual_config() if config is None else config, what):
            say(line)
    for text in broken:
        say(f"BROKEN    {text}")
    if broken:
        raise CheckFailed(f"{len(broken)} things to mend; see BROKEN above.")
    say("all is well")


def _speeds(config: Config, what: str) -> list[str]:
    """Measures input and step, and returns lines with both and the limit."""
    source, facts, of = _data(config)
    size = config.data.image_size_pixels
    cores = _num_cores()
    given = _input(config, source)
    lines = [
        f"input     {given:,.0f} images/s of {size} pixels, on {cores} cores "
        f"({given / cores:,.0f} a core): {of}"
    ]
    if jax.default_backend() == "cpu":
        config = _smaller_batch(config)
    taken, compile_seconds = _step(config, facts)
    model = config.model
    lines.append(
        f"step      {taken:,.0f} images/s: {what} {model.variant} {model.depth}, width "
        f"{model.width}, {size} pixels, {config.global_batch_size} images a step "
        f"(first step {compile_seconds:.0f} s)"
    )
    lines.append(_limit(given, taken, jax.default_backend()))
    return lines


def _smaller_batch(config: Config) -> Config:
    """Returns the configuration with a batch of at most `CPU_PIXELS`.

    A step of a recipe for accelerators would take minutes on a CPU.
    """
    num_devices = jax.device_count()
    most = max(1, CPU_PIXELS // config.data.image_size_pixels**2 // num_devices)
    size = min(config.global_batch_size, most * num_devices)
    return replace(config, global_batch_size=size, micro_batches=1)


def _limit(given: float, taken: float, platform: str) -> str:
    if platform == "cpu":
        # Both use the same cores, one after the other.
        both = 1 / (1 / given + 1 / taken)
        return (
            f"limit     about {both:,.0f} images/s: input and step share the cores, "
            f"and the step takes {both / taken:.0%} of the time"
        )
    if given < taken:
        return (
            f"limit     the input: {taken / given:.1f} times as many cores would keep "
            "the devices busy"
        )
    return f"limit     the step: the input is {given / taken:.1f} times as fast"


def _input(config: Config, source: RandomAccess) -> float:
    transform = TrainTransform(
        size_pixels=config.data.image_size_pixels,
        strength=config.data.augmentation,
        mirror=config.data.mirror,
    )
    threads = config.data.num_threads
    return speed.input_speed(source, transform, threads, INPUT_SECONDS)


def _usual_config() -> Config:
    config = default_config()
    facts = recipes.Facts(
        name="usual",
        num_groups=USUAL["num_images"],
        several_labels=1.0,
        has_validation=False,
        platform=jax.default_backend(),
        num_devices=jax.device_count(),
        num_cores=_num_cores(),
        **USUAL,
    )
    choices = recipes.choose(facts).choices
    values = {choice.field: choice.value for choice in choices}
    config.update_from_flattened_dict({"data.dataset": "kaggle", **values})
    terms = {"bce": 1.0, "embedding": 1.0}
    config.stages = (
        {"name": "both", "num_epochs": 1.0, "embedding_head": True, "terms": terms},
    )
    return Config.resolve(config)


def _data(config: Config) -> tuple[RandomAccess, Facts, str]:
    """Returns records to decode, their sizes, and their source as text."""
    is_drawn = config.data.dataset == "toy_regions"
    absent = "no data was given"
    if config.data.directory or is_drawn:
        directory: AnyPath = assembly.data_directory(config)
        # Opening a dataset that is not drawn yet would draw it, which takes a minute.
        if (directory / folder.INFO_FILE).exists() if is_drawn else directory.is_dir():
            data = assembly.open_data(config)
            source = data.split("train").source
            return source, facts_of(config), f"training images of {directory}"
        absent = f"{directory} is not there yet"
    dim = config.label_embedding.dim
    facts = Facts(
        num_classes=max(dim, USUAL["num_labels"]),
        num_slots=8,
        num_images=USUAL["num_images"],
        source="",
    )
    drawn = f"JPEGs of {speed.WIDTH}x{speed.HEIGHT} in memory, for {absent}"
    return speed.Drawn(), facts, drawn


def _step(config: Config, facts: Facts) -> tuple[float, float]:
    """Times the largest stage's step.

    Returns:
      Images per second, and the seconds of the first step, which compiles.
    """
    stage = choose_stage(config, facts)
    planned, vector_shape = plan_stage(config, facts, stage)
    mesh, size = make_mesh(), config.global_batch_size
    rng = np.random.default_rng(0)
    batch = {
        name: np.zeros(shape.shape, shape.dtype)
        for name, shape in batch_shapes(config, facts, size).items()
    }
    batch["images"] = rng.integers(0, 256, batch["images"].shape, np.uint8)
    batch["label_confidences"][:, :4] = 1.0
    batch["mask"][:] = 1.0
    vectors = None
    if vector_shape is not None:
        shape = cast(tuple[int, ...], vector_shape.shape)
        drawn = rng.normal(size=shape).astype(np.float32)
        vectors = jax.device_put(drawn, replicated(mesh))
    on_devices = jax.device_put(batch, divided(mesh))
    train_step = make_train_step(planned.settings, mesh)
    key = jax.random.key(0)
    shapes = jax.eval_shape(planned.fresh_state, key)
    shardings = state_shardings(shapes, mesh, planned.settings.shard_state)
    make_state = jax.jit(planned.fresh_state, out_shardings=shardings)
    state = cast(TrainState, make_state(key))
    start = time.perf_counter()
    state, metrics = train_step(state, on_devices, vectors)
    jax.block_until_ready(metrics)
    first = time.perf_counter() - start
    done, start = 0, time.perf_counter()
    while (taken := time.perf_counter() - start) < STEP_SECONDS or not done:
        state, metrics = train_step(state, on_devices, vectors)
        jax.block_until_ready(metrics)
        done += size
    return done / taken, first


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
