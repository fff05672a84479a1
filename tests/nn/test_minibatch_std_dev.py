"""The deviation over a minibatch as a feature."""

from __future__ import annotations

import pytest
import torch

from gencore.nn import MinibatchStdDev, PixelNorm


@pytest.mark.parametrize("n", range(2, 14))
@pytest.mark.parametrize(("group_size", "channels"), [(4, 1), (3, 2), (None, 3)])
def test_every_batch_has_groups(n, group_size, channels):
    x = torch.randn(n, 6, 3, 2, dtype=torch.float64)
    found = MinibatchStdDev(group_size, channels)(x)
    assert torch.equal(found[:, :6], x)
    groups = 1 if group_size is None else max(n // group_size, 1)
    for i in range(n):
        others = x[i % groups :: groups]
        assert len(others) >= min(n, group_size or n)
        for channel, part in enumerate(others.chunk(channels, 1)):
            want = (part.var(0, correction=0) + 1e-8).sqrt().mean()
            torch.testing.assert_close(found[i, 6 + channel], want.expand(3, 2), rtol=1e-10, atol=0)


def test_equal_images_deviate_by_nothing():
    x = torch.randn(1, 4, 3, 3).expand(4, -1, -1, -1).requires_grad_()
    found = MinibatchStdDev()(x)[:, 4:]
    assert found.max() < 2e-4  # the root of 1e-8
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert gradient.isfinite().all()


def test_vectors_have_one_too():
    assert MinibatchStdDev(2)(torch.randn(4, 5)).shape == (4, 6)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MinibatchStdDev()(torch.zeros(1, 4, 2, 2)), ValueError, "input must hold at least 2 images"),
        (
            lambda: MinibatchStdDev(4, 3)(torch.zeros(4, 4)),
            ValueError,
            "input must have a multiple of 3 channels, got 4",
        ),
        (lambda: MinibatchStdDev()(torch.zeros(4)), ValueError, r"input must have the shape \(N, C, ...\), got \(4,\)"),
        (lambda: MinibatchStdDev()(torch.zeros(4, 2).int()), TypeError, "input must be of a floating dtype"),
        (lambda: MinibatchStdDev(1), ValueError, "group_size must be at least 2, got 1"),
        (lambda: MinibatchStdDev(4, 0), ValueError, "channels must be at least 1, got 0"),
        (lambda: PixelNorm(0), ValueError, "eps must be a finite number above 0, got 0"),
        (lambda: PixelNorm()([1.0]), TypeError, "input must be a tensor, got list"),
    ],
)
def test_says_what_is_wrong(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_pixel_norm():
    x = 5 * torch.randn(2, 8, 3, 3)
    y = PixelNorm()(x)
    torch.testing.assert_close(y.square().mean(1), torch.ones(2, 3, 3))
    torch.testing.assert_close(y * x.square().mean(1, keepdim=True).sqrt(), x)
    large = torch.full((1, 2), 60000, dtype=torch.float16)  # its square is not a float16
    assert torch.equal(PixelNorm()(large), torch.ones_like(large))
