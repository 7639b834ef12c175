"""A table of runs: how their configurations differ, and their figures."""

import re
import sys
import textwrap
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
# Wider than any table.
ANY_WIDTH = 10_000
# Names of runs do not wrap at less, however narrow the terminal is.
MIN_NAME_WIDTH = 8
# Kinds of the columns that hold no figure.
KINDS = {"worst slice": "words", "decoder": "words", "provenance": "badge"}


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
    error = estimate([standard_error(run, split) for run in entry.runs])
    if found is None or error is None:
        return found
    return replace(found, error=error.mean)


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
        "decoder": _decoder(entry),
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


def _decoder(entry: Entry) -> str:
    decoders = [run.metrics.decoder for run in entry.runs]
    if decoders[0].name != "threshold":
        return decoders[0].name
    thresholds = estimate([decoder.choice.threshold for decoder in decoders])
    return f"threshold {text(thresholds, '.3g')}"


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
    records = [run.metrics.held_out for run in runs if run.metrics.held_out]
    if any(record.length < 1 for record in records):
        notes.append(
            "Some hold-out runs were trained for a part of the length of their run, so "
            "their F2 is an estimate for shorter training."
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


def print_comparison(comparison: Comparison) -> None:
    """Prints tables that fit the terminal, and the notes.

    If not to a terminal, prints one table of any width as plain text.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = ANY_WIDTH
    with open_ended(sys.stdout):
        for table in as_tables(comparison, console.width):
            console.print(table, "")
        console.print(Text("\n".join(map(visible, comparison.notes))))


def as_tables(comparison: Comparison, width: int) -> list[Table]:
    """Returns the comparison as one rich table, or as several that fit a width.

    Each of several tables begins with the column `run`, and its headings wrap.

    Args:
        comparison: The comparison.
        width: In characters. A wider column is in a table of its own.
    """
    whole = _table(comparison, range(len(comparison.columns)))
    if _width(whole) <= width:
        return [whole]
    longest_name = max(width // 3, MIN_NAME_WIDTH)
    groups = [[0]]
    for column in range(1, len(comparison.columns)):
        table = _table(comparison, [*groups[-1], column], longest_name=longest_name)
        if len(groups[-1]) > 1 and _width(table) > width:
            groups.append([0])
        groups[-1].append(column)
    return [_table(comparison, group, longest_name=longest_name) for group in groups]


def _table(
    comparison: Comparison, columns: Sequence[int], *, longest_name: int | None = None
) -> Table:
    """Returns a table of some columns.

    Args:
        comparison: The comparison.
        columns: Numbers of the columns.
        longest_name: Width at which names of runs wrap; headings wrap too. None for no
            limit.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in columns:
        kind = comparison.kinds[column]
        heading = visible(comparison.columns[column])
        if longest_name is not None:
            lines = [n for row in comparison.rows for n in row[column].split("\n")]
            longest = max(1, *map(len, lines))
            heading = textwrap.fill(heading, longest, break_long_words=False)
        table.add_column(
            Text(heading),
            justify="right" if kind == "figure" else "left",
            overflow="fold",
            max_width=longest_name if kind == "name" else None,
        )
    for row in comparison.rows:
        table.add_row(*(_cell(row[c], comparison.kinds[c]) for c in columns))
    return table


def _cell(text: str, kind: str) -> Text:
    cell = Text(visible(text, kept="\n"))
    if kind == "badge":
        cell.stylize("green" if text == "clean" else "bold red")
    return cell


def _width(table: Table) -> int:
    console = Console()
    # Without an update, a dumb terminal has 80 characters.
    options = console.options.update(width=ANY_WIDTH)
    return Measurement.get(console, options, table).maximum


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
