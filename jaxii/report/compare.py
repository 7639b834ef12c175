"""Runs side by side: what they configured differently, and what came of it.

Before it: `runs` reads what training and evaluation left. After it: `table` prints the
comparison and `comparison_page` draws it. Runs keep the order they were given in: to
sort them by their test figure would be to select on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxii.report import seeds
from jaxii.report.differences import ABSENT, differences
from jaxii.report.runs import (
    Run,
    as_text,
    images_per_second,
    last_rows,
    number_or_none,
    split_names,
    standard_error,
)
from jaxii.report.seeds import Entry, Estimate, estimate

MAX_FIELD_COLUMNS = 4
"""With more differing fields than this, each row names only what it changes."""


@dataclass(frozen=True)
class Comparison:
    """A table of runs, as text, and the runs it is of.

    Args:
        entries: the runs, one or those of several seeds a row.
        columns: the headings; the first is `run`.
        rows: one per entry, as long as `columns`.
        num_text_columns: how many of the first columns hold no figure.
        notes: sentences that a reader needs beside the figures.
    """

    entries: tuple[Entry, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_text_columns: int
    notes: tuple[str, ...]


def build_comparison(
    runs: Sequence[Run], *, each: bool = False, ignored: Sequence[str] = ()
) -> Comparison:
    """Returns the comparison of runs that were read already.

    Args:
        runs: at least one.
        each: a row for every run; otherwise runs that differ only by their seed are
            one, with mean and sample standard deviation.
        ignored: names of configuration fields that do not change a result.
    """
    entries = seeds.entries(runs, each=each, ignored=ignored)
    if any(len(entry.runs) > 1 for entry in entries):
        # Beside rows of several seeds, which one a lone run has says nothing.
        ignored = [*ignored, "seed"]
    configs = [seeds.config_of(entry.runs[0], ignored) for entry in entries]
    settings = _settings([entry.name for entry in entries], configs)
    splits = splits_of(entries)
    figures = [_figures(entry, splits) for entry in entries]
    headings = [h for h in figures[0] if any(f[h] != ABSENT for f in figures)]
    rows = tuple(
        (entry.title, *setting.values(), *(figure[h] for h in headings))
        for entry, setting, figure in zip(entries, settings, figures, strict=True)
    )
    return Comparison(
        entries=tuple(entries),
        columns=("run", *settings[0], *headings),
        rows=rows,
        num_text_columns=1 + len(settings[0]),
        notes=tuple(_notes(entries)),
    )


def f2(entry: Entry, split: str) -> Estimate | None:
    """Returns the mean F2 of a split.

    Args:
        entry: a row.
        split: `held_out` is the domain that a run held out, or the mean of those that
            its sister runs did; `train` the training images that were measured beside
            validation, at their own best threshold.
    """
    return estimate([_f2(run, split) for run in entry.runs])


def f2_error(entry: Entry, split: str) -> float | None:
    """Returns one standard error of a split's mean F2 over its images."""
    found = estimate(
        [standard_error(run.metrics["splits"].get(split) or {}) for run in entry.runs]
    )
    return None if found is None else found.mean


def splits_of(entries: Sequence[Entry]) -> list[str]:
    """Returns the splits whose F2 any row has, the test last."""
    names = dict.fromkeys(
        n for e in entries for r in e.runs for n in r.metrics["splits"]
    )
    order = split_names({"splits": {**names, "train": None, "held_out": None}})
    order = ["train", *(name for name in order if name != "train")]
    return [n for n in order if any(f2(entry, n) is not None for entry in entries)]


def floors(entries: Sequence[Entry]) -> dict[str, float]:
    """Returns the F2 of the best constant prediction, by split, where runs agree."""
    found: dict[str, set[float | None]] = {}
    for run in (run for entry in entries for run in entry.runs):
        by_split = (run.metrics.get("constant") or {}).get("f2") or {}
        for split in run.metrics["splits"]:
            value = number_or_none(by_split.get(split))
            found.setdefault(split, set()).add(
                None if value is None else round(value, 4)
            )
    return {
        split: value
        for split, values in found.items()
        if len(values) == 1 and (value := values.pop()) is not None
    }


def _f2(run: Run, split: str) -> Any:
    if split == "train":
        rows = last_rows(run.history, "evaluation")
        at = [row for row in rows if row["step"] == run.metrics.get("step")]
        return at[0].get("train/f2") if at else None
    if split == "held_out":
        pooled = (run.metrics.get("estimates") or {}).get("held_out_domains") or {}
        if number_or_none(pooled.get("f2")) is not None:
            return pooled["f2"]
    return (run.metrics["splits"].get(split) or {}).get("f2")


def _settings(
    names: Sequence[str], configs: Sequence[dict[str, Any]]
) -> list[dict[str, str]]:
    """Returns each row's cells about the fields that differ, by heading."""
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
        cells.append({f"differs from {names[0]} in": "\n".join(lines) or ABSENT})
    return cells


def _figures(entry: Entry, splits: Sequence[str]) -> dict[str, str]:
    run = entry.runs[0]
    last = split_names(run.metrics)[-1]

    def shown(key: str) -> list[Any]:
        return [(r.metrics["splits"].get(last) or {}).get(key) for r in entry.runs]

    return {
        **{heading(split): text(f2(entry, split)) for split in splits},
        "worst slice": _worst_slice(entry, last),
        "mAP": text(estimate(shown("map"))),
        "coverage": text(estimate(shown("coverage")), ",.0f"),
        "threshold": _threshold(entry),
        "provenance": run.provenance.badge(),
        "images/s": text(
            estimate([images_per_second(r.history) for r in entry.runs]), ",.1f"
        ),
    }


def heading(split: str) -> str:
    """Returns the heading of a split's F2."""
    return f"F2 {split.replace('_', ' ')}"


def text(found: Estimate | None, form: str = ".4f") -> str:
    """Returns a figure as text, with its standard deviation over seeds, if any."""
    if found is None:
        return ABSENT
    mean = format(found.mean, form)
    if found.deviation is None:
        return mean
    return f"{mean} ± {format(found.deviation, form)}"


def _worst_slice(entry: Entry, split: str) -> str:
    tables = [
        (run.metrics["splits"].get(split) or {}).get("slices") or {}
        for run in entry.runs
    ]
    by_slice = {
        name: estimate([(table.get(name) or {}).get("f2") for table in tables])
        for name in tables[0]
    }
    known = {name: found for name, found in by_slice.items() if found is not None}
    if not known:
        return ABSENT
    worst = min(known, key=lambda name: known[name].mean)
    return f"{worst} {text(known[worst])}"


def _threshold(entry: Entry) -> str:
    decoders = [run.metrics["decoder"] for run in entry.runs]
    name = decoders[0].get("name") or "threshold"
    found = estimate([decoder.get("threshold") for decoder in decoders])
    if name == "threshold":
        return text(found, ".3g")
    return as_text(name)


def _notes(entries: Sequence[Entry]) -> list[str]:
    runs = [run for entry in entries for run in entry.runs]
    lasts = {split_names(run.metrics)[-1] for run in runs}
    which = lasts.pop() if len(lasts) == 1 else "each run's last split"
    notes = [f"Worst slice, mAP and coverage are of {which}."]
    if any(len(entry.runs) > 1 for entry in entries):
        notes.append("±: sample standard deviation over the seeds.")
    by_split = {
        "Mean F2 of the best constant prediction:": floors(entries),
        "One standard error of a mean F2 over its images: at most": _largest_errors(
            entries
        ),
    }
    for what, values in by_split.items():
        listed = [f"{n.replace('_', ' ')} {value:.4f}" for n, value in values.items()]
        if listed:
            notes.append(f"{what} {', '.join(listed)}.")
    said = {
        "train": "F2 train is of unaugmented training images, at their own best "
        "threshold.",
        "held_out": "F2 held out is of training domains that a model never saw.",
    }
    notes += [said[split] for split in splits_of(entries) if split in said]
    facts = {"datasets": ("dataset", "data_hash"), "label lists": ("label_hash",)}
    for what, keys in facts.items():
        if len({tuple(as_text(run.metrics.get(k)) for k in keys) for run in runs}) > 1:
            notes.append(f"The runs have different {what}: their F2 do not compare.")
    if any(not run.provenance.clean for run in runs):
        notes.append(
            "A run that is not clean has seen data of a split kept for testing."
        )
    return notes


def _largest_errors(entries: Sequence[Entry]) -> dict[str, float]:
    """Returns the largest standard error of the rows, by split."""
    found = {}
    for split in splits_of(entries):
        errors = [e for entry in entries if (e := f2_error(entry, split)) is not None]
        if errors:
            found[split] = max(errors)
    return found
