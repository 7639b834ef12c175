"""Mutation testing: shows which changes of a module its tests notice.

    pip install mutmut
    python -m tests.mutants                          # a sample of every area
    python -m tests.mutants metrics labels --sample=0    # every mutant of two areas
    python -m tests.mutants --out=mutants.jsonl      # keeps outcomes; again: survivors

A mutant is a module with one of mutmut's changes: another operator, number or string,
`None` for an argument or a value, an argument left out, a condition inverted. It is
killed if one of the tests of its module fails. Error messages, annotations, imports and
decorators are not changed. `EXPLAINED` lists the mutants that no test can or needs to
kill: those that only cost time or memory, and those that change nothing.

Mutants run in forked children of one process that has imported what tests import. The
exit code is 1 if an unexplained mutant survives. Linux only.
"""

import argparse
import ast
import difflib
import functools
import gc
import importlib
import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import libcst as cst
import pytest
from mutmut.mutation.mutators import mutation_operators

from tests import forked

ROOT = Path(__file__).parent.parent
# Module -> the file that tests it.
AREAS: dict[str, dict[str, str]] = {
    "objective": {
        "objective/losses": "losses",
        "objective/objective": "objective",
        "objective/schedule": "schedule",
    },
    "metrics": {
        "metrics/average_precision": "streaming",
        "metrics/bootstrap": "bootstrap",
        "metrics/calibration_error": "streaming",
        "metrics/exact_sum": "exact_sum",
        "metrics/f_beta": "f_beta",
        "metrics/histogram": "streaming",
        "metrics/streaming": "streaming",
    },
    "decoding": {
        "decoding/calibration": "calibration",
        "decoding/constant": "constant",
        "decoding/decoders": "decoders",
        "decoding/expected_f": "expected_f",
        "decoding/label_shift": "label_shift",
        "decoding/thresholds": "thresholds",
    },
    "provenance": {"evaluation/provenance": "provenance"},
    "labels": {"data/labels": "labels"},
    "pipeline": {"data/pipeline": "pipeline"},
    "label_embedding": {"data/label_embedding": "label_embedding"},
    "stages": {"train/stages": "stages"},
    "averaging": {"train/averaging": "averaging"},
    "multitask": {"models/multitask": "multitask_network"},
}
TESTS = {module: names for area in AREAS.values() for module, names in area.items()}
# Pattern of the module, pattern of the change, and why the change may survive.
EXPLAINED: tuple[tuple[str, str, str], ...] = (
    ("", r"(zip\(|strict).*strict=None", "the joined lists have equal lengths"),
    ("", r"ThreadPoolExecutor", "costs time only"),
    ("", r"allow_pickle=None", "None is false"),
    ("", r"setNumThreads|num_threads: int", "costs time only"),
    (
        "averaging|losses|multitask|objective|schedule",
        r"astype\(None\)",
        "JAX's float32",
    ),
    ("", r"overwrite_a=None", "None is false"),
    ("data/labels|data/label_embedding", r"astype\(None\)", "NumPy's float64"),
    ("data/label_embedding", r"EXACT_MAX_CLASSES", "costs time only"),
    ("data/label_embedding", r"norm\(wide", "only a scale before QR"),
    ("data/label_embedding", r"block -= noise", "the sign of noise does not matter"),
    ("data/labels", r"np.arange\(num_rows, \)", "NumPy's default is int64"),
    ("data/labels", r"kind.get\(label, ", "no confidence is below 0"),
    ("data/labels", r"num_labels = ", "a larger number keeps the keys distinct too"),
    ("decoding/calibration", r"pull \* away", "only shortens steps to the same root"),
    ("decoding/expected_f", r"BLOCK =", "costs time and memory only"),
    ("metrics/average_precision", r"wide = num_bins <=", "both are accurate enough"),
    ("metrics/bootstrap", r"_DRAWS", "costs time and memory only"),
    ("metrics/exact_sum", r"np.asarray\(limb, \)", "quotients are float64 too"),
    ("metrics/f_beta", r"astype\(None\)", "float64 compares alike"),
    ("metrics/histogram", r"clip\(probs, None", "no probability is below 0"),
    ("metrics/histogram", r">> 17", "wider cells of the same bins"),
    ("metrics/histogram", r"mode=None", "JAX's default drops too"),
    ("metrics/histogram", r"sum\(axis=1, \)", "NumPy's default is int64"),
    ("metrics/streaming", r"jnp\..*(, \)|dtype=None)", "JAX's default type"),
    ("metrics/streaming", r"packed = (None|.*2 \* 16)", "costs time only"),
    ("metrics/histogram", r"CELL_OF_HALF \+ 2", "a longer table of the same numbers"),
    ("metrics/calibration_error", r"zeros\(1, \)", "JAX's default type"),
    ("models/multitask", r"np.zeros\(num_classes, None\)", "float32 as a parameter"),
    ("models/multitask", r"folds_norms=", "the same numbers in another form, on TPUs"),
    ("objective/losses", r"axis=\+1", "the last of two axes"),
    ("objective/objective", r"set\(1.0, \)", "JAX's default drops too"),
    ("objective/objective", r"jnp.(zeros|arange)\(.*, \)", "JAX's default type"),
    ("train/stages", r"TypedDict, total", "only for type checkers"),
    ("train/stages", r"previous: list", "only its emptiness is tested"),
)
# Packages that tests import and jaxii does not change.
IMPORTED = (
    *("beartype", "cv2", "doctest", "flax.nnx", "grain", "jax.numpy", "jaxtyping"),
    *("optax", "orbax.checkpoint", "polars", "scipy.linalg", "scipy.sparse"),
    *("scipy.special", "scipy.stats", "sklearn.calibration", "sklearn.linear_model"),
)
# Wall-clock limit, for a child that sleeps; processor time is limited per module.
LONGEST_SECONDS = 3600
_LEFT_ALONE = (cst.Annotation, cst.Decorator, cst.Import, cst.ImportFrom, cst.Raise)


@dataclass(frozen=True)
class Mutant:
    """A module with one change.

    Attributes:
      module: Path below `jaxii/`, without its suffix.
      line: Line of the change, from 1.
      change: Removed and added lines.
      source: The whole module.
    """

    module: str
    line: int
    change: str
    source: str

    @property
    def key(self) -> tuple[str, int, str]:
        return self.module, self.line, self.change

    @property
    def functions(self) -> set[str]:
        """Names of the functions that contain the line."""
        tree = ast.parse((ROOT / "jaxii" / f"{self.module}.py").read_text())
        return {
            node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef)
            and node.lineno <= self.line <= (node.end_lineno or 0)
        }

    @property
    def reason(self) -> str:
        """Why it may survive; "" if it may not."""
        found = (
            reason
            for module, pattern, reason in EXPLAINED
            if re.search(module, self.module) and re.search(pattern, self.change)
        )
        return next(found, "")


class _Changes(cst.CSTVisitor):
    """Collects nodes with their mutations by mutmut."""

    def __init__(self):
        self.found: list[tuple[cst.CSTNode, cst.CSTNode]] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, _LEFT_ALONE) or _is_about_types(node):
            return False
        if isinstance(node, cst.Call) and _name(node.func) == "cast":
            node.args[1].visit(self)
            return False
        for kind, operator in mutation_operators:
            if isinstance(node, kind):
                changed = list(operator(node))
                # Only the first mutation of a string, without its upper and lower case.
                if isinstance(node, cst.BaseString):
                    changed = changed[:1]
                self.found += [(node, other) for other in changed]
        return True


def _is_about_types(node: cst.CSTNode) -> bool:
    """Returns whether a node is an overload, a type alias or an axis string."""
    if isinstance(node, cst.FunctionDef):
        return any(_name(each.decorator) == "overload" for each in node.decorators)
    if isinstance(node, cst.Subscript):
        last = node.slice[-1].slice
        axes = isinstance(last, cst.Index) and isinstance(last.value, cst.SimpleString)
        return _name(node.value) == "Callable" or (axes and len(node.slice) > 1)
    return False


def _name(node: cst.CSTNode) -> str:
    return node.value if isinstance(node, cst.Name) else ""


def mutants(module: str) -> list[Callable[[], Mutant]]:
    """Returns functions that make the mutants of a module, in the order of its text."""
    old = (ROOT / "jaxii" / f"{module}.py").read_text()
    tree, changes = cst.parse_module(old), _Changes()
    tree.visit(changes)

    def make(node: cst.CSTNode, changed: cst.CSTNode) -> Mutant:
        new = tree.deep_replace(node, changed).code
        diff = list(difflib.unified_diff(old.split("\n"), new.split("\n"), n=0))[2:]
        line = int(re.findall(r"\d+", diff[0])[0])
        return Mutant(module, line, "\n".join(diff[1:]), new)

    return [functools.partial(make, *change) for change in changes.found]


class _Watch:
    """Records the time of each test and the functions of jaxii that it calls."""

    def __init__(self, notes: Path):
        self._notes, self._found = notes, {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        called, begun = set(), time.process_time()

        def note(frame, event, _):
            if event == "call" and "/jaxii/" in frame.f_code.co_filename:
                called.add(frame.f_code.co_name)

        sys.setprofile(note)
        try:
            return (yield)
        finally:
            sys.setprofile(None)
            self._found[item.nodeid] = [time.process_time() - begun, *called]

    def pytest_sessionfinish(self):
        self._notes.write_text(json.dumps(self._found))


class _Order:
    """Runs the tests that call these functions first, in order of their time."""

    def __init__(self, functions: set[str], notes: Path):
        self._functions, self._notes = functions, json.loads(notes.read_text())

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        def rank(item) -> tuple[bool, float]:
            seconds, *called = self._notes.get(item.nodeid, [0.0])
            return self._functions.isdisjoint(called), seconds

        items.sort(key=rank)


def _run_tests(name: str, plugin: Any) -> Callable[[], int]:
    """Returns a function that runs a file of tests."""

    def act() -> int:
        os.chdir(ROOT)
        words = ["-x", "-n0", "--tb=line", "--assert=plain", f"tests/test_{name}.py"]
        return pytest.main(words, plugins=[plugin])

    return act


def _mutated(mutant: Mutant, notes: Path, most_seconds: int) -> Callable[[], int]:
    """Returns a function that runs a mutant's tests, in limited processor time."""
    path = ROOT / "jaxii" / f"{mutant.module}.py"
    compiled = f"{path.parent}/__pycache__/{path.stem}.*"

    def get_data(loader: SourceFileLoader, name: str) -> bytes:
        if Path(name) == path:
            return mutant.source.encode()
        if Path(name).match(compiled):
            raise OSError("compiled from the unchanged module")
        return Path(name).read_bytes()

    def act() -> int:
        sys.dont_write_bytecode = True
        SourceFileLoader.get_data = get_data
        resource.setrlimit(resource.RLIMIT_CPU, (most_seconds, most_seconds))
        order = _Order(mutant.functions, notes)
        return _run_tests(TESTS[mutant.module], order)()

    return act


def run(chosen: Sequence[Mutant], *, at_once: int) -> Iterator[tuple[Mutant, str]]:
    """Runs tests of mutants; yields each with "killed", "timeout" or "survived"."""
    with tempfile.TemporaryDirectory() as scratch:

        def run_all(jobs: Iterable[tuple[Any, Callable[[], int]]]):
            places = (
                (job, act, lambda: Path(tempfile.mkdtemp(dir=scratch)))
                for job, act in jobs
            )
            return forked.run_all(places, at_once=at_once, most_seconds=LONGEST_SECONDS)

        names = sorted({TESTS[mutant.module] for mutant in chosen})
        notes = {name: Path(scratch, f"{name}.json") for name in names}
        most_seconds: dict[str, int] = {}
        plain = ((name, _run_tests(name, _Watch(notes[name]))) for name in names)
        for name, place, ended in run_all(plain):
            if ended.code:
                text = (place / forked.STDOUT).read_text() + forked.said(place)
                sys.exit(f"test_{name}.py fails without changes\n{text}")
            print(f"test_{name}.py takes {ended.cpu_seconds:.1f} s", flush=True)
            most_seconds[name] = round(20 + 4 * ended.cpu_seconds)
        mutated = (
            (mutant, _mutated(mutant, notes[name], most_seconds[name]))
            for mutant in chosen
            for name in [TESTS[mutant.module]]
        )
        for mutant, _, ended in run_all(mutated):
            outcome = "timeout" if ended.code == -signal.SIGXCPU else "killed"
            yield mutant, outcome if ended.code else "survived"


def table(chosen: Mapping[str, Sequence[Mutant]], alive: Sequence[Mutant]) -> str:
    """Returns a row per area, in Markdown."""
    rows = ["| area | mutants | killed | explained | survivors |", "|---" * 5 + "|"]
    every = [mutant for mutants in chosen.values() for mutant in mutants]
    for area, mutants in (*chosen.items(), ("all", every)):
        left = [mutant for mutant in alive if mutant in mutants]
        explained = sum(bool(mutant.reason) for mutant in left)
        killed = len(mutants) - len(left)
        share = killed / max(len(mutants), 1)
        rows.append(
            f"| {area} | {len(mutants)} | {killed} ({share:.0%}) | {explained} | "
            f"{len(left) - explained} |"
        )
    return "\n".join(rows)


def main() -> int:
    """Runs mutants, prints the survivors and a table; returns the exit code."""
    options = _options()
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    # JAX warns of every fork, because it cannot know that no device was touched.
    warnings.filterwarnings("ignore", message=".*fork.*")
    chosen = {area: _sample(area, options) for area in options.areas or AREAS}
    known: dict[tuple[str, int, str], str] = {}
    if options.out and options.out.exists():
        rows = map(json.loads, options.out.read_text().splitlines())
        known = {tuple(key): outcome for *key, outcome in rows}
    every = [mutant for mutants in chosen.values() for mutant in mutants]
    new = [mutant for mutant in every if mutant.key not in known]
    for mutant, outcome in run(new, at_once=options.at_once):
        known[mutant.key] = outcome
        if outcome == "survived":
            why = mutant.reason or "SURVIVED"
            print(f"{mutant.module}.py:{mutant.line}: {why}\n{mutant.change}")
            sys.stdout.flush()
        elif options.out:
            with options.out.open("a") as file:
                file.write(json.dumps([*mutant.key, outcome]) + "\n")
    alive = [mutant for mutant in every if known[mutant.key] == "survived"]
    print(table(chosen, alive))
    return int(not all(mutant.reason for mutant in alive))


def _sample(area: str, options: argparse.Namespace) -> list[Mutant]:
    makers = [make for module in AREAS[area] for make in mutants(module)]
    size = min(options.sample or len(makers), len(makers))
    print(f"{area}: {size} of {len(makers)} mutants", flush=True)
    return [make() for make in random.Random(options.seed).sample(makers, size)]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("areas", nargs="*", metavar="AREA", help=f"of {', '.join(AREAS)}")
    add("--sample", type=int, default=60, help="mutants per area; 0 for all")
    add("--seed", type=int, default=0, help="of the sample")
    add("--at_once", type=int, default=1, help="children")
    add("--out", type=Path, help="outcomes; killed ones are skipped later")
    options = parser.parse_args()
    if unknown := set(options.areas) - set(AREAS):
        parser.error(f"{', '.join(unknown)}: unknown; use {', '.join(AREAS)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
