"""Modulated convolution against equations 1 to 3, image by image."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from gencore.nn import ModulatedConv2d


def blurred(x, before, behind):
    f = torch.tensor([1, 3, 3, 1], dtype=x.dtype) / 8
    kernel = torch.outer(f, f).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(F.pad(x, (before, behind, before, behind)), kernel, groups=x.shape[1])


def definition(layer, x, style):
    """An image at a time, from the equations; zeros are around the image before it is resampled or convolved."""
    results = []
    for image, vector in zip(x, style, strict=True):
        s = layer.affine.weight @ vector * layer.affine.weight_scale + layer.affine.bias
        w = layer.weight * layer.weight_scale * s[None, :, None, None]
        if layer.demodulate:
            w = w / w.square().sum((1, 2, 3), keepdim=True).sqrt()
        image, middle = image[None], layer.kernel_size // 2
        if layer.up == 2:
            around = F.pad(image, (2, 2, 2, 2))
            wide = F.conv2d(F.interpolate(around, scale_factor=2, mode="bilinear"), w, padding=middle)
            image = wide[..., 4:-4, 4:-4]
        elif layer.down == 2:
            image = blurred(F.conv2d(F.pad(image, (3, 3, 3, 3)), w, padding=middle), 0, 0)
            image = image[..., 2:-2:2, 2:-2:2]
        else:
            image = F.conv2d(image, w, padding=middle)
        results.append(image[0])
    return torch.stack(results)


def made(kernel=3, dtype=torch.float64, **options):
    torch.manual_seed(0)
    layer = ModulatedConv2d(5, 4, kernel, style_size=6, **options).to(dtype)
    return layer, torch.randn(3, 5, 6, 8, dtype=dtype), torch.randn(3, 6, dtype=dtype)


@pytest.mark.parametrize("scaled", ["activations", "weights"])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("options", [{}, {"up": 2}, {"down": 2}, {"demodulate": False}], ids=str)
def test_is_the_definition(kernel, options, scaled):
    layer, x, style = made(kernel, scaled=scaled, **options)
    found, want = layer(x, style), definition(layer, x, style)
    assert found.shape == want.shape
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)  # eps is 1e-8 of what is normalized
    args = (x.requires_grad_(), style.requires_grad_(), layer.weight, layer.affine.weight)
    pairs = [
        torch.autograd.grad((y * y.detach().cos()).sum(), args) for y in (layer(x, style), definition(layer, x, style))
    ]
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scaled", ["activations", "weights"])
def test_large_styles_stay_in_range_of_float16(scaled):
    layer, x, style = made(dtype=torch.float32, scaled=scaled)
    with torch.no_grad():
        layer.affine.weight.mul_(1e6)
    want = definition(layer.double(), x.double(), style.double())
    found = layer.float()(x.half(), style)
    assert found.isfinite().all()
    # Of the sums of 45 products of rounded numbers; each rounding is half of eps of values that are at most 4.
    torch.testing.assert_close(found.double(), want, rtol=0, atol=8 * torch.finfo(torch.float16).eps)


def test_results_have_unit_variance_whatever_the_style():
    torch.manual_seed(0)
    layer = ModulatedConv2d(64, 64, 3, style_size=8)
    x, style = torch.randn(4, 64, 16, 16), 100 * torch.randn(4, 8)
    # 4 * 64 * 14 * 14 values; the standard error of their variance is far below.
    assert layer(x, style)[..., 1:-1, 1:-1].var().item() == pytest.approx(1, abs=0.05)


def test_a_style_of_zeros_gives_zeros():
    layer, x, style = made()
    torch.nn.init.zeros_(layer.affine.bias)
    torch.nn.init.zeros_(layer.affine.weight)
    y = layer(x, style)
    assert torch.equal(y, torch.zeros_like(y))
    gradients = torch.autograd.grad(y.square().sum(), list(layer.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((5, 4, 2, 6), {}, ValueError, "kernel_size must be odd, got 2"),
        ((0, 4, 3, 6), {}, ValueError, "in_channels must be at least 1, got 0"),
        ((5, 4, 3, "6"), {}, TypeError, "style_size must be an int, got str"),
        ((5, 4, 3, 6), {"up": 2, "down": 2}, ValueError, "up or down must be 1, got up=2 and down=2"),
        ((5, 4, 3, 6), {"up": 0}, ValueError, "up must be at least 1, got 0"),
        ((5, 4, 3, 6), {"filter": ()}, TypeError, "filter must be a sequence of at least one number"),
        ((5, 4, 3, 6), {"filter": (1, -1)}, ValueError, "filter must have weights whose sum is not 0"),
        ((5, 4, 3, 6), {"scaled": "x"}, ValueError, 'scaled must be "activations" or "weights", got \'x\''),
    ],
)
def test_says_what_no_layer_has(args, options, error, message):
    with pytest.raises(error, match=message):
        ModulatedConv2d(*args, **options)


@pytest.mark.parametrize(
    ("x", "style", "error", "message"),
    [
        (torch.zeros(3, 4, 6, 6), torch.zeros(3, 6), ValueError, r"input must have the shape \(N, 5, H, W\)"),
        (torch.zeros(3, 5, 6, 6), torch.zeros(2, 6), ValueError, r"style must have the shape \(3, 6\), got \(2, 6\)"),
        (torch.zeros(3, 5, 6, 6), torch.zeros(3, 5), ValueError, r"style must have the shape \(3, 6\), got \(3, 5\)"),
        (torch.zeros(3, 5, 6, 6), None, TypeError, "style must be a tensor, got NoneType"),
        (
            torch.zeros(3, 5, 6, 6).long(),
            torch.zeros(3, 6),
            TypeError,
            "input must be of a floating dtype, got torch.int64",
        ),
    ],
)
def test_says_what_is_wrong(x, style, error, message):
    with pytest.raises(error, match=message):
        ModulatedConv2d(5, 4, 3, style_size=6)(x, style)
