"""Fused group normalization: statistics, normalization, modulation and activation are one op."""

from __future__ import annotations

import numbers
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from gencore._torch import hand_over, is_overridden
from gencore.arguments import integer
from gencore.backends import choice
from gencore.ops._checks import Contract, autocast_dtype, check_channel_values, check_out, check_tensor
from gencore.ops._group_norm import VALUES, normalize
from gencore.ops._library import PLAIN_TYPES, widened

Activation = Literal["silu"]


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
    others. It may be differentiated again, and forward mode works: the second derivative and that in forward mode are
    kernels too, two passes each, which allocate no more than their results; beyond them it is PyTorch's operations. NaN
    and infinities propagate as in PyTorch.

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
    known = None
    if out is None or type(out) in PLAIN_TYPES:
        known = _CONTRACT.known(x, num_groups, eps, activation, weight, bias, scale, shift, bias_in)
    if known is not None and out is None:
        (num_groups, eps), wants_gradient = known
        if wants_gradient:
            return normalize.with_gradient(x, num_groups, *values, activation, eps)[0]
        return choice.kernel("group_norm", x)(
            x, num_groups, weight, bias, scale, shift, bias_in, activation, eps, None, False
        )[0]
    tensors = (x, *values, out)
    if known is None and is_overridden(*tensors):
        options = {"scale": scale, "shift": shift, "activation": activation, "bias_in": bias_in, "out": out}
        return hand_over(group_norm, tensors, x, num_groups, weight, bias, eps, **options)
    if isinstance(x, Tensor) and x.dtype == torch.float32 and autocast_dtype(x.device) is not None:
        # An embedding is in half precision then, where x may have come from an op that is not.
        values = tuple(widened(value) for value in values)
    num_groups, eps = _CONTRACT(x, num_groups, eps, activation, *values) if known is None else known[0]
    if out is None:
        return normalize(x, num_groups, *values, activation, eps)[0]
    check_out(out, "x", x, dict(zip(VALUES, values, strict=True)))
    normalize.into(x, num_groups, *values, activation, eps, out)
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
        check_channel_values(name, value, x, (channels,), "C")
    for name, value in (("scale", scale), ("shift", shift), ("bias_in", bias_in)):
        check_channel_values(name, value, x, (samples, channels), "N, C")
    return num_groups, eps if isinstance(eps, torch.SymFloat) else float(eps)  # type: ignore[return-value]


_CONTRACT = Contract(_check)


def check_activation(activation: Any) -> None:
    if activation is not None and activation not in get_args(Activation):
        raise ValueError(f'activation must be "silu" or None, got {activation!r}')
