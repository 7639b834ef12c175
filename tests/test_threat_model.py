"""Tests that the threat model names existing tests, and that only recipes run code."""

import ast
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from jaxii.data import label_embedding
from jaxii.data.seen import SeenImages
from jaxii.decoding import decoders
from jaxii.errors import InputError
from jaxii.evaluation.held_out import Predictions

ROOT = Path(__file__).parent.parent
# Modules that turn data into code -> the only file that may use them.
CODE = {
    "pickle": "prepare/beam.py",
    "runpy": "runs/api.py",
    # One fixed program, whose input is a file.
    "subprocess": "prepare/tables/table.py",
    **dict.fromkeys(("marshal", "shelve", "importlib")),
    **dict.fromkeys(("dill", "cloudpickle", "joblib", "yaml")),
}
BUILT_IN = {"eval", "exec", "compile", "__import__"}


def test_every_line_of_the_threat_model_names_tests_that_there_are():
    defined = {
        name
        for path in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    text = (ROOT / "jaxii" / "README.md").read_text()
    rows = [line for line in text.splitlines() if re.match(r"\| [^|]", line)]
    rows = [row for row in rows if not re.search(r"\| tests \|$", row)]
    assert len(rows) > 15
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, row
        assert {*named} <= defined, {*named} - defined


def uses(tree):
    """Yields a module's imports, and its calls by bare names that can run code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id


def test_only_recipes_and_plans_of_beam_can_be_code():
    found = set()
    for path in (ROOT / "jaxii").rglob("*.py"):
        text = path.read_text()
        module = path.relative_to(ROOT / "jaxii").as_posix()
        used = {*uses(ast.parse(text))}
        found |= {(name, module) for name in used & CODE.keys()}
        assert not BUILT_IN & used, module
        assert not re.search(r"allow_pickle=(?!False)", text), module
    assert found == {(name, module) for name, module in CODE.items() if module}


class Runs:
    """Creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return self.marker.touch, ()


@pytest.mark.parametrize(
    ("names", "load"),
    [
        (("threshold", "slopes"), lambda path: decoders.load(path, None)),
        (("train",), SeenImages.load),
        (("record", "vectors"), label_embedding.load),
        (("label_hash", "probs"), lambda path: Predictions.load(path, "")),
    ],
    ids=["decoders", "images seen", "label embedding", "predictions"],
)
def test_no_file_of_arrays_is_unpickled(tmp_path, names, load):
    marker = tmp_path / "ran"
    arrays = {name: np.array([Runs(marker)], object) for name in names}
    # The type checker of the tests reads the first array.
    np.savez(tmp_path / "arrays.npz", first=np.zeros(1), **arrays)
    (tmp_path / "bare").write_bytes(pickle.dumps(Runs(marker)))
    for name in ("arrays.npz", "bare"):
        with pytest.raises(InputError):
            load(tmp_path / name)
    assert not marker.exists()
