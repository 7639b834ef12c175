"""Reads the files of an evaluated run: metrics, configuration, history."""

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxii.errors import InputError
from jaxii.evaluation import by_label
from jaxii.evaluation.by_label import LabelTable
from jaxii.evaluation.provenance import Provenance
from jaxii.evaluation.result import EVALUATION, check_evaluation
from jaxii.report.formatting import number_or_none
from jaxii.storage import AnyPath
from jaxii.train.telemetry.history import HISTORY, read_history

SPLIT_ORDER = ("validation", "held_out", "tuning", "test")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class EvaluatedRun:
    """One evaluation of a run.

    Attributes:
        workdir: The run's folder.
        variant: For example `tuned_on_tuning` of `metrics_tuned_on_tuning.json`; "" of
            `metrics.json`.
        metrics: Content of that file. It has a decoder, a provenance and a split.
        config: The resolved configuration, nested.
        history: The training history; empty if it was not recorded.
        provenance: The record in `metrics`.
        labels: Figures of each label; None if they were not recorded.
    """

    workdir: AnyPath
    variant: str
    metrics: dict[str, Any]
    config: dict[str, Any]
    history: list[dict[str, Any]]
    provenance: Provenance
    labels: LabelTable | None


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
    metrics = _read_object(file)
    lacking = [k for k in ("decoder", "provenance", "splits") if not metrics.get(k)]
    if lacking:
        raise InputError(
            f"{file} lacks {', '.join(lacking)}; run `evaluate` on this workdir again."
        )
    try:
        provenance = Provenance.from_json(metrics["provenance"])
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    return EvaluatedRun(
        workdir=file.parent,
        variant=variant.removeprefix("_"),
        metrics=metrics,
        config=_read_object(file.parent / "config.json"),
        history=read_history(file.parent / HISTORY),
        provenance=provenance,
        labels=by_label.load(of_labels) if of_labels.is_file() else None,
    )


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


def standard_error(summary: Row) -> float | None:
    """Returns the standard error of a split's mean F2 over its images.

    It is pooled from the means, standard errors and sizes of the slices, which
    partition the images. None if a value is missing or for fewer than two images.
    """
    table = [
        [number_or_none(entry.get(k)) for k in ("num_images", "f2", "standard_error")]
        for entry in (summary.get("slices") or {}).values()
    ]
    rows = [(n, mean, error) for n, mean, error in table if n]
    if any(mean is None or error is None for _, mean, error in rows):
        return None
    count = sum(n for n, _, _ in rows)
    if count < 2:
        return None
    total = sum(n * (mean or 0.0) for n, mean, _ in rows)
    squares = sum(
        n * ((n - 1) * (error or 0.0) ** 2 + (mean or 0.0) ** 2)
        for n, mean, error in rows
    )
    variance = max(squares / count - (total / count) ** 2, 0.0)
    return math.sqrt(variance / (count - 1))


def split_names(metrics: Mapping[str, Any]) -> list[str]:
    """Returns the evaluated splits in order: validation to test, then others."""
    names = list(metrics.get("splits") or {})
    return sorted(
        names,
        key=lambda n: (SPLIT_ORDER.index(n) if n in SPLIT_ORDER else 9, n),
    )


def _read_object(path: AnyPath) -> dict[str, Any]:
    fix = "run `evaluate` on this workdir again."
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is not readable JSON ({reason}); {fix}") from error
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise InputError(f"{path} holds a {kind}, not a JSON object; {fix}")
    return value
