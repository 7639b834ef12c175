"""The result of an evaluation: figures by split, with checkpoint, data and decoder.

`metrics.json` stores the result; the manifest `evaluation.json` lists all files.
"""

import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, TypeVar

import jax
import numpy as np
import polars as pl

from jaxii import manifest
from jaxii.data.prepared import WITHOUT_RECURRING
from jaxii.decoding.thresholds import DecoderChoice
from jaxii.errors import InputError
from jaxii.evaluation.held_out import HeldOut
from jaxii.evaluation.provenance import PARTS, Provenance
from jaxii.storage import AnyPath

# The manifest of an evaluation; written last, removed first.
EVALUATION = "evaluation.json"
_IN_FRAME = ("f2", "standard_error", "coverage", "labels_per_image")


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """How intervals are drawn.

    Attributes:
      by: "image", or "group" if images share a group.
      level: share of the draws within the interval.
      resamples: number of draws.
    """

    by: str
    level: float
    resamples: int


@dataclass(frozen=True, kw_only=True)
class SliceMetrics:
    """F2 of the images of one slice; the interval is None for a single group."""

    num_images: int
    f2: float
    standard_error: float
    interval: Sequence[float] | None


@dataclass(frozen=True, kw_only=True)
class DecoderMetrics:
    """Figures of one decoder on a split.

    Attributes:
      f2: mean over images.
      standard_error: standard error of `f2`.
      coverage: number of labels predicted correctly at least once.
      labels_per_image: mean number of labels predicted.
      parameter: the decoder's parameter by name, such as {"k": 5}; may be empty.
    """

    f2: float
    standard_error: float
    coverage: int
    labels_per_image: float
    parameter: Mapping[str, float | int | None]

    def to_json(self) -> dict[str, Any]:
        """Returns the figures and the parameter in one dict."""
        plain = asdict(self)
        parameter = plain.pop("parameter")
        return plain | parameter

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "DecoderMetrics":
        """Returns the figures that `to_json` wrote."""
        names = [field.name for field in fields(cls) if field.name != "parameter"]
        return cls(
            **{name: record[name] for name in names},
            parameter={k: v for k, v in record.items() if k not in names},
        )


@dataclass(frozen=True, kw_only=True)
class SplitMetrics:
    """All figures of one split; F2 is the mean over images unless named otherwise.

    Attributes:
      num_images: number of images with known truth; all figures are over them.
      num_images_without_truth: number of the other images.
      f2: F2 of the decoder in use.
      interval: bootstrap interval of `f2`; None for a single group.
      coverage: labels that the decoder in use predicts correctly at least once.
      labels_per_image_predicted: mean number of labels predicted by the decoder in use.
      labels_per_image_true: mean number of labels present.
      slices: figures of each slice that has images.
      worst_slice: the slice with the lowest F2.
      decoders: figures by decoder.
      threshold: the threshold of the decoder `threshold`.
      micro_f2: F2 of all entries together at `threshold`.
      macro_f2: mean F2 of classes at `threshold`; 0 for a class neither present nor
        predicted.
      thresholds: the grid, ascending.
      f2_by_threshold: F2 at each threshold of the grid.
      best_threshold: the best threshold of the grid on this split.
      best_f2: F2 at `best_threshold`.
      map: mean average precision over classes with positives; 0 if there is none.
      map_num_classes: number of classes with positives.
      recall_at_5: mean share of an image's labels among the five most probable.
      bce: mean cross-entropy of an image, summed over classes.
      calibration_error: mean |frequency - probability| over (image, class) entries.
      reliability: [mean probability, frequency, entries] of each bin with entries.
    """

    num_images: int
    num_images_without_truth: int
    f2: float
    interval: Sequence[float] | None
    bootstrap: Bootstrap
    coverage: int
    labels_per_image_predicted: float
    labels_per_image_true: float
    slices: Mapping[str, SliceMetrics]
    worst_slice: str
    decoders: Mapping[str, DecoderMetrics]
    threshold: float
    micro_f2: float
    macro_f2: float
    thresholds: Sequence[float]
    f2_by_threshold: Sequence[float]
    best_threshold: float
    best_f2: float
    map: float
    map_num_classes: int
    recall_at_5: float
    bce: float
    calibration_error: float
    reliability: Sequence[Sequence[float | int]]

    def f2_at(self, threshold: float) -> float:
        """Returns F2 at a threshold of the grid.

        Raises:
          InputError: If the threshold is not on the grid.
        """
        return self.f2_by_threshold[threshold_index(self.thresholds, threshold)]

    def to_json(self) -> dict[str, Any]:
        """Returns the figures as numbers, lists and dicts."""
        decoders = {name: d.to_json() for name, d in self.decoders.items()}
        return asdict(self) | {"decoders": decoders}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "SplitMetrics":
        """Returns the figures that `to_json` wrote."""
        slices, decoders = record["slices"], record["decoders"]
        own = {field.name: record[field.name] for field in fields(cls)}
        own["bootstrap"] = Bootstrap(**record["bootstrap"])
        own["slices"] = {name: SliceMetrics(**slices[name]) for name in slices}
        own["decoders"] = {n: DecoderMetrics.from_json(decoders[n]) for n in decoders}
        return cls(**own)


@dataclass(frozen=True, kw_only=True)
class DecoderInUse:
    """The decoder whose predictions are the result.

    Attributes:
      name: name of the decoder.
      chosen_on: the split that the decoders were fitted on.
      choice: parameters of all decoders.
    """

    name: str
    chosen_on: str
    choice: DecoderChoice

    def to_json(self) -> dict[str, Any]:
        """Returns name, split and parameters in one dict."""
        return {"name": self.name, "chosen_on": self.chosen_on, **asdict(self.choice)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "DecoderInUse":
        """Returns the decoder that `to_json` wrote."""
        choice = {field.name: record[field.name] for field in fields(DecoderChoice)}
        return cls(
            name=record["name"],
            chosen_on=record["chosen_on"],
            choice=DecoderChoice(**choice),
        )


@dataclass(frozen=True, kw_only=True)
class Constant:
    """The best constant prediction, a baseline for every decoder.

    Attributes:
      labels: codes of the most frequent training labels; their number is chosen on the
        split that fits the decoders.
      names: names of these labels.
      f2: mean F2 by split.
    """

    labels: Sequence[str]
    names: Sequence[str]
    f2: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Returns the fields and the number of labels."""
        return {**asdict(self), "num_labels": len(self.labels)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Constant":
        """Returns the prediction that `to_json` wrote."""
        return cls(labels=record["labels"], names=record["names"], f2=record["f2"])


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """An estimate of F2 on new domains, made without target data.

    Attributes:
      f2: the estimate.
      threshold: the threshold that the estimate is for.
      test_f2: F2 on the test split at the threshold.
    """

    f2: float
    threshold: float
    test_f2: float

    @property
    def error(self) -> float:
        """The absolute difference from `test_f2`."""
        return abs(self.f2 - self.test_f2)


@dataclass(frozen=True, kw_only=True)
class DomainShiftEstimate:
    """Two estimates of F2 on new domains from training data alone.

    Attributes:
      validation: estimate from the validation split, which has the training domains.
      held_out_domains: estimate from domains held out in turn.
      domains: domain -> F2 at the threshold of `held_out_domains`.
      test_f2: F2 of the decoder in use on the test split.
    """

    validation: Estimate
    held_out_domains: Estimate
    domains: Mapping[str, float]
    test_f2: float

    @property
    def closer(self) -> str:
        """The name of the estimate with the smaller error."""
        if self.held_out_domains.error < self.validation.error:
            return "held_out_domains"
        return "validation"

    def to_json(self) -> dict[str, Any]:
        """Returns both estimates, F2 on the test split and the closer estimate."""
        held_out = {**asdict(self.held_out_domains), "domains": dict(self.domains)}
        return {
            "validation": asdict(self.validation),
            "held_out_domains": held_out,
            "test": {"f2": self.test_f2},
            "closer": self.closer,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "DomainShiftEstimate":
        """Returns the estimates that `to_json` wrote."""
        held_out = dict(record["held_out_domains"])
        domains = held_out.pop("domains")
        return cls(
            validation=Estimate(**record["validation"]),
            held_out_domains=Estimate(**held_out),
            domains=domains,
            test_f2=record["test"]["f2"],
        )

    def line(self) -> str:
        """Returns both estimates in one line for the console."""
        both = {
            "validation": self.validation,
            "held out domains": self.held_out_domains,
        }
        texts = [
            f"{name} {e.f2:.4f} at {e.threshold:.2f} (test at this threshold "
            f"{e.test_f2:.4f})"
            for name, e in both.items()
        ]
        closer = self.closer.replace("_", " ")
        return f"estimates  {', '.join(texts)}; closer: {closer}"


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """The content of `metrics.json`.

    Attributes:
      stage: stage of the checkpoint.
      step: step of the checkpoint.
      created: time, ISO 8601.
      hardware: devices and host.
      dataset: kind and folder.
      config_hash: content hash of the configuration.
      label_hash: content hash of the labels.
      data_hash: content hash of the dataset.
      short_side_pixels: short side of the training images; None if not recorded.
      num_params: number of parameters of the network.
      estimates: estimates of F2 on new domains; None if no domain was held out.
      held_out: errors and effects measured on held-out domains; None if no domain was
        held out.
      variant: names of the `InferenceOptions` in use, such as "adabn".
      members: names of the checkpoints whose probabilities were averaged.
      member_hashes: content hashes of these checkpoints; empty if not recorded.
      recurring: number of images with near copies in training data, by split; None if
        they were not looked for.
      num_domains: number of domains of the training data, including a held-out one;
        None if not recorded.
    """

    stage: str
    step: int
    created: str
    hardware: str
    seed: int
    dataset: str
    config_hash: str
    label_hash: str
    data_hash: str
    short_side_pixels: int | None
    num_params: int
    provenance: Provenance
    decoder: DecoderInUse
    constant: Constant
    splits: Mapping[str, SplitMetrics]
    estimates: DomainShiftEstimate | None = None
    held_out: HeldOut | None = None
    variant: Sequence[str] = ()
    members: Sequence[str]
    member_hashes: Sequence[str] = ()
    recurring: Mapping[str, int] | None = None
    num_domains: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the result as numbers, text, lists and dicts."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("estimates", "held_out", "recurring", "num_domains"):
            if plain[name] is None:
                del plain[name]
        if self.held_out is not None:
            plain["held_out"] = asdict(self.held_out)
        for name in {"provenance", "decoder", "constant", "estimates"} & set(plain):
            plain[name] = plain[name].to_json()
        plain["splits"] = {name: s.to_json() for name, s in self.splits.items()}
        return plain

    def lines(self) -> list[str]:
        """Returns the main figures for the console."""
        rows: list[str] = []
        for split, figures in self.splits.items():
            rows.append(
                f"{split:10} F2 {figures.f2:.4f}  (best constant "
                f"{self.constant.f2[split]:.4f})  mAP {figures.map:.4f}  coverage "
                f"{figures.coverage}  worst slice {figures.worst_slice}"
            )
            without = figures.num_images_without_truth
            if without:
                rows.append(
                    f"{'':11}{without} of {figures.num_images + without} images have "
                    "no verified label and are excluded from all metrics"
                )
        rows += self.recurring_notes()
        rows += _decoder_lines(self.splits, self.decoder.name)
        rows.append(
            f"decoder    {self.decoder.name}, fitted on {self.decoder.chosen_on} "
            f"(threshold {self.decoder.choice.threshold:.2f}); provenance: "
            f"{self.provenance.badge()}"
        )
        if self.variant:
            rows.append(f"variant    {', '.join(self.variant)}")
        if len(self.members) > 1:
            rows.append(f"mean of    {'; '.join(self.members)}")
        if self.estimates is not None:
            rows.append(self.estimates.line())
        return rows

    def recurring_notes(self) -> list[str]:
        """Returns a sentence for each split with near copies in training data."""
        notes = list[str]()
        for split, count in (self.recurring or {}).items():
            without = f"{split}{WITHOUT_RECURRING}"
            others = f"{without} excludes them"
            if without not in self.splits:
                others = f"without them, no scored image of {split} is left"
            if count:
                notes.append(
                    f"{count:,} images of {split} are near copies of training images; "
                    f"{others}"
                )
        return notes


@dataclass(frozen=True, kw_only=True)
class SetResult(EvaluationResult):
    """Figures of a run on a labelled set that is not a split of the run's dataset.

    The decoders are those of the run; nothing is fitted on the set.

    Attributes:
      name: name of the set, the only key of `splits`.
      decoders_hash: XXH3 of the file of the decoders.
      num_seen: part of the result -> number of images that influenced it, by id
        or file.
      unknown_labels: labels of the set that the run does not have; in no figure.
      broken_images: images that cannot be read, each with the reason; in no figure.
    """

    name: str
    decoders_hash: str
    num_seen: Mapping[str, int]
    unknown_labels: Sequence[str]
    broken_images: Sequence[str]

    @property
    def figures(self) -> SplitMetrics:
        """Figures of the set."""
        return self.splits[self.name]

    @property
    def f2(self) -> float:
        """Mean F2 of the images, by the decoder in use."""
        return self.figures.f2

    @property
    def num_images(self) -> int:
        """Number of images with a label that the run knows."""
        return self.figures.num_images

    @property
    def decoders(self) -> Mapping[str, DecoderMetrics]:
        """Figures by decoder."""
        return self.figures.decoders

    def to_frame(self) -> pl.DataFrame:
        """Returns one row per decoder, the best F2 first."""
        rows = [
            {"name": self.name, "decoder": name, "num_images": self.num_images}
            | {key: getattr(found, key) for key in _IN_FRAME}
            for name, found in self.decoders.items()
        ]
        return pl.DataFrame(rows).sort("f2", descending=True)

    def caveats(self) -> list[str]:
        """Returns sentences that a reader needs before trusting the figures."""
        seen = [
            f"{count} images have the same ids or files as images that "
            f"{PARTS[part].replace('_', ' ')}; if only the ids are the same, rename "
            "the files."
            for part, count in self.num_seen.items()
        ]
        return [*self.provenance.caveats(), *seen]


_Result = TypeVar("_Result", bound=EvaluationResult)


def read_result(kind: type[_Result], path: AnyPath) -> _Result:
    """Reads the JSON file of an `EvaluationResult` or a `SetResult`.

    Raises:
      InputError: If a figure is missing, or the provenance contradicts itself.
    """
    readers: dict[str, Callable[[Any], Any]] = {
        "provenance": Provenance.from_json,
        "decoder": DecoderInUse.from_json,
        "constant": Constant.from_json,
        "splits": lambda splits: {n: SplitMetrics.from_json(splits[n]) for n in splits},
        "estimates": DomainShiftEstimate.from_json,
        "held_out": lambda held_out: HeldOut(**held_out),
    }
    record = json.loads(path.read_text(encoding="utf-8"))
    try:
        facts = {
            field.name: record[field.name]
            for field in fields(kind)
            if field.name in record or field.default is MISSING
        }
        for name in readers.keys() & facts.keys():
            facts[name] = readers[name](facts[name])
        return kind(**facts)
    except (KeyError, TypeError, InputError) as error:
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
        raise InputError(
            f"{path}: {reason}; run `evaluate` on this workdir again."
        ) from error


def threshold_index(thresholds: Sequence[float], threshold: float) -> int:
    """Returns the index of a threshold.

    Raises:
      InputError: If the threshold is not on the grid.
    """
    distance = np.abs(np.asarray(thresholds) - threshold)
    index = int(np.argmin(distance))
    if distance[index] > 1e-6:
        raise InputError(
            f"threshold {threshold} is not on the evaluation grid of {len(thresholds)} "
            f"values from {thresholds[0]} to {thresholds[-1]}; the nearest is "
            f"{thresholds[index]}."
        )
    return index


def hardware() -> str:
    """Returns a description of the devices and the host."""
    device = jax.devices()[0]
    kind = "CPU" if device.platform == "cpu" else device.device_kind
    return (
        f"{jax.device_count()} x {kind} ({platform.machine()} host, "
        f"{os.cpu_count()} cores), jax {jax.__version__}, "
        f"Python {platform.python_version()}"
    )


def write_evaluation(path: AnyPath, files: Iterable[AnyPath]) -> None:
    """Writes the manifest of an evaluation.

    Args:
      path: path of the manifest.
      files: files of the evaluation beside it; missing ones are left out.
    """
    listed = {file.name: manifest.describe(file) for file in files if file.exists()}
    manifest.Manifest(listed).save(path)


def describe_again(path: AnyPath, file: AnyPath) -> None:
    """Updates the manifest of an evaluation after a change of one of its files.

    Args:
      path: path of the manifest.
      file: the file beside it.
    """
    listed = manifest.Manifest.load(path, fix="run evaluate again").files
    described = {**listed, file.name: manifest.describe(file)}
    manifest.Manifest(described).save(path)


def check_evaluation(
    path: AnyPath, names: Iterable[str], *, grown: str = "", again: str
) -> None:
    """Checks that files belong to one complete evaluation.

    Args:
      path: path of the manifest.
      names: names of files beside it.
      grown: name of a file that may have grown since; "" for none.
      again: how to evaluate again, for the error.

    Raises:
      InputError: If the evaluation was interrupted, or a file is missing or differs.
    """
    listed = manifest.Manifest.load(path, fix=again)
    listed.check(path.parent, by=path, fix=again, names=names, verify=True)
    wanted, file = listed.files.get(grown), path.parent / grown
    if wanted is not None and not (
        file.exists() and manifest.describe(file, wanted.size_bytes) == wanted
    ):
        raise InputError(f"{file} is missing or damaged; {again}.")


def _decoder_lines(splits: Mapping[str, SplitMetrics], in_use: str) -> list[str]:
    """Returns a line per decoder: F2 by split and its figures on the last split."""
    last = list(splits)[-1]
    widths = {split: max(12, len(split) + 2) for split in splits}
    rows = [f"decoders   {'':13}" + "".join(f"{s:>{n}}" for s, n in widths.items())]
    for name, figures in splits[last].decoders.items():
        f2s = "".join(
            f"{splits[split].decoders[name].f2:{width}.4f}"
            for split, width in widths.items()
        )
        rows.append(
            f"         {'*' if name == in_use else ' '} {name:13}{f2s} "
            f"± {figures.standard_error:.4f}  coverage {figures.coverage}, "
            f"{figures.labels_per_image:.1f} labels per image"
        )
    return rows
