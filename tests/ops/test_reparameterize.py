"""Fused reparameterized sampling and its gradient, against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from kernels import BACKENDS
from support import laid_out, same_bits
from torch._dynamo.testing import CompileCounterWithBackend

from gencore import Key, ops
from gencore.backends import cpu
from gencore.backends.reference import reparameterize as reference
from gencore.bench import cases

CASES = cases.small(cases.REPARAMETERIZE)

# Relative to the larger of the value and the terms it is made of. The half types round once, on writing: half a unit in
# the last of their 8 and 11 bits. float32: exp within 1.1 ulp, then a product and a sum: 2 ulp. float64: the library's
# exp and a product and a sum.
TOLERANCE = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-51}
# kl and the gradients square, multiply and sum: a few roundings of the arithmetic on top.
KL_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6, torch.float64: 1e-13}
GRADIENT_TOLERANCE = {dtype: 4 * tolerance for dtype, tolerance in TOLERANCE.items()}


def inputs(
    case: cases.Case, dtype: torch.dtype, seed: int = 0, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mu, logvar = (torch.randn(case.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return laid_out(mu.to(device, dtype), case), laid_out((2 * logvar).to(device, dtype), case)


def assert_close(got: torch.Tensor, want: torch.Tensor, scale: torch.Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    error = (got.cpu().double() - want).abs()
    assert bool((error <= tolerance * scale + 2.0**-24 * tolerance).all()), (error / scale).nan_to_num().max().item()


def oracle(mu, logvar, key, draws):
    """The definition in float64, as leaves for gradients."""
    mu, logvar = (x.detach().cpu().double().contiguous().requires_grad_() for x in (mu, logvar))
    return mu, logvar, *reference.reparameterize_kl(mu, logvar, key, draws)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_forward(case, dtype, kernels):
    mu, logvar = inputs(case, dtype, device=kernels.device)
    for key in (Key(7).stream(3).samples(2**32 - 1), Key(torch.arange(case.shape[0]) - 1)):
        mu64, _, z64, kl64 = oracle(mu, logvar, key, case.draws)
        z, kl = ops.reparameterize_kl(mu, logvar, key, num_samples=case.draws)
        # bfloat16 reads its arithmetic's float32, so the scale is that of the terms, mu and sigma eps.
        assert_close(z, z64, mu64.abs() + (z64 - mu64).abs(), TOLERANCE[dtype])
        assert_close(kl, kl64, kl64.abs() + 1, KL_TOLERANCE[dtype])
        assert kl.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert z.dtype == dtype
        if case.draws is None:
            assert z.is_contiguous(memory_format=case.memory_format)
        assert same_bits(ops.reparameterize(mu, logvar, key, num_samples=case.draws), z)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("wanted", ["z", "kl", "both"])
def test_backward(case, dtype, wanted, kernels):
    mu, logvar = (x.requires_grad_() for x in inputs(case, dtype, device=kernels.device))
    key = Key(7).stream(3)
    mu64, logvar64, z64, kl64 = oracle(mu, logvar, key, case.draws)
    z, kl = ops.reparameterize_kl(mu, logvar, key, num_samples=case.draws)
    g_z, g_kl = torch.randn(z.shape, dtype=dtype), torch.randn(kl.shape, dtype=kl.dtype)
    chosen = {"z": ((z,), (z64,), (g_z,)), "kl": ((kl,), (kl64,), (g_kl,))}
    chosen["both"] = tuple(a + b for a, b in zip(chosen["z"], chosen["kl"], strict=True))
    outputs, outputs64, grads = chosen[wanted]
    got = torch.autograd.grad(outputs, (mu, logvar), [g.to(kernels.device) for g in grads])
    want = torch.autograd.grad(outputs64, (mu64, logvar64), [g.double() for g in grads])
    # The scale is that of the terms, which may cancel: the gradients of absolute values.
    draws_axis = (0,) if case.draws else ()
    size_z = g_z.double().abs().sum(draws_axis) if draws_axis else g_z.double().abs()
    eps = reference.noise(mu64, key, case.draws)
    size_eps = (g_z.double() * eps).abs()
    size_eps = size_eps.sum(0) if draws_axis else size_eps
    size_kl = g_kl.double().abs().view(-1, *[1] * (mu.dim() - 1))
    sigma = (logvar64 / 2).exp()
    scales = (
        size_z + size_kl * mu64.abs(),
        size_eps * sigma / 2 + size_kl * (sigma.square() + 1) / 2,
    )
    for a, b, scale in zip(got, want, scales, strict=True):
        assert a.dtype == dtype
        assert_close(a, b, scale.detach(), GRADIENT_TOLERANCE[dtype])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_backward_of_z_alone(case, dtype, kernels):
    mu, logvar = (x.requires_grad_() for x in inputs(case, dtype, device=kernels.device))
    key = Key(torch.arange(case.shape[0]) + 5)
    z = ops.reparameterize(mu, logvar, key, num_samples=case.draws)
    z_kl, _ = ops.reparameterize_kl(mu, logvar, key, num_samples=case.draws)
    g = torch.randn(z.shape, dtype=dtype, device=kernels.device)
    # The op without kl has ways of its own through the kernel; the one with kl was held against the definition above.
    got, want = (torch.autograd.grad(output, (mu, logvar), g) for output in (z, z_kl))
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=GRADIENT_TOLERANCE[dtype], atol=GRADIENT_TOLERANCE[dtype])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_noise_that_is_kept(case, dtype, kernels):
    """The samples are the same; the gradient is a product with what was kept."""
    mu, logvar = (x.requires_grad_() for x in inputs(case, dtype, device=kernels.device))
    key = Key(torch.arange(case.shape[0]) + 5)
    z = ops.reparameterize(mu, logvar, key, num_samples=case.draws, save_noise=True)
    assert same_bits(z, ops.reparameterize(mu, logvar, key, num_samples=case.draws))
    mu64, logvar64, z64, _ = oracle(mu, logvar, key, case.draws)
    g = torch.randn(z.shape, dtype=dtype)
    got = torch.autograd.grad(z, (mu, logvar), g.to(kernels.device))
    want = torch.autograd.grad(z64, (mu64, logvar64), g.double())
    eps, sigma = reference.noise(mu64, key, case.draws), (logvar64.detach() / 2).exp()
    tolerance = GRADIENT_TOLERANCE[dtype]
    # Near zero, what was kept has the smallest number of its type as its error, and so has the product.
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / tolerance
    scales = g.double().abs(), g.double().abs() * (eps.abs() * sigma / 2 + smallest) + smallest
    for a, b, scale in zip(got, want, scales, strict=True):
        assert a.dtype == dtype
        assert_close(a, b, scale if case.draws is None else scale.sum(0), tolerance)


@pytest.mark.parametrize("shape", [(3, 30_001), (20_000, 3), (2, 3, 110, 111)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("draws", [None, 2])
def test_bits_for_any_threads_and_simd_level(shape, layout, dtype, draws, threads, simd_level):
    if layout == "channels_last" and len(shape) != 4:
        pytest.skip("channels_last has four dimensions")
    mu, logvar = (x.requires_grad_() for x in inputs(cases.Case(shape, "", layout=layout), dtype))
    key = Key(torch.arange(shape[0]))

    def run() -> tuple[torch.Tensor, ...]:
        z, kl = ops.reparameterize_kl(mu, logvar, key, num_samples=draws)
        alone = ops.reparameterize(mu, logvar, key, num_samples=draws)
        with_kl = torch.autograd.grad((z, kl), (mu, logvar), (z.detach(), kl.detach()))
        kept = ops.reparameterize(mu, logvar, key, num_samples=draws, save_noise=True)
        of_z = (torch.autograd.grad(output, (mu, logvar), z.detach()) for output in (alone, kept))
        return z.detach(), kl.detach(), *with_kl, *next(of_z), *next(of_z)

    here = run()
    torch.set_num_threads(1)
    cpu.set_simd_level("scalar")
    for a, b in zip(here, run(), strict=True):
        assert same_bits(a, b)


def test_many_draws_of_few_elements(threads):
    mu, logvar = (x.requires_grad_() for x in inputs(cases.Case((16, 20), ""), torch.float32))
    z = ops.reparameterize(mu, logvar, Key(1), num_samples=1000)
    want = reference.reparameterize(mu.detach().double(), logvar.detach().double(), Key(1), 1000)
    assert_close(z.detach(), want, want.abs() + 3, TOLERANCE[torch.float32])
    grads = torch.autograd.grad(z, (mu, logvar), torch.ones_like(z))
    torch.set_num_threads(1)
    for a, b in zip(
        grads,
        torch.autograd.grad(ops.reparameterize(mu, logvar, Key(1), num_samples=1000), (mu, logvar), torch.ones_like(z)),
        strict=True,
    ):
        assert same_bits(a, b)


def test_bits_for_any_split_of_the_batch_and_layout():
    mu, logvar = inputs(cases.Case((6, 4, 9, 9), ""), torch.float32)
    whole = ops.reparameterize(mu, logvar, Key(3))
    part = ops.reparameterize(mu[2:5], logvar[2:5], Key(3).samples(2))
    assert same_bits(part, whole[2:5])
    last = ops.reparameterize(*(x.to(memory_format=torch.channels_last) for x in (mu, logvar)), Key(3))
    assert same_bits(last, whole)
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_more_draws_begin_with_the_same_ones():
    mu, logvar = inputs(cases.Case((4, 7), ""), torch.float32)
    assert same_bits(
        ops.reparameterize(mu, logvar, Key(3), num_samples=5)[:2], ops.reparameterize(mu, logvar, Key(3), num_samples=2)
    )
    assert same_bits(ops.reparameterize(mu, logvar, Key(3), num_samples=1)[0], ops.reparameterize(mu, logvar, Key(3)))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_any_strides_and_offset(dtype, kernels):
    base, other = inputs(cases.Case((6, 10, 8), ""), dtype, device=kernels.device)
    memory = torch.randn(1000, dtype=torch.float64).to(kernels.device, dtype)
    views = {
        "transposed": (base.transpose(0, 1), other.transpose(0, 1)),
        "sliced": (base[::2, 1:, ::3], other[::2, 1:, ::3]),
        "expanded": (base[:1].expand(4, 10, 8), other[:4]),
        "unaligned": (memory[1:161].view(4, 40), memory[333:493].view(4, 40)),
        "different": (base, other.transpose(1, 2).contiguous().transpose(1, 2)),
    }
    for name, (mu, logvar) in views.items():
        mu, logvar = mu.detach().requires_grad_(), logvar.detach().requires_grad_()
        z, kl = ops.reparameterize_kl(mu, logvar, Key(1))
        dense = [x.detach().contiguous().requires_grad_() for x in (mu, logvar)]
        z_dense, kl_dense = ops.reparameterize_kl(*dense, Key(1))
        assert same_bits(z, z_dense), name
        assert same_bits(kl, kl_dense), name
        g = torch.randn(2, *z.shape, dtype=dtype, device=kernels.device)[0].transpose(0, 1).contiguous().transpose(0, 1)
        grads = torch.autograd.grad((z, kl), (mu, logvar), (g, torch.ones_like(kl)))
        for a, b in zip(grads, torch.autograd.grad((z_dense, kl_dense), dense, (g, torch.ones_like(kl))), strict=True):
            assert same_bits(a, b), name


def test_conjugate_views_are_read_right():
    # The imaginary part of a conjugate is a view whose sign is a bit of the tensor, not of its memory.
    mu = torch.randn(4, 6, dtype=torch.complex64).conj().imag
    assert mu.is_neg()
    logvar = torch.zeros(4, 6)
    assert same_bits(ops.reparameterize(mu, logvar, Key(1)), ops.reparameterize(mu.clone(), logvar, Key(1)))


# ------------------------------------------------------------------------------------------------ special values


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_nan_and_infinity_propagate_as_in_pytorch(dtype, kernels):
    inf, nan = float("inf"), float("nan")
    values = [0.0, -0.0, 1.0, -inf, inf, nan, 180.0, -180.0, -230.0, 60.0]
    values = torch.tensor(values, dtype=dtype, device=kernels.device)
    mu, logvar = (x.reshape(1, -1).clone().requires_grad_() for x in torch.meshgrid(values, values, indexing="ij"))
    z, kl = ops.reparameterize_kl(mu, logvar, Key(5))
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    mu_ref, logvar_ref = (x.detach().to("cpu", precision).requires_grad_() for x in (mu, logvar))
    z_ref, kl_ref = reference.reparameterize_kl(mu_ref, logvar_ref, Key(5))
    # Overflow to infinity happens on rounding to the half type, in both.
    torch.testing.assert_close(
        z.to("cpu", precision), z_ref.to(dtype).to(precision), rtol=2.0**-7, atol=1e-37, equal_nan=True
    )
    assert torch.equal(kl.isnan().cpu(), kl_ref.isnan())
    got = torch.autograd.grad(z, (mu, logvar), torch.ones_like(z), retain_graph=True)
    want = torch.autograd.grad(z_ref, (mu_ref, logvar_ref), torch.ones_like(z_ref))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(
            a.to("cpu", precision), b.to(dtype).to(precision), rtol=2.0**-7, atol=1e-37, equal_nan=True
        )


def test_gradient_of_kl_alone_at_infinite_variance(kernels):
    mu, logvar = (torch.full((1, 1), x, device=kernels.device, requires_grad=True) for x in (0.0, float("inf")))
    _, kl = ops.reparameterize_kl(mu, logvar, Key(0))
    assert torch.autograd.grad(kl, logvar, torch.ones_like(kl))[0].item() == float("inf")


def test_exp_is_accurate(kernels):
    # With mu = 0, z is one rounding away from exp(logvar / 2) eps.
    logvar = torch.linspace(-2 * 87.0, 2 * 88.0, 1 << (11 if kernels.interpreted else 16))
    logvar = logvar.reshape(1, -1).to(kernels.device)
    eps = ops.normal(logvar.shape, Key(9), device=kernels.device).double()
    z = ops.reparameterize(torch.zeros_like(logvar), logvar, Key(9)).double()
    exact = torch.exp(logvar.double() / 2) * eps
    usual = (exact.abs() > 2.0**-126) & (exact.abs() < 2.0**127)
    assert usual.sum() > 0.9 * logvar.numel()
    assert ((z - exact).abs() / exact.abs())[usual].max() < 1.6 * 2.0**-23


def test_exp_underflows_gradually(kernels):
    logvar = torch.linspace(-2 * 103.5, -2 * 87.0, 4096).reshape(1, -1).to(kernels.device)
    z = ops.reparameterize(torch.zeros_like(logvar), logvar, Key(9)).double()
    exact = torch.exp(logvar.double() / 2) * ops.normal(logvar.shape, Key(9), device=kernels.device).double()
    # exp is rounded to a multiple of the smallest binary32 number, then multiplied by up to 6.76.
    assert (z - exact).abs().max() < 6 * 2.0**-149


# ------------------------------------------------------------------------------------------------ autograd, compiler


@pytest.mark.parametrize("draws", [None, 3])
def test_gradcheck(draws, kernels):
    if kernels.interpreted:
        pytest.skip("Triton's interpreter is too slow for numerical gradients")
    case = cases.Case((3, 2, 3, 3), "", layout="channels_last")
    mu, logvar = (x.requires_grad_() for x in inputs(case, torch.float64, device=kernels.device))
    for op in (ops.reparameterize, ops.reparameterize_kl):
        assert torch.autograd.gradcheck(lambda a, b, op=op: op(a, b, Key(1), num_samples=draws), (mu, logvar))


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
@pytest.mark.parametrize("draws", [None, 2])
def test_gradient_of_one_input(needs, draws):
    both = [x.requires_grad_() for x in inputs(cases.Case((4, 6), ""), torch.float32)]
    one = [x.detach().requires_grad_(need) for x, need in zip(both, needs, strict=True)]
    for op in (ops.reparameterize, lambda *a, **k: torch.cat([t.flatten() for t in ops.reparameterize_kl(*a, **k)])):
        outputs = [op(*pair, Key(2), num_samples=draws) for pair in (both, one)]
        for output in outputs:
            output.square().sum().backward()
        for a, b, need in zip(both, one, needs, strict=True):
            assert (b.grad is not None) == need
            assert not need or same_bits(a.grad, b.grad)
            a.grad = b.grad = None


def test_nothing_of_the_noise_is_saved():
    mu, logvar = (x.requires_grad_() for x in inputs(cases.Case((8, 1000), ""), torch.float32))
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ops.reparameterize(mu, logvar, Key(0), num_samples=16)
        assert sorted(x.numel() for x in saved) == [3, 8000]
        assert {x.data_ptr() for x in saved} >= {logvar.data_ptr()}
        saved.clear()
        ops.reparameterize(mu, logvar.detach(), Key(0))
        ops.reparameterize(mu, logvar.detach(), Key(0), save_noise=True)
        assert saved == []
        ops.reparameterize(mu, logvar, Key(0), save_noise=True)
        assert [x.numel() for x in saved] == [8000]
        assert not torch.equal(saved.pop(), logvar)
        ops.reparameterize_kl(mu, logvar, Key(0), num_samples=16)
        assert sorted(x.numel() for x in saved) == [3, 8000, 8000]


@pytest.mark.parametrize("kernels", BACKENDS, indirect=True)
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 5, 5)])
@pytest.mark.parametrize("draws", [None, 2])
def test_opcheck(shape, draws, kernels):
    if kernels.emulated and (len(shape) == 2 or draws is None):
        pytest.skip("what the check sees does not depend on what runs the op")
    case = cases.Case(shape, "", layout="channels_last" if len(shape) == 4 else "contiguous")
    mu, logvar = (x.requires_grad_() for x in inputs(case, torch.float32, device=kernels.device))
    for name in ("reparameterize", "reparameterize_kl", "reparameterize_and_slope"):
        op = getattr(torch.ops.gencore, name)
        torch.library.opcheck(op.default, (mu, logvar, Key(1).packed, draws))
        torch.library.opcheck(op.default, (mu.detach(), logvar.detach(), Key(1).packed, draws))
    z, kl = ops.reparameterize_kl(mu.detach(), logvar.detach(), Key(1), num_samples=draws)
    for with_mu in (True, False):
        torch.library.opcheck(
            torch.ops.gencore.reparameterize_backward.default,
            (z, kl, mu.detach(), logvar.detach(), Key(1).packed, draws, with_mu),
        )


def loss(mu, logvar, key):
    z, kl = ops.reparameterize_kl(mu, logvar, key.stream(1))
    kept = ops.reparameterize(mu, logvar, key.stream(2), save_noise=True)
    return z.square().sum() + kl.sum() + kept.sum() + ops.reparameterize(mu, logvar, key, num_samples=2).sum()


def test_compiles_whole_and_once():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for seed in range(3):
        mu, logvar = (x.requires_grad_() for x in inputs(cases.Case((4, 6), ""), torch.float32, seed))
        key = Key(seed).stream(seed).samples(10 * seed)
        value = compiled(mu, logvar, key)
        grads = torch.autograd.grad(value, (mu, logvar))
        eager = loss(mu, logvar, key)
        assert torch.equal(value, eager)
        for a, b in zip(grads, torch.autograd.grad(eager, (mu, logvar)), strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kernels", BACKENDS, indirect=True)
def test_compiles_with_inductor_and_dynamic_shapes(kernels):
    if kernels.emulated:
        pytest.skip("the compiler sees the same op, whatever runs it")
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for shape in ((4, 3, 6, 6), (7, 3, 5, 6)):
        case = cases.Case(shape, "", layout="channels_last")
        mu, logvar = (x.requires_grad_() for x in inputs(case, torch.float32, device=kernels.device))
        value, eager = compiled(mu, logvar, Key(5)), loss(mu, logvar, Key(5))
        # The sums around the op are the compiler's, in an order of its own.
        assert torch.allclose(value, eager, rtol=1e-5)
        grads = torch.autograd.grad(value, (mu, logvar))
        for a, b in zip(grads, torch.autograd.grad(eager, (mu, logvar)), strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_goes_through_the_dispatcher_when_something_looks():
    mu, logvar = inputs(cases.Case((2, 3), ""), torch.float32)
    with torch.profiler.profile() as profile:
        ops.reparameterize(mu, logvar, Key(0))
    assert any(event.key == "gencore::reparameterize" for event in profile.key_averages())
    with torch._subclasses.fake_tensor.FakeTensorMode() as mode:
        fake = ops.reparameterize(*(mode.from_tensor(x) for x in (mu, logvar)), Key(0))
    assert fake.shape == (2, 3)
    mapped = torch.func.vmap(lambda a, b: ops.reparameterize(a, b, Key(0)))(mu, logvar)
    assert same_bits(mapped, torch.stack([ops.reparameterize(a, b, Key(0)) for a, b in zip(mu, logvar, strict=True)]))


def sampled(mu, logvar):
    return ops.reparameterize(mu, logvar, Key(3))


def test_transforms_of_torch_func():
    mu, logvar = inputs(cases.Case((4, 6), ""), torch.float32)
    want = torch.autograd.grad(sampled(mu, logvar.requires_grad_()).sum(), logvar)[0]
    logvar = logvar.detach()
    assert same_bits(torch.func.grad(lambda v: sampled(mu, v).sum())(logvar), want)
    assert same_bits(torch.func.jacrev(lambda v: sampled(mu, v))(logvar).sum((0, 1)), want)
    rows = [torch.func.grad(lambda v, m=m: sampled(m[None], v[None]).sum())(v) for m, v in zip(mu, logvar, strict=True)]
    mapped = torch.func.vmap(torch.func.grad(lambda v, m: sampled(m[None], v[None]).sum()))(logvar, mu)
    assert same_bits(mapped, torch.stack(rows))
    assert torch.func.grad(lambda v: torch.func.vmap(sampled)(mu, v).sum())(logvar).abs().min() > 0
    through = logvar.requires_grad_()
    (grad,) = torch.autograd.grad(torch.func.vmap(sampled)(mu, through).sum(), through)
    assert grad.abs().min() > 0


def test_library_op_has_the_gradient_too():
    mu, logvar = (x.requires_grad_() for x in inputs(cases.Case((4, 6), ""), torch.float32))
    outputs = [sampled(mu, logvar), torch.ops.gencore.reparameterize(mu, logvar, Key(3).packed)]
    for a, b in zip(*(torch.autograd.grad(z.square().sum(), (mu, logvar)) for z in outputs), strict=True):
        assert same_bits(a, b)


def test_autocast_keeps_the_inputs_dtype():
    mu, logvar = inputs(cases.Case((2, 3), ""), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        z, kl = ops.reparameterize_kl(mu, logvar, Key(0))
    assert (z.dtype, kl.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    rows, elements = 2, (1 << 30) + 3
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mu = torch.zeros(rows, elements, dtype=torch.bfloat16, device=device)
    logvar = torch.zeros(rows, elements, dtype=torch.bfloat16, device=device)
    z, kl = ops.reparameterize_kl(mu, logvar, Key(1))
    assert torch.equal(kl.cpu(), torch.zeros(rows))
    del mu, logvar
    want = ops.normal((1, elements), Key(1).samples(1), dtype=torch.bfloat16, device=device)
    # Not the bits: 0 + 1 * -0 is 0.
    assert torch.equal(z[1], want[0])


# ------------------------------------------------------------------------------------------------ contract

X = torch.zeros(2, 3)
KEY = Key(0)


@pytest.mark.parametrize("op", [ops.reparameterize, ops.reparameterize_kl])
@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        (([1.0], X), {}, TypeError, "mu must be a tensor, got list"),
        ((X, 2.0), {}, TypeError, "logvar must be a tensor, got float"),
        ((X.long(), X), {}, TypeError, "dtype of mu must be one of float32, bfloat16, float16, float64, got int64"),
        ((X, X.double()), {}, TypeError, "logvar must have the dtype of mu, torch.float32, got torch.float64"),
        ((X, X[:1]), {}, ValueError, r"logvar must have the shape of mu, \(2, 3\), got \(1, 3\)"),
        ((X.to_sparse(), X), {}, ValueError, "mu must be a dense .* tensor, got one of layout torch.sparse_coo"),
        ((torch.nested.nested_tensor([X]), X), {}, ValueError, "mu must be a dense .* tensor, got a nested tensor"),
        ((X.sum(), X.sum()), {}, ValueError, "mu must have at least one dimension"),
        ((X, X.to("meta")), {}, ValueError, "logvar must be on the device of mu, cpu, got meta"),
        ((X, X, 3), {}, TypeError, "key must be a gencore.Key or None, got int; gencore.Key"),
        ((X, X, Key(torch.arange(3))), {}, ValueError, "key must name 2 samples, .*, but names 3"),
        ((X, X), {"num_samples": 0}, ValueError, "num_samples must be at least 1, got 0"),
        ((X, X), {"num_samples": 2.0}, TypeError, "num_samples must be an int or None, got float"),
        ((X, X), {"num_samples": True}, TypeError, "num_samples must be an int or None, got bool"),
        ((X, X), {"num_samples": 2**33}, ValueError, r"must have at most 2\^34 elements per sample"),
    ],
)
def test_says_what_is_wrong(op, args, kwargs, error, message):
    with pytest.raises(error, match=message):
        op(*args, **kwargs)


def test_says_that_save_noise_is_no_number():
    for leaf in (X, X.clone().requires_grad_()):
        with pytest.raises(TypeError, match="save_noise must be True or False, got int"):
            ops.reparameterize(leaf, X, KEY, save_noise=1)


def test_default_key_follows_manual_seed():
    torch.manual_seed(3)
    first, second = ops.reparameterize(X, X), ops.reparameterize(X, X)
    torch.manual_seed(3)
    assert same_bits(ops.reparameterize(X, X), first)
    assert not torch.equal(first, second)
