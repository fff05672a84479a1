"""The choice of the SIMD level, the memory of results, what the module refuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gencore import Key, _cpu, ops
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
        _cpu.normal(
            out=out.data_ptr(), dtype=2, shape=(1, 1, out.numel(), 0), key=(key.data_ptr(), 0, False), place=threads
        )
    assert not out.any()


def test_large_results_ask_for_huge_pages():
    """The system says in what a mapping is flagged with; "hg" is the request."""
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not enabled.exists() or "[never]" in enabled.read_text():
        pytest.skip("this system grants no huge pages")
    x = torch.zeros(1, 4, 1024, 3 * 1024)
    y = ops.group_norm(x, 2)
    middle, flags = y.data_ptr() + y.nbytes // 2, ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= middle < int(match[2], 16)
        elif line.startswith("VmFlags") and inside:
            flags = line
    assert "hg" in flags.split()


def test_the_module_refuses_what_is_no_group_norm():
    x = torch.zeros(2, 6)
    right = {
        "x": x.data_ptr(), "y": x.data_ptr(), "statistics": None, "dtype": 0, "shape": (2, 6, 1, 3, False),
        "eps": 1e-5, "activation": 0, "weight": None, "bias": None, "scale": None, "shift": None, "bias_in": None,
        "place": 1,
    }  # fmt: skip
    _cpu.group_norm(**right)
    for wrong in (
        {"shape": (2, 6, 1, 4, False)}, {"shape": (2, 6, 1, 0, False)}, {"shape": (2, 6, 1 << 62, 3, False)},
        {"place": 0}, {"dtype": 9}, {"activation": 7}, {"weight": (x.data_ptr(), 2, 0)},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="group_norm: invalid argument"):
            _cpu.group_norm(**right | wrong)


def step_of_module(
    x, y, rows, key, *, output=None, second=None, known=None, prediction=None, learned=False, index=None
):
    """The module's diffusion_step, which is told addresses only."""
    _cpu.diffusion_step(
        x=x.data_ptr(), output=output, second=second, history0=None, history1=None, known=known, mask=None,
        y=y.data_ptr(), prediction=prediction, dtype=0, shape=(len(x), 1, x[0].numel(), 0), learned=learned,
        second_learned=False, table=(rows.data_ptr(), len(rows), index, False), key=(key.packed.data_ptr(), 0, False),
        place=1,
    )  # fmt: skip


def test_a_step_without_an_output_has_no_variance_to_read():
    x, rows = torch.randn(2, 40), ops.step_coefficients(x=0.5, noise=2.0, log_scale=1.0, log_scale_slope=1.0)[None]
    y = torch.empty_like(x)
    step_of_module(x, y, rows, Key(3), learned=True)
    assert torch.equal(y, ops.diffusion_step(x, None, rows[0], Key(3)))


def test_the_module_refuses_what_is_no_step():
    x, rows, t = torch.randn(2, 40), ops.step_coefficients(x=0.5)[None], torch.tensor([0, 1])
    y = torch.zeros_like(x)
    for wrong in ({"second": x.data_ptr()}, {"prediction": x.data_ptr()}, {"known": x.data_ptr()}):
        with pytest.raises(ValueError, match="diffusion_step: invalid argument"):
            step_of_module(x, y, rows, Key(3), **wrong)
    with pytest.raises(ValueError, match=r"t must be in \[0, 1\), the steps of the schedule, got 1 for sample 1"):
        step_of_module(x, y, rows, Key(3), index=t.data_ptr())
    with pytest.raises(ValueError, match="diffusion_step: invalid argument"):
        step_of_module(x[:1].expand(3, 40), torch.zeros(3, 40), rows.expand(2, 16).contiguous(), Key(3))
    assert not y.any()
