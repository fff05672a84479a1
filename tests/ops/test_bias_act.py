"""Bias, activation, gain and clamp, against the definition in float64, on every kind of kernels."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from kernels import BACKENDS
from support import laid_out, same_bits
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from gencore import ops
from gencore.backends import cpu
from gencore.backends.activations import form_of
from gencore.backends.reference import bias_act as reference
from gencore.bench import cases
from gencore.bench.plain import bias_act as plain
from gencore.ops.bias_act import Activation

CASES = cases.small(cases.BIAS_ACT)
ACTIVATIONS = get_args(Activation)
# Every function of the table; what the others differ in is tried on its own.
FUNCTIONS = ("leaky_relu", "silu", "sigmoid", "tanh", "selu", "softplus", "gelu")
# In units of the last place: activations.h's functions are within 8 of the real value, and their argument is rounded.
UNITS = {torch.float32: 8 * 2.0**-23, torch.float64: 2.0**-48}
# The half types round once, on writing, and on GPUs take approximations of 2^-21 before.
HALF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
each_backend = pytest.mark.parametrize("kernels", BACKENDS, indirect=True)
each_function = pytest.mark.parametrize("activation", FUNCTIONS)


def drawn(case: cases.Case, dtype: torch.dtype, device: str, number: int = 2, seed: int = 0) -> list[torch.Tensor]:
    """Tensors of the case, the last the values of channels."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [case.shape] * (number - 1)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    values = torch.randn(case.shape[1], generator=generator, dtype=torch.float64)
    return [*(laid_out(tensor.to(device, dtype), case) for tensor in tensors), values.to(device, dtype)]


def wide(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.detach().cpu().double().requires_grad_() for tensor in tensors]


def close(got: torch.Tensor, want: torch.Tensor, size: torch.Tensor | float, dtype: torch.dtype) -> bool:
    """Whether it is within the units of ``size``, and rounded to ``dtype``."""
    error = (got.detach().cpu().double() - want.detach()).abs()
    bound = UNITS.get(dtype, UNITS[torch.float32]) * size + HALF.get(dtype, 0.0) * want.detach().abs()
    # Where a half type is subnormal.
    return bool((error <= bound + (2.0**-24 if dtype == torch.float16 else 1e-36)).all())


def settings_of(activation: str, clamp: float | None, dtype: torch.dtype) -> tuple[str, float, float, float | None]:
    return activation, 0.3, 1.5, None if clamp is None else float(torch.tensor(clamp, dtype=dtype))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_forward_and_gradients(case, dtype, kernels):
    """With the gradient of the gradient, of one function in turn for each case, with and without a clamp."""
    place = CASES.index(case)
    activation, clamp = FUNCTIONS[place % len(FUNCTIONS)], 0.9 if place % 2 else None
    x, g, along, bias = drawn(case, dtype, kernels.device, 4)
    settings = settings_of(activation, clamp, dtype)
    if clamp is not None:
        # Where the clamp is reached to rounding, one may have a derivative and the other none.
        y = reference.bias_act(x.double(), bias.double(), *settings[:3], None).abs()
        near = (y - clamp).abs() < 4 * HALF.get(dtype, 2.0**-20)
        x = laid_out(torch.where(near, -reference.along_channels(bias, x), x), case)
    of_sums = torch.linspace(-1, 1, case.shape[1], dtype=dtype if dtype == torch.float64 else torch.float32)
    of_sums = of_sums.to(kernels.device)
    leaves = [tensor.requires_grad_() for tensor in (x, bias, g)]
    y = ops.bias_act(x, bias, activation, slope=0.3, gain=1.5, clamp=clamp)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=case.memory_format)
    grads = torch.autograd.grad(y, (x, bias), g, create_graph=True)
    twice = torch.autograd.grad(grads, leaves, (along, of_sums.to(dtype)), allow_unused=True)

    wide_x, wide_bias, wide_g = wide(x, bias, g)
    size = 2 + wide_x.detach().abs() + reference.along_channels(wide_bias.detach().abs(), wide_x)
    want = reference.bias_act(wide_x, wide_bias, *settings)
    assert close(y, want, size, dtype)
    wide_grads = torch.autograd.grad(want, (wide_x, wide_bias), wide_g, create_graph=True)
    size = 4 * size * (1 + wide_g.detach().abs())
    assert close(grads[0], wide_grads[0], size, dtype)
    sums = [dim for dim in range(x.dim()) if dim != 1]
    assert close(grads[1], wide_grads[1], size.sum(sums) * 2, dtype)
    wide_twice = torch.autograd.grad(
        wide_grads, (wide_x, wide_bias, wide_g), (along.cpu().double(), of_sums.cpu().to(dtype).double()),
        allow_unused=True,
    )  # fmt: skip
    size = size * (2 + along.cpu().double().abs())
    sizes = size, 2 * size.sum(sums), size
    for got, expected, of in zip(twice, wide_twice, sizes, strict=True):
        if got is None:
            assert expected is None or not expected.any()
        else:
            assert close(got, expected, of, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, kernels):
    """Values and derivatives all along the line, of gains of either sign."""
    t = torch.cat((torch.linspace(-12, 12, 97), torch.tensor([0.0, 1e-30, -1e-30, 1e-6, -1e-6, 60.0, -60.0])))
    x = t.to(kernels.device).requires_grad_()
    (wide_x,) = wide(x)
    for gain in (1.0, -1.5):
        y = ops.bias_act(x, None, activation, gain=gain)
        want = reference.bias_act(wide_x, None, activation, 0.2, gain, None)
        # The sigmoid in silu takes an exponential that is within |t| / 3 units.
        assert close(y, want, want.detach().abs() * (1 + wide_x.detach().abs() / 24), torch.float32)
        (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        first = reference.derivative(1, wide_x, None, activation, 0.2, gain, None)
        # The definition is right itself.
        (by_autograd,) = torch.autograd.grad(want.sum(), wide_x, create_graph=True)
        torch.testing.assert_close(first, by_autograd, rtol=1e-7, atol=1e-12)
        assert close(grad, first, 1 + first.detach().abs(), torch.float32)
        second = reference.derivative(2, wide_x, None, activation, 0.2, gain, None)
        if by_autograd.requires_grad:
            (again,) = torch.autograd.grad(by_autograd.sum(), wide_x)
            torch.testing.assert_close(second.detach(), again, rtol=1e-7, atol=1e-12)
        if grad.requires_grad and second.any():
            (twice,) = torch.autograd.grad(grad.sum(), x)
            assert close(twice, second, 2 + second.detach().abs(), torch.float32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_users_write_instead(activation, kernels):
    """PyTorch's functions, at NaN, infinities and 0 too."""
    inf = math.inf
    x = torch.tensor([[math.nan, inf, -inf, 0.0, 3e38, -3e38, 1.5, -1.5]], device=kernels.device).requires_grad_()
    y, want = (op(x, None, activation, gain=1.5, clamp=2.0) for op in (ops.bias_act, plain))
    if activation == "gelu":
        # PyTorch's is NaN there on some processors.
        want = torch.where(x == inf, 2.0, want)
    torch.testing.assert_close(y, want, equal_nan=True, rtol=1e-6, atol=1e-6)
    grads = [torch.autograd.grad(op(x, None, activation).sum(), x)[0][0, 3:] for op in (ops.bias_act, plain)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)


def test_rows_of_the_table():
    assert form_of("relu", 0.2, 2.0, 3.0) == ("piecewise_linear", 1.0, 2.0, 0.0, 3.0)
    assert form_of("relu", 0.2, -2.0, None) == ("piecewise_linear", 1.0, -2.0, -math.inf, 0.0)
    assert set(reference.ROWS) == set(ACTIVATIONS)


def test_the_clamp_stops_the_gradient(kernels):
    x = torch.tensor([[-3.0, -2.0, -0.5, 0.0, 0.5, 2.0, 3.0]], device=kernels.device).requires_grad_()
    for activation, want in (("linear", [0, 0, 1, 1, 1, 0, 0]), ("relu", [0, 0, 0, 0, 1, 0, 0])):
        (grad,) = torch.autograd.grad(ops.bias_act(x, None, activation, clamp=2.0).sum(), x)
        assert grad.tolist() == [want]
    for dtype in (torch.bfloat16, torch.float16):
        # 0.1 is no number of theirs: what reached it is known all the same.
        x = torch.tensor([[0.05, 0.2, -0.2]], dtype=dtype, device=kernels.device).requires_grad_()
        (grad,) = torch.autograd.grad(ops.bias_act(x, None, "leaky_relu", slope=1.0, clamp=0.1).sum(), x)
        assert grad.tolist() == [[1, 0, 0]]


@pytest.mark.parametrize("shape", [(5, 64, 17, 19), (40, 700), (300, 6, 2, 2), (2, 3, 300, 301)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_bits_for_any_threads_and_simd_level(shape, layout, threads, simd_level):
    if layout == "channels_last" and len(shape) != 4:
        pytest.skip("channels_last has four dimensions")

    def run():
        results = []
        for activation in ("leaky_relu", "gelu"):
            x, g, bias = drawn(cases.Case(shape, "", layout=layout), torch.float32, "cpu", 3)
            leaves = [tensor.requires_grad_() for tensor in (x, bias)]
            y = ops.bias_act(x, bias, activation, clamp=1.7)
            grads = torch.autograd.grad(y, leaves, g, create_graph=True)
            results += [y, *grads]
            if activation == "gelu":
                results += torch.autograd.grad(grads[0].sum() + grads[1].sum(), leaves)
        return results

    here = run()
    torch.set_num_threads(1)
    cpu.set_simd_level("scalar")
    assert all(map(same_bits, here, run()))


@each_backend
def test_bits_for_any_split_of_the_batch(kernels):
    x, g, bias = drawn(cases.Case((6, 5, 6, 7), ""), torch.float32, kernels.device, 3)

    def run(part: slice) -> list[torch.Tensor]:
        leaf = x[part].detach().requires_grad_()
        y = ops.bias_act(leaf, bias, "silu")
        return [y, *torch.autograd.grad(y, leaf, g[part])]

    whole = run(slice(None))
    assert all(same_bits(part, all_[2:5]) for part, all_ in zip(run(slice(2, 5)), whole, strict=True))


@each_backend
def test_any_strides_and_types_of_a_bias(kernels):
    base, _ = drawn(cases.Case((6, 10, 8), ""), torch.bfloat16, kernels.device)
    picture = laid_out(*drawn(cases.Case((2, 6, 5, 5), "", layout="channels_last"), torch.bfloat16, "cpu")[:1],
                       cases.Case((2, 6, 5, 5), "", layout="channels_last")).to(kernels.device)  # fmt: skip
    for x in (base.transpose(0, 1), base[::2, 1:, ::3], base[:1].expand(4, 10, 8), picture[:, 1:4]):
        bias = torch.randn(2 * x.shape[1], device=kernels.device)[::2]
        y = ops.bias_act(x, bias, "elu")
        assert same_bits(y, ops.bias_act(x.contiguous(), bias.contiguous(), "elu"))
        leaves = [x.detach().requires_grad_(), bias.detach().requires_grad_()]
        grads = torch.autograd.grad(ops.bias_act(*leaves, "elu").float().sum(), leaves)
        assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32]
        out = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype, device=kernels.device)[..., ::2]
        assert ops.bias_act(x, bias, "elu", out=out) is out
        assert same_bits(out, y)
    assert y.is_contiguous(memory_format=torch.channels_last)


@each_backend
def test_in_place(kernels):
    x, bias = drawn(cases.Case((3, 7, 9), ""), torch.float32, kernels.device)
    want, version = ops.bias_act(x, bias, "tanh"), x._version
    assert ops.bias_act(x, bias, "tanh", out=x) is x
    assert same_bits(x, want)
    assert x._version > version


def test_what_is_kept_for_the_gradient():
    """One tensor: y where it tells the derivative, so that x may go."""
    x, bias = drawn(cases.Case((2, 3, 4), ""), torch.float32, "cpu")
    for activation, kept in (("leaky_relu", "y"), ("relu", "y"), ("linear", "y"), ("gelu", "x"), ("tanh", "x")):
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: (saved.append(t), t)[1], lambda t: t):
            y = ops.bias_act(x.requires_grad_(), bias, activation)
        large = [tensor for tensor in saved if tensor.shape == x.shape]
        assert [tensor.data_ptr() for tensor in large] == [(y if kept == "y" else x).data_ptr()], activation


def test_only_what_is_wanted_is_made():
    x, bias = drawn(cases.Case((4, 3, 5), ""), torch.float32, "cpu")
    for activation in ("relu", "silu"):
        (alone,) = torch.autograd.grad(ops.bias_act(x, bias.requires_grad_(), activation).sum(), bias)
        both = torch.autograd.grad(ops.bias_act(x.requires_grad_(), bias, activation).sum(), (x, bias))
        assert same_bits(alone, both[1])
        x = x.detach()


@pytest.mark.parametrize("activation", ["leaky_relu", "gelu"])
def test_opcheck(activation):
    x, g, bias = drawn(cases.Case((2, 3, 4, 5), "", layout="channels_last"), torch.float32, "cpu", 3)
    settings = (activation, 0.2, 1.5, 0.8)
    leaves = [tensor.detach().requires_grad_() for tensor in (x, bias)]
    torch.library.opcheck(torch.ops.gencore.bias_act, (*leaves, *settings))
    at_output = activation == "leaky_relu"
    args = (g.detach().requires_grad_(), x.detach(), bias, None, *settings, at_output, [True, True])
    torch.library.opcheck(torch.ops.gencore.bias_act_backward, args)
    if not at_output:
        args = (g, x, bias, g, bias, *settings, [True, True, True])
        torch.library.opcheck(torch.ops.gencore.bias_act_double_backward, args)


def test_compiles_with_dynamic_shapes():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def run(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return ops.bias_act(x * 2, bias, "leaky_relu", gain=2**0.5, clamp=1.5).sin()

    for shape in ((2, 3, 4, 5), (4, 7, 8, 9)):
        x, bias = drawn(cases.Case(shape, ""), torch.float32, "cpu")
        leaves = [x.requires_grad_(), bias.requires_grad_()]
        y, want = run(*leaves), ops.bias_act(x * 2, bias, "leaky_relu", gain=2**0.5, clamp=1.5).sin()
        torch.testing.assert_close(y, want)
        grads = [torch.autograd.grad(one.sum(), leaves) for one in (y, want)]
        torch.testing.assert_close(*grads)
    # Once more where a size is 1 or equal to another, never for each shape.
    assert counter.frame_count <= 2


def test_autocast():
    x, bias = drawn(cases.Case((2, 3, 4), ""), torch.float32, "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.bias_act(x, bias.bfloat16(), "relu").dtype == torch.float32
        assert ops.bias_act(x.bfloat16(), bias, "relu").dtype == torch.bfloat16


def test_a_gradient_penalty():
    """R1 through a discriminator of two layers, as PyTorch has it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    weights = [
        torch.randn(shape, generator=generator, dtype=torch.float64) / 3 for shape in ((4, 3, 3, 3), (1, 4, 8, 8))
    ]
    bias = torch.randn(4, generator=generator, dtype=torch.float64)

    def penalty(op, activation):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, *weights, bias)]
        features = op(F.conv2d(leaves[0], leaves[1], padding=1), leaves[3], activation, gain=2**0.5)
        (grad,) = torch.autograd.grad(F.conv2d(features, leaves[2]).sum(), leaves[0], create_graph=True)
        grad.square().sum().backward()
        return [leaf.grad for leaf in leaves]

    for activation in ("leaky_relu", "silu"):
        for got, want in zip(penalty(ops.bias_act, activation), penalty(plain, activation), strict=True):
            if got is None or want is None:
                assert got is want or not (want if got is None else got).any()
            else:
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


X = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((3.0,), {}, TypeError, "x must be a tensor, got float"),
        ((X.int(),), {}, TypeError, "dtype of x must be one of float32, bfloat16, float16, float64, got int32"),
        ((X, None, "swish"), {}, ValueError, r'activation must be one of "linear", "relu", .*, got \'swish\''),
        ((X, None, "relu"), {"gain": "2"}, TypeError, "gain must be a number, got str"),
        ((X, None, "relu"), {"slope": True}, TypeError, "slope must be a number, got bool"),
        ((X, None, "relu"), {"gain": math.inf}, ValueError, "gain must be finite, got inf"),
        ((X, None, "relu"), {"clamp": -1}, ValueError, "clamp must be at least 0 or None, got -1.0"),
        ((X, torch.zeros(4)), {}, ValueError, r"bias must have the shape \(C\) of x, \(3,\), got \(4,\)"),
        ((X, torch.zeros(3).half()), {}, TypeError, "bias must have the dtype torch.float32 for such an x"),
        ((X, 1.0), {}, TypeError, "bias must be a tensor, got float"),
        ((X[0, 0], X[0, 0]), {}, ValueError, "x must have at least two dimensions, .*, for a bias, got 1"),
        ((X,), {"out": X.double()}, TypeError, "out must have the dtype of x, torch.float32, got torch.float64"),
    ],
)
def test_refusals(args, options, error, message):
    with pytest.raises(error, match=message):
        ops.bias_act(*args, **options)
