"""Fused group normalization: statistics, normalization, modulation and activation are one op."""

from __future__ import annotations

import numbers
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from gencore._torch import hand_over, is_distributed, is_overridden
from gencore.arguments import integer
from gencore.backends import choice
from gencore.backends.layout import empty_gradients, suggested_format
from gencore.backends.reference import group_norm as reference
from gencore.ops._checks import Contract, autocast_dtype, check_out, check_tensor
from gencore.ops._library import (
    Layout,
    Out,
    arguments_of,
    by_definition,
    define,
    pull_back,
    widened,
)

Activation = Literal["silu"]

_VALUE_NAMES = ("weight", "bias", "scale", "shift", "bias_in")
_VALUES = ", ".join(f"Tensor? {name}" for name in _VALUE_NAMES)


def _fake(x: Tensor, num_groups: int, *_: Any) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=suggested_format(x))
    return y, x.new_empty((x.shape[0], num_groups, 2), dtype=torch.float64)


def _fake_backward(
    grad_y: Tensor,
    x: Tensor,
    statistics: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    bias_in: Tensor | None,
    activation: str | None,
    wanted: list[bool],
    eps: float,
) -> tuple[Tensor, ...]:
    grad_x = torch.empty_like(x, memory_format=suggested_format(x)) if wanted[0] else None
    grads = (grad_x, *empty_gradients((weight, bias, scale, shift, bias_in), wanted[1:]))
    return tuple(grad_y.new_empty(0) if grad is None else grad for grad in grads)


_OF_SAMPLES = {"x": 0, "scale": 0, "shift": 0, "bias_in": 0}


def _layouts(args: Any) -> list[Layout]:
    return [Layout(_OF_SAMPLES, (0, 0))]


def _layouts_backward(args: Any) -> list[Layout]:
    return [Layout({**_OF_SAMPLES, "grad_y": 0, "statistics": 0}, (0, None, None, 0, 0, 0))]


def _definition(x: Tensor, num_groups: int, *args: Any) -> tuple[Tensor, None]:
    *values, activation, eps = args
    weight, bias, scale, shift, bias_in = map(widened, values)
    y = reference.group_norm(
        widened(x), num_groups, weight, bias, eps, scale=scale, shift=shift, bias_in=bias_in, activation=activation
    )
    return y.to(x.dtype).contiguous(memory_format=suggested_format(x)), None


def _definition_backward(
    grad_y: Tensor, x: Tensor, statistics: Tensor, num_groups: int, *args: Any
) -> tuple[Tensor | None, ...]:
    *values, activation, wanted, eps = args
    given = (x, *values)
    there = [place for place, value in enumerate(given) if value is not None and wanted[place]]

    def of_wanted(*some: Tensor) -> Tensor:
        whole = list(given)
        for place, value in zip(there, some, strict=True):
            whole[place] = value
        x, *values = whole
        return _definition(x, num_groups, *values, activation, eps)[0]

    grads: list[Tensor | None] = [None] * len(given)
    for place, grad in zip(there, pull_back(of_wanted, [given[place] for place in there], grad_y), strict=True):
        grads[place] = grad
    return tuple(grads)


_CONSTANTS = (2,)  # The statistics, which follow from x.
_setup_backward, _backward_of_definition = by_definition(_definition_backward, _CONSTANTS)


def _double_backward(ctx: Any, grad_grad_x: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """As a formula where it is the gradient for x that was differentiated, and will not be again."""
    several = any(other is not None for other in others)
    if grad_grad_x is None or several or torch.is_grad_enabled() or is_distributed(grad_grad_x):
        return _backward_of_definition(ctx, grad_grad_x, *others)
    grad_y, x, statistics, num_groups, *values_and_activation = arguments_of(ctx)[:-2]
    grads = _second(grad_grad_x, grad_y, x, statistics, num_groups, *values_and_activation)
    types = (grad_y, x, *values_and_activation[:-1])
    wanted = [ctx.needs_input_grad[place] for place in (0, 1, 4, 5, 6, 7, 8)]
    of_grad_y, of_x, *of_values = (
        grad.to(like.dtype) if want and grad is not None and like is not None else None
        for grad, like, want in zip(grads, types, wanted, strict=True)
    )
    return of_grad_y, of_x, None, None, *of_values, None, None, None


def _second(
    grad_grad_x: Tensor,
    grad_y: Tensor,
    x: Tensor,
    statistics: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    bias_in: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, ...]:
    """The gradients, for grad_y, x and the values, of sum(grad_grad_x * grad_x), grad_x the gradient for x.

    With z the argument of the activation, a = dz/dxhat, g = grad_y act'(z) a, means over a group of M values, and the
    projection P(v) = v - mean(v) - xhat mean(v xhat): grad_x = P(g) / deviation.
    """
    memory_format = suggested_format(x)
    dd, dy, x = (widened(tensor).contiguous(memory_format=memory_format) for tensor in (grad_grad_x, grad_y, x))
    weight, bias, scale, shift, bias_in = map(widened, (weight, bias, scale, shift, bias_in))
    samples, channels = x.shape[:2]
    pixels = tuple(range(2, x.dim()))
    count = x.numel() // max(1, samples * num_groups)

    def along(values: Tensor) -> Tensor:
        return values.reshape(-1, channels, *[1] * len(pixels))

    def of_group(values: Tensor) -> Tensor:
        """Sums over the pixels of each channel and the channels of each group."""
        sums = values.sum(pixels) if pixels else values
        return sums.reshape(samples, num_groups, -1).sum(2)

    def of_channels(values: Tensor) -> Tensor:
        """A value per group, for each of its channels."""
        return along(values.repeat_interleave(channels // num_groups, 1))

    mean, inverse = (of_channels(values) for values in statistics.to(x.dtype).unbind(2))
    u = x if bias_in is None else x + along(bias_in)
    xhat = (u - mean).mul_(inverse)
    gain = torch.ones(1, channels, dtype=x.dtype, device=x.device) if scale is None else 1 + scale
    a = along(gain if weight is None else gain * weight)
    first: Tensor | None
    second: Tensor | None
    if activation == "silu":
        z = xhat * a
        if bias is not None:
            z += along(gain * bias)
        if shift is not None:
            z += along(shift)
        s = torch.sigmoid(z)
        slope = s * (1 - s)
        second = slope * (2 + z * (1 - 2 * s))
        first = torch.addcmul(s, z, slope)
        h = dy * first
    else:
        first, second, h = None, None, dy
    g = h * a
    mean_d, mean_dx = of_group(dd) / count, of_group(dd * xhat) / count
    mean_g, mean_gx = of_group(g) / count, of_group(g * xhat) / count
    cross = of_group(dd * g) - count * (mean_d * mean_g + mean_dx * mean_gx)
    # P(dd) / deviation.
    projected = torch.addcmul(dd - of_channels(mean_d), xhat, of_channels(mean_dx), value=-1).mul_(inverse)
    along_g = projected * a
    of_dy = along_g if first is None else along_g * first
    # What z has of it, and what xhat has beside.
    k = None if second is None else (along_g * dy).mul_(second)
    v = (dd * of_channels(mean_gx)).add_(g * of_channels(mean_dx)).mul_(-inverse)
    if k is not None:
        v.addcmul_(k, a)
    mean_v, mean_vx = of_group(v) / count, of_group(v * xhat) / count
    of_x = (
        (v - of_channels(mean_v))
        .addcmul_(xhat, of_channels(mean_vx) + inverse * of_channels(cross / count), value=-1)
        .mul_(inverse)
    )
    of_a = projected * h
    if k is not None:
        of_a.addcmul_(k, xhat)
    sum_a = of_a.sum(pixels) if pixels else of_a
    sum_b = torch.zeros_like(sum_a) if k is None else k.sum(pixels) if pixels else k
    of_scale = sum_a * (1 if weight is None else weight) + (0 if bias is None else sum_b * bias)
    of_bias_in = of_x.sum(pixels) if pixels else of_x
    return of_dy, of_x, (sum_a * gain).sum(0), (sum_b * gain).sum(0), of_scale, sum_b, of_bias_in


_group_norm_backward = define(
    f"group_norm_backward(Tensor grad_y, Tensor x, Tensor statistics, int num_groups, {_VALUES}, str? activation, "
    "bool[] wanted, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    setup_context=_setup_backward,
    backward=_double_backward,
    definition=_definition_backward,
    layouts=_layouts_backward,
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


_group_norm = define(
    f"group_norm(Tensor x, int num_groups, {_VALUES}, str? activation, float eps) -> (Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    layouts=_layouts,
    definition=_definition,
    # Without the statistics, which only the gradient needs.
    out=Out(suggested_format, options=(False,)),
)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: Activation | None = None,
    bias_in: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Group normalization, with what a U-Net does before and after it, in one op.

    y = act((xhat * weight + bias) * (1 + scale) + shift), xhat = (u - mean) / sqrt(variance + eps), u = x + bias_in,
    where mean and variance (biased) are those of u over each group of C / num_groups channels and all pixels of a
    sample.

    Args:
        x: (N, C, ...), float32, bfloat16, float16 or float64; any number of spatial dimensions.
        num_groups: a divisor of C. 1 is layer norm over channels and pixels, C is instance norm.
        weight, bias: (C,), the affine transformation; left out they are 1 and 0.
        eps: added to the variance, at least 0.
        scale, shift: (N, C), the modulation by an embedding (adaptive group norm); left out they are 0.
        activation: ``"silu"``, t * sigmoid(t), or None.
        bias_in: (N, C), added before the normalization, such as the embedding of the time step.
        out: a tensor like ``x`` to write to instead of a new one, with any strides; it may be ``x`` itself. Not where a
            gradient is wanted.

    ``weight``, ``bias``, ``scale``, ``shift`` and ``bias_in`` are each of ``x``'s dtype or float32, with any strides;
    under autocast, of a half type too.

    Returns:
        y: x's shape, dtype and memory format (contiguous or channels_last). The arithmetic is in float32, for float64
        inputs in float64, and y is rounded once. Autocast changes nothing: a half-precision ``x`` stays so, which loses
        nothing, as statistics and arithmetic are never in half precision.

    The statistics are as accurate as float32 whatever the mean: sums are taken of deviations from a nearby value and
    combined in float64. They, not xhat or y, are kept for the gradient, which is made for ``x`` and the five
    others. It may be differentiated again, and forward mode works, both in PyTorch's operations. NaN and infinities
    propagate as in PyTorch.

    Deterministic: the same bits for any number of threads, any split of the batch, and on any SIMD level; no atomics.

    Raises:
        TypeError, ValueError: an argument is not as above; the message says which, and nothing is written.

    >>> x = torch.randn(2, 64, 16, 16)
    >>> want = torch.nn.functional.silu(torch.nn.functional.group_norm(x, 32))
    >>> torch.allclose(group_norm(x, 32, activation="silu"), want, atol=1e-5)
    True

    Source: Wu and He, "Group Normalization" (2018), equations 1 to 7; scale and shift: Nichol and Dhariwal, "Improved
    Denoising Diffusion Probabilistic Models" (2021), section 3, and Dhariwal and Nichol, "Diffusion Models Beat GANs on
    Image Synthesis" (2021), equation 5.
    """
    values: tuple[Tensor | None, ...] = (weight, bias, scale, shift, bias_in)
    known = _CONTRACT.known(x, num_groups, eps, activation, weight, bias, scale, shift, bias_in)
    if known is not None and out is None:
        (num_groups, eps), wants_gradient = known
        if wants_gradient:
            return _group_norm.with_gradient(x, num_groups, *values, activation, eps)[0]
        return choice.kernel("group_norm", x)(
            x, num_groups, weight, bias, scale, shift, bias_in, activation, eps, None, False
        )[0]
    tensors = (x, *values, out)
    if known is None and is_overridden(*tensors):
        options = {"scale": scale, "shift": shift, "activation": activation, "bias_in": bias_in, "out": out}
        return hand_over(group_norm, tensors, x, num_groups, weight, bias, eps, **options)
    if isinstance(x, Tensor) and x.dtype == torch.float32 and autocast_dtype(x.device) is not None:
        # An embedding is in half precision then, where x may have come from an op that is not.
        values = tuple(_widened(value) for value in values)
    num_groups, eps = _CONTRACT(x, num_groups, eps, activation, *values) if known is None else known[0]
    if out is None:
        return _group_norm(x, num_groups, *values, activation, eps)[0]
    check_out(out, "x", x, dict(zip(_VALUE_NAMES, values, strict=True)))
    _group_norm.into(x, num_groups, *values, activation, eps, out)
    return out


def _check(
    x: Any,
    num_groups: Any,
    eps: Any,
    activation: Any,
    weight: Any,
    bias: Any,
    scale: Any,
    shift: Any,
    bias_in: Any,
) -> tuple[int, float]:
    """Looks at every argument; returns num_groups as an int and eps as a float."""
    check_tensor("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must have at least two dimensions, samples and channels, got {x.dim()}")
    samples, channels = x.shape[:2]
    num_groups = integer("num_groups", num_groups, least=1)
    if channels % num_groups != 0:
        raise ValueError(f"num_groups must divide the {channels} channels of x, got {num_groups}")
    if isinstance(eps, bool) or not isinstance(eps, (numbers.Real, torch.SymFloat)):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}")
    if not eps >= 0:  # type: ignore[operator]
        raise ValueError(f"eps must be at least 0, got {eps}")
    check_activation(activation)
    for name, value in (("weight", weight), ("bias", bias)):
        _check_value(name, value, x, (channels,), "C")
    for name, value in (("scale", scale), ("shift", shift), ("bias_in", bias_in)):
        _check_value(name, value, x, (samples, channels), "N, C")
    return num_groups, eps if isinstance(eps, torch.SymFloat) else float(eps)  # type: ignore[return-value]


_CONTRACT = Contract(_check)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16) else value


def check_activation(activation: Any) -> None:
    if activation is not None and activation not in get_args(Activation):
        raise ValueError(f'activation must be "silu" or None, got {activation!r}')


def _check_value(name: str, value: Any, x: Tensor, shape: tuple[int, ...], letters: str) -> None:
    if value is None:
        return
    if isinstance(value, Tensor) and not value.is_nested and value.shape != shape:
        raise ValueError(f"{name} must have the shape ({letters}) of x, {shape}, got {tuple(value.shape)}")
    check_tensor(name, value)
    if value.dtype != x.dtype and (value.dtype != torch.float32 or x.dtype == torch.float64):
        allowed = str(x.dtype) + ("" if x.dtype in (torch.float32, torch.float64) else " or torch.float32")
        raise TypeError(f"{name} must have the dtype {allowed} for such an x, got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {value.device}")
