"""Derivatives of second order and in forward mode, of every op, on every kind of kernels."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from kernels import BACKENDS
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

from gencore import Key, diffusion, nn, ops
from gencore.backends import choice
from gencore.backends.reference import attention as reference

F64 = torch.float64
SCHEDULE = diffusion.linear(50)
STEP = ops.step_coefficients(predict_x=1.1, predict_output=-0.4, x=0.3, x0=0.7, noise=0.2, log_scale_slope=0.3)


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


class Use(NamedTuple):
    """An op as a function of tensors of these shapes.

    ``stops``: whether its definition stops gradients, so that differences of values do not show its derivatives.
    """

    function: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    stops: bool = False


def loss(output: Tensor, x0: Tensor, **settings: Any) -> Tensor:
    t = torch.tensor([0, 7], device=x0.device)
    return ops.denoising_loss(output, x0, t, SCHEDULE, Key(1), **settings)


def given(output: Tensor, x0: Tensor, noise: Tensor, **settings: Any) -> Tensor:
    t = torch.tensor([0, 7], device=x0.device)
    return ops.denoising_loss(output, x0, t, SCHEDULE, noise=noise, **settings)


def bound(output: Tensor) -> Tensor:
    x0 = torch.full((2, 3, 4), 0.1, dtype=output.dtype, device=output.device)
    t = torch.tensor([0, 7], device=x0.device)
    return ops.variational_bound(output, x0, t, SCHEDULE, Key(1), variance="learned_range")


def known(x: Tensor, output: Tensor, second: Tensor, history: Tensor, pixels: Tensor) -> Tensor:
    mask = torch.ones(2, 1, 4, dtype=x.dtype, device=x.device) / 3
    row = ops.step_coefficients(second=0.2, predict_x=1.1, predict_output=-0.4, x=0.3, x0=0.7, history0=0.5, direct=0.1)
    return ops.diffusion_step(x, output, row, Key(1), second=second, history=(history,), known=pixels, mask=mask)


def adaptive(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, bias_in: Tensor) -> Tensor:
    return ops.group_norm(x, 2, weight, bias, scale=scale, shift=shift, bias_in=bias_in, activation="silu")


X = (2, 3, 4)
USES = {
    "reparameterize": Use(lambda mu, logvar: ops.reparameterize(mu, logvar, Key(1)), ((2, 5), (2, 5))),
    "several draws": Use(lambda mu, logvar: ops.reparameterize(mu, logvar, Key(1), num_samples=3), ((2, 5), (2, 5))),
    "reparameterize_kl": Use(lambda mu, logvar: ops.reparameterize_kl(mu, logvar, Key(1)), ((2, 5), (2, 5))),
    "the noise kept": Use(
        lambda *xs: ops.reparameterize(*xs, Key(1), num_samples=2, save_noise=True), ((2, 5), (2, 5))
    ),
    "add_noise": Use(lambda x0: ops.add_noise(x0, torch.tensor([0, 7], device=x0.device), SCHEDULE, Key(1)), (X,)),
    "denoising_loss": Use(loss, (X, X)),
    "noise at hand": Use(lambda *xs: given(*xs, parameterization="v"), (X, X, X)),
    "v, min_snr": Use(lambda *xs: loss(*xs, parameterization="v", weighting="min_snr"), (X, X)),
    "a learned variance": Use(lambda *xs: loss(*xs, bound_weight=1.0), ((2, 6, 4), X), stops=True),
    "variational_bound": Use(bound, ((2, 6, 4),), stops=True),
    "diffusion_step": Use(lambda x, output: ops.diffusion_step(x, output, STEP, Key(1)), (X, (2, 6, 4))),
    "a step of everything": Use(known, (X, X, X, X, X)),
    "group_norm": Use(lambda x, w, b: ops.group_norm(x, 2, w, b, eps=0.1), ((2, 4, 3, 2), (4,), (4,))),
    "group_norm, adaptive": Use(adaptive, ((2, 4, 3, 2), (4,), (4,), (2, 4), (2, 4), (2, 4))),
    "bias_act": Use(lambda x, b: ops.bias_act(x, b, "gelu", gain=1.3, clamp=0.9), ((2, 3, 2, 2), (3,))),
    "bias_act, from y": Use(
        lambda x, b: ops.bias_act(x, b, "leaky_relu", slope=0.3, gain=1.3, clamp=1.1), ((2, 3, 2, 2), (3,))
    ),
    "attention": Use(ops.attention, ((1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 4))),
    "attention, scaled": Use(
        lambda q, k, v: ops.attention(q, k, v, scale=-0.7), ((1, 1, 3, 2), (1, 1, 2, 2), (1, 1, 2, 2))
    ),
    "spatial_attention": Use(lambda qkv: ops.spatial_attention(qkv, 2), ((1, 12, 2, 2),)),
    "upfirdn2d": Use(lambda x, f: ops.upfirdn2d(x, f, 2, (1, 3), (1, 2, 0, 1), gain=0.7), ((1, 2, 3, 4), (2, 3))),
    "a separable filter": Use(ops.downsample2d, ((1, 2, 4, 3), (3,))),
}
every_use = pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
each_backend = pytest.mark.parametrize("kernels", BACKENDS, indirect=True)


def inputs(use: Use, device: str = "cpu", dtype: torch.dtype = F64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator, dtype=F64) for shape in use.shapes]
    return [x.to(device, dtype).requires_grad_() for x in drawn]


def smooth(use: Use) -> Callable[..., Tensor]:
    """A number whose second derivatives are not those of the op alone."""
    return lambda *xs: first(use.function(*xs)).sin().sum()


@each_backend
@every_use
def test_second_derivative(use, kernels):
    """That of differences, through the kernels of the op and of its gradient."""
    xs = inputs(use, kernels.device)
    if not use.stops:
        assert gradgradcheck(use.function, xs, fast_mode=kernels.interpreted)
        return
    # Of the definition, which forward mode runs.
    rows = torch.func.jacrev(torch.func.jacfwd(smooth(use)))(*(x.detach() for x in xs))
    (grad,) = torch.autograd.grad(smooth(use)(*xs), xs[:1], create_graph=True)
    weights = torch.randn(grad.shape, dtype=F64, generator=torch.Generator().manual_seed(1)).to(grad.device)
    (twice,) = torch.autograd.grad(grad, xs[:1], weights)
    want = torch.tensordot(weights, rows, dims=grad.dim())
    torch.testing.assert_close(twice, want, rtol=1e-6, atol=1e-9)


@each_backend
@every_use
def test_forward_mode(use, kernels):
    xs = inputs(use, kernels.device)
    if not use.stops:
        assert gradcheck(use.function, xs, check_forward_ad=True, check_backward_ad=False, fast_mode=True)
    tangents = [torch.randn(x.shape, dtype=F64).to(x.device) for x in xs]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x.detach(), t) for x, t in zip(xs, tangents, strict=True)]
        result, tangent = forward_ad.unpack_dual(first(use.function(*duals)))
    value = first(use.function(*xs))
    torch.testing.assert_close(result, value.detach(), rtol=1e-9, atol=1e-9)
    # Backwards it is the same number.
    grads = torch.autograd.grad(value, xs, torch.cos(value).detach(), allow_unused=True)
    along = sum((g * t).sum() for g, t in zip(grads, tangents, strict=True) if g is not None)
    torch.testing.assert_close((tangent * torch.cos(value)).sum().detach(), along, rtol=1e-8, atol=1e-9)


@every_use
def test_transforms_agree(use):
    """Forwards over backwards, backwards over forwards, backwards twice; mapped over; and of PyTorch's autograd."""
    xs = [x.detach() for x in inputs(use)]
    f = smooth(use)
    hessian = torch.func.hessian(f)(*xs)
    forwards, backwards = torch.func.jacfwd, torch.func.jacrev
    for outer, inner in ((backwards, backwards), (backwards, forwards), (forwards, forwards)):
        torch.testing.assert_close(outer(inner(f))(*xs), hessian, rtol=1e-8, atol=1e-10)
    autograd = torch.autograd.functional.hessian(lambda x: f(x, *xs[1:]), xs[0])
    torch.testing.assert_close(autograd, hessian, rtol=1e-8, atol=1e-10)

    def product(direction: Tensor) -> Tensor:
        return torch.func.jvp(lambda x: torch.func.grad(f)(x, *xs[1:]), (xs[0],), (direction,))[1]

    directions = torch.randn(3, *xs[0].shape, dtype=F64, generator=torch.Generator().manual_seed(2))
    mapped = torch.func.vmap(product)(directions)
    want = torch.stack([torch.tensordot(direction, hessian, dims=direction.dim()) for direction in directions])
    torch.testing.assert_close(mapped, want, rtol=1e-8, atol=1e-10)


def test_third_derivative():
    for use in (USES["attention"], USES["group_norm, adaptive"], USES["reparameterize_kl"]):
        xs = [x.detach() for x in inputs(use)]
        f = smooth(use)
        third = torch.func.jacrev(torch.func.jacrev(torch.func.grad(f)))(*xs)
        want = torch.func.jacfwd(torch.func.jacfwd(torch.func.jacfwd(f)))(*xs)
        torch.testing.assert_close(third, want, rtol=1e-7, atol=1e-9)
        (x,), rest = [xs[0].requires_grad_()], xs[1:]
        (grad,) = torch.autograd.grad(f(x, *rest), x, create_graph=True)
        (twice,) = torch.autograd.grad(grad.sum(), x, create_graph=True)
        (thrice,) = torch.autograd.grad(twice.sum(), x)
        dims = tuple(range(2 * x.dim()))
        torch.testing.assert_close(thrice, want.sum(dims), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    "name",
    [
        "reparameterize_kl",
        "denoising_loss",
        "diffusion_step",
        "group_norm",
        "attention",
        "spatial_attention",
        "upfirdn2d",
    ],
)
def test_compiled(name):
    """In the compiler, transforms run the definition."""
    use = USES[name]
    xs = [x.detach() for x in inputs(use)]
    f = smooth(use)

    def products(*xs: Tensor) -> tuple[Tensor, ...]:
        def grad(x: Tensor) -> Tensor:
            return torch.func.grad(f)(x, *xs[1:])

        once = torch.func.jvp(lambda x: f(x, *xs[1:]), (xs[0],), (torch.ones_like(xs[0]),))[1]
        twice = torch.func.jvp(grad, (xs[0],), (torch.ones_like(xs[0]),))[1]
        penalty = torch.func.grad(lambda x: grad(x).square().sum())(xs[0])
        return once, twice, penalty

    torch.compiler.reset()
    got = torch.compile(products, fullgraph=True)(*xs)
    torch.testing.assert_close(got, products(*xs), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name", ["reparameterize_kl", "denoising_loss", "group_norm, adaptive", "attention", "upfirdn2d"]
)
def test_every_type(name, dtype):
    """Derivatives have the type of what they are of, and are right to its precision."""
    use = USES[name]
    xs = inputs(use, dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in xs]

    def penalty(xs: list[Tensor]) -> list[Tensor]:
        grads = torch.autograd.grad(first(use.function(*xs)).double().square().sum(), xs, create_graph=True)
        return list(torch.autograd.grad(sum(g.double().square().sum() for g in grads), xs))

    unit = torch.finfo(dtype).eps
    for got, want, x in zip(penalty(xs), penalty(wide), xs, strict=True):
        assert got.dtype == dtype
        assert got.shape == x.shape
        # Some thirty roundings, of terms that cancel.
        torch.testing.assert_close(got.double(), want, rtol=0, atol=40 * unit * float(want.abs().max()))
    plain = [x.detach() for x in xs]
    tangent = torch.func.jvp(use.function, tuple(plain), tuple(plain))[1]
    want = torch.func.jvp(use.function, tuple(x.double() for x in plain), tuple(x.double() for x in plain))[1]
    assert first(tangent).dtype == first(use.function(*plain)).dtype
    limit = 20 * unit * float(first(want).abs().max())
    torch.testing.assert_close(first(tangent).double(), first(want), rtol=0, atol=limit)


def test_results_are_freed_at_once():
    """A result that its own graph kept would wait for the garbage collector."""
    x = torch.randn(1, 12, 4, 4, requires_grad=True)
    gc.disable()
    try:
        for op in (lambda: ops.spatial_attention(x, 2), lambda: ops.group_norm(x, 2), lambda: ops.attention(x, x, x)):
            alive = weakref.ref(op())
            assert alive() is None
    finally:
        gc.enable()


def test_keys_are_mapped_over():
    """Each key has noise of its own, in forward mode, twice backwards, and in the compiler."""
    mu, logvar, x0 = torch.randn(3, 3, 8, dtype=F64).unbind(0)
    seeds, t = torch.arange(4), torch.tensor([0, 7, 20])
    uses = (
        lambda x, seed: ops.reparameterize(x, logvar, Key(seed)),
        lambda x, seed: ops.add_noise(x, t, SCHEDULE, Key(seed)),
        lambda x, seed: ops.denoising_loss(x, x0, t, SCHEDULE, Key(seed)),
        lambda x, seed: ops.diffusion_step(x, x, STEP.clone(), Key(seed)),
    )
    for use in uses:

        def number(x: Tensor, seed: Tensor, use: Callable[..., Tensor] = use) -> Tensor:
            return use(x, seed).sin().sum()

        def tangent(seed: Tensor, number: Callable[..., Tensor] = number) -> Tensor:
            return torch.func.jvp(lambda x: number(x, seed), (mu,), (mu,))[1]

        def penalty(seed: Tensor, number: Callable[..., Tensor] = number) -> Tensor:
            return torch.func.grad(lambda x: torch.func.grad(number)(x, seed).square().sum())(mu)

        for of_seed in (tangent, penalty):
            want = torch.stack([of_seed(seed) for seed in seeds])
            assert len(want.reshape(4, -1).unique(dim=0)) == 4
            torch.testing.assert_close(torch.func.vmap(of_seed)(seeds), want, rtol=1e-9, atol=1e-9)
    mapped = torch.func.vmap(lambda seed: ops.reparameterize(mu, logvar, Key(seed)))
    torch.compiler.reset()
    assert torch.equal(torch.compile(mapped, fullgraph=True)(seeds), mapped(seeds))


def test_tangents_of_autograd_that_are_mapped_over():
    q, k, v = (torch.randn(1, 2, 3, 4, dtype=F64) for _ in range(3))
    factors = torch.tensor([1.0, 2.0, -1.0], dtype=F64)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, q)
        mapped = torch.func.vmap(lambda s: ops.attention(s * dual, k, v))(factors)
        tangent = forward_ad.unpack_dual(mapped).tangent
    want = torch.stack([torch.func.jvp(lambda q, s=s: ops.attention(s * q, k, v), (q,), (q,))[1] for s in factors])
    torch.testing.assert_close(tangent, want)


def test_at_the_limit_of_a_step_both_modes_agree():
    """Values of exactly 1, which pictures have, count as inside."""
    x = torch.tensor([[0.5, 1.0, -1.0, 1.5]], dtype=F64)
    row = ops.step_coefficients(predict_output=1.0, x0=1.0, limit=1.0)

    def step(output: Tensor) -> Tensor:
        return ops.diffusion_step(torch.zeros_like(x), output, row, Key(0))

    forwards = torch.func.jvp(step, (x,), (torch.ones_like(x),))[1]
    (backwards,) = torch.func.vjp(step, x)[1](torch.ones_like(x))
    assert forwards.tolist() == backwards.tolist() == [[1.0, 1.0, 1.0, 0.0]]


@pytest.mark.parametrize("name", ["spatial_attention", "group_norm, adaptive"])
def test_what_no_backend_has_a_kernel_for(name, monkeypatch):
    """As on GPUs: the definition is run, also where a mode looks on."""
    use = USES[name]
    x, *others = inputs(use)

    def number(x: Tensor) -> Tensor:
        return smooth(use)(x, *(other.detach() for other in others))

    want = torch.func.hessian(number)(x.detach())
    monkeypatch.setattr(choice, "has_kernel", lambda name, tensor: False)
    (grad,) = torch.autograd.grad(number(x), x, create_graph=True)
    with FlopCounterMode(display=False):
        (twice,) = torch.autograd.grad(grad, x, torch.ones_like(x), retain_graph=True)
    torch.testing.assert_close(twice, want.sum((0, 1, 2, 3)), rtol=1e-9, atol=1e-10)
    with FlopCounterMode(display=False):
        tangent = torch.func.jvp(number, (x.detach(),), (torch.ones_like(x),))[1]
    torch.testing.assert_close(tangent, grad.detach().sum(), rtol=1e-9, atol=1e-10)


def test_flops_are_counted():
    q, k, v = (torch.randn(1, 2, 16, 8, requires_grad=True) for _ in range(3))
    product = 2 * 2 * 16 * 16 * 8
    with FlopCounterMode(display=False) as counter:
        grads = torch.autograd.grad(ops.attention(q, k, v).sum(), (q, k, v), create_graph=True)
    assert counter.get_total_flops() == 7 * product
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(grads[0].sum(), q)
    assert counter.get_total_flops() == 17 * product


def test_autocast_around_derivatives_changes_nothing():
    """Definitions compute in float32 whatever autocast would have."""
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.group_norm(x, 2).sin().sum(), x, create_graph=True)
    (want,) = torch.autograd.grad(grad.square().sum(), x, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        (got,) = torch.autograd.grad(grad.square().sum(), x, create_graph=True)
        tangent = torch.func.jvp(lambda x: ops.group_norm(x, 2), (x.detach(),), (x.detach(),))[1]
    torch.testing.assert_close(got.detach(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tangent, torch.func.jvp(lambda x: ops.group_norm(x, 2), (x.detach(),), (x.detach(),))[1])


def test_under_autocast():
    q, k, v = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.attention(q, k, v)
        (grad,) = torch.autograd.grad(out.float().square().sum(), q, create_graph=True)
        (twice,) = torch.autograd.grad(grad.square().sum(), k)
        tangent = torch.func.jvp(ops.attention, (q.detach(), k.detach(), v.detach()), (q.detach(),) * 3)[1]
    assert out.dtype == tangent.dtype == torch.bfloat16
    assert twice.dtype == torch.float32
    assert bool(twice.isfinite().all())


def test_a_gradient_penalty_trains_through_norm_and_attention():
    """R1 of a discriminator: its gradient is PyTorch's, and descent lowers it."""
    torch.manual_seed(0)
    ours = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1),
        nn.GroupNorm(4, 16, activation="silu"),
        nn.SpatialSelfAttention(16, num_heads=2, num_groups=4),
        torch.nn.Conv2d(16, 1, 3),
    )
    images = torch.randn(2, 3, 8, 8)

    def penalty(network: torch.nn.Module) -> Tensor:
        x = images.clone().requires_grad_()
        (grad,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
        return grad.square().sum((1, 2, 3)).mean()

    def group_norm(x: Tensor, groups: int, *args: Any, **options: Any) -> Tensor:
        weight, bias = (*args, None, None)[:2]
        y = torch.nn.functional.group_norm(x, groups, weight, bias, 1e-5)
        return torch.nn.functional.silu(y) if options.get("activation") else y

    def spatial(qkv: Tensor, heads: int, **options: Any) -> Tensor:
        return reference.spatial_attention(qkv, heads)

    theirs = copy.deepcopy(ours)
    with mock.patch.object(ops, "group_norm", group_norm), mock.patch.object(ops, "spatial_attention", spatial):
        penalty(theirs).backward()
    before = penalty(ours)
    before.backward()
    for name, parameter in ours.named_parameters():
        want = theirs.get_parameter(name).grad
        if want is not None:
            torch.testing.assert_close(parameter.grad, want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))
    optimizer = torch.optim.Adam(ours.parameters(), lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        penalty(ours).backward()
        optimizer.step()
    assert float(penalty(ours)) < 0.7 * float(before)
