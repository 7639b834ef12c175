"""Imports point one way, and every module can be imported."""

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jaxii"
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
)
# What each part may import of jaxii. These are leaves that anyone may.
LEAVES = ("jaxii.errors", "jaxii.files", "jaxii.manifest", "jaxii.nearest")
MAY_IMPORT = {
    "jaxii.errors": (),
    "jaxii.files": (),
    "jaxii.manifest": (),
    "jaxii.config": (),
    "jaxii.console": (),
    "jaxii.data": ("jaxii.data",),
    "jaxii.model": ("jaxii.model",),
    "jaxii.objective": ("jaxii.objective",),
    "jaxii.train": ("jaxii.train", "jaxii.objective"),
    "jaxii.plan": ("jaxii.plan", "jaxii.train"),
    "jaxii.infer": (
        "jaxii.infer",
        "jaxii.train",
        "jaxii.objective",
        "jaxii.data.labels",
    ),
    "jaxii.nearest": (),
    "jaxii.look": ("jaxii.look", "jaxii.data"),
    "jaxii.recipe": (),
    "jaxii.doctor": ("jaxii.doctor", "jaxii.data"),
    "jaxii.clusters": (),
    "jaxii.roll_call": (),
    "jaxii.processes": ("jaxii.clusters", "jaxii.console", "jaxii.roll_call"),
    "jaxii.networks": ("jaxii.config", "jaxii.data", "jaxii.model", "jaxii.train"),
    "jaxii.assemble": (
        "jaxii.config",
        "jaxii.data",
        "jaxii.model",
        "jaxii.networks",
        "jaxii.objective",
        "jaxii.train",
    ),
    "jaxii.workdir": ("jaxii.config", "jaxii.data.labels", "jaxii.infer.result"),
    "jaxii.trained": (
        "jaxii.config",
        "jaxii.data",
        "jaxii.infer",
        "jaxii.networks",
        "jaxii.train",
        "jaxii.workdir",
    ),
    "jaxii.scoring": ("jaxii.console", "jaxii.data", "jaxii.infer", "jaxii.trained"),
    "jaxii.session": ("jaxii",),
    "jaxii.commands": ("jaxii",),
    "jaxii.usage": (),
    "jaxii.given": (),
    "jaxii.place_flags": ("jaxii.clusters",),
    "jaxii.arguments": (
        "jaxii.config",
        "jaxii.given",
        "jaxii.usage",
    ),
    "jaxii.main": ("jaxii",),
}
FORBIDDEN = {"tensorflow", "torch", "importlib"}


def imports_of(module):
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def starts_with(name, prefix):
    return name == prefix or name.startswith(prefix + ".")


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    part = max((p for p in MAY_IMPORT if starts_with(module, p)), key=len)
    allowed = (*MAY_IMPORT[part], *LEAVES)
    for name in imports_of(module):
        assert name.split(".")[0] not in FORBIDDEN, name
        if starts_with(name, "jaxii") and name != "jaxii":
            # `from jaxii.data import labels` names the package first: fine if the
            # module named with it is.
            parents = any(starts_with(prefix, name) for prefix in allowed)
            assert parents or any(starts_with(name, prefix) for prefix in allowed), name


@pytest.mark.parametrize(
    "module", [m for m in MODULES if starts_with(m, "jaxii.data")] + ["jaxii.config"]
)
def test_data_and_config_never_import_jax(module):
    for name in imports_of(module):
        assert name.split(".")[0] not in {"jax", "jaxlib", "flax", "optax"}, name


def test_nothing_imports_main_or_commands_but_main():
    for module in MODULES:
        for name in imports_of(module):
            if starts_with(name, "jaxii.commands"):
                assert module == "jaxii.main" or starts_with(module, "jaxii.commands")
            assert not starts_with(name, "jaxii.main")


def test_every_module_imports_on_its_own_and_warns_of_nothing():
    lines = "\n".join(f"import {module}" for module in MODULES)
    result = subprocess.run(
        [sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr


def test_package_files_hold_one_docstring_and_import_nothing():
    for path in PACKAGE.rglob("__init__.py"):
        (only,) = ast.parse(path.read_text()).body
        assert isinstance(only, ast.Expr), path


@pytest.mark.parametrize("module", MODULES)
def test_a_module_says_what_it_is_for_and_stays_readable(module):
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "no docstring"
    assert text.count("\n") <= 600
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_no_module_has_a_name_that_says_nothing():
    names = {info.name for info in pkgutil.walk_packages([str(PACKAGE)])}
    assert not names & {"utils", "util", "common", "helpers", "misc"}


def test_the_top_level_holds_what_was_agreed():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    top = {name.split("/")[0] for name in listed if not name.startswith(".")}
    agreed = {"pyproject.toml", "README.md", "LICENSE", "jaxii", "configs", "launch"}
    assert top <= agreed | {"tests"}
