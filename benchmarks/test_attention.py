"""Attention of dense heads, of views of a projection and of images, against PyTorch's own in every layout.

The floor is that of the products: two of queries by keys forward, five backward, one of which makes the probabilities
again that nobody keeps. The exponentials between them are not counted.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gencore import nn, ops
from gencore.bench import cases, limits, peers
from gencore.bench.cases import AttentionCase

CASES = cases.ATTENTION + cases.SPATIAL_ATTENTION
_PINNED = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
_FORWARD, _BACKWARD = 2, 5


def _is_image(case: AttentionCase) -> bool:
    return case.layout not in ("heads", "tokens")


def _is_of_heads(case: AttentionCase) -> bool:
    return not _is_image(case)


def _has_gradient(case: AttentionCase) -> bool:
    """Of the longest ones the pictures are decoded, not learned from; and of each case one layout."""
    return _is_of_heads(case) and case.queries < 16384 and not (case.layout == "heads" and case.queries == 4096)


ONLY = {
    "test_forward": _is_of_heads,
    "test_forward_and_backward": _has_gradient,
    "test_images": _is_image,
    "test_images_and_backward": lambda case: _is_image(case) and case.queries < 16384,
    "test_block": _is_image,
    "test_block_and_backward": lambda case: _is_image(case) and case.queries < 16384,
}


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest, case: AttentionCase, device: str) -> torch.dtype:
    if request.param == torch.float16 and (case.size != 64 or case.queries > 1024 or _is_image(case)):
        pytest.skip("as bfloat16, so one head size will do")
    if request.config.getoption("device") == "cuda" and request.param == torch.float32:
        pytest.skip("on GPUs networks with attention run in half precision")
    return request.param


def pinned(backend: SDPBackend) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


def on_copies(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())


def peers_of(case: AttentionCase, tensors: list[Tensor], device: str) -> dict[str, Callable[..., Tensor]]:
    found: dict[str, Callable[..., Tensor]] = {"SDPA": F.scaled_dot_product_attention}
    if case.layout == "tokens":
        found["SDPA, copies"] = on_copies
    if device == "cpu":
        # On GPUs the compiler calls the same kernels.
        found["compile"] = peers.compiled(lambda q, k, v: F.scaled_dot_product_attention(q, k, v))
        return found
    for name, backend in _PINNED.items():
        # It keeps tokens squared.
        if name == "math" and case.queries > 1024:
            continue
        candidate = pinned(backend)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # The reasons of a refusal are warnings.
            try:
                out = candidate(*tensors)
                if out.requires_grad:
                    torch.autograd.grad(out, tensors, torch.ones_like(out))
            except RuntimeError:
                continue
        found[name] = candidate
    return found


def through(function: Callable[..., Tensor], args: list[Tensor], g: Tensor) -> Callable[[], Any]:
    """Forward and backward."""
    return lambda: torch.autograd.grad(function(*args), args, g)


def test_forward(case, dtype, device, compare, our_triton):
    tensors = case.tensors(dtype, device)
    compare(
        lambda: ops.attention(*tensors),
        {name: lambda peer=peer: peer(*tensors) for name, peer in peers_of(case, tensors, device).items()}
        | our_triton("attention", *tensors, 1 / math.sqrt(case.size), None, False),
        limits.matmul_floor(_FORWARD * case.flops, dtype, device),
        "products",
    )


def test_forward_and_backward(case, dtype, device, compare):
    tensors = [tensor.detach().requires_grad_() for tensor in case.tensors(dtype, device)]
    g = torch.randn_like(tensors[0])
    compare(
        through(ops.attention, tensors, g),
        {name: through(peer, tensors, g) for name, peer in peers_of(case, tensors, device).items()},
        limits.matmul_floor((_FORWARD + _BACKWARD) * case.flops, dtype, device),
        "products",
    )


def peers_of_images(case: AttentionCase) -> dict[str, Callable[[Tensor], Tensor]]:
    def views(image: Tensor) -> Tensor:
        return peers.spatial_attention(image, case.heads)

    def copies(image: Tensor) -> Tensor:
        return peers.spatial_attention(image, case.heads, copies=True)

    return {"SDPA": views, "SDPA, copies": copies, "compile": peers.compiled(views)}


def test_images(case, dtype, device, compare):
    (image,) = case.tensors(dtype, device)
    compare(
        lambda: ops.spatial_attention(image, case.heads),
        {name: lambda peer=peer: peer(image) for name, peer in peers_of_images(case).items()},
        limits.matmul_floor(_FORWARD * case.flops, dtype, device),
        "products",
    )


def test_images_and_backward(case, dtype, device, compare):
    image = case.tensors(dtype, device)[0].requires_grad_()
    g = torch.randn_like(image[:, : case.heads * case.size])
    compare(
        through(lambda image: ops.spatial_attention(image, case.heads), [image], g),
        {name: through(peer, [image], g) for name, peer in peers_of_images(case).items()},
        limits.matmul_floor((_FORWARD + _BACKWARD) * case.flops, dtype, device),
        "products",
    )


def blocks(case: AttentionCase, dtype: torch.dtype, device: str) -> dict[str, tuple[torch.nn.Module, Tensor]]:
    """Ours and each peer, with the image it is given: the case's, or for the peers in the other format too."""
    channels = case.heads * case.size
    groups = math.gcd(32, channels)
    _, _, *spatial = case.image
    image = torch.randn(case.batch, channels, *spatial, dtype=dtype, device=device)
    found: dict[str, tuple[torch.nn.Module, Tensor]] = {}
    x = image.contiguous(memory_format=case.memory_format)
    ours = nn.SpatialSelfAttention(channels, num_heads=case.heads, num_groups=groups)
    found["ours"] = ours.to(device, dtype, memory_format=case.memory_format), x
    for name, layout in (("", torch.contiguous_format), (", channels_last", torch.channels_last)):
        block = peers.AttentionBlock(channels, case.heads, groups).to(device, dtype, memory_format=layout)
        given = x if layout is case.memory_format else image.contiguous(memory_format=layout)
        found[f"eager{name}"] = block, given
        found[f"compile{name}"] = peers.compiled(block), given
    return found


def _floor_of_block(case: AttentionCase, dtype: torch.dtype, device: str, backward: bool) -> float:
    """Three projections and one, of all pixels; backward each is two products, and none is made again."""
    channels = case.heads * case.size
    projections = 2 * case.batch * case.queries * channels * 4 * channels
    flops = _FORWARD * case.flops + projections
    if backward:
        flops += _BACKWARD * case.flops + 2 * projections
    return limits.matmul_floor(flops, dtype, device)


def test_block(case, dtype, device, compare):
    def without_gradient(block: torch.nn.Module, x: Tensor) -> Callable[[], Tensor]:
        return torch.no_grad()(lambda: block(x))

    candidates = {name: without_gradient(*one) for name, one in blocks(case, dtype, device).items()}
    compare(candidates.pop("ours"), candidates, _floor_of_block(case, dtype, device, backward=False), "products")


def test_block_and_backward(case, dtype, device, compare):
    def both_ways(block: torch.nn.Module, x: Tensor) -> Callable[[], Any]:
        x = x.detach().requires_grad_()
        return through(lambda *_: block(x), [x, *block.parameters()], torch.randn_like(x))

    candidates = {name: both_ways(*one) for name, one in blocks(case, dtype, device).items()}
    compare(candidates.pop("ours"), candidates, _floor_of_block(case, dtype, device, backward=True), "products")
