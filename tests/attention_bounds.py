"""How far attention's results may be from the definition in float64, derived; and its inputs."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gencore.backends.reference import attention as reference
from gencore.bench import cases

# What one rounding of a number to the type changes it by, relatively: the result's, and in half types that of the
# probabilities (and, in the gradients, of ds) before they weigh.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}
# One step of the arithmetic. float32 is rounded to nearest. The tensor cores that half types are multiplied on align
# the terms of a sum and cut off what is beyond the 24 bits of the largest. float64 has its roundings twice: the
# definition has them too.
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-23, torch.float16: 2.0**-23, torch.float64: 2.0**-52}
# Tensor cores add the terms eight at a time at least, and that sum to those before.
STEPS = 9 / 8
# An exponential or a logarithm is right to 8 units: 4 units in the last place, for which GPUs' approximations need 2.
FUNCTION = 8
# Every tile of keys may multiply the sums so far, by an exponential that is rounded as it is; tiles are of 16 keys at
# least.
TILE = 16
# Below it float32 has subnormal numbers, which may be taken for 0; and half of float16's step there, when probabilities
# and ds are rounded.
SMALLEST = 2.0**-126
STEP = {torch.float16: 2.0**-25}


def inputs(
    case: cases.AttentionCase, dtype: torch.dtype, device: str = "cpu", seed: int = 0, factor: float = 1.0
) -> list[Tensor]:
    """q, k and v in the case's layout, or the image that holds them; ``factor`` multiplies q and k, or the image."""
    tensors = case.tensors(dtype, device, torch.Generator().manual_seed(seed))
    if factor != 1:
        for tensor in tensors[:2]:
            tensor *= factor
    return tensors


def exact(tensors: list[Tensor]) -> list[Tensor]:
    """The same in float64 on the CPU, as leaves for gradients."""
    return [tensor.detach().cpu().double().contiguous().requires_grad_() for tensor in tensors]


def heads_of(image: Tensor, num_heads: int, parts: int = 3) -> tuple[Tensor, ...]:
    """(N, parts C, ...) as ``parts`` tensors (N, heads, pixels, channels of a head)."""
    return image.flatten(2).unflatten(1, (parts, num_heads, -1)).transpose(-1, -2).unbind(1)


class Bound(NamedTuple):
    """``want`` in float64, and how far a result may be from it before it is rounded to its type."""

    want: Tensor
    error: Tensor


class Terms:
    """Attention in float64 with what every step may be wrong by, carried on to the results.

    With u the unit, A_ij = |scale| sum_c |q_ic| |k_jc| and M_i the largest A_ij of a row:

    - A logit s_ij is a sum of d products, scaled, turned to base 2 and compared with the maximum: (d + 6) u A_ij, and
      2 u M_i for the maximum's own scaling and the difference. This moves the exponent, so that p_ij is wrong by a
      factor of at most e^e_ij, where e_ij also has the errors of the exponential and of its rescalings.
    - out_i is a mean of v_j with weights p_ij, so that factors e^(+-e_ij) of these move it by at most
      sum_j p_ij (e^e_ij - 1) |v_j - out_i| / sum_j p_ij e^-e_ij: the largest logits' errors count, and those that all
      keys have in common do not. Besides, the numerator is a sum of S products and the denominator one of S, both
      multiplied anew by every tile, and their quotient is rounded; half types round p_ij before the product with v_j.
    - lse_i is wrong by e_ij averaged and the denominator's sum, and by the roundings of its parts.
    - The backward pass makes p_ij again from lse_i, which is wrong as said. delta_i has the error of out_i, as rounded,
      and of d products; ds_ij = p_ij (dp_ij - delta_i) has all of them. The gradients are sums of S or T products with
      it, and half types round it before.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype, scale: float | None = None):
        self.q, self.k, self.v, self.dtype = (*(tensor.detach() for tensor in (q, k, v)), dtype)
        self.scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        self.unit = u = UNIT[dtype]
        out, lse = reference.attention(*(t.detach() for t in (q, k, v)), self.scale)
        size, keys = q.shape[-1], k.shape[-2]
        v = self.v
        logits = self.scale * (self.q @ self.k.transpose(-1, -2))
        self.p = torch.exp(logits - lse.unsqueeze(-1))
        magnitudes = abs(self.scale) * (self.q.abs() @ self.k.abs().transpose(-1, -2))
        largest = magnitudes.amax(-1, keepdim=True) if keys else magnitudes.sum(-1, keepdim=True)
        tiles = keys // TILE + 1
        self.logit_error = u * ((STEPS * size + 6) * magnitudes + 2 * largest)
        error = self.logit_error + u * FUNCTION * (1 + tiles)
        moved = self.p * torch.expm1(error)
        # |v_j - out_i|, for each channel on its own.
        apart = (v.unsqueeze(-3) - out.unsqueeze(-2)).abs()
        of_logits = (moved.unsqueeze(-1) * apart).sum(-2)
        least = (self.p * torch.exp(-error)).sum(-1, keepdim=True) if keys else 1.0
        # P is rounded relative to the largest probability's exponential, 1.
        peak = self.p.amax(-1, keepdim=True) if keys else 0
        weighed = (self.p * torch.exp(error)) @ v.abs() / least
        sums = u * (STEPS * keys + tiles + 2)
        of_rounding = self._rounded * weighed + (self._step * peak + keys * SMALLEST) * v.abs().sum(-2, keepdim=True)
        # What the definition itself subtracts from the logits is rounded, and weighs all keys.
        of_definition = 2.0**-52 * (largest + lse.abs().unsqueeze(-1)).nan_to_num(posinf=0.0) * weighed
        of_all = (1 + 2 * sums) * (of_logits / least + 2 * sums * weighed + of_rounding) + of_definition
        self.out = Bound(out, of_all + keys * SMALLEST)
        parts = torch.where(lse.isfinite(), lse.abs() + largest.squeeze(-1) + math.log(max(keys, 1)), 0.0)
        self.lse = Bound(lse, torch.log1p(moved.sum(-1)) + sums + u * (FUNCTION + 4 * parts))

    @property
    def _rounded(self) -> float:
        return ROUNDING[self.dtype] if self.dtype in (torch.bfloat16, torch.float16) else 0.0

    @property
    def _step(self) -> float:
        return STEP.get(self.dtype, 0.0)

    def gradients(self, grad_out: Tensor) -> tuple[Bound, Bound, Bound]:
        """Of q, k and v."""
        q, k, v, g, p, u = self.q, self.k, self.v, grad_out, self.p, self.unit
        out, out_error = self.out
        size, queries, keys = q.shape[-1], q.shape[-2], k.shape[-2]
        dots = u * (STEPS * size + 2)
        lse = torch.where(self.lse.want.isfinite(), self.lse.error, 0.0).unsqueeze(-1)
        again = torch.expm1(self.logit_error + lse + u * FUNCTION)
        out_error = out_error + ROUNDING[self.dtype] * out.abs()
        delta = (g * out).sum(-1, keepdim=True)
        delta_error = (g.abs() * (out_error + dots * (out.abs() + out_error))).sum(-1, keepdim=True)
        dp = g @ v.transpose(-1, -2)
        dp_error = dots * (g.abs() @ v.abs().transpose(-1, -2))
        ds = p * (dp - delta)
        ds_error = p * again * (dp - delta).abs() + p * (1 + again) * (
            dp_error + delta_error + 2 * u * (dp.abs() + delta.abs())
        )
        ds_error = (1 + self._rounded) * ds_error + self._rounded * ds.abs() + self._step + SMALLEST
        p_error = (1 + self._rounded) * p * again + self._rounded * p + self._step + SMALLEST

        def product(weights: Tensor, error: Tensor, values: Tensor, terms: int, factor: float) -> Bound:
            sums = u * (STEPS * terms + 4)
            values = values.detach()
            found = (error + sums * (weights.abs() + error)) @ values.abs()
            # A scale below 1 may have been multiplied with before the rounding, or after.
            return Bound(factor * (weights @ values), max(abs(factor), self._step and 1.0) * found)

        return (
            product(ds, ds_error, k, keys, self.scale),
            product(ds.transpose(-1, -2), ds_error.transpose(-1, -2), q, queries, self.scale),
            product(p.transpose(-1, -2), p_error.transpose(-1, -2), g, queries, 1.0),
        )


def excess(got: Tensor, bound: Bound) -> float:
    """How many times as far as it may a result is from what it should be; 0 for one without an element."""
    want, error = bound
    assert got.shape == want.shape, f"{tuple(got.shape)} for {tuple(want.shape)}"
    if not got.numel():
        return 0.0
    assert bool(error[want.isfinite()].isfinite().all()), "nothing is bounded"
    got = got.detach().cpu()
    # Below its normal numbers a type has steps of one size.
    steps = torch.finfo(got.dtype).smallest_normal * ROUNDING[got.dtype]
    allowed = error + ROUNDING[got.dtype] * (want.abs() + error) + steps
    ratio = torch.where(got.double() == want, 0.0, (got.double() - want).abs() / allowed)
    ratio = ratio.nan_to_num(nan=math.inf, posinf=math.inf)
    return float(ratio.max())


def assert_close(got: Tensor, bound: Bound, name: str = "result") -> None:
    times = excess(got, bound)
    assert times <= 1, f"{name}: {times:.3g} times the bound"
