"""Rows of a comparison, and the fields in which their configurations differ."""

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxii.report.formatting import as_text, is_list
from jaxii.report.run_files import EvaluatedRun
from jaxii.storage import AnyPath

# Longer values are cut in the middle: both ends of a path are informative.
MAX_VALUE = 60
# Shown for a field that a configuration does not have.
NO_FIELD = "-"
_ABSENT = object()


@dataclass(frozen=True)
class Entry:
    """A row: one run, or runs that differ only by seed. Names are unique."""

    name: str
    runs: tuple[EvaluatedRun, ...]

    @property
    def title(self) -> str:
        """The name, and the number of seeds if there are several."""
        count = len(self.runs)
        return self.name if count == 1 else f"{self.name} ({count} seeds)"

    @property
    def clean(self) -> bool:
        """Whether no run was influenced by tuning or test data."""
        return all(run.metrics.provenance.clean for run in self.runs)


@dataclass(frozen=True)
class Estimate:
    """Mean and sample standard deviation over the runs of a row.

    The deviation is None for a single run. `error` is the standard error over images,
    0 if unknown.
    """

    mean: float
    deviation: float | None
    error: float = 0.0


def estimate(values: Sequence[float | None]) -> Estimate | None:
    """Returns mean and deviation, or None unless every value is a finite number."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    if not known or len(known) < len(values):
        return None
    mean = math.fsum(known) / len(known)
    return Estimate(mean, statistics.stdev(known) if len(known) > 1 else None)


def entries_of(
    runs: Sequence[EvaluatedRun], *, each: bool = False, ignored: Sequence[str] = ()
) -> list[Entry]:
    """Returns the rows of a comparison, in the order of their first runs.

    Args:
        runs: At least one.
        each: Make a row of every run.
        ignored: Names of configuration fields that do not change a result.
    """
    names = _names(runs)
    groups: dict[Any, list[int]] = {}
    for i, run in enumerate(runs):
        groups.setdefault(i if each else _but_for_seed(run, ignored), []).append(i)
    rows: list[list[int]] = []
    for group in groups.values():
        # Runs with the same seed stay apart.
        distinct = len({_seed(runs[i]) for i in group}) == len(group)
        rows += [group] if distinct else [[i] for i in group]
    rows.sort()
    stems = [_stem([names[i] for i in row]) for row in rows]
    counts = Counter(stems)
    return [
        Entry(stem if counts[stem] == 1 else names[row[0]], tuple(runs[i] for i in row))
        for stem, row in zip(stems, rows, strict=True)
    ]


def config_of(run: EvaluatedRun, ignored: Sequence[str]) -> Mapping[str, Any]:
    """Returns a run's configuration without fields such as `data.directory`.

    If it does not tell the run's batch sizes, they are in the field `batch_sizes`.
    """
    config = json.loads(json.dumps(run.config))
    if sizes := run.metrics.provenance.batch_sizes:
        config["batch_sizes"] = "; ".join(sizes)
    for name in ignored:
        *parents, last = name.split(".")
        section = config
        for parent in parents:
            section = section.get(parent) or {}
        section.pop(last, None)
    return config


def _but_for_seed(run: EvaluatedRun, ignored: Sequence[str]) -> Any:
    """Returns a key that is equal for runs that differ only by seed."""
    metrics = run.metrics
    same = [
        config_of(run, [*ignored, "seed"]),
        run.variant,
        metrics.provenance.badge(),
        sorted(metrics.splits.keys() - run.sets.keys()),
        [metrics.decoder.name, metrics.decoder.chosen_on],
        [metrics.stage, run.dataset, metrics.label_hash],
    ]
    return json.dumps(same, sort_keys=True)


def _seed(run: EvaluatedRun) -> str:
    return json.dumps(run.config.get("seed"))


def _names(runs: Sequence[EvaluatedRun]) -> list[str]:
    """Returns the name of each run: folder, variant, and stage if not the last."""
    folders = _short_names([run.workdir.absolute() for run in runs])
    names = []
    for run in runs:
        name = folders[run.workdir.absolute()]
        if run.variant:
            name += f": {run.variant}"
        last, stage = run.config["stages"][-1]["name"], run.metrics.stage
        if stage != last:
            name += f" (stage {stage})"
        names.append(name)
    return names


def _short_names(workdirs: Sequence[AnyPath]) -> dict[AnyPath, str]:
    """Returns the shortest path suffixes that are unique among the workdirs."""
    paths = list(dict.fromkeys(workdirs))
    for length in range(1, max(len(p.parts) for p in paths)):
        names = ["/".join(p.parts[-length:]) for p in paths]
        if max(Counter(names).values()) == 1:
            return dict(zip(paths, names, strict=True))
    return {p: str(p) for p in paths}


def _stem(names: Sequence[str]) -> str:
    """Returns the common part of the names of several seeds, or the first name.

    For example `base: adabn` for `base_s0: adabn` and `base_s1: adabn`.
    """
    if len(names) == 1:
        return names[0]
    stems = set()
    for name in names:
        cut = re.search(r": | \(|$", name)
        end = cut.start() if cut else len(name)
        folder = re.sub(r"([-_./ ]s(eed)?)?[-_./= ]*\d+$", "", name[:end])
        stems.add(folder + name[end:])
    (stem, *others) = sorted(stems)
    return names[0] if others or not stem else stem


def differences(trees: Sequence[Any], prefix: str = "") -> dict[str, list[str]]:
    """Returns the fields in which nested configurations differ, with all values.

    For example `{"stages[0].terms.bce": ["1", "(0, 1), (0.4, 0)"]}`; "-" where a
    configuration lacks the field. A part that only some configurations have, with the
    same value, is one field. `prefix` is the start of every field name.
    """
    if len({_text(tree) for tree in trees}) <= 1:
        return {}
    parts = _parts(trees, prefix)
    present = [tree for tree in trees if tree is not _ABSENT]
    is_whole = len(present) < len(trees) and len(set(map(_text, present))) == 1
    if is_whole or not parts:
        return {prefix: [shorten(_text(tree)) for tree in trees]}
    found: dict[str, list[str]] = {}
    for name, values in parts.items():
        found |= differences(values, name)
    return found


def shorten(text: str) -> str:
    """Returns a text cut in the middle to at most `MAX_VALUE` characters."""
    if len(text) <= MAX_VALUE:
        return text
    tail = (MAX_VALUE - 1) // 3
    return f"{text[: MAX_VALUE - 1 - tail]}…{text[-tail:]}"


def _text(tree: Any) -> str:
    return NO_FIELD if tree is _ABSENT else as_text(tree)


def _is_list_of_mappings(tree: Any) -> bool:
    return is_list(tree) and len(tree) > 0 and all(isinstance(v, Mapping) for v in tree)


def _parts(trees: Sequence[Any], prefix: str) -> dict[str, list[Any]]:
    """Returns each tree's value of every field; {} if a tree is a plain value."""
    present = [tree for tree in trees if tree is not _ABSENT]
    if all(isinstance(tree, Mapping) for tree in present):
        keys = dict.fromkeys(key for tree in present for key in tree)
        return {
            f"{prefix}.{key}" if prefix else str(key): [
                _ABSENT if tree is _ABSENT else tree.get(key, _ABSENT) for tree in trees
            ]
            for key in keys
        }
    if all(_is_list_of_mappings(tree) for tree in present):
        return {
            f"{prefix}[{i}]": [
                _ABSENT if tree is _ABSENT or i >= len(tree) else tree[i]
                for tree in trees
            ]
            for i in range(max(map(len, present)))
        }
    return {}
