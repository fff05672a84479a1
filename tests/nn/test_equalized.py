"""Layers with an equalized learning rate."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from gencore.nn import EqualizedConv2d, EqualizedLinear


def test_linear_is_the_formula():
    torch.manual_seed(0)
    layer = EqualizedLinear(20, 7, activation="leaky_relu", lr_multiplier=0.1, bias_init=2.0).double()
    x = torch.randn(3, 4, 20, dtype=torch.float64)
    torch.testing.assert_close(layer.bias * 0.1, torch.full((7,), 2.0, dtype=torch.float64))
    want = math.sqrt(2) * F.leaky_relu(x @ (layer.weight * 0.1 / math.sqrt(20)).T + 2.0, 0.2)
    torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("resampled", [{}, {"up": 2}, {"down": 2}], ids=str)
def test_convolution_is_the_formula(resampled):
    torch.manual_seed(0)
    layer = EqualizedConv2d(3, 4, 3, activation="relu", **resampled).double()
    torch.nn.init.normal_(layer.bias)
    x, weight = torch.randn(2, 3, 6, 8, dtype=torch.float64), layer.weight / math.sqrt(27)
    f = torch.outer(*2 * [torch.tensor([1, 3, 3, 1], dtype=torch.float64) / 8]).expand(4, 1, 4, 4)
    if "up" in resampled:
        spread = F.pad(x, (3, 3, 3, 3))
        spread = F.conv_transpose2d(spread, torch.ones(3, 1, 1, 1, dtype=x.dtype), stride=2, output_padding=1, groups=3)
        # A pixel's image is the middle of four taps: two zeros before, one behind.
        want = 4 * F.conv2d(F.pad(F.conv2d(spread, weight, padding=1), (2, 1, 2, 1)), f, groups=4)[..., 6:-6, 6:-6]
    elif "down" in resampled:
        wide = F.conv2d(F.pad(x, (3, 3, 3, 3)), weight, padding=1)
        want = F.conv2d(wide, f, groups=4)[..., 2:-2:2, 2:-2:2]
    else:
        want = F.conv2d(x, weight, padding=1)
    want = math.sqrt(2) * F.relu(want + layer.bias[:, None, None])
    torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)


def test_a_constant_stays_one_when_resampled():
    for options in ({"up": 2}, {"down": 2}, {"up": 3, "filter": (1, 2, 3, 2, 1)}, {"down": 4, "filter": (1,) * 4}):
        layer = EqualizedConv2d(1, 1, 3, **options)
        torch.nn.init.constant_(layer.weight, 1 / 3)
        y = layer(torch.ones(1, 1, 48, 48))
        middle = y[..., y.shape[2] // 3 : -(y.shape[2] // 3), y.shape[3] // 3 : -(y.shape[3] // 3)]
        torch.testing.assert_close(middle, torch.ones_like(middle), rtol=1e-5, atol=1e-5)


def test_odd_sizes():
    x = torch.randn(1, 1, 7, 5)
    for kernel in (1, 3):
        assert EqualizedConv2d(1, 1, kernel, up=2)(x).shape == (1, 1, 14, 10)
        assert EqualizedConv2d(1, 1, kernel, down=2)(x).shape == (1, 1, 3, 2)


def test_updates_have_the_same_size_whatever_the_layer():
    """What the name says: after a step of Adam, the weights that are used have changed by the rate times the scale."""
    for multiplier in (1.0, 0.01):
        layer = EqualizedLinear(100, 3, lr_multiplier=multiplier)
        before = layer(torch.eye(100)).detach() - layer(torch.zeros(1, 100)).detach()
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
        layer(torch.randn(5, 100)).sum().backward()
        optimizer.step()
        change = (layer(torch.eye(100)) - layer(torch.zeros(1, 100)) - before).abs()
        assert change.mean().item() == pytest.approx(1e-3 * multiplier / 10, rel=1e-2)


def test_says_what_it_is():
    found = repr(EqualizedConv2d(3, 4, 3, bias=False, up=2, activation="silu", lr_multiplier=0.5))
    assert found == "EqualizedConv2d(3, 4, kernel_size=3, up=2, bias=False, activation='silu', lr_multiplier=0.5)"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: EqualizedLinear(0, 4), ValueError, "in_features must be at least 1, got 0"),
        (
            lambda: EqualizedLinear(3, 4, activation="swish"),
            ValueError,
            "activation must be one of linear, relu, leaky",
        ),
        (lambda: EqualizedLinear(3, 4, lr_multiplier=0), ValueError, "lr_multiplier must be a finite number above 0"),
        (lambda: EqualizedLinear(3, 4, gain="2"), TypeError, "gain must be a number, got str"),
        (lambda: EqualizedLinear(3, 4, bias_init=math.inf), ValueError, "bias_init must be a finite number, got inf"),
        (lambda: EqualizedConv2d(3, 4, 4), ValueError, "kernel_size must be odd, got 4"),
        (lambda: EqualizedLinear(3, 4)(torch.zeros(2, 4)), ValueError, r"input must have the shape \(..., 3\)"),
        (lambda: EqualizedConv2d(3, 4, 3)(torch.zeros(3, 4)), ValueError, r"input must have the shape \(N, 3, H, W\)"),
    ],
)
def test_says_what_is_wrong(make, error, message):
    with pytest.raises(error, match=message):
        make()
