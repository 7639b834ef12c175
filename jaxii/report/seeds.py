"""Rows of a comparison: runs that differ only by their seed are one.

Before it: `runs` reads runs. After it: `compare` puts the rows side by side.
"""

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxii.report.runs import Run, number_or_none
from jaxii.storage import AnyPath


@dataclass(frozen=True)
class Entry:
    """A run, or runs of several seeds.

    Args:
        name: tells it from the others.
        runs: at least one; all equal but for the seed.
    """

    name: str
    runs: tuple[Run, ...]

    @property
    def title(self) -> str:
        """The name, with the number of seeds where there are several."""
        count = len(self.runs)
        return self.name if count == 1 else f"{self.name} ({count} seeds)"

    @property
    def clean(self) -> bool:
        """True where no run has seen data of a split kept for testing."""
        return all(run.provenance.clean for run in self.runs)


@dataclass(frozen=True)
class Estimate:
    """A figure of an entry.

    Args:
        mean: over its runs.
        deviation: sample standard deviation over its runs; None for a lone one.
    """

    mean: float
    deviation: float | None


def estimate(values: Sequence[Any]) -> Estimate | None:
    """Returns mean and sample standard deviation; None if any value is no number."""
    numbers = [number_or_none(value) for value in values]
    known = [number for number in numbers if number is not None]
    if not known or len(known) < len(numbers):
        return None
    mean = math.fsum(known) / len(known)
    return Estimate(mean, statistics.stdev(known) if len(known) > 1 else None)


def entries(
    runs: Sequence[Run], *, each: bool = False, ignored: Sequence[str] = ()
) -> list[Entry]:
    """Returns the rows of a comparison, in the order of their first runs.

    Args:
        runs: in the order given.
        each: a row for every run.
        ignored: names of configuration fields that do not change a result.
    """
    names = _names(runs)
    groups: dict[Any, list[int]] = {}
    for i, run in enumerate(runs):
        groups.setdefault(i if each else _but_for_seed(run, ignored), []).append(i)
    rows: list[list[int]] = []
    for group in groups.values():
        # One seed twice is not two seeds: such runs stay apart.
        distinct = len({_seed(runs[i]) for i in group}) == len(group)
        rows += [group] if distinct else [[i] for i in group]
    rows.sort()
    stems = [_stem([names[i] for i in row]) for row in rows]
    counts = Counter(stems)
    return [
        Entry(stem if counts[stem] == 1 else names[row[0]], tuple(runs[i] for i in row))
        for stem, row in zip(stems, rows, strict=True)
    ]


def config_of(run: Run, ignored: Sequence[str]) -> dict[str, Any]:
    """Returns a run's configuration without some fields.

    Args:
        run: of any kind.
        ignored: names such as `seed` and `data.directory`.
    """
    config = json.loads(json.dumps(run.config))
    for name in ignored:
        *parents, last = name.split(".")
        section = config
        for parent in parents:
            section = section.get(parent) or {}
        section.pop(last, None)
    return config


def _but_for_seed(run: Run, ignored: Sequence[str]) -> Any:
    """Returns what runs have in common that differ only by their seed."""
    decoder = run.metrics["decoder"]
    facts = ("stage", "dataset", "data_hash", "label_hash")
    others = [run.metrics.get(k) for k in facts]
    same = [
        config_of(run, [*ignored, "seed"]),
        run.variant,
        run.provenance.badge(),
        sorted(run.metrics["splits"]),
        [decoder.get("name"), decoder.get("chosen_on")],
        others,
    ]
    return json.dumps(same, sort_keys=True)


def _seed(run: Run) -> str:
    return json.dumps(run.config.get("seed"))


def _names(runs: Sequence[Run]) -> list[str]:
    """Returns a short name of each run: folder, variant, and stage if not the last."""
    folders = _short_names([run.workdir.absolute() for run in runs])
    names = []
    for run in runs:
        name = folders[run.workdir.absolute()]
        if run.variant:
            name += f": {run.variant}"
        stages, stage = run.config.get("stages") or [{}], run.metrics.get("stage")
        if stage and stage != stages[-1].get("name", stage):
            name += f" (stage {stage})"
        names.append(name)
    return names


def _short_names(workdirs: Sequence[AnyPath]) -> dict[AnyPath, str]:
    """Returns the fewest last folder names that tell the workdirs apart."""
    paths = list(dict.fromkeys(workdirs))
    for length in range(1, max(len(p.parts) for p in paths)):
        names = ["/".join(p.parts[-length:]) for p in paths]
        if max(Counter(names).values()) == 1:
            return dict(zip(paths, names, strict=True))
    return {p: str(p) for p in paths}


def _stem(names: Sequence[str]) -> str:
    """Returns what names of runs of several seeds have in common, or the first name.

    For example `base` of `base_s0` and `base_s1`, `base: adabn` of `base-0: adabn` and
    `base-1: adabn`.
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
