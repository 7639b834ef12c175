"""A table of runs: how their configurations differ, and their figures."""

import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from jaxii.console import open_ended, visible
from jaxii.evaluation.result import SetResult
from jaxii.report.entries import (
    NO_FIELD,
    Entry,
    Estimate,
    config_of,
    differences,
    entries_of,
    estimate,
)
from jaxii.report.formatting import number_or_none, plain
from jaxii.report.run_files import (
    EvaluatedRun,
    images_per_second,
    last_rows,
    last_split,
    split_names,
    standard_error,
)

# With more differing fields than this, each row lists only its own changes.
MAX_FIELD_COLUMNS = 4
# Kinds of the columns that hold no figure.
KINDS = {"worst slice": "words", "provenance": "badge"}


@dataclass(frozen=True)
class Comparison:
    """A table of runs as text.

    Attributes:
        entries: The runs of each row.
        columns: The headings; the first is `run`.
        kinds: "name", "setting", "figure", "words" or "badge", by column.
        rows: One per entry, as long as `columns`.
        notes: Sentences that explain the figures.
    """

    entries: tuple[Entry, ...]
    columns: tuple[str, ...]
    kinds: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def build_comparison(
    runs: Sequence[EvaluatedRun], *, each: bool = False, ignored: Sequence[str] = ()
) -> Comparison:
    """Returns the comparison of runs, in their order.

    Sorting by the test figure would select on it.

    Args:
        runs: At least one.
        each: Make a row of every run. Otherwise runs that differ only by seed are one
            row, with mean and sample standard deviation.
        ignored: Names of configuration fields that do not change a result.
    """
    entries = entries_of(runs, each=each, ignored=ignored)
    if any(len(entry.runs) > 1 for entry in entries):
        # The seed of a single run is irrelevant beside rows of several seeds.
        ignored = [*ignored, "seed"]
    configs = [config_of(entry.runs[0], ignored) for entry in entries]
    settings = _settings([entry.name for entry in entries], configs)
    splits = splits_of(entries)
    figures = [_figures(entry, splits) for entry in entries]
    headings = [h for h in figures[0] if any(f[h] != NO_FIELD for f in figures)]
    rows = tuple(
        (entry.title, *setting.values(), *(figure[h] for h in headings))
        for entry, setting, figure in zip(entries, settings, figures, strict=True)
    )
    return Comparison(
        entries=tuple(entries),
        columns=("run", *settings[0], *headings),
        kinds=(
            "name",
            *["setting"] * len(settings[0]),
            *(KINDS.get(h, "figure") for h in headings),
        ),
        rows=rows,
        notes=tuple(_notes(entries)),
    )


def f2(entry: Entry, split: str) -> Estimate | None:
    """Returns the mean F2 of a split.

    Args:
        entry: A row.
        split: `held_out` is the domain that a run held out, or else the estimate from
            its hold-out runs. `train` is the training images measured beside
            validation, at their own best threshold.
    """
    found = estimate([_f2(run, split) for run in entry.runs])
    splits = [run.metrics.splits.get(split) for run in entry.runs]
    errors = [standard_error(s.slices.values()) for s in splits if s is not None]
    if found is None or len(errors) < len(splits):
        return found
    return replace(found, error=statistics.fmean(errors))


def splits_of(entries: Sequence[Entry]) -> list[str]:
    """Returns the splits for which any row has an F2, the test last."""
    names = {n for e in entries for r in e.runs for n in r.metrics.splits}
    order = ["train", *split_names(names | {"held_out"})]
    return [n for n in order if any(f2(entry, n) is not None for entry in entries)]


def floors(entries: Sequence[Entry]) -> dict[str, float]:
    """Returns split -> F2 of the best constant prediction, where all runs agree."""
    found: dict[str, set[float]] = {}
    for run in (run for entry in entries for run in entry.runs):
        for split, value in run.metrics.constant.f2.items():
            found.setdefault(split, set()).add(round(value, 4))
    return {split: values.pop() for split, values in found.items() if len(values) == 1}


def _f2(run: EvaluatedRun, split: str) -> float | None:
    metrics = run.metrics
    if split == "train":
        rows = last_rows(run.history, "evaluation")
        at = [row for row in rows if row["step"] == metrics.step]
        return number_or_none(at[0].get("train/f2")) if at else None
    if split in metrics.splits:
        return metrics.splits[split].f2
    if split == "held_out" and metrics.estimates is not None:
        return metrics.estimates.held_out_domains.f2
    return None


def _settings(
    names: Sequence[str], configs: Sequence[Mapping[str, Any]]
) -> list[dict[str, str]]:
    """Returns each row's cells for the differing fields, by heading."""
    differing = differences(configs)
    if len(differing) <= MAX_FIELD_COLUMNS:
        return [
            {name: values[i] for name, values in differing.items()}
            for i in range(len(configs))
        ]
    cells = []
    for config in configs:
        changed = differences([configs[0], config])
        lines = [f"{name} = {value}" for name, (_, value) in changed.items()]
        cells.append({f"differs from {names[0]} in": "\n".join(lines) or NO_FIELD})
    return cells


def _figures(entry: Entry, splits: Sequence[str]) -> dict[str, str]:
    run = entry.runs[0]
    last = last_split(run)
    # Runs of an entry have the same splits.
    shown = [r.metrics.splits[last] for r in entry.runs]
    return {
        **{heading(split): text(f2(entry, split)) for split in splits},
        "worst slice": _worst_slice(entry, last),
        "mAP": text(estimate([s.map for s in shown])),
        "coverage": text(estimate([s.coverage for s in shown]), ",.0f"),
        "threshold": _threshold(entry),
        "provenance": run.metrics.provenance.badge(),
        "images/s": text(
            estimate([images_per_second(r.history) for r in entry.runs]), ",.1f"
        ),
    }


def heading(split: str) -> str:
    """Returns the heading of a split's F2."""
    return f"F2 {plain(split)}"


def text(found: Estimate | None, form: str = ".4f") -> str:
    """Returns a figure as text, with its standard deviation over several seeds."""
    if found is None:
        return NO_FIELD
    mean = format(found.mean, form)
    if found.deviation is None:
        return mean
    return f"{mean} ± {format(found.deviation, form)}"


def _worst_slice(entry: Entry, split: str) -> str:
    tables = [run.metrics.splits[split].slices for run in entry.runs]
    by_slice = {
        name: estimate([t[name].f2 if name in t else None for t in tables])
        for name in tables[0]
    }
    known = {name: found for name, found in by_slice.items() if found is not None}
    if not known:
        return NO_FIELD
    worst = min(known, key=lambda name: known[name].mean)
    return f"{worst} {text(known[worst])}"


def _threshold(entry: Entry) -> str:
    decoders = [run.metrics.decoder for run in entry.runs]
    if decoders[0].name != "threshold":
        return decoders[0].name
    return text(estimate([decoder.choice.threshold for decoder in decoders]), ".3g")


def _notes(entries: Sequence[Entry]) -> list[str]:
    runs = [run for entry in entries for run in entry.runs]
    lasts = {last_split(run) for run in runs}
    which = lasts.pop() if len(lasts) == 1 else "each run's last split"
    notes = [f"Worst slice, mAP and coverage are on {which}."]
    if any(len(entry.runs) > 1 for entry in entries):
        notes.append("± is the sample standard deviation over seeds.")
    errors = {
        split: largest
        for split in splits_of(entries)
        if (largest := max(e.error for x in entries if (e := f2(x, split))))
    }
    by_split = {
        "Mean F2 of the best constant prediction:": floors(entries),
        "Largest standard error of a mean F2 over images:": errors,
    }
    for what, values in by_split.items():
        listed = [f"{plain(n)} {value:.4f}" for n, value in values.items()]
        if listed:
            notes.append(f"{what} {', '.join(listed)}.")
    explained = {
        "train": "F2 train is measured on training images without augmentation, at "
        "their own best threshold.",
        "held_out": "F2 held out is measured on domains excluded from training.",
    }
    notes += [explained[n] for n in splits_of(entries) if n in explained]
    if any(
        "held_out" not in run.metrics.splits and run.metrics.estimates for run in runs
    ):
        notes.append(
            "F2 held out of a run that trained on all domains is an estimate from its "
            "hold-out runs, at the one threshold that is best on average over the "
            "domains."
        )
    facts = {
        "datasets": {run.dataset for run in runs},
        "label lists": {run.metrics.label_hash for run in runs},
    }
    for what, values in facts.items():
        if len(values) > 1:
            notes.append(
                f"The runs have different {what}: their F2 values are not comparable."
            )
    notes += _notes_on_sets(runs)
    if not all(entry.clean for entry in entries):
        notes.append("A run that is not clean was influenced by tuning or test data.")
    return notes


def _notes_on_sets(runs: Sequence[EvaluatedRun]) -> list[str]:
    """Returns sentences on the labelled sets that runs were evaluated on."""
    by_name: dict[str, list[SetResult]] = {}
    for run in runs:
        for name, found in run.sets.items():
            by_name.setdefault(name, []).append(found)
    notes: list[str] = []
    for name, found in by_name.items():
        notes.append(
            f"The labelled set {plain(name)} was evaluated after training; nothing was "
            "fitted on it."
        )
        if len({of.data_hash for of in found}) > 1:
            notes.append(
                f"The images or labels of {plain(name)} differ between runs: their F2 "
                "values are not comparable."
            )
        if any(of.num_seen for of in found):
            notes.append(
                f"Some images of {plain(name)} have the ids of images that a run has "
                "learned from."
            )
    return notes


def as_table(comparison: Comparison) -> Table:
    """Returns the comparison as a rich table."""
    table = Table(box=box.SIMPLE_HEAD, caption_justify="left")
    table.caption = Text("\n".join(map(visible, comparison.notes)))
    for column, kind in zip(comparison.columns, comparison.kinds, strict=True):
        side = "right" if kind == "figure" else "left"
        table.add_column(Text(visible(column)), justify=side, overflow="fold")
    for row in comparison.rows:
        cells = [Text(visible(cell, kept="\n")) for cell in row]
        badge = cells[comparison.columns.index("provenance")]
        badge.stylize("green" if badge.plain == "clean" else "bold red")
        table.add_row(*cells)
    return table


def print_table(table: Table) -> None:
    """Prints a table; as plain text without a width limit if not to a terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        needed = Measurement.get(console, console.options.update(width=10_000), table)
        console.width = max(needed.maximum, console.width)
    with open_ended(sys.stdout):
        console.print(table)


def as_markdown(comparison: Comparison) -> str:
    """Returns the comparison as a GitHub Markdown table, followed by the notes."""
    rules = ["---:" if kind == "figure" else "---" for kind in comparison.kinds]
    rows = [
        [_escape(column) for column in comparison.columns],
        rules,
        *([_escape(cell) for cell in row] for row in comparison.rows),
    ]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", " ".join(map(_escape, comparison.notes))])


def _escape(text: str) -> str:
    escaped = re.sub(r"([\\|*<`])", r"\\\1", text)
    return escaped.replace("\n", "<br>")
