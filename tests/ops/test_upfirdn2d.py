"""Resampling with a filter and its gradients, against the definition in float64, SciPy, and what it must keep."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import scipy.signal
import torch
from kernels import BACKENDS
from support import laid_out, on_cpu, same_bits
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from gencore import ops
from gencore.backends import cpu
from gencore.backends.reference import upfirdn2d as reference
from gencore.bench import cases

CASES = cases.small(cases.UPFIRDN2D)
# Half a unit in the last place of the result's type, for the rounding to it.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}
BINOMIAL = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8


class Use(NamedTuple):
    """A call; the filter is of standard normal values of this shape."""

    taps: tuple[int, ...]
    up: Any = 1
    down: Any = 1
    padding: Any = 0
    flip: bool = False
    gain: float = 1.0

    def filter(self, dtype: torch.dtype = torch.float32) -> Tensor:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return torch.randn(self.taps, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(wide)

    def __call__(self, x: Tensor, filter: Tensor, op: Callable[..., Tensor] = ops.upfirdn2d) -> Tensor:
        return op(x, filter, self.up, self.down, self.padding, flip_filter=self.flip, gain=self.gain)


USES = {
    "upsampling": Use((4, 4), up=2, padding=(2, 1, 2, 1), gain=4.0),
    "upsampling, the other phase": Use((4, 4), up=2, padding=(1, 2, 1, 2)),
    "downsampling": Use((4, 4), down=2, padding=2),
    "filtering": Use((4, 4), padding=(2, 1, 2, 1), flip=True),
    "separable, upsampling": Use((4,), up=2, padding=(2, 1, 2, 1), gain=4.0),
    "separable, downsampling": Use((4,), down=2, padding=2),
    "separable, filtering": Use((5,), padding=(2, 3), flip=True),
    "everything": Use((3, 5), up=(3, 2), down=(2, 3), padding=(4, -1, 3, 2), gain=-0.7),
    "a tap that meets nothing": Use((2,), up=5, down=3, padding=(1, 4, 0, 3)),
    "far beside the image": Use((1, 2), down=2, padding=(-30, 40, 41, -30)),
}
every_use = pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
each_backend = pytest.mark.parametrize("kernels", BACKENDS, indirect=True)


def defined(x: Tensor, filter: Tensor, up: Any, down: Any, padding: Any, flip_filter: bool, gain: float) -> Tensor:
    """The definition, with the arguments of the op."""
    up, down = ((n, n) if isinstance(n, int) else n for n in (up, down))
    padding = (padding,) * 4 if isinstance(padding, int) else padding
    if len(padding) == 2:
        padding = (*padding[:1] * 2, *padding[1:] * 2)
    taps = len(filter), filter.shape[-1]
    size = [
        (n * u + sum(padding[2 * i : 2 * i + 2]) - k) // d + 1
        for i, (n, u, d, k) in enumerate(zip(x.shape[2:], up, down, taps, strict=True))
    ]
    return reference.upfirdn2d(x, filter, up, down, (padding[0], padding[2]), size, flip_filter, gain)


def assert_rounded(y: Tensor, x: Tensor, filter: Tensor, use: Use) -> None:
    """y is what is defined, but for one rounding for every term of a sum, two for a product's, and that of the type."""
    x, filter = x.detach().cpu().double(), filter.detach().cpu().double()
    want = use(x, filter, defined)
    terms = use(x.abs(), filter.abs(), defined).abs()
    arithmetic = (2 * filter.numel() + 4) * ROUNDING[torch.float64 if y.dtype == torch.float64 else torch.float32]
    bound = arithmetic * terms + ROUNDING[y.dtype] * want.abs()
    if y.dtype == torch.float16:
        bound += 2.0**-25
    assert y.shape == want.shape
    assert ((y.cpu().double() - want).abs() <= bound).all()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_forward(case, dtype, kernels):
    x = laid_out(torch.randn(case.shape, dtype=torch.float64).to(dtype), case).to(kernels.device)
    uses = list(USES.values())
    for use in uses[:: 3 if kernels.interpreted else 1]:
        height, width = case.shape[2:]
        if use is USES["far beside the image"] and min(height, width) < 4:
            continue
        filter = use.filter(dtype).to(kernels.device)
        y = use(x, filter)
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=case.memory_format)
        assert_rounded(y, x, filter, use)
        if dtype != torch.float64:
            assert same_bits(y, on_cpu(use, x.contiguous(), filter))


@every_use
@each_backend
def test_gradients(use, kernels):
    """Of the image and of the filter, against those of the definition."""
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64).to(kernels.device, memory_format=torch.channels_last)
    leaves = [x.requires_grad_(), use.filter(torch.float64).to(kernels.device).requires_grad_()]
    y = use(*leaves)
    g = torch.randn_like(y)
    got = torch.autograd.grad(y, leaves, g)
    want = torch.autograd.grad(use(*leaves, defined), leaves, g)
    for a, b, leaf in zip(got, want, leaves, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert a.shape == leaf.shape
    assert got[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_gradients_of_every_type(dtype):
    use = USES["separable, upsampling"]
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64).to(dtype).requires_grad_()
    filter = use.filter(dtype).to(dtype).requires_grad_()
    y = use(x, filter)
    g = torch.randn_like(y)
    wide = [x.detach().double().requires_grad_(), filter.detach().double().requires_grad_()]
    want = torch.autograd.grad(use(*wide, defined), wide, g.double())
    unit = max(ROUNDING[dtype], ROUNDING[torch.float32])
    for a, b in zip(torch.autograd.grad(y, (x, filter), g), want, strict=True):
        assert a.dtype == dtype
        # Of up to 660 terms, in the order of a tree.
        torch.testing.assert_close(a.double(), b, rtol=2 * unit, atol=64 * ROUNDING[torch.float32] * b.abs().max())


# --------------------------------------------------------------------------------------------------- what it is


@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2), (3, 2), (2, 5), (7, 3)])
@pytest.mark.parametrize("taps", [1, 4, 9])
def test_it_is_what_scipy_has(up, down, taps, kernels):
    """``scipy.signal.upfirdn`` along rows, where padding makes room for every tap, and along both axes."""
    if kernels.interpreted and taps != 4:
        pytest.skip("Triton's interpreter is slow")
    generator = torch.Generator().manual_seed(up * 10 + down)
    x = torch.randn(1, 2, 4, 11, generator=generator, dtype=torch.float64)
    filter = torch.randn(taps, generator=generator, dtype=torch.float64)
    # SciPy inserts no zeros behind the last value.
    ends = taps - 1, taps - up
    here = x.to(kernels.device), filter.to(kernels.device)
    along_rows = ops.upfirdn2d(here[0], here[1][None, :], (1, up), (1, down), (0, 0, *ends))
    want = scipy.signal.upfirdn(filter.numpy(), x.numpy(), up, down, axis=3)
    torch.testing.assert_close(along_rows.cpu(), torch.from_numpy(want), rtol=1e-12, atol=1e-12)
    both = ops.upfirdn2d(*here, up, down, (*ends, *ends))
    want = scipy.signal.upfirdn(filter.numpy(), want, up, down, axis=2)
    torch.testing.assert_close(both.cpu(), torch.from_numpy(want), rtol=1e-12, atol=1e-12)


def test_sizes_and_brightness_of_the_helpers():
    x = torch.full((1, 2, 12, 18), 3.0)
    for taps in range(1, 8):
        filter = torch.rand(taps) + 0.1
        filter = filter / filter.sum()
        for factor in (1, 2, 3, (1, 2), (6, 3)):
            rate = (factor, factor) if isinstance(factor, int) else factor
            up, down = ops.upsample2d(x, filter, factor), ops.downsample2d(x, torch.outer(filter, filter), factor)
            assert up.shape[2:] == (12 * rate[0], 18 * rate[1])
            assert down.shape[2:] == (12 // rate[0], 18 // rate[1])
            inner = down[:, :, 3:-3, 3:-3] if min(down.shape[2:]) > 6 else down[:, :, :0]
            torch.testing.assert_close(inner, torch.full_like(inner, 3.0))
            # Every phase has its share of the taps.
            if taps % rate[0] == 0 and taps % rate[1] == 0:
                inner = up[:, :, 4 * rate[0] : -4 * rate[0], 4 * rate[1] : -4 * rate[1]]
                means = inner.unfold(2, rate[0], rate[0]).unfold(3, rate[1], rate[1]).mean((4, 5))
                torch.testing.assert_close(means, torch.full_like(means, 3.0))
        assert ops.filter2d(x, filter).shape == x.shape
    assert ops.downsample2d(torch.ones(1, 1, 5, 7), BINOMIAL).shape == (1, 1, 2, 3)


@pytest.mark.parametrize(("taps", "factor"), [(4, 2), (6, 2), (1, 1), (3, 3), (5, 1), (4, 4)])
def test_the_helpers_are_centred(taps, factor):
    """A mirrored image becomes the mirrored result of a filter that is symmetric."""
    x, half = torch.randn(1, 1, 12, 12, dtype=torch.float64), torch.rand(taps, dtype=torch.float64)
    filter = half + half.flip(0)
    for function in (ops.upsample2d, ops.downsample2d):
        y, mirrored = function(x, filter, factor), function(x.flip(2, 3), filter, factor).flip(2, 3)
        torch.testing.assert_close(y, mirrored)
    if taps % 2:
        torch.testing.assert_close(ops.filter2d(x, filter), ops.filter2d(x.flip(2, 3), filter).flip(2, 3))


def test_a_separable_filter_is_its_outer_product():
    x, row = torch.randn(2, 3, 8, 9, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    for up, down in ((1, 1), (2, 1), (1, 2), (3, 2)):
        both = [ops.upfirdn2d(x, f, up, down, 3, gain=0.3) for f in (row, torch.outer(row, row))]
        torch.testing.assert_close(*both, rtol=1e-12, atol=1e-12)


def test_convolution_turns_the_filter_around():
    x = torch.zeros(1, 1, 5, 5)
    x[0, 0, 2, 2] = 1
    filter = torch.arange(9.0).reshape(3, 3)
    assert torch.equal(ops.upfirdn2d(x, filter, padding=0)[0, 0], filter)
    assert torch.equal(ops.upfirdn2d(x, filter, padding=0, flip_filter=True)[0, 0], filter.flip(0, 1))


# --------------------------------------------------------------------------------------------------- promises


@pytest.mark.parametrize("shape", [(2, 5, 40, 50), (1, 70, 6, 6), (3, 32, 4, 4), (1, 3, 300, 130)], ids=str)
def test_bits_for_any_threads_and_simd_level(shape, threads, simd_level):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for name in ("upsampling", "downsampling", "separable, filtering", "everything"):
        use = USES[name]
        for dtype in (torch.float32, torch.bfloat16):
            for memory_format in (torch.contiguous_format, torch.channels_last):
                leaf = x.to(dtype, memory_format=memory_format).requires_grad_()
                filter = use.filter().requires_grad_()

                def run(leaf: Tensor = leaf, filter: Tensor = filter, use: Use = use) -> list[Tensor]:
                    y = use(leaf, filter)
                    return [y.detach(), *torch.autograd.grad(y, (leaf, filter), y.detach())]

                here = run()
                before = torch.get_num_threads(), cpu.simd_level()
                torch.set_num_threads(1)
                cpu.set_simd_level("scalar")
                there = run()
                torch.set_num_threads(before[0])
                cpu.set_simd_level(before[1])
                assert all(same_bits(a, b) for a, b in zip(here, there, strict=True))


def test_bits_for_any_split_of_the_batch(kernels):
    x = torch.randn(3, 5, 6, 7).to(kernels.device)
    for name in ("upsampling", "separable, downsampling"):
        use = USES[name]
        filter = use.filter().to(kernels.device)
        assert same_bits(use(x, filter), torch.cat([use(part, filter) for part in x.split((2, 1))]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides_and_offset(dtype, kernels):
    """Parts of larger tensors, which no vector access fits, and strided filters."""
    whole = torch.randn(3, 20, 9, 19).to(kernels.device, dtype)
    use = USES["upsampling"]
    filter = torch.randn(4, 8).to(kernels.device)[:, ::2]
    for x in (whole[1:, 3:11, :8, 1:17], whole.to(memory_format=torch.channels_last)[1:, 3:11, :8, 1:17]):
        y = use(x, filter)
        assert same_bits(y, use(x.contiguous(), filter.contiguous()))
    x = torch.randn(2 * 8 * 8 * 8 + 1).to(kernels.device, dtype)[1:].view(2, 8, 8, 8)
    assert same_bits(use(x, filter), on_cpu(use, x.clone(), filter.contiguous()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_where_taps_reach(value, kernels):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.zeros(1, 20, 8, 8).to(memory_format=memory_format)
        x[0, 7, 4, 4] = value
        y = ops.upsample2d(x.to(kernels.device), BINOMIAL.to(kernels.device)).cpu()
        hit = torch.zeros(1, 20, 16, 16, dtype=torch.bool)
        hit[0, 7, 7:11, 7:11] = True
        assert torch.equal(~y.isfinite(), hit)
        assert torch.equal(y[~hit], torch.zeros(int((~hit).sum())))


def test_an_image_is_not_kept_where_only_it_wants_a_gradient():
    leaf = torch.randn(1, 2, 4, 4, requires_grad=True)
    x = leaf * 1
    alive, y = weakref.ref(x), ops.upsample2d(x, BINOMIAL)
    del x
    assert alive() is None
    y.sum().backward()
    assert leaf.grad is not None


def test_second_derivatives_and_penalties():
    """The gradient of a gradient's square, as R1 has it: linear, so that it is the op there and back."""
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.downsample2d(x, BINOMIAL).square().sum(), x, create_graph=True)
    (twice,) = torch.autograd.grad(grad.square().sum(), x)

    def there_and_back(x: Tensor) -> Tensor:
        return torch.func.vjp(lambda x: ops.downsample2d(x, BINOMIAL), x)[1](ops.downsample2d(x, BINOMIAL))[0]

    want = 8 * there_and_back(there_and_back(x.detach()))
    torch.testing.assert_close(twice, want)


# ------------------------------------------------------------------------------------------ PyTorch and refusals


@pytest.mark.parametrize("name", ["separable, upsampling", "everything"])
def test_opcheck(name):
    use = USES[name]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 6, 5).to(memory_format=memory_format).requires_grad_()
        args = (x, use.filter().requires_grad_(), [2, 1], [1, 2], [3, -1], [4, 3], True, 0.5)
        torch.library.opcheck(torch.ops.gencore.upfirdn2d.default, args)


def test_calls_that_are_remembered_are_told_apart():
    """The same numbers in other arguments."""
    x, filter = torch.randn(1, 1, 6, 6), torch.ones(1, 1)
    for _ in range(2):
        assert ops.upfirdn2d(x, filter, 2, 1, (2, 3)).shape[2:] == (16, 18)
        assert ops.upfirdn2d(x, filter, (1, 2), 2, 3).shape[2:] == (6, 9)
        assert ops.upfirdn2d(x, filter, 2, (1, 2), 3).shape[2:] == (18, 9)


def test_compiles_whole_and_not_for_every_shape():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def block(x: Tensor, filter: Tensor) -> Tensor:
        return ops.downsample2d(ops.upsample2d(x, filter).sin(), filter).square().sum()

    compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=True)
    for shape in ((2, 3, 6, 8), (3, 5, 10, 4), (4, 7, 8, 6), (5, 9, 12, 8)):
        leaves = [torch.randn(shape, requires_grad=True), BINOMIAL.clone().requires_grad_()]
        got = torch.autograd.grad(compiled(*leaves), leaves)
        torch.testing.assert_close(got, torch.autograd.grad(block(*leaves), leaves))
    # At most once more when the sizes change, not for each shape.
    assert counter.frame_count <= 2


def test_autocast_changes_nothing():
    x = torch.randn(1, 2, 4, 4)
    want = ops.upsample2d(x, BINOMIAL)
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(ops.upsample2d(x, BINOMIAL), want)
        assert same_bits(ops.upsample2d(x.bfloat16(), BINOMIAL), ops.upsample2d(x.bfloat16(), BINOMIAL.clone()))


X, F44 = torch.zeros(1, 1, 4, 4), torch.ones(4, 4)
REFUSALS = {
    "no tensor": (lambda: ops.upfirdn2d([1.0], F44), TypeError, "x must be a tensor, got list"),
    "integers": (lambda: ops.upfirdn2d(X.long(), F44), TypeError, "dtype of x must be one of"),
    "three dimensions": (lambda: ops.upfirdn2d(X[0], F44), ValueError, r"x must have the shape \(N, C, H, W\), got"),
    "no pixels": (lambda: ops.upfirdn2d(X[:, :, :0], F44, padding=9), ValueError, "x must have a pixel at least, got"),
    "no filter": (lambda: ops.upfirdn2d(X, [1.0]), TypeError, "filter must be a tensor, got list"),
    "a cube": (lambda: ops.upfirdn2d(X, F44[None]), ValueError, r"filter must have the shape \(K,\) or \(K, L\)"),
    "no taps": (lambda: ops.upfirdn2d(X, F44[:0]), ValueError, "one tap at least, got"),
    "another type": (
        lambda: ops.upfirdn2d(X, F44.double()),
        TypeError,
        "filter must have the dtype torch.float32 for such an x, got torch.float64",
    ),
    "on another device": (lambda: ops.upfirdn2d(X, F44.to("meta")), ValueError, "filter must be on the device of x"),
    "zero up": (lambda: ops.upfirdn2d(X, F44, up=0), ValueError, "up must be at least 1, got 0"),
    "half down": (lambda: ops.upfirdn2d(X, F44, down=0.5), TypeError, "down must be an int or two, of height and"),
    "three ups": (lambda: ops.upfirdn2d(X, F44, up=(1, 2, 3)), ValueError, "up must be an int or two.* got 3"),
    "three sides": (lambda: ops.upfirdn2d(X, F44, padding=(1, 2, 3)), ValueError, "padding must be an int, two of"),
    "a word": (lambda: ops.upfirdn2d(X, F44, padding="same"), TypeError, "padding must be an int, two of.* got str"),
    "too small": (
        lambda: ops.upfirdn2d(X, F44, padding=(0, -1, 0, 0)),
        ValueError,
        "padding must leave the image as large as the filter at least: its height is 3, of 4 pixels times 1 with 0 and "
        "-1, and the filter has 4 taps",
    ),
    "too large": (lambda: ops.upfirdn2d(X, F44, padding=1 << 28), ValueError, "must be below 2\\^28, got"),
    "a gain of text": (lambda: ops.upfirdn2d(X, F44, gain="4"), TypeError, "gain must be a number, got str"),
    "flip": (lambda: ops.upfirdn2d(X, F44, flip_filter=1), TypeError, "flip_filter must be a bool, got int"),
    "a factor": (lambda: ops.upsample2d(X, F44, 0), ValueError, "factor must be at least 1, got 0"),
    "factors": (lambda: ops.downsample2d(X, F44, "2"), TypeError, "factor must be an int or two.* got str"),
    "too small for it": (lambda: ops.downsample2d(X, torch.ones(1), 5), ValueError, "padding must leave the image"),
}


@pytest.mark.parametrize(("call", "kind", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refusals(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
    with pytest.raises(kind, match=message):
        call()
