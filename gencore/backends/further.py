"""The derivatives beyond the gradient, in forward mode and of second order, by the compiled modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gencore.backends.compiled import (
    ACTIVATION,
    CompiledOps,
    attention_sizes,
    channel_values,
    copy_written,
    group_norm_sizes,
    heads,
    heads_or_none,
    log_sums,
)
from gencore.backends.layout import empty_gradients, empty_with_channels, in_format, suggested_format


class FurtherOps(CompiledOps):
    def _all_readable(self, *tensors: Tensor | None) -> list[Tensor | None]:
        return [None if tensor is None else self._readable(tensor) for tensor in tensors]

    def attention_jvp(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dq: Tensor | None,
        dk: Tensor | None,
        dv: Tensor | None,
        scale: float,
        d_out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``d_out``: where to write to, with strides as those of a readable tensor."""
        given = (*attention_sizes(q, k), scale, *self._place(q))
        if d_out is None:
            d_out = self._empty_like(q)
        return self._attention_jvp("attention_jvp", given, (q, k, v, out), lse, (dq, dk, dv), d_out)

    def general_attention_jvp(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dq: Tensor | None,
        dk: Tensor | None,
        dv: Tensor | None,
        *settings: Any,
    ) -> tuple[Tensor, Tensor]:
        held, given = self._given(q, k, v, *settings)
        d_out = empty_with_channels(q, v.shape[3])
        found = self._attention_jvp("general_attention_jvp", given, (q, k, v, out), lse, (dq, dk, dv), d_out)
        del held
        return found

    def _attention_jvp(
        self,
        op: str,
        given: tuple[Any, ...],
        tensors: Sequence[Tensor],
        lse: Tensor,
        direction: Sequence[Tensor | None],
        d_out: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """``given``: the last arguments of the kernel but for a workspace."""
        into, lse, d_lse = self._writable(d_out), lse.contiguous(), log_sums(tensors[0])
        tensors = [self._readable(tensor) for tensor in tensors]
        direction = self._all_readable(*direction)
        workspace = self._workspace(op, tensors[0], *given[:2])
        getattr(self._module, op)(
            [heads(tensor) for tensor in tensors], lse.data_ptr(), heads_or_none(*direction), heads(into),
            d_lse.data_ptr(), *given, *map(Tensor.data_ptr, workspace),
        )  # fmt: skip
        return d_out if into is d_out else d_out.copy_(into), d_lse

    def attention_double_backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dq: Tensor | None,
        dk: Tensor | None,
        dv: Tensor | None,
        scale: float,
        wanted: list[bool],
        grads: tuple[Tensor, ...] | None = None,
    ) -> tuple[Tensor | None, ...]:
        """``grads``: where to write to, with strides as those of readable tensors; all of them are then wanted."""
        given = (*attention_sizes(q, k), scale, *self._place(q))
        results = grads or self._gradients((grad_out, q, k, v), wanted)
        op, tensors = "attention_double_backward", (grad_out, q, k, v, out)
        return self._attention_double_backward(op, given, tensors, lse, (dq, dk, dv), results)

    def general_attention_double_backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dq: Tensor | None,
        dk: Tensor | None,
        dv: Tensor | None,
        *settings_and_wanted: Any,
    ) -> tuple[Tensor | None, ...]:
        *settings, wanted = settings_and_wanted
        held, given = self._given(q, k, v, *settings)
        results = self._gradients((grad_out, q, k, v), wanted)
        op, tensors = "general_attention_double_backward", (grad_out, q, k, v, out)
        found = self._attention_double_backward(op, given, tensors, lse, (dq, dk, dv), results)
        del held
        return found

    def _attention_double_backward(
        self,
        op: str,
        given: tuple[Any, ...],
        tensors: Sequence[Tensor],
        lse: Tensor,
        direction: Sequence[Tensor | None],
        results: tuple[Tensor | None, ...],
    ) -> tuple[Tensor | None, ...]:
        lse, into = lse.contiguous(), [None if result is None else self._writable(result) for result in results]
        tensors = [self._readable(tensor) for tensor in tensors]
        direction = self._all_readable(*direction)
        workspace = self._workspace(op, tensors[1], *given[:2])
        getattr(self._module, op)(
            [heads(tensor) for tensor in tensors], lse.data_ptr(), heads_or_none(*direction), heads_or_none(*into),
            *given, *map(Tensor.data_ptr, workspace),
        )  # fmt: skip
        copy_written(results, into)
        return results

    def group_norm_jvp(
        self,
        x: Tensor,
        statistics: Tensor,
        num_groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        bias_in: Tensor | None,
        d_x: Tensor | None,
        d_weight: Tensor | None,
        d_bias: Tensor | None,
        d_scale: Tensor | None,
        d_shift: Tensor | None,
        d_bias_in: Tensor | None,
        activation: str | None,
        eps: float,
    ) -> Tensor:
        """``eps``: what the statistics hold already."""
        memory_format = suggested_format(x)
        x, d_x = in_format(memory_format, x, d_x)
        x, d_x = self._aligned(x), None if d_x is None else self._aligned(d_x)
        statistics, d_y = statistics.contiguous(), self._empty_like(x)
        sizes = group_norm_sizes(x, num_groups, memory_format)
        held, values = channel_values(weight, bias, scale, shift, bias_in)
        d_held, d_values = channel_values(d_weight, d_bias, d_scale, d_shift, d_bias_in)
        workspace = self._workspace("group_norm_jvp", x, *sizes)
        self._module.group_norm_jvp(
            x.data_ptr(), d_y.data_ptr(), statistics.data_ptr(), *sizes, ACTIVATION[activation], values,
            0 if d_x is None else d_x.data_ptr(), d_values, *self._place(x), *map(Tensor.data_ptr, workspace),
        )  # fmt: skip
        del held, d_held
        return d_y

    def group_norm_double_backward(
        self,
        grad_y: Tensor,
        x: Tensor,
        statistics: Tensor,
        num_groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        bias_in: Tensor | None,
        d_x: Tensor | None,
        d_weight: Tensor | None,
        d_bias: Tensor | None,
        d_scale: Tensor | None,
        d_shift: Tensor | None,
        d_bias_in: Tensor | None,
        activation: str | None,
        wanted: list[bool],
        eps: float,
    ) -> tuple[Tensor | None, ...]:
        """``eps``: what the statistics hold already."""
        memory_format = suggested_format(x)
        grad_y, x, d_x = in_format(memory_format, grad_y, x, d_x)
        grad_y, x, d_x = self._aligned(grad_y), self._aligned(x), None if d_x is None else self._aligned(d_x)
        statistics = statistics.contiguous()
        of_values = empty_gradients((weight, bias, scale, shift, bias_in), wanted[2:])
        grads = [*(self._empty_like(x) if want else None for want in wanted[:2]), *of_values]
        sizes = group_norm_sizes(x, num_groups, memory_format)
        held, values = channel_values(weight, bias, scale, shift, bias_in)
        d_held, d_values = channel_values(d_weight, d_bias, d_scale, d_shift, d_bias_in)
        workspace = self._workspace("group_norm_double_backward", x, *sizes)
        self._module.group_norm_double_backward(
            grad_y.data_ptr(), x.data_ptr(), statistics.data_ptr(), *sizes, ACTIVATION[activation], values,
            0 if d_x is None else d_x.data_ptr(), d_values,
            [0 if grad is None else grad.data_ptr() for grad in grads], *self._place(x),
            *map(Tensor.data_ptr, workspace),
        )  # fmt: skip
        del held, d_held
        return tuple(grads)
