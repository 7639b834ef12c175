"""Damages every file of a dataset and of a run, and checks what each command makes of it.

  python -m tests.damage --json=cases.json
  python -m tests.damage --only=checkpoints --damage=flipped --command=evaluate,predict

Each file of a prepared dataset, of a trained workdir and of one stopped half-way is in
turn deleted, emptied, cut to half, given flipped bytes, or replaced by its like of
another run on other images. A command on a fresh copy then has to end with one line
that names the file (exit code 2), or with the results of the undamaged copy. Anything
else is BAD: a traceback, a hang, other results, another exit code, or a line that does
not name the file. The exit code is 1 if there is a BAD case.

A case whose file the command does not open, as seen on the undamaged copy, is counted
as `unread` without being run; deleting is left out so only for files whose names are
random. Linux only.
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

MOST_SECONDS = 120
SECONDS_BETWEEN_LINES = 10.0
DONE, MISUSED, PREEMPTED = 0, 2, 75

DATA, RUN, STOPPED = "prepared_data", "trained_run", "stopped_run"
OTHER, IMAGES, RECIPE = "other_run", "images", "recipe.py"
WORKDIR = f"--workdir={RUN}"
TRAIN = ("train", f"--config={RECIPE}", f"--data_dir={DATA}", WORKDIR)
# In the folder of a case; a run that has to resume bears the name of a trained one.
COMMANDS = {
    "train": TRAIN,
    "resume": TRAIN,
    "evaluate": ("evaluate", WORKDIR),
    "predict": ("predict", WORKDIR, f"--images={IMAGES}", "--output=answers.jsonl"),
    "export": ("export", WORKDIR, "--output=exported"),
    "compare": ("compare", RUN, OTHER, "--markdown"),
}
COMMANDS_OF = {
    DATA: tuple(COMMANDS),
    RUN: tuple(name for name in COMMANDS if name != "resume"),
    STOPPED: ("resume",),
}
DAMAGES = ("deleted", "emptied", "truncated", "flipped", "replaced")
FLIPPED_BYTES = 64
# The first turns digits into digits, the second into letters; neither leaves ASCII.
PATTERN = (0x01, 0x5A)

GOOD = ("detected", "harmless", "repaired", "unread")
BAD = ("traceback", "hang", "changed", "changed shard", "wrong exit", "unclear")
# What a command leaves; "results" names the files that must not differ.
EVALUATED = tuple(
    f"{RUN}/{name}"
    for name in (
        "metrics.json",
        "submission.csv",
        "submission.csv.provenance.json",
        "label_figures.csv",
    )
)
# When a result was made is no part of it.
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

RECIPE_TEXT = """
from jaxii.config import default_config

def get_config(name=""):
    config = default_config()
    config.data.dataset = "kaggle"
    config.data.image_size_pixels = 32
    config.data.validation_fraction = 0.3
    config.data.machine_labels = "soft"
    config.data.augmentation = 0.0
    config.data.num_threads = 1
    config.model.depth = 18
    config.model.width = 8
    config.model.stem = "small"
    config.model.compute_dtype = "float32"
    config.global_batch_size = 8
    config.label_embedding.dim = 8
    config.optimizer.average = "ema"
    config.optimizer.ema_decay = 0.5
    config.evaluate_every_steps = 2
    config.evaluate_train_images = 8
    config.log_every_steps = 1
    config.stages = (
        {
            "name": "multitask",
            "num_steps": 4,
            "embedding_head": True,
            "terms": {"bce": 1.0, "embedding": 1.0},
        },
        {"name": "classifier", "num_steps": 4, "terms": {"bce": 1.0, "soft_f": 1.0}},
    )
    return config
"""
STOPPED_AFTER_STEP = 6


@dataclass(frozen=True)
class Case:
    """One damage to one file, and the command that meets it.

    Attributes:
      root: `DATA`, `RUN` or `STOPPED`.
      file: path below it; "" for the undamaged copy.
      damage: one of `DAMAGES`, or "none".
      command: one of `COMMANDS`.
    """

    root: str
    file: str
    damage: str
    command: str

    @property
    def place(self) -> str:
        """The damaged file in the folder of the case."""
        return f"{RUN if self.root == STOPPED else self.root}/{self.file}"

    @property
    def name(self) -> str:
        """The case in words."""
        return f"{self.root}/{self.file} {self.damage}, {self.command}"


@dataclass(frozen=True)
class Verdict:
    """What became of a case.

    Attributes:
      case: which one.
      outcome: one of `GOOD` or `BAD`.
      printed: for a BAD case the last line on stderr, or the results that differ.
      where: the last line of jaxii's own code in a traceback.
      code: exit code.
      cpu_seconds, wall_seconds: that it took.
    """

    case: Case
    outcome: str
    printed: str = ""
    where: str = ""
    code: int = 0
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0


# Damage.


def damage_bytes(content: bytes, damage: str, like: bytes | None) -> bytes | None:
    """Returns what damage leaves of a file; None for no file.

    Args:
      content: of the file.
      damage: one of `DAMAGES`.
      like: the content that it is replaced by.
    """
    match damage:
        case "deleted":
            return None
        case "emptied":
            return b""
        case "truncated":
            return content[: len(content) // 2]
        case "flipped":
            changed = bytearray(content)
            count = min(FLIPPED_BYTES, len(content))
            for i in range(count):
                changed[i * len(content) // count] ^= PATTERN[i % len(PATTERN)]
            return bytes(changed)
        case _:
            return like


def kind_of(file: str) -> str:
    """Returns a path without the parts in which files of one kind differ."""
    file = re.sub(r"\b[0-9a-f]{32}\b", "*", file)
    file = re.sub(r"^checkpoints/\w+/\d+/", "checkpoints/*/*/", file)
    file = re.sub(r"events\.out\..*", "events.*", file)
    return re.sub(r"-(train|validation|tuning|test)\b", "-*", file)


def files_of(root: Path) -> list[str]:
    """Returns the files below a folder, relative to it."""
    found = (path for path in root.rglob("*") if path.is_file())
    return sorted(path.relative_to(root).as_posix() for path in found)


def like_of(root: Path, file: str, other: Path) -> bytes | None:
    """Returns the like of a file in another folder; None where there is none.

    That of the same path; of a file with a random name the one in the same folder,
    or in a folder of the same kind, that has its rank by size.
    """
    if (other / file).is_file():
        return (other / file).read_bytes()
    kind, folder = kind_of(file), Path(file).parent

    def ranked(of: Path) -> list[str]:
        likes = [name for name in files_of(of) if kind_of(name) == kind]
        near = [name for name in likes if Path(name).parent == folder]
        return sorted(near or likes, key=lambda name: (of / name).stat().st_size)

    others = ranked(other)
    if not others:
        return None
    rank = ranked(root).index(file)
    return (other / others[min(rank, len(others) - 1)]).read_bytes()


# The folders that are damaged.


class Built:
    """Two datasets of the same sizes, and on each a trained and a stopped run.

    Args:
      folder: where they are, in `one` and `other`.
      extra: words for every command.
    """

    def __init__(self, folder: Path, extra: Sequence[str]):
        self.one, self.other = folder / "one", folder / "other"
        self._cases = folder / "cases"
        self._extra = extra
        self._count = 0
        self._likes: dict[tuple[str, str], bytes | None] = {}

    def build(self, *, at_once: int, stopped: bool) -> None:
        """Draws, prepares and trains; `stopped`: what has to resume too."""
        shutil.rmtree(self._cases, ignore_errors=True)
        for folder in (self.one, self.other):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            (folder / RECIPE).write_text(RECIPE_TEXT)
        steps: list[Callable[[int], Callable[[], int]]] = [
            lambda seed: partial(_prepare, seed),
            lambda seed: forked.command(*TRAIN, f"--config.seed={seed}"),
        ]
        if stopped:
            steps.append(lambda seed: partial(_train_half, seed))
        for step in steps:
            jobs = [
                (seed, step(seed), lambda folder=folder: folder)
                for seed, folder in enumerate((self.one, self.other))
            ]
            ends = forked.run_all(jobs, at_once=at_once, most_seconds=600)
            for _, folder, ended in ends:
                if ended.code not in (DONE, PREEMPTED):
                    raise SystemExit(
                        f"building failed with code {ended.code}:\n{_said(folder)}"
                    )

    def cases(self) -> list[Case]:
        """Returns every case, of the dataset first."""
        found = []
        for root, commands in COMMANDS_OF.items():
            if not (self.one / root).exists():
                continue
            for file in files_of(self.one / root):
                content = (self.one / root / file).read_bytes()
                found += [
                    Case(root, file, damage, command)
                    for damage in DAMAGES
                    # Damage that changes nothing is none.
                    if damage_bytes(content, damage, self._like(root, file))
                    not in (content, *([None] if damage == "replaced" else []))
                    for command in commands
                ]
        return found

    def make_folder(self, case: Case) -> Path:
        """Returns a fresh copy of everything, damaged as the case says."""
        self._count += 1
        folder = self._cases / f"{self._count:06d}"
        run = STOPPED if case.command == "resume" else RUN
        shutil.copytree(self.one / DATA, folder / DATA)
        shutil.copytree(self.one / run, folder / RUN)
        (folder / OTHER).symlink_to(self.other / RUN)
        for name in (IMAGES, RECIPE):
            (folder / name).symlink_to(self.one / name)
        if case.file:
            left = self.damaged(case)
            path = folder / case.place
            path.unlink()
            if left is not None:
                path.write_bytes(left)
        return folder

    def damaged(self, case: Case) -> bytes | None:
        """Returns the content of a case's file after the damage; None for no file."""
        content = (self.one / case.root / case.file).read_bytes()
        return damage_bytes(content, case.damage, self._like(case.root, case.file))

    def act(self, case: Case) -> Callable[[], int]:
        """Returns the command of a case as a call."""
        call = forked.command(*COMMANDS[case.command], *self._extra)
        return partial(_export, call, self.one) if case.command == "export" else call

    def _like(self, root: str, file: str) -> bytes | None:
        if (root, file) not in self._likes:
            like = like_of(self.one / root, file, self.other / root)
            self._likes[root, file] = like
        return self._likes[root, file]


def _prepare(seed: int) -> int:
    """Draws a small challenge with all the files there can be, and prepares it."""
    from jaxii.data import toy_regions

    drawn = toy_regions.write(
        Path("files"), seed=seed, num_train=40, num_tuning=8, num_test=12
    )
    test = sorted((drawn / "stage_1_test_images").iterdir())
    Path(IMAGES).mkdir()
    for path in test[:6]:
        shutil.copy(path, IMAGES)
    truth = drawn / "truth"
    return forked.command(
        "prepare",
        f"--input_dir={drawn}",
        f"--data_dir={DATA}",
        "--short_side=48",
        f"--test_labels={truth / 'solution.csv'}",
        f"--test_metadata={truth / 'test_meta.csv'}",
    )()


def _train_half(seed: int) -> int:
    from jaxii import processes

    processes.wanted_back = lambda: lambda step: step >= STOPPED_AFTER_STEP
    words = [word for word in TRAIN if word != WORKDIR]
    return forked.command(*words, f"--workdir={STOPPED}", f"--config.seed={seed}")()


def _export(call: Callable[[], int], reference: Path) -> int:
    """Exports, and applies the program unless it is that of the undamaged run."""
    code = call()
    if code != DONE:
        return code
    program, answers = Path("exported/model.stablehlo"), "probabilities.npy"
    known = reference / answers
    if known.exists() and program.read_bytes() == (
        (reference / program.name).read_bytes()
    ):
        shutil.copy(known, program.parent)
        return code
    import numpy as np

    from jaxii.infer.export import read_stablehlo

    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    np.save(program.parent / answers, read_stablehlo(program)(images))
    if not known.exists():
        shutil.copy(program, reference)
        shutil.copy(program.parent / answers, known)
    return code


# Verdicts.


@dataclass
class Baseline:
    """What a command makes of an undamaged copy.

    Attributes:
      results: of the command.
      opened: files and folders that it opens, in the folder of the case.
    """

    results: Mapping[str, Any] = field(default_factory=dict)
    opened: frozenset[str] = frozenset()

    def reads(self, case: Case) -> bool:
        """Says whether damage to a file can reach the command."""
        if case.place in self.opened or not self.opened:
            return True
        if case.damage != "deleted":
            return False
        # A file can be asked for by its name and not be opened.
        random = "*" in Path(kind_of(case.file)).name
        return not random or str(Path(case.place).parent) in self.opened


def results_of(folder: Path, command: str) -> dict[str, Any]:
    """Returns what a command left that must not differ; JSON is parsed."""
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
      case: which one.
      folder: of it.
      ended: how the command ended.
      built: the undamaged copy.
      base: what the command makes of it.
    """
    errors = (folder / forked.STDERR).read_text(errors="replace")
    lines = [line for line in errors.splitlines() if line.strip()]
    printed, where = (lines[-1] if lines else ""), ""
    if ended.hung:
        outcome = "hang"
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
        printed[:600],
        where,
        ended.code,
        round(ended.cpu_seconds, 3),
        round(ended.wall_seconds, 3),
    )


def names(line: str, place: str) -> bool:
    """Says whether a message names a file, or a folder that it is in.

    A folder counts where nothing else in it is named; `place` is relative to the
    current folder, and the file's own name is enough where no path is before it.
    """
    path = Path(place)
    folders = [str(folder) for folder in path.parents if str(folder) != "."]
    whole = [rf"(?<![\w.-]){re.escape(place)}(?![\w-])"]
    whole += [rf"(?<![\w.-]){re.escape(f)}/?(?![\w/-]|\.\w)" for f in folders]
    # "metadata" and "metrics" are words, too.
    if "." in path.name or len(path.name) == 32:
        whole.append(rf"(?<![\w/.-]){re.escape(path.name)}(?![\w-])")
    return any(re.search(pattern, line) for pattern in whole)


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """Returns where two results differ, the first few."""
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
    frames = re.findall(r'File ".*?/(jaxii/[\w/]+\.py)", line (\d+)', errors)
    return ":".join(frames[-1]) if frames else ""


def _raised(lines: Sequence[str]) -> str:
    """Returns the first line of the exception that a traceback ends with."""
    start = max(i for i, line in enumerate(lines) if line.startswith("Traceback"))
    for line in lines[start + 1 :]:
        if re.match(r"[A-Za-z_][\w.]*(:|$)", line):
            return line
    return lines[-1]


def _said(folder: Path) -> str:
    return (folder / forked.STDERR).read_text(errors="replace")[-4000:]


# The whole.


def baselines(built: Built, commands: Iterable[str], at_once: int) -> dict:
    """Runs every command twice on undamaged copies.

    Raises:
      SystemExit: one fails, or gives other results the second time.
    """
    found = {command: Baseline() for command in commands}
    watches: dict[str, forked.Watch] = {}

    def make(case: Case) -> Path:
        folder = built.make_folder(case)
        watches[case.command] = forked.Watch(folder)
        return folder

    for repeated in (False, True):
        cases = [Case(RUN, "", "none", command) for command in found]
        jobs = [(case, built.act(case), partial(make, case)) for case in cases]
        ends = forked.run_all(jobs, at_once=at_once, most_seconds=600)
        for case, folder, ended in ends:
            opened = frozenset(watches.pop(case.command).opened())
            base = Baseline(results_of(folder, case.command), opened)
            if ended.code != DONE or None in base.results.values():
                raise SystemExit(
                    f"{case.command} of an undamaged copy ends with code {ended.code}"
                    f":\n{_said(folder)}"
                )
            before = found[case.command]
            found[case.command] = base
            if repeated:
                differing = differences(before.results, base.results)
                if differing:
                    raise SystemExit(
                        f"{case.command} of an undamaged copy gives other results the "
                        f"second time: {'; '.join(differing)}"
                    )
                opened |= before.opened
                found[case.command] = Baseline(base.results, opened)
            shutil.rmtree(folder)
    return found


def run_cases(
    built: Built,
    cases: Sequence[Case],
    bases: Mapping[str, Baseline],
    *,
    at_once: int,
    keep: bool,
    verify: bool,
) -> Iterator[Verdict]:
    """Yields a verdict on each case as it ends, those that are not run first.

    Args:
      built: the undamaged copy.
      cases: all.
      bases: command -> what it makes of the undamaged copy.
      at_once: commands.
      keep: leave the folders of BAD cases.
      verify: the commands check every byte.
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
        if not (keep and verdict.outcome in BAD):
            shutil.rmtree(folder)
        yield verdict


def table(verdicts: Sequence[Verdict]) -> list[str]:
    """Returns a row a kind of file and damage, with the number of each outcome."""
    counts: dict[tuple[str, str], collections.Counter] = {}
    for verdict in verdicts:
        case = verdict.case
        key = f"{case.root}/{kind_of(case.file)}", case.damage
        counts.setdefault(key, collections.Counter())[verdict.outcome] += 1
    total = sum(counts.values(), collections.Counter())
    columns = [name for name in (*GOOD, *BAD) if total[name]]
    rows = [("file", "damage", *columns)]
    keys = sorted(counts, key=lambda key: (key[0], DAMAGES.index(key[1])))
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
    """Returns a line for the BAD cases that end alike, the most frequent first."""
    groups: dict[tuple[str, ...], list[Verdict]] = {}
    for verdict in verdicts:
        if verdict.outcome in BAD:
            error = verdict.printed.partition(":")[0][:60]
            of = verdict.where or f"{kind_of(verdict.case.file)}, {error}"
            error = error if verdict.where else ""
            groups.setdefault((verdict.outcome, of, error), []).append(verdict)
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    return [
        f"{len(group):5}  {' '.join(key).rstrip()}  (as {group[0].case.name})"
        for key, group in ordered
    ]


def report(verdicts: Sequence[Verdict], seconds: float) -> None:
    """Prints the table, the causes and every BAD case."""
    print("\n".join(table(verdicts)))
    bad = [verdict for verdict in verdicts if verdict.outcome in BAD]
    if bad:
        print("\nBAD by cause:\n" + "\n".join(causes(bad)) + "\n")
    for verdict in bad:
        where = f" [{verdict.where}]" if verdict.where else ""
        print(f"BAD {verdict.outcome}: {verdict.case.name}: {verdict.printed}{where}")
    run = [verdict for verdict in verdicts if verdict.outcome != "unread"]
    cpu = sum(verdict.cpu_seconds for verdict in run) / max(len(run), 1)
    print(
        f"\n{len(verdicts)} cases, {len(run)} of them run, {len(bad)} BAD; "
        f"{timedelta(seconds=round(seconds))}, {cpu:.2f} s of processor time a case"
    )


def _progress(total: int) -> Callable[[Verdict], None]:
    """Returns what prints how far it is, and how long it still takes."""
    begun = last = time.monotonic()
    done = bad = 0

    def line(verdict: Verdict) -> None:
        nonlocal done, bad, last
        done += 1
        bad += verdict.outcome in BAD
        now = time.monotonic()
        if now - last < SECONDS_BETWEEN_LINES:
            return
        last = now
        rate = (now - begun) / done
        left = timedelta(seconds=round(rate * (total - done)))
        print(f"cases  {done}/{total}  {bad} BAD  {rate:.2f} s each  {left} left")
        sys.stdout.flush()

    return line


def chosen(cases: Sequence[Case], options: argparse.Namespace) -> list[Case]:
    """Returns the cases that the options ask for."""
    found = [
        case
        for case in cases
        if options.only in f"{case.root}/{case.file}"
        and case.damage in options.damage
        and case.command in options.command
    ]
    return found[:: options.sample][: options.limit or None]


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    def some(allowed: Sequence[str]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            names = text.split(",")
            if set(names) - set(allowed):
                raise argparse.ArgumentTypeError(f"use some of {','.join(allowed)}")
            return names

        return parse

    parser = argparse.ArgumentParser(
        prog="python -m tests.damage", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--only", default="", metavar="TEXT", help="files whose path has it")
    add("--damage", type=some(DAMAGES), default=list(DAMAGES), metavar="KIND,...")
    add(
        "--command",
        type=some(list(COMMANDS)),
        default=list(COMMANDS),
        metavar="NAME,...",
    )
    add("--sample", type=int, default=1, metavar="N", help="every N-th case")
    add("--limit", type=int, default=0, metavar="N", help="the first N cases")
    add("--jobs", type=int, default=2, metavar="N", help="commands at a time")
    add("--verify", action="store_true", help="give --verify to every command")
    add("--unread", action="store_true", help="run what the command does not open too")
    add("--json", type=Path, metavar="FILE", help="write all cases")
    add("--folder", type=Path, metavar="DIR", help="keep BAD cases and programs there")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Runs the cases that the options ask for; returns the exit code."""
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
        print(f"built  {time.monotonic() - begun:.0f} s", flush=True)
        bases = baselines(built, options.command, options.jobs)
        if options.unread:
            bases = {name: Baseline(base.results) for name, base in bases.items()}
        cases = chosen(built.cases(), options)
        print(f"undamaged copies  {time.monotonic() - begun:.0f} s", flush=True)
        verdicts, show = [], _progress(len(cases))
        for verdict in run_cases(
            built,
            cases,
            bases,
            at_once=options.jobs,
            keep=options.folder is not None,
            verify=options.verify,
        ):
            verdicts.append(verdict)
            show(verdict)
    seconds = time.monotonic() - begun
    order = {case: i for i, case in enumerate(cases)}
    verdicts.sort(key=lambda verdict: order[verdict.case])
    report(verdicts, seconds)
    if options.json:
        rows = [
            dataclasses.asdict(verdict.case)
            | {"kind": kind_of(verdict.case.file)}
            | {k: v for k, v in vars(verdict).items() if k != "case"}
            for verdict in verdicts
        ]
        found = {"seconds": round(seconds), "cases": rows}
        options.json.write_text(json.dumps(found, indent=1))
    return int(any(verdict.outcome in BAD for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
