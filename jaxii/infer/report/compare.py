"""Runs side by side: what they configured differently, and what came of it.

Reads the workdirs of evaluated runs; the command line prints the table. Runs keep the
order they were given in: to sort them by their test figure would be to select on it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from jaxii.errors import InputError
from jaxii.infer.report.runs import (
    Run,
    as_text,
    images_per_second,
    number_or_none,
    read_run,
    split_names,
)

ABSENT = "-"
MAX_FIELD_COLUMNS = 4
"""With more differing fields than this, they share one column, a line each."""


@dataclass(frozen=True)
class Comparison:
    """A table of runs, as text.

    Args:
        columns: the headings; the first is `run`.
        rows: one per run, as long as `columns`.
        fields: names of the configuration fields that differ, in configuration order.
        notes: sentences that a reader needs beside the figures.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    fields: tuple[str, ...]
    notes: tuple[str, ...]


def compare(workdirs: Sequence[Path]) -> Table:
    """Returns a table of evaluated runs: differing configuration, figures, provenance.

    Args:
        workdirs: folders of runs with `metrics.json` and `config.json`, at least one.

    Raises:
        InputError: no workdir was given, or one is missing or incomplete.
    """
    if not workdirs:
        raise InputError(
            "compare was given no workdir; it needs one or more; name the folders of "
            "finished runs."
        )
    return as_table(build_comparison([read_run(Path(w)) for w in workdirs]))


def build_comparison(runs: Sequence[Run]) -> Comparison:
    """Returns the text of the table for runs that were read already."""
    names = _short_names([run.workdir for run in runs])
    fields = differing_fields([run.config for run in runs])
    figures = [_figures(run) for run in runs]
    headings = [h for h in figures[0] if any(f[h] != ABSENT for f in figures)]
    settings = [[_field_text(run.config, f) for f in fields] for run in runs]
    field_columns = list(fields)
    if len(fields) > MAX_FIELD_COLUMNS:
        field_columns = ["differing fields"]
        settings = [
            ["\n".join(f"{f} = {v}" for f, v in zip(fields, row, strict=True))]
            for row in settings
        ]
    rows = tuple(
        (name, *setting, *(figure[h] for h in headings))
        for name, setting, figure in zip(names, settings, figures, strict=True)
    )
    return Comparison(
        columns=("run", *field_columns, *headings),
        rows=rows,
        fields=tuple(fields),
        notes=tuple(_notes(runs)),
    )


def differing_fields(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the names whose value is not the same, or not present, in every config.

    Args:
        configs: flattened configurations.
    """
    names = dict.fromkeys(name for config in configs for name in config)
    return [n for n in names if len({_field_text(c, n) for c in configs}) > 1]


def as_table(comparison: Comparison) -> Table:
    """Returns the comparison as a rich table; no name is read as markup."""
    table = Table(box=box.SIMPLE_HEAD, caption_justify="left")
    if comparison.notes:
        table.caption = Text("\n".join(comparison.notes))
    first_figure = len(comparison.columns)
    if "F2 validation" in comparison.columns:
        first_figure = comparison.columns.index("F2 validation")
    for position, column in enumerate(comparison.columns):
        is_text = position < first_figure or column in ("worst slice", "provenance")
        table.add_column(
            Text(column), justify="left" if is_text else "right", overflow="fold"
        )
    for row in comparison.rows:
        cells = [Text(cell) for cell in row]
        if "provenance" in comparison.columns:
            badge = cells[comparison.columns.index("provenance")]
            badge.stylize("green" if badge.plain == "clean" else "bold red")
        table.add_row(*cells)
    return table


def print_table(table: Table) -> None:
    """Prints a table; into a pipe or a file as plain text, as wide as it needs.

    Args:
        table: what `compare` returned.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        needed = Measurement.get(console, console.options.update(width=10_000), table)
        console.width = max(needed.maximum, console.width)
    console.print(table)


def _figures(run: Run) -> dict[str, str]:
    splits, last = run.metrics["splits"], split_names(run.metrics)[-1]
    shown = splits[last]
    worst = shown.get("worst_slice")
    worst_f2 = (shown.get("slices") or {}).get(worst, {}).get("f2")
    others = [s for s in split_names(run.metrics) if s not in ("validation", "test")]
    figures = {
        f"F2 {split}": _number(splits.get(split, {}).get("f2"))
        for split in ("validation", *others, "test")
    }
    return {
        **figures,
        "worst slice": f"{worst} {_number(worst_f2)}" if worst else ABSENT,
        "mAP": _number(shown.get("map")),
        "coverage": _number(shown.get("coverage"), ",.0f"),
        "threshold": _threshold(run.metrics["decoder"]),
        "provenance": run.provenance.badge(),
        "images/s": _number(images_per_second(run.history), ",.1f"),
    }


def _threshold(decoder: dict[str, Any]) -> str:
    if number_or_none(decoder.get("threshold")) is not None:
        return _number(decoder["threshold"], ".3g")
    return as_text(decoder.get("name")) if decoder.get("name") else ABSENT


def _number(value: Any, form: str = ".4f") -> str:
    number = number_or_none(value)
    return ABSENT if number is None else format(number, form)


def _field_text(config: dict[str, Any], name: str) -> str:
    return as_text(config[name]) if name in config else ABSENT


def _notes(runs: Sequence[Run]) -> list[str]:
    lasts = {split_names(run.metrics)[-1] for run in runs}
    which = lasts.pop() if len(lasts) == 1 else "each run's last split"
    notes = [f"Worst slice, mAP and coverage are of {which}."]
    for key, what in (("dataset", "datasets"), ("label_hash", "label lists")):
        if len({as_text(run.metrics.get(key)) for run in runs}) > 1:
            notes.append(f"The runs have different {what}: their F2 do not compare.")
    if any(not run.provenance.clean for run in runs):
        notes.append(
            "A run that is not clean has seen data of a split kept for testing."
        )
    return notes


def _short_names(workdirs: Sequence[Path]) -> list[str]:
    """Returns the fewest last folder names that tell the workdirs apart."""
    paths = [workdir.absolute() for workdir in workdirs]
    for length in range(1, max(len(p.parts) for p in paths)):
        names = ["/".join(p.parts[-length:]) for p in paths]
        if max(Counter(names).values()) == 1:
            return names
    return [str(p) for p in paths]
