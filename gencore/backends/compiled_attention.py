"""Attention, its gradient, and its derivatives in forward mode and of second order, by the compiled modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gencore.backends.compiled import CompiledOps
from gencore.backends.layout import empty_parts_of_log_sums, empty_with_channels, log_sums
from gencore.backends.structs import DTYPE, AttentionOptions, attention_shape, heads, repeated


class CompiledAttentionOps(CompiledOps):
    def _readable(self, tensor: Tensor) -> Tensor:
        """The tensor (B, heads, tokens, channels), or a copy with strides that the kernel for attention takes."""
        return tensor

    def _writable(self, tensor: Tensor) -> Tensor:
        """The tensor, or one in its place that the kernel for attention can write to, to be copied."""
        return tensor

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        out: Tensor | None = None,
        with_lse: bool = True,
        options: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        """``out``: where to write to, with strides as those of a readable tensor; ``with_lse``: whether to keep it.

        ``options``, here and below: what :meth:`_options` says of them.
        """
        if out is None:
            out = self._empty_like(q)
        into = self._writable(out)
        q, k, v = self._readable(q), self._readable(k), self._readable(v)
        lse = None
        if with_lse:
            lse = log_sums(q) if options is None else self._empty_log_sums(q)
        shape = attention_shape(q, k, v)
        workspace = self._workspace("attention", q, shape)
        self._module.attention(
            q=heads(q), k=heads(k), v=heads(v), out=heads(into), lse=None if lse is None else lse.data_ptr(),
            dtype=DTYPE[q.dtype], shape=shape, scale=scale, options=options, base=self._base(lse),
            place=self._place(q, workspace),
        )  # fmt: skip
        return out if into is out else out.copy_(into), lse

    def attention_backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        wanted: Sequence[bool],
        grads: tuple[Tensor, Tensor, Tensor] | None = None,
        options: Any = None,
        grad_mask: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        """``grads``: where to write to, with strides as those of readable tensors; all of them are then wanted.

        ``grad_mask``: where kernels that make it add the gradient of the mask to: dense, of the type of ``lse``.
        """
        results = grads or self._gradients((q, k, v), wanted)
        grad_q, grad_k, grad_v = into = [None if result is None else self._writable(result) for result in results]
        grad_out, q, k, v, out = (self._readable(tensor) for tensor in (grad_out, q, k, v, out))
        lse = self._dense_log_sums(lse)
        shape = attention_shape(q, k, v)
        workspace = self._workspace("attention_backward", q, shape)
        self._module.attention_backward(
            grad_out=heads(grad_out), q=heads(q), k=heads(k), v=heads(v), out=heads(out), lse=lse.data_ptr(),
            grad_q=heads(grad_q), grad_k=heads(grad_k), grad_v=heads(grad_v), dtype=DTYPE[q.dtype], shape=shape,
            scale=scale, options=options, base=self._base(lse),
            grad_mask=None if grad_mask is None else repeated(grad_mask), place=self._place(q, workspace),
        )  # fmt: skip
        _copy_written(results, into)
        return results

    def general_attention(
        self, q: Tensor, k: Tensor, v: Tensor, *settings: Any, with_lse: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """``settings``, here and below: mask, key_lengths, key, scale, causal, dropout."""
        held, scale, options = self._options(q, *settings)
        results = self.attention(q, k, v, scale, empty_with_channels(q, v.shape[3]), with_lse, options)
        del held
        return results

    def general_attention_backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *settings_and_wanted: Any
    ) -> tuple[Tensor | None, ...]:
        *settings, wanted = settings_and_wanted
        held, scale, options = self._options(q, *settings)
        grads = self.attention_backward(grad_out, q, k, v, out, lse, scale, wanted, options=options)
        del held
        return grads

    def _empty_log_sums(self, q: Tensor) -> Tensor:
        """Memory for the logarithms of denominators in two parts: the kernel leaves the second, which is 0."""
        lse = empty_parts_of_log_sums(q)
        lse[1].zero_()
        return lse

    def _dense_log_sums(self, lse: Tensor) -> Tensor:
        """As the kernel takes them: it knows one part, which is then all."""
        return lse.sum(0) if lse.dim() == 4 else lse.contiguous()

    def _base(self, lse: Tensor | None) -> int | None:
        """The address of the second part, for a kernel that knows it."""
        return None

    def _gradients(self, tensors: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
        return tuple(self._empty_like(x) if want else None for x, want in zip(tensors, wanted, strict=True))

    def _options(
        self,
        q: Tensor,
        mask: Tensor | None,
        key_lengths: Tensor | None,
        key: Tensor | None,
        scale: float,
        causal: bool,
        dropout: float,
    ) -> tuple[tuple[Tensor | None, ...], float, Any]:
        """Tensors for the caller to hold, the scale, and the options of attention as the kernels take them."""
        key_lengths = None if key_lengths is None else key_lengths.contiguous()
        key = None if key is None else self._key(key, q)
        read, is_boolean = None, mask is not None and mask.dtype is torch.bool
        if mask is not None:
            read = repeated(mask)
        options = AttentionOptions(
            mask=read, mask_is_boolean=is_boolean, mask_dtype=0 if mask is None or is_boolean else DTYPE[mask.dtype],
            key_lengths=None if key_lengths is None else key_lengths.data_ptr(), causal=causal, dropout=dropout,
            key=None if key is None else self._words(key),
        )  # fmt: skip
        return (key_lengths, key), scale, options

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
        _copy_written(results, into)
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


def _copy_written(results: Sequence[Tensor | None], into: Sequence[Tensor | None]) -> None:
    """What stands in the place of results is copied to them."""
    for result, written in zip(results, into, strict=True):
        if result is not None and written is not None and written is not result:
            result.copy_(written)
