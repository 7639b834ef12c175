"""What a finished run left behind, read back: metrics, configuration, history.

Training and evaluation write these files; the page, the figures and the comparison read
them through here, so that they agree on field names and on which row of a repeated step
counts.
"""

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxii.errors import InputError
from jaxii.evaluation import by_label
from jaxii.evaluation.by_label import LabelTable
from jaxii.evaluation.provenance import Provenance
from jaxii.evaluation.result import EVALUATION, check_evaluation
from jaxii.storage import AnyPath
from jaxii.train.telemetry.history import HISTORY, read_history

SPLIT_ORDER = ("validation", "held_out", "tuning", "test")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One evaluation of a run.

    Args:
        workdir: where the run lives.
        variant: of the evaluation: `tuned_on_tuning` of `metrics_tuned_on_tuning.json`,
            empty for `metrics.json`.
        metrics: that file, with a decoder, a provenance and at least one split.
        config: the resolved configuration, as it is nested.
        history: rows of `history.jsonl`, as far as they count; none without the file.
        provenance: the record in `metrics`, checked.
        labels: figures of each label; None for a run that was evaluated by a version
            without them.
    """

    workdir: AnyPath
    variant: str
    metrics: dict[str, Any]
    config: dict[str, Any]
    history: list[dict[str, Any]]
    provenance: Provenance
    labels: LabelTable | None = None


def read_run(path: AnyPath) -> Run:
    """Reads what `train` and `evaluate` wrote into a workdir.

    Args:
        path: a folder with `metrics.json` and `config.json`, or one of its files
            `metrics_VARIANT.json`.

    Raises:
        InputError: the folder or a file is absent, unreadable or incomplete.
    """
    file = path
    if path.is_dir():
        file = path / "metrics.json"
    elif not path.is_file() or not re.fullmatch(r"metrics(_.+)?\.json", path.name):
        raise InputError(
            f"{path} is not a folder; give the workdir of a finished run, or a file "
            "metrics_VARIANT.json in it."
        )
    variant = file.stem.removeprefix("metrics")
    of_labels = file.with_name(by_label.FILE.replace(".", f"{variant}.", 1))
    if not file.is_file():
        raise InputError(
            f"{file} does not exist; the run is not finished; run `train` and "
            "`evaluate` on this workdir first."
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
            f"{file} lacks {', '.join(lacking)}; it must describe a finished "
            "evaluation; run `evaluate` on this workdir again."
        )
    try:
        provenance = Provenance.from_json(metrics["provenance"])
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    return Run(
        workdir=file.parent,
        variant=variant.removeprefix("_"),
        metrics=metrics,
        config=_read_object(file.parent / "config.json"),
        history=read_history(file.parent / HISTORY),
        provenance=provenance,
        labels=by_label.load(of_labels) if of_labels.is_file() else None,
    )


def last_rows(history: Iterable[Row], kind: str) -> list[Row]:
    """Returns the rows of one kind by step; of a repeated step, the last.

    Args:
        history: rows in the order they were written.
        kind: "train" or "evaluation".
    """
    by_step = {row["step"]: row for row in history if row.get("kind") == kind}
    return [by_step[step] for step in sorted(by_step)]


def images_per_second(history: Iterable[Row]) -> float | None:
    """Returns the median training rate, images a second, or None where not recorded."""
    return median(row.get("images_per_second") for row in last_rows(history, "train"))


def median(values: Iterable[Any]) -> float | None:
    """Returns the median of the finite numbers among `values`, or None."""
    finite = [v for v in map(number_or_none, values) if v is not None]
    return statistics.median(finite) if finite else None


def number_or_none(value: Any) -> float | None:
    """Returns a finite float, or None for anything else (absent, text, NaN)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def standard_error(summary: Row) -> float | None:
    """Returns the standard error of a split's mean F2 over its images.

    Pooled from mean, standard error and count of the slices, which share the images
    out; None where one of these is absent, or with fewer than two images.
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
    """Returns the splits that were evaluated: validation, tuning, test, then others."""
    names = list(metrics.get("splits") or {})
    return sorted(
        names,
        key=lambda n: (SPLIT_ORDER.index(n) if n in SPLIT_ORDER else 9, n),
    )


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of nested mappings and sequences of mappings, in order.

    Args:
        tree: for example `{"optimizer": {"peak_lr": 0.1}, "stages": [{"name": "a"}]}`.
        prefix: what every name starts with.

    Returns:
        For example `{"optimizer.peak_lr": 0.1, "stages[0].name": "a"}`. A sequence of
        plain values is one leaf.
    """
    if isinstance(tree, Mapping) and tree:
        items = [(f"{prefix}.{k}" if prefix else str(k), v) for k, v in tree.items()]
    elif is_list(tree) and any(isinstance(v, Mapping) for v in tree):
        items = [(f"{prefix}[{i}]", v) for i, v in enumerate(tree)]
    else:
        return {prefix: tree}
    return {k: v for name, value in items for k, v in flatten(value, name).items()}


def as_text(value: Any) -> str:
    """Returns a configuration value as a person writes it: 0.1, true, none, 1, 2, 3."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() else repr(value)
    if is_list(value):
        return ", ".join(map(_element_text, value)) or "empty"
    if isinstance(value, Mapping):
        return (
            ", ".join(f"{k}: {_element_text(v)}" for k, v in value.items()) or "empty"
        )
    return " ".join(str(value).split()) or "empty"


def _element_text(value: Any) -> str:
    nested = is_list(value) or isinstance(value, Mapping)
    return f"({as_text(value)})" if nested else as_text(value)


def is_list(value: Any) -> bool:
    """Says whether a value is a list or tuple, not text."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _read_object(path: AnyPath) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path} cannot be read ({reason}); it must be JSON; run `evaluate` on "
            "this workdir again."
        ) from error
    if not isinstance(value, dict):
        raise InputError(
            f"{path} holds a {type(value).__name__}; it must be a JSON object; run "
            "`evaluate` on this workdir again."
        )
    return value
