"""The samplers' step by Triton's kernel: the bits of the CPU kernel. tests/ops holds both to the definition."""

from __future__ import annotations

import sys
from unittest import mock

import pytest
import torch
from support import same_bits

from gencore import Key, ops
from gencore.backends import cpu
from gencore.bench import cases

pytest.importorskip("triton")

from backends.triton.diffusion import DEVICE, EVERY_LARGE, KEY, drawn, on_device, rows_in_memory

from gencore.backends import triton as kernels

NOISE, LOG_SCALE, SLOPE, KNOWN_NOISE = (
    ops.STEP_COLUMNS.index(name) for name in ("noise", "log_scale", "log_scale_slope", "known_noise")
)


def rows_of(number: int) -> torch.Tensor:
    rows = torch.randn(number, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[:, ops.STEP_COLUMNS.index("limit")] = 1.1
    return rows


def tensors_of(case: cases.Case, dtype: torch.dtype, learned: bool = True) -> list[torch.Tensor]:
    """x, output, second, two of the history, known, mask."""
    channels = [1, 2 if learned else 1, 2 if learned else 1, 1, 1, 1, 1]
    tensors = [drawn(case, dtype, number, times) for number, times in enumerate(channels)]
    tensors[-1] = (tensors[-1] > 0).to(dtype)
    return tensors


def check(tensors, rows, key) -> None:
    x, output = tensors[:2]
    wanted_x0 = None if output is None else torch.empty_like(x)
    got_x0 = None if output is None else torch.empty_like(x, device=DEVICE)
    want = cpu.ops.diffusion_step(*tensors, rows, key, None, wanted_x0)
    pairs = [(kernels.diffusion_step(*on_device(*tensors), rows, key, None, got_x0), want)]
    if got_x0 is not None:
        pairs.append((got_x0, wanted_x0))
    with rows_in_memory("diffusion_step"):
        pairs.append((kernels.diffusion_step(*on_device(*tensors, rows, key)), want))
    for a, b in pairs:
        assert a.stride() == b.stride()
        # The exponential in float64 is another library's: the GPU's, or NumPy's.
        if a.dtype == torch.float64 and output is not None and output.shape != x.shape:
            torch.testing.assert_close(a.cpu(), b, rtol=1e-13, atol=1e-13)
        else:
            assert same_bits(a, b)


@pytest.mark.parametrize(("dtype", "case"), EVERY_LARGE, ids=str)
def test_bits_of_the_cpu_kernel_at_large(dtype, case):
    check(tensors_of(case, dtype), rows_of(case.shape[0]), KEY.packed)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 33), (40, 6)])
def test_bits_wherever_coefficients_are(shape, dtype):
    tensors = tensors_of(cases.Case(shape, ""), dtype, learned=False)
    for number in (1, shape[0]):
        check(tensors, rows_of(number), Key(torch.arange(shape[0])).packed)


@pytest.mark.parametrize("shape", [(3, 1200), (40, 6)])
def test_samples_without_noise_beside_others(shape):
    rows = rows_of(shape[0])
    rows[::2, NOISE] = 0
    rows[1::3, [LOG_SCALE, SLOPE]] = 0
    rows[::5, KNOWN_NOISE] = 0
    # What is 0 in float32 alone counts as noise: added to -0, it makes 0 of it where eps is positive.
    rows[1, NOISE] = 1e-300
    x, output, second, history0, history1, known, mask = tensors_of(cases.Case(shape, ""), torch.float32)
    # Values of v that are not to be used, and negative zeros, to which noise must not be added 0 times.
    output[:2, shape[1] :], x[1:3], known[0] = float("nan"), -0.0, -0.0
    rows[0, ops.STEP_COLUMNS.index("known")] = 1
    others = (history0, history1, known, mask)
    check((x, output, second, *others), rows, KEY.packed)
    rows[2] = 0
    rows[1:3, ops.STEP_COLUMNS.index("x")] = 1
    check((x, *[None] * 6), rows, KEY.packed)
    got = kernels.diffusion_step(*on_device(x, *[None] * 6), rows, KEY.packed)
    assert torch.signbit(got[2]).all()
    assert not torch.signbit(got[1]).all()


def test_noise_is_not_made_where_no_sample_wants_it():
    made = []
    module = sys.modules["gencore.backends.triton.diffusion_step"]
    if DEVICE != "cpu":
        pytest.skip("what a GPU branches around cannot be seen")
    real = module.values_of_tile

    def values_of_tile(*args):
        made.append(1)
        return real(*args)

    x = drawn(cases.Case((3, 2000), ""), torch.float32, 0)
    rows = ops.step_coefficients(x=0.5, noise=[0.0, 0.3, 0.0], known_noise=0.7)
    with mock.patch.object(module, "values_of_tile", values_of_tile):
        kernels.diffusion_step(x, *[None] * 6, rows, KEY.packed)
        # The two tiles of the second sample.
        assert len(made) == 2
        kernels.diffusion_step(x, *[None] * 4, x, x, rows, KEY.packed)
        assert len(made) == 2 + 6


def test_in_place():
    tensors = tensors_of(cases.Case((2, 3, 5, 7), "", layout="channels_last"), torch.bfloat16)
    want = cpu.ops.diffusion_step(*tensors, rows_of(1), KEY.packed)
    x, *others = on_device(*tensors)
    assert kernels.diffusion_step(x, *others, rows_of(1), KEY.packed, x) is x
    assert same_bits(x, want)
