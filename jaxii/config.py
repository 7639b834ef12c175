"""The configuration of a run: each field once, with its type, default, unit and range.

A recipe in `configs/` changes a `default_config()` and returns it; `Config.resolve`
turns it into a `Config`, which is checked and immutable. Modules below `jaxii.runs`
take plain arguments instead of a `Config`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    TypeVar,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from ml_collections import ConfigDict  # pyright: ignore[reportMissingTypeStubs]

from jaxii.errors import InputError, nearest

# Fields that do not affect the result and may change on resume.
FREE_FIELDS = (
    "data.directory",
    "data.num_threads",
    "evaluate_train_images",
    "log_every_steps",
    "on_failed_save",
    "optimizer.shard_state",
    "track",
)
# Layers that `adapt` trains -> passes over the tuning split, and peak learning rate as
# a share of the run's.
ADAPT_EPOCHS = {"all": 10.0, "last_layer": 20.0}
ADAPT_LR_SHARES = {"all": 0.1, "last_layer": 1.0}
# Largest batch of `adapt`, for which its epochs were chosen, unless there are more
# devices.
ADAPT_BATCH_SIZE = 64
# A slot takes 8 bytes: with mask and slice, an image sends less than 1 KiB of labels.
MOST_LABELS = 126

# A constant, or (share of the stage, value) points, interpolated linearly.
Number = int | float | tuple[tuple[float, float], ...]
# Loss name -> its weight, or a mapping with `weight` and the loss's parameters.
Terms = Mapping[str, Number | Mapping[str, Number | None]]


@dataclass(frozen=True)
class Range:
    """The allowed values of a numeric field, both ends included."""

    low: float
    high: float


@dataclass(frozen=True)
class Pattern:
    """The allowed values of a text field: a regular expression and its description."""

    regex: str
    words: str


class _Section:
    """A group of fields, each checked against its annotation."""

    path: ClassVar[str]

    def __init_subclass__(cls, path: str) -> None:
        cls.path = path

    def __post_init__(self) -> None:
        self.check(vars(self))

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> None:
        """Raises InputError for the first field whose value is not allowed."""
        for name, value in values.items():
            if allowed := _allowed(_kinds(cls)[name], value):
                given = " ".join(repr(value).split())  # arrays have several lines
                raise InputError(f"{cls._where(name, values)}={given}; {allowed}.")

    @classmethod
    def _where(cls, name: str, values: Mapping[str, Any]) -> str:
        return f"{cls.path}.{name}"


@dataclass(frozen=True, kw_only=True)
class DataConfig(_Section, path="config.data"):
    """The dataset, its splits and labels, and the image transforms."""

    # toy_regions is drawn at first use; the others have to be prepared first.
    dataset: Literal["toy_regions", "kaggle", "open_images_v4"] = "toy_regions"
    # Folder of the prepared dataset; "" is the default place of toy_regions.
    directory: str = ""
    # CSV with the column label_code: the labels to train on, in order. Labels of
    # open_images_v4 are mapped to them by code; "" takes the dataset's own labels.
    labels_file: str = ""
    # Side of the square input of the network.
    image_size_pixels: Annotated[int, Range(16, 4096)] = 64
    # Strength of every random change of training images: crop, geometry, colours,
    # blur, noise, JPEG quality and scale. 0 is none, 1 that of common recipes.
    augmentation: Annotated[float, Range(0.0, 2.5)] = 1.0
    # Strength of random changes of style: channels mixed or greyed, edges outlined,
    # textures smoothed. Meant for test images from another source; 0 is none.
    restyling: Annotated[float, Range(0.0, 1.6)] = 0.0
    # Mirror half of the training images.
    mirror: bool = True
    # Share of training images that are mixed with another (mixup or CutMix).
    mix_probability: Annotated[float, Range(0.0, 1.0)] = 0.0
    # Sides of the central crop in evaluation, as a share of the image's; 1 is the whole
    # image.
    crop_share: Annotated[float, Range(0.1, 1.0)] = 1.0
    # Average the outputs over views of an image: whole and enlarged, and both mirrored
    # if `mirror` is on. Evaluation and prediction take up to four times as long;
    # evaluations during training use the whole image only.
    test_time_augmentation: bool = False
    # Share of the training groups held out as `validation`, if the dataset has none.
    validation_fraction: Annotated[float, Range(0.001, 0.9)] = 0.1
    # Domain of the training data, or "fold K of N" of its groups, that is kept out of
    # training and becomes the split `held_out`, which chooses the checkpoint and the
    # threshold; "" for none.
    held_out_domain: str = ""
    # How training uses labels that only a machine gave. Training images without any
    # label in use are left out.
    machine_labels: Literal["ignored", "soft", "thresholded"] = "ignored"
    # Lowest confidence at which a thresholded machine label counts as present.
    machine_threshold: Annotated[float, Range(0.0, 1.0)] = 0.5
    # How training treats labels that are not listed for an image.
    unknown: Literal["negative", "ignored"] = "negative"
    # Largest number of labels of an image in training; the least confident are dropped.
    # Evaluation uses all labels.
    most_labels: Annotated[int, Range(1, MOST_LABELS)] = MOST_LABELS
    # Threads of a process that read and decode images. 0: one per core, 4 to 16, and to
    # train on CPUs, half of the cores.
    num_threads: Annotated[int, Range(0, 512)] = 0
    # Train on the first batch repeatedly, to measure the speed without the input
    # pipeline. The figures of such a run are not a result.
    reuse_batch: bool = False


@dataclass(frozen=True, kw_only=True)
class LabelEmbeddingConfig(_Section, path="config.label_embedding"):
    """The label embedding: the factorised PMI matrix of the training labels."""

    # Numbers per label; at most the number of classes.
    dim: Annotated[int, Range(1, 1_000_000)] = 1024
    # Positive PMI: values below 0 become 0.
    positive: bool = False
    # Exponent of the context counts (Levy et al. 2015: 0.75); 1 does not smooth.
    context_smoothing: Annotated[float, Range(0.1, 1.0)] = 1.0


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Section, path="config.model"):
    """The network and its initial weights."""

    # resnext is 32x4d.
    variant: Literal["resnet", "resnet_d", "se_resnet", "resnext", "wide_resnet"] = (
        "resnet"
    )
    depth: Literal[18, 26, 34, 50, 101, 152] = 50
    # Channels of the network's first stage; 64 in the published networks.
    width: Annotated[int, Range(8, 1024)] = 64
    # "imagenet": 7x7 stride 2 and max-pool. "small": 3x3, for images of 32-64 pixels.
    stem: Literal["imagenet", "small"] = "imagenet"
    # Dropout before the embedding head.
    dropout: Annotated[float, Range(0.0, 0.99)] = 0.2
    # Type of the network's arithmetic; parameters and losses are always float32.
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # Start the classifier's bias at the log prior odds of each label.
    prior_bias: bool = True
    # BatchNorm statistics over each "device"'s share of the batch, over the shares of N
    # neighbouring devices ("group:N"), or over the "global" batch.
    batch_norm: Annotated[
        str,
        Pattern(
            r"device|global|group:[1-9][0-9]*",
            "device, global, or group:N for groups of N devices, such as group:8",
        ),
    ] = "device"
    # Weights of the same variant, depth, width and stem that the first stage's trunk
    # starts from: a run's workdir (its best checkpoint), or a .safetensors or .pth file
    # of torchvision or timm, read without running code. The heads are left out. The
    # provenance names a file; the Inclusive Images Challenge forbids such weights.
    pretrained: str = ""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(_Section, path="config.optimizer"):
    """The update rule, and the average of the parameters to evaluate."""

    name: Literal["sgd", "adamw", "lars", "lamb"] = "sgd"
    # Highest learning rate; a stage multiplies it by its `peak_lr_scale`.
    peak_lr: Annotated[float, Range(1e-12, 1e3)] = 0.05
    # Batch size that peak_lr is meant for; the rate is multiplied by global_batch_size
    # / base_batch_size (Goyal et al. 2017, 2.1). 0 does not scale.
    base_batch_size: Annotated[int, Range(0, 1_000_000)] = 0
    # Applied to matrices and convolutions, not to BatchNorm or biases.
    weight_decay: Annotated[float, Range(0.0, 1e3)] = 1e-4
    momentum: Annotated[float, Range(0.0, 0.9999)] = 0.9
    # Largest global norm of the gradient; 0 does not clip.
    clip_norm: Annotated[float, Range(0.0, 1e9)] = 0.0
    # Divide the optimizer state over the devices (ZeRO stage 1) instead of replicating
    # it: less memory, one more collective, the same result up to rounding.
    shard_state: bool = False
    # Parameters to evaluate: the current ones ("none"), their moving average ("ema"),
    # or their uniform average over a stage's last part ("swa").
    average: Literal["none", "ema", "swa"] = "none"
    # Decay of the moving average per step.
    ema_decay: Annotated[float, Range(0.0, 0.999999)] = 0.999
    # Share of a stage, at its end, over which the uniform average is taken.
    swa_share: Annotated[float, Range(0.0, 1.0)] = 0.25


@dataclass(frozen=True, kw_only=True)
class StageConfig(_Section, path="stage"):
    """One part of a run: an objective, a length, and the trained heads."""

    # Unique; the name of the stage's folder of checkpoints.
    name: Annotated[str, Pattern(r"\w*[^\W_]\w*", "letters, digits and _ in the name")]
    # The objective; see `jaxii.objective.objective.make_objective`.
    terms: Terms
    # Length in passes over `split`, or in updates: exactly one of them is above 0.
    num_epochs: Annotated[float, Range(0.0, 1e9)] = 0.0
    num_steps: Annotated[int, Range(0, 1_000_000_000)] = 0
    # Whether the label-embedding head exists; a head of the previous stage is dropped
    # otherwise.
    embedding_head: bool = False
    # Split to train on. The result of a stage on "tuning" is its last checkpoint:
    # `validation` would choose the least adapted one.
    split: Literal["train", "tuning"] = "train"
    # "last_layer" trains the classifier alone; the trunk is frozen and normalises by
    # BatchNorm's running statistics, which are frozen too.
    trainable: Literal["all", "last_layer"] = "all"
    # Highest learning rate, as a multiple of `optimizer.peak_lr`.
    peak_lr_scale: Annotated[float, Range(1e-6, 1e6)] = 1.0
    # Share of the stage during which the learning rate rises to the peak.
    warmup_share: Annotated[float, Range(0.0, 0.999999)] = 0.05
    # Checkpoint of the previous stage to start from: the best by the validation metric,
    # or the last.
    enters_from: Literal["best", "last"] = "best"
    # Evaluations without a rise of plateau_min_delta after which the stage ends early;
    # 0 never ends early.
    plateau_evaluations: Annotated[int, Range(0, 1_000_000)] = 0
    plateau_min_delta: Annotated[float, Range(0.0, 1.0)] = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        label = f"stage {self.name!r}"
        if not self.terms:
            raise InputError(f"{label} has no 'terms'; add it.")
        if (self.num_epochs > 0) == (self.num_steps > 0):
            raise InputError(
                f"{label}: num_epochs={self.num_epochs}, num_steps={self.num_steps}; "
                "set exactly one of them to a value above 0."
            )
        if "embedding" in self.terms and not self.embedding_head:
            raise InputError(
                f"{label} has an embedding term but no embedding head; set "
                "embedding_head=True or remove the term."
            )
        if self.trainable == "last_layer" and self.embedding_head:
            raise InputError(
                f"{label} trains only the classifier but has an embedding head; set "
                "embedding_head=False or trainable='all'."
            )

    @classmethod
    def _where(cls, name: str, values: Mapping[str, Any]) -> str:
        return f"stage {values['name']!r}: {name}"


@dataclass(frozen=True, kw_only=True)
class Config(_Section, path="config"):
    """The configuration of a run; only `FREE_FIELDS` do not affect its result."""

    # Seed of every random choice: order, augmentation, initialisation, dropout.
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    # Examples in one update, over all devices of all processes.
    global_batch_size: Annotated[int, Range(1, 1_000_000)] = 64
    # Slices of a device's batch whose gradients are accumulated for an update.
    micro_batches: Annotated[int, Range(1, 1_000_000)] = 1
    # Workdir of a run whose best checkpoint the first stage starts from; "" for none.
    start_from: str = ""
    # Stage of that run; "" for the last one trained.
    start_from_stage: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    label_embedding: LabelEmbeddingConfig = field(default_factory=LabelEmbeddingConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    # In order, at least one.
    stages: tuple[StageConfig, ...]
    # Steps between evaluations and saves, which also happen at the end of each stage.
    evaluate_every_steps: Annotated[int, Range(1, 1_000_000_000)] = 200
    # Training images to evaluate beside `validation`, without augmentation; 0 is none.
    evaluate_train_images: Annotated[int, Range(0, 10_000_000)] = 0
    # Steps between lines of the log, and between points of the curves.
    log_every_steps: Annotated[int, Range(1, 1_000_000_000)] = 20
    # Service that also records the run, beside TensorBoard's files in the workdir:
    # "wandb" (Weights & Biases), "mlflow", or "" for none. Each is an extra of jaxii.
    track: Literal["", "wandb", "mlflow"] = ""
    # Consecutive non-finite updates, which are skipped, after which the run stops.
    most_skipped_steps: Annotated[int, Range(1, 1_000_000_000)] = 20
    # If a checkpoint cannot be saved (disk full, no permission): "stop" with exit code
    # 1, or "go_on" and save again when the next save is due. With several processes the
    # run stops in either case, because only some of them may notice the failure.
    on_failed_save: Literal["stop", "go_on"] = "stop"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start_from and self.model.pretrained:
            raise InputError(
                f"config.start_from={self.start_from!r} and config.model.pretrained="
                f"{self.model.pretrained!r} are both set, but the first stage starts "
                "from only one; clear one of them."
            )
        names = [stage.name for stage in self.stages]
        for name in names:
            if names.count(name) > 1:
                raise InputError(
                    f"two stages are named {name!r}; give each a unique name."
                )
        for before, after in itertools.pairwise(self.stages):
            if after.embedding_head and not before.embedding_head:
                raise InputError(
                    f"stage {after.name!r} has an embedding head, but the previous "
                    f"stage {before.name!r} has none; a later stage can drop the head "
                    "but not add one."
                )

    @classmethod
    def resolve(cls, fields: Mapping[str, Any] | ConfigDict) -> "Config":
        """Returns the configuration from a recipe or from the output of `to_dict`.

        Args:
          fields: Field name -> value; missing fields take their defaults.

        Raises:
          InputError: If a field does not exist or a value is not allowed.
        """
        return _build(cls, {"stages": (), **_frozen(fields)})

    def moved(self, directory: str) -> "Config":
        """Returns the configuration with another `data.directory`; "" keeps it."""
        if not directory:
            return self
        data = dataclasses.replace(self.data, directory=directory)
        return dataclasses.replace(self, data=data)

    def to_dict(self) -> dict[str, Any]:
        """Returns every field, as JSON values of `config.json`."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def content_hash(self) -> str:
        """Returns 16 hexadecimal digits that depend on all fields but `FREE_FIELDS`."""
        fields = flatten(self.to_dict())
        for name in FREE_FIELDS:
            del fields[name]
        text = json.dumps(fields, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Recipe(ConfigDict):
    """Fields of a `Config`; a stage gets every field, for the command line to set."""

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "stages" and isinstance(value, list | tuple):
            value = tuple(map(_whole_stage, cast(Sequence[object], value)))
        cast(Any, super()).__setitem__(key, value)


def default_config() -> ConfigDict:
    """Returns every field at its default, for a recipe to change; `stages` is empty.

    The fields and their types are fixed: a recipe that misspells a field fails.
    """
    config = _Recipe(cast(Any, _defaults(Config)))
    config.lock()
    return config


def field_names() -> list[str]:
    """Returns sections, `section.field`, and the fields of `stages[0]`."""
    fields: Mapping[str, object] = _frozen(default_config())
    stage = [f"stages[0].{name}" for name in _kinds(StageConfig)]
    return [*fields, *flatten(fields), "stages[0]", *stage]


def check_returned(fields: object, recipe: str) -> None:
    """Checks that a recipe returned a configuration.

    Args:
      fields: The result of its `get_config`.
      recipe: The recipe as the message names it.

    Raises:
      InputError: If it did not.
    """
    if not isinstance(fields, ConfigDict):
        raise InputError(
            f"{recipe}: get_config() does not return a configuration; change and "
            "return the result of jaxii.config.default_config()."
        )


def check_equal(
    theirs: object, ours: object, names: Sequence[str], has: str, so: str
) -> None:
    """Checks that a section of another run equals ours in the fields `names`.

    Args:
      has: Start of the error, which names the other run and the section.
      so: End of the error.

    Raises:
      InputError: If a field differs; names the field.
    """
    for name in names:
        one, other = getattr(theirs, name), getattr(ours, name)
        if one != other:
            raise InputError(f"{has}.{name}={one!r}, but this run has {other!r}{so}")


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Returns `field: one -> other` for every field that differs in two `to_dict`."""
    a, b = flatten(one), flatten(other)
    return [
        f"{path}: {a.get(path, 'absent')} -> {b.get(path, 'absent')}"
        for path in sorted(a.keys() | b.keys())
        if a.get(path, "absent") != b.get(path, "absent")
    ]


def flatten(fields: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Returns `section.field` and `stages[0].field` -> value, in order.

    Args:
      fields: `to_dict` of a configuration.
      prefix: Start of every name.
    """
    flat: dict[str, object] = {}
    for key, value in fields.items():
        if isinstance(value, dict) and value:
            flat |= flatten(cast(dict[str, object], value), f"{prefix}{key}.")
        elif isinstance(value, list) and key == "stages":
            parts = enumerate(cast(list[object], value))
            flat |= flatten({f"{key}[{i}]": part for i, part in parts}, prefix)
        else:
            flat[prefix + key] = value
    return flat


def _defaults(section: type[_Section]) -> ConfigDict:
    values: dict[str, object] = {"stages": ()} if section is Config else {}
    for each in dataclasses.fields(cast(Any, section)):
        if each.default is not dataclasses.MISSING:
            values[each.name] = each.default
        elif each.default_factory is not dataclasses.MISSING:
            values[each.name] = _defaults(_kinds(section)[each.name])
    return ConfigDict(values)


_S = TypeVar("_S", bound=_Section)


def _build(section: type[_S], fields: Mapping[str, Any]) -> _S:
    kinds = _kinds(section)
    for name in fields:
        if name not in kinds:
            raise InputError(
                f"{section.path}.{name} is not a field; {nearest(name, kinds)}the "
                f"fields are {', '.join(kinds)}."
            )
    values = {k: _parsed(k, kinds[k], v) for k, v in fields.items()}
    section.check(values)
    return section(**values)


def _parsed(name: str, kind: Any, value: Any) -> Any:
    """Converts a value from JSON or a recipe to the type of its field."""
    if isinstance(kind, type) and issubclass(kind, _Section):
        if not isinstance(value, Mapping):
            raise InputError(
                f"config.{name} is {value!r}; use a dict with the fields "
                f"{', '.join(_kinds(kind))}."
            )
        return _build(kind, cast(Mapping[str, Any], value))
    if name == "stages" and isinstance(value, tuple):
        return tuple(map(_stage, cast(tuple[object, ...], value)))
    if _base(kind) is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def _whole_stage(given: object) -> object:
    """Adds the fields that a recipe's stage lacks; `_stage` checks those it has."""
    if not isinstance(given, Mapping):
        return given
    kinds = _kinds(StageConfig)
    defaults = cast(Any, _defaults(StageConfig))
    fields: dict[str, Any] = {**defaults, **cast(Mapping[str, Any], given)}
    return {k: _parsed(k, kinds[k], v) if k in kinds else v for k, v in fields.items()}


def _stage(given: object) -> StageConfig:
    if not isinstance(given, Mapping):
        raise InputError(
            f"config.stages contains {given!r}; use a dict with the fields of a stage: "
            f"{', '.join(_kinds(StageConfig))}."
        )
    fields = dict(cast(Mapping[str, Any], given))
    label, kinds = f"stage {fields.get('name', '?')!r}", _kinds(StageConfig)
    for name in fields:
        if name not in kinds:
            raise InputError(
                f"{label} has no field {name!r}; {nearest(name, kinds)}the fields "
                f"are {', '.join(kinds)}."
            )
    for name in ("name", "terms"):
        if name not in fields:
            raise InputError(f"{label} has no {name!r}; add it.")
    return _build(StageConfig, fields)


def _frozen(value: Any, *, in_terms: bool = False) -> Any:
    """Converts to dicts, tuples and Python's numbers, which are floats in terms."""
    if isinstance(value, Mapping | ConfigDict):
        items = cast(Mapping[str, Any], value).items()
        return {k: _frozen(v, in_terms=in_terms or k == "terms") for k, v in items}
    if isinstance(value, list | tuple):
        return tuple(_frozen(v, in_terms=in_terms) for v in cast(list[Any], value))
    if not isinstance(value, bool) and isinstance(value, Real):
        number = float if in_terms or not isinstance(value, Integral) else int
        return number(cast(Any, value))
    return value


@functools.cache
def _kinds(section: type[_Section]) -> Mapping[str, Any]:
    """Returns field -> annotation."""
    kinds = get_type_hints(section, include_extras=True)
    return {f.name: kinds[f.name] for f in dataclasses.fields(cast(Any, section))}


def _base(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _allowed(kind: Any, value: Any) -> str:
    """Returns what an annotation allows, or "" if it allows the value."""
    base, limits = _base(kind), get_args(kind)[1:]
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        # A boolean is not a choice, although True == 1.
        if value in choices and not isinstance(value, bool):
            return ""
        listed = ", ".join(str(choice) or "''" for choice in choices)
        return f"{nearest(str(value), map(str, choices))}use one of {listed}"
    if base is bool:
        return "" if isinstance(value, bool) else "use True or False"
    if get_origin(kind) is not Annotated:
        return _allowed_structure(kind, value)
    (limit,) = limits
    if isinstance(limit, Pattern):
        whole = isinstance(value, str) and re.fullmatch(limit.regex, value)
        return "" if whole else f"use {limit.words}"
    number = int if base is int else int | float
    is_number = isinstance(value, number) and not isinstance(value, bool)
    if is_number and limit.low <= value <= limit.high:
        return ""
    noun = "an integer" if base is int and isinstance(value, float) else "a value"
    return f"use {noun} in [{limit.low}, {limit.high}]"


def _allowed_structure(kind: Any, value: Any) -> str:
    if kind is str:
        return "" if isinstance(value, str) else "use a string"
    if kind == Terms:
        # Arrays and other objects are not JSON.
        with contextlib.suppress(TypeError):
            if isinstance(value, Mapping) and json.dumps(value):
                return ""
        return "use a dict of losses and weights: numbers, or (share, value) tuples"
    if kind == tuple[StageConfig, ...]:
        stages = isinstance(value, tuple) and bool(cast(tuple[object, ...], value))
        return "" if stages else "add at least one stage; each is a dict"
    return "" if isinstance(value, kind) else f"use a {kind.__name__}"
