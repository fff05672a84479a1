"""What the compiled modules have in common, for the ops of activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gencore.backends.activations import act_settings
from gencore.backends.compiled import DTYPE, CompiledOps, channel_values
from gencore.backends.layout import channel_sums, in_format, planes_of, suggested_format


class CompiledActOps(CompiledOps):
    def bias_act(
        self, x: Tensor, bias: Tensor | None, activation: str, slope: float, gain: float, clamp: float | None,
        y: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """``y``: where to write to, with the strides of ``x`` in its format."""
        memory_format = torch.contiguous_format
        if not x.is_contiguous():
            memory_format = suggested_format(x)
            x = x.contiguous(memory_format=memory_format)
        if y is None:
            y = self._empty_like(x)
        dense, values = channel_values(bias)
        self._module.bias_act(
            x.data_ptr(), y.data_ptr(), DTYPE[x.dtype], *planes_of(x, memory_format),
            act_settings(activation, slope, gain, clamp), values, *self._place(x),
        )  # fmt: skip
        del dense
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
        grad, at = (None if tensor is None else self._aligned(tensor) for tensor in (grad, at))
        product = self._empty_like(at) if wanted[0] else None
        sums = channel_sums(at) if wanted[1] else None
        dense, values = channel_values(bias, shift)
        sizes = DTYPE[at.dtype], *planes_of(at, memory_format)
        workspace = self._workspace("bias_act", at, *sizes) if wanted[1] else ()
        self._module.bias_act_backward(
            0 if grad is None else grad.data_ptr(), at.data_ptr(), 0 if product is None else product.data_ptr(),
            0 if sums is None else sums.data_ptr(), *sizes, act_settings(*settings), at_output,
            values, *self._place(at), *(one.data_ptr() for one in workspace),
        )  # fmt: skip
        del dense
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
        grad, x, direction = (None if tensor is None else self._aligned(tensor) for tensor in (grad, x, direction))
        results = [self._empty_like(x) if want else None for want in wanted[:2]]
        sums = channel_sums(x) if wanted[2] else None
        dense, values = channel_values(bias, shift)
        sizes = DTYPE[x.dtype], *planes_of(x, memory_format)
        workspace = self._workspace("bias_act", x, *sizes) if wanted[2] else ()
        self._module.bias_act_double_backward(
            [0 if tensor is None else tensor.data_ptr() for tensor in (grad, x, direction, *results, sums)],
            *sizes, act_settings(*settings), values, *self._place(x), *(one.data_ptr() for one in workspace),
        )  # fmt: skip
        del dense
        return *results, sums
