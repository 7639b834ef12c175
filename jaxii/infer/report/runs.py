"""What a finished run left behind, read back: metrics, configuration, history.

Training and evaluation write these files; the page, the figures and the comparison read
them through here, so that they agree on field names and on which row of a repeated step
counts.
"""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxii.errors import InputError
from jaxii.infer.provenance import Provenance
from jaxii.train.telemetry import read_history

SPLIT_ORDER = ("validation", "held_out", "tuning", "test")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One evaluated run.

    Args:
        workdir: where it lives.
        metrics: `metrics.json`, with a decoder, a provenance and at least one split.
        config: the resolved configuration, flattened: `optimizer.peak_lr` -> value.
        history: rows of `history.jsonl`, as far as they count; none without the file.
        provenance: the record in `metrics`, checked.
    """

    workdir: Path
    metrics: dict[str, Any]
    config: dict[str, Any]
    history: list[dict[str, Any]]
    provenance: Provenance


def read_run(workdir: Path) -> Run:
    """Reads what `train` and `evaluate` wrote into a workdir.

    Args:
        workdir: a folder with `metrics.json` and `config.json`.

    Raises:
        InputError: the folder or a file is absent, unreadable or incomplete.
    """
    if not workdir.is_dir():
        raise InputError(
            f"{workdir} is not a folder; give the workdir of a finished run."
        )
    metrics = _read_object(workdir / "metrics.json")
    lacking = [k for k in ("decoder", "provenance", "splits") if not metrics.get(k)]
    if lacking:
        raise InputError(
            f"{workdir / 'metrics.json'} lacks {', '.join(lacking)}; it must describe "
            "a finished evaluation; run `evaluate` on this workdir again."
        )
    try:
        provenance = Provenance.from_json(metrics["provenance"])
    except InputError as error:
        raise InputError(f"{workdir / 'metrics.json'}: {error}") from error
    config = flatten(_read_object(workdir / "config.json"))
    history = read_history(workdir / "history.jsonl")
    return Run(workdir, metrics, config, history, provenance)


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
    elif _is_list(tree) and any(isinstance(v, Mapping) for v in tree):
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
    if _is_list(value):
        return ", ".join(map(_element_text, value)) or "empty"
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {as_text(v)}" for k, v in value.items()) or "empty"
    return " ".join(str(value).split()) or "empty"


def _element_text(value: Any) -> str:
    return f"({as_text(value)})" if _is_list(value) else as_text(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(
            f"{path} does not exist; the run is not finished; run `train` and "
            "`evaluate` on this workdir first."
        )
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
