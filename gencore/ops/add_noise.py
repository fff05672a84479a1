"""The forward process of diffusion models, whose noise is made in the kernel."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from gencore._torch import hand_over, is_overridden
from gencore.backends import choice
from gencore.backends.layout import kept_format
from gencore.backends.reference import add_noise as reference
from gencore.noise import Key
from gencore.ops._checks import (
    Contract,
    check_elements_of,
    check_out,
    check_tensor,
    is_plain_key,
    known_key,
    resolve_key,
)
from gencore.ops._coefficients import check_schedule, check_steps, column_of, form_of_steps, rows_at, rows_of
from gencore.ops._library import PLAIN_TYPES, Layout, Out, define, widened
from gencore.ops.normal import normals_for
from gencore.schedule import Schedule


def _fake(x0: Tensor, table: Tensor, t: Tensor | None, key: Tensor, with_noise: bool) -> tuple[Tensor, Tensor]:
    x_t = torch.empty_like(x0, memory_format=kept_format(x0))
    return x_t, torch.empty_like(x_t) if with_noise else x0.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, table, t, _, _ = inputs
    ctx.save_for_backward(table, t)
    if output[1] is not None:
        ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_x_t: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad_x_t is None:
        return (None,) * 5
    table, t = ctx.saved_tensors
    grad_x0 = (grad_x_t * column_of(table, t, 0, grad_x_t)).to(grad_x_t.dtype)
    return grad_x0, None, None, None, None


def _layouts(args: Any) -> list[Layout]:
    return [Layout({"x0": 0, "t": 0, "key": 0}, (0, 0))]


def _definition(
    x0: Tensor, table: Tensor, t: Tensor | None, key: Tensor, with_noise: bool
) -> tuple[Tensor, Tensor | None]:
    noise = normals_for(x0, key, x0.shape, kept_format(x0))
    x_t = reference.add_noise(widened(x0), rows_of(table, t, x0), noise).to(x0.dtype)
    return x_t, noise.to(x0.dtype) if with_noise else None


_add_noise = define(
    "add_noise(Tensor x0, Tensor table, Tensor? t, Tensor key, bool with_noise) -> (Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    layouts=_layouts,
    definition=_definition,
    out=Out(kept_format, others=True),
)


def _check(x0: Any, t: Any) -> None:
    check_tensor("x0", x0)
    check_steps(t, x0)
    check_elements_of("x0", x0)


_CONTRACT = Contract()


@overload
def add_noise(
    x0: Tensor,
    t: Tensor | int,
    schedule: Schedule,
    key: Key | None = None,
    *,
    return_noise: Literal[False] = False,
    out: Tensor | None = None,
) -> Tensor: ...
@overload
def add_noise(
    x0: Tensor,
    t: Tensor | int,
    schedule: Schedule,
    key: Key | None = None,
    *,
    return_noise: Literal[True],
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...
def add_noise(
    x0: Tensor,
    t: Tensor | int,
    schedule: Schedule,
    key: Key | None = None,
    *,
    return_noise: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Noises each sample to its own step in one pass over memory: x_t = alpha_t x0 + sigma_t eps.

    Args:
        x0: (B, ...), float32, bfloat16, float16 or float64: the data.
        t: (B,), int64 or int32, 0 <= t < T: the step of each sample; or an int for all of them.
        schedule: has alpha and sigma of its T steps, as those of :mod:`gencore.diffusion` have.
        key: what eps depends on, ``ops.normal(x0.shape, key)``; by default one drawn from torch's generator.
        return_noise: give eps too, in x0's dtype.
        out: a tensor like ``x0`` to write to instead of a new one, with any strides; it may be ``x0`` itself. Not where
            a gradient is wanted.

    Returns:
        x_t, or (x_t, eps): x0's shape, dtype and memory format (contiguous or channels_last). The arithmetic is in
        float32, for float64 inputs in float64, with coefficients rounded once; x_t is rounded once. NaN and infinities
        propagate.

    The gradient for ``x0`` is alpha_t times that of x_t.

    Deterministic: the same bits for any number of threads, any split of the batch, and on any backend.

    Raises:
        TypeError, ValueError: an argument is not as above; the message says which, and nothing is written. The values
            of a ``t`` on a GPU are not waited for: a sample whose t is out of range becomes NaN.

    >>> from gencore import diffusion
    >>> x0, t = torch.zeros(4, 1, 8, 8), torch.tensor([0, 10, 500, 999])
    >>> x_t, eps = add_noise(x0, t, diffusion.linear(), Key(0), return_noise=True)
    >>> torch.allclose(x_t[3], eps[3], atol=1e-3)
    True

    Source: Ho et al., "Denoising Diffusion Probabilistic Models" (2020), equation 4.
    """
    known = None
    if type(schedule) is Schedule and is_plain_key(key) and (out is None or type(out) in PLAIN_TYPES):
        known = _CONTRACT.known(x0, form_of_steps(t))
    if known is None:
        if is_overridden(x0, t, schedule, key, out):
            options = {"return_noise": return_noise, "out": out}
            return hand_over(add_noise, (x0, t, schedule, key, out), x0, t, schedule, key, **options)
        _check(x0, t)
        _CONTRACT.remember(None, x0, form_of_steps(t))
        check_schedule(schedule)
    # One row on the CPU is an argument of a launch.
    place = x0.device if isinstance(t, Tensor) else torch.device("cpu")
    rows, index = rows_at(t, schedule.add_noise_table(place))
    if known is not None and out is None and (packed := known_key(key, x0)) is not None:
        run = _add_noise.with_gradient if known[1] else choice.kernel("add_noise", x0)
        x_t, noise = run(x0, rows, index, packed, bool(return_noise))
        return (x_t, noise) if return_noise else x_t
    if out is not None:
        check_out(out, "x0", x0)
    packed = resolve_key(key, x0)
    if out is None:
        x_t, noise = _add_noise(x0, rows, index, packed, return_noise)
    else:
        x_t, noise = out, _add_noise.into(x0, rows, index, packed, return_noise, out)
    return (x_t, noise) if return_noise else x_t
