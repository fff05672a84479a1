"""Attention among the pixels of images, alone and in its block, against PyTorch's own in every layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gencore import nn, ops
from gencore.bench import cases, peers
from gencore.bench.cases import AttentionCase
from gencore.bench.limits import Work
from gencore.bench.suite.base import (
    TOLERANCES,
    Benchmark,
    Comparison,
    bound,
    double,
    gradient_call,
    largest_error,
    on_backends,
)

# Products of queries by keys: forward, and with the backward pass, which makes the probabilities again.
FORWARD, PRODUCTS = 2, 2 + 5
# On GPUs networks with attention run in half precision.
DTYPES = {"cpu": (torch.float32, torch.bfloat16, torch.float16), "cuda": (torch.bfloat16, torch.float16)}
# Of tokens squared and channels, what the definition takes a second for in float64.
_JUDGED = 1 << 30


def is_image(case: AttentionCase) -> bool:
    return case.layout not in ("heads", "tokens")


def wanted(case: AttentionCase, dtype: torch.dtype) -> bool:
    """float16 is as bfloat16, so one head size will do."""
    return dtype != torch.float16 or (case.size == 64 and case.queries <= 1024 and not is_image(case))


def _learns(case: AttentionCase, dtype: torch.dtype) -> bool:
    return wanted(case, dtype) and case.queries < 16384


def flops(case: AttentionCase, backward: bool) -> int:
    """Of the products and of the softmax between them.

    For each query and key that scales, finds the largest, subtracts it, exponentiates and sums: 5. Backward makes it
    again from the logarithm of the sum, 3; subtracts the row's share of the gradient and multiplies, 2; scales, 1.
    """
    pairs = case.batch * case.heads * case.queries * case.keys
    return (PRODUCTS if backward else FORWARD) * case.flops + (11 if backward else 5) * pairs


def rows_judged(case: AttentionCase) -> int:
    """Queries of the first sample's first head that are compared: all, or what takes about a second."""
    return min(case.queries, max(1, _JUDGED // max(1, case.keys * case.size)))


def _first_head(case: AttentionCase, images: int) -> Callable[[Tensor], Tensor]:
    """Of the first sample of ``images`` images one after the other, each one's first head."""

    def first(image: Tensor) -> Tensor:
        return image[:1].unflatten(1, (images, case.heads, case.size))[:, :, 0].flatten(1, 2)

    return first


def _peers(case: AttentionCase) -> dict[str, Callable[[Tensor], Tensor]]:
    def views(image: Tensor) -> Tensor:
        return peers.spatial_attention(image, case.heads)

    def copies(image: Tensor) -> Tensor:
        return peers.spatial_attention(image, case.heads, copies=True)

    return {"eager": views, "eager, copies": copies, "compile": peers.compiled(views)}


def _in_channels_last(case: AttentionCase, image: Tensor) -> Tensor | None:
    """The image in the format that a user of PyTorch could change to; None where it is in it."""
    if case.layout != "contiguous":
        return None
    return image.detach().to(memory_format=torch.channels_last).requires_grad_(image.requires_grad)


def forward(case: AttentionCase, dtype: torch.dtype, device: str) -> Comparison:
    (image,) = case.tensors(dtype, device)
    first = _first_head(case, 1)
    rows = rows_judged(case)

    def ours() -> Tensor:
        return ops.spatial_attention(image, case.heads)

    def expected() -> Tensor:
        (qkv,) = double(_first_head(case, 3)(image))
        # (1, 3 size, tokens) to heads of the queries that are judged.
        q, k, v = qkv.flatten(2).unflatten(1, (3, 1, case.size)).transpose(-1, -2).unbind(1)
        out = torch.nn.functional.scaled_dot_product_attention(
            q[:, :, :rows].contiguous(), k.contiguous(), v.contiguous()
        )
        return out.squeeze(1).transpose(1, 2)

    calls: dict[str, Callable[[], Any]] = {"ours": ours, **on_backends(ours, device)}
    calls |= bound(_peers(case), image)
    if (moved := _in_channels_last(case, image)) is not None:
        calls["eager, channels_last"] = lambda: peers.spatial_attention(moved, case.heads)
    return Comparison(
        calls,
        Work(nbytes=image.nbytes * 4 // 3, products=FORWARD * case.flops, flops=flops(case, backward=False)),
        largest_error(expected, of=lambda out: first(out).flatten(2)[:, :, :rows]),
        TOLERANCES[dtype],
    )


def forward_and_backward(case: AttentionCase, dtype: torch.dtype, device: str) -> Comparison:
    image = case.tensors(dtype, device)[0].requires_grad_()
    g = torch.randn_like(image[:, : case.heads * case.size])
    whole = rows_judged(case) >= case.queries
    rows = rows_judged(case)

    def expected() -> Any:
        (qkv,) = double(_first_head(case, 3)(image.detach()).flatten(2))
        q, k, v = (part.unsqueeze(1) for part in qkv.unflatten(1, (3, case.size)).transpose(-1, -2).unbind(1))
        q, k, v = (tensor.contiguous().requires_grad_() for tensor in (q[:, :, :rows], k, v))
        given = _first_head(case, 1)(g).double().flatten(2).transpose(1, 2).unsqueeze(1)[:, :, :rows].contiguous()
        found = gradient_call(torch.nn.functional.scaled_dot_product_attention, (q, k, v), given)()
        of_q, of_k, of_v = (tensor.squeeze(1).transpose(1, 2) for tensor in found)
        # Those of keys and values need every query.
        return (of_q, of_k, of_v) if whole else (of_q, None, None)

    def of(result: Any) -> Any:
        of_q, of_k, of_v = _first_head(case, 3)(result[0]).flatten(2).chunk(3, dim=1)
        return of_q[:, :, :rows], of_k, of_v

    def ours(image: Tensor) -> Tensor:
        return ops.spatial_attention(image, case.heads)

    mine = gradient_call(ours, [image], g)
    calls = {"ours": mine, **on_backends(mine, device)}
    calls |= {name: gradient_call(peer, [image], g) for name, peer in _peers(case).items()}
    if (moved := _in_channels_last(case, image)) is not None:
        calls["eager, channels_last"] = gradient_call(
            lambda image: peers.spatial_attention(image, case.heads), [moved], g.to(memory_format=torch.channels_last)
        )
    return Comparison(
        calls,
        # Forward; backward q, k, v and the result's gradient are read, and three gradients written.
        Work(nbytes=image.nbytes * 11 // 3, products=PRODUCTS * case.flops, flops=flops(case, backward=True)),
        largest_error(expected, of),
        TOLERANCES[dtype],
    )


def _blocks(
    case: AttentionCase, dtype: torch.dtype, device: str
) -> tuple[dict[str, tuple[Any, Tensor]], Callable[[], torch.nn.Module]]:
    """Ours and each peer, of the same weights, with the image that each is given; and what makes one in float64."""
    channels = case.heads * case.size
    groups = math.gcd(32, channels)
    _, _, *spatial = case.image
    image = torch.randn(case.batch, channels, *spatial, dtype=dtype, device=device)
    x = image.contiguous(memory_format=case.memory_format)
    # Its projection out does not begin as zero, as ours does, so that there is something to compare.
    weights = peers.AttentionBlock(channels, case.heads, groups).state_dict()
    ours: Any = nn.SpatialSelfAttention(channels, num_heads=case.heads, num_groups=groups)
    ours.load_state_dict({name: weights[name].reshape(tensor.shape) for name, tensor in ours.state_dict().items()})
    found: dict[str, tuple[Any, Tensor]] = {"ours": (ours.to(device, dtype, memory_format=case.memory_format), x)}

    def another(kind: torch.dtype = dtype, layout: torch.memory_format = case.memory_format) -> Any:
        block: Any = peers.AttentionBlock(channels, case.heads, groups)
        block.load_state_dict(weights)
        return block.to(device, kind, memory_format=layout)

    formats = {"": case.memory_format}
    if case.layout == "contiguous":
        formats[", channels_last"] = torch.channels_last
    for name, layout in formats.items():
        given = image.contiguous(memory_format=layout)
        block = another(layout=layout)
        found[f"eager{name}"] = block, given
        found[f"compile{name}"] = peers.compiled(block), given
    return found, lambda: another(torch.float64)


def _products(case: AttentionCase, backward: bool) -> int:
    """With three projections and one, of all pixels; backward each is two products, and none is made again."""
    channels = case.heads * case.size
    projections = 2 * case.batch * case.queries * channels * 4 * channels
    return PRODUCTS * case.flops + 3 * projections if backward else FORWARD * case.flops + projections


def _work(case: AttentionCase, x: Tensor, backward: bool) -> Work:
    products = _products(case, backward)
    softmax = flops(case, backward) - (PRODUCTS if backward else FORWARD) * case.flops
    # The norm takes 7 operations for each value, its backward pass as many more and 9; the residual sum one.
    return Work(
        nbytes=(5 if backward else 2) * x.nbytes,
        products=products,
        flops=products + softmax + (25 if backward else 8) * case.elements,
    )


def block(case: AttentionCase, dtype: torch.dtype, device: str) -> Comparison:
    found, wide = _blocks(case, dtype, device)
    x = found["ours"][1]
    rows = min(case.queries, max(1, rows_judged(case) // case.heads))

    def without_gradient(block: Any, x: Tensor) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with torch.no_grad():
                output: Tensor = block(x)
                return output

        return call

    def expected() -> Tensor:
        with torch.no_grad():
            return _first_pixels(wide(), x[:1].double(), rows)

    calls = {name: without_gradient(*one) for name, one in found.items()}
    mine = calls.pop("ours")
    return Comparison(
        {"ours": mine, **on_backends(mine, device), **calls},
        _work(case, x, backward=False),
        largest_error(expected, of=lambda out: out[:1].flatten(2)[:, :, :rows]),
        TOLERANCES[dtype],
    )


def _first_pixels(block: Any, x: Tensor, rows: int) -> Tensor:
    """What a block of :class:`gencore.bench.peers.AttentionBlock` gives for the first pixels of an image."""
    q, k, v = block.qkv(block.norm(x)).flatten(2).unflatten(1, (3, block.num_heads, -1)).transpose(-1, -2).unbind(1)
    mixed = torch.nn.functional.scaled_dot_product_attention(
        q[:, :, :rows].contiguous(), k.contiguous(), v.contiguous()
    )
    out = block.out(mixed.transpose(-1, -2).flatten(1, 2).unsqueeze(-1)).squeeze(-1)
    first: Tensor = x.flatten(2)[:, :, :rows] + out
    return first


def block_and_backward(case: AttentionCase, dtype: torch.dtype, device: str) -> Comparison:
    found, wide = _blocks(case, dtype, device)
    image = found["ours"][1]
    g = torch.randn_like(image)

    def both_ways(block: Any, x: Tensor) -> Callable[[], Any]:
        x = x.detach().requires_grad_()
        given = g.to(memory_format=torch.channels_last) if x.is_contiguous(memory_format=torch.channels_last) else g
        return gradient_call(lambda *_: block(x), [x, *block.parameters()], given)

    def expected() -> Any:
        module = wide()
        x = image[:1].double().requires_grad_()
        of_x, *rest = gradient_call(lambda *_: module(x), [x, *module.parameters()], g[:1].double())()
        # Those of the weights need every sample.
        return of_x, *(rest if case.batch == 1 else [None] * len(rest))

    def of(result: Any) -> Any:
        of_x, *rest = result
        # Ours has matrices where convolutions of one pixel have two dimensions more.
        return of_x[:1], *(tensor.reshape(wanted) for tensor, wanted in zip(rest, shapes, strict=True))

    shapes = [parameter.shape for parameter in found["eager"][0].parameters()]
    calls = {name: both_ways(*one) for name, one in found.items()}
    mine = calls.pop("ours")
    return Comparison(
        {"ours": mine, **on_backends(mine, device), **calls},
        _work(case, image, backward=True),
        largest_error(expected, of),
        TOLERANCES[dtype],
    )


_CASES = cases.SPATIAL_ATTENTION
BENCHMARKS = (
    Benchmark("attention", "images, forward", forward, _CASES, DTYPES, is_image, wanted),
    Benchmark("attention", "images, forward and backward", forward_and_backward, _CASES, DTYPES, is_image, _learns),
    Benchmark("attention", "block, forward", block, _CASES, DTYPES, is_image, wanted),
    Benchmark("attention", "block, forward and backward", block_and_backward, _CASES, DTYPES, is_image, _learns),
)
