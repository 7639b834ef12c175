"""Tests that the benchmarks fit the program; the benchmarks are run by hand."""

import importlib
import re
from pathlib import Path

import pytest

from jaxii.distributed.mesh import make_mesh
from jaxii.planner import plan_text
from jaxii.planner.compiled import Figures
from jaxii.planner.topology import CHIPS, Topology
from tests.benchmarks import compiled_step

FOLDER = Path(__file__).parent / "benchmarks"
NAMES = sorted(path.stem for path in FOLDER.glob("[a-z]*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_is_importable(name):
    try:
        module = importlib.import_module(f"tests.benchmarks.{name}")
    except ModuleNotFoundError as error:
        if error.name.startswith(("jaxii", "tests")):
            raise
        pytest.skip(f"needs {error.name}")
    assert module.__doc__


def test_the_plans_figures_are_found_in_its_text():
    figures = Figures(
        argument_bytes=1e9,
        output_bytes=0.0,
        temporary_bytes=3e9,
        program_bytes=1e6,
        flops=1e12,
        hbm_bytes=2e10,
        collectives=(),
    )
    place = Topology(
        name="v5e:2x4",
        chip=CHIPS["v5e"],
        sides=(2, 4),
        mesh=make_mesh(),
        hbm_bytes=1e10,
    )
    text = "\n".join(plan_text.report(figures, place, 128, 1000))
    found = {name: re.search(p, text) for name, p in compiled_step.FIGURES.items()}
    assert all(found.values()), found
