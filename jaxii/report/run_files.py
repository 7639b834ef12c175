"""Reads the files of an evaluated run: metrics, configuration, history."""

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxii import manifest
from jaxii.errors import InputError
from jaxii.evaluation import by_label
from jaxii.evaluation.by_label import LabelTable
from jaxii.evaluation.provenance import Provenance
from jaxii.evaluation.result import EVALUATION, check_evaluation
from jaxii.report.formatting import number_or_none
from jaxii.storage import AnyPath
from jaxii.train.telemetry.history import HISTORY, read_history

SPLIT_ORDER = ("validation", "held_out", "tuning", "test")
# The folder of the results on labelled sets, in a workdir.
SETS = "sets"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class EvaluatedRun:
    """One evaluation of a run.

    Attributes:
        workdir: The run's folder.
        variant: For example `tuned_on_tuning` of `metrics_tuned_on_tuning.json`; "" of
            `metrics.json`.
        metrics: Content of that file. It has a decoder, a provenance and a split; and
            the figures of the run on labelled sets, as splits of their names.
        config: The resolved configuration, nested.
        history: The training history; empty if it was not recorded.
        provenance: The record in `metrics`.
        labels: Figures of each label; None if they were not recorded.
        sets: Labelled set -> content of the `metrics.json` of it.
    """

    workdir: AnyPath
    variant: str
    metrics: dict[str, Any]
    config: dict[str, Any]
    history: list[dict[str, Any]]
    provenance: Provenance
    labels: LabelTable | None
    sets: Mapping[str, Any] = field(default_factory=dict[str, Any])


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
    sets = {} if variant else read_sets(file.parent, metrics)
    for name, found in sets.items():
        metrics["splits"][name] = found["splits"][name]
        metrics.setdefault("constant", {}).setdefault("f2", {}).update(
            found["constant"]["f2"]
        )
    return EvaluatedRun(
        workdir=file.parent,
        variant=variant.removeprefix("_"),
        metrics=metrics,
        config=_read_object(file.parent / "config.json"),
        history=read_history(file.parent / HISTORY),
        provenance=provenance,
        labels=by_label.load(of_labels) if of_labels.is_file() else None,
        sets=sets,
    )


def read_sets(workdir: AnyPath, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Returns labelled set -> figures and folder, of sets measured as the run is now.

    A set that was measured at another checkpoint or with other decoders is left out,
    and so is one whose evaluation was interrupted.

    Args:
        workdir: The run's folder.
        metrics: Content of its `metrics.json`.

    Raises:
        InputError: If a file is damaged.
    """
    files = sorted((workdir / SETS).glob(f"*/{EVALUATION}"))
    if not files:
        return {}
    decoders = manifest.describe(workdir / "decoders.npz").xxh3
    now = metrics["stage"], metrics["step"], metrics["decoder"]["name"], decoders
    found: dict[str, Any] = {}
    for listed in files:
        file = listed.parent / "metrics.json"
        again = "evaluate --images on this set again, or remove the folder"
        check_evaluation(listed, [file.name], again=again)
        of = _read_object(file)
        if now == (of["stage"], of["step"], of["decoder"]["name"], of["decoders_hash"]):
            found[of["name"]] = of | {"folder": file.parent.name}
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


def last_split(run: EvaluatedRun) -> str:
    """Returns the last split of a run's own data: the test, if it has one."""
    return [n for n in split_names(run.metrics) if n not in run.sets][-1]


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
