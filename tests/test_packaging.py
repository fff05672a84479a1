"""What the package says of itself agrees with itself, and its base needs torch and NumPy only."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gencore
from gencore import _cpu

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
# What serves who installed no extra.
BASE = (
    "__init__.py", "backends", "config.py", "files.py", "info.py", "models", "noise.py", "ops", "plugins.py", "spec.py",
)  # fmt: skip


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}


def imported_packages(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found - sys.stdlib_module_names


def test_there_is_one_version():
    assert gencore.__version__ == PROJECT["version"]
    assert _cpu.build_info()["version"] == PROJECT["version"]
    assert PROJECT["version"] in (ROOT / "CHANGELOG.md").read_text()


def test_the_base_needs_torch_and_numpy_only():
    assert names(PROJECT["dependencies"]) == {"torch", "numpy"}
    # What only the choice of that backend imports.
    triton = ROOT / "gencore" / "backends" / "triton"
    for place in BASE:
        path = ROOT / "gencore" / place
        for file in path.rglob("*.py") if path.is_dir() else [path]:
            allowed = {"gencore", "torch", "numpy"} | ({"triton"} if file.is_relative_to(triton) else set())
            assert imported_packages(file) <= allowed, file


def test_building_needs_no_torch():
    assert names(PYPROJECT["build-system"]["requires"]) == {"setuptools", "pybind11", "cmake", "ninja"}


def test_the_build_tools_of_the_tests_are_those_of_the_build():
    built_with = {r for r in PYPROJECT["build-system"]["requires"] if not r.startswith("setuptools")}
    assert built_with <= set(PROJECT["optional-dependencies"]["dev"])


def test_make_builds_with_the_tools_of_the_build():
    """They are read from pyproject.toml, as Python 3.10 reads no TOML by a pattern."""
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    command = ["make", "--no-print-directory", "--eval", "tools: ; @echo $(BUILD_TOOLS)", "tools"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == PYPROJECT["build-system"]["requires"]


def test_every_make_target_that_the_documents_name_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in ("README.md", "CONTRIBUTING.md"):
        # `make test` in running text, or alone on a line of a code block.
        named = re.findall(r"(?:`|^\s*(?:\$ )?)make ([a-z-]+)", (ROOT / document).read_text(), re.MULTILINE)
        assert set(named) <= targets, document
