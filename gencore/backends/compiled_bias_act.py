"""The op bias_act by the compiled modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gencore.backends.compiled import CompiledOps
from gencore.backends.layout import channel_sums, in_format, suggested_format
from gencore.backends.structs import DTYPE, addresses, bias_act_settings, bias_act_shape, channel_values


class CompiledBiasActOps(CompiledOps):
    def bias_act(
        self,
        x: Tensor,
        bias: Tensor | None,
        activation: str,
        slope: float,
        gain: float,
        clamp: float | None,
        y: Tensor | None = None,
    ) -> Tensor:
        """``y``: where to write to, with the strides of ``x`` in its format."""
        memory_format = torch.contiguous_format
        if not x.is_contiguous():
            memory_format = suggested_format(x)
            x = x.contiguous(memory_format=memory_format)
        if y is None:
            y = self._empty_like(x)
        held, (values,) = channel_values(bias)
        self._module.bias_act(
            x=x.data_ptr(), y=y.data_ptr(), dtype=DTYPE[x.dtype], shape=bias_act_shape(x, memory_format),
            settings=bias_act_settings(activation, slope, gain, clamp), bias=values, place=self._place(x),
        )  # fmt: skip
        del held
        return y

    def bias_act_backward(
        self,
        grad: Tensor | None,
        at: Tensor,
        bias: Tensor | None,
        shift: Tensor | None,
        *settings_and_wanted: Any,
    ) -> tuple[Tensor | None, Tensor | None]:
        *settings, at_output, wanted = settings_and_wanted
        memory_format = suggested_format(at)
        grad, at = in_format(memory_format, grad, at)
        grad, at = None if grad is None else self._aligned(grad), self._aligned(at)
        product = self._empty_like(at) if wanted[0] else None
        sums = channel_sums(at) if wanted[1] else None
        shape, (held, (of_bias, of_shift)) = bias_act_shape(at, memory_format), channel_values(bias, shift)
        workspace = self._workspace("bias_act", at, shape) if wanted[1] else None
        of_grad, of_at, of_product, of_sums = addresses((grad, at, product, sums))
        self._module.bias_act_backward(
            grad=of_grad, at=of_at, product=of_product, sums=of_sums, dtype=DTYPE[at.dtype], shape=shape,
            settings=bias_act_settings(*settings), at_output=at_output, bias=of_bias, shift=of_shift,
            place=self._place(at, workspace),
        )  # fmt: skip
        del held
        return product, sums

    def bias_act_double_backward(
        self,
        grad: Tensor,
        x: Tensor,
        bias: Tensor | None,
        direction: Tensor | None,
        shift: Tensor | None,
        *settings_and_wanted: Any,
    ) -> tuple[Tensor | None, ...]:
        *settings, wanted = settings_and_wanted
        memory_format = suggested_format(x)
        grad, x, direction = in_format(memory_format, grad, x, direction)
        grad, x = self._aligned(grad), self._aligned(x)
        direction = None if direction is None else self._aligned(direction)
        results = [self._empty_like(x) if want else None for want in wanted[:2]]
        sums = channel_sums(x) if wanted[2] else None
        shape, (held, (of_bias, of_shift)) = bias_act_shape(x, memory_format), channel_values(bias, shift)
        workspace = self._workspace("bias_act", x, shape) if wanted[2] else None
        of_grad, of_x, of_direction, of_grad_grad, of_grad_x, of_sums = addresses((grad, x, direction, *results, sums))
        self._module.bias_act_double_backward(
            grad=of_grad, x=of_x, direction=of_direction, grad_grad=of_grad_grad, grad_x=of_grad_x, sums=of_sums,
            dtype=DTYPE[x.dtype], shape=shape, settings=bias_act_settings(*settings), bias=of_bias, shift=of_shift,
            place=self._place(x, workspace),
        )  # fmt: skip
        del held
        return *results, sums
