"""The kernels of group norm's derivatives, in forward mode and of second order: values, bits, memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from kernels import NAMES
from support import laid_out, same_bits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gencore import ops
from gencore.backends import choice, cpu
from gencore.backends.reference import group_norm as reference
from gencore.bench.cases import Case

LEVELS = tuple(name for name in NAMES if name.startswith("cpu-"))
EVERY = (*LEVELS, "cuda", "triton")
# The SIMD levels have the same bits.
BACKENDS = ("cpu-avx512", "cuda", "triton")
EPS = 0.01
ALL = (True,) * 7
CASES = (
    Case((2, 6), "", groups=3),
    Case((3, 1, 7), "", groups=1),
    Case((2, 6, 5, 4), "", groups=3),
    Case((2, 6, 5, 4), "", groups=6, layout="channels_last"),
    Case((1, 10, 33, 31), "", groups=2),
    Case((1, 20, 33, 31), "", groups=2, layout="channels_last"),
    Case((2, 70, 9, 9), "", groups=7, layout="channels_last"),
    Case((1, 2, 3, 5, 7), "", groups=1),
)
# Which of x and the values change.
DIRECTIONS = ((1, 1, 1, 1, 1, 1), (1, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 1), (0, 1, 1, 0, 0, 0), (1, 0, 0, 1, 1, 0))
# Which of the values there are.
VALUES = ((1, 1, 1, 1, 1), (0, 0, 0, 0, 0), (1, 1, 0, 0, 0), (0, 1, 1, 0, 1))
# Relative to the largest value: float64's roundings, and some tens of float32's, of terms that cancel. Half types are
# computed in float32 and rounded once.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def inputs(
    case: Case,
    dtype: torch.dtype,
    seed: int = 0,
    values: torch.dtype | None = None,
    device: str = "cpu",
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """x and the values; a direction; the gradient of the result."""
    shape = case.shape
    sizes = (shape, shape[1:2], shape[1:2], shape[:2], shape[:2], shape[:2])
    generator = torch.Generator().manual_seed(seed)

    def draw(size: tuple[int, ...]) -> Tensor:
        drawn = torch.randn(size, generator=generator, dtype=torch.float64).to(device)
        return laid_out(drawn, case) if size == shape else drawn

    given, direction = ([draw(size) for size in sizes] for _ in range(2))
    types = (dtype, *(values or dtype,) * 5)
    given, direction = ([x.to(t) for x, t in zip(some, types, strict=True)] for some in (given, direction))
    return given, direction, draw(shape).to(dtype)


def chosen(tensors: list[Tensor], there: tuple[int, ...]) -> list[Tensor | None]:
    return [x if has else None for x, has in zip(tensors, there, strict=True)]


def derivatives(
    groups: int,
    given: list[Tensor],
    direction: list[Tensor | None],
    g: Tensor,
    activation: str | None = "silu",
    wanted: tuple[bool, ...] = ALL,
) -> list[Tensor | None]:
    """The change of y, and the gradients of the gradients, by the kernels."""
    x, *values = given
    statistics = choice.kernel("group_norm", g)(x, groups, *values, activation, EPS)[1]
    d_y = choice.kernel("group_norm_jvp", g)(x, statistics, groups, *values, *direction, activation, EPS)
    double = choice.kernel("group_norm_double_backward", g)
    return [d_y, *double(g, x, statistics, groups, *values, *direction, activation, list(wanted), EPS)]


def defined(
    groups: int, given: list[Tensor | None], direction: list[Tensor | None], g: Tensor, activation: str | None = "silu"
) -> list[Tensor | None]:
    """The same in float64, by PyTorch's differentiation of the forward pass."""
    leaves = [None if x is None else x.detach().cpu().double().requires_grad_() for x in given]
    there = [x for x in leaves if x is not None]
    g = g.detach().cpu().double().requires_grad_()
    x, weight, bias, scale, shift, bias_in = leaves
    y = reference.group_norm(
        x, groups, weight, bias, EPS, scale=scale, shift=shift, bias_in=bias_in, activation=activation
    )
    grads = torch.autograd.grad(y, there, g, create_graph=True)
    changes = [change for x, change in zip(leaves, direction, strict=True) if x is not None]
    along = sum(
        (grad * change.cpu().double()).sum() for grad, change in zip(grads, changes, strict=True) if change is not None
    )
    found = torch.autograd.grad(along, [g, *there], allow_unused=True)
    second = iter([torch.zeros_like(x) if grad is None else grad for grad, x in zip(found, [g, *there], strict=True)])
    # The gradient is linear in g, so that what y changes by is the first of them.
    d_y = next(second)
    return [d_y, d_y, *(None if x is None else next(second) for x in leaves)]


def assert_right(got: list[Tensor | None], want: list[Tensor | None], tolerance: float) -> None:
    assert len(got) == len(want) == 8
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.shape == b.shape
            # What is 0 but for roundings is as exact as what it is the difference of.
            size = max(float(b.abs().max()), 0.1)
            torch.testing.assert_close(a.cpu().double(), b, rtol=0, atol=tolerance * size)


@pytest.mark.parametrize("kernels", EVERY, indirect=True)
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, dtype, activation, kernels):
    given, direction, g = inputs(case, dtype, device=kernels.device)
    groups = case.groups
    combinations = [(VALUES[0], there) for there in DIRECTIONS] + [(some, DIRECTIONS[0]) for some in VALUES[1:]]
    # The emulator takes a second for all of them.
    for values, there in combinations[:: 3 if kernels.emulated and not kernels.interpreted else 1]:
        some = chosen(given, (1, *values))
        along = [change if x is not None else None for x, change in zip(some, chosen(direction, there), strict=True)]
        got = derivatives(groups, some, along, g, activation)
        assert_right(got, defined(groups, some, along, g, activation), TOLERANCE[dtype])
        assert all(a is None or a.dtype == dtype for a in got)
        assert all(a.is_contiguous(memory_format=case.memory_format) for a in got[:3])


@pytest.mark.parametrize("kernels", EVERY, indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_values_with_a_half_precision_tensor(dtype, kernels):
    for case in CASES[2:4]:
        given, direction, g = inputs(case, dtype, values=torch.float32, device=kernels.device)
        got = derivatives(case.groups, given, direction, g)
        assert [a.dtype for a in got] == [dtype] * 3 + [torch.float32] * 5
        assert_right(got, defined(case.groups, given, direction, g), TOLERANCE[dtype])


@pytest.mark.parametrize("kernels", EVERY, indirect=True)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_large_mean_costs_no_accuracy(layout, kernels):
    """Of x, to which bias_in adds as much, that is: as in the forward pass, what is subtracted is near."""
    case = Case((2, 16, 16, 8), "", groups=4, layout=layout)
    given, direction, g = inputs(case, torch.float32, device=kernels.device)
    given[0] += 1e4
    given[5] *= 1e3
    assert_right(derivatives(4, given, direction, g), defined(4, given, direction, g), 2e-5)


@pytest.mark.parametrize("kernels", BACKENDS, indirect=True)
def test_empty(kernels):
    for shape in ((0, 6, 3, 3), (2, 6, 0, 3)):
        given, direction, g = inputs(Case(shape, "", groups=3), torch.float32, device=kernels.device)
        d_y, *grads = derivatives(3, given, direction, g)
        assert d_y.shape == shape
        assert [a.shape for a in grads] == [g.shape, *(x.shape for x in given)]
        assert all(bool((a == 0).all()) for a in grads)


BITS_CASES = [
    Case((3, 40, 50, 41), "", groups=8),
    Case((3, 40, 50, 41), "", groups=8, layout="channels_last"),
    Case((1, 6, 300, 200), "", groups=1),
    Case((1, 6, 300, 200), "", groups=1, layout="channels_last"),
    Case((700, 5, 3, 3), "", groups=5),
    Case((1, 1030, 9, 9), "", groups=2, layout="channels_last"),
]


@pytest.mark.parametrize("case", BITS_CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_for_any_threads_and_simd_level(case, dtype, threads, simd_level):
    given, direction, g = inputs(case, dtype)
    here = derivatives(case.groups, given, direction, g)
    torch.set_num_threads(1)
    cpu.set_simd_level("scalar")
    for a, b in zip(here, derivatives(case.groups, given, direction, g), strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("kernels", BACKENDS[:2], indirect=True)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_bits_for_any_split_of_the_batch_and_any_strides(layout, kernels):
    case = Case((5, 12, 6, 7), "", groups=3, layout=layout)
    given, direction, g = inputs(case, torch.float32, device=kernels.device)
    whole = derivatives(3, given, direction, g)
    of_samples = (True, False, False, True, True, True)

    def part(tensors: list[Tensor]) -> list[Tensor]:
        return [x[1:3] if cut else x for x, cut in zip(tensors, of_samples, strict=True)]

    split = derivatives(3, part(given), part(direction), g[1:3])
    for a, b, cut in zip(whole, split, (True, True, *of_samples), strict=True):
        assert not cut or same_bits(a[1:3], b)

    def scattered(x: Tensor) -> Tensor:
        return x.new_empty(*x.shape, 2).movedim(-1, 0)[0].copy_(x)

    odd = derivatives(3, [given[0], *map(scattered, given[1:])], list(map(scattered, direction)), scattered(g))
    assert all(same_bits(a, b) for a, b in zip(whole, odd, strict=True))


@pytest.mark.parametrize("kernels", BACKENDS, indirect=True)
def test_only_what_is_wanted_is_made(kernels):
    for dtype in (torch.float32, torch.bfloat16):
        given, direction, g = inputs(CASES[2], dtype, device=kernels.device)
        whole = derivatives(3, given, direction, g)[1:]
        for place in range(7):
            some = derivatives(3, given, direction, g, wanted=tuple(i == place for i in range(7)))[1:]
            assert [x is not None for x in some] == [i == place for i in range(7)]
            assert same_bits(some[place], whole[place])


@pytest.mark.parametrize("kernels", EVERY, indirect=True)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_stay_in_their_group(layout, value, kernels):
    """One in x, in its change, in the gradient: where the definition has numbers there are numbers, and no others."""
    case = Case((2, 8, 5, 5), "", groups=4, layout=layout)
    for place in range(3):
        given, direction, g = inputs(case, torch.float32, device=kernels.device)
        (given[0], direction[0], g)[place][1, 3, 2, 2] = value
        got, want = derivatives(4, given, direction, g), defined(4, given, direction, g)
        got = [a.cpu() for a in got]
        for a, b in zip(got[:3], want, strict=False):
            assert torch.equal(a.isfinite().all((2, 3)), b.isfinite().all((2, 3)))
            inside = b.isfinite()
            torch.testing.assert_close(a[inside].double(), b[inside], rtol=1e-4, atol=1e-4)
        for a, b in zip(got[3:], want[3:], strict=True):
            assert torch.equal(a.isfinite(), b.isfinite())


@pytest.mark.parametrize("kernels", EVERY, indirect=True)
def test_silu_of_any_number(kernels):
    """With xhat 0, t is the bias: the derivatives of silu at numbers of every size."""
    sizes = torch.logspace(-30, 30, 61).double()
    bias = torch.cat([-sizes, sizes, torch.linspace(-90, 90, 300).double()]).float()
    if kernels.interpreted:
        bias = bias[::7]
    channels, one = len(bias), torch.ones(1, len(bias), 1, device=kernels.device)
    given = [one, None, bias.to(kernels.device), None, None, None]
    direction = [None, None, torch.ones(channels, device=kernels.device), None, None, None]
    d_y, grad_y, _, _, grad_bias, *_ = (
        x if x is None else x.cpu() for x in derivatives(channels, given, direction, one)
    )
    t = bias.double().requires_grad_()
    (first,) = torch.autograd.grad((t * torch.sigmoid(t)).sum(), t, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), t)
    torch.testing.assert_close(d_y.flatten().double(), first.detach(), rtol=2.0**-18, atol=2.0**-22)
    assert same_bits(d_y, grad_y)
    # 1 - sigmoid(t) is off by up to 2^-25, and t, by which it is multiplied, up to 17 where it is not 0.
    torch.testing.assert_close(grad_bias.double(), second, rtol=2.0**-16, atol=2.0**-20)


def test_opcheck():
    for case, dtype in ((CASES[2], torch.float32), (CASES[3], torch.bfloat16)):
        given, direction, g = inputs(case, dtype)
        groups = case.groups
        x, *values = given
        for some, along in ((values, direction), ([values[0], *[None] * 4], [direction[0], *[None] * 5])):
            statistics = torch.ops.gencore.group_norm(x, groups, *some, "silu", EPS)[1]
            args = (x, statistics, groups, *some, *along, "silu", EPS)
            torch.library.opcheck(torch.ops.gencore.group_norm_jvp.default, args)
            for wanted in ([True] * 7, [False, True, True, *[False] * 4]):
                args = (g, x, statistics, groups, *some, *along, "silu", wanted, EPS)
                torch.library.opcheck(torch.ops.gencore.group_norm_double_backward.default, args)


class Seen(TorchDispatchMode):
    """The names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_the_kernels_are_what_runs():
    given, direction, _ = inputs(CASES[2], torch.float32)
    x, weight, bias, *_ = (value.requires_grad_() for value in given)
    (grad,) = torch.autograd.grad(ops.group_norm(x, 3, weight, bias).sum(), x, create_graph=True)
    with Seen() as seen:
        torch.autograd.grad(grad, [x, weight], direction[0])
    assert [name for name in seen.names if "group_norm" in name] == ["group_norm_double_backward.default"]
    with Seen() as seen:
        torch.func.jvp(lambda x: ops.group_norm(x, 3, activation="silu"), (x.detach(),), (direction[0],))
    assert [name for name in seen.names if "group_norm" in name] == ["group_norm.default", "group_norm_jvp.default"]


MEMORY = """
import resource, sys
import torch
from gencore import ops
torch.set_num_threads(2)
form, dtype = getattr(torch, sys.argv[1]), getattr(torch, sys.argv[2])
x, g, change = (torch.ones(4, 64, 256, 256, dtype=dtype).to(memory_format=form) for _ in range(3))
weight = torch.ones(64, dtype=dtype)
statistics = torch.ops.gencore.group_norm(x, 32, weight, *[None] * 4, "silu", 1e-5)[1]
args = (x, statistics, 32, weight, *[None] * 4, change, *[None] * 5, "silu")
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
small = [x[:, :, :2, :2].contiguous(memory_format=form) for x in (x, g, change)]
torch.ops.gencore.group_norm_jvp(small[0], *args[1:8], small[2], *args[9:], 1e-5)
torch.ops.gencore.group_norm_double_backward(
    small[1], small[0], *args[1:8], small[2], *args[9:], [True] * 3 + [False] * 4, 1e-5
)
before = peak()
d_y = torch.ops.gencore.group_norm_jvp(*args, 1e-5)
first = peak()
grads = torch.ops.gencore.group_norm_double_backward(g, *args, [True] * 3 + [False] * 4, 1e-5)
print(first - before - d_y.nbytes, peak() - first - sum(grad.nbytes for grad in grads))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["contiguous_format", "channels_last"])
def test_memory(form, dtype):
    """The results, of 64 MiB each in float32, and little more."""
    command = [sys.executable, "-c", MEMORY, form, dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert all(int(more) < 6 << 20 for more in done.stdout.split()), done.stdout


def test_a_penalty_is_that_of_the_definition():
    """R1 with respect to images, as descent takes it: gradients of every parameter."""
    given, _, _ = inputs(Case((2, 12, 8, 8), "", groups=4, layout="channels_last"), torch.float32)
    found = []
    for op in (ops.group_norm, reference.group_norm):
        x, weight, bias, scale, shift, bias_in = leaves = [value.detach().requires_grad_() for value in given]
        more = {"scale": scale, "shift": shift, "bias_in": bias_in, "activation": "silu"}
        (grad,) = torch.autograd.grad(op(x, 4, weight, bias, **more).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), leaves))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))
