"""The C++ and CUDA side of this checkout as CMake builds it, once for all tests of it. Warnings of nvcc are errors.

It stays in ``build/library``, where the next run compiles only what changed. No GPU is needed.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "library"
# The sources do not ask which it is. .ci/run makes a wheel for the oldest that csrc/cuda must do on.
ARCHITECTURES = ("sm_90",)
# Where setup.py builds.
MODULE = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
KEPT_OUTPUT = ROOT / "tests" / "kept_output.py"


def tool(name: str) -> str:
    """A build tool, of this Python's environment if it has it. Skips the test where there is none."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed; the dev extra brings it")
    return found


def run(*command: str | Path, **variables: str) -> str:
    """Runs a command, which must succeed; returns what it prints."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=os.environ | variables)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def configure(source: Path, folder: Path, *options: str) -> str:
    """What CMake says."""
    ninja = f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"
    return run(tool("cmake"), "-S", source, "-B", folder, "-G", "Ninja", ninja, *options)


def has_nvcc() -> bool:
    return shutil.which(os.environ.get("CUDACXX", "nvcc")) is not None


def built(*targets: str) -> Path:
    """The folder, where these targets are up to date; beside each CUDA object is its log, with what ptxas tells."""
    folder = configured()
    with _locked():
        run(tool("cmake"), "--build", folder, "--target", *targets)
    return folder


@functools.cache
def configured() -> Path:
    """The folder, where CMake has decided what to build and how."""
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed; the dev extra brings it")
    architectures = ";".join(f"{name.removeprefix('sm_')}-real" for name in ARCHITECTURES)
    # Of the processes that share out one run of the tests, the first one does it.
    this_run, stamp = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid())), FOLDER / "configured"
    with _locked():
        if stamp.exists() and stamp.read_text() == this_run:
            return FOLDER
        if not (FOLDER / ".ninja_log").exists() and MODULE.exists():
            # The module's objects. Ninja compiles again what is out of date, or was compiled by another command.
            shutil.copytree(MODULE, FOLDER, dirs_exist_ok=True)
        # Whether there is nvcc is looked for again.
        (FOLDER / "CMakeCache.txt").unlink(missing_ok=True)
        configure(
            ROOT,
            FOLDER,
            "-Werror=dev",
            f"-DGENCORE_CUDA={'on' if has_nvcc() else 'off'}",
            f"-DGENCORE_CUDA_ARCHITECTURES={architectures}",
            "-DCMAKE_CUDA_FLAGS=-Xptxas=-v -Werror=all-warnings",
            f"-DCMAKE_CUDA_COMPILER_LAUNCHER={sys.executable};{KEPT_OUTPUT}",
            "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        )
        stamp.write_text(this_run)
    return FOLDER


@contextmanager
def _locked() -> Iterator[None]:
    """Other processes that run tests wait, as they would compile the same."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
