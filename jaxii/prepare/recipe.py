"""Chooses a recipe for a dataset, with a reason for every field.

The choices for small data were made on three held-out training domains of emoji and
drawings; the choices for accelerators are not measured. See configs/README.md.
"""

import json
import math
import pprint
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from jaxii.prepare.recode import SHORT_SIDE

# Default minutes of training on CPUs.
CPU_MINUTES = 30.0
# Default number of training examples on accelerators, over all epochs.
ACCELERATOR_IMAGES = 1_000_000
FEWEST_EPOCHS, MOST_EPOCHS = 1.0, 100.0
# Fewest epochs with mixed images: mixing pays at 39 epochs and more, not at 22.
LONG_EPOCHS = 40.0
EVALUATIONS = 8
# Images per second of evaluation, relative to training.
EVALUATION_SPEED = 3.0
# Most views of an image in test-time augmentation.
VIEWS = 4
# Shortest useful runs of `hold_out`, as a share of the run on all data.
LEAST_LENGTH = 0.2
# Fewest validation images for a reliable threshold.
FEW_VALIDATION = 50


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts that a recipe depends on.

    Attributes:
      name: Name of the dataset.
      num_images: Training images, including a validation split still to be carved out.
      num_evaluated: Images of the validation and test splits that the data names.
      num_groups: Groups of training images.
      num_domains: Domains of training images.
      num_labels: Size of the vocabulary.
      short_side: Median short side of the images, in pixels.
      has_validation: Whether the data names its validation images.
      platform: cpu, gpu or tpu.
      num_devices: Number of devices that share a batch.
      fast_bfloat16: Whether CPUs compute bfloat16 faster than float32.
    """

    name: str
    num_images: int
    num_evaluated: int
    num_groups: int
    num_domains: int
    num_labels: int
    short_side: int
    has_validation: bool
    platform: str
    num_devices: int
    fast_bfloat16: bool


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Speed of a recipe on this machine.

    Attributes:
      images_per_second: Speed of training.
      start_seconds: Seconds until the first update.
    """

    images_per_second: float
    start_seconds: float


@dataclass(frozen=True)
class Choice:
    """A field of the configuration, and why it has its value."""

    field: str
    value: Any
    why: str


class StageFields(TypedDict):
    """The fields of a `StageConfig` that a recipe gives."""

    name: str
    num_epochs: float
    terms: Mapping[str, float]


@dataclass(frozen=True)
class Recipe:
    """The choices for a dataset.

    Attributes:
      choices: Fields that differ from their defaults.
      stages: `Config.stages`.
      minutes: Estimated duration of `train`.
      hold_out_length: Length of runs of `hold_out` for which the rest of the time is
        enough, as a share of that of `train`; 0 if there is too little time.
    """

    choices: Sequence[Choice]
    stages: Sequence[StageFields]
    minutes: float
    hold_out_length: float


# The stock recipe for small data on CPUs, except image size, batch size and `mixing`.
SMALL = (
    Choice("model.depth", 18, "a small network, because there is no accelerator"),
    Choice("model.width", 32, "half of the published width, to save time"),
    Choice("model.compute_dtype", "float32", "bfloat16 is not faster on this CPU"),
    Choice(
        "data.augmentation", 0.5, "stronger augmentation does not help in so few epochs"
    ),
    Choice("data.restyling", 1.0, "helps if test images come from another source"),
    Choice("data.test_time_augmentation", True, "helps on such test images too"),
    Choice(
        "optimizer.peak_lr",
        0.15,
        "for a batch of 64; it is scaled to global_batch_size",
    ),
    Choice("optimizer.base_batch_size", 64, "the batch size that peak_lr is meant for"),
    Choice("optimizer.average", "ema", "more stable metrics in a short run"),
    Choice("optimizer.ema_decay", 0.99, "averages over about 100 steps"),
)


def mixing(epochs: float) -> tuple[Choice, ...]:
    """Returns the choices of the stock recipe that depend on its length."""
    if epochs < LONG_EPOCHS:
        return ()
    why = "reduces overconfidence in long training"
    return (Choice("data.mix_probability", 0.5, why),)


def choose(
    facts: Facts,
    pace_of: Callable[[Mapping[str, Any]], Pace],
    *,
    minutes: float | None = None,
) -> Recipe:
    """Chooses a recipe for a dataset and devices.

    Args:
      facts: Facts about the data and the machine.
      pace_of: Measures the pace of a configuration, given its fields.
      minutes: Duration of training. None: `CPU_MINUTES` on CPUs; on accelerators, as
        many epochs as give `ACCELERATOR_IMAGES`, at least 18 and at most 40.
    """
    fraction = 0.0 if facts.has_validation else _validation_fraction(facts)
    num_train = max(1, round(facts.num_images * (1 - fraction)))
    num_evaluated = facts.num_evaluated + facts.num_images - num_train
    choices = _fields(facts, num_train)
    if fraction:
        groups = f"{facts.num_groups:,} groups"
        why = f"share of {groups} that chooses thresholds; no validation split is given"
        choices.append(Choice("data.validation_fraction", fraction, why))
    values = {choice.field: choice.value for choice in choices}
    pace = pace_of(values | {"stages": stages(1.0)})
    # Each split is also evaluated at the end of the run.
    views = VIEWS if values.get("data.test_time_augmentation") else 1
    evaluated_per_second = EVALUATION_SPEED * pace.images_per_second
    seconds_per_evaluated = (EVALUATIONS + 2 * views) / evaluated_per_second
    seconds = pace.start_seconds + seconds_per_evaluated * num_evaluated
    epoch_seconds = num_train / pace.images_per_second
    budget_seconds = 0.0
    if minutes is None and facts.platform != "cpu":
        epochs = min(40.0, max(18.0, ACCELERATOR_IMAGES / num_train))
    else:
        budget_seconds = 60 * (CPU_MINUTES if minutes is None else minutes)
        epochs = (budget_seconds - seconds) / epoch_seconds
        epochs = float(f"{min(MOST_EPOCHS, max(FEWEST_EPOCHS, epochs)):.2g}")
    if facts.platform == "cpu":
        choices += mixing(epochs)
    steps = math.ceil(epochs * num_train / values["global_batch_size"])
    choices += [
        Choice(
            "evaluate_every_steps",
            max(20, min(2000, math.ceil(steps / EVALUATIONS))),
            f"about {EVALUATIONS} evaluations per run",
        ),
        Choice(
            "log_every_steps", max(1, min(100, steps // 50)), "about 50 lines per run"
        ),
    ]
    epochs_seconds = epochs * epoch_seconds
    # Each run of `hold_out` starts and is evaluated, also on the images of its domain.
    rest_seconds = budget_seconds - seconds - epochs_seconds
    rest_seconds -= facts.num_domains * seconds + seconds_per_evaluated * num_train
    return Recipe(
        choices,
        stages(epochs),
        (seconds + epochs_seconds) / 60,
        _hold_out_length(facts.num_domains, rest_seconds / epochs_seconds),
    )


def _hold_out_length(num_domains: int, times: float) -> float:
    """Returns `Recipe.hold_out_length` if the data can be trained on `times` times.

    The runs together train on each image once less than there are domains.
    """
    if num_domains < 2 or times < LEAST_LENGTH * (num_domains - 1):
        return 0.0
    return float(f"{min(1.0, times / (num_domains - 1)):.2g}")


def short_side(facts: Facts) -> int:
    """Returns the short side to store images at, in pixels.

    It is twice the training size, at most 256, so random crops need no enlarging.
    """
    return min(SHORT_SIDE, 2 * _image_size(facts))


def _fields(facts: Facts, num_train: int) -> list[Choice]:
    on_cpu = facts.platform == "cpu"
    batch = _batch_size(num_train, on_cpu, facts.num_devices)
    devices = f"{facts.num_devices} {facts.platform} device(s)"
    return [
        *(_network_for_cpu(facts) if on_cpu else _network(facts)),
        Choice(
            "global_batch_size", batch, f"for {facts.num_images:,} images on {devices}"
        ),
    ]


def _image_size(facts: Facts) -> int:
    """Returns the side of training images, in pixels."""
    if facts.platform == "cpu":
        return min(64, max(32, facts.short_side // 16 * 16))
    return min(224, max(32, facts.short_side // 32 * 32))


def _network_for_cpu(facts: Facts) -> list[Choice]:
    why = f"the median short side is {facts.short_side} pixels; at most 64 on CPUs"
    choices = [Choice("data.image_size_pixels", _image_size(facts), why), *SMALL]
    if not facts.fast_bfloat16:
        return choices
    field, why = "model.compute_dtype", "faster with this CPU's units for bfloat16"
    return [
        Choice(field, "bfloat16", why) if choice.field == field else choice
        for choice in choices
    ]


def _network(facts: Facts) -> list[Choice]:
    size = _image_size(facts)
    why = f"the median short side is {facts.short_side} pixels; at most 224"
    depth = 50 if facts.num_images >= 10_000 else 18
    choices = [
        Choice("data.image_size_pixels", size, why),
        Choice("model.depth", depth, f"for {facts.num_images:,} images"),
        Choice(
            "optimizer.peak_lr",
            0.4,
            "for a batch of 1,024; it is scaled to global_batch_size",
        ),
        Choice(
            "optimizer.base_batch_size",
            1024,
            "the batch size that peak_lr is meant for",
        ),
    ]
    if size <= 64:
        choices.append(Choice("model.stem", "small", "for images of at most 64 pixels"))
    return choices


def _batch_size(num_train: int, on_cpu: bool, num_devices: int) -> int:
    most = 64 if on_cpu or num_train < 10_000 else 256 if num_train < 200_000 else 1024
    # At least eight updates per epoch, unless batches would be below 16 images.
    fits = 2 ** int(math.log2(max(16, num_train // 8)))
    return math.ceil(min(most, fits) / num_devices) * num_devices


def _validation_fraction(facts: Facts) -> float:
    share = min(0.4, FEW_VALIDATION / max(1, facts.num_groups))
    return max(0.1, round(share, 2))


def stages(epochs: float) -> tuple[StageFields, ...]:
    """Returns `Config.stages` of the stock recipe."""
    return (StageFields(name="classifier", num_epochs=epochs, terms={"bce": 1.0}),)


def text(facts: Facts, recipe: Recipe, command: str) -> str:
    """Returns the Python source of a recipe for the dataset in data/ beside the file.

    The docstring of the source shows `command`, the command that trains.
    """
    lines = "\n".join(
        f"    # {choice.why[0].upper()}{choice.why[1:]}.\n"
        f"    config.{choice.field} = {_written(choice.value)}"
        for choice in recipe.choices
    )
    stage_lines = pprint.pformat(tuple(recipe.stages), width=80, sort_dicts=False)
    # Folder names may contain these characters, which would end or change a string.
    shown = command.replace("\\", r"\\").replace('"', r"\"")
    return f'''"""Recipe for {facts.name}, written by `jaxii new`; you can edit it.

  {shown}

{facts.num_images:,} images, {facts.num_labels:,} labels. The metric is F2, averaged
over images.
"""

from pathlib import Path

from jaxii.config import default_config


def get_config():
    """Returns the recipe."""
    config = default_config()
    config.data.dataset = "kaggle"
    config.data.directory = str(Path(__file__).resolve().parent / "data")
{lines}
    config.stages = {textwrap.indent(stage_lines, "    ").lstrip()}
    return config
'''


def _written(value: Any) -> str:
    """Returns a value as Python, strings in double quotes."""
    return json.dumps(value) if isinstance(value, str) else repr(value)
