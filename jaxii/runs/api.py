"""Functions of the Python API."""

import os
import runpy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from jaxii.config import Config
from jaxii.errors import InputError, nearest_path
from jaxii.evaluation.result import DecoderMetrics
from jaxii.metrics.f_beta import f_beta
from jaxii.prepare.tables import labelled
from jaxii.prepare.tables.notes import Notes
from jaxii.runs.run import Run
from jaxii.runs.train import train as train_run
from jaxii.runs.workdir import Workdir
from jaxii.storage import AnyPath, at

__all__ = ("Evaluation", "Run", "evaluate", "load", "load_recipe", "train")


def load(path: str | AnyPath, stage: str = "") -> Run:
    """Opens a trained run at its best checkpoint.

    Args:
      path: its workdir.
      stage: by name; "" for the last one that has been trained.

    Raises:
      InputError: If no run is there, or it was not trained.
    """
    return Run.open(path, stage)


def load_recipe(recipe: str | os.PathLike[str]) -> Config:
    """Returns the configuration of a recipe.

    Args:
      recipe: a file with `get_config`, or "FILE:PRESET".

    Raises:
      InputError: If there is no such file, or its configuration is not allowed.
    """
    file, _, preset = os.fspath(recipe).partition(":")
    if not Path(file).is_file():
        near = nearest_path(Path(file)) or "give a recipe, as configs/f2_multitask.py."
        raise InputError(f"{file} is not a file; {near}")
    get_config = runpy.run_path(file)["get_config"]
    return Config.resolve(get_config(*[preset] * bool(preset)))


def train(
    config: Config | str | os.PathLike[str],
    workdir: str | AnyPath,
    *,
    allow_tuning_labels: bool = False,
) -> Run:
    """Trains a run from where it stopped, evaluates it, and opens it.

    Args:
      config: the configuration, or the recipe that gives it; see `load_recipe`.
      workdir: of the run: a new folder, or one of the same configuration.
      allow_tuning_labels: let the weights learn from labels of the tuning split.

    Raises:
      InputError: If something cannot be used.
    """
    if not isinstance(config, Config):
        config = load_recipe(config)
    train_run(
        config,
        Workdir(at(workdir)),
        lambda step: False,
        allow_tuning_labels=allow_tuning_labels,
    )
    return load(workdir)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Figures of a run on other images.

    Attributes:
      name: of the images.
      num_images: that were predicted.
      decoder: the one that the run's own evaluation uses.
      decoders: figures by decoder.
      unknown_labels: labels of these images that the run does not know; they count in
        no figure.
    """

    name: str
    num_images: int
    decoder: str
    decoders: Mapping[str, DecoderMetrics]
    unknown_labels: tuple[str, ...]

    @property
    def f2(self) -> float:
        """Mean F2 of the images, by the decoder in use."""
        return self.decoders[self.decoder].f2

    def to_frame(self) -> pl.DataFrame:
        """Returns a row a decoder, best first."""
        rows = [
            {
                "name": self.name,
                "decoder": decoder,
                "num_images": self.num_images,
                "f2": figures.f2,
                "standard_error": figures.standard_error,
                "coverage": figures.coverage,
                "labels_per_image": figures.labels_per_image,
            }
            for decoder, figures in self.decoders.items()
        ]
        return pl.DataFrame(rows).sort("f2", descending=True)


def evaluate(
    run: Run,
    *,
    images: str | os.PathLike[str],
    labels: str | os.PathLike[str] | None = None,
    name: str = "",
) -> Evaluation:
    """Measures a run on other images with labels; nothing is fitted or written.

    Args:
      run: evaluated before, which fits its decoders.
      images: a folder of images.
      labels: their labels: a CSV, TSV, Parquet or JSON lines file as `new` reads it;
        None takes the folders of the images as labels.
      name: of the images in the result; "" for the name of the folder.

    Raises:
      InputError: If the images or labels cannot be used, or the run knows none of the
        labels.
    """
    folder = Path(images)
    table = None if labels is None else Path(labels)
    found = labelled.read(folder, table, Notes())
    index = {text: i for i, text in enumerate(run.vocabulary.descriptions)}
    index |= run.vocabulary.index
    places = [index.get(label, -1) for label in found.labels]
    unknown = tuple(
        label for label, place in zip(found.labels, places, strict=True) if place < 0
    )
    if len(unknown) == len(places):
        raise InputError(
            f"the run knows none of the labels {', '.join(unknown[:5])}; its labels "
            f"are {', '.join(run.vocabulary.descriptions[:5])}, ..."
        )
    targets = np.zeros((len(found.files), len(run.classes)), bool)
    for row, entries in enumerate(found.entries):
        for label, confidence in entries.items():
            if places[label] >= 0:
                targets[row, places[label]] = confidence >= 0.5
    probs = run.predict_proba(list(found.files))
    decoders = {
        decoder: _figures(run, decoder, probs, targets)
        for decoder in run.decoders.names(has_head=False)
    }
    in_use = run.metrics["decoder"]["name"]
    return Evaluation(
        name=name or folder.name,
        num_images=len(targets),
        decoder=in_use if in_use in decoders else next(iter(decoders)),
        decoders=decoders,
        unknown_labels=unknown,
    )


def _figures(
    run: Run, decoder: str, probs: np.ndarray, targets: np.ndarray
) -> DecoderMetrics:
    decisions = np.zeros_like(targets)
    for row, chosen in enumerate(run.decoders.answer(decoder)(probs, None)):
        decisions[row, chosen] = True
    f2 = f_beta(decisions, targets)
    deviation = float(f2.std(ddof=1)) if len(f2) > 1 else 0.0
    return DecoderMetrics(
        f2=float(f2.mean()),
        standard_error=deviation / len(f2) ** 0.5,
        coverage=int((decisions & targets).any(axis=0).sum()),
        labels_per_image=float(decisions.sum(axis=1).mean()),
        parameter=run.decoders.parameter(decoder),
    )
