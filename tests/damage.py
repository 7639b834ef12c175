"""Damages each file of a dataset and of a run, and checks all commands on it.

  python -m tests.damage --json=cases.json
  python -m tests.damage --only=checkpoints --damage=flipped --command=evaluate,predict

Each file of a prepared dataset, of a trained workdir and of a workdir stopped half-way
is deleted, emptied, cut to half, given flipped bytes, or replaced by its counterpart
from another run on other images (a list of labels is replaced by the same labels in
another order). On a fresh copy, a command then has to end with exit code 2 and one line
that names the file, or with the results of the undamaged copy. Anything else is BAD: a
traceback, a hang, other results, another exit code, or a line that does not name the
file. The exit code is 1 if there is a BAD case.

A case is `unread`, and is not run, if the command does not open the file in an
undamaged copy. A deleted file may be noticed without being opened, so these cases are
run anyway, except for files with random names. Linux only.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from tests import forked
from tests.damaged_copies import (
    ALTERED,
    BUILDING_SECONDS,
    COMMANDS,
    DAMAGES,
    DONE,
    MISUSED,
    RUN,
    UNDAMAGED,
    Built,
    Case,
)

MOST_SECONDS = 120
SECONDS_BETWEEN_LINES = 10.0

GOOD = ("detected", "harmless", "repaired", "unread")
BAD = ("traceback", "hang", "changed", "changed shard", "wrong exit", "unclear")
# Outputs of a command that must not differ.
EVALUATED = tuple(
    f"{RUN}/{name}"
    for name in (
        "metrics.json",
        "submission.csv",
        "submission.csv.provenance.json",
        "label_figures.csv",
    )
)
# The time of creation is not compared.
WHEN = "created"
EXPORTED = ("export.json", "labels.csv", "probabilities.npy")
RESULTS = {
    "train": EVALUATED,
    "resume": EVALUATED,
    "evaluate": EVALUATED,
    "predict": ("answers.jsonl",),
    "export": tuple(f"exported/{name}" for name in EXPORTED),
    "compare": (forked.STDOUT,),
}


@dataclass(frozen=True)
class Verdict:
    """The outcome of a case.

    Attributes:
      case: The case.
      outcome: One of `GOOD` or `BAD`.
      printed: For a BAD case, the last line on stderr, or the results that differ.
      where: The last line of jaxii's own code in a traceback.
      folder: Folder of the case, if it was kept.
      code: Exit code.
      cpu_seconds, wall_seconds: Time of the command.
    """

    case: Case
    outcome: str
    printed: str = ""
    where: str = ""
    folder: str = ""
    code: int = 0
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0


@dataclass
class Baseline:
    """Results of a command on an undamaged copy.

    Attributes:
      results: Outputs of the command.
      opened: Files and folders that it opens, relative to the folder of the case.
    """

    results: Mapping[str, Any] = field(default_factory=dict)
    opened: frozenset[str] = frozenset()

    def reads(self, case: Case) -> bool:
        """Returns whether damage to a file can affect the command."""
        if not case.file or case.place in self.opened or not self.opened:
            return True
        if case.damage != "deleted":
            return False
        # A file can be looked up by its name without being opened.
        return not case.named_at_random or str(Path(case.place).parent) in self.opened


def results_of(folder: Path, command: str) -> dict[str, Any]:
    """Returns the outputs of a command that must not differ; JSON is parsed."""
    found: dict[str, Any] = {}
    for name in RESULTS[command]:
        path = folder / name
        content = path.read_bytes() if path.exists() else None
        if content is not None and path.suffix == ".json":
            with contextlib.suppress(ValueError, AttributeError):
                content = json.loads(content)
                content.pop(WHEN, None)
        found[name] = content
    return found


def judge(case: Case, folder: Path, ended: forked.Ended, built: Built, base) -> Verdict:
    """Returns the verdict on a case whose command has ended.

    Args:
      case: The case.
      folder: Folder of the case.
      ended: How the command ended.
      built: The undamaged copy.
      base: Results of the command on the undamaged copy.
    """
    errors = (folder / forked.STDERR).read_text(errors="replace")
    lines = [line for line in errors.splitlines() if line.strip()]
    printed, where = (lines[-1] if lines else ""), ""
    if ended.hung:
        outcome, where = "hang", _last_frame(errors)
    elif "Traceback (most recent call last)" in errors:
        outcome, where = "traceback", _last_frame(errors)
        printed = _raised(lines)
    elif ended.code == MISUSED:
        one = len(lines) == 1 and lines[0].startswith("jaxii: ")
        outcome = "detected" if one and names(lines[0], case.place) else "unclear"
        printed = " | ".join(lines)
    elif ended.code != DONE:
        outcome = "wrong exit"
        printed = f"code {ended.code}: {' | '.join(lines)}"
    else:
        differing = differences(base.results, results_of(folder, case.command))
        outcome, printed = "harmless", "; ".join(differing)
        if differing:
            outcome = "changed"
        elif case.file and _rewritten(folder / case.place, built.damaged(case)):
            outcome = "repaired"
    if outcome in GOOD and outcome != "detected":
        printed = ""
    return Verdict(
        case,
        outcome,
        printed=printed[:600],
        where=where,
        code=ended.code,
        cpu_seconds=round(ended.cpu_seconds, 3),
        wall_seconds=round(ended.wall_seconds, 3),
    )


def names(line: str, place: str) -> bool:
    """Returns whether a message names a file, or a folder that contains it.

    A folder counts if the message names nothing else in it. `place` is relative to the
    current folder; the name of the file alone counts if no path precedes it.
    """
    path = Path(place)
    folders = [str(folder) for folder in path.parents if str(folder) != "."]
    whole = [rf"(?<![\w.-]){re.escape(place)}(?![\w-])"]
    whole += [rf"(?<![\w.-]){re.escape(f)}/?(?![\w/-]|\.\w)" for f in folders]
    # "metadata" and "metrics" are also words.
    if "." in path.name or len(path.name) == 32:
        whole.append(rf"(?<![\w/.-]){re.escape(path.name)}(?![\w-])")
    return any(re.search(pattern, line) for pattern in whole)


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """Returns the first few places where two results differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in sorted(before.keys() | now.keys(), key=str):
            below = f"{path}.{key}" if path else str(key)
            one, other = before.get(key, "absent"), now.get(key, "absent")
            found += differences(one, other, below)
        return found[:6]
    if isinstance(before, float) and isinstance(now, float) and before != before:
        return [] if now != now else [f"{path}: nan -> {now}"]
    if before == now:
        return []
    if isinstance(before, bytes):
        return [f"{path} {'differs' if isinstance(now, bytes) else 'is not there'}"]
    return [f"{path}: {str(before)[:40]} -> {str(now)[:40]}"]


def _rewritten(path: Path, left: bytes | None) -> bool:
    now = path.read_bytes() if path.is_file() else None
    return now is not None and now != left


def _last_frame(errors: str) -> str:
    """Returns the innermost line of jaxii in a traceback, or in one of a hang."""
    frames = re.findall(r'File ".*?/(jaxii/[\w/]+\.py)", line (\d+)', errors)
    if not frames:
        return ""
    return ":".join(frames[0 if "(most recent call first)" in errors else -1])


def _raised(lines: Sequence[str]) -> str:
    """Returns the first line of the exception at the end of a traceback."""
    start = max(i for i, line in enumerate(lines) if line.startswith("Traceback"))
    for line in lines[start + 1 :]:
        if re.match(r"[A-Za-z_][\w.]*(:|$)", line):
            return line
    return lines[-1]


def baselines(built: Built, commands: Iterable[str], at_once: int) -> dict:
    """Runs every command on an undamaged copy; returns its name -> `Baseline`.

    Raises:
      SystemExit: A command fails.
    """
    found: dict[str, Baseline] = {}
    watches: dict[str, forked.Watch] = {}

    def make(case: Case) -> Path:
        folder = built.make_folder(case)
        watches[case.command] = forked.Watch(folder)
        return folder

    cases = undamaged(commands)
    jobs = [(case, built.act(case), partial(make, case)) for case in cases]
    for case, folder, ended in forked.run_all(
        jobs, at_once=at_once, most_seconds=BUILDING_SECONDS
    ):
        opened = frozenset(watches.pop(case.command).opened())
        base = Baseline(results_of(folder, case.command), opened)
        if ended.code != DONE or None in base.results.values():
            raise SystemExit(
                f"{case.command} of an undamaged copy ends with code {ended.code}:\n"
                f"{forked.said(folder)}"
            )
        found[case.command] = base
        shutil.rmtree(folder)
    return found


def undamaged(commands: Iterable[str]) -> list[Case]:
    """Returns a case without damage for each command."""
    return [Case(RUN, "", UNDAMAGED, command) for command in commands]


def run_cases(
    built: Built,
    cases: Sequence[Case],
    bases: Mapping[str, Baseline],
    *,
    at_once: int,
    keep: bool,
    verify: bool,
) -> Iterator[Verdict]:
    """Yields a verdict on each case as it ends, cases that are not run first.

    Args:
      built: The undamaged copy.
      cases: All cases.
      bases: Command -> its results on the undamaged copy.
      at_once: Number of commands at a time.
      keep: Keep the folders of BAD cases.
      verify: The commands check every byte.
    """
    run = [case for case in cases if bases[case.command].reads(case)]
    for case in set(cases) - set(run):
        yield Verdict(case, "unread")
    jobs = ((case, built.act(case), partial(built.make_folder, case)) for case in run)
    ends = forked.run_all(jobs, at_once=at_once, most_seconds=MOST_SECONDS)
    for case, folder, ended in ends:
        verdict = judge(case, folder, ended, built, bases[case.command])
        shard = ".array_record" in case.file and not verify
        if verdict.outcome == "changed" and shard:
            verdict = dataclasses.replace(verdict, outcome="changed shard")
        if keep and verdict.outcome in BAD:
            verdict = dataclasses.replace(verdict, folder=str(folder))
        else:
            shutil.rmtree(folder)
        yield verdict


def table(verdicts: Sequence[Verdict]) -> list[str]:
    """Returns a row per kind of file and damage, with the count of each outcome."""
    counts: dict[tuple[str, str], collections.Counter] = {}
    for verdict in verdicts:
        case = verdict.case
        key = case.kind, case.damage
        counts.setdefault(key, collections.Counter())[verdict.outcome] += 1
    total = sum(counts.values(), collections.Counter())
    columns = [name for name in (*GOOD, *BAD) if total[name]]
    rows = [("file", "damage", *columns)]
    order = (UNDAMAGED, *DAMAGES, ALTERED)
    keys = sorted(counts, key=lambda key: (key[0], order.index(key[1])))
    rows += [(*key, *(str(counts[key][c] or "") for c in columns)) for key in keys]
    rows.append(("all", "", *(str(total[c]) for c in columns)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def causes(verdicts: Iterable[Verdict]) -> list[str]:
    """Returns a line per group of BAD cases that end alike, the largest first."""
    groups: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in verdicts:
        if verdict.outcome not in BAD:
            continue
        error = verdict.printed.partition(":")[0]
        if verdict.outcome in ("unclear", "wrong exit"):
            # Groups messages that differ in files and numbers only.
            error = re.sub(r"\S*[/\d]\S*", "*", verdict.printed)[:80]
        cause = f"{verdict.where} {error}" if verdict.where else error
        if verdict.outcome.startswith("changed"):
            cause = verdict.case.kind
        groups.setdefault((verdict.outcome, cause), []).append(verdict)
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    return [
        f"{len(group):5}  {': '.join(key)}  (as {group[0].case.name})"
        for key, group in ordered
    ]


def report(verdicts: Sequence[Verdict], seconds: float) -> None:
    """Prints the table, the causes and every BAD case."""
    print("\n".join(table(verdicts)))
    bad = [verdict for verdict in verdicts if verdict.outcome in BAD]
    if bad:
        print("\nBAD by cause:\n" + "\n".join(causes(bad)) + "\n")
    for verdict in bad:
        notes = "".join(f" [{n}]" for n in (verdict.where, verdict.folder) if n)
        print(f"BAD {verdict.outcome}: {verdict.case.name}: {verdict.printed}{notes}")
    run = [verdict for verdict in verdicts if verdict.outcome != "unread"]
    cpu = sum(verdict.cpu_seconds for verdict in run) / max(len(run), 1)
    print(
        f"\n{len(verdicts)} cases, {len(run)} of them run, {len(bad)} BAD; "
        f"{timedelta(seconds=round(seconds))}, {cpu:.2f} s of processor time per case"
    )


def _progress(total: int) -> Callable[[Verdict], None]:
    """Returns a function that prints the progress and the remaining time."""
    begun = last = time.monotonic()
    done = ran = bad = 0

    def line(verdict: Verdict) -> None:
        nonlocal done, ran, bad, last
        done += 1
        bad += verdict.outcome in BAD
        ran += verdict.outcome != "unread"
        now = time.monotonic()
        if now - last < SECONDS_BETWEEN_LINES:
            return
        last = now
        # Cases that are not run come first and take no time.
        rate = (now - begun) / max(ran, 1)
        left = timedelta(seconds=round(rate * (total - done)))
        print(f"cases  {done}/{total}  {bad} BAD  {rate:.2f} s each  {left} left")
        sys.stdout.flush()

    return line


def chosen(cases: Sequence[Case], options: argparse.Namespace) -> list[Case]:
    """Returns the cases that the options select."""
    found = [
        case
        for case in cases
        if any(text in f"{case.root}/{case.file}" for text in options.only.split(","))
        and case.command in options.command
    ]
    return found[:: options.sample][: options.limit or None]


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    def some(allowed: Iterable[str], default: Iterable[str]) -> dict[str, Any]:
        def parse(text: str) -> list[str]:
            names = text.split(",")
            if set(names) - set(allowed):
                raise argparse.ArgumentTypeError(f"use some of {','.join(allowed)}")
            return names

        return {"type": parse, "default": list(default), "metavar": "NAME,..."}

    parser = argparse.ArgumentParser(
        prog="python -m tests.damage", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--only", default="", metavar="TEXT,...", help="files with TEXT in their path")
    add(
        "--damage",
        **some((*DAMAGES, ALTERED), default=DAMAGES),
        help=f"some of {', '.join(DAMAGES)} (all), and {ALTERED}",
    )
    add(
        "--command",
        **some(COMMANDS, default=COMMANDS),
        help=f"some of {', '.join(COMMANDS)} (all)",
    )
    add("--sample", type=int, default=1, metavar="N", help="every N-th case")
    add("--limit", type=int, default=0, metavar="N", help="the first N cases")
    add("--jobs", type=int, default=2, metavar="N", help="commands at a time")
    add("--verify", action="store_true", help="give --verify to every command")
    add("--unread", action="store_true", help="also run cases whose file is not opened")
    add("--json", type=Path, metavar="FILE", help="write all cases")
    add("--folder", type=Path, metavar="DIR", help="keep BAD cases and programs in DIR")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Runs the cases that the options select; returns the exit code."""
    options = _options(words)
    begun = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = options.folder
        if folder is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="damage."))
        folder = Path(folder).resolve()
        forked.prepare_imports(folder / "compiled")
        built = Built(folder, ["--verify"] if options.verify else [])
        built.build(at_once=options.jobs, stopped="resume" in options.command)
        print(f"built in {time.monotonic() - begun:.0f} s", flush=True)
        bases = baselines(built, options.command, options.jobs)
        if options.unread:
            bases = {name: Baseline(base.results) for name, base in bases.items()}
        print(f"undamaged copies in {time.monotonic() - begun:.0f} s", flush=True)
        run = partial(
            run_cases,
            built,
            bases=bases,
            at_once=options.jobs,
            keep=options.folder is not None,
            verify=options.verify,
        )
        verdicts = list(run(undamaged(options.command)))
        cases = chosen(built.cases(options.damage), options)
        # If results are not reproducible, differences mean nothing.
        if all(verdict.outcome in GOOD for verdict in verdicts):
            show = _progress(len(cases))
            for verdict in run(cases):
                verdicts.append(verdict)
                show(verdict)
    order = {case: i for i, case in enumerate(cases)}
    verdicts.sort(key=lambda verdict: order.get(verdict.case, -1))
    seconds = time.monotonic() - begun
    report(verdicts, seconds)
    if options.json:
        rows = [
            dataclasses.asdict(verdict.case)
            | {"kind": verdict.case.kind}
            | {name: value for name, value in vars(verdict).items() if name != "case"}
            for verdict in verdicts
        ]
        content = {"seconds": round(seconds), "cases": rows}
        options.json.write_text(json.dumps(content, indent=1))
    return int(any(verdict.outcome in BAD for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
