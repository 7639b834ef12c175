"""Tests that imports point one way and that every module can be imported."""

import ast
import functools
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
# The order of the parts: a module imports from its own part and from earlier ones.
# Parts on one line do not import each other.
ORDER = (
    ("errors",),
    ("storage",),
    ("manifest", "config", "console"),
    ("data", "models", "objective", "metrics"),
    ("prepare", "decoding", "distributed"),
    ("train",),
    ("evaluation",),
    ("report", "export", "planner", "doctor"),
    ("runs",),
    ("cli",),
    ("main",),
)
RANK = {f"jaxii.{part}": i for i, parts in enumerate(ORDER) for part in parts}
WITHOUT_JAX = ("jaxii.config", "jaxii.data", "jaxii.prepare")
FORBIDDEN = {"tensorflow", "torch", "importlib"}
SMALL_LINES = 60
# Packages with functions of the Python API: their `__init__` files export them.
PUBLIC = ("metrics", "decoding", "objective")


@functools.cache
def imports_of(module):
    """Returns the names that a module imports: `a`, and `a.b` for `from a import b`."""
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    return found


def starts_with(name, prefix):
    return name == prefix or name.startswith(prefix + ".")


def part_of(module):
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    part = part_of(module)
    for name in imports_of(module):
        assert name.split(".")[0] not in FORBIDDEN, name
        other = part_of(name)
        if other in RANK and other != part:
            assert RANK[other] < RANK[part], name


def test_no_two_modules_import_each_other():
    names = {m: {n for n in imports_of(m) if n in MODULES} for m in MODULES}
    done, open_ = set(), []

    def visit(module):
        assert module not in open_, f"cycle: {open_[open_.index(module) :]}"
        if module in done:
            return
        open_.append(module)
        for other in names[module]:
            visit(other)
        done.add(open_.pop())

    for module in MODULES:
        visit(module)


@pytest.mark.parametrize("module", [m for m in MODULES if part_of(m) in WITHOUT_JAX])
def test_config_data_and_prepare_never_import_jax(module):
    for name in imports_of(module):
        assert name.split(".")[0] not in {"jax", "jaxlib", "flax", "optax"}, name


def test_nothing_imports_main_or_cli_but_main():
    for module in MODULES:
        for name in imports_of(module):
            if starts_with(name, "jaxii.cli"):
                assert module == "jaxii.main" or starts_with(module, "jaxii.cli")
            assert not starts_with(name, "jaxii.main")


def test_every_module_imports_on_its_own_and_warns_of_nothing():
    lines = "\n".join(f"import {module}" for module in MODULES)
    result = subprocess.run(
        [sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr


def test_package_files_hold_one_docstring_but_for_the_public_packages():
    for path in PACKAGE.rglob("__init__.py"):
        docstring, *rest = ast.parse(path.read_text()).body
        assert isinstance(docstring, ast.Expr), path
        part = path.parent.relative_to(PACKAGE).as_posix()
        if part == ".":  # the public API, which exports lazily; see test_api
            continue
        if part not in PUBLIC:
            assert not rest, path
        for node in rest:
            # A package exports names of its own modules only.
            assert isinstance(node, ast.ImportFrom), path
            assert starts_with(node.module, f"jaxii.{part}"), path


@pytest.mark.parametrize("module", MODULES)
def test_a_module_says_what_it_is_for_and_stays_readable(module):
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "no docstring"
    assert text.count("\n") <= 600
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_a_small_module_has_more_than_one_importer():
    found = set()
    for module in MODULES:
        path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        importers = {m for m in MODULES if m != module and module in imports_of(m)}
        is_small = path.read_text().count("\n") < SMALL_LINES
        # A command is a module, even if it is small.
        if is_small and len(importers) == 1 and part_of(module) != "jaxii.cli":
            found.add(module)
    assert not found


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
