"""The result of an evaluation: figures by split, and what produced them.

`metrics.json` holds it, and the manifest `evaluation.json` names the files beside it.
"""

# JAX's functions are partly untyped.
# pyright: reportUnknownMemberType=false

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

import jax
import numpy as np

from jaxii import manifest
from jaxii.decoding.thresholds import DecoderChoice
from jaxii.errors import InputError
from jaxii.evaluation.provenance import Provenance
from jaxii.storage import AnyPath

# The manifest of an evaluation; written last, removed first.
EVALUATION = "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """How intervals are drawn.

    Attributes:
      by: "image", or "group" where several images are of one thing.
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
      standard_error: of that mean.
      coverage: labels predicted rightly at least once.
      labels_per_image: mean number of labels predicted.
      parameter: the decoder's one parameter by name, such as {"k": 5}; may be empty.
    """

    f2: float
    standard_error: float
    coverage: int
    labels_per_image: float
    parameter: Mapping[str, float | int | None]

    def to_json(self) -> dict[str, Any]:
        """Returns the figures and the parameter beside each other."""
        return {
            "f2": self.f2,
            "standard_error": self.standard_error,
            "coverage": self.coverage,
            "labels_per_image": self.labels_per_image,
            **self.parameter,
        }

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
      num_images: images whose truth is known; no other counts in any figure.
      num_images_without_truth: the others.
      f2: by the decoder in use.
      interval: bootstrap interval of `f2`; None for a single group.
      bootstrap: how intervals are drawn.
      coverage: labels that the decoder in use predicts rightly at least once.
      labels_per_image_predicted: by the decoder in use.
      labels_per_image_true: mean number of labels present.
      slices: figures by slice, of those that have images.
      worst_slice: the slice of the lowest F2.
      decoders: figures by decoder.
      threshold: of the decoder `threshold`, chosen on another split or this one.
      micro_f2: F2 of all entries together at `threshold`.
      macro_f2: mean over classes at `threshold`; 0 for a class never present nor
        predicted.
      thresholds: the grid, ascending.
      f2_by_threshold: F2 at each of them.
      best_threshold: the best of them for this split.
      best_f2: F2 there.
      map: mean average precision over classes with positives; 0 if there is none.
      map_num_classes: classes with positives.
      recall_at_5: mean share of an image's labels among the five most probable.
      bce: cross-entropy of an image, summed over classes.
      calibration_error: mean |frequency - probability| over (image, class) entries.
      reliability: [mean probability, frequency, entries] of each bin that has any.
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
        decoders = {name: found.to_json() for name, found in self.decoders.items()}
        return {**asdict(self), "decoders": decoders}

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
    """The decoder whose predictions are the result, and every decoder's parameter.

    Attributes:
      name: of the decoder.
      chosen_on: the split that it was fitted on.
      choice: threshold and k.
    """

    name: str
    chosen_on: str
    choice: DecoderChoice

    def to_json(self) -> dict[str, Any]:
        """Returns name, split and parameters beside each other."""
        return {"name": self.name, "chosen_on": self.chosen_on, **asdict(self.choice)}


@dataclass(frozen=True, kw_only=True)
class Constant:
    """The best constant prediction, which every decoder has to beat.

    Attributes:
      labels: codes of the most frequent labels of training; their number is chosen on
        the split that fits the decoders.
      names: of the labels.
      f2: mean F2 by split.
    """

    labels: Sequence[str]
    names: Sequence[str]
    f2: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Returns the prediction with its number of labels."""
        return {**asdict(self), "num_labels": len(self.labels)}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """An F2 on new domains, foreseen without target data.

    Attributes:
      f2: the estimate.
      threshold: the threshold that gives it.
      test_f2: F2 of the test at that threshold.
    """

    f2: float
    threshold: float
    test_f2: float

    @property
    def error(self) -> float:
        """The absolute difference from the test."""
        return abs(self.f2 - self.test_f2)


@dataclass(frozen=True, kw_only=True)
class DomainShiftEstimate:
    """What training data alone says of F2 on new domains, beside the test.

    Attributes:
      validation: from the validation split, of the domains trained on.
      held_out_domains: from domains held out in turn.
      domains: domain -> F2 at the threshold of `held_out_domains`.
      test_f2: F2 of the test by the decoder in use.
    """

    validation: Estimate
    held_out_domains: Estimate
    domains: Mapping[str, float]
    test_f2: float

    @property
    def closer(self) -> str:
        """The name of the estimate that is closer to the test."""
        if self.held_out_domains.error < self.validation.error:
            return "held_out_domains"
        return "validation"

    def to_json(self) -> dict[str, Any]:
        """Returns both estimates, the test's F2 and the name of the closer one."""
        held_out = {**asdict(self.held_out_domains), "domains": dict(self.domains)}
        return {
            "validation": asdict(self.validation),
            "held_out_domains": held_out,
            "test": {"f2": self.test_f2},
            "closer": self.closer,
        }

    def line(self) -> str:
        """Returns the estimates in one line for a person."""
        found = {
            "validation": self.validation,
            "held out domains": self.held_out_domains,
        }
        texts = [
            f"{name} {e.f2:.4f} at {e.threshold:.2f} (test there {e.test_f2:.4f})"
            for name, e in found.items()
        ]
        closer = self.closer.replace("_", " ")
        return f"estimates  {', '.join(texts)}; closer: {closer}"


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """The content of `metrics.json`.

    Attributes:
      stage: of the checkpoint that was evaluated.
      step: of that checkpoint.
      created: time, ISO 8601.
      hardware: devices and host.
      seed: of the run.
      dataset: kind and folder.
      config_hash: content hash of the configuration.
      label_hash: of the labels.
      data_hash: of the dataset.
      short_side_pixels: images of the dataset are reduced to it; None: not recorded.
      num_params: numbers in the network.
      provenance: what influenced the figures.
      decoder: whose predictions count.
      constant: the best constant prediction.
      splits: figures by split.
      estimates: of F2 on new domains, where domains were held out.
      variant: what was done to the model before, such as "adabn".
      members: the checkpoints whose probabilities were averaged.
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
    estimates: DomainShiftEstimate | None
    variant: Sequence[str]
    members: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """Returns the result as numbers, text, lists and dicts."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        plain |= {
            name: plain[name].to_json()
            for name in ("provenance", "decoder", "constant")
        }
        plain["splits"] = {name: s.to_json() for name, s in self.splits.items()}
        if self.estimates is None:
            del plain["estimates"]
        else:
            plain["estimates"] = self.estimates.to_json()
        return plain

    def lines(self) -> list[str]:
        """Returns the figures that a person asks for first."""
        rows: list[str] = []
        for split, figures in self.splits.items():
            rows.append(
                f"{split:11}F2 {figures.f2:.4f}  (best constant "
                f"{self.constant.f2[split]:.4f})  mAP {figures.map:.4f}  coverage "
                f"{figures.coverage}  worst slice {figures.worst_slice}"
            )
            without = figures.num_images_without_truth
            if without:
                rows.append(
                    f"{'':11}{without} of {figures.num_images + without} images have "
                    "no verified label: they are left out of all figures"
                )
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


def threshold_index(thresholds: Sequence[float], threshold: float) -> int:
    """Returns the position of a threshold on the grid.

    Raises:
      InputError: If it is not on the grid.
    """
    distance = np.abs(np.asarray(thresholds) - threshold)
    index = int(np.argmin(distance))
    if distance[index] > 1e-6:
        raise InputError(
            f"threshold {threshold} is not on the evaluation grid of {len(thresholds)} "
            f"values from {thresholds[0]} to {thresholds[-1]}; the nearest is "
            f"{thresholds[index]}"
        )
    return index


def hardware() -> str:
    """Returns the devices and the host in a few words."""
    device = cast(Any, jax.devices()[0])
    kind = "CPU" if device.platform == "cpu" else device.device_kind
    return (
        f"{jax.device_count()} x {kind} ({platform.machine()} host, "
        f"{os.cpu_count()} cores), jax {jax.__version__}, "
        f"Python {platform.python_version()}"
    )


def write_evaluation(path: AnyPath, files: Iterable[AnyPath]) -> None:
    """Writes the manifest of an evaluation: the files that belong together.

    Args:
      path: of the manifest.
      files: beside it; those that do not exist are left out.
    """
    listed = {file.name: manifest.describe(file) for file in files if file.exists()}
    manifest.Manifest(listed).save(path)


def check_evaluation(
    path: AnyPath, names: Iterable[str], *, grown: str = "", again: str
) -> None:
    """Refuses files that are not those of one whole evaluation.

    Args:
      path: of the manifest.
      names: of files beside it.
      grown: name of a file that may be longer by now; "" for none.
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
    """Returns a line a decoder: its F2 by split, then its figures on the last one."""
    last = list(splits)[-1]
    rows = [f"decoders   {'':13}" + "".join(f"{split:>12}" for split in splits)]
    for name, figures in splits[last].decoders.items():
        f2s = "".join(f"{s.decoders[name].f2:12.4f}" for s in splits.values())
        rows.append(
            f"         {'*' if name == in_use else ' '} {name:13}{f2s} "
            f"± {figures.standard_error:.4f}  coverage {figures.coverage}, "
            f"{figures.labels_per_image:.1f} labels an image"
        )
    return rows
