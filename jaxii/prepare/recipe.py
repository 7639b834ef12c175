"""Chooses a recipe for a dataset, with a reason for every field."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxii.prepare.recode import SHORT_SIDE

# Images that training processes in all: on CPUs some minutes on two cores.
CPU_IMAGES = 50_000
# Enough epochs for a small dataset, and no fewer than the recipes of Open Images.
MOST_EPOCHS, FEWEST_EPOCHS, CPU_FEWEST_EPOCHS = 40, 18, 3
ACCELERATOR_IMAGES = 1_000_000
# A threshold chosen on fewer validation images is a guess.
FEW_VALIDATION = 50
# Shares of the epochs, as in configs/f2_multitask.py.
SHARES = (7 / 13, 4 / 13, 2 / 13)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts that a recipe depends on.

    Attributes:
      name: Name of the dataset.
      num_images: Training images, including a validation split still to be carved out.
      num_groups: Groups of training images.
      num_labels: Size of the vocabulary.
      short_side: Median short side of the images, in pixels.
      several_labels: Share of the training images with at least two labels.
      has_validation: Whether the data names its validation images.
      platform: cpu, gpu or tpu.
      num_devices: Devices that a batch is divided over.
      num_cores: Processor cores of this machine.
    """

    name: str
    num_images: int
    num_groups: int
    num_labels: int
    short_side: int
    several_labels: float
    has_validation: bool
    platform: str
    num_devices: int
    num_cores: int


@dataclass(frozen=True)
class Choice:
    """A field of the configuration, and why it has its value."""

    field: str
    value: Any
    why: str


@dataclass(frozen=True)
class Recipe:
    """The choices for a dataset.

    Attributes:
      choices: Fields that differ from their defaults.
      epochs: Length of each stage.
      has_embedding: Whether the label embedding is learned.
      short_side: Size in pixels to store images at: twice the training size, at most
        256, so that random crops need no enlarging.
    """

    choices: Sequence[Choice]
    epochs: Sequence[float]
    has_embedding: bool
    short_side: int


def choose(facts: Facts) -> Recipe:
    """Chooses a recipe for a dataset and devices."""
    on_cpu = facts.platform == "cpu"
    fraction = 0.0 if facts.has_validation else _validation_fraction(facts)
    num_train = max(1, round(facts.num_images * (1 - fraction)))
    budget = CPU_IMAGES if on_cpu else ACCELERATOR_IMAGES
    fewest = CPU_FEWEST_EPOCHS if on_cpu else FEWEST_EPOCHS
    epochs = min(MOST_EPOCHS, max(fewest, budget / num_train))
    batch = _batch_size(num_train, on_cpu, facts.num_devices)
    rate = 0.05 * min(1.0, batch / 64) if batch <= 64 else 0.4 * batch / 1024
    devices = f"{facts.num_devices} {facts.platform} device(s)"
    steps = math.ceil(epochs * num_train / batch)
    evaluate_every = max(20, min(2000, steps // 8))
    log_every = max(1, min(100, steps // 50))
    threads = max(4, facts.num_cores)
    has_embedding = facts.several_labels >= 0.05
    choices = [
        *(_network_for_cpu(facts) if on_cpu else _network(facts)),
        Choice("global_batch_size", batch, f"{facts.num_images:,} images, {devices}"),
        Choice("optimizer.peak_lr", round(rate, 5), "proportional to the batch size"),
        Choice("data.num_threads", threads, "one a core, at least four"),
        Choice(
            "evaluate_every_steps", evaluate_every, "about eight evaluations per run"
        ),
        Choice("log_every_steps", log_every, "about fifty lines a run"),
    ]
    if has_embedding:
        dim = min(32 if on_cpu else 1024, facts.num_labels)
        choices.append(
            Choice("label_embedding.dim", dim, "at most the number of labels")
        )
    if fraction:
        groups = f"{facts.num_groups:,} groups"
        why = f"of {groups}, to choose a threshold; there is no validation split"
        choices.append(Choice("data.validation_fraction", fraction, why))
    shares = SHARES if has_embedding else (SHARES[0], SHARES[1] + SHARES[2])
    return Recipe(
        choices,
        [round(epochs * share, 2) for share in shares],
        has_embedding,
        min(SHORT_SIDE, 2 * _image_size(facts)),
    )


def _image_size(facts: Facts) -> int:
    """Returns the side of the square that trains, in pixels."""
    if facts.platform == "cpu":
        return min(64, max(32, facts.short_side // 16 * 16))
    return min(224, max(32, facts.short_side // 32 * 32))


def _network_for_cpu(facts: Facts) -> list[Choice]:
    why = f"the median short side is {facts.short_side}; on CPUs at most 64"
    return [
        Choice("data.image_size_pixels", _image_size(facts), why),
        Choice("model.depth", 18, "a small network, as there is no accelerator"),
        Choice("model.width", 32, "half the published width, to save time"),
        Choice("model.compute_dtype", "float32", "bfloat16 is hardly faster on CPUs"),
        Choice("data.augmentation", 0.5, "more does not pay in so few epochs"),
        Choice("optimizer.average", "ema", "steadier metrics in a short run"),
        Choice("optimizer.ema_decay", 0.99, "averages about a hundred steps"),
    ]


def _network(facts: Facts) -> list[Choice]:
    size = _image_size(facts)
    why = f"the median short side is {facts.short_side}; at most 224"
    depth = 50 if facts.num_images >= 10_000 else 18
    choices = [
        Choice("data.image_size_pixels", size, why),
        Choice("model.depth", depth, f"{facts.num_images:,} images"),
    ]
    if size <= 64:
        choices.append(Choice("model.stem", "small", "images of 64 pixels or fewer"))
    return choices


def _batch_size(num_train: int, on_cpu: bool, num_devices: int) -> int:
    most = 64 if on_cpu or num_train < 10_000 else 256 if num_train < 200_000 else 1024
    # At least eight updates per epoch, even on a small dataset.
    fits = 2 ** int(math.log2(max(16, num_train // 8)))
    return math.ceil(min(most, fits) / num_devices) * num_devices


def _validation_fraction(facts: Facts) -> float:
    share = min(0.4, FEW_VALIDATION / max(1, facts.num_groups))
    return max(0.1, round(share, 2))


def text(facts: Facts, recipe: Recipe, command: str) -> str:
    """Returns the Python file of a recipe, which reads the dataset in data/ beside it.

    Its docstring shows `command`, which trains with it.
    """
    lines = "\n".join(
        f"    # {choice.why[0].upper()}{choice.why[1:]}.\n"
        f"    config.{choice.field} = {json.dumps(choice.value)}"
        for choice in recipe.choices
    )
    # Folder names may hold these two characters, which end or change a string.
    shown = command.replace("\\", r"\\").replace('"', r"\"")
    return f'''"""Recipe for {facts.name}, written by `jaxii new`; yours to change.

  {shown}

{facts.num_images:,} images, {facts.num_labels:,} labels. The metric is F2, averaged
over images; the later stages train it directly.
"""

from pathlib import Path

from jaxii.config import default_config

FOCAL = {{"gamma": 2.0, "alpha": None}}


def get_config():
    """Returns the recipe."""
    config = default_config()
    config.data.dataset = "kaggle"
    config.data.directory = str(Path(__file__).resolve().parent / "data")
{lines}
    config.stages = (
{_stages(recipe)}
    )
    return config
'''


def _stages(recipe: Recipe) -> str:
    has_embedding = recipe.has_embedding
    embedding = '                "embedding": 1.0,\n' if has_embedding else ""
    first, second, *last = recipe.epochs
    text = f'''\
        {{
            "name": "{"multitask" if has_embedding else "bce_focal"}",
            "num_epochs": {first!r},
            "embedding_head": {has_embedding},
            "terms": {{
                "bce": ((0.0, 1.0), (0.4, 1.0), (0.6, 0.0)),
                "focal": {{"weight": ((0.4, 0.0), (0.6, 1.0)), **FOCAL}},
{embedding}            }},
        }},
        {{
            "name": "f2",
            "num_epochs": {second!r},
            "embedding_head": {has_embedding},
            "peak_lr": config.optimizer.peak_lr / 2,
            "terms": {{
                "focal": {{"weight": 1.0, **FOCAL}},
                "soft_f": ((0.0, 0.0), (0.3, 10.0)),
{embedding}            }},
        }},'''
    if last:
        text += f"""
        {{
            "name": "classifier",
            "num_epochs": {last[0]!r},
            "embedding_head": False,
            "peak_lr": config.optimizer.peak_lr / 10,
            "terms": {{"focal": {{"weight": 1.0, **FOCAL}}, "soft_f": 10.0}},
        }},"""
    return text
