"""The ops of attention and of its derivatives: of heads (B, heads, tokens, channels), and of images that hold them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gencore.backends import choice
from gencore.backends.layout import suggested_format
from gencore.backends.reference import attention as reference
from gencore.ops._library import Layout, define, pull_back, widened


def _log_sums(tensor: Tensor, *shape: int) -> Tensor:
    return tensor.new_empty(shape, dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), _log_sums(q, *q.shape[:3])


def _fake_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, wanted: list[bool]
) -> tuple[Tensor, ...]:
    grads = zip((q, k, v), wanted, strict=True)
    return tuple(torch.empty_like(tensor) if want else grad_out.new_empty(0) for tensor, want in grads)


def _flops(q: Sequence[int], k: Sequence[int], *_: Any, **__: Any) -> int:
    """Two products of matrices, as PyTorch counts its own attention: q with k, and the probabilities with v."""
    batch, heads, queries, size = q
    return 2 * 2 * batch * heads * queries * k[2] * size


def _flops_backward(grad_out: Sequence[int], q: Sequence[int], k: Sequence[int], *_: Any, **__: Any) -> int:
    """Five products: q with k again, and those of four gradients."""
    return 5 * _flops(q, k) // 2


def _layouts(args: Any) -> list[Layout]:
    """By samples, by heads, or by queries."""
    whole = [Layout(dict.fromkeys("qkv", dim), (dim, dim)) for dim in (0, 1)]
    return [*whole, Layout({"q": 2}, (2, 2))]


def _layouts_backward(args: Any) -> list[Layout]:
    of_queries = ("grad_out", "q", "out", "lse")
    whole = [Layout(dict.fromkeys((*of_queries, "k", "v"), dim), (dim, dim, dim)) for dim in (0, 1)]
    return [*whole, Layout(dict.fromkeys(of_queries, 2), (2, None, None))]


def _definition(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = reference.attention(widened(q), widened(k), widened(v), scale)
    return out.to(q.dtype), lse


def _definition_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, wanted: list[bool]
) -> tuple[Tensor | None, ...]:
    grads = pull_back(lambda q, k, v: _definition(q, k, v, scale)[0], (q, k, v), grad_out)
    return tuple(grad if want else None for grad, want in zip(grads, wanted, strict=True))


def _layouts_jvp(args: Any) -> list[Layout]:
    names = ("q", "k", "v", "out", "lse", "dq", "dk", "dv")
    return [Layout(dict.fromkeys(names, dim), (dim, dim)) for dim in (0, 1)]


def _layouts_double_backward(args: Any) -> list[Layout]:
    names = ("grad_out", "q", "k", "v", "out", "lse", "dq", "dk", "dv")
    return [Layout(dict.fromkeys(names, dim), (dim,) * 4) for dim in (0, 1)]


_HEADS = "Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse"
_DIRECTION = "Tensor? dq, Tensor? dk, Tensor? dv"


def _definition_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    q_, k_, v_, dq_, dk_, dv_ = map(widened, (q, k, v, dq, dk, dv))
    d_out, d_lse = reference.attention_jvp(q_, k_, v_, dq_, dk_, dv_, scale)
    return d_out.to(q.dtype), d_lse


_attention_jvp = define(
    f"attention_jvp({_HEADS}, {_DIRECTION}, float scale) -> (Tensor, Tensor)",
    fake=lambda q, k, v, out, lse, *_: (torch.empty_like(q), torch.empty_like(lse)),
    definition=_definition_jvp,
    made_again=("out", "lse"),
    optional="attention_jvp",
    flops=lambda q, k, *_, **__: 5 * _flops(q, k) // 2,
    layouts=_layouts_jvp,
)


def _jvp(ctx: Any, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, _: None) -> tuple[Tensor, None]:
    q, k, v, out, lse = ctx.saved_tensors
    return _attention_jvp(q, k, v, out, lse, dq, dk, dv, ctx.scale)[0], None


def _definition_double_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    scale: float,
    wanted: list[bool],
) -> tuple[Tensor | None, ...]:
    def gradients(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
        return _definition_backward(grad_out, q, k, v, out, lse, scale, [True] * 3)

    direction = tuple(torch.zeros_like(x) if dx is None else dx for x, dx in ((q, dq), (k, dk), (v, dv)))
    grads = pull_back(gradients, (grad_out, q, k, v), direction)
    return tuple(grad if want else None for grad, want in zip(grads, wanted, strict=True))


_attention_double_backward = define(
    f"attention_double_backward(Tensor grad_out, {_HEADS}, {_DIRECTION}, float scale, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda grad_out, q, k, v, out, lse, dq, dk, dv, scale, wanted: tuple(
        torch.empty_like(x) if want else grad_out.new_empty(0)
        for x, want in zip((grad_out, q, k, v), wanted, strict=True)
    ),
    definition=_definition_double_backward,
    made_again=("out", "lse"),
    optional="attention_double_backward",
    flops=lambda grad_out, q, k, *_, **__: 17 * _flops(q, k) // 2,
    layouts=_layouts_double_backward,
)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _double_backward(ctx: Any, *direction: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:4])
    if not any(wanted) or all(dx is None for dx in direction):
        return (None,) * 8
    grads = _attention_double_backward(*ctx.saved_tensors, *direction, ctx.scale, wanted)
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), None, None, None, None


_attention_backward = define(
    "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale, "
    "bool[] wanted) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    setup_context=_setup_backward,
    backward=_double_backward,
    definition=_definition_backward,
    flops=_flops_backward,
    layouts=_layouts_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse)


def _backward(ctx: Any, grad_out: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 4
    wanted = list(ctx.needs_input_grad[:3])
    grads = _attention_backward(grad_out, *ctx.saved_tensors, ctx.scale, wanted)
    if not all(wanted):
        grads = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
    return *grads, None


attend = define(
    "attention(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    flops=_flops,
    layouts=_layouts,
    definition=_definition,
    jvp=_jvp,
)


def heads_of(x: Tensor, parts: int, num_heads: int, memory_format: torch.memory_format) -> tuple[Tensor, ...]:
    """(N, parts C, ...), in that format, as ``parts`` views (N, heads, pixels, channels of a head)."""
    samples, channels = x.shape[:2]
    pixels = math.prod(x.shape[2:])
    size = channels // (parts * num_heads)
    # As the format says: the strides of dimensions of one element may be anything.
    pixel, channel = (1, pixels) if memory_format is torch.contiguous_format else (channels, 1)
    strides = (channels * pixels, size * channel, pixel, channel)
    first, shape = x.storage_offset(), (samples, num_heads, pixels, size)
    each = num_heads * size * channel
    return tuple(x.as_strided(shape, strides, first + part * each) for part in range(parts))


def compute_image(qkv: Tensor, num_heads: int, scale: float, with_lse: bool = True) -> tuple[Tensor, Tensor | None]:
    memory_format = suggested_format(qkv)
    qkv = qkv.contiguous(memory_format=memory_format)
    out = _empty_out(qkv, memory_format)
    q, k, v = heads_of(qkv, 3, num_heads, memory_format)
    _, lse = choice.kernel("attention", qkv)(q, k, v, scale, *heads_of(out, 1, num_heads, memory_format), with_lse)
    return out, lse


def _empty_out(qkv: Tensor, memory_format: torch.memory_format) -> Tensor:
    shape = (qkv.shape[0], qkv.shape[1] // 3, *qkv.shape[2:])
    return torch.empty(shape, dtype=qkv.dtype, device=qkv.device, memory_format=memory_format)


def _fake_spatial(qkv: Tensor, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    lse = _log_sums(qkv, qkv.shape[0], num_heads, math.prod(qkv.shape[2:]))
    return _empty_out(qkv, suggested_format(qkv)), lse


def _attend_backward(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, scale: float) -> Tensor:
    memory_format = suggested_format(qkv)
    qkv, grad_out, out = (x.contiguous(memory_format=memory_format) for x in (qkv, grad_out, out))
    grad_qkv = torch.empty_like(qkv, memory_format=memory_format)
    choice.kernel("attention_backward", qkv)(
        *(
            tensor
            for x, parts in ((grad_out, 1), (qkv, 3), (out, 1))
            for tensor in heads_of(x, parts, num_heads, memory_format)
        ),
        lse,
        scale,
        [True] * 3,
        heads_of(grad_qkv, 3, num_heads, memory_format),
    )
    return grad_qkv


def _fake_spatial_backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, scale: float
) -> Tensor:
    return torch.empty_like(qkv, memory_format=suggested_format(qkv))


def _flops_spatial(qkv: Sequence[int], num_heads: int, *_: Any, **__: Any) -> int:
    heads = (qkv[0], num_heads, math.prod(qkv[2:]), qkv[1] // (3 * num_heads))
    return _flops(heads, heads)


def _flops_spatial_backward(
    grad_out: Sequence[int], qkv: Sequence[int], out: Any, lse: Any, num_heads: int, *_: Any, **__: Any
) -> int:
    return 5 * _flops_spatial(qkv, num_heads) // 2


def _definition_spatial(qkv: Tensor, num_heads: int, scale: float) -> tuple[Tensor, None]:
    out = reference.spatial_attention(widened(qkv), num_heads, scale)
    return out.to(qkv.dtype).contiguous(memory_format=suggested_format(qkv)), None


def _definition_spatial_backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, scale: float
) -> Tensor:
    return pull_back(lambda qkv: _definition_spatial(qkv, num_heads, scale)[0], (qkv,), grad_out)[0]


def _definition_spatial_jvp(
    qkv: Tensor, out: Tensor, lse: Tensor, dqkv: Tensor, num_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v, dq, dk, dv = (
        part
        for image in (qkv, dqkv)
        for part in image.flatten(2).unflatten(1, (3, num_heads, -1)).transpose(-1, -2).unbind(1)
    )
    d_out, d_lse = _definition_jvp(q, k, v, out, lse, dq, dk, dv, scale)
    return d_out.transpose(-1, -2).reshape(out.shape).contiguous(memory_format=suggested_format(qkv)), d_lse


def _attend_jvp(
    qkv: Tensor, out: Tensor, lse: Tensor, dqkv: Tensor, num_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    memory_format = suggested_format(qkv)
    qkv, out, dqkv = (x.contiguous(memory_format=memory_format) for x in (qkv, out, dqkv))
    d_out = torch.empty_like(out, memory_format=memory_format)
    given = (
        tensor
        for x, parts in ((qkv, 3), (out, 1), (dqkv, 3), (d_out, 1))
        for tensor in heads_of(x, parts, num_heads, memory_format)
    )
    q, k, v, of_out, dq, dk, dv, of_d_out = given
    _, d_lse = choice.kernel("attention_jvp", qkv)(q, k, v, of_out, lse, dq, dk, dv, scale, of_d_out)
    return d_out, d_lse


_spatial_attention_jvp = define(
    "spatial_attention_jvp(Tensor qkv, Tensor out, Tensor lse, Tensor dqkv, int num_heads, float scale) "
    "-> (Tensor, Tensor)",
    fake=lambda qkv, out, lse, *_: (torch.empty_like(out, memory_format=suggested_format(qkv)), torch.empty_like(lse)),
    definition=_definition_spatial_jvp,
    made_again=("out", "lse"),
    composed=_attend_jvp,
    optional="attention_jvp",
    flops=lambda qkv, out, lse, dqkv, num_heads, *_, **__: 5 * _flops_spatial(qkv, num_heads) // 2,
    layouts=lambda args: [Layout(dict.fromkeys(("qkv", "out", "lse", "dqkv"), 0), (0, 0))],
)


def _definition_spatial_double_backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, dqkv: Tensor, num_heads: int, scale: float
) -> tuple[Tensor, ...]:
    def gradient(grad_out: Tensor, qkv: Tensor) -> Tensor:
        return _definition_spatial_backward(grad_out, qkv, out, lse, num_heads, scale)

    return pull_back(gradient, (grad_out, qkv), dqkv)


def _attend_double_backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, dqkv: Tensor, num_heads: int, scale: float
) -> tuple[Tensor, ...]:
    memory_format = suggested_format(qkv)
    grad_out, qkv, out, dqkv = (x.contiguous(memory_format=memory_format) for x in (grad_out, qkv, out, dqkv))
    grads = torch.empty_like(out, memory_format=memory_format), torch.empty_like(qkv, memory_format=memory_format)
    given = (
        tensor
        for x, parts in ((grad_out, 1), (qkv, 3), (out, 1), (dqkv, 3), (grads[0], 1), (grads[1], 3))
        for tensor in heads_of(x, parts, num_heads, memory_format)
    )
    of_grad, q, k, v, of_out, dq, dk, dv, *of_grads = given
    choice.kernel("attention_double_backward", qkv)(
        of_grad, q, k, v, of_out, lse, dq, dk, dv, scale, [True] * 4, tuple(of_grads)
    )
    return grads


_spatial_attention_double_backward = define(
    "spatial_attention_double_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, Tensor dqkv, "
    "int num_heads, float scale) -> (Tensor, Tensor)",
    fake=lambda grad_out, qkv, out, *_: tuple(
        torch.empty_like(x, memory_format=suggested_format(qkv)) for x in (out, qkv)
    ),
    definition=_definition_spatial_double_backward,
    made_again=("out", "lse"),
    composed=_attend_double_backward,
    optional="attention_double_backward",
    flops=lambda grad_out, qkv, out, lse, dqkv, num_heads, *_, **__: 17 * _flops_spatial(qkv, num_heads) // 2,
    layouts=lambda args: [Layout(dict.fromkeys(("grad_out", "qkv", "out", "lse", "dqkv"), 0), (0, 0))],
)


def _setup_spatial_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.num_heads, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _double_backward_spatial(ctx: Any, dqkv: Tensor | None) -> tuple[Tensor | None, ...]:
    if dqkv is None:
        return (None,) * 6
    grads = _spatial_attention_double_backward(*ctx.saved_tensors, dqkv, ctx.num_heads, ctx.scale)
    return *grads, None, None, None, None


_spatial_attention_backward = define(
    "spatial_attention_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, int num_heads, float scale) "
    "-> Tensor",
    fake=_fake_spatial_backward,
    setup_context=_setup_spatial_backward,
    backward=_double_backward_spatial,
    definition=_definition_spatial_backward,
    composed=_attend_backward,
    flops=_flops_spatial_backward,
    layouts=lambda args: [Layout(dict.fromkeys(("grad_out", "qkv", "out", "lse"), 0), (0,))],
)


def _setup_spatial(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.num_heads, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, out, lse)


def _backward_spatial(ctx: Any, grad_out: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 3
    return _spatial_attention_backward(grad_out, *ctx.saved_tensors, ctx.num_heads, ctx.scale), None, None


def _jvp_spatial(ctx: Any, dqkv: Tensor, *_: None) -> tuple[Tensor, None]:
    return _spatial_attention_jvp(*ctx.saved_tensors, dqkv, ctx.num_heads, ctx.scale)[0], None


attend_image = define(
    "spatial_attention(Tensor qkv, int num_heads, float scale) -> (Tensor, Tensor)",
    fake=_fake_spatial,
    setup_context=_setup_spatial,
    backward=_backward_spatial,
    jvp=_jvp_spatial,
    definition=_definition_spatial,
    composed=compute_image,
    flops=_flops_spatial,
    layouts=lambda args: [Layout({"qkv": 0}, (0, 0))],
)
