"""The module in the place of PyTorch's own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

from gencore import nn, ops


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}, {"eps": 1e-3}], ids=str)
def test_takes_the_place_of_pytorchs(options):
    theirs = torch.nn.GroupNorm(4, 12, **options)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    ours = nn.GroupNorm(4, 12, **options)
    assert isinstance(ours, torch.nn.GroupNorm)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    for shape in ((2, 12), (2, 12, 5), (2, 12, 5, 6), (2, 12, 3, 4, 5)):
        x, same = (torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True) for _ in range(2))
        y, want = ours(x), theirs(same)
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
        g = torch.randn(shape)
        y.backward(g)
        want.backward(g)
        torch.testing.assert_close(x.grad, same.grad, rtol=1e-4, atol=1e-5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_activation_and_modulation():
    norm = nn.GroupNorm(4, 12, activation="silu")
    torch.nn.init.normal_(norm.weight)
    x, scale, shift, bias_in = torch.randn(2, 12, 5, 5), *torch.randn(3, 2, 12)
    plain = F.group_norm(x + bias_in[..., None, None], 4, norm.weight, norm.bias)
    want = F.silu(plain * (1 + scale[..., None, None]) + shift[..., None, None])
    torch.testing.assert_close(norm(x, scale=scale, shift=shift, bias_in=bias_in), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm(x), F.silu(F.group_norm(x, 4, norm.weight, norm.bias)), rtol=1e-5, atol=1e-5)


def test_says_its_activation_and_survives_copies():
    norm = nn.GroupNorm(4, 12, activation="silu")
    assert repr(norm).startswith("GroupNorm(4, 12, eps=1e-05, affine=True")
    assert repr(norm).endswith("activation='silu')")
    assert "activation" not in repr(nn.GroupNorm(4, 12))
    x = torch.randn(2, 12, 3)
    for same in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(same(x), norm(x))


def test_half_precision_modules_and_mixed_ones():
    x = torch.randn(2, 12, 5, 5)
    want = nn.GroupNorm(4, 12)(x)
    half = nn.GroupNorm(4, 12).to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    # float32 parameters with a half-precision tensor: what autocast makes of a convolution before it.
    mixed = nn.GroupNorm(4, 12)(x.bfloat16())
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), want, rtol=2e-2, atol=2e-2)


def test_inside_a_compiled_network():
    torch._dynamo.reset()
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 12, 3), nn.GroupNorm(4, 12, activation="silu"), torch.nn.Flatten())
    compiled = torch.compile(net, fullgraph=True)
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(compiled(x), net(x))
    compiled(x).sum().backward()
    assert net[1].weight.grad is not None


def test_trains_with_channels_last_and_keeps_it():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 12, 3), nn.GroupNorm(4, 12, activation="silu"))
    net = net.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        y = net(x)
        assert y.is_contiguous(memory_format=torch.channels_last)
        loss = (y - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((4, 10), {}, "must be divisible by"),
        ((4, 12), {"activation": "relu"}, "activation must be \"silu\" or None, got 'relu'"),
    ],
)
def test_says_what_is_wrong(args, options, message):
    with pytest.raises(ValueError, match=message):
        nn.GroupNorm(*args, **options)


def test_is_the_op():
    norm, x = nn.GroupNorm(4, 12), torch.randn(2, 12, 5)
    assert torch.equal(norm(x), ops.group_norm(x, 4, norm.weight, norm.bias))
