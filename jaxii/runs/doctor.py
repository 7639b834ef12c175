"""`doctor`: what this machine has, whether it works, and what would limit a run."""

import os
import time
from dataclasses import replace
from pathlib import Path

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
from jaxii.runs.plan import Facts, batch_shapes, facts_of
from jaxii.storage import AnyPath
from jaxii.train.sharding import state_shardings
from jaxii.train.step import make_train_step

INPUT_SECONDS, STEP_SECONDS = 1.0, 1.0
# What is measured where no recipe is given: a data set as many are.
USUAL = {"num_images": 10_000, "num_labels": 100, "short_side": 256}
# Images a second a chip at best, ResNet-50 at 224 pixels: the README's plan of a v5e.
V5E_IMAGES = 4_200
CPU_PIXELS = 64 * 64**2


def doctor(config: Config | None, *, place: AnyPath) -> None:
    """Looks at this machine and says what would limit a run.

    Args:
      config: of the run, with its data where it has been prepared; None for a recipe
        as `new` would write it.
      place: where a run would write.

    Raises:
      CheckFailed: something is broken.
    """
    findings = [checks.versions(), checks.devices()]
    if isinstance(place, Path):
        findings.append(checks.disk(place))
    # `main` has set it, where nobody else has.
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    findings.append(checks.compilation_cache(cache))
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
    """Measures input and step; returns what they are and which of them limits."""
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
    if jax.default_backend() == "cpu" and size < 224:
        data = replace(config.data, image_size_pixels=224)
        large = _input(replace(config, data=data), source)
        lines.append(
            f"          input at 224 pixels: {large:,.0f} images/s; a v5e chip takes "
            f"up to {V5E_IMAGES:,} with ResNet-50"
        )
    return lines


def _smaller_batch(config: Config) -> Config:
    """Returns a step for CPUs that is no longer than one of 64 images of 64 pixels.

    That of a recipe for accelerators would take minutes, at as many images a second.
    """
    num_devices = jax.device_count()
    most = max(1, CPU_PIXELS // config.data.image_size_pixels**2 // num_devices)
    size = min(config.global_batch_size, most * num_devices)
    return replace(config, global_batch_size=size, micro_batches=1)


def _limit(given: float, taken: float, platform: str) -> str:
    if platform == "cpu":
        # Both want the same cores, one after the other.
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
    """Returns records to decode, what shapes depend on, and where they come from."""
    is_drawn = config.data.dataset == "toy_regions"
    absent = "no data was given"
    if config.data.directory or is_drawn:
        directory: AnyPath = assembly.data_directory(config)
        # Opening would draw it, which takes a minute.
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
    """Times the step that does most; returns images a second and the first one's."""
    stages = assembly.stages_of(config, lambda split: facts.num_images)
    stage = max(stages, key=lambda s: (s.trainable == "all", s.embedding_head))
    dim = config.label_embedding.dim if stage.embedding_head else 0
    (plan,) = assembly.make_plans(
        config, (stage,), num_classes=facts.num_classes, embedding_dim=dim
    )
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
    if dim:
        vectors = jax.device_put(
            rng.normal(size=(facts.num_classes, dim)).astype(np.float32),
            replicated(mesh),
        )
    on_devices = jax.device_put(batch, divided(mesh))
    train_step = make_train_step(plan.settings, mesh)
    key = jax.random.key(0)
    shapes = jax.eval_shape(plan.fresh_state, key)
    shardings = state_shardings(shapes, mesh, plan.settings.shard_state)
    state = jax.jit(plan.fresh_state, out_shardings=shardings)(key)
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
