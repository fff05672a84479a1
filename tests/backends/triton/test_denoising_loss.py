"""The training loss by Triton's kernels, beside the CPU kernels. tests/ops holds both to the definition."""

from __future__ import annotations

import math

import pytest
import torch
from support import same_bits

from gencore import Key, diffusion
from gencore.backends import cpu
from gencore.bench import cases

pytest.importorskip("triton")

from backends.triton.diffusion import DEVICE, EVERY_LARGE, KEY, drawn, on_device

from gencore.backends import triton as kernels

SCHEDULE = diffusion.linear(50, 1e-3, 0.2)


def table_of(learned: bool, parameterization: str = "v") -> torch.Tensor:
    variance = "learned_range" if learned else None
    return SCHEDULE.loss_table(torch.device("cpu"), parameterization, "min_snr", 5.0, variance, 1.0 if learned else 0.0)


def inputs(case: cases.Case, dtype: torch.dtype, learned: bool) -> tuple[torch.Tensor, ...]:
    """output, x0 of 8 bits in [-1, 1], the table, t with first steps among others."""
    levels = (drawn(case, torch.float64, 1).clamp(-1, 1) * 127.5).round() / 127.5
    t = torch.arange(case.shape[0]) * 7 % 50
    return drawn(case, dtype, 0, 2 if learned else 1), levels.to(dtype), table_of(learned), t


@pytest.mark.parametrize(("dtype", "case"), EVERY_LARGE, ids=str)
@pytest.mark.parametrize("learned", [False, True])
def test_near_the_cpu_kernels_at_large(learned, dtype, case):
    args = (*inputs(case, dtype, learned), KEY.packed)
    loss, want = kernels.denoising_loss(*on_device(*args)), cpu.ops.denoising_loss(*args)
    assert loss.dtype == want.dtype
    # The terms are the same bits, but for the decoder's, of another exponential and logarithm, and the float64
    # exponential's. Sums of at most 2^14 terms, none negative or much larger than the sum, in trees of 11 levels.
    tolerance = 1e-13 if dtype == torch.float64 else 11 * 2.0**-23
    torch.testing.assert_close(loss.cpu(), want, rtol=tolerance, atol=0)

    grad = torch.linspace(0.5, 1.5, len(want), dtype=want.dtype)
    got = kernels.denoising_loss_backward(*on_device(grad, *args))
    want = cpu.ops.denoising_loss_backward(grad, *args)
    assert got.stride() == want.stride()
    if dtype == torch.float64:
        torch.testing.assert_close(got.cpu(), want, rtol=1e-12, atol=1e-14)
        return
    # The first step's gradient for v is rounded from float64 to float32 and to the result's type.
    n = case.shape[1]
    assert same_bits(got[:, :n], want[:, :n])
    assert same_bits(got[1:, n:], want[1:, n:])
    torch.testing.assert_close(got[:1, n:].cpu(), want[:1, n:], rtol=torch.finfo(dtype).eps, atol=2.0**-24)


def test_first_steps_lose_no_digits_in_the_tails():
    # Of x0 alone, of eps nothing; the mean moves by the error, up to seven deviations of 1/2.
    row = [1.0, 0.0, 0.0, 1.0, 1.0, math.log(0.25), 0.0, -math.inf]
    table, moved = torch.tensor([row], dtype=torch.float64), torch.linspace(-3.5, 3.5, 301, dtype=torch.float64)
    for level in (-1.0, 0.0, 1.0):
        x0 = torch.full((301, 1), level, dtype=torch.float64)
        args = (moved[:, None] + level, x0, table, None, KEY.packed)
        # Of a probability near 1, the logarithm is as far off as 1 is: by some units of 2^-53.
        torch.testing.assert_close(
            kernels.denoising_loss(*on_device(*args)).cpu(), cpu.ops.denoising_loss(*args), rtol=1e-13, atol=1e-15
        )


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("shape", [(5, 1200), (5, 6)])
def test_a_step_out_of_range(shape, learned):
    output, x0, table, _ = inputs(cases.Case(shape, ""), torch.float32, learned)
    t = torch.tensor([0, -1, 49, 50, 2**40])
    inside = torch.tensor([True, False, True, False, False])
    args = (output, x0, table, t.where(inside, 0), KEY.packed)
    loss = kernels.denoising_loss(*on_device(*args[:3], t, KEY.packed)).cpu()
    want = kernels.denoising_loss(*on_device(*args)).cpu()
    assert same_bits(loss[inside], want[inside])
    assert loss[~inside].isnan().all()
    grad = torch.ones(shape[0])
    got = kernels.denoising_loss_backward(*on_device(grad, *args[:3], t, KEY.packed)).cpu()
    want = kernels.denoising_loss_backward(*on_device(grad, *args)).cpu()
    assert same_bits(got[inside], want[inside])
    assert got[~inside].isnan().all()


@pytest.mark.parametrize("shape", [(2, 60), (2, 2500)])
def test_loss_does_not_depend_on_addresses_batch_or_where_t_is(shape):
    output, x0, table, _ = inputs(cases.Case(shape, ""), torch.float32, True)
    args = on_device(output, x0, table, torch.tensor([0, 30]))
    want = kernels.denoising_loss(*args, KEY.packed)
    moved = []
    for x in args[:2]:
        memory = torch.empty(x.numel() + 1, device=DEVICE)[1:]
        moved.append(memory.view(x.shape).copy_(x))
    assert same_bits(kernels.denoising_loss(*moved, *args[2:], KEY.packed), want)
    output, x0, table, t = args
    alone = kernels.denoising_loss(output[1:], x0[1:], table, t[1:], KEY.samples(2**32).packed)
    assert same_bits(alone, want[1:])
    row = kernels.denoising_loss(output[1:], x0[1:], table[30:31], None, KEY.samples(2**32).packed)
    assert same_bits(row, want[1:])


def test_nothing_to_do():
    for shape in ((0, 4), (3, 0)):
        x0 = torch.empty(shape, device=DEVICE)
        loss = kernels.denoising_loss(x0, x0, table_of(False).to(DEVICE), None, KEY.packed)
        assert loss.shape == shape[:1]
        assert loss.isnan().all()
        assert kernels.denoising_loss_backward(loss, x0, x0, table_of(False), None, KEY.packed).shape == shape


def test_first_steps_of_some_rows_of_a_tile():
    args = (*inputs(cases.Case((40, 6), ""), torch.float32, True), Key(torch.arange(40)).packed)
    torch.testing.assert_close(
        kernels.denoising_loss(*on_device(*args)).cpu(), cpu.ops.denoising_loss(*args), rtol=4 * 2.0**-23, atol=0
    )
