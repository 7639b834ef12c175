"""Every field of a run's configuration, declared once, with its unit and meaning.

The start of the flow. A file in `configs/` takes `default_config()`, changes what its
recipe changes and returns it; `check` refuses combinations that cannot work, before
anything is read or allocated; `jaxii.runs.assemble` is the only reader of the fields.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

# What does not change the result, and may differ when a run goes on.
FREE_FIELDS = (
    "data.directory",
    "data.num_threads",
    "evaluate_train_images",
    "log_every_steps",
    "on_failed_save",
    "optimizer.shard_state",
    "track",
)
# A ConfigDict, whose fields no type checker can know.
Config = Any

DATASETS = ("toy_regions", "kaggle", "open_images_v4")
FAILED_SAVES = ("stop", "go_on")
MACHINE_LABELS = ("ignored", "soft", "thresholded")
UNKNOWN = ("negative", "ignored")
DEPTHS = (18, 26, 34, 50, 101, 152)
VARIANTS = ("resnet", "resnet_d", "se_resnet", "resnext", "wide_resnet")
STEMS = ("imagenet", "small")
DTYPES = ("float32", "bfloat16")
AVERAGES = ("none", "ema", "swa")
TRACKERS = ("", "wandb", "mlflow")
OPTIMIZERS = ("sgd", "adamw", "lars", "lamb")
# 8 bytes a slot: together with mask and slice an image sends less than 1 KiB of labels.
MOST_LABELS = 126


def default_config() -> Config:
    """Returns every field at its default; recipes change them, nothing adds to them."""
    config = ConfigDict()
    # Base of every random choice: order, augmentation, initialisation, dropout.
    config.seed = 0
    # Examples in one update, over all devices of all processes.
    config.global_batch_size = 64
    # Slices of a device's batch whose gradients are added up before an update.
    config.micro_batches = 1
    # Workdir of a run whose best checkpoint the first stage starts from, or
    # WORKDIR@STAGE for that of a stage before its last; "" for none.
    config.start_from = ""

    config.data = _data()
    config.label_embedding = _label_embedding()
    config.model = _model()
    config.optimizer = _optimizer()

    # Parts of the run in order: one dict a stage, fields of jaxii.train.stages.Stage.
    config.stages = ()

    # Evaluate on `validation` and save, every so many steps and at a stage's end.
    config.evaluate_every_steps = 200
    # Training images that are measured beside `validation`, unaugmented; 0 is none.
    config.evaluate_train_images = 0
    # Write a line and the curves every so many steps.
    config.log_every_steps = 20
    # Service that shows the run too, beside TensorBoard's files in the workdir: "wandb"
    # (Weights & Biases), "mlflow", or "" for none. Each is an extra of jaxii.
    config.track = ""
    # Stop after so many updates in a row with a gradient that is not finite.
    config.most_skipped_steps = 20
    # Where a checkpoint cannot be saved (disk full, no permission): "stop", with exit
    # code 1, or "go_on" with the last complete one, to save again when the next is due.
    # Several processes stop in either case: only some may know of it.
    config.on_failed_save = "stop"
    # A recipe that misspells a field is refused where it does so.
    config.lock()
    return config


def _data() -> Config:
    section = ConfigDict()
    # Where the images and labels come from: drawn here, or prepared before.
    section.dataset = "toy_regions"
    # Folder of the prepared dataset; "" is the default place for `dataset`.
    section.directory = ""
    # CSV with the column label_code: the labels to train on and their order, for an
    # open_images_v4 whose labels are mapped by code; "" takes the dataset's own.
    section.labels_file = ""
    # Side of the square that the network sees.
    section.image_size_pixels = 64
    # Strength of every random change of training images: crop, geometry, colours,
    # blur, noise, JPEG quality and scale. 0 is none, 1 that of common recipes.
    section.augmentation = 1.0
    # Mirror half of the training images.
    section.mirror = True
    # Share of training images that are mixed with another (mixup or CutMix).
    section.mix_probability = 0.0
    # Share of an image's short side that evaluation cuts out of the middle.
    section.central_share = 1.0
    # Share of the groups of the training data that are held out as `validation`.
    section.validation_fraction = 0.1
    # Domain of the training data that is kept out of training and becomes the split
    # `held_out`, which chooses the checkpoint and the threshold; "" for none.
    section.held_out_domain = ""
    # Labels that only a machine gave: ignored, soft targets, or thresholded.
    section.machine_labels = "ignored"
    # Confidence from which a thresholded machine label counts as present.
    section.machine_threshold = 0.5
    # How labels that are not listed for an image train: negative or ignored.
    section.unknown = "negative"
    # Most labels of an image that train; the least confident are cut beyond it.
    # Evaluation uses all labels.
    section.most_labels = MOST_LABELS
    # Threads that read and decode images, in each process.
    section.num_threads = 4
    # Train on the first batch again and again: as fast as the network can be, whatever
    # the input takes. Its figures are no result.
    section.reuse_batch = False
    return section


def _label_embedding() -> Config:
    section = ConfigDict()
    # Numbers a label; at most the number of classes.
    section.dim = 1024
    # Positive PMI: values below 0 become 0.
    section.positive = False
    # Exponent on the context's counts (Levy et al. 2015: 0.75); 1 is none.
    section.context_smoothing = 1.0
    return section


def _model() -> Config:
    section = ConfigDict()
    # resnet, resnet_d, se_resnet, resnext (32x4d) or wide_resnet.
    section.variant = "resnet"
    section.depth = 50
    # Channels of the first stage; 64 is the published network.
    section.width = 64
    # "imagenet": 7x7 stride 2 and max-pool. "small": 3x3, for images of 32-64 pixels.
    section.stem = "imagenet"
    # Dropout before the embedding head.
    section.dropout = 0.2
    # Arithmetic of the network; parameters and losses are float32 always.
    section.compute_dtype = "bfloat16"
    # Start the classifier's bias at the log prior odds of each label.
    section.prior_bias = True
    # BatchNorm over each "device"'s share of the batch, over those of N neighbouring
    # devices together ("group:N"), or over the "global" batch.
    section.batch_norm = "device"
    # File of torchvision's or timm's weights that the first stage's trunk starts from:
    # .safetensors or .pth, read without running anything; of the same variant, depth,
    # width and stem. Its classifier is left out, as it does not name its labels. The
    # record names the file; the Inclusive Images Challenge forbids such weights.
    section.pretrained = ""
    return section


def _optimizer() -> Config:
    section = ConfigDict()
    section.name = "sgd"
    # Highest learning rate of a stage that does not set its own.
    section.peak_lr = 0.05
    # Batch that peak_lr is meant for, here and in the stages: the rate is then in
    # proportion to global_batch_size (Goyal et al. 2017, 2.1). 0 takes it as it is.
    section.base_batch_size = 0
    # Decay of matrices and convolutions; never of BatchNorm or biases.
    section.weight_decay = 1e-4
    section.momentum = 0.9
    # Largest norm of the whole gradient; 0 does not clip.
    section.clip_norm = 0.0
    # Divide the optimizer's state over the devices (ZeRO stage 1) instead of keeping it
    # whole on each: memory for one more collective, the same result up to rounding.
    section.shard_state = False
    # What is evaluated: the parameters as they are ("none"), their moving average
    # ("ema"), or the uniform average over a stage's last part ("swa").
    section.average = "none"
    # Decay a step of the moving average.
    section.ema_decay = 0.999
    # Last share of a stage over which the uniform average is taken.
    section.swa_share = 0.25
    return section


def check(config: Config) -> None:
    """Refuses what cannot work, with the field, the values allowed and the fix.

    Raises:
      ValueError: one line a person can act on.
    """
    data, model, optimizer = config.data, config.model, config.optimizer
    _one_of("data.dataset", data.dataset, DATASETS)
    _one_of("data.machine_labels", data.machine_labels, MACHINE_LABELS)
    _one_of("data.unknown", data.unknown, UNKNOWN)
    _one_of("model.variant", model.variant, VARIANTS)
    _one_of("model.depth", model.depth, DEPTHS)
    _one_of("model.stem", model.stem, STEMS)
    _one_of("model.compute_dtype", model.compute_dtype, DTYPES)
    if not re.fullmatch(r"device|global|group:[1-9][0-9]*", str(model.batch_norm)):
        raise ValueError(
            f"config.model.batch_norm={model.batch_norm!r}; use device, global, or "
            "group:N for a number of devices N, as group:8."
        )
    _one_of("optimizer.name", optimizer.name, OPTIMIZERS)
    _between("data.image_size_pixels", data.image_size_pixels, 16, 4096)
    _between("data.augmentation", data.augmentation, 0.0, 2.5)
    _between("data.mix_probability", data.mix_probability, 0.0, 1.0)
    _between("data.central_share", data.central_share, 0.1, 1.0)
    _between("data.validation_fraction", data.validation_fraction, 0.001, 0.9)
    _between("data.machine_threshold", data.machine_threshold, 0.0, 1.0)
    _between("data.most_labels", data.most_labels, 1, MOST_LABELS)
    _between("data.num_threads", data.num_threads, 1, 512)
    _between("label_embedding.dim", config.label_embedding.dim, 1, 1_000_000)
    smoothing = config.label_embedding.context_smoothing
    _between("label_embedding.context_smoothing", smoothing, 0.1, 1.0)
    _between("model.width", model.width, 8, 1024)
    _between("model.dropout", model.dropout, 0.0, 0.99)
    _between("optimizer.peak_lr", optimizer.peak_lr, 1e-8, 1e3)
    _between("optimizer.base_batch_size", optimizer.base_batch_size, 0, 1_000_000)
    _between("optimizer.weight_decay", optimizer.weight_decay, 0.0, 1e3)
    _between("optimizer.momentum", optimizer.momentum, 0.0, 0.9999)
    _between("optimizer.clip_norm", optimizer.clip_norm, 0.0, 1e9)
    _one_of("optimizer.average", optimizer.average, AVERAGES)
    _between("optimizer.ema_decay", optimizer.ema_decay, 0.0, 0.999999)
    _between("optimizer.swa_share", optimizer.swa_share, 0.0, 1.0)
    _one_of("track", config.track, TRACKERS)
    _one_of("on_failed_save", config.on_failed_save, FAILED_SAVES)
    _between("evaluate_train_images", config.evaluate_train_images, 0, 10_000_000)
    _between("global_batch_size", config.global_batch_size, 1, 1_000_000)
    _between("micro_batches", config.micro_batches, 1, 1_000_000)
    for name in ("evaluate_every_steps", "log_every_steps", "most_skipped_steps"):
        _between(name, config[name], 1, 1_000_000_000)
    _check_stages(config)


def _check_stages(config: Config) -> None:
    if config.start_from and config.model.pretrained:
        raise ValueError(
            f"config.start_from={config.start_from!r} and config.model.pretrained="
            f"{config.model.pretrained!r}: the first stage starts from one; clear the "
            "other."
        )
    if not isinstance(config.stages, tuple | list) or not config.stages:
        raise ValueError(
            f"config.stages={config.stages!r}; give at least one stage, a dict each."
        )
    for stage in config.stages:
        if not isinstance(stage, Mapping | ConfigDict):
            raise ValueError(
                f"config.stages has {stage!r}; use a dict of the fields of "
                "jaxii.train.stages.Stage."
            )


def check_overrides(argv: list[str]) -> None:
    """Refuses the first --config.FIELD that does not exist, with the nearest that do.

    Args:
      argv: words of a command line.

    Raises:
      ValueError: there is no such field.
    """
    fields = default_config().to_dict()
    names = [*_paths(fields), *fields]
    for word in argv:
        # A stage has fields of its own: stages[0].num_epochs.
        name = word.removeprefix("--config.").partition("=")[0].partition("[")[0]
        if not word.startswith("--config.") or name in names:
            continue
        near = difflib.get_close_matches(name, names, n=3) or list(fields)
        raise ValueError(f"--config.{name} is not a field; use {', '.join(near)}.")


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the configuration as plain dicts and lists, as it is written to disk."""
    return json.loads(json.dumps(config.to_dict()))


def from_dict(fields: dict[str, Any]) -> Config:
    """Returns the configuration that `to_dict` made these fields of.

    Raises:
      ValueError: a field that this version does not have.
    """
    config = default_config()
    known = set(_paths(to_dict(config)))
    given = set(_paths({k: v for k, v in fields.items() if k != "stages"}))
    for path in sorted(given - known):
        raise ValueError(
            f"config.{path} is not a field of this version; remove it, or use the "
            "version that wrote the file."
        )
    config.update(ConfigDict(fields))
    config.stages = tuple(fields.get("stages", ()))
    return config


def content_hash(config: Config) -> str:
    """Returns 16 hexadecimal digits that tell one result's configuration from another.

    `FREE_FIELDS` do not count.
    """
    fields = _paths(to_dict(config))
    for name in FREE_FIELDS:
        del fields[name]
    text = json.dumps(fields, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Returns `field: one -> other` for every field that differs."""
    a, b = _paths(one), _paths(other)
    return [
        f"{path}: {a.get(path, 'absent')} -> {b.get(path, 'absent')}"
        for path in sorted(a.keys() | b.keys())
        if a.get(path, "absent") != b.get(path, "absent")
    ]


def _paths(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in fields.items():
        if isinstance(value, dict):
            flat |= _paths(value, f"{prefix}{key}.")
        elif isinstance(value, list) and any(isinstance(v, dict) for v in value):
            parts = {f"{key}[{i}]": part for i, part in enumerate(value)}
            flat |= _paths(parts, prefix)
        else:
            flat[prefix + key] = value
    return flat


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        choices = ", ".join(str(choice) or "''" for choice in allowed)
        raise ValueError(f"config.{name}={value!r}; use one of {choices}.")


def _between(name: str, value: Any, low: float, high: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise ValueError(f"config.{name}={value!r}; use a value in [{low}, {high}].")
