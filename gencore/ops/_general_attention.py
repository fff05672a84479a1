"""Attention with masks, lengths, shared heads and dropout, and its derivatives, as ops of (B, heads, tokens, channels).

The everyday calls, which have none of these, go to the ops in ``_attention.py``. Where a backend has no kernel for
them, the definitions run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gencore._torch import has_tangents, is_transformed
from gencore.backends import choice
from gencore.backends.layout import empty_parts_of_log_sums, empty_with_channels
from gencore.backends.reference import attention as reference
from gencore.ops._library import Layout, define, has_kernel, pull_back, widened
from gencore.ops.uniform import uniforms_for


class Settings(NamedTuple):
    """What a call has besides q, k and v, in the order of the ops' arguments.

    ``mask``: four dimensions, each of one element or as large as that of (B, heads, T, S). ``key``: the words of a key,
    where something is dropped.
    """

    mask: Tensor | None
    key_lengths: Tensor | None
    key: Tensor | None
    scale: float
    causal: bool
    dropout: float


_HEADS = "Tensor q, Tensor k, Tensor v"
_RESULTS = "Tensor out, Tensor lse"
_DIRECTION = "Tensor? dq, Tensor? dk, Tensor? dv"
_SETTINGS = "Tensor? mask, Tensor? key_lengths, Tensor? key, float scale, bool causal, float dropout"
_CONSTANTS = (None,) * len(Settings._fields)


def _options(q: Tensor, k: Tensor, settings: Settings) -> reference.Options:
    kept = None
    if settings.key is not None:
        u = uniforms_for(q, settings.key, (*q.shape[:3], k.shape[2]))
        # Of all that are dropped, none would be left to be scaled.
        # The bound that kernels have, which compare the 24 bits of a uniform value.
        bound = math.ceil(settings.dropout * 2**24) * 2.0**-24
        kept = (u >= bound).to(q.dtype) * (0.0 if settings.dropout == 1 else 1 / (1 - settings.dropout))
    return reference.Options(settings.mask, settings.key_lengths, settings.causal, kept)


def _definition(q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    """The op in PyTorch's operations, in float32 for half types; ``settings`` are :class:`Settings`."""
    given = Settings(*settings)
    q_, k_, v_ = widened(q), widened(k), widened(v)
    out, lse = reference.attention(q_, k_, v_, given.scale, _options(q_, k_, given))
    return _in_layout_of(q, out.to(q.dtype)), torch.stack([lse, torch.zeros_like(lse)])


def _in_layout_of(q: Tensor, out: Tensor) -> Tensor:
    """A result with its dimensions in memory in the order of q's."""
    if q.is_contiguous() or is_transformed():
        return out
    like = empty_with_channels(q, out.shape[3])
    return out if out.stride() == like.stride() else like.copy_(out)


def _fake(q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return empty_with_channels(q, v.shape[3]), empty_parts_of_log_sums(q)


def _flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any) -> int:
    """As if every query saw every key, as PyTorch counts its own attention."""
    batch, heads, queries, size = q
    return 2 * batch * heads * queries * k[2] * (size + v[3])


def _layouts(outputs: str) -> Any:
    """By samples, by heads, or by queries. ``outputs``: of each what it is like, "q", "k", "lse" or "mask".

    What is dropped is a matter of a head's and a query's number, and so is what a causal order hides.
    """

    def ways(args: Any) -> list[Layout]:
        q, mask = args["q"], args["mask"]
        dims = [0]
        if args["key"] is None and args["k"].shape[1] == q.shape[1]:
            dims.append(1)
        if args["key"] is None and not args["causal"]:
            dims.append(2)
        found = []
        for dim in dims:
            like: dict[str, int | None] = {"q": dim, "k": dim if dim < 2 else None, "lse": dim + 1, "mask": None}
            like["key"] = 0 if dim == 0 else None
            if mask is not None and mask.shape[dim] == q.shape[dim]:
                like["mask"] = dim
            inputs = {name: like[kind] for name, kind in _KINDS.items() if name in args}
            shared = {name: place for name, place in inputs.items() if place is not None}
            found.append(Layout(shared, tuple(like[kind] for kind in outputs.split())))
        return found

    return ways


# What the arguments that may be shared out are like.
_KINDS = {
    **dict.fromkeys(("q", "dq", "grad_out", "out"), "q"),
    **dict.fromkeys(("k", "v", "dk", "dv"), "k"),
    **dict.fromkeys(("key_lengths", "key"), "key"),
    "lse": "lse",
    "mask": "mask",
}


def _definition_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    given = Settings(*settings)
    q_, k_, v_, dq_, dk_, dv_ = map(widened, (q, k, v, dq, dk, dv))
    d_out, d_lse = reference.attention_jvp(q_, k_, v_, dq_, dk_, dv_, given.scale, _options(q_, k_, given))
    return _in_layout_of(q, d_out.to(q.dtype)), d_lse


_jvp_op = define(
    f"general_attention_jvp({_HEADS}, {_RESULTS}, {_DIRECTION}, {_SETTINGS}) -> (Tensor, Tensor)",
    fake=lambda q, k, v, out, lse, *_: (empty_with_channels(q, v.shape[3]), lse.new_empty(lse.shape[1:])),
    definition=_definition_jvp,
    made_again=("out", "lse"),
    optional="general_attention_jvp",
    flops=lambda *shapes, **_: 5 * _flops(*shapes) // 2,
    layouts=_layouts("q q"),
)


def _jvp(ctx: Any, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, *_: None) -> tuple[Tensor, None]:
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    return _jvp_op(q, k, v, out, lse, dq, dk, dv, *tensors, *ctx.settings)[0], None


def _definition_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *settings_and_wanted: Any
) -> tuple[Tensor | None, ...]:
    *settings, wanted = settings_and_wanted
    grads = pull_back(lambda q, k, v: _definition(q, k, v, *settings)[0], (q, k, v), grad_out)
    return tuple(grad if want else None for grad, want in zip(grads, wanted, strict=True))


def _fake_gradients(tensors: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(tensor) if want else tensor.new_empty(0) for tensor, want in zip(tensors, wanted, strict=True)
    )


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
    *settings_and_wanted: Any,
) -> tuple[Tensor | None, ...]:
    *settings, wanted = settings_and_wanted

    def gradients(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
        return _definition_backward(grad_out, q, k, v, out, lse, *settings, [True] * 3)

    direction = tuple(torch.zeros_like(x) if dx is None else dx for x, dx in ((q, dq), (k, dk), (v, dv)))
    grads = pull_back(gradients, (grad_out, q, k, v), direction)
    return tuple(grad if want else None for grad, want in zip(grads, wanted, strict=True))


_double_backward_op = define(
    f"general_attention_double_backward(Tensor grad_out, {_HEADS}, {_RESULTS}, {_DIRECTION}, {_SETTINGS}, "
    "bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda grad_out, q, k, v, *others: _fake_gradients((grad_out, q, k, v), others[-1]),
    definition=_definition_double_backward,
    made_again=("out", "lse"),
    optional="general_attention_double_backward",
    flops=lambda grad_out, *shapes, **_: 17 * _flops(*shapes) // 2,
    layouts=_layouts("q q k k"),
)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, scale, causal, dropout, _ = inputs
    ctx.settings = (scale, causal, dropout)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _double_backward(ctx: Any, *direction: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:4])
    others = (None, None, *_CONSTANTS, None)
    if not any(wanted) or all(dx is None for dx in direction):
        return (None,) * 4 + others
    grad_out, q, k, v, out, lse, *tensors = ctx.saved_tensors
    grads = _double_backward_op(grad_out, q, k, v, out, lse, *direction, *tensors, *ctx.settings, wanted)
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *others


_backward_op = define(
    f"general_attention_backward(Tensor grad_out, {_HEADS}, {_RESULTS}, {_SETTINGS}, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor)",
    fake=lambda grad_out, q, k, v, *others: _fake_gradients((q, k, v), others[-1]),
    setup_context=_setup_backward,
    backward=_double_backward,
    definition=_definition_backward,
    optional="general_attention_backward",
    flops=lambda grad_out, *shapes, **_: 5 * _flops(*shapes) // 2,
    layouts=_layouts("q k k"),
)


def _definition_mask_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor, *others: Any
) -> tuple[Tensor | None, ...]:
    *settings, wanted = others
    grads = pull_back(lambda *given: _definition(*given, *settings)[0], (q, k, v, mask), grad_out)
    return tuple(grad if want else None for grad, want in zip(grads, wanted, strict=True))


# Its own derivatives are the definition's.
_mask_backward_op = define(
    f"general_attention_mask_backward(Tensor grad_out, {_HEADS}, {_RESULTS}, {_SETTINGS.replace('?', '', 1)}, "
    "bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda grad_out, q, k, v, out, lse, mask, *others: _fake_gradients((q, k, v, mask), others[-1]),
    definition=_definition_mask_backward,
    made_again=("out", "lse"),
    optional="general_attention_mask_backward",
    flops=lambda grad_out, *shapes, **_: 5 * _flops(*shapes) // 2,
    layouts=_layouts("q k k mask"),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, key_lengths, key, *settings = inputs
    out, lse = output
    ctx.settings = tuple(settings)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse, mask, key_lengths, key)


def _backward(ctx: Any, grad_out: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return None, None, None, *_CONSTANTS
    wanted = list(ctx.needs_input_grad[:4])
    if wanted[3]:
        grads = _mask_backward_op(grad_out, *ctx.saved_tensors, *ctx.settings, wanted)
    else:
        grads = (*_backward_op(grad_out, *ctx.saved_tensors, *ctx.settings, wanted[:3]), None)
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *_CONSTANTS[1:]


_attend = define(
    f"general_attention({_HEADS}, {_SETTINGS}) -> (Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    jvp=_jvp,
    definition=_definition,
    optional="general_attention",
    flops=_flops,
    layouts=_layouts("q lse"),
)


def attend_unobserved(q: Tensor, k: Tensor, v: Tensor, settings: Settings, wants_gradient: bool) -> Tensor:
    """The result of a call of plain tensors that nothing observes."""
    if wants_gradient:
        return _attend.with_gradient(q, k, v, *settings)[0]
    if has_kernel("general_attention", (q,)):
        return choice.kernel("general_attention", q)(q, k, v, *settings, with_lse=False)[0]
    return _attend.defined(q, k, v, *settings)[0]


def attend_generally(q: Tensor, k: Tensor, v: Tensor, settings: Settings, mask: Tensor | None) -> Tensor:
    """The result. The kernels have no forward mode along the mask, which the definition has.

    ``mask``: as it was given. Transforms of ``torch.func`` wrap every view that they see being made.
    """
    if mask is not None and is_transformed() and has_tangents((mask,)):
        return _attend.defined(q, k, v, *settings)[0]
    return _attend(q, k, v, *settings)[0]
