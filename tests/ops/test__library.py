"""What every op owes PyTorch: transforms, tracers, counters, tensors without data."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from torch.autograd.functional import jacobian
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from gencore import Key, diffusion, ops
from gencore._ops import OPS

SCHEDULE = diffusion.linear(10)
T = torch.tensor([3, 7])
FILTER = torch.tensor([1.0, 2.0, 1.0]) / 4
ROWS = ops.step_coefficients(x=0.9, direct=0.1, x0=0.3, noise=0.5)

# Of a tensor (2, 3, 4), every op that has a gradient.
DIFFERENTIABLE = {
    "group_norm": lambda x: ops.group_norm(x, 3, x[0, :, 0], scale=x[:, :, 1], activation="silu"),
    "bias_act": lambda x: ops.bias_act(x, x[0, :, 0], "gelu", clamp=1.5),
    "bias_act, from y": lambda x: ops.bias_act(x, x[0, :, 0], "leaky_relu", clamp=1.5),
    "attention": lambda x: ops.attention(x[None], x[None] + 1, x[None]),
    "spatial_attention": lambda x: ops.spatial_attention(x, 1),
    "reparameterize": lambda x: ops.reparameterize(x, x, Key(0)),
    "reparameterize several": lambda x: ops.reparameterize(x, x, Key(0), num_samples=2),
    "reparameterize_kl": lambda x: ops.reparameterize_kl(x, x, Key(0)),
    "add_noise": lambda x: ops.add_noise(x, T, SCHEDULE, Key(0)),
    "denoising_loss": lambda x: ops.denoising_loss(x, x.square(), T, SCHEDULE, Key(0)),
    "variational_bound": lambda x: ops.variational_bound(
        torch.cat((x, x.cos()), 1), x.detach(), T, SCHEDULE, Key(0), variance="learned_range"
    ),
    "diffusion_step": lambda x: ops.diffusion_step(x, x.sin(), ROWS, Key(0), history=(x,)),
    "upfirdn2d": lambda x: ops.upfirdn2d(x[None], FILTER.to(x), up=2, padding=1)[0],
    "upsample2d": lambda x: ops.upsample2d(x[None], FILTER.to(x))[0],
    "downsample2d": lambda x: ops.downsample2d(x[None], FILTER.to(x))[0],
    "filter2d": lambda x: ops.filter2d(x[None], FILTER.to(x))[0],
}


# Of a tensor (2, 3, 4) and others like it to write to, every op that can.
WRITING = {
    "normal": lambda x, out: ops.normal(x.shape, Key(0), out=out),
    "uniform": lambda x, out: ops.uniform(x.shape, Key(0), out=out),
    "group_norm": lambda x, out: ops.group_norm(x, 3, x[0, :, 0], scale=x[:, :, 1], out=out),
    "bias_act": lambda x, out: ops.bias_act(x, x[0, :, 0], "silu", out=out),
    "add_noise": lambda x, out: ops.add_noise(x, T, SCHEDULE, Key(0), out=out),
    "diffusion_step": lambda x, out: ops.diffusion_step(x, x, ROWS, Key(0), out=out),
    "diffusion_step, prediction": lambda x, out: (ops.diffusion_step(x, x, ROWS, Key(0), prediction=out), out)[1],
}


def test_every_function_is_tried():
    functions = {name for op in OPS for name in op.functions}
    assert functions <= DIFFERENTIABLE.keys() | WRITING.keys()
    assert functions <= set(ops.__all__)


@pytest.fixture(params=DIFFERENTIABLE)
def differentiable(request):
    return DIFFERENTIABLE[request.param]


@pytest.mark.parametrize("way", ["eager", "library"])
@pytest.mark.parametrize("name", WRITING)
def test_what_is_written_to_is_any_tensor_and_autograd_is_told(name, way):
    x, write = torch.randn(2, 3, 4), WRITING[name]
    want = write(x, torch.empty_like(x))
    outs = {
        "dense": torch.empty(2, 3, 4),
        "strided": torch.empty(2, 4, 3).transpose(1, 2),
        "negative": torch.zeros(2, 3, 4, dtype=torch.complex64).conj().imag,
    }
    for kind, out in outs.items():
        version, memory = out._version, out.data_ptr()
        with FlopCounterMode(display=False) if way == "library" else torch.enable_grad():
            result = write(x, out)
        assert result is out
        assert out.data_ptr() == memory
        assert out._version > version
        assert torch.equal(out, want), kind
    weight = torch.ones(2, 3, 4, requires_grad=True)
    product = weight * outs["dense"]
    write(x, outs["dense"])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("way", ["eager", "library"])
def test_gradients_come_in_batches(differentiable, way):
    """``is_grads_batched=True``, as ``jacobian(vectorize=True)`` calls a backward pass."""
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    # A mode, even one that does nothing, keeps calls on the way through the dispatcher.
    with FlopCounterMode(display=False) if way == "library" else torch.enable_grad():
        got, want = (jacobian(differentiable, x, vectorize=vectorize) for vectorize in (True, False))
    torch.testing.assert_close(got, want)


def test_tensors_without_data(differentiable):
    x = torch.randn(2, 3, 4)

    def form(x):
        result = differentiable(x)
        return [(y.shape, y.dtype, y.stride()) for y in (result if isinstance(result, tuple) else (result,))]

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = form(mode.from_tensor(x))
    assert fake == form(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_meta_device(dtype, autocast):
    x, t = torch.empty(2, 6, 4, 4, dtype=dtype, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
    key = Key(0)
    with torch.autocast("cpu", enabled=autocast):
        for call in (
            lambda: ops.group_norm(x, 3, torch.empty(6, device="meta", dtype=dtype)),
            lambda: ops.attention(x, x, x),
            lambda: ops.reparameterize(x, x, key),
            lambda: ops.add_noise(x, t, SCHEDULE, key),
            lambda: ops.diffusion_step(x, x, ROWS, key, threshold=0.9),
            lambda: ops.normal(x.shape, key, dtype=dtype, device="meta"),
            lambda: ops.filter2d(x, torch.empty(3, 3, device="meta")),
        ):
            y = call()
            assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
        assert ops.spatial_attention(x, 2).shape == (2, 2, 4, 4)
        assert ops.denoising_loss(x, x, t, SCHEDULE, key).shape == (2,)


def test_tensors_without_memory_lie_apart():
    x, out, prediction = (torch.empty(2, 3, 4, device="meta") for _ in range(3))
    assert ops.diffusion_step(x, x, ROWS, Key(0), prediction=prediction).is_meta
    assert ops.diffusion_step(x, x, ROWS, Key(0), out=out, prediction=prediction) is out
    assert ops.add_noise(x, 3, SCHEDULE, Key(0), out=out) is out
    with pytest.raises(ValueError, match="out must not have several elements in one place"):
        ops.add_noise(x, 3, SCHEDULE, Key(0), out=out[:1].expand(2, 3, 4))
    drawn = diffusion.sample(lambda x, t: x, (2, 3), diffusion.ddpm(SCHEDULE, 3), Key(1), device="meta")
    assert drawn.is_meta
    assert drawn.shape == (2, 3)


# ------------------------------------------------------------------------------------------------ counters


def test_the_work_of_attention_is_counted_as_pytorchs():
    q, k = torch.randn(2, 3, 7, 4, requires_grad=True), torch.randn(2, 3, 5, 4, requires_grad=True)
    image = torch.randn(2, 12, 3, 3, requires_grad=True)
    product, of_image = 2 * 2 * 3 * 7 * 5 * 4, 2 * 2 * 2 * 9 * 9 * 2
    for call, one in ((lambda: ops.attention(q, k, k), product), (lambda: ops.spatial_attention(image, 2), of_image)):
        with FlopCounterMode(display=False) as forward:
            call()
        assert forward.get_total_flops() == 2 * one
        with FlopCounterMode(display=False) as both:
            call().sum().backward()
        assert both.get_total_flops() == (2 + 5) * one
        # Begun before anything counted.
        y = call().sum()
        with FlopCounterMode(display=False) as backward:
            y.backward()
        assert backward.get_total_flops() == 5 * one
        with FlopCounterMode(display=False) as nothing, torch.no_grad():
            ops.group_norm(image, 3)
        assert nothing.get_total_flops() == 0


# ------------------------------------------------------------------------------------------------ compilers


def test_eager_use_of_a_schedule_compiles_nothing_again():
    x, counter = torch.ones(2, 3), CompileCounter()

    def step(x, t, schedule, key):
        noised = ops.add_noise(x, t, schedule, key)
        return ops.denoising_loss(noised, x, t, schedule, key, weighting="min_snr")

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    schedules = [diffusion.linear(10), diffusion.cosine(10), diffusion.scaled_linear(10)]
    for i, schedule in enumerate((*schedules, *schedules)):
        key = Key(i)
        torch.testing.assert_close(compiled(x, T, schedule, key), step(x, T, schedule, key))
        with torch.inference_mode():
            step(x, T, schedule, key.stream(1))
    assert counter.frame_count == 1


class _Noisy(torch.nn.Module):
    def forward(self, x, key):
        return ops.reparameterize(x, x, key) + ops.normal((2, 3), key.stream(1))


@pytest.mark.parametrize("strict", [False, True])
def test_a_key_is_an_input_of_an_exported_program(strict):
    x = torch.randn(2, 3)
    program = torch.export.export(_Noisy(), (x, Key(0)), strict=strict).module()
    assert torch.equal(program(x, Key(9).samples(4)), _Noisy()(x, Key(9).samples(4)))


def test_a_key_goes_through_a_checkpoint():
    x = torch.randn(2, 3, requires_grad=True)
    (want,) = torch.autograd.grad(_Noisy()(x, Key(3)).sum(), x)
    (got,) = torch.autograd.grad(checkpoint(_Noisy(), x, Key(3), use_reentrant=False).sum(), x)
    assert torch.equal(got, want)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode):
    x, outside = torch.randn(2, 3), Key(1)

    def step(x, t, key):
        noised = ops.add_noise(x, t, SCHEDULE, outside) + ops.normal((2, 3), Key(4).fold_in(2))
        return ops.diffusion_step(noised, x, ROWS, key)

    traced = make_fx(step, tracing_mode=mode)(x, T, Key(5))
    assert torch.equal(traced(x, T, Key(6)), step(x, T, Key(6)))


class _Everything(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.schedule = diffusion.linear(10)

    def forward(self, x, t, key):
        noised, eps = ops.add_noise(x, t, self.schedule, key, return_noise=True)
        z, kl = ops.reparameterize_kl(x, noised, Key(3).stream(1))
        y = ops.diffusion_step(x, eps, ROWS, key.stream(2), history=(z,))
        y = y + ops.normal((x.shape[0], 3, 4), key) + ops.uniform(x.shape, Key(1)) + ops.reparameterize(x, x, key)
        y = (
            ops.bias_act(ops.group_norm(y, 3, activation="silu"), activation="silu")
            + ops.attention(y[None], y[None], y[None])[0]
        )
        losses = ops.denoising_loss(y, x, t, self.schedule, key) + ops.variational_bound(
            y, x, t, diffusion.linear(10), key
        )
        z = ops.downsample2d(ops.upsample2d(ops.filter2d(y[None], FILTER), FILTER), FILTER)
        y = y + ops.upfirdn2d(z, FILTER, padding=1)[0]
        return ops.spatial_attention(y, 1), kl, losses


def test_symbolic_trace_takes_functions_as_leaves():
    module, x = _Everything(), torch.randn(2, 3, 4)
    traced = torch.fx.symbolic_trace(module)
    for got, want in zip(traced(x, T, Key(5)), module(x, T, Key(5)), strict=True):
        assert torch.equal(got, want)
    called = {node.target for node in traced.graph.nodes if node.op == "call_function"}
    assert {getattr(ops, name) for name in ops.__all__ if name not in ("STEP_COLUMNS", "step_coefficients")} <= called


class _Named(torch.Tensor):
    """A subclass with PyTorch's own behavior."""


def test_subclasses_of_tensors_stay_what_they_are():
    plain = torch.randn(2, 3, 4)
    x = plain.as_subclass(_Named)
    for function in (lambda x: ops.group_norm(x, 3), lambda x: ops.reparameterize(x, x, Key(0))):
        assert type(function(x)) is _Named
        assert torch.equal(function(x).as_subclass(torch.Tensor), function(plain))
