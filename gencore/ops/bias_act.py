"""Bias, activation, gain and clamp in one pass, with derivatives of any order."""

from __future__ import annotations

import math
import numbers
from typing import Any, get_args

import torch
from torch import Tensor

from gencore._torch import hand_over, is_overridden
from gencore.backends import choice
from gencore.backends.activations import Activation as Activation
from gencore.backends.activations import is_piecewise_linear, output_tells
from gencore.backends.layout import channel_sums, suggested_format
from gencore.backends.reference import bias_act as reference
from gencore.ops._checks import Contract, autocast_dtype, check_channel_values, check_out, check_tensor
from gencore.ops._library import PLAIN_TYPES, Layout, Out, define, widened

_SETTINGS = "str activation, float slope, float gain, float? clamp"


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=suggested_format(tensor))


def _sums_like(tensor: Tensor, wanted: bool) -> Tensor:
    return channel_sums(tensor) if wanted else tensor.new_empty(0)


def _fake_backward(grad: Tensor | None, at: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    wanted = args[-1]
    return _like(at) if wanted[0] else at.new_empty(0), _sums_like(at, wanted[1])


def _fake_double_backward(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    wanted = args[-1]
    results = (_like(x) if want else x.new_empty(0) for want in wanted[:2])
    return *results, _sums_like(x, wanted[2])  # type: ignore[return-value]


def _definition(x: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
    y = reference.bias_act(widened(x), widened(bias), *settings)
    return y.to(x.dtype).contiguous(memory_format=suggested_format(x))


def _factor(grad: Tensor | None, shift: Tensor | None, like: Tensor) -> Tensor:
    """grad + shift, in the shape of ``like``."""
    if grad is None:
        assert shift is not None
        return reference.along_channels(widened(shift), like).expand(like.shape)
    return widened(grad) if shift is None else widened(grad) + reference.along_channels(widened(shift), like)


def _sums(terms: Tensor) -> Tensor:
    return terms.sum([dim for dim in range(terms.dim()) if dim != 1])


def _definition_backward(
    grad: Tensor | None, at: Tensor, bias: Tensor | None, shift: Tensor | None, *rest: Any
) -> tuple[Tensor | None, Tensor | None]:
    *settings, at_output, wanted = rest
    if at_output:
        slope = reference.derivative_at_output(widened(at.detach()), *settings)
    else:
        slope = reference.derivative(1, widened(at), widened(bias), *settings)
    product = slope * _factor(grad, shift, at)
    whole = product.to(at.dtype).contiguous(memory_format=suggested_format(at)) if wanted[0] else None
    return whole, _sums(product) if wanted[1] else None


def _definition_double_backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, direction: Tensor | None, shift: Tensor | None, *rest: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    *settings, wanted = rest
    factor, memory_format = _factor(direction, shift, x), suggested_format(x)
    first, second = (reference.derivative(order, widened(x), widened(bias), *settings) for order in (1, 2))
    terms = second * widened(grad) * factor
    whole = (
        result.to(x.dtype).contiguous(memory_format=memory_format) if want else None
        for result, want in zip((first * factor, terms), wanted[:2], strict=True)
    )
    return *whole, _sums(terms) if wanted[2] else None  # type: ignore[return-value]


_bias_act_double_backward = define(
    f"bias_act_double_backward(Tensor grad, Tensor x, Tensor? bias, Tensor? direction, Tensor? shift, {_SETTINGS}, "
    "bool[] wanted) -> (Tensor, Tensor, Tensor)",
    fake=_fake_double_backward,
    definition=_definition_double_backward,
    layouts=lambda args: [Layout({"grad": 0, "x": 0, "direction": 0}, (0, 0, None))],
)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad, at, bias, shift, *ctx.settings, ctx.at_output, _ = inputs
    ctx.set_materialize_grads(False)
    # Of a piecewise linear activation the derivative changes with nothing, so that grad is not needed again.
    ctx.save_for_backward(None if is_piecewise_linear(ctx.settings[0]) else grad, at, bias, shift)


def _backward_backward(ctx: Any, direction: Tensor | None, of_sums: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 10
    if direction is None and of_sums is None:
        return nothing
    grad, at, bias, shift = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if is_piecewise_linear(ctx.settings[0]) or not (needs[1] or needs[2]):
        wanted = [needs[0], needs[3]]
        if not any(wanted):
            return nothing
        of_grad, of_shift = _bias_act_backward(direction, at, bias, of_sums, *ctx.settings, ctx.at_output, wanted)
        of_at = of_bias = None
    else:
        if shift is not None:
            grad = _factor(grad, shift, at).to(at.dtype)
        of_grad, of_at, of_bias = _bias_act_double_backward(
            grad, at, bias, direction, of_sums, *ctx.settings, [needs[0] or needs[3], needs[1], needs[2]]
        )
        of_shift = _sums(widened(of_grad)) if needs[3] else None
    return (
        of_grad if needs[0] else None,
        of_at if needs[1] else None,
        _in_type_of(bias, of_bias) if needs[2] else None,
        _in_type_of(shift, of_shift) if needs[3] else None,
        *nothing[4:],
    )


def _in_type_of(values: Tensor | None, sums: Tensor | None) -> Tensor | None:
    return None if sums is None or values is None else sums.to(values.dtype)


_bias_act_backward = define(
    f"bias_act_backward(Tensor? grad, Tensor at, Tensor? bias, Tensor? shift, {_SETTINGS}, bool at_output, "
    "bool[] wanted) -> (Tensor, Tensor)",
    fake=_fake_backward,
    setup_context=_setup_backward,
    backward=_backward_backward,
    definition=_definition_backward,
    layouts=lambda args: [Layout({"grad": 0, "at": 0}, (0, None))],
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, *ctx.settings = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    activation, slope, gain, _ = ctx.settings
    # x need not live on where y tells the derivative: y is what the next layer keeps in any case.
    ctx.at_output = output_tells(activation, slope, gain)
    ctx.save_for_backward(*((output, None) if ctx.at_output else (x, bias)))


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    at, bias = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:2])
    grad_x, grad_bias = _bias_act_backward(grad_y, at, bias, None, *ctx.settings, ctx.at_output, wanted)
    if wanted[1] and grad_bias.dtype != ctx.bias_dtype:
        grad_bias = grad_bias.to(ctx.bias_dtype)
    return grad_x if wanted[0] else None, grad_bias if wanted[1] else None, None, None, None, None


def _jvp(ctx: Any, d_x: Tensor | None, d_bias: Tensor | None, *_: Any) -> Tensor:
    at, bias = ctx.saved_tensors
    return _bias_act_backward(d_x, at, bias, d_bias, *ctx.settings, ctx.at_output, [True, False])[0]


_bias_act = define(
    f"bias_act(Tensor x, Tensor? bias, {_SETTINGS}) -> Tensor",
    fake=lambda x, *_: _like(x),
    setup_context=_setup_context,
    backward=_backward,
    jvp=_jvp,
    definition=_definition,
    layouts=lambda args: [Layout({"x": 0}, (0,))],
    out=Out(suggested_format),
)


def _number(name: str, value: Any) -> float:
    if isinstance(value, torch.SymFloat):
        return value  # type: ignore[return-value]
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    number = float(value)
    if not -math.inf < number < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")
    return number


# Bits of a float's 53 that tensors of a type lack.
_LACKING = {torch.float64: 0, torch.float32: 29, torch.float16: 42, torch.bfloat16: 45}


def _in_type(value: float, dtype: torch.dtype) -> float:
    """A number as tensors of a type hold it, so that what reached it is known by being equal; it is not subnormal.

    Dekker's, "A Floating-Point Technique for Extending the Available Precision" (1971): the compiler can follow it.
    """
    if not _LACKING[dtype]:
        return value
    scaled = value * (2.0 ** _LACKING[dtype] + 1)
    return scaled - (scaled - value)


def _check(x: Any, activation: Any, slope: Any, gain: Any, clamp: Any, bias: Any) -> tuple[float, float, float | None]:
    """Looks at every argument; returns slope, gain and clamp."""
    check_tensor("x", x)
    if activation not in get_args(Activation):
        names = ", ".join(f'"{name}"' for name in get_args(Activation))
        raise ValueError(f"activation must be one of {names}, got {activation!r}")
    slope, gain = _number("slope", slope), _number("gain", gain)
    if clamp is not None:
        clamp = _number("clamp", clamp)
        if clamp < 0:
            raise ValueError(f"clamp must be at least 0 or None, got {clamp}")
        clamp = _in_type(clamp, x.dtype)
    if bias is not None:
        if x.dim() < 2:
            raise ValueError(f"x must have at least two dimensions, samples and channels, for a bias, got {x.dim()}")
        check_channel_values("bias", bias, x, (x.shape[1],), "C")
    return slope, gain, clamp


_CONTRACT = Contract(_check)


def bias_act(
    x: Tensor,
    bias: Tensor | None = None,
    activation: Activation = "linear",
    *,
    slope: float = 0.2,
    gain: float = 1.0,
    clamp: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Adds a bias to each channel, applies an activation, multiplies and clamps, in one pass over memory.

    y = min(max(gain * act(x + bias[c]), -clamp), clamp), with t = x + bias[c] and act(t) one of

    ===============  =========================================================================
    ``linear``       t
    ``relu``         t where t > 0, else 0
    ``leaky_relu``   t where t > 0, else slope * t
    ``tanh``         tanh(t)
    ``sigmoid``      1 / (1 + exp(-t))
    ``elu``          t where t > 0, else exp(t) - 1
    ``selu``         1.0507 t where t > 0, else 1.0507 * 1.6733 (exp(t) - 1)
    ``softplus``     log(1 + exp(t)), which does not overflow
    ``silu``         t * sigmoid(t)
    ``gelu``         t times the standard normal distribution function, exactly (no tanh approximation)
    ===============  =========================================================================

    Args:
        x: (N, C, ...), float32, bfloat16, float16 or float64; without a bias (N, ...).
        bias: (C,), of ``x``'s dtype or float32 (under autocast, of a half type too); left out it is 0.
        activation: the name of one.
        slope: of ``leaky_relu``; nothing else takes it. 0.2 is that of DCGAN and StyleGAN, PyTorch's own default 0.01.
        gain: a factor. StyleGAN takes sqrt(2) after ``relu`` and ``leaky_relu``, which keeps the variance.
        clamp: the largest magnitude of y, at least 0; None for none. It is rounded to ``x``'s dtype.
        out: a tensor like ``x`` to write to instead of a new one, with any strides; it may be ``x`` itself. Not where a
            gradient is wanted.

    Returns:
        y: x's shape, dtype and memory format (contiguous or channels_last). The arithmetic is in float32, for float64
        inputs in float64, and y is rounded once. In float32 act is within 8 units in the last place of the real value
        (silu within |t| / 3 below -24), where that is above 1e-36. NaN and infinities propagate as in PyTorch.

    All derivatives are kernels, one pass each: the gradient with the sum for the bias, the gradient of the gradient,
    and forward mode; beyond the second order of a smooth activation it is PyTorch's operations. For ``linear``,
    ``relu`` and ``leaky_relu`` (gain > 0, slope >= 0) y is kept for the gradient, which the next layer keeps in any
    case, and x may be freed; for the others x is kept. At 0 the derivative of ``relu`` is 0, and of ``leaky_relu`` the
    slope, as PyTorch's are; where y has reached the clamp it is 0.

    Deterministic: the same bits for any number of threads and on any SIMD level, and y and the gradient of x for any
    split of the batch; the gradient of the bias is summed in an order of the shape's alone; no atomics.

    Raises:
        TypeError, ValueError: an argument is not as above; the message says which, and nothing is written.

    >>> x, bias = torch.randn(2, 8, 4, 4), torch.randn(8)
    >>> y = bias_act(x, bias, "leaky_relu", gain=2**0.5, clamp=256.0)
    >>> want = torch.nn.functional.leaky_relu(x + bias[:, None, None], 0.2) * 2**0.5
    >>> torch.allclose(y, want, atol=1e-6)
    True

    Source: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN" (2020), section 2 and appendix B; the
    clamp: Karras et al., "Training Generative Adversarial Networks with Limited Data" (2020), appendix D.
    """
    known = None
    if out is None or type(out) in PLAIN_TYPES:
        known = _CONTRACT.known(x, activation, slope, gain, clamp, bias)
    if known is not None and out is None:
        settings, wants_gradient = known
        if wants_gradient:
            return _bias_act.with_gradient(x, bias, activation, *settings)
        return choice.kernel("bias_act", x)(x, bias, activation, *settings)
    if known is None and is_overridden(x, bias, out):
        options = {"slope": slope, "gain": gain, "clamp": clamp, "out": out}
        return hand_over(bias_act, (x, bias, out), x, bias, activation, **options)
    if isinstance(x, Tensor) and x.dtype == torch.float32 and autocast_dtype(x.device) is not None:
        bias = widened(bias)
    settings = _CONTRACT(x, activation, slope, gain, clamp, bias) if known is None else known[0]
    if out is None:
        return _bias_act(x, bias, activation, *settings)
    check_out(out, "x", x, {"bias": bias})
    _bias_act.into(x, bias, activation, *settings, out)
    return out
