"""Reads the files of an evaluated run: metrics, configuration, history."""

import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxii import manifest
from jaxii.data.prepared import SPLITS, WITHOUT_RECURRING
from jaxii.errors import InputError
from jaxii.evaluation import by_label
from jaxii.evaluation.by_label import LabelTable
from jaxii.evaluation.result import (
    EVALUATION,
    EvaluationResult,
    SetResult,
    check_evaluation,
    read_result,
)
from jaxii.report.formatting import number_or_none
from jaxii.storage import AnyPath
from jaxii.train.telemetry.history import HISTORY, Row, read_history

# Folder in a workdir for the results on labelled sets.
SETS = "sets"


@dataclass(frozen=True)
class EvaluatedRun:
    """One evaluation of a run.

    Attributes:
        workdir: The run's folder.
        variant: For example `tuned_on_tuning` for `metrics_tuned_on_tuning.json`; ""
            for `metrics.json`.
        metrics: Content of the metrics file, with each labelled set added as a split
            of its name.
        config: The resolved configuration, nested.
        history: The training history; empty if it was not recorded.
        labels: Figures of each label; None if they were not recorded.
        sets: Labelled set -> its result.
    """

    workdir: AnyPath
    variant: str
    metrics: EvaluationResult
    config: Mapping[str, Any]
    history: Sequence[Row]
    labels: LabelTable | None
    sets: Mapping[str, SetResult]

    @property
    def dataset(self) -> str:
        """Content hash of the dataset; its kind and folder if there is no hash."""
        return self.metrics.data_hash or self.metrics.dataset


def read_run(path: AnyPath) -> EvaluatedRun:
    """Reads an evaluation from a workdir, or from `metrics_VARIANT.json` in one.

    Raises:
        InputError: If the folder or a file is missing, damaged or incomplete.
    """
    file = path
    if path.is_dir():
        file = path / "metrics.json"
    elif not path.is_file() or not re.fullmatch(r"metrics(_.+)?\.json", path.name):
        raise InputError(
            f"{path} is not a workdir; give the folder of an evaluated run, or a file "
            "metrics_VARIANT.json in it."
        )
    variant = file.stem.removeprefix("metrics")
    of_labels = file.with_name(by_label.FILE.replace(".", f"{variant}.", 1))
    if not file.is_file():
        raise InputError(
            f"{file} does not exist; run `train` and `evaluate` on this workdir first."
        )
    check_evaluation(
        file.with_name(EVALUATION.replace(".", f"{variant}.", 1)),
        [file.name, of_labels.name, "config.json"],
        grown=HISTORY,
        again="run `evaluate` on this workdir again",
    )
    metrics = read_result(EvaluationResult, file)
    found = {} if variant else read_sets(file.parent, metrics)
    constant, splits = dict(metrics.constant.f2), dict(metrics.splits)
    for measured in found.values():
        constant |= measured.constant.f2
        splits |= measured.splits
    return EvaluatedRun(
        workdir=file.parent,
        variant=variant.removeprefix("_"),
        metrics=replace(
            metrics, splits=splits, constant=replace(metrics.constant, f2=constant)
        ),
        config=json.loads((file.parent / "config.json").read_text(encoding="utf-8")),
        history=read_history(file.parent / HISTORY),
        labels=by_label.load(of_labels) if of_labels.is_file() else None,
        sets={measured.name: measured for measured in found.values()},
    )


def read_sets(workdir: AnyPath, metrics: EvaluationResult) -> dict[str, SetResult]:
    """Returns folder -> result for the labelled sets that match the run's evaluation.

    A set that was measured at another checkpoint or with other decoders is left out,
    as is a set whose evaluation was interrupted.

    Args:
        workdir: The run's folder.
        metrics: The run's own figures.

    Raises:
        InputError: If a file is damaged.
    """
    files = sorted((workdir / SETS).glob(f"*/{EVALUATION}"))
    if not files:
        return {}
    decoders = manifest.describe(workdir / "decoders.npz").xxh3
    now = metrics.stage, metrics.step, metrics.decoder.name, decoders
    found: dict[str, SetResult] = {}
    for listed in files:
        file = listed.parent / "metrics.json"
        again = "evaluate --images on this set again, or remove the folder"
        check_evaluation(listed, [file.name], again=again)
        of = read_result(SetResult, file)
        if now == (of.stage, of.step, of.decoder.name, of.decoders_hash):
            found[file.parent.name] = of
    return found


def last_rows(history: Iterable[Row], kind: str) -> list[Row]:
    """Returns the last row of each step, of kind "train" or "evaluation"."""
    by_step = {row["step"]: row for row in history if row.get("kind") == kind}
    return [by_step[step] for step in sorted(by_step)]


def images_per_second(history: Iterable[Row]) -> float | None:
    """Returns the median training throughput, or None if it was not recorded."""
    return median(row.get("images_per_second") for row in last_rows(history, "train"))


def median(values: Iterable[Any]) -> float | None:
    """Returns the median of the finite numbers among `values`, or None."""
    finite = [v for v in map(number_or_none, values) if v is not None]
    return statistics.median(finite) if finite else None


def standard_error(run: EvaluatedRun, split: str) -> float | None:
    """Returns the standard error of a split's mean F2; None for an unknown split."""
    figures = run.metrics.splits.get(split)
    if figures is None:
        return None
    return figures.decoders[run.metrics.decoder.name].standard_error


def last_split(run: EvaluatedRun) -> str:
    """Returns the last split of a run's own data: the test, if it has one."""
    return [n for n in split_names(run.metrics.splits) if n not in run.sets][-1]


def split_names(names: Iterable[str]) -> list[str]:
    """Returns names of splits in order: those of a dataset, then others.

    A split without near copies comes right before the whole split.
    """

    def place(name: str) -> tuple[int, str, bool]:
        whole = name.removesuffix(WITHOUT_RECURRING)
        known = whole in SPLITS
        number = SPLITS.index(whole) if known else len(SPLITS)
        return number, whole, name == whole

    return sorted(names, key=place)
