"""`plan`: what a configuration's train step takes of devices that need not be there.

Called by `main` with a checked configuration; compiles, prints, and writes nothing.
"""

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
    Largest,
    Shapes,
    largest_batch,
    step_compiler,
)
from jaxii.planner.topology import Topology
from jaxii.runs import assembly
from jaxii.train.stages import Stage
from jaxii.train.trainer import StagePlan

# dataset -> classes and training images of the files as they were published.
PUBLISHED = {"kaggle": (7178, 1_743_042), "open_images_v4": (7186, 1_743_042)}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What shapes and lengths depend on beside the configuration.

    Attributes:
      num_classes: labels.
      num_slots: labels that an image carries to the device.
      num_images: of the training split.
      source: where these come from, in plan_text.
    """

    num_classes: int
    num_slots: int
    num_images: int
    source: str


def plan(
    config: Config,
    topology: Sequence[str],
    device_batch_size: int,
    stage: str,
    quick: bool,
) -> None:
    """Compiles the step for each topology and prints what it takes.

    Args:
      config: checked.
      topology: slices of TPUs, or "local".
      device_batch_size: images a device; 0 for the configuration's batch over the
        devices of the first topology.
      stage: whose step; "" for that which does most.
      quick: do not look for the largest batch that fits.

    Raises:
      InputError: what cannot be planned, and a step that does not fit.
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
            f"--device_batch_size={device_batch_size} does not divide over "
            f"{micro_batches} micro-batches; use a multiple of {micro_batches}."
        )
    facts = facts_of(config)
    steps = [
        _Step(config=config, facts=facts, topology=one, stage_name=stage)
        for one in devices
    ]
    say(f"step      {steps[0].description()}")
    say(
        f"data      {facts.num_classes:,} classes, {facts.num_images:,} training "
        f"images, {facts.num_slots} slots for labels an image: {facts.source}"
    )
    if len(steps) == 1:
        _report(steps[0], device_batch_size, quick)
    else:
        _table(steps, device_batch_size)


def facts_of(config: Config) -> Facts:
    """Returns what the prepared data says, or else what is known of the published."""
    dataset = config.data.dataset
    if config.data.directory or dataset not in PUBLISHED:
        data = assembly.open_data(config)
        assembly.label_embedding_dim(config, data)
        return Facts(
            num_classes=len(data.vocabulary),
            num_slots=assembly.slots(config, data.train_rows),
            num_images=data.split("train").num_examples,
            source=f"read from {data.directory}",
        )
    num_classes, num_images = PUBLISHED[dataset]
    return Facts(
        num_classes=num_classes,
        num_slots=config.data.most_labels,
        num_images=round(num_images * (1 - config.data.validation_fraction)),
        source="assumed, those of Open Images; --data_dir=DIR reads yours",
    )


def batch_shapes(
    config: Config, facts: Facts, global_batch_size: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a batch that `assembly.train_batches` would yield."""
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


@dataclass(kw_only=True)
class _Step:
    """A stage's step on a topology."""

    config: Config
    facts: Facts
    topology: Topology
    stage_name: str

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        return assembly.stages_of(self.config, lambda split: self.facts.num_images)

    @cached_property
    def stage(self) -> Stage:
        """The stage of that name, or the one whose step does most."""
        names = [stage.name for stage in self.stages]
        if self.stage_name in names:
            return self.stages[names.index(self.stage_name)]
        if self.stage_name:
            raise InputError(
                f"--stage={self.stage_name} is not a stage of this recipe; "
                f"{nearest(self.stage_name, names)}use "
                f"{', '.join(names)}."
            )
        return max(
            self.stages,
            key=lambda s: (s.trainable == "all", s.embedding_head, len(s.terms)),
        )

    def description(self) -> str:
        """Returns what is compiled, in plan_text."""
        model = self.config.model
        head = "with" if self.stage.embedding_head else "without"
        return (
            f"of stage {self.stage.name}: {model.variant} {model.depth} {head} "
            f"embedding head, {self.config.data.image_size_pixels} pixels, "
            f"{model.compute_dtype}, BatchNorm statistics: {model.batch_norm}, "
            f"{self.config.optimizer.name}"
        )

    @property
    def _embedding_dim(self) -> int:
        return self.config.label_embedding.dim if self.stage.embedding_head else 0

    @cached_property
    def stage_plan(self) -> StagePlan:
        """The stage with its parts, as training assembles it."""
        (plan,) = assembly.make_plans(
            self.config,
            (self.stage,),
            num_classes=self.facts.num_classes,
            embedding_dim=self._embedding_dim,
            platform=None if self.topology.name == topologies.LOCAL else "tpu",
        )
        return plan

    @cached_property
    def _compile(self) -> Callable[[Shapes], Figures]:
        vectors = None
        if self._embedding_dim:
            shape = (self.facts.num_classes, self._embedding_dim)
            vectors = jax.ShapeDtypeStruct(shape, jnp.float32)
        return step_compiler(self.stage_plan, self.topology.mesh, vectors)

    def figures(self, device_batch_size: int) -> Figures:
        """Compiles the step for so many images a device; raises `DoesNotFit`."""
        size = device_batch_size * self.topology.num_devices
        return self._compile(batch_shapes(self.config, self.facts, size))

    def largest(self, start: int, known: Figures | None) -> Largest | None:
        """Looks for the largest batch, from one that may be known to fit."""
        if self.topology.hbm_bytes is None:
            return None
        totals = {} if known is None else {start: known.total_bytes}

        def total_bytes(size: int) -> float | None:
            if size in totals:
                return totals[size]
            try:
                return self.figures(size).total_bytes
            except DoesNotFit:
                return None

        return largest_batch(
            total_bytes,
            start=start,
            hbm_bytes=self.topology.hbm_bytes,
            micro_batches=self.config.micro_batches,
        )


def _report(step: _Step, device_batch_size: int, quick: bool) -> None:
    topology, micro_batches = step.topology, step.config.micro_batches
    say(
        f"devices   {topology.name}: {topology.num_devices} x {topology.device_kind}; "
        f"{device_batch_size} images each, "
        f"{device_batch_size * topology.num_devices:,} a step"
    )
    try:
        figures = step.figures(device_batch_size)
    except DoesNotFit as error:
        figures, start = None, device_batch_size // 2 // micro_batches * micro_batches
        say(f"memory    does not fit: {error}")
    else:
        start = device_batch_size
        num_steps = sum(stage.num_steps for stage in step.stages)
        images = num_steps * step.config.global_batch_size
        for line in plan_text.report(figures, topology, device_batch_size, images):
            say(line)
    largest = None if quick or not start else step.largest(start, figures)
    if largest is not None:
        for line in plan_text.found(largest):
            say(line)
    if figures is None:
        fits = largest.device_batch_size if largest is not None else "less"
        raise _refusal(device_batch_size, topology.name, fits)


def _table(steps: list[_Step], device_batch_size: int) -> None:
    say(
        f"batch     {device_batch_size} images a chip on every topology; efficiency is "
        "the share of a step that is not collectives"
    )
    say(plan_text.HEADER)
    refused = []
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
        raise _refusal(device_batch_size, ", ".join(refused), "less")


def _refusal(device_batch_size: int, where: str, fits: int | str) -> InputError:
    return InputError(
        f"{device_batch_size} images a device do not fit {where}; use "
        f"--device_batch_size={fits}, or slices of a batch by --config.micro_batches."
    )
