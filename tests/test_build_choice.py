"""Where CMake builds the CUDA kernels, and for which GPUs: ``cmake/cuda.cmake`` on machines that the tests make up."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from library import ROOT, has_nvcc, tool

PROJECT = f"""\
cmake_minimum_required(VERSION 3.20)
project(choice LANGUAGES NONE)
set(PROJECT_SOURCE_DIR "{ROOT}")
set(gencore_ops normal)
include("{ROOT}/cmake/cuda.cmake")
message(STATUS "state: ${{gencore_cuda_state}}")
"""
FAILED = """\
echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver. Driver version 580.65.06.'
exit 9"""
NO_GPU = "no GPU was seen when it was built (GENCORE_CUDA=on builds it)"

needs_nvcc = pytest.mark.skipif(not has_nvcc(), reason="nvcc is not installed")

Choose = Callable[..., str]


@pytest.fixture
def choose(tmp_path: Path) -> Choose:
    """choose(what nvidia-smi does, options...): what was decided, in words; or the message of an error."""

    def choose(driver: str, *options: str, **variables: str) -> str:
        (tmp_path / "CMakeLists.txt").write_text(PROJECT)
        (tmp_path / "csrc").symlink_to(ROOT / "csrc")
        smi = tmp_path / "nvidia-smi"
        smi.write_text(f"#!/bin/sh\n{driver}\n")
        smi.chmod(0o755)
        command = [tool("cmake"), "-S", tmp_path, "-B", tmp_path / "build", "-G", "Ninja", "-DGENCORE_CUDA=auto"]
        command += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DGENCORE_NVIDIA_SMI={smi}", *options]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)
        if done.returncode != 0:
            return " ".join(done.stderr.split())
        (state,) = (line for line in done.stdout.splitlines() if line.startswith("-- state: "))
        return state.removeprefix("-- state: ")

    return choose


def gpus(*capabilities: str) -> str:
    return "\n".join(f"echo {capability}" for capability in capabilities)


@pytest.mark.parametrize(
    "driver",
    [FAILED, "echo 'No devices were found'; exit 6", "echo 'Field \"compute_cap\" is not a valid field to query.'", ""],
    ids=["no driver", "no GPU", "old driver", "says nothing"],
)
def test_without_a_gpu_there_are_none(choose: Choose, driver: str) -> None:
    assert choose(driver) == NO_GPU


def test_a_driver_that_does_not_exist(choose: Choose, tmp_path: Path) -> None:
    assert choose("", f"-DGENCORE_NVIDIA_SMI={tmp_path}/nowhere/nvidia-smi") == NO_GPU


def test_a_gpu_that_is_too_old(choose: Choose) -> None:
    assert choose(gpus("7.5")) == "no GPU of compute capability 8.0 or later was seen when it was built"


def test_a_gpu_without_nvcc(choose: Choose) -> None:
    assert choose(gpus("9.0"), CUDACXX="/nowhere/nvcc") == "nvcc was not found when it was built"


def test_off_asks_nobody(choose: Choose, tmp_path: Path) -> None:
    assert choose(f"touch {tmp_path}/asked", "-DGENCORE_CUDA=off") == "it was built with GENCORE_CUDA=off"
    assert not (tmp_path / "asked").exists()


def test_on_needs_nvcc(choose: Choose) -> None:
    message = choose(FAILED, "-DGENCORE_CUDA=on", CUDACXX="/nowhere/nvcc")
    assert "GENCORE_CUDA=on needs nvcc, which was not found; CUDACXX=/path/to/nvcc says where it is" in message


def test_other_words_are_refused(choose: Choose) -> None:
    assert "GENCORE_CUDA must be on, off or auto, got yes" in choose(FAILED, "-DGENCORE_CUDA=yes")


@needs_nvcc
@pytest.mark.parametrize(
    ("driver", "options", "architectures"),
    [
        (gpus("9.0", "7.5", "8.6", "9.0"), [], "86 90"),
        # Newer than any nvcc: served by PTX.
        (gpus("99.0"), [], "80-real 90"),
        (FAILED, ["-DGENCORE_CUDA_ARCHITECTURES=80-real;90-real"], "80-real 90-real"),
    ],
    ids=["its GPUs", "an unknown GPU", "named"],
)
def test_for_which_gpus(choose: Choose, driver: str, options: list[str], architectures: str) -> None:
    # Given, so that it is not looked for, which takes as long as the rest.
    compiler = shutil.which(os.environ.get("CUDACXX", "nvcc"))
    state = choose(driver, f"-DCMAKE_CUDA_COMPILER={compiler}", *options)
    assert state.startswith("built by nvcc ")
    assert f" for {architectures}" in state
