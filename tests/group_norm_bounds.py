"""Inputs of group normalization, and how far its results may be from the definition in float64."""

from __future__ import annotations

import math

import torch
from support import laid_out
from torch import Tensor

from gencore.bench import cases

NAMES = ("weight", "bias", "scale", "shift", "bias_in")

# Half a unit in the last place of the result's type, for the rounding to it.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}
# The arithmetic before it, relative to the terms that are added: the factor of x - m and the offset are rounded once
# each, x - m and the multiply-add once, e^-t to 3 units in the last place: 8 half units hold all that. Gradients
# multiply and add four such numbers. In float64 it is the definition's own sums that are rounded: of up to 2^15 numbers
# in blocks, each to 2^-53.
ARITHMETIC = {dtype: 2.0**-44 if dtype == torch.float64 else 2.0**-21 for dtype in cases.DTYPES}
GRADIENT = {dtype: 4 * tolerance for dtype, tolerance in ARITHMETIC.items()}


def inputs(case: cases.Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0, **of: float) -> dict[str, Tensor]:
    """x and the five values; ``mean`` and ``std`` are those of x."""
    generator = torch.Generator().manual_seed(seed)
    samples, channels = case.shape[:2]
    shapes = {"x": case.shape, "weight": (channels,), "bias": (channels,)}
    shapes |= dict.fromkeys(("scale", "shift", "bias_in"), (samples, channels))
    drawn = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    drawn["x"] = drawn["x"] * of.get("std", 1) + of.get("mean", 0.5)
    drawn = {name: value.to(device, dtype) for name, value in drawn.items()}
    return drawn | {"x": laid_out(drawn["x"], case)}


def exact(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same in float64 on the CPU, as leaves for gradients."""
    return {name: value.detach().cpu().double().contiguous().requires_grad_() for name, value in values.items()}


def along(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(*values.shape, *[1] * (x.dim() - 2))


class Terms:
    """How large the numbers are that results are made of: what their rounding is relative to."""

    def __init__(self, args: dict[str, Tensor], groups: int, eps: float = 1e-5):
        args = {name: value.detach() for name, value in args.items()}
        x = args["x"]
        zero, one = torch.zeros(1, 1, dtype=x.dtype), torch.ones(1, dtype=x.dtype)
        weight, bias = args.get("weight", one), args.get("bias", 0 * one)
        scale, shift = args.get("scale", zero), args.get("shift", zero)
        u = x + along(args.get("bias_in", zero), x)
        self.x, self.groups, self.size = x, groups, math.prod(x.shape[1:]) // groups
        in_groups = u.reshape(x.shape[0], groups, self.size)
        deviation = (in_groups.var(2, correction=0, keepdim=True) + eps).sqrt()
        self.inverse = (1 / deviation).expand_as(in_groups).reshape(x.shape)
        self.xhat = ((in_groups - in_groups.mean(2, keepdim=True)) / deviation).reshape(x.shape).abs()
        # The mean is a sum of deviations, whose size is 1; and it is rounded to float64, as the definition's.
        self.xhat += 1 + 2.0**-29 * u.abs() * self.inverse
        self.z = along(weight.abs(), x) * self.xhat + along(bias.abs(), x)
        self.factor = along(1 + scale.abs(), x)
        self.k = along(weight.abs(), x) * self.factor
        self.t = self.z * self.factor + along(shift.abs(), x)

    def _mean(self, values: Tensor) -> Tensor:
        grouped = values.reshape(self.x.shape[0], self.groups, self.size)
        return grouped.mean(2, keepdim=True).expand_as(grouped).reshape(values.shape)

    def gradients(self, grad_y: Tensor) -> dict[str, Tensor]:
        dt = grad_y.abs() * (1 + self.t)
        spatial = tuple(range(2, self.x.dim()))
        xhat = self.xhat
        x = self.inverse * (self.k * dt + self._mean(self.k * dt) + xhat * self._mean(self.k * dt * xhat))
        per_sample = {"scale": dt * self.z, "shift": dt, "bias_in": x}
        per_channel = {"weight": dt * self.factor * xhat, "bias": dt * self.factor}
        return (
            {"x": x}
            | {name: value.sum(spatial) if spatial else value for name, value in per_sample.items()}
            | {name: value.sum((0, *spatial)) for name, value in per_channel.items()}
        )


def assert_close(got: Tensor, want: Tensor, terms: Tensor, arithmetic: float) -> None:
    assert got.shape == want.shape
    if not got.numel():
        return
    # The smallest number of a half type is what a result near 0 is rounded to.
    bound = ROUNDING[got.dtype] * want.abs() + arithmetic * terms + torch.finfo(got.dtype).smallest_normal * 2.0**-10
    excess = (got.detach().cpu().double() - want).abs() / bound
    assert bool((excess <= 1).all()), f"{excess.max().item():.3g} times the bound"


def call(op, args: dict[str, Tensor], groups: int, activation: str | None, **more) -> Tensor:
    return op(args["x"], groups, **{name: args[name] for name in NAMES if name in args}, activation=activation, **more)
