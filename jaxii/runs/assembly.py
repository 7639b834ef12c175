"""Builds the parts of a run from its configuration and data."""

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int64, Num

from jaxii.config import Config, ModelConfig, StageConfig
from jaxii.console import progress
from jaxii.data import folder, label_embedding, pipeline, prepared
from jaxii.data.prepared import Data, Rows
from jaxii.data.transforms import EvalTransform, TrainTransform
from jaxii.distributed import processes
from jaxii.distributed.mesh import DATA_AXIS, check_batch_size, check_group
from jaxii.errors import InputError
from jaxii.evaluation.image_records import ImageFiles, Listing
from jaxii.models.multitask import Network, make_network, with_bias
from jaxii.models.resnet import check_shape, last_side
from jaxii.objective.objective import Objective, make_objective
from jaxii.objective.schedule import warmup_cosine
from jaxii.prepare import label_files, recode
from jaxii.prepare.threads import num_cores
from jaxii.prepare.toy_regions import writer
from jaxii.storage import AnyPath, at, user_cache
from jaxii.train.averaging import Rate, ema_rate, swa_rate
from jaxii.train.optimizer import make_optimizer
from jaxii.train.stages import Stage
from jaxii.train.step import StepSettings
from jaxii.train.trainer import StagePlan

Batches = Iterator[dict[str, np.ndarray]]
# Platform -> most images per device in a batch of `file_batch_size`.
MOST_PREDICTED = {"cpu": 64, "gpu": 256, "tpu": 256}


def data_root() -> Path:
    """Returns the default folder of datasets."""
    return Path(os.environ.get("JAXII_DATA_DIR") or user_cache() / "data")


def data_directory(config: Config) -> AnyPath:
    """Returns the folder of the prepared dataset.

    Raises:
      InputError: If no folder is given, except for toy_regions.
    """
    if config.data.directory:
        return at(config.data.directory)
    if config.data.dataset == "toy_regions":
        return data_root() / f"toy_regions_v{writer.VERSION}.{folder.FORMAT}"
    raise InputError(
        f"config.data.directory is empty, and {config.data.dataset} is not generated "
        "automatically; prepare the data once (python -m jaxii.main prepare --help) "
        "and pass its folder as --data_dir (in Python: config.data.directory)."
    )


def open_data(config: Config, *, verify: bool = False) -> Data:
    """Opens the prepared dataset; draws toy_regions first if necessary.

    Args:
      verify: Whether to hash every byte first; only the lead process does.

    Raises:
      InputError: If the dataset is missing or damaged, or a split that training needs
        is empty.
    """
    directory, data = data_directory(config), config.data
    vocabulary = None
    if data.labels_file:
        vocabulary = label_files.read_codes(at(data.labels_file), None).vocabulary
    opened: list[Data] = []
    with progress() as on_progress:
        if data.dataset == "toy_regions":
            writer.prepare_toy_regions(directory, on_progress)

        def open_it(verify: bool) -> None:
            opened.append(
                prepared.open_prepared(
                    directory,
                    vocabulary=vocabulary,
                    validation_fraction=data.validation_fraction,
                    held_out_domain=data.held_out_domain,
                    machine_labels=data.machine_labels,
                    machine_threshold=data.machine_threshold,
                    verify=verify,
                    on_progress=on_progress,
                )
            )

        if verify:
            processes.check_on_lead(lambda: open_it(verify=True))
        if not opened:
            open_it(verify=False)
    return opened[0]


def label_embedding_dim(config: Config, data: Data) -> int:
    """Returns the size of a label's embedding; 0 if no stage has an embedding head.

    Raises:
      InputError: If the options of the embedding do not fit the labels.
    """
    if not any(stage.embedding_head for stage in config.stages):
        return 0
    section = config.label_embedding
    label_embedding.check_options(
        len(data.vocabulary), section.dim, section.context_smoothing
    )
    return section.dim


def make_label_embedding(config: Config, data: Data) -> label_embedding.LabelEmbedding:
    """Factorises the co-occurrence of the training split's labels."""
    offsets, label_ids = data.train_rows.present()
    return label_embedding.label_embedding(
        offsets,
        label_ids,
        len(data.vocabulary),
        dim=config.label_embedding.dim,
        positive=config.label_embedding.positive,
        context_smoothing=config.label_embedding.context_smoothing,
        seed=config.seed,
    )


def share(
    config: Config, global_batch_size: int, *, is_training: bool = False
) -> pipeline.ShardSpec:
    """Returns this process's part of the batches."""
    threads = min(max(num_cores(), 4), 16)
    if is_training and jax.default_backend() == "cpu":
        # The step uses all cores, and more threads than needed wait for Python's lock.
        threads = max(1, num_cores() // 2)
    return pipeline.ShardSpec(
        global_batch_size=global_batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=config.data.num_threads or threads,
    )


def slots(config: Config, rows: Rows) -> int:
    """Returns the number of label slots of an image in a training batch.

    Most labels of an image, rounded up to a multiple of 16; at most `most_labels`.
    """
    return min(eval_slots(rows), config.data.most_labels)


def eval_slots(rows: Rows) -> int:
    """Returns the number of label slots of an image in an evaluation batch.

    The slots hold all labels of every image, because a label without a slot would be
    missing from the truth. Multiples of 16 let most splits share a compiled function.
    """
    return math.ceil(max(rows.most_labels(), 1) / 16) * 16


def train_batches(
    config: Config, data: Data, split: str, start_example: int
) -> Batches:
    """Yields training batches of a split without end, from `start_example` on.

    With `data.reuse_batch`, yields the first batch of the split repeatedly.
    """
    policy = pipeline.LabelPolicy(
        num_slots=slots(config, data.training_rows(split)),
        machine_labels=config.data.machine_labels,
        machine_threshold=config.data.machine_threshold,
    )
    transform = TrainTransform(
        size_pixels=config.data.image_size_pixels,
        strength=config.data.augmentation,
        mirror=config.data.mirror,
    )
    batches = pipeline.train_batches(
        data.split(split).source,
        transform=transform,
        policy=policy,
        shard=share(config, config.global_batch_size, is_training=True),
        seed=config.seed,
        start_example=0 if config.data.reuse_batch else start_example,
        name=f"split {split}",
    )
    if config.data.reuse_batch:
        batches = itertools.repeat(next(batches))
    for batch in batches:
        yield {k: v for k, v in batch.items() if k not in (pipeline.INDEX, "slice_ids")}


def eval_batch_size(config: Config) -> int:
    """Returns the training batch size, rounded up to a multiple of the device count."""
    devices = jax.device_count()
    return math.ceil(config.global_batch_size / devices) * devices


def file_batch_size(config: Config, num_images: int) -> int:
    """Returns the batch size in which images are predicted; more are not faster.

    A device gets a power of two of images, at most `MOST_PREDICTED` of its platform and
    at most its part of a training batch. So few images cost little, and any numbers of
    images share a few compiled functions.

    Args:
      num_images: Number of images to predict, over all processes.
    """
    devices = jax.device_count()
    share = math.ceil(max(num_images, 1) / devices)
    most = MOST_PREDICTED.get(jax.default_backend(), MOST_PREDICTED["gpu"])
    trained = eval_batch_size(config) // devices
    return min(1 << (share - 1).bit_length(), most, trained) * devices


def scored_rows(data: Data, split: str, most: int) -> Int64[np.ndarray, " row"]:
    """Returns rows of scored images of a split: all, or `most` evenly spaced ones."""
    rows = np.flatnonzero(data.verified_rows(split).scored())
    number = min(most, len(rows))
    return rows[np.arange(number) * len(rows) // max(number, 1)]


def eval_batches(
    config: Config,
    data: Data,
    split: str,
    num_images: int = 0,
    global_batch_size: int | None = None,
) -> Batches:
    """Yields every image of a split once, or some of those that are scored.

    An image that is not scored (see `Rows.scored`) has mask 0, so that no sum counts
    it, and its own index, so that it is predicted.

    Args:
      num_images: Largest number of scored images, evenly spaced in the split; 0 for
        every image of the split, scored or not.
      global_batch_size: Images in a batch; None for `eval_batch_size`.
    """
    verified = data.verified_rows(split)
    images, scored = data.split(split), verified.scored()
    if num_images > 0:
        rows = scored_rows(data, split, num_images)
        images, scored = images.select(rows), scored[rows]
    return pipeline.eval_batches(
        images.source,
        transform=eval_transform(config),
        policy=pipeline.LabelPolicy(num_slots=eval_slots(verified)),
        shard=share(config, global_batch_size or eval_batch_size(config)),
        scored=scored,
        name=f"split {split}",
    )


def image_files(
    config: Config, listing: Listing, short_side: int | None = None
) -> ImageFiles:
    """Returns the files of a listing, to be prepared as the run's images were.

    Args:
      short_side: See `stored_short_side`.
    """
    return ImageFiles(listing, largest_short_side(config, short_side))


def largest_short_side(config: Config, short_side: int | None = None) -> int:
    """Returns `stored_short_side`, or a size larger than any image's if it is None."""
    return stored_short_side(config, short_side) or recode.MAX_PIXELS


def stored_short_side(config: Config, short_side: int | None = None) -> int | None:
    """Returns the short side that a run's own images were reduced to, in pixels.

    Args:
      short_side: The size that the dataset records; None if it records none.

    Returns:
      Pixels; None if images are stored in their original size.
    """
    data = config.data
    # TFDS does not reduce the images of open_images_v4.
    if data.dataset == "open_images_v4":
        return None
    seen = math.ceil(data.image_size_pixels / data.crop_share)
    return short_side or max(recode.SHORT_SIDE, seen)


def file_batches(
    config: Config, files: pipeline.RandomAccess, global_batch_size: int | None = None
) -> Batches:
    """Yields every image of a list of files once; damaged ones are masked.

    Args:
      global_batch_size: Images in a batch; None for `file_batch_size`.
    """
    size = global_batch_size or file_batch_size(config, len(files))
    return pipeline.eval_batches(
        files,
        transform=eval_transform(config),
        policy=pipeline.LabelPolicy(num_slots=1),
        shard=share(config, size),
        mask_damaged=True,
    )


def unlabelled_batches(
    config: Config, source: pipeline.RandomAccess, most: int | None = None
) -> Batches:
    """Yields each image of a source once, in random order.

    Batches have the size of training, because statistics of BatchNorm depend on it.

    Args:
      most: Largest number of images; None for all.

    Yields:
      Batches of `images` and `mask`; damaged images and padding have mask 0.
    """
    rows = np.random.default_rng(config.seed).permutation(len(source))[:most]
    shuffled, size = pipeline.Reordered(source, rows), eval_batch_size(config)
    for batch in file_batches(config, shuffled, size):
        yield {name: batch[name] for name in ("images", "mask")}


def eval_transform(config: Config) -> EvalTransform:
    """Returns the transform of images in evaluation and prediction."""
    return EvalTransform(
        size_pixels=config.data.image_size_pixels,
        crop_share=config.data.crop_share,
    )


def stages_of(config: Config, num_images: Callable[[str], int]) -> tuple[Stage, ...]:
    """Returns the run's stages, with their lengths in steps.

    Args:
      num_images: Returns the number of images of a split.
    """
    return tuple(_stage(config, given, num_images) for given in config.stages)


def _stage(
    config: Config, given: StageConfig, num_images: Callable[[str], int]
) -> Stage:
    in_epochs = not given.num_steps
    names = {field.name for field in dataclasses.fields(Stage)} - {"in_epochs"}
    values = {name: getattr(given, name) for name in names}
    if in_epochs:
        steps_per_epoch = num_images(given.split) / config.global_batch_size
        values["num_steps"] = max(1, round(given.num_epochs * steps_per_epoch))
    return Stage(**values, in_epochs=in_epochs)


def check_before_data(config: Config) -> None:
    """Checks the configuration before any data is opened or drawn.

    Raises:
      InputError: If the network cannot be built, a batch or a BatchNorm group does not
        divide over the devices, BatchNorm would see one value per channel, or a stage
        or a loss term is invalid.
    """
    model = config.model
    check_shape(model.depth, model.width, model.stem, model.variant)
    check_batch_size(config.global_batch_size, jax.device_count(), config.micro_batches)
    check_group(batch_norm_group(config.model), jax.device_count())
    _check_statistics(config, jax.device_count())
    # Only the length of a stage depends on the data, so any number of images will do.
    for stage in stages_of(config, lambda split: config.global_batch_size):
        _objective(config, stage, num_classes=1)


def _check_statistics(config: Config, num_devices: int) -> None:
    """Checks that BatchNorm averages over several values in training.

    Raises:
      InputError: If the last maps have one value per channel, whose variance is 0.
    """
    model = config.model
    side = last_side(config.data.image_size_pixels, model.stem)
    shared = 1 if model.batch_norm == "device" else batch_norm_group(model)
    num_images = config.global_batch_size // config.micro_batches
    num_images = num_images // num_devices * (shared or num_devices)
    trains = any(stage.trainable == "all" for stage in config.stages)
    if trains and num_images * side**2 == 1:
        raise InputError(
            "BatchNorm's statistics would come from one value per channel, because a "
            "device's part of a micro-batch is one image, whose last maps have one "
            "pixel; use a larger config.global_batch_size or "
            "config.data.image_size_pixels, fewer config.micro_batches, or "
            "config.model.batch_norm=global."
        )


def batch_norm_group(model: ModelConfig) -> int | None:
    """Returns N of the BatchNorm setting "group:N"; None for other settings."""
    _, _, number = model.batch_norm.partition(":")
    return int(number) if number else None


def prior_bias(
    counts: Num[np.ndarray, " class"], num_images: int
) -> Float32[np.ndarray, " class"]:
    """Returns each label's log prior odds (Lin et al. 2017, 3.3)."""
    prior = (counts + 0.5) / (num_images + 1.0)
    return np.log(prior / (1.0 - prior)).astype(np.float32)


@functools.cache
def network_of(
    model: ModelConfig,
    num_classes: int,
    embedding_dim: int,
    platform: str | None = None,
) -> Network:
    """Returns the network of a configuration; the same object for equal arguments.

    All runs of a process, in training and evaluation, share its compiled functions.

    Args:
      embedding_dim: Size of the embedding head's output; 0 for no head.
      platform: Platform to compile for; None for that of the devices.
    """
    return make_network(
        depth=model.depth,
        num_classes=num_classes,
        embedding_dim=embedding_dim,
        variant=model.variant,
        width=model.width,
        stem=model.stem,
        dropout=model.dropout,
        dtype=jnp.dtype(model.compute_dtype),
        bn_axis=None if model.batch_norm == "device" else DATA_AXIS,
        bn_group=batch_norm_group(model),
        platform=platform,
    )


def make_plans(
    config: Config,
    stages: Sequence[Stage],
    *,
    num_classes: int,
    embedding_dim: int,
    classifier_bias: Float32[np.ndarray, " class"] | None = None,
    platform: str | None = None,
) -> tuple[StagePlan, ...]:
    """Builds every stage's objective, optimizer and network.

    Args:
      embedding_dim: See `network_of`; ignored in stages without an embedding head.
      classifier_bias: Initial bias of the classifier; None for 0.
      platform: See `network_of`.

    Raises:
      InputError: If a loss term or a parameter does not exist, or is out of range.
    """

    def network(stage: Stage) -> Network:
        dim = embedding_dim if stage.embedding_head else 0
        network = network_of(config.model, num_classes, dim, platform)
        if classifier_bias is None:
            return network
        return network._replace(init=with_bias(network.init, classifier_bias))

    unrolled = (platform or jax.default_backend()) == "cpu"
    return tuple(
        _plan(config, stage, network(stage), num_classes, unrolled=unrolled)
        for stage in stages
    )


def plans_of(config: Config, data: Data) -> tuple[StagePlan, ...]:
    """Returns the plans of a run; its training labels give the classifier's bias.

    Raises:
      InputError: If a stage or the label embedding does not fit the data.
    """
    num_classes = len(data.vocabulary)
    bias = None
    if config.model.prior_bias:
        counts = data.train_rows.class_counts(num_classes)
        bias = prior_bias(counts, data.split("train").num_examples)
    return make_plans(
        config,
        stages_of(config, lambda split: data.split(split).num_examples),
        num_classes=num_classes,
        embedding_dim=label_embedding_dim(config, data),
        classifier_bias=bias,
    )


def _plan(
    config: Config,
    stage: Stage,
    network: Network,
    num_classes: int,
    *,
    unrolled: bool,
) -> StagePlan:
    optimizer = config.optimizer
    scale = config.global_batch_size / (
        optimizer.base_batch_size or config.global_batch_size
    )
    schedule = warmup_cosine(
        peak=scale * optimizer.peak_lr * stage.peak_lr_scale,
        warmup_steps=int(stage.warmup_share * stage.num_steps),
        num_steps=stage.num_steps,
    )
    settings = StepSettings(
        apply=network.apply,
        objective=_objective(config, stage, num_classes),
        optimizer=make_optimizer(
            name=optimizer.name,
            schedule=schedule,
            weight_decay=optimizer.weight_decay,
            momentum=optimizer.momentum,
            clip_norm=optimizer.clip_norm or None,
        ),
        learning_rate=schedule,
        restyling=config.data.restyling,
        augmentation=config.data.augmentation,
        mix_probability=config.data.mix_probability,
        micro_batches=config.micro_batches,
        unrolled=unrolled,
        average_rate=_average_rate(config, stage),
        shard_state=optimizer.shard_state,
        frozen=("trunk",) if stage.trainable == "last_layer" else (),
        seed=config.seed,
        compiler_options=network.compiler_options,
    )
    return StagePlan(stage=stage, settings=settings, init=network.init)


def _average_rate(config: Config, stage: Stage) -> Rate | None:
    optimizer = config.optimizer
    if optimizer.average == "ema":
        return ema_rate(optimizer.ema_decay)
    if optimizer.average == "swa":
        return swa_rate(stage.num_steps, optimizer.swa_share)
    return None


def _objective(config: Config, stage: Stage, num_classes: int) -> Objective:
    return make_objective(
        stage.terms,
        num_steps=stage.num_steps,
        num_classes=num_classes,
        unknown=config.data.unknown,
    )
