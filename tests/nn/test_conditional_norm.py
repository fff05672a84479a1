"""Batch norm with a scale and a shift per class."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from gencore.nn import ConditionalBatchNorm2d


def made(channels=3, classes=5, dtype=torch.float32):
    torch.manual_seed(0)
    norm = ConditionalBatchNorm2d(channels, classes).to(dtype)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    return norm


LABELS = torch.tensor([4, 0, 0, 2])


def definition(norm, x, labels):
    mean = x.mean((0, 2, 3), keepdim=True)
    std = (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    return norm.weight[labels][:, :, None, None] * (x - mean) / std + norm.bias[labels][:, :, None, None]


def test_starts_as_batch_norm_without_a_class():
    norm, x = ConditionalBatchNorm2d(3, 5), torch.randn(4, 3, 5, 6)
    plain = torch.nn.BatchNorm2d(3, affine=False)
    assert torch.equal(norm(x, LABELS), plain(x))
    assert torch.equal(norm.norm.running_var, plain.running_var)
    assert torch.equal(norm.eval()(x, LABELS), plain.eval()(x))


def test_is_the_formula():
    norm, x = made(dtype=torch.float64), torch.randn(4, 3, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(norm(x, LABELS), definition(norm, x, LABELS), rtol=1e-12, atol=1e-12)


def test_derivatives():
    norm = made(dtype=torch.float64)
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)

    def function(x, weight, bias):
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x, LABELS))

    inputs = (x, norm.weight, norm.bias)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_only_the_classes_of_the_batch_have_gradients():
    norm = made()
    norm(torch.randn(4, 3, 5, 6), LABELS).square().sum().backward()
    assert norm.weight.grad.abs().sum(1).bool().tolist() == [True, False, True, False, True]


def test_samples_do_not_depend_on_the_batch_in_evaluation_mode():
    norm, x = made(), torch.randn(4, 3, 5, 6)
    norm(x, LABELS)
    norm.eval()
    assert torch.equal(norm(x, LABELS)[2:], norm(x[2:], LABELS[2:]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_formats(dtype):
    norm, x = made(), torch.randn(4, 3, 5, 6).to(dtype).to(memory_format=torch.channels_last)
    found = norm(x, LABELS)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    want = definition(norm.double(), x.double(), LABELS).detach()
    # Four roundings: of what is normalized, of scale and shift, of the result.
    largest = (want.abs().max() + norm.bias.detach().abs().max()).item()
    torch.testing.assert_close(found.double(), want, rtol=0, atol=4 * torch.finfo(dtype).eps / 2 * largest)


def test_it_compiles_to_one_graph():
    norm, x = made(), torch.randn(4, 3, 5, 6)
    compiled = torch.compile(copy.deepcopy(norm), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, LABELS), norm(x, LABELS))


def test_it_is_synchronized_like_other_batch_norms():
    found = torch.nn.SyncBatchNorm.convert_sync_batchnorm(made())
    assert isinstance(found.norm, torch.nn.SyncBatchNorm)
    x = torch.randn(4, 3, 5, 6)
    norm = made().eval()
    want = F.batch_norm(x, norm.norm.running_mean, norm.norm.running_var)
    want = torch.addcmul(norm.bias[LABELS][..., None, None], norm.weight[LABELS][..., None, None], want)
    torch.testing.assert_close(norm(x, LABELS), want)


@pytest.mark.parametrize(
    ("x", "labels", "error", "message"),
    [
        (torch.zeros(4, 2, 5, 5), LABELS, ValueError, r"input must have the shape \(N, 3, H, W\), got \(4, 2, 5, 5\)"),
        (torch.zeros(4, 3, 5), LABELS, ValueError, r"input must have the shape \(N, 3, H, W\), got \(4, 3, 5\)"),
        (torch.zeros(4, 3, 5, 5), LABELS.int(), TypeError, "labels must be a tensor of int64, got torch.int32"),
        (torch.zeros(4, 3, 5, 5), [1, 2, 3, 4], TypeError, "labels must be a tensor of int64, got list"),
        (torch.zeros(4, 3, 5, 5), LABELS[:3], ValueError, r"labels must have the shape \(4,\)"),
        (torch.zeros(4, 3, 5, 5), LABELS + 1, ValueError, "labels must be from 0 to 4, got one of 5"),
        (torch.zeros(4, 3, 5, 5), LABELS - 1, ValueError, "labels must be from 0 to 4, got one of -1"),
    ],
)
def test_says_what_is_wrong(x, labels, error, message):
    norm = made()
    with pytest.raises(error, match=message):
        norm(x, labels)
    assert norm.norm.num_batches_tracked == 0  # nothing has been written


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((0, 5), ValueError, "channels must be at least 1, got 0"),
        ((3, 0), ValueError, "num_classes must be at least 1, got 0"),
        ((3.0, 5), TypeError, "channels must be an int, got float"),
    ],
)
def test_says_what_no_norm_has(args, error, message):
    with pytest.raises(error, match=message):
        ConditionalBatchNorm2d(*args)
