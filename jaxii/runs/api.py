"""Functions of the Python API."""

import os
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict  # pyright: ignore[reportMissingTypeStubs]

from jaxii.config import Config, check_returned
from jaxii.distributed import gpu
from jaxii.errors import InputError, nearest_path, recipe_error
from jaxii.evaluation.result import SetResult
from jaxii.runs.labelled_set import evaluate_set
from jaxii.runs.run import Run
from jaxii.runs.train import train as train_run
from jaxii.runs.workdir import Workdir
from jaxii.storage import AnyPath, at
from jaxii.train.stages import Origin

__all__ = ("Run", "SetResult", "evaluate", "load", "load_recipe", "train")


def load(path: str | AnyPath, stage: str = "") -> Run:
    """Opens a trained run at its best checkpoint.

    Args:
      path: The run's workdir.
      stage: Name of the stage; "" for the last one trained.

    Raises:
      InputError: If the folder has no run, or the run was not trained.
    """
    return Run.open(path, stage)


def load_recipe(recipe: str | os.PathLike[str]) -> Config:
    """Returns the configuration of a recipe.

    Args:
      recipe: A Python file with `get_config`, or "FILE:PRESET".

    Raises:
      InputError: If there is no such file, the recipe fails, or its configuration is
        not allowed.
    """
    name = os.fspath(recipe)
    file, _, preset = name.partition(":")
    if not Path(file).is_file():
        near = (
            nearest_path(Path(file))
            or "give a recipe, such as configs/f2_multitask.py."
        )
        raise InputError(f"{file} is not a file; {near}")
    try:
        found = runpy.run_path(file)
        if "get_config" not in found:
            raise ValueError("it has no function get_config")
        fields = found["get_config"](*[preset] * bool(preset))
    except Exception as error:
        # A recipe is code of the user and may raise any exception.
        raise recipe_error(name, error) from error
    check_returned(fields, name)
    return Config.resolve(fields)


def train(
    config: Config | ConfigDict | Mapping[str, Any] | str | os.PathLike[str],
    workdir: str | AnyPath,
    *,
    allow_tuning_labels: bool = False,
    change_batch_size: bool = False,
) -> Run:
    """Trains or resumes a run, evaluates it, and opens it.

    Args:
      config: The configuration, the fields that a recipe returns, or the file of a
        recipe; see `load_recipe`.
      workdir: The run's folder: a new one, or one of the same configuration.
      allow_tuning_labels: Whether weights may learn from labels of the tuning split.
      change_batch_size: Whether a resumed run may have another batch size.

    Raises:
      InputError: If the configuration, the data or the workdir cannot be used.
    """
    recipe: Origin = {}
    if isinstance(config, ConfigDict | Mapping):
        config = Config.resolve(config)
    elif not isinstance(config, Config):
        recipe = {"name": os.fspath(config), "own": {}}
        config = load_recipe(config)
    gpu.set_flags()
    train_run(
        config,
        Workdir(at(workdir)),
        lambda step: False,
        allow_tuning_labels=allow_tuning_labels,
        change_batch_size=change_batch_size,
        recipe=recipe,
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
      run: A run that has been evaluated, which fits its decoders.
      images: A folder of images.
      labels: Label file: CSV, TSV, Parquet or JSON lines, as `new` reads it; None takes
        the folders of the images as labels.
      name: Name of the set; "" for the name of the folder.
      path_column: The column that names the images; "" detects it.
      label_column: The column of labels; "" detects it.
      label_separator: Separator of labels in a cell; "" detects it.
      fold_case: Whether labels that differ only in case are one label.

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
