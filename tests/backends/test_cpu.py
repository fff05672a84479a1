"""The choice of the SIMD level."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from gencore import Key, _cpu
from gencore.backends import cpu

PRINT_LEVEL = "from gencore.backends import cpu; print(cpu.simd_level())"


def run(level: str | None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "GENCORE_SIMD"}
    if level is not None:
        environment["GENCORE_SIMD"] = level
    return subprocess.run(
        [sys.executable, "-c", PRINT_LEVEL], env=environment, capture_output=True, text=True, check=True
    )


def test_the_environment_names_the_level():
    supported = cpu.build_info()["simd_supported"]
    assert run(None).stdout.strip() == supported[-1]
    for level in supported:
        done = run(level)
        assert done.stdout.strip() == level
        assert "GENCORE_SIMD" not in done.stderr


def test_a_level_that_is_not_there_is_said_so():
    done = run("sse9")
    assert done.stdout.strip() == cpu.build_info()["simd_supported"][-1]
    assert "GENCORE_SIMD must be one of scalar" in done.stderr
    assert "got 'sse9'" in done.stderr


def test_set_simd_level():
    before = cpu.simd_level()
    with pytest.raises(ValueError, match="level must be compiled and supported here, got 'sse9'"):
        cpu.set_simd_level("sse9")
    assert cpu.simd_level() == before
    cpu.set_simd_level("scalar")
    assert cpu.simd_level() == "scalar"
    cpu.set_simd_level(before)


@pytest.mark.parametrize("threads", [0, -1])
def test_no_thread_is_refused(threads):
    out, key = torch.zeros(1 << 16, dtype=torch.bfloat16), Key(0).packed
    with pytest.raises(ValueError, match=r"gencore\._cpu\.normal: invalid argument"):
        _cpu.normal(out.data_ptr(), 2, 1, out.numel(), 0, key.data_ptr(), 0, threads)
    assert not out.any()
