"""`plan`: memory, work and speed of a train step on devices that need not exist."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp

from jaxii.config import Config
from jaxii.console import say
from jaxii.data.pipeline import POSITIONS
from jaxii.distributed.mesh import check_batch_size, check_group
from jaxii.errors import InputError, nearest
from jaxii.planner import plan_text
from jaxii.planner import topology as topologies
from jaxii.planner.compiled import (
    DoesNotFit,
    Figures,
    Shapes,
    largest_batch,
    step_compiler,
)
from jaxii.planner.topology import GIB, Topology
from jaxii.runs import assembly
from jaxii.train.stages import Stage
from jaxii.train.trainer import StagePlan

# Dataset -> classes and training images of the published files.
PUBLISHED = {"kaggle": (7178, 1_743_042), "open_images_v4": (7186, 1_743_042)}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Sizes of the data that determine the shapes of a step.

    Attributes:
      num_classes: Number of labels.
      num_slots: Labels per image that are sent to the devices.
      num_images: Number of training images.
      source: Where the numbers come from, as text.
      num_tuning_images: Number of images of the split tuning; None if unknown.
    """

    num_classes: int
    num_slots: int
    num_images: int
    source: str
    num_tuning_images: int | None = None


def plan(
    config: Config,
    topology: Sequence[str],
    device_batch_size: int,
    stage: str,
    quick: bool,
) -> None:
    """Compiles the train step for each topology and prints what it needs.

    Args:
      config: The checked configuration.
      topology: Names of TPU slices, or "local".
      device_batch_size: Images per device; 0 for the configuration's batch over the
        devices of the first topology.
      stage: The stage to compile; "" for the largest.
      quick: Do not search for the largest batch that fits.

    Raises:
      InputError: If the step does not fit, or an argument is invalid.
    """
    devices = [
        topologies.local() if name == topologies.LOCAL else topologies.absent(name)
        for name in topology
    ]
    for one in devices:
        check_group(assembly.batch_norm_group(config.model), one.num_devices)
    micro_batches = config.micro_batches
    if not device_batch_size:
        num_devices = devices[0].num_devices
        check_batch_size(config.global_batch_size, num_devices, micro_batches)
        device_batch_size = config.global_batch_size // num_devices
    if device_batch_size % micro_batches:
        raise InputError(
            f"--device_batch_size={device_batch_size} is not divisible by "
            f"{micro_batches} micro-batches; use a multiple of {micro_batches}."
        )
    facts = facts_of(config)
    chosen = choose_stage(config, facts, stage)
    head = "with" if chosen.embedding_head else "without"
    say(
        f"step      stage {chosen.name}: {config.model.variant} "
        f"{config.model.depth} {head} embedding head, "
        f"{config.data.image_size_pixels} pixels, {config.model.compute_dtype}, "
        f"BatchNorm statistics: {config.model.batch_norm}, {config.optimizer.name}"
    )
    say(
        f"data      {facts.num_classes:,} classes, {facts.num_images:,} training "
        f"images, up to {facts.num_slots} labels per image: {facts.source}"
    )
    steps = [
        _Step(config=config, facts=facts, stage=chosen, topology=one) for one in devices
    ]
    if len(steps) == 1:
        _report(steps[0], device_batch_size, quick)
    else:
        _table(steps, device_batch_size)


def facts_of(config: Config) -> Facts:
    """Returns the sizes of the prepared data, or of the published dataset.

    Raises:
      InputError: If the data cannot be read, or has no images for a stage.
    """
    dataset = config.data.dataset
    if config.data.directory or dataset not in PUBLISHED:
        data = assembly.open_data(config)
        assembly.label_embedding_dim(config, data)
        tunes = any(stage.split == "tuning" for stage in config.stages)
        return Facts(
            num_classes=len(data.vocabulary),
            num_slots=assembly.slots(config, data.train_rows),
            num_images=data.split("train").num_examples,
            source=f"read from {data.directory}",
            num_tuning_images=data.split("tuning").num_examples if tunes else None,
        )
    num_classes, num_images = PUBLISHED[dataset]
    return Facts(
        num_classes=num_classes,
        num_slots=config.data.most_labels,
        num_images=round(num_images * (1 - config.data.validation_fraction)),
        source="assumed from Open Images; use --data_dir=DIR to read your data",
    )


def batch_shapes(
    config: Config, facts: Facts, global_batch_size: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a batch of `assembly.train_batches`."""
    size = config.data.image_size_pixels
    shapes = {
        "images": ((size, size, 3), jnp.uint8),
        "label_ids": ((facts.num_slots,), jnp.int32),
        "label_confidences": ((facts.num_slots,), jnp.float32),
        "mask": ((), jnp.float32),
        POSITIONS: ((), jnp.int32),
    }
    return {
        name: jax.ShapeDtypeStruct((global_batch_size, *shape), dtype)
        for name, (shape, dtype) in shapes.items()
    }


def choose_stage(config: Config, facts: Facts, name: str = "") -> Stage:
    """Returns the stage called `name`; "" for the one whose step does the most work.

    Raises:
      InputError: If there is no such stage.
    """
    stages = {stage.name: stage for stage in _stages(config, facts)}
    if name and name not in stages:
        raise InputError(
            f"--stage={name} is not a stage of this recipe; {nearest(name, stages)}use "
            f"{', '.join(stages)}."
        )
    if name:
        return stages[name]
    return max(
        stages.values(),
        key=lambda s: (s.trainable == "all", s.embedding_head, len(s.terms)),
    )


def plan_stage(
    config: Config, facts: Facts, stage: Stage, platform: str | None = None
) -> tuple[StagePlan, jax.ShapeDtypeStruct | None]:
    """Returns a stage as training assembles it, and the shape of its label embeddings.

    Args:
      config: The configuration.
      facts: Sizes of the data.
      stage: The stage.
      platform: The platform to compile for; None for that of this process.
    """
    dim = config.label_embedding.dim if stage.embedding_head else 0
    (plan,) = assembly.make_plans(
        config,
        (stage,),
        num_classes=facts.num_classes,
        embedding_dim=dim,
        platform=platform,
    )
    shape = jax.ShapeDtypeStruct((facts.num_classes, dim), jnp.float32)
    return plan, shape if dim else None


def _stages(config: Config, facts: Facts) -> tuple[Stage, ...]:
    counts = {"train": facts.num_images, "tuning": facts.num_tuning_images or 0}
    return assembly.stages_of(config, counts.__getitem__)


def _run_images(config: Config, facts: Facts) -> tuple[int, list[str]]:
    """Returns the images of the stages of known length, and the names of the others."""
    unknown = [
        stage.name
        for stage in config.stages
        if stage.split == "tuning"
        and not stage.num_steps
        and facts.num_tuning_images is None
    ]
    num_steps = sum(
        stage.num_steps for stage in _stages(config, facts) if stage.name not in unknown
    )
    return num_steps * config.global_batch_size, unknown


@dataclass(kw_only=True)
class _Step:
    """A stage's train step on a topology."""

    config: Config
    facts: Facts
    stage: Stage
    topology: Topology

    @cached_property
    def _compile(self) -> Callable[[Shapes], Figures]:
        platform = None if self.topology.name == topologies.LOCAL else "tpu"
        planned, vectors = plan_stage(self.config, self.facts, self.stage, platform)
        return step_compiler(
            planned, self.topology.mesh, vectors, self.topology.hbm_bytes
        )

    def figures(self, device_batch_size: int) -> Figures:
        """Compiles the step for a batch size per device; raises `DoesNotFit`."""
        size = device_batch_size * self.topology.num_devices
        return self._compile(batch_shapes(self.config, self.facts, size))


def _report(step: _Step, device_batch_size: int, quick: bool) -> None:
    topology, config = step.topology, step.config
    say(
        f"devices   {topology.name}: {topology.num_devices} x {topology.device_kind}; "
        f"{device_batch_size} images per device, "
        f"{device_batch_size * topology.num_devices:,} per step"
    )
    figures: Figures | None = None
    known: dict[int, float | None] = {}
    try:
        figures = step.figures(device_batch_size)
    except DoesNotFit as error:
        known[device_batch_size] = None
        say(f"memory    does not fit: {error}")
    else:
        known[device_batch_size] = figures.total_bytes
        run = _run_images(config, step.facts)
        for line in plan_text.report(figures, topology, device_batch_size, *run):
            say(line)

    def total_bytes(size: int) -> float | None:
        if size in known:
            return known[size]
        try:
            return step.figures(size).total_bytes
        except DoesNotFit:
            return None

    largest = None
    if not quick and topology.hbm_bytes is not None:
        largest = largest_batch(
            total_bytes,
            start=device_batch_size,
            hbm_bytes=topology.hbm_bytes,
            micro_batches=config.micro_batches,
        )
    if largest is not None:
        say(
            f"largest   {largest[0]} images per device fit, in "
            f"{largest[1] / GIB:.2f} GiB (compiled)"
        )
    if figures is None:
        fits = None if largest is None else largest[0]
        raise _refusal(device_batch_size, topology.name, fits)


def _table(steps: list[_Step], device_batch_size: int) -> None:
    say(
        f"batch     {device_batch_size} images per chip on every topology; efficiency "
        "is the share of a step not spent in collectives"
    )
    say(plan_text.HEADER)
    refused: list[str] = []
    for step in steps:
        try:
            figures = step.figures(device_batch_size)
        except DoesNotFit:
            figures = None
            refused.append(step.topology.name)
        say(plan_text.row(figures, step.topology, device_batch_size))
    for line in plan_text.ASSUMED:
        say(line)
    if refused:
        raise _refusal(device_batch_size, ", ".join(refused), None)


def _refusal(device_batch_size: int, where: str, fits: int | None) -> InputError:
    size = f"--device_batch_size={fits}" if fits else "a smaller --device_batch_size"
    return InputError(
        f"{device_batch_size} images per device do not fit on {where}; use {size}, or "
        "split the batch with --config.micro_batches."
    )
