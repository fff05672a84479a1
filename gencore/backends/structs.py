"""Tensors as the structs of ``csrc/include/gencore``, which the functions of the compiled modules take.

Functions with the structs' names make them from their fields, as tuples. None stands for a struct with nothing in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gencore._cpu import (
    AttentionOptions as AttentionOptions,
)
from gencore._cpu import (
    AttentionShape,
    BiasActSettings,
    BiasActShape,
    ChannelValues,
    GroupNormDirection,
    GroupNormShape,
    NoiseShape,
)
from gencore._cpu import (
    Coefficients as Coefficients,
)
from gencore._cpu import (
    NoiseKey as NoiseKey,
)
from gencore._cpu import (
    ResampledAxis as ResampledAxis,
)
from gencore.backends.activations import NUMBERS as ACTIVATION
from gencore.backends.layout import planes_of

DTYPE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_CONTIGUOUS = torch.contiguous_format


def _channels(tensor: Tensor, memory_format: torch.memory_format) -> int:
    """The channels of a channels-last tensor; 0 says that elements lie in logical order."""
    return 0 if memory_format is _CONTIGUOUS else tensor.shape[1]


def addresses(tensors: Sequence[Tensor | None]) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def noise_shape(x: Tensor, memory_format: torch.memory_format, draws: int = 1) -> Any:
    """The sizes of a tensor in its format, one sample after the other."""
    samples = x.shape[0]
    return NoiseShape(
        samples=samples, draws=draws, elements=x.numel() // samples if samples else 0,
        channels=_channels(x, memory_format),
    )  # fmt: skip


def heads(tensor: Tensor | None) -> Any:
    """The HeadsTensor of a tensor (B, heads, tokens, channels): its address, then its strides in this order."""
    return None if tensor is None else (tensor.data_ptr(), *tensor.stride())


def repeated(mask: Tensor) -> tuple[int, ...]:
    """The same of a mask: along a dimension of one element, the same is read again."""
    return mask.data_ptr(), *(0 if n == 1 else step for n, step in zip(mask.shape, mask.stride(), strict=True))


def attention_shape(q: Tensor, k: Tensor, v: Tensor) -> Any:
    batch, heads, queries, size = q.shape
    _, key_heads, keys, _ = k.shape
    return AttentionShape(
        batch=batch, heads=heads, queries=queries, keys=keys, size=size, key_heads=key_heads, value_size=v.shape[3]
    )


def group_norm_shape(x: Tensor, num_groups: int, memory_format: torch.memory_format) -> Any:
    samples, channels = x.shape[0], x.shape[1]
    planes = samples * channels
    return GroupNormShape(
        samples=samples, channels=channels, pixels=x.numel() // planes if planes else 0, groups=num_groups,
        channels_last=memory_format is not _CONTIGUOUS,
    )  # fmt: skip


def channel_values(*values: Tensor | None) -> tuple[list[Tensor], list[Any]]:
    """The values, dense along channels, for the caller to hold, and what kernels take of each."""
    dense: list[Tensor] = []
    described: list[Any] = []
    for value in values:
        if value is None:
            described.append(None)
            continue
        if not value.is_contiguous() and value.stride(-1) != 1:
            value = value.contiguous()
        dense.append(value)
        described.append(
            ChannelValues(
                data=value.data_ptr(), dtype=DTYPE[value.dtype], stride=0 if value.dim() == 1 else value.stride(0)
            )
        )
    return dense, described


def group_norm_direction(d_x: Tensor | None, *d_values: Tensor | None) -> tuple[list[Tensor], Any]:
    """The changes of the values, dense along channels, for the caller to hold, and what kernels take of a direction."""
    held, (weight, bias, scale, shift, bias_in) = channel_values(*d_values)
    return held, GroupNormDirection(
        x=None if d_x is None else d_x.data_ptr(), weight=weight, bias=bias, scale=scale, shift=shift, bias_in=bias_in
    )


def bias_act_shape(x: Tensor, memory_format: torch.memory_format) -> Any:
    outer, channels, inner = planes_of(x, memory_format)
    return BiasActShape(outer=outer, channels=channels, inner=inner)


def bias_act_settings(activation: str, slope: float, gain: float, clamp: float | None) -> Any:
    return BiasActSettings(
        activation=ACTIVATION[activation], slope=slope, gain=gain, clamp=math.inf if clamp is None else clamp
    )
