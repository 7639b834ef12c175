"""Functions of the Python API."""

import os
import runpy
from pathlib import Path

from jaxii.config import Config
from jaxii.distributed import gpu
from jaxii.errors import InputError, nearest_path
from jaxii.evaluation.result import SetResult
from jaxii.runs.labelled_set import evaluate_set
from jaxii.runs.run import Run
from jaxii.runs.train import train as train_run
from jaxii.runs.workdir import Workdir
from jaxii.storage import AnyPath, at

__all__ = ("Run", "SetResult", "evaluate", "load", "load_recipe", "train")


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
    gpu.set_flags()
    train_run(
        config,
        Workdir(at(workdir)),
        lambda step: False,
        allow_tuning_labels=allow_tuning_labels,
    )
    return load(workdir)


def evaluate(
    run: Run,
    *,
    images: str | os.PathLike[str],
    labels: str | os.PathLike[str] | None = None,
    name: str = "",
    path_column: str = "",
    label_column: str = "",
    label_separator: str = "",
    fold_case: bool = False,
) -> SetResult:
    """Measures a run on a labelled set, as `evaluate --images` does.

    Nothing is fitted: the decoders are those of the run. The figures are written to the
    workdir and to its report.

    Args:
      run: evaluated before, which fits its decoders.
      images: a folder of images.
      labels: their labels: a CSV, TSV, Parquet or JSON lines file as `new` reads it;
        None takes the folders of the images as labels.
      name: of the set; "" for the name of the folder.
      path_column: the column that names the images; "" detects it.
      label_column: the column of labels; "" detects it.
      label_separator: between labels in a cell; "" detects it.
      fold_case: whether labels that differ only in case are one label.

    Raises:
      InputError: If the images or labels cannot be used, or the run knows none of the
        labels.
    """
    return evaluate_set(
        run,
        images=Path(images),
        labels=None if labels is None else Path(labels),
        name=name,
        path_column=path_column,
        label_column=label_column,
        label_separator=label_separator,
        fold_case=fold_case,
    )
