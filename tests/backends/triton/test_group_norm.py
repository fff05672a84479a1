"""Fused group norm by Triton's kernels, on every path they can take; tests/ops has what is true of all backends."""

from __future__ import annotations

import sys

import pytest
import torch
from support import laid_out, same_bits
from torch import Tensor

from gencore.backends.reference.group_norm import group_norm as reference
from gencore.bench import cases
from gencore.bench.cases import Case

pytest.importorskip("triton")

from gencore.backends import triton as kernels
from gencore.backends.triton import _group_norm as common
from gencore.backends.triton import _group_norm_backward as backward
from gencore.backends.triton import _group_norm_second as second

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("weight", "bias", "scale", "shift", "bias_in")
# Half a unit in the last place of 1, the most that rounding once takes from it.
ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
forward = sys.modules["gencore.backends.triton.group_norm"]


@pytest.fixture(params=["pieces", "pieces of several tiles", "many slots"])
def small_limits(request, monkeypatch):
    """Makes the kernels cut small tensors as they cut large ones."""
    enough = 2 if request.param == "pieces of several tiles" else 1024
    for module in (forward, backward):
        monkeypatch.setattr(module, "_LIMITS", module._LIMITS._replace(of_group=0, of_tile=128, enough=enough))
    if request.param == "many slots":
        monkeypatch.setattr(forward, "_FEW_SLOTS", 0)
        monkeypatch.setattr(forward, "_MOST_SLOTS", 4)
        monkeypatch.setattr(forward, "_CHANNELS", 2)
        monkeypatch.setattr(backward, "_MERGED", 4)
        monkeypatch.setattr(backward, "_SUMMED", (2, 2))


def inputs(case: Case, dtype, names=NAMES, value_dtype=None, mean=0.0) -> tuple[list[Tensor], list[Tensor | None]]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    samples, channels = case.shape[:2]
    x, grad_y = (laid_out((draw(*case.shape) + m).to(dtype), case).to(DEVICE) for m in (mean, 0.0))
    shapes = [(channels,)] * 2 + [(samples, channels)] * 3
    values = [draw(*shape).to(value_dtype or dtype).to(DEVICE) for shape in shapes]
    return [x, grad_y], [value if name in names else None for name, value in zip(NAMES, values, strict=True)]


def exactly(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [t if t is None else t.detach().cpu().double().requires_grad_() for t in tensors]


def assert_near(got: Tensor, want: Tensor, magnitude: float, steps: int) -> None:
    """Off by so many roundings of sums and terms of that magnitude in the arithmetic's type, then rounded once."""
    assert got.shape == want.shape
    arithmetic = ROUNDING[torch.float64 if got.dtype == torch.float64 else torch.float32]
    once = 0.0 if got.dtype in (torch.float32, torch.float64) else 1.01 * ROUNDING[got.dtype]
    # Below its normal numbers float16 has no more than these.
    bound = steps * arithmetic * magnitude + once * want.abs() + (2.0**-25 if got.dtype == torch.float16 else 0.0)
    error = (got.cpu().double() - want).abs()
    assert bool((error <= bound).all()), f"{float((error / bound).max()):.3g} times the bound"


def check(case: Case, dtype, names=NAMES, activation="silu", value_dtype=None, mean=0.0, eps=1e-5) -> None:
    (x, grad_y), values = inputs(case, dtype, names, value_dtype, mean)
    y, statistics = kernels.group_norm(x, case.groups, *values, activation, eps)
    assert (y.dtype, y.stride()) == (x.dtype, x.stride())

    exact = exactly([x, *values])
    weight, bias, scale, shift, bias_in = exact[1:]
    want = reference(
        exact[0], case.groups, weight, bias, eps, scale=scale, shift=shift, bias_in=bias_in, activation=activation
    )
    u = exact[0] if bias_in is None else exact[0] + bias_in.reshape(*bias_in.shape, *[1] * (x.dim() - 2))
    groups = u.detach().reshape(x.shape[0], case.groups, -1)
    means = torch.stack((groups.mean(2), (groups.var(2, correction=0) + eps).rsqrt()), 2)
    largest = float(groups.abs().max())
    torch.testing.assert_close(
        statistics.cpu(), means, rtol=32 * ROUNDING[dtype if dtype == torch.float64 else torch.float32], atol=1e-6
    )

    # The magnitudes of what is added up. The derivative of SiLU is below 1.1, its second one at most 0.5.
    xhat = float(((groups - means[..., :1]) * means[..., 1:]).abs().max())
    w, b, f, h = (
        default if value is None else float(value.detach().abs().max()) + more
        for value, default, more in ((weight, 1.0, 0.0), (bias, 0.0, 0.0), (scale, 1.0, 1.0), (shift, 0.0, 0.0))
    )
    t = (xhat * w + b) * f + h
    assert_near(y, want.detach(), t, 16)
    g = 1.1 * grad_y.cpu().double().abs()
    of_channel, top = float(g.reshape(*x.shape[:2], -1).sum(2).max()), float(g.max())
    of_x = float(means[..., 1].max()) * w * f * top * (2 + xhat)
    pixels = x[0, 0].numel()
    magnitudes = (
        of_x, x.shape[0] * of_channel * f * xhat, x.shape[0] * of_channel * f, of_channel * (w * xhat + b), of_channel,
        pixels * of_x,
    )  # fmt: skip
    wanted = [tensor is not None for tensor in exact]
    got = kernels.group_norm_backward(grad_y, x, statistics, case.groups, *values, activation, wanted)
    assert got[0].stride() == x.stride()
    grads = iter(torch.autograd.grad(want, [tensor for tensor in exact if tensor is not None], grad_y.cpu().double()))
    for gradient, like, magnitude in zip(got, (x, *values), magnitudes, strict=True):
        if like is None:
            assert gradient is None
        else:
            assert gradient.dtype == like.dtype
            assert_near(gradient, next(grads), magnitude * (1 + t if activation else 1), 32)
    assert largest < 1e6


@pytest.mark.parametrize("case", [case for case in cases.small(cases.GROUP_NORM) if case.elements], ids=str)
def test_definition(case):
    check(case, torch.float32)


CUT = (
    Case((2, 6, 5, 7), "", groups=3),
    Case((2, 6, 5, 7), "", groups=3, layout="channels_last"),
    Case((1, 3, 23, 16), "", groups=1),
    Case((2, 80, 5, 4), "", groups=4, layout="channels_last"),
    Case((2, 4, 9, 20), "", groups=4),
    Case((2, 40), "", groups=2),
)


@pytest.mark.parametrize("case", CUT, ids=str)
def test_definition_in_pieces(case, small_limits):
    check(case, torch.float32)


@pytest.mark.parametrize("dtype", cases.DTYPES[1:], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_definition_in_other_types(dtype, layout, small_limits):
    check(Case((2, 12, 7, 8), "", groups=3, layout=layout), dtype)
    if dtype != torch.float64:
        check(Case((2, 12, 7, 8), "", groups=3, layout=layout), dtype, value_dtype=torch.float32)


@pytest.mark.parametrize("dtype", cases.DTYPES[1:], ids=str)
def test_definition_of_whole_groups_in_other_types(dtype):
    for layout in ("contiguous", "channels_last"):
        check(Case((2, 12, 7, 8), "", groups=3, layout=layout), dtype, activation=None)


@pytest.mark.parametrize("names", [(), *((name,) for name in NAMES), ("weight", "bias"), ("scale", "shift")], ids=str)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_what_is_left_out(names, activation):
    check(Case((2, 6, 3, 4), "", groups=3), torch.float32, names, activation)


@pytest.mark.parametrize("names", [(), ("weight",), ("bias_in",)], ids=str)
def test_what_is_left_out_in_pieces(names, small_limits):
    for layout in ("contiguous", "channels_last"):
        check(Case((2, 6, 9, 9), "", groups=3, layout=layout), torch.float32, names, None)


def test_far_from_zero(small_limits):
    for layout in ("contiguous", "channels_last"):
        check(Case((2, 6, 9, 12), "", groups=2, layout=layout), torch.float32, mean=1e4)


def test_whole_groups_far_from_zero():
    for layout in ("contiguous", "channels_last"):
        check(Case((2, 6, 9, 12), "", groups=2, layout=layout), torch.float32, mean=1e4)


def test_one_element_far_from_all_others(small_limits):
    x = inputs(Case((1, 4, 9, 12), ""), torch.float32)[0][0]
    x[0, 0, 0, 0] = 1e4
    y, _ = kernels.group_norm(x, 2, *[None] * 5, None, 1e-5)
    want = reference(x.cpu().double(), 2)
    assert_near(y, want, float(want.abs().max()), 4)
    assert_near(y[:, 2:], want[:, 2:], float(want[:, 2:].abs().max()), 4)


def test_an_element_at_the_mean(small_limits):
    """What is left of x - mean has all its digits."""
    for layout in ("contiguous", "channels_last"):
        x = inputs(Case((1, 4, 9, 12), "", layout=layout), torch.float32)[0][0] + 0.5
        x[:, 1, 3, 3] = x[:, :2].double().mean().float()
        y, _ = kernels.group_norm(x, 2, *[None] * 5, None, 1e-5)
        want = reference(x.cpu().double(), 2)
        assert float(want.abs().min()) < 1e-4
        torch.testing.assert_close(y.cpu().double(), want, rtol=16 * ROUNDING[torch.float32], atol=0)


def calls(case: Case, dtype=torch.float32, first=0):
    (x, grad_y), values = inputs(case, dtype)
    x, grad_y = x[first:], grad_y[first:]
    values = [value if value.dim() == 1 else value[first:] for value in values]
    y, statistics = kernels.group_norm(x, case.groups, *values, "silu", 1e-5)
    grads = kernels.group_norm_backward(grad_y, x, statistics, case.groups, *values, "silu", [True] * 6)
    # Those of weight and bias are sums over the batch.
    return [y, statistics, grads[0], *grads[3:]]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_bits_do_not_depend_on_the_batch(layout, small_limits):
    case = Case((3, 6, 9, 12), "", groups=2, layout=layout)
    for part, whole in zip(calls(case, first=1), calls(case), strict=True):
        assert same_bits(part, whole[1:])


def test_bits_do_not_depend_on_addresses(small_limits):
    case = Case((2, 6, 9, 12), "", groups=2)
    (x, grad_y), values = inputs(case, torch.float32)
    memory = torch.empty(x.numel() + 1, device=DEVICE)[1:].view(x.shape)
    outputs = []
    for at in (x, memory.copy_(x)):
        y, statistics = kernels.group_norm(at, 2, *values, "silu", 1e-5)
        outputs.append((y, *kernels.group_norm_backward(grad_y, at, statistics, 2, *values, "silu", [True] * 6)))
    for a, b in zip(*outputs, strict=True):
        assert same_bits(a, b)
    kernels.group_norm(memory, 2, *values, "silu", 1e-5, memory, False)
    assert same_bits(memory, outputs[0][0])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_in_place(layout, small_limits):
    case = Case((2, 6, 9, 12), "", groups=2, layout=layout)
    (x, _), values = inputs(case, torch.float32)
    want, none = kernels.group_norm(x, 2, *values, None, 1e-5, statistics=False)
    assert none is None
    kernels.group_norm(x, 2, *values, None, 1e-5, x, False)
    assert same_bits(x, want)


def test_strides():
    case = Case((2, 6, 5, 4), "", groups=2)
    (x, grad_y), values = inputs(case, torch.float32)
    y, statistics = kernels.group_norm(x, 2, *values, "silu", 1e-5)
    want = (y, *kernels.group_norm_backward(grad_y, x, statistics, 2, *values, "silu", [True] * 6))
    side_by_side = torch.cat([v for v in values if v.dim() == 2], 1).chunk(3, 1)
    apart = [v.repeat_interleave(2)[::2] for v in values if v.dim() == 1]
    x, grad_y = (torch.stack((t, t), -1)[..., 0] for t in (x, grad_y))
    y, statistics = kernels.group_norm(x, 2, *apart, *side_by_side, "silu", 1e-5)
    got = (y, *kernels.group_norm_backward(grad_y, x, statistics, 2, *apart, *side_by_side, "silu", [True] * 6))
    for a, b in zip(got, want, strict=True):
        assert a.is_contiguous()
        assert same_bits(a, b)


def test_what_is_wanted(small_limits):
    case = Case((2, 6, 9, 12), "", groups=2)
    (x, grad_y), values = inputs(case, torch.float32)
    _, statistics = kernels.group_norm(x, 2, *values, "silu", 1e-5)
    every = kernels.group_norm_backward(grad_y, x, statistics, 2, *values, "silu", [True] * 6)
    for number in range(6):
        wanted = [i == number for i in range(6)]
        for got, want, is_wanted in zip(
            kernels.group_norm_backward(grad_y, x, statistics, 2, *values, "silu", wanted), every, wanted, strict=True
        ):
            assert same_bits(got, want) if is_wanted else got is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_special_values(bad, small_limits):
    x = inputs(Case((2, 4, 9, 12), ""), torch.float32)[0][0]
    x[1, 1, 3, 4] = bad
    y, statistics = kernels.group_norm(x, 2, *[None] * 5, "silu", 1e-5)
    assert bool(y[1, :2].isnan().all())
    assert bool(statistics[1, 0, 1].isnan())
    assert not bool(y[0].isnan().any() or y[1, 2:].isnan().any())


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (2, 0, 3)])
def test_nothing_to_do(shape):
    x = torch.empty(shape, device=DEVICE)
    values = [torch.ones(shape[1], device=DEVICE)] * 2 + [torch.ones(shape[:2], device=DEVICE)] * 3
    y, statistics = kernels.group_norm(x, 2, *values, "silu", 1e-5)
    assert y.shape == shape
    assert torch.equal(statistics.cpu(), torch.zeros(shape[0], 2, 2, dtype=torch.float64))
    grads = kernels.group_norm_backward(x, x, statistics, 2, *values, "silu", [True] * 6)
    for gradient, like in zip(grads, (x, *values), strict=True):
        assert torch.equal(gradient, torch.zeros_like(like))
    kernels.group_norm(x, 2, *values, "silu", 1e-5, x, False)


LIMITS = (forward._LIMITS, backward._LIMITS, second._LIMITS)


@pytest.mark.parametrize("element_size", [2, 4, 8])
@pytest.mark.parametrize("pixels", [1, 7, 64, 1000, 9001, 1 << 14, 1 << 20, (1 << 33) + 1])
@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (32, 32), (320, 32), (7, 1), (1030, 2), (1 << 17, 1)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_pieces_cover_every_element(element_size, pixels, channels, groups, channels_last):
    for limits in LIMITS:
        work = common.cut(channels, pixels, groups, channels_last, element_size, limits)
        c = work.constants
        a, b, rounds, unit = c["A"], c["B"], c["ROUNDS"], c["UNIT"]
        side_by_side = c["CHANNELS_LAST"]
        span, spans, in_units, of_group = work.sizes
        span, in_units = (span * unit, in_units) if side_by_side else (span, in_units * unit)
        assert (span * spans, in_units, of_group * groups) == (channels, pixels, channels)
        assert work.programs == spans * -(-span // a) * work.pieces
        assert (work.pieces - 1) * b * rounds < pixels <= work.pieces * b * rounds
        # Neither a tile nor a piece has channels of two groups where a program wants the statistics of one.
        assert span == of_group or (side_by_side and not work.whole)
        assert (span % a if side_by_side and not work.whole else 0) % unit == 0
        assert a * b <= (limits.of_group if work.whole else limits.of_tile)
        assert 32 * c["num_warps"] <= 512
        if work.whole:
            assert (a >= of_group, b >= pixels, rounds) == (True, True, 1)
        # One image fills a GPU.
        if a * b * rounds < channels * pixels // 512 and pixels >= 64:
            assert work.programs >= 256


def test_one_image_of_stable_diffusion_fills_a_gpu():
    for case in cases.timed(cases.GROUP_NORM, "cuda"):
        pixels = case.elements // case.shape[0] // case.shape[1]
        work = common.cut(case.shape[1], pixels, case.groups, case.layout != "contiguous", 2, forward._LIMITS)
        assert work.whole or work.programs >= 128, str(case)
