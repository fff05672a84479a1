"""The ops of group norm and of its derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gencore.backends.layout import empty_gradients, suggested_format
from gencore.backends.reference import group_norm as reference
from gencore.ops._library import Layout, Out, define, pull_back, widened

VALUES = ("weight", "bias", "scale", "shift", "bias_in")
_VALUES = ", ".join(f"Tensor? {name}" for name in VALUES)
_DIRECTION = ", ".join(f"Tensor? d_{name}" for name in ("x", *VALUES))
_OF_SAMPLES = {"x": 0, "scale": 0, "shift": 0, "bias_in": 0}
_DIRECTION_OF_SAMPLES = {f"d_{name}": 0 for name in _OF_SAMPLES}


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=suggested_format(x))


def _fake(x: Tensor, num_groups: int, *_: Any) -> tuple[Tensor, Tensor]:
    return _like(x), x.new_empty((x.shape[0], num_groups, 2), dtype=torch.float64)


def _fake_gradients(like: Tensor, wanted: Sequence[Tensor | None], values: Sequence[Any], flags: Sequence[bool]) -> Any:
    """Those of tensors like ``like``, None where one is not wanted, and those of values."""
    grads = (*wanted, *empty_gradients(values, flags))
    return tuple(like.new_empty(0) if grad is None else grad for grad in grads)


def _fake_backward(grad_y: Tensor, x: Tensor, statistics: Tensor, num_groups: int, *args: Any) -> tuple[Tensor, ...]:
    *values, _, wanted, _ = args
    return _fake_gradients(grad_y, [_like(x) if wanted[0] else None], values, wanted[1:])


def _fake_double_backward(
    grad_y: Tensor, x: Tensor, statistics: Tensor, num_groups: int, *args: Any
) -> tuple[Tensor, ...]:
    wanted = args[-2]
    return _fake_gradients(grad_y, [_like(x) if want else None for want in wanted[:2]], args[:5], wanted[2:])


def _definition(x: Tensor, num_groups: int, *args: Any) -> tuple[Tensor, None]:
    *values, activation, eps = args
    weight, bias, scale, shift, bias_in = map(widened, values)
    y = reference.group_norm(
        widened(x), num_groups, weight, bias, eps, scale=scale, shift=shift, bias_in=bias_in, activation=activation
    )
    return y.to(x.dtype).contiguous(memory_format=suggested_format(x)), None


def _gradients(function: Any, given: Sequence[Tensor | None], wanted: Sequence[bool], grad: Tensor) -> list[Any]:
    """The gradients of a function of all that is given, for what is there and wanted; None for the rest."""
    there = [place for place, value in enumerate(given) if value is not None and wanted[place]]

    def of_wanted(*some: Tensor) -> Tensor:
        whole = list(given)
        for place, value in zip(there, some, strict=True):
            whole[place] = value
        return function(*whole)

    grads: list[Tensor | None] = [None] * len(given)
    inputs = [value for place, value in enumerate(given) if place in there and value is not None]
    for place, pulled in zip(there, pull_back(of_wanted, inputs, grad), strict=True):
        grads[place] = pulled
    return grads


def _definition_backward(
    grad_y: Tensor, x: Tensor, statistics: Tensor, num_groups: int, *args: Any
) -> tuple[Tensor | None, ...]:
    *values, activation, wanted, eps = args

    def forward(x: Tensor, *values: Tensor | None) -> Tensor:
        return _definition(x, num_groups, *values, activation, eps)[0]

    return tuple(_gradients(forward, (x, *values), wanted, grad_y))


def _definition_jvp(x: Tensor, statistics: Tensor, num_groups: int, *args: Any) -> Tensor:
    *tensors, activation, eps = args
    wide = [widened(tensor) for tensor in tensors]
    d_y = reference.group_norm_jvp(widened(x), num_groups, wide[:5], wide[5:], activation, eps)
    return d_y.to(x.dtype).contiguous(memory_format=suggested_format(x))


def _definition_double_backward(
    grad_y: Tensor, x: Tensor, statistics: Tensor, num_groups: int, *args: Any
) -> tuple[Tensor | None, ...]:
    """The gradients are linear in grad_y, so that along the direction they are grad_y times what y changes by."""
    values, direction, (activation, wanted, eps) = args[:5], args[5:11], args[11:]

    def change(x: Tensor, *values: Tensor | None) -> Tensor:
        return _definition_jvp(x, statistics, num_groups, *values, *direction, activation, eps)

    of_grad_y = change(x, *values) if wanted[0] else None
    return of_grad_y, *_gradients(change, (x, *values), wanted[1:], grad_y)


_group_norm_jvp = define(
    f"group_norm_jvp(Tensor x, Tensor statistics, int num_groups, {_VALUES}, {_DIRECTION}, str? activation, float eps) "
    "-> Tensor",
    fake=lambda x, *_: _like(x),
    definition=_definition_jvp,
    made_again=("statistics",),
    optional="group_norm_jvp",
    layouts=lambda args: [Layout({**_OF_SAMPLES, **_DIRECTION_OF_SAMPLES, "statistics": 0}, (0,))],
)


def _jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
    d_x, _, *d_values = tangents[:7]
    x, statistics, *values = ctx.saved_tensors
    d_y = _group_norm_jvp(x, statistics, ctx.num_groups, *values, d_x, *d_values, ctx.activation, ctx.eps)
    return d_y, None


_group_norm_double_backward = define(
    f"group_norm_double_backward(Tensor grad_y, Tensor x, Tensor statistics, int num_groups, {_VALUES}, {_DIRECTION}, "
    "str? activation, bool[] wanted, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_double_backward,
    definition=_definition_double_backward,
    made_again=("statistics",),
    optional="group_norm_double_backward",
    layouts=lambda args: [
        Layout({**_OF_SAMPLES, **_DIRECTION_OF_SAMPLES, "grad_y": 0, "statistics": 0}, (0, 0, None, None, 0, 0, 0))
    ],
)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad_y, x, statistics, ctx.num_groups, *values, ctx.activation, _, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_y, x, statistics, *values)


def _double_backward(ctx: Any, *direction: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    wanted = [*needs[:2], *needs[4:9]]
    if not any(wanted) or all(change is None for change in direction):
        return (None,) * 12
    grad_y, x, statistics, *values = ctx.saved_tensors
    grads = _group_norm_double_backward(
        grad_y, x, statistics, ctx.num_groups, *values, *direction, ctx.activation, wanted, ctx.eps
    )
    of_grad_y, of_x, *of_values = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
    return of_grad_y, of_x, None, None, *of_values, None, None, None


_group_norm_backward = define(
    f"group_norm_backward(Tensor grad_y, Tensor x, Tensor statistics, int num_groups, {_VALUES}, str? activation, "
    "bool[] wanted, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    setup_context=_setup_backward,
    backward=_double_backward,
    definition=_definition_backward,
    layouts=lambda args: [Layout({**_OF_SAMPLES, "grad_y": 0, "statistics": 0}, (0, None, None, 0, 0, 0))],
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.num_groups, *values, ctx.activation, ctx.eps = inputs
    statistics = output[1]
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, statistics, *values)


def _backward(ctx: Any, grad_y: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 9
    x, statistics, *values = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = [needs[0], *needs[2:7]]
    grads = _group_norm_backward(grad_y, x, statistics, ctx.num_groups, *values, ctx.activation, wanted, ctx.eps)
    if not all(wanted):
        grads = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
    return grads[0], None, *grads[1:], None, None


normalize = define(
    f"group_norm(Tensor x, int num_groups, {_VALUES}, str? activation, float eps) -> (Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    jvp=_jvp,
    layouts=lambda args: [Layout(_OF_SAMPLES, (0, 0))],
    definition=_definition,
    # Without the statistics, which only the gradient needs.
    out=Out(suggested_format, options=(False,)),
)
