"""What all layers of GANs share: derivatives, half precision, memory formats, the compiler, splits of a batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from gencore import Key, nn


class Layer(NamedTuple):
    make: Callable[[], torch.nn.Module]
    shape: Sequence[int]  # of the input
    size: int = 0  # of the style
    key: Key | None = None
    depends_on_batch: bool = False

    def call(self, module: torch.nn.Module, x: Tensor, style: Tensor | None = None) -> Tensor:
        others = [other for other in (style, self.key) if other is not None]
        return module(x, *others)


LAYERS = {
    "PixelNorm": Layer(nn.PixelNorm, (4, 3, 2, 3)),
    "MinibatchStdDev": Layer(lambda: nn.MinibatchStdDev(3, channels=2), (7, 4, 2, 3), depends_on_batch=True),
    "EqualizedLinear": Layer(lambda: nn.EqualizedLinear(5, 3, activation="silu", lr_multiplier=0.5), (4, 5)),
    "EqualizedConv2d": Layer(lambda: nn.EqualizedConv2d(2, 3, 3, activation="softplus"), (2, 2, 4, 3)),
    "EqualizedConv2d, up": Layer(lambda: nn.EqualizedConv2d(2, 3, 3, up=2), (2, 2, 2, 3)),
    "EqualizedConv2d, down": Layer(lambda: nn.EqualizedConv2d(2, 3, 3, down=2), (2, 2, 4, 6)),
    "ModulatedConv2d": Layer(lambda: nn.ModulatedConv2d(2, 3, 3, 4), (2, 2, 4, 3), 4),
    "ModulatedConv2d, up": Layer(lambda: nn.ModulatedConv2d(2, 3, 3, 4, up=2), (2, 2, 2, 3), 4),
    "ModulatedConv2d, down": Layer(lambda: nn.ModulatedConv2d(2, 3, 1, 4, down=2), (2, 2, 4, 6), 4),
    "ModulatedConv2d, weights": Layer(lambda: nn.ModulatedConv2d(2, 3, 3, 4, scaled="weights"), (2, 2, 4, 3), 4),
    "ModulatedConv2d, colours": Layer(lambda: nn.ModulatedConv2d(2, 3, 1, 4, demodulate=False), (2, 2, 4, 3), 4),
    "NoiseInjection": Layer(lambda: nn.NoiseInjection(3, stream=2), (4, 3, 2, 3), key=Key(5)),
    "NoiseInjection, per channel": Layer(lambda: nn.NoiseInjection(3, per_channel=True), (4, 3, 2, 3), key=Key(5)),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]


def made(layer, dtype=torch.float32):
    """The module with parameters that are not what they start as, and inputs."""
    torch.manual_seed(0)
    module = layer.make().to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(layer.shape, dtype=dtype)
    style = torch.randn(layer.shape[0], layer.size, dtype=dtype) if layer.size else None
    return module, x, style


def test_derivatives(layer):
    module, x, style = made(layer, torch.float64)
    names = [name for name, _ in module.named_parameters()]

    def function(*args: Any) -> Tensor:
        parameters = dict(zip(names, args[: len(names)], strict=True))
        inputs = [*args[len(names) :], *([layer.key] if layer.key else [])]
        return torch.func.functional_call(module, parameters, tuple(inputs))

    args = [*module.parameters(), x.requires_grad_(), *([style.requires_grad_()] if style is not None else [])]
    assert torch.autograd.gradcheck(function, args)
    # A random direction each: all of them take many seconds.
    assert torch.autograd.gradgradcheck(function, args, fast_mode=True)
    tangents = [torch.randn_like(arg) for arg in args]
    _, forward = torch.func.jvp(function, tuple(args), tuple(tangents))
    y = function(*args)
    factor = torch.randn_like(y)
    gradients = torch.autograd.grad((y * factor).sum(), args)
    backward = sum((gradient * tangent).sum() for gradient, tangent in zip(gradients, tangents, strict=True))
    torch.testing.assert_close((forward * factor).sum(), backward, rtol=1e-10, atol=1e-10)


def in_float64(layer, module, x, style):
    """What the module makes of the same numbers in float64."""
    return layer.call(copy.deepcopy(module).double(), x.double(), None if style is None else style.double())


def half_bound(dtype, want):
    """Weights, inputs, sums, scales and results are rounded, each by half of eps, of values below twice the largest."""
    return 8 * torch.finfo(dtype).eps * max(want.abs().max().item(), 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(layer, dtype):
    module, x, style = made(layer)
    x, style = x.to(dtype), None if style is None else style.to(dtype)
    for variant in (module, copy.deepcopy(module).to(dtype)):
        found, want = layer.call(variant, x, style), in_float64(layer, variant, x, style)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), want, rtol=0, atol=half_bound(dtype, want))


def test_autocast_is_near_full_precision(layer):
    module, x, style = made(layer)
    want = in_float64(layer, module, x, style)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer.call(module, x.requires_grad_(), style)
    torch.testing.assert_close(found.double(), want, rtol=0, atol=half_bound(torch.bfloat16, want))
    found.sum().backward()
    for leaf in (x, *module.parameters()):
        assert leaf.grad.dtype == torch.float32
        assert leaf.grad.isfinite().all()


def test_channels_last_stays(layer):
    module, x, style = made(layer)
    if x.dim() != 4:
        pytest.skip("no images")
    found = layer.call(module, x.to(memory_format=torch.channels_last), style)
    torch.testing.assert_close(found, layer.call(module, x, style), rtol=1e-5, atol=1e-5)
    if layer.make is not LAYERS["ModulatedConv2d, weights"].make:  # the images are channels there
        assert found.is_contiguous(memory_format=torch.channels_last)


def test_a_part_of_a_batch_is_the_same(layer):
    module, x, style = made(layer)
    whole = layer.call(module, x, style)
    rest = layer._replace(key=layer.key and layer.key.samples(1))
    part = rest.call(module, x[1:], None if style is None else style[1:])
    # Matrix products of other sizes sum in another order.
    assert torch.allclose(part, whole[1:], rtol=1e-5, atol=1e-6) is not layer.depends_on_batch


def test_no_images(layer):
    module, x, style = made(layer)
    whole = layer.call(module, x, style)
    found = layer.call(module, x[:0], None if style is None else style[:0])
    assert found.shape == (0, *whole.shape[1:])


def test_it_compiles_to_one_graph(layer):
    module, x, style = made(layer)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(layer.call(compiled, x, style), layer.call(module, x, style), rtol=1e-5, atol=1e-5)


def test_parameters_start_again(layer):
    torch.manual_seed(0)
    module = layer.make()
    if next(module.parameters(), None) is None:
        pytest.skip("no parameters")
    want = copy.deepcopy(module.state_dict())
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, 7)
    torch.manual_seed(0)
    module.reset_parameters()
    assert all(torch.equal(value, want[name]) for name, value in module.state_dict().items())
    assert type(module).__name__ in repr(module)
