"""Noise of a key, as strong as is learned."""

from __future__ import annotations

import pytest
import torch

from gencore import Key, ops
from gencore.nn import NoiseInjection


@pytest.mark.parametrize("per_channel", [False, True])
def test_is_the_formula(per_channel):
    layer, x = NoiseInjection(3, per_channel=per_channel, stream=4), torch.randn(2, 3, 4, 5)
    assert torch.equal(layer(x, Key(1)), x)
    torch.nn.init.normal_(layer.strength)
    noise = ops.normal((2, 1, 4, 5), Key(1).stream(4))
    want = x + layer.strength.reshape(-1, 1, 1) * noise
    assert torch.equal(layer(x, Key(1)), want)
    channels_last = x.to(memory_format=torch.channels_last)
    assert torch.equal(layer(channels_last, Key(1)), want)
    assert torch.equal(layer(x[1:], Key(1).samples(1)), want[1:])
    assert not torch.equal(layer(x, Key(2)), want)


def test_without_a_key_torchs_generator_says():
    layer, x = NoiseInjection(3), torch.zeros(2, 3, 4, 5)
    torch.nn.init.ones_(layer.strength)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: NoiseInjection(0), ValueError, "channels must be at least 1, got 0"),
        (lambda: NoiseInjection(3, stream=-1), ValueError, "stream must be at least 0, got -1"),
        (lambda: NoiseInjection(3)(torch.zeros(2, 4, 2, 2)), ValueError, r"input must have the shape \(N, 3, H, W\)"),
    ],
)
def test_says_what_is_wrong(make, error, message):
    with pytest.raises(error, match=message):
        make()
