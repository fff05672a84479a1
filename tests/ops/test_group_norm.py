"""Group normalization and its gradients, against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from group_norm_bounds import ARITHMETIC, GRADIENT, NAMES, Terms, along, assert_close, call, exact, inputs
from kernels import BACKENDS
from support import laid_out, same_bits
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from gencore import ops
from gencore.backends import cpu
from gencore.backends.reference import group_norm as reference
from gencore.bench import cases

CASES = cases.small(cases.GROUP_NORM)
ACTIVATIONS = (None, "silu")


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_forward(case, dtype, kernels):
    every = inputs(case, dtype, kernels.device)
    for names, activation in (((), None), (("weight", "bias"), "silu"), (NAMES, None), (NAMES, "silu")):
        args = {name: every[name] for name in ("x", *names)}
        args64 = exact(args)
        terms = Terms(args64, case.groups)
        y = call(ops.group_norm, args, case.groups, activation)
        want = call(reference.group_norm, args64, case.groups, activation).detach()
        assert_close(y, want, terms.t, ARITHMETIC[dtype])
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=case.memory_format)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward(case, dtype, activation, kernels):
    args = {name: value.requires_grad_() for name, value in inputs(case, dtype, kernels.device).items()}
    args64 = exact(args)
    y = call(ops.group_norm, args, case.groups, activation)
    want = call(reference.group_norm, args64, case.groups, activation)
    g = laid_out(torch.randn(case.shape, dtype=torch.float64).to(dtype), case)
    got = torch.autograd.grad(y, list(args.values()), g.to(kernels.device))
    exact_grads = torch.autograd.grad(want, list(args64.values()), g.double())
    bounds = Terms(args64, case.groups).gradients(g.double())
    for name, a, b in zip(args, got, exact_grads, strict=True):
        assert a.dtype == dtype
        assert a.stride() == args[name].stride()
        assert_close(a, b, bounds[name], GRADIENT[dtype])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 16, 16, 8), (1, 4, 120, 130)], ids=str)
@pytest.mark.parametrize("names", [("weight", "bias"), NAMES], ids=["affine", "all"])
def test_a_large_mean_costs_no_accuracy(layout, shape, names, kernels):
    """Mean 1e4 and deviation 1, also with a step of 1e4 within each channel; groups of one and of several pieces."""
    if kernels.interpreted and shape[0] == 1:
        pytest.skip("Triton's interpreter is slow: tests/backends/triton has several pieces")
    case = cases.Case(shape, "", layout=layout, groups=4 if shape[0] == 2 else 2)
    dtype = torch.float32
    args = inputs(case, dtype, kernels.device, mean=1e4)
    args["bias_in"] *= 1e3
    args = {name: args[name] for name in ("x", *names)}
    for step in (0, 1e4):
        with torch.no_grad():
            args["x"][:, :, 9:] += step
        leaves = {name: value.detach().requires_grad_() for name, value in args.items()}
        args64 = exact(leaves)
        terms = Terms(args64, case.groups)
        y = call(ops.group_norm, leaves, case.groups, "silu")
        want = call(reference.group_norm, args64, case.groups, "silu")
        assert_close(y, want.detach(), terms.t, ARITHMETIC[dtype])
        g = torch.randn(case.shape, dtype=dtype)
        got = torch.autograd.grad(y, list(leaves.values()), g.to(kernels.device))
        bounds = terms.gradients(g.double())
        for name, a, b in zip(leaves, got, torch.autograd.grad(want, list(args64.values()), g.double()), strict=True):
            assert_close(a, b, bounds[name], GRADIENT[dtype])


def test_large_half_precision_values_do_not_overflow(kernels):
    """The squares of these are beyond float16."""
    x = (3000 * torch.randn(2, 8, 6, 6)).to(torch.float16)
    y = ops.group_norm(x.to(kernels.device), 2)
    assert_close(y, reference.group_norm(x.double(), 2), torch.full(x.shape, 4.0).double(), ARITHMETIC[torch.float16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mean", [0, 100])
def test_one_value_and_constant_groups(mean, dtype, kernels):
    bias = torch.randn(8).to(dtype)
    for shape in ((2, 8), (2, 8, 1, 1), (2, 8, 4, 4)):
        y = ops.group_norm(
            torch.full(shape, float(mean), dtype=dtype, device=kernels.device), 8, bias=bias.to(kernels.device)
        )
        assert same_bits(y.cpu(), along(bias, y).expand(shape).contiguous())


BITS_SHAPES = [
    ((3, 40, 50, 41), 8, "contiguous"),
    ((3, 40, 50, 41), 8, "channels_last"),
    ((1, 6, 300, 200), 1, "contiguous"),
    ((1, 6, 300, 200), 1, "channels_last"),
    ((700, 5, 3, 3), 5, "contiguous"),
    ((1, 1030, 9, 9), 2, "channels_last"),
]


@pytest.mark.parametrize(("shape", "groups", "layout"), BITS_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("names", [("weight", "bias"), NAMES], ids=["affine", "all"])
def test_bits_for_any_threads_and_simd_level(shape, groups, layout, dtype, names, threads, simd_level):
    args = inputs(cases.Case(shape, "", layout=layout), dtype)
    args = {name: args[name].requires_grad_() for name in ("x", *names)}

    def run() -> list[Tensor]:
        y = call(ops.group_norm, args, groups, "silu")
        with torch.no_grad():
            direct = call(ops.group_norm, args, groups, "silu")
        return [y.detach(), direct, *torch.autograd.grad(y, list(args.values()), y.detach())]

    here = run()
    torch.set_num_threads(1)
    cpu.set_simd_level("scalar")
    for a, b in zip(here, run(), strict=True):
        assert same_bits(a, b)
    assert same_bits(here[0], here[1])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "groups"), [((5, 12, 6, 7), 3), ((5, 32, 64, 80), 32)], ids=str)
def test_bits_for_any_split_of_the_batch(shape, groups, layout, kernels):
    """The larger one has groups that a GPU's blocks keep, if there are enough of them for a GPU, and share if not."""
    if kernels.interpreted and shape[1] == 32:
        pytest.skip("Triton's interpreter is slow")
    args = inputs(cases.Case(shape, "", layout=layout), torch.float32, kernels.device)
    g = torch.randn_like(args["x"])

    def run(samples: slice) -> list[Tensor]:
        part = {name: value if name in ("weight", "bias") else value[samples] for name, value in args.items()}
        leaves = {name: value.detach().clone().requires_grad_() for name, value in part.items()}
        y = call(ops.group_norm, leaves, groups, "silu")
        of_samples = [leaves[name] for name in ("x", "scale", "shift", "bias_in")]
        return [y.detach(), *torch.autograd.grad(y, of_samples, g[samples])]

    for whole, part in zip(run(slice(None)), run(slice(1, 3)), strict=True):
        assert same_bits(whole[1:3], part)


@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (1, 16, 40, 40)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_for_any_address(shape, layout, dtype, kernels):
    """Shapes that are read 16 bytes at a time, at addresses that are not."""
    if kernels.interpreted and shape[0] == 1:
        pytest.skip("Triton's interpreter is slow")
    x = inputs(cases.Case(shape, "", layout=layout), dtype, kernels.device)["x"].requires_grad_()
    g = torch.randn_like(x)

    def shifted(like: Tensor) -> Tensor:
        memory = torch.empty(like.numel() + 1, dtype=dtype, device=kernels.device)[1:]
        return torch.as_strided(memory, like.shape, like.stride(), 1).copy_(like.detach())

    y = ops.group_norm(x, 4, activation="silu")
    (grad,) = torch.autograd.grad(y, x, g)
    other = shifted(x).requires_grad_()
    z = ops.group_norm(other, 4, activation="silu")
    assert same_bits(z.detach(), y.detach())
    assert same_bits(torch.autograd.grad(z, other, shifted(g))[0], grad)
    with torch.no_grad():
        assert same_bits(ops.group_norm(x, 4, activation="silu", out=shifted(x)), y.detach())
        in_place = shifted(x)
        assert same_bits(ops.group_norm(in_place, 4, activation="silu", out=in_place), y.detach())


@pytest.mark.parametrize("form", [torch.channels_last, torch.channels_last_3d], ids=str)
def test_parts_keep_the_memory_format(form, kernels):
    shape = (4, 6, 5, 4) if form is torch.channels_last else (4, 6, 3, 5, 4)
    x = torch.randn(shape, device=kernels.device).to(memory_format=form)
    whole = ops.group_norm(x, 3)
    part = ops.group_norm(x[::2], 3)
    assert part.is_contiguous(memory_format=form)
    assert same_bits(part, whole[::2])
    half = x.chunk(2, dim=1)[0].requires_grad_()
    y = ops.group_norm(half, 3)
    assert y.is_contiguous(memory_format=form)
    (grad,) = torch.autograd.grad(y, half, torch.ones_like(y))
    assert grad.is_contiguous(memory_format=form)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_any_strides_and_offset(dtype, kernels):
    base = inputs(cases.Case((4, 6, 10, 8), ""), dtype, kernels.device)
    memory = torch.randn(4000, dtype=torch.float64).to(kernels.device, dtype)
    views = {
        "transposed": base["x"].transpose(2, 3),
        "sliced": base["x"][:, :, 1:, ::3],
        "channels_last, sliced": base["x"].to(memory_format=torch.channels_last)[..., 1:],
        "expanded": base["x"][:1, :, :1].expand(4, 6, 10, 8),
        "unaligned": memory[1 : 1 + 4 * 6 * 5 * 7].view(4, 6, 5, 7),
        "unaligned channels_last": memory[3 : 3 + 4 * 6 * 5 * 7].view(4, 5, 7, 6).permute(0, 3, 1, 2),
    }
    # As they come out of one linear layer, and out of a wider one.
    wide = torch.randn(4, 18, dtype=torch.float64).to(kernels.device, dtype)
    strided = dict(zip(("scale", "shift", "bias_in"), wide.chunk(3, dim=1), strict=True))
    strided |= {"weight": wide.flatten()[1:13:2], "bias": wide[0, :1].expand(6)}
    for name, x in views.items():
        args = {"x": x, **strided}
        args = {key: value.detach().requires_grad_() for key, value in args.items()}
        dense = {key: value.detach().contiguous().requires_grad_() for key, value in args.items()}
        if "channels_last" in name:
            dense["x"] = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        y, want = (call(ops.group_norm, some, 2, "silu") for some in (args, dense))
        g = torch.randn(y.shape, dtype=torch.float64).to(kernels.device, dtype).transpose(1, 2).contiguous()
        g = g.transpose(1, 2)
        assert y.stride() == want.stride(), name
        assert same_bits(y.detach(), want.detach()), name
        grads = [torch.autograd.grad(out, list(some.values()), g) for out, some in ((y, args), (want, dense))]
        for a, b in zip(*grads, strict=True):
            assert same_bits(a, b), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_float32_values_with_a_half_precision_tensor(dtype, layout, kernels):
    """What a network in mixed precision has."""
    case = cases.Case((2, 16, 5, 5), "", layout=layout, groups=4)
    x = inputs(case, dtype, kernels.device)["x"]
    mixed = {"x": x} | {n: v for n, v in inputs(case, torch.float32, kernels.device).items() if n != "x"}
    mixed["shift"] = mixed["shift"].to(dtype)
    mixed = {name: value.requires_grad_() for name, value in mixed.items()}
    args64 = exact(mixed)
    terms = Terms(args64, case.groups)
    y = call(ops.group_norm, mixed, case.groups, "silu")
    want = call(reference.group_norm, args64, case.groups, "silu")
    assert_close(y, want.detach(), terms.t, ARITHMETIC[dtype])
    g = torch.randn(case.shape).to(dtype)
    grads = torch.autograd.grad(y, list(mixed.values()), g.to(kernels.device))
    bounds = terms.gradients(g.double())
    for name, a, b in zip(mixed, grads, torch.autograd.grad(want, list(args64.values()), g.double()), strict=True):
        assert a.dtype == mixed[name].dtype
        assert_close(a, b, bounds[name], GRADIENT[dtype])


# ------------------------------------------------------------------------------------------------ special values


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_stay_in_their_group(dtype, layout, value, kernels):
    case = cases.Case((2, 8, 5, 5), "", layout=layout, groups=4)
    x = inputs(case, dtype, kernels.device)["x"]
    want = ops.group_norm(x, 4, activation="silu")
    x[1, 3, 2, 2] = value
    y = ops.group_norm(x, 4, activation="silu")
    assert bool(y[1, 2:4].isnan().all())
    keep = torch.ones(2, 8, dtype=torch.bool, device=y.device)
    keep[1, 2:4] = False
    assert torch.equal(y[keep], want[keep])
    leaf = x.requires_grad_()
    (grad,) = torch.autograd.grad(ops.group_norm(leaf, 4, activation="silu").sum(), leaf)
    assert bool(grad[1, 2:4].isnan().all())
    assert bool(grad[keep].isfinite().all())


def test_silu_of_any_number(kernels):
    """With xhat 0, t is the bias: silu and its derivative at numbers of every size."""
    inf, nan = float("inf"), float("nan")
    sizes = torch.logspace(-40, 38, 14 if kernels.interpreted else 79).double()
    between = torch.linspace(-87, 100, 60 if kernels.interpreted else 600).double()
    t = torch.cat([-sizes, sizes, between, torch.tensor([0.0, -0.0, inf, -inf, nan])])
    bias = t.float().to(kernels.device).requires_grad_()
    y = ops.group_norm(torch.ones(1, len(t), 1, device=kernels.device), len(t), bias=bias, activation="silu").flatten()
    exact_t = bias.detach().cpu().double().requires_grad_()
    want = exact_t * torch.sigmoid(exact_t)
    torch.testing.assert_close(y.detach().cpu().double(), want.detach(), rtol=2.0**-18, atol=1e-37, equal_nan=True)
    near = exact_t.abs() < 10
    torch.testing.assert_close(y.detach().cpu().double()[near], want.detach()[near], rtol=4 * 2.0**-23, atol=1e-37)
    (got,), (derivative,) = (torch.autograd.grad(a, b, torch.ones_like(a)) for a, b in ((y, bias), (want, exact_t)))
    torch.testing.assert_close(got.cpu().double(), derivative, rtol=2.0**-18, atol=2.0**-22, equal_nan=True)


# ------------------------------------------------------------------------------------------------ out


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_out(dtype, kernels):
    for layout in ("contiguous", "channels_last"):
        case = cases.Case((2, 6, 5, 4), "", layout=layout)
        args = inputs(case, dtype, kernels.device)
        want = call(ops.group_norm, args, 3, "silu")
        other = torch.channels_last if layout == "contiguous" else torch.contiguous_format
        for out in (
            torch.empty_like(args["x"]),
            torch.empty(case.shape, dtype=dtype, device=kernels.device).to(memory_format=other),
            torch.empty(5, 4, 6, 2, dtype=dtype, device=kernels.device).permute(3, 2, 0, 1),
            torch.empty(2, 6, 5, 8, dtype=dtype, device=kernels.device)[..., ::2],
        ):
            version = out._version
            assert call(ops.group_norm, args, 3, "silu", out=out) is out
            assert same_bits(out, want)
            assert out._version > version
        x = args["x"]
        assert call(ops.group_norm, args, 3, "silu", out=x) is x
        assert same_bits(x, want)


def test_out_is_refused_where_it_would_be_wrong():
    x = torch.randn(2, 6, 5, 4)
    leaf = x.clone().requires_grad_()
    with pytest.raises(ValueError, match="out must be left out where a gradient is wanted"):
        ops.group_norm(leaf, 3, out=torch.empty_like(x))
    with torch.no_grad():
        ops.group_norm(leaf, 3, out=torch.empty_like(x))
    memory = torch.randn(2 * 6 * 5 * 4 + 4)
    x, shifted = memory[:-4].view(2, 6, 5, 4), memory[4:].view(2, 6, 5, 4)
    with pytest.raises(ValueError, match="out must be x itself or lie apart from x in memory"):
        ops.group_norm(x, 3, out=shifted)
    with pytest.raises(ValueError, match="out must be x itself or lie apart from weight in memory"):
        ops.group_norm(x.clone(), 3, memory[:6], out=x)
    with pytest.raises(ValueError, match="out must not have several elements in one place"):
        ops.group_norm(x, 3, out=torch.empty(1, 6, 5, 4).expand(2, 6, 5, 4))
    with pytest.raises(ValueError, match=r"out must have the shape of x, \(2, 6, 5, 4\), got \(2, 6, 5\)"):
        ops.group_norm(x, 3, out=torch.empty(2, 6, 5))


# ------------------------------------------------------------------------------------------------ autograd, compiler


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(activation, layout, kernels):
    if kernels.interpreted:
        pytest.skip("Triton's interpreter is too slow for numerical gradients")
    args = inputs(cases.Case((2, 4, 3, 2), "", layout=layout), torch.float64, kernels.device)
    leaves = [value.requires_grad_() for value in args.values()]

    def function(*values: Tensor) -> Tensor:
        return call(ops.group_norm, dict(zip(args, values, strict=True)), 2, activation)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("name", ["x", *NAMES])
def test_gradient_of_one_input(name, kernels):
    args = inputs(cases.Case((2, 6, 3, 4), ""), torch.float32, kernels.device)
    g = torch.randn(2, 6, 3, 4, device=kernels.device)
    every = {key: value.clone().requires_grad_() for key, value in args.items()}
    want = torch.autograd.grad(call(ops.group_norm, every, 3, "silu"), every[name], g)[0]
    one = {key: value.clone().requires_grad_(key == name) for key, value in args.items()}
    got = torch.autograd.grad(call(ops.group_norm, one, 3, "silu"), one[name], g)[0]
    assert same_bits(got, want)


def test_only_the_inputs_and_the_statistics_are_saved():
    args = {name: value.requires_grad_() for name, value in inputs(CASES[-1], torch.float32).items()}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(ops.group_norm, args, CASES[-1].groups, "silu")
    given = {value.data_ptr() for value in args.values()}
    (statistics,) = (tensor for tensor in saved if tensor.data_ptr() not in given)
    assert statistics.shape == (CASES[-1].shape[0], CASES[-1].groups, 2)


@pytest.mark.parametrize("kernels", BACKENDS, indirect=True)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 6, 5, 4), (1, 6, 1, 4), (2, 6)], ids=str)
def test_opcheck(layout, shape, kernels):
    if layout == "channels_last" and len(shape) != 4:
        pytest.skip("channels_last has four dimensions")
    if kernels.emulated and shape != (1, 6, 1, 4):
        pytest.skip("what the check sees does not depend on what runs the op")
    for dtype in (torch.bfloat16,) if kernels.emulated else (torch.float32, torch.bfloat16):
        args = inputs(cases.Case(shape, "", layout=layout), dtype, kernels.device)
        x, *values = args.values()
        some = [None if name in ("bias", "scale") else value for name, value in zip(NAMES, values, strict=True)]
        gradients = [t if t is None else t.clone().requires_grad_() for t in (x, *values)]
        partly = [t if t is None else t.clone().requires_grad_() for t in (x, *some)]
        for x_, *values_ in (gradients, partly, (x, *values)):
            torch.library.opcheck(torch.ops.gencore.group_norm.default, (x_, 3, *values_, "silu", 1e-5))
        torch.library.opcheck(torch.ops.gencore.group_norm_out.default, (x, 3, *some, None, 1e-5, torch.empty_like(x)))
        _, statistics = torch.ops.gencore.group_norm(x, 3, *values, "silu", 1e-5)
        for wanted in ([True] * 6, [True, False, True, False, False, True], [False, True, *[False] * 4]):
            torch.library.opcheck(
                torch.ops.gencore.group_norm_backward.default,
                (torch.randn_like(x), x, statistics, 3, *values, "silu", wanted, 1e-5),
            )


def block(x, embedding, weight, bias):
    """A piece of a U-Net's residual block."""
    scale, shift = embedding.chunk(2, dim=1)
    return ops.group_norm(x, 3, weight, bias, scale=scale, shift=shift, activation="silu").square().sum()


def test_compiles_whole_and_once():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for seed in range(3):
        args = inputs(cases.Case((2, 6, 5, 4), ""), torch.float32, seed=seed)
        leaves = [args["x"], torch.cat([args["scale"], args["shift"]], 1), args["weight"], args["bias"]]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        value, eager = compiled(*leaves), block(*leaves)
        assert torch.equal(value, eager)
        for a, b in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(eager, leaves), strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kernels", BACKENDS, indirect=True)
def test_compiles_with_inductor_and_dynamic_shapes(kernels):
    if kernels.emulated:
        pytest.skip("the compiler sees the same op, whatever runs it")
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for shape in ((2, 6, 5, 4), (3, 6, 7, 4)):
        args = inputs(cases.Case(shape, "", layout="channels_last"), torch.float32, kernels.device)
        leaves = [args["x"], torch.cat([args["scale"], args["shift"]], 1), args["weight"], args["bias"]]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        value, eager = compiled(*leaves), block(*leaves)
        # The sums around the op are the compiler's, in an order of its own.
        assert torch.allclose(value, eager, rtol=1e-5)
        for a, b in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(eager, leaves), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_compiles_with_out():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True)
    def in_place(x: Tensor) -> Tensor:
        return ops.group_norm(x, 3, activation="silu", out=x) + 1

    x = torch.randn(2, 6, 5, 4)
    want = ops.group_norm(x, 3, activation="silu")
    assert torch.equal(in_place(x), want + 1)
    assert torch.equal(x, want)


def test_out_is_traced_with_tensors_that_have_no_memory():
    from torch.fx.experimental.proxy_tensor import make_fx

    x = torch.randn(2, 6, 5, 4)
    traced = make_fx(lambda a: ops.group_norm(a, 3, out=torch.empty_like(a)), tracing_mode="fake")(x)
    assert torch.equal(traced(x), ops.group_norm(x, 3))


def test_composes_with_vmap_and_grad_of_torch_func():
    x, weight = torch.randn(3, 2, 6, 4), torch.randn(6)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return ops.group_norm(x, 3, weight, activation="silu").square().sum()

    each = torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(0, None))(x, weight)
    for one, got in zip(x, each, strict=True):
        leaf = weight.clone().requires_grad_()
        assert torch.allclose(got, torch.autograd.grad(loss(one, leaf), leaf)[0], rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_keeps_the_dtype(dtype):
    """A half-precision tensor stays so, where PyTorch's own op makes it float32: nothing is computed in halves."""
    x, weight = torch.randn(2, 6, 4, 4).to(dtype), torch.randn(6)
    want = ops.group_norm(x, 3, weight)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.group_norm(x, 3, weight)
    assert y.dtype == dtype
    assert same_bits(y, want)


def test_autocast_with_an_embedding():
    """The embedding's layer is in half precision then; x may come from an op that is not."""
    layer, x = torch.nn.Linear(4, 12), torch.randn(2, 6, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        scale, shift = layer(torch.randn(2, 4)).chunk(2, dim=1)
        assert scale.dtype == torch.bfloat16
        y = ops.group_norm(x, 3, scale=scale, shift=shift, activation="silu")
    assert y.dtype == torch.float32
    assert same_bits(y, ops.group_norm(x, 3, scale=scale.float(), shift=shift.float(), activation="silu"))
    y.sum().backward()
    assert bool(layer.weight.grad.abs().sum() > 0)


def test_a_tensor_that_left_its_transform():
    leaked: list[Tensor] = []
    torch.func.grad(lambda a: (leaked.append(a), a.square().sum())[1])(torch.randn(2, 6, 5, 4))
    weight = torch.ones(6, requires_grad=True)
    y = ops.group_norm(leaked[0], 3, weight)
    assert same_bits(y.detach(), ops.group_norm(leaked[0].clone(), 3, weight).detach())


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_than_two_to_the_31_elements(layout):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (2, 4, 1 << 15, (1 << 13) + 1)
    x = torch.empty(shape, dtype=torch.bfloat16, device=device).to(
        memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
    )
    x[:, :, ::2], x[:, :, 1::2] = 3, 1
    x[1, 2:] *= 2
    y = ops.group_norm(x, 2, eps=0, out=x)
    # Mean 2 and deviation 1, mean 4 and deviation 2.
    assert bool((y[:, :, ::2] == 1).all())
    assert bool((y[:, :, 1::2] == -1).all())


# ------------------------------------------------------------------------------------------------ contract

X = torch.zeros(2, 6, 4)
V, M = torch.zeros(6), torch.zeros(2, 6)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        (([1.0], 2), {}, TypeError, "x must be a tensor, got list"),
        ((X.long(), 2), {}, TypeError, "dtype of x must be one of float32, bfloat16, float16, float64, got int64"),
        ((X.to_sparse(), 2), {}, ValueError, "x must be a dense .* tensor, got one of layout torch.sparse_coo"),
        ((V, 2), {}, ValueError, "x must have at least two dimensions, samples and channels, got 1"),
        ((X, 2.0), {}, TypeError, "num_groups must be an int, got float"),
        ((X, True), {}, TypeError, "num_groups must be an int, got bool"),
        ((X, 0), {}, ValueError, "num_groups must be at least 1, got 0"),
        ((X, 4), {}, ValueError, "num_groups must divide the 6 channels of x, got 4"),
        ((X, 2, 1.0), {}, TypeError, "weight must be a tensor, got float"),
        ((X, 2, V[:5]), {}, ValueError, r"weight must have the shape \(C\) of x, \(6,\), got \(5,\)"),
        ((X, 2, None, M), {}, ValueError, r"bias must have the shape \(C\) of x, \(6,\), got \(2, 6\)"),
        ((X, 2), {"scale": V}, ValueError, r"scale must have the shape \(N, C\) of x, \(2, 6\), got \(6,\)"),
        ((X, 2), {"shift": M[:1]}, ValueError, r"shift must have the shape \(N, C\) of x, \(2, 6\), got \(1, 6\)"),
        ((X, 2), {"bias_in": M[..., None]}, ValueError, r"bias_in must have the shape \(N, C\) of x"),
        ((X, 2, V.double()), {}, TypeError, "weight must have the dtype torch.float32 for .* got torch.float64"),
        ((X.half(), 2, V.bfloat16()), {}, TypeError, "dtype torch.float16 or torch.float32 for .* got .*bfloat16"),
        ((X.double(), 2, V), {}, TypeError, "weight must have the dtype torch.float64 for such an x, got .*float32"),
        ((X, 2), {"scale": M.to("meta")}, ValueError, "scale must be on the device of x, cpu, got meta"),
        ((X, 2, V.sum()), {}, ValueError, r"weight must have the shape \(C\) of x, \(6,\), got \(\)"),
        ((X, 2), {"eps": "1"}, TypeError, "eps must be a number, got str"),
        ((X, 2), {"eps": -1e-5}, ValueError, "eps must be at least 0, got -1e-05"),
        ((X, 2), {"eps": float("nan")}, ValueError, "eps must be at least 0, got nan"),
        ((X, 2), {"activation": "relu"}, ValueError, "activation must be \"silu\" or None, got 'relu'"),
        ((X, 2), {"out": 3}, TypeError, "out must be a tensor, got int"),
        ((X, 2), {"out": X.double()}, TypeError, "out must have the dtype of x, torch.float32, got torch.float64"),
    ],
)
def test_says_what_is_wrong(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        ops.group_norm(*args, **kwargs)


def test_explain():
    from gencore import explain

    x = torch.randn(2, 6, 4, 4)[..., ::2]
    told = str(explain(ops.group_norm, x, 3))
    assert told.startswith("group_norm on cpu: cpu")
    assert "x is neither contiguous nor channels_last" in told
    scale, shift = torch.randn(2, 12).chunk(2, dim=1)
    assert "copy" not in str(explain(ops.group_norm, x.contiguous(), 3, scale=scale, shift=shift))
