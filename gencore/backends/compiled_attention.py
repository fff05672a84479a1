"""Attention's derivatives beyond the gradient, in forward mode and of second order, by the compiled modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gencore.backends.compiled import CompiledOps, copy_written
from gencore.backends.layout import empty_with_channels, log_sums
from gencore.backends.structs import DTYPE, attention_shape, heads


class CompiledAttentionOps(CompiledOps):
    def _readable_or_none(self, *tensors: Tensor | None) -> list[Tensor | None]:
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
        options: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """``d_out``: where to write to, with strides as those of a readable tensor."""
        if d_out is None:
            d_out = self._empty_like(q)
        into = self._writable(d_out)
        lse = self._dense_log_sums(lse)
        d_lse = log_sums(q)
        q, k, v, out = (self._readable(tensor) for tensor in (q, k, v, out))
        dq, dk, dv = self._readable_or_none(dq, dk, dv)
        shape = attention_shape(q, k, v)
        workspace = self._workspace("attention_jvp", q, shape)
        self._module.attention_jvp(
            q=heads(q), k=heads(k), v=heads(v), out=heads(out), lse=lse.data_ptr(), dq=heads(dq), dk=heads(dk),
            dv=heads(dv), d_out=heads(into), d_lse=d_lse.data_ptr(), dtype=DTYPE[q.dtype], shape=shape, scale=scale,
            options=options, base=self._base(lse), place=self._place(q, workspace),
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
        wanted: Sequence[bool],
        grads: tuple[Tensor, ...] | None = None,
        options: Any = None,
    ) -> tuple[Tensor | None, ...]:
        """``grads``: where to write to, with strides as those of readable tensors; all of them are then wanted."""
        results = grads or self._gradients((grad_out, q, k, v), wanted)
        into = [None if result is None else self._writable(result) for result in results]
        grad_grad_out, grad_q, grad_k, grad_v = into
        grad_out, q, k, v, out = (self._readable(tensor) for tensor in (grad_out, q, k, v, out))
        dq, dk, dv = self._readable_or_none(dq, dk, dv)
        lse = self._dense_log_sums(lse)
        shape = attention_shape(q, k, v)
        workspace = self._workspace("attention_double_backward", q, shape)
        self._module.attention_double_backward(
            grad_out=heads(grad_out), q=heads(q), k=heads(k), v=heads(v), out=heads(out), lse=lse.data_ptr(),
            dq=heads(dq), dk=heads(dk), dv=heads(dv), grad_grad_out=heads(grad_grad_out), grad_q=heads(grad_q),
            grad_k=heads(grad_k), grad_v=heads(grad_v), dtype=DTYPE[q.dtype], shape=shape, scale=scale,
            options=options, base=self._base(lse), place=self._place(q, workspace),
        )  # fmt: skip
        copy_written(results, into)
        return results

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
        held, scale, options = self._options(q, *settings)
        d_out = empty_with_channels(q, v.shape[3])
        results = self.attention_jvp(q, k, v, out, lse, dq, dk, dv, scale, d_out, options)
        del held
        return results

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
        held, scale, options = self._options(q, *settings)
        grads = self.attention_double_backward(grad_out, q, k, v, out, lse, dq, dk, dv, scale, wanted, options=options)
        del held
        return grads
