"""From a checked configuration to the parts of a run: the only reader of its fields.

Comes after `config` and before everything that works: what is built here takes plain
arguments and knows nothing of the configuration.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxii.data import embedding, open_images, pipeline, sources, toy_regions
from jaxii.data.images import EvalTransform, TrainTransform
from jaxii.data.labels import Vocabulary, resolve_rows
from jaxii.errors import InputError
from jaxii.model import pretrained
from jaxii.model.multitask import Network, make_network
from jaxii.objective.multitask import make_objective
from jaxii.objective.schedule import warmup_cosine
from jaxii.train.loop import StagePlan
from jaxii.train.mesh import DATA_AXIS, check_batch_size
from jaxii.train.optimizer import make_optimizer
from jaxii.train.stages import Stage, make_stages
from jaxii.train.step import StepSettings

Progress = Callable[[int, int, str], None]
Batches = Iterator[dict[str, np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The labels of a split's images, resolved: images i has offsets[i]:offsets[i+1]."""

    offsets: np.ndarray
    label_ids: np.ndarray
    confidences: np.ndarray

    def present(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns offsets and ids of the labels of confidence 0.5 and more."""
        kept = self.confidences >= 0.5
        before = np.concatenate([[0], np.cumsum(kept)])
        return before[self.offsets].astype(np.int64), self.label_ids[kept]


@dataclass(frozen=True, kw_only=True)
class Data:
    """A prepared dataset, with its validation split carved out of train.

    Attributes:
      directory: where it lies.
      vocabulary: the labels.
      slices: names of the slices that figures are cut by.
      splits: train, validation and, where there are some, tuning and test.
      train_rows: labels of the training split as they train.
    """

    directory: Path
    vocabulary: Vocabulary
    slices: tuple[str, ...]
    splits: Mapping[str, sources.Split]
    train_rows: Rows

    def split(self, name: str) -> sources.Split:
        """Returns a split by name.

        Raises:
          InputError: there is none, or it is empty.
        """
        if name in self.splits and self.splits[name].num_examples > 0:
            return self.splits[name]
        filled = [n for n, s in self.splits.items() if s.num_examples > 0]
        raise InputError(
            f"{self.directory} has no images in split {name!r}; it has "
            f"{', '.join(filled)}."
        )

    def has_truth(self, name: str) -> bool:
        """Says whether a split is there and labelled, so that it can be scored."""
        return (
            name in self.splits
            and self.splits[name].num_examples > 0
            and len(self.splits[name].index.label_ids) > 0
        )


def data_root() -> Path:
    """Returns the folder that datasets live in unless the configuration names another."""
    default = Path.home() / ".cache" / "jaxii" / "data"
    return Path(os.environ.get("JAXII_DATA_DIR") or default)


def data_directory(config: ConfigDict) -> Path:
    """Returns the folder of the prepared dataset.

    Raises:
      InputError: a dataset that is not drawn here, and no folder given.
    """
    if config.data.directory:
        return Path(config.data.directory)
    if config.data.dataset == "toy_regions":
        return data_root() / "toy_regions"
    raise InputError(
        f"config.data.directory is empty and {config.data.dataset} is not drawn here; "
        "prepare the data once (python -m jaxii.main prepare --help) and give its "
        "folder with --data_dir."
    )


def prepare_toy_regions(directory: Path, on_progress: Progress | None = None) -> None:
    """Draws the embedded dataset and prepares it, unless that has been done."""
    if (directory / "dataset_info.json").exists():
        return
    drawn = directory.parent / f"{directory.name}_files"
    toy_regions.write(drawn, on_progress=on_progress)
    layout = open_images.Layout.find(
        drawn,
        test_labels=drawn / "truth" / "solution.csv",
        test_metadata=drawn / "truth" / "test_meta.csv",
    )
    open_images.prepare(layout, directory, on_progress=on_progress)


def open_data(config: ConfigDict, on_progress: Progress | None = None) -> Data:
    """Opens the prepared dataset; draws the embedded one first if need be.

    Raises:
      InputError: there is none, or a split that training needs is empty.
    """
    directory = data_directory(config)
    if config.data.dataset == "toy_regions":
        prepare_toy_regions(directory, on_progress)
    dataset = sources.open_dataset(directory)
    splits = dataset.splits
    if "validation" not in splits:
        splits = dataset.carve(config.data.validation_fraction)
    data = Data(
        directory=directory,
        vocabulary=dataset.vocabulary,
        slices=dataset.slices,
        splits=splits,
        train_rows=_resolved(config, splits["train"]),
    )
    data.split("train")
    data.split("validation")
    return data


def rows_of(data: Data, split: str) -> Rows:
    """Returns a split's labels as people verified them, for scoring."""
    return _resolve(data.split(split), machine_labels="ignored", machine_threshold=0.5)


def _resolved(config: ConfigDict, split: sources.Split) -> Rows:
    return _resolve(
        split,
        machine_labels=config.data.machine_labels,
        machine_threshold=config.data.machine_threshold,
    )


def _resolve(split: sources.Split, **choice: Any) -> Rows:
    index = split.index
    offsets, label_ids, confidences = resolve_rows(
        index.offsets, index.label_ids, index.confidences, index.label_sources, **choice
    )
    return Rows(offsets=offsets, label_ids=label_ids, confidences=confidences)


def class_counts(rows: Rows, num_classes: int) -> np.ndarray:
    """Returns in how many images each label is present, [class] float64."""
    return np.bincount(
        rows.label_ids, weights=rows.confidences, minlength=num_classes
    ).astype(np.float64)


def make_label_embedding(
    config: ConfigDict, data: Data
) -> embedding.LabelEmbedding:
    """Factorises the co-occurrence of the training split's labels."""
    offsets, label_ids = data.train_rows.present()
    return embedding.label_embedding(
        offsets,
        label_ids,
        len(data.vocabulary),
        dim=config.label_embedding.dim,
        positive=config.label_embedding.positive,
        context_smoothing=config.label_embedding.context_smoothing,
        seed=config.seed,
    )


def share(config: ConfigDict, global_batch_size: int) -> pipeline.Share:
    """Returns this process's part of the batches."""
    return pipeline.Share(
        global_batch_size=global_batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=config.data.num_threads,
    )


def slots(config: ConfigDict, rows: Rows) -> int:
    """Returns the slots a batch needs an image: the most labels, in eights."""
    most = int(np.diff(rows.offsets).max(initial=1))
    return min(math.ceil(most / 8) * 8, config.data.most_labels)


def train_batches(config: ConfigDict, data: Data, start_example: int) -> Batches:
    """Yields training batches for ever from an example of the run on, as they are sent."""
    policy = pipeline.LabelPolicy(
        num_slots=slots(config, data.train_rows),
        machine_labels=config.data.machine_labels,
        machine_threshold=config.data.machine_threshold,
    )
    transform = TrainTransform(
        size_pixels=config.data.image_size_pixels,
        min_area=config.data.crop_min_area,
        mirror=config.data.mirror,
    )
    batches = pipeline.train_batches(
        data.split("train").source,
        transform=transform,
        policy=policy,
        share=share(config, config.global_batch_size),
        seed=config.seed,
        start_example=start_example,
    )
    for batch in batches:
        yield {k: v for k, v in batch.items() if k not in (pipeline.INDEX, "slice_ids")}


def eval_batch_size(config: ConfigDict) -> int:
    """Returns the batch of evaluation: the training batch, made to fit these devices."""
    devices = jax.device_count()
    return math.ceil(config.global_batch_size / devices) * devices


def eval_batches(config: ConfigDict, data: Data, split: str) -> Batches:
    """Yields every image of a split once."""
    policy = pipeline.LabelPolicy(num_slots=slots(config, rows_of(data, split)))
    return pipeline.eval_batches(
        data.split(split).source,
        transform=eval_transform(config),
        policy=policy,
        share=share(config, eval_batch_size(config)),
    )


def file_batches(config: ConfigDict, files: pipeline.RandomAccess) -> Batches:
    """Yields every picture of a list of files once; damaged ones are masked."""
    return pipeline.eval_batches(
        files,
        transform=eval_transform(config),
        policy=pipeline.LabelPolicy(num_slots=1),
        share=share(config, eval_batch_size(config)),
        mask_damaged=True,
    )


def eval_transform(config: ConfigDict) -> EvalTransform:
    """Returns the view of a picture that evaluation and prediction use."""
    return EvalTransform(
        size_pixels=config.data.image_size_pixels,
        central_share=config.data.central_share,
    )


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The run's network with and without the embedding head, each made once."""

    config: ConfigDict
    num_classes: int
    embedding_dim: int
    classifier_bias: np.ndarray | None = None
    _made: dict[bool, Network] = field(default_factory=dict)

    def get(self, embedding_head: bool) -> Network:
        """Returns the network; the same object for the same argument."""
        if embedding_head not in self._made:
            model = self.config.model
            self._made[embedding_head] = make_network(
                depth=model.depth,
                num_classes=self.num_classes,
                embedding_dim=self.embedding_dim if embedding_head else 0,
                width=model.width,
                stem=model.stem,
                dropout=model.dropout,
                dtype=jnp.dtype(model.compute_dtype),
                classifier_bias=self.classifier_bias,
                bn_axis=DATA_AXIS if model.batch_norm == "global" else None,
            )
        return self._made[embedding_head]


def prior_bias(counts: np.ndarray, num_images: int) -> np.ndarray:
    """Returns each label's log prior odds, [class] float32 (Lin et al. 2017, 3.3)."""
    prior = (counts + 0.5) / (num_images + 1.0)
    return np.log(prior / (1.0 - prior)).astype(np.float32)


def make_networks(config: ConfigDict, data: Data, embedding_dim: int) -> Networks:
    """Returns the networks of a run, the classifier's bias set from the training labels."""
    num_classes = len(data.vocabulary)
    bias = None
    if config.model.prior_bias:
        counts = class_counts(data.train_rows, num_classes)
        bias = prior_bias(counts, data.split("train").num_examples)
    return Networks(
        config=config,
        num_classes=num_classes,
        embedding_dim=embedding_dim,
        classifier_bias=bias,
    )


def stages_of(config: ConfigDict, num_train: int) -> tuple[Stage, ...]:
    """Returns the run's stages, their lengths in steps."""
    return make_stages(
        [_plain(stage) for stage in config.stages],
        steps_per_epoch=num_train / config.global_batch_size,
    )


def make_plans(
    config: ConfigDict, networks: Networks, stages: tuple[Stage, ...]
) -> tuple[StagePlan, ...]:
    """Builds every stage's objective, optimizer and network.

    Raises:
      InputError: a batch that does not divide, a term or parameter that does not exist.
    """
    check_batch_size(config.global_batch_size, jax.device_count(), config.micro_batches)
    return tuple(_plan(config, networks, stage) for stage in stages)


def _plan(config: ConfigDict, networks: Networks, stage: Stage) -> StagePlan:
    optimizer = config.optimizer
    schedule = warmup_cosine(
        peak=stage.peak_lr or optimizer.peak_lr,
        warmup_steps=int(stage.warmup_share * stage.num_steps),
        num_steps=stage.num_steps,
    )
    network = networks.get(stage.embedding_head)
    settings = StepSettings(
        apply=network.apply,
        objective=make_objective(
            stage.terms,
            num_steps=stage.num_steps,
            num_classes=networks.num_classes,
            unknown=config.data.unknown,
        ),
        optimizer=make_optimizer(
            name=optimizer.name,
            schedule=schedule,
            weight_decay=optimizer.weight_decay,
            momentum=optimizer.momentum,
            clip_norm=optimizer.clip_norm or None,
        ),
        learning_rate=schedule,
        micro_batches=config.micro_batches,
        ema_decay=optimizer.ema_decay,
        seed=config.seed,
    )
    return StagePlan(stage=stage, settings=settings, init=network.init)


def pretrained_start(config: ConfigDict) -> Callable[..., tuple[Any, Any]] | None:
    """Returns what replaces fresh parameters by the configured file's, if there is one."""
    if not config.model.pretrained:
        return None
    return partial(_load_pretrained, config.model.pretrained)


def _load_pretrained(path: str, params: Any, batch_stats: Any) -> tuple[Any, Any]:
    loaded = pretrained.load_pretrained(path, params, batch_stats)
    return loaded.params, loaded.batch_stats


def _plain(value: Any) -> Any:
    """Returns a stage as dicts and tuples, whether it came from Python or from JSON."""
    if isinstance(value, Mapping | ConfigDict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_plain(item) for item in value)
    return value
