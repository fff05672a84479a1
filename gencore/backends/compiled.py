"""What the compiled modules have in common: outputs are allocated, addresses and sizes are passed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gencore.backends.layout import (
    empty_draws,
    empty_gradients,
    empty_parts_of_log_sums,
    empty_with_channels,
    in_format,
    kept_format,
    memory_format_of,
    suggested_format,
)

DTYPE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_CONTIGUOUS = torch.contiguous_format


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr()


def _channels(tensor: Tensor, memory_format: torch.memory_format) -> int:
    """The channels of a channels-last tensor; 0 says that elements lie in logical order."""
    return 0 if memory_format is _CONTIGUOUS else tensor.shape[1]


class CompiledOps:
    """The ops by the names that the library knows them by.

    In these methods the names keep what ``contiguous`` returns alive until the kernel has its address.
    """

    def __init__(self, module: Any):
        self._module = module

    def _key(self, key: Tensor, tensor: Tensor) -> Tensor:
        """The key where the kernel for ``tensor`` can read it."""
        raise NotImplementedError

    def _place(self, tensor: Tensor) -> tuple[int, ...]:
        """The last arguments of every op: where to compute."""
        raise NotImplementedError

    def _place_of_key(self, key: Tensor) -> tuple[bool, ...]:
        """Before them, of ops that make noise: where the key is."""
        return ()

    def _noise(self, key: Tensor, tensor: Tensor) -> tuple[int, ...]:
        """The last arguments of ops that make noise: the key, which the caller holds, and where to compute."""
        rows = 0 if key.dim() == 1 else len(key)
        return key.data_ptr(), rows, *self._place_of_key(key), *self._place(tensor)

    def _empty_like(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor)

    def _is_on_device(self, table: Tensor, index: Tensor | None) -> bool:
        """Whether kernels read these coefficients in the memory of a device."""
        return False

    def _coefficients(
        self, table: Tensor, index: Tensor | None, tensor: Tensor
    ) -> tuple[tuple[Tensor, Tensor | None], tuple[int, int, int, bool]]:
        """Tensors for the caller to hold, and what the kernel for ``tensor`` takes of them."""
        on_device = self._is_on_device(table, index)
        place = tensor.device if on_device else torch.device("cpu")
        table = table.to(place, non_blocking=on_device).contiguous()
        if index is not None:
            index = index.to(place, non_blocking=on_device).contiguous()
        return (table, index), (table.data_ptr(), len(table), 0 if index is None else index.data_ptr(), on_device)

    def _is_aligned(self, tensor: Tensor) -> bool:
        """Whether the address lets kernels read as wide as the shape does: their sums are in an order of that."""
        return True

    def _aligned(self, tensor: Tensor) -> Tensor:
        return tensor if self._is_aligned(tensor) else tensor.clone()

    def _workspace(self, op: str, tensor: Tensor, *sizes: Any) -> tuple[Tensor, ...]:
        """Memory for what a kernel hands on within the call, its last argument, where it needs some."""
        return ()

    def _fill(self, kernel: Any, out: Tensor, key: Tensor) -> None:
        memory_format, dense, key = _CONTIGUOUS, out, self._key(key, out)
        if not out.is_contiguous():
            memory_format = memory_format_of(out)
            if memory_format is _CONTIGUOUS:
                dense = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        batch, channels = dense.shape[0], _channels(dense, memory_format)
        kernel(
            dense.data_ptr(), DTYPE[dense.dtype], batch, dense.numel() // batch if batch else 0, channels,
            *self._noise(key, out),
        )  # fmt: skip
        if dense is not out:
            out.copy_(dense)

    def normal_(self, out: Tensor, key: Tensor) -> None:
        self._fill(self._module.normal, out, key)

    def uniform_(self, out: Tensor, key: Tensor) -> None:
        self._fill(self._module.uniform, out, key)

    def reparameterize(
        self,
        mu: Tensor,
        logvar: Tensor,
        key: Tensor,
        num_samples: int | None = None,
        kl: Tensor | None = None,
        slope: Tensor | None = None,
    ) -> Tensor:
        """``kl``, ``slope``: where to write what else is wanted; the latter is like the result."""
        memory_format, channels = _CONTIGUOUS, 0
        if not (mu.is_contiguous() and logvar.is_contiguous()):
            memory_format = memory_format_of(mu)
            mu, logvar = in_format(memory_format, mu, logvar)
            channels = _channels(mu, memory_format)
        key = self._key(key, mu)
        z = self._empty_like(mu) if num_samples is None else empty_draws(mu, num_samples)
        batch, kl_address = mu.shape[0], 0
        workspace: tuple[Tensor, ...] = ()
        sizes = (
            DTYPE[mu.dtype], batch, 1 if num_samples is None else num_samples, mu.numel() // batch if batch else 0,
            channels,
        )  # fmt: skip
        if kl is not None:
            kl_address, workspace = kl.data_ptr(), self._workspace("reparameterize", mu, *sizes)
        self._module.reparameterize(
            mu.data_ptr(), logvar.data_ptr(), z.data_ptr(), 0 if slope is None else slope.data_ptr(), kl_address,
            *sizes, *self._noise(key, mu),
            *map(_address, workspace),
        )  # fmt: skip
        return z

    def reparameterize_kl(
        self, mu: Tensor, logvar: Tensor, key: Tensor, num_samples: int | None = None
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if mu.dtype == torch.float64 else torch.float32
        kl = torch.empty(mu.shape[0], dtype=dtype, device=mu.device)
        return self.reparameterize(mu, logvar, key, num_samples, kl), kl

    def reparameterize_and_slope(
        self, mu: Tensor, logvar: Tensor, key: Tensor, num_samples: int | None = None
    ) -> tuple[Tensor, Tensor]:
        slope = empty_draws(mu, num_samples)
        return self.reparameterize(mu, logvar, key, num_samples, slope=slope), slope

    def reparameterize_backward(
        self,
        grad_z: Tensor | None,
        grad_kl: Tensor | None,
        mu: Tensor | None,
        logvar: Tensor,
        key: Tensor,
        num_samples: int | None,
        with_grad_mu: bool,
    ) -> tuple[Tensor, Tensor]:
        memory_format = memory_format_of(logvar)
        if grad_z is not None and num_samples is not None:
            grad_z = grad_z.flatten(0, 1)
        grad_z, mu, logvar = in_format(memory_format, grad_z, mu, logvar)
        key = self._key(key, logvar)
        if grad_kl is not None:
            grad_kl = grad_kl.contiguous()
        grad_logvar = self._empty_like(logvar)
        grad_mu = self._empty_like(logvar) if with_grad_mu else logvar.new_empty(0)
        batch, channels = logvar.shape[0], _channels(logvar, memory_format)
        self._module.reparameterize_backward(
            0 if grad_z is None else grad_z.data_ptr(), 0 if grad_kl is None else grad_kl.data_ptr(),
            0 if mu is None else mu.data_ptr(), logvar.data_ptr(), grad_mu.data_ptr() if with_grad_mu else 0,
            grad_logvar.data_ptr(), DTYPE[logvar.dtype], batch, 1 if num_samples is None else num_samples,
            logvar.numel() // batch if batch else 0, channels, *self._noise(key, logvar),
        )  # fmt: skip
        return grad_mu, grad_logvar

    def add_noise(
        self, x0: Tensor, table: Tensor, t: Tensor | None, key: Tensor, with_noise: bool, x_t: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """``x_t``: where to write to, with the strides of ``x0`` in its format."""
        memory_format = kept_format(x0)
        (x0,) = in_format(memory_format, x0)
        sizes = sizes_of(x0, memory_format)
        key, (held, coefficients) = self._key(key, x0), self._coefficients(table, t, x0)
        if x_t is None:
            x_t = self._empty_like(x0)
        noise = self._empty_like(x0) if with_noise else None
        self._module.add_noise(
            x0.data_ptr(), x_t.data_ptr(), 0 if noise is None else noise.data_ptr(), *sizes, coefficients,
            *self._noise(key, x0),
        )  # fmt: skip
        del held
        return x_t, noise

    def denoising_loss(
        self,
        output: Tensor,
        x0: Tensor,
        table: Tensor,
        t: Tensor | None,
        key: Tensor,
        noise: Tensor | None = None,
        **kept: int,
    ) -> Tensor:
        """``kept``: addresses of what the kernel of a backend can keep for the gradient."""
        memory_format = kept_format(output, x0)
        output, x0, noise = in_format(memory_format, output, x0, noise)
        sizes = sizes_of(x0, memory_format)
        key, (held, coefficients) = self._key(key, x0), self._coefficients(table, t, x0)
        dtype = torch.float64 if x0.dtype == torch.float64 else torch.float32
        loss = torch.empty(x0.shape[0], dtype=dtype, device=x0.device)
        workspace = self._workspace("denoising_loss", x0, *sizes)
        self._module.denoising_loss(
            output.data_ptr(), x0.data_ptr(), 0 if noise is None else noise.data_ptr(), loss.data_ptr(), *sizes,
            output.shape != x0.shape, coefficients, *self._noise(key, x0),
            *map(_address, workspace), **kept,
        )  # fmt: skip
        del held
        return loss

    def denoising_loss_backward(
        self,
        grad_loss: Tensor,
        output: Tensor,
        x0: Tensor,
        table: Tensor,
        t: Tensor | None,
        key: Tensor,
        noise: Tensor | None = None,
    ) -> Tensor:
        memory_format = kept_format(output, x0)
        output, x0, noise = in_format(memory_format, output, x0, noise)
        sizes = sizes_of(x0, memory_format)
        key, (held, coefficients) = self._key(key, x0), self._coefficients(table, t, x0)
        grad_loss, grad_output = grad_loss.contiguous(), self._empty_like(output)
        self._module.denoising_loss_backward(
            grad_loss.data_ptr(), output.data_ptr(), x0.data_ptr(), 0 if noise is None else noise.data_ptr(),
            grad_output.data_ptr(), *sizes, output.shape != x0.shape, coefficients, *self._noise(key, x0),
        )  # fmt: skip
        del held
        return grad_output

    def diffusion_step(
        self,
        x: Tensor,
        output: Tensor | None,
        second: Tensor | None,
        history0: Tensor | None,
        history1: Tensor | None,
        known: Tensor | None,
        mask: Tensor | None,
        rows: Tensor,
        key: Tensor,
        y: Tensor | None = None,
        prediction: Tensor | None = None,
    ) -> Tensor:
        """``y``, ``prediction``: where to write to, with the strides of ``x`` in its format."""
        memory_format = kept_format(x)
        x, *tensors = in_format(memory_format, x, output, second, history0, history1, known, mask)
        sizes = sizes_of(x, memory_format)
        key, (held, coefficients) = self._key(key, x), self._coefficients(rows, None, x)
        if y is None:
            y = self._empty_like(x)
        shape = x.shape
        learned = [tensor is not None and tensor.shape != shape for tensor in tensors[:2]]
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (x, *tensors, y, prediction)]
        self._module.diffusion_step(
            addresses, *sizes, *learned, coefficients, *self._noise(key, x),
        )  # fmt: skip
        del held
        return y

    def _readable(self, tensor: Tensor) -> Tensor:
        """The tensor (B, heads, tokens, channels), or a copy with strides that the kernel for attention takes."""
        return tensor

    def _writable(self, tensor: Tensor) -> Tensor:
        """The tensor, or one in its place that the kernel for attention can write to, to be copied."""
        return tensor

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor | None = None, with_lse: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """``out``: where to write to, with strides as those of a readable tensor; ``with_lse``: whether to keep it."""
        if out is None:
            out = self._empty_like(q)
        into = self._writable(out)
        q, k, v = self._readable(q), self._readable(k), self._readable(v)
        lse = log_sums(q) if with_lse else None
        sizes = attention_sizes(q, k)
        workspace = self._workspace("attention", q, *sizes)
        self._module.attention(
            heads(q), heads(k), heads(v), heads(into), 0 if lse is None else lse.data_ptr(), *sizes, scale,
            *self._place(q), *map(_address, workspace),
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
        wanted: list[bool],
        grads: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor | None, ...]:
        """``grads``: where to write to, with strides as those of readable tensors; all of them are then wanted."""
        given = (q, k, v)
        grad_out, q, k, v, out = (self._readable(tensor) for tensor in (grad_out, q, k, v, out))
        lse = lse.contiguous()
        results: tuple[Tensor | None, ...] = grads or tuple(
            self._empty_like(tensor) if want else None for tensor, want in zip(given, wanted, strict=True)
        )
        into = [None if result is None else self._writable(result) for result in results]
        sizes = attention_sizes(q, k)
        workspace = self._workspace("attention_backward", q, *sizes)
        self._module.attention_backward(
            [heads(tensor) for tensor in (grad_out, q, k, v, out)], lse.data_ptr(), heads_or_none(*into), *sizes, scale,
            *self._place(q), *map(_address, workspace),
        )  # fmt: skip
        _copy_written(results, into)
        return results

    def general_attention(
        self, q: Tensor, k: Tensor, v: Tensor, *settings: Any, with_lse: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """``settings``, here and below: mask, key_lengths, key, scale, causal, dropout."""
        out = empty_with_channels(q, v.shape[3])
        into = self._writable(out)
        q, k, v = self._readable(q), self._readable(k), self._readable(v)
        lse = self._empty_log_sums(q) if with_lse else None
        held, given = self._given(q, k, v, *settings)
        workspace = self._workspace("general_attention", q, *given[:2])
        self._module.general_attention(
            heads(q), heads(k), heads(v), heads(into), *self._log_sums(lse), *given, *map(_address, workspace),
        )  # fmt: skip
        del held
        return out if into is out else out.copy_(into), lse

    def general_attention_backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *settings_and_wanted: Any
    ) -> tuple[Tensor | None, ...]:
        *settings, wanted = settings_and_wanted
        return self._general_attention_backward(grad_out, q, k, v, out, lse, settings, wanted)

    def _general_attention_backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        settings: Sequence[Any],
        wanted: Sequence[bool],
        *others: Any,
    ) -> tuple[Tensor | None, ...]:
        """``others``: what the kernel of a backend is told besides, after the gradients."""
        results = self._gradients((q, k, v), wanted)
        into = [None if result is None else self._writable(result) for result in results]
        grad_out, q, k, v, out = (self._readable(tensor) for tensor in (grad_out, q, k, v, out))
        lse = self._dense_log_sums(lse)
        held, given = self._given(q, k, v, *settings)
        workspace = self._workspace("general_attention_backward", q, *given[:2])
        self._module.general_attention_backward(
            [heads(tensor) for tensor in (grad_out, q, k, v, out)], *self._log_sums(lse), heads_or_none(*into),
            *others, *given, *map(_address, workspace),
        )  # fmt: skip
        del held
        _copy_written(results, into)
        return results

    def _empty_log_sums(self, q: Tensor) -> Tensor:
        """Memory for the logarithms of denominators; the kernel leaves the second part, which is 0."""
        lse = empty_parts_of_log_sums(q)
        lse[1].zero_()
        return lse

    def _dense_log_sums(self, lse: Tensor) -> Tensor:
        """As the kernel takes them: it knows one part, which is then all."""
        return lse.sum(0)

    def _log_sums(self, lse: Tensor | None) -> tuple[int, ...]:
        """The addresses of the parts that the kernel knows."""
        return (0 if lse is None else lse.data_ptr(),)

    def _gradients(self, tensors: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
        return tuple(self._empty_like(x) if want else None for x, want in zip(tensors, wanted, strict=True))

    def _given(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        key_lengths: Tensor | None,
        key: Tensor | None,
        scale: float,
        causal: bool,
        dropout: float,
    ) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
        """Tensors for the caller to hold, and the last arguments of the kernels but for a workspace."""
        dtype, sizes = attention_sizes(q, k)
        sizes = (*sizes, k.shape[1], v.shape[3])
        key_lengths = None if key_lengths is None else key_lengths.contiguous()
        key = None if key is None else self._key(key, q)
        read = None if mask is None else repeated(mask)
        of_key = (0, 0) if key is None else (key.data_ptr(), 0 if key.dim() == 1 else len(key))
        options = (
            read, -1 if mask is None or mask.dtype is torch.bool else DTYPE[mask.dtype],
            0 if key_lengths is None else key_lengths.data_ptr(), causal, dropout,
            *of_key, *(() if key is None else self._place_of_key(key)),
        )  # fmt: skip
        return (key_lengths, key), (dtype, sizes, scale, options, *self._place(q))

    def group_norm(
        self,
        x: Tensor,
        num_groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        bias_in: Tensor | None,
        activation: str | None,
        eps: float,
        y: Tensor | None = None,
        statistics: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """``y``: where to write to, with the strides of ``x`` in its format; ``statistics``: whether to keep them."""
        memory_format = _CONTIGUOUS
        if not x.is_contiguous():
            memory_format = suggested_format(x)
            x = x.contiguous(memory_format=memory_format)
        x, given = self._aligned(x), y
        if y is None or not self._is_aligned(y):
            y = self._empty_like(x)
        kept = x.new_empty((x.shape[0], num_groups, 2), dtype=torch.float64) if statistics else None
        if kept is not None and not x.numel():
            kept.zero_()
        sizes = group_norm_sizes(x, num_groups, memory_format)
        dense, values = channel_values(weight, bias, scale, shift, bias_in)
        workspace = self._workspace("group_norm", x, *sizes)
        self._module.group_norm(
            x.data_ptr(), y.data_ptr(), 0 if kept is None else kept.data_ptr(), *sizes, eps, ACTIVATION[activation],
            values, *self._place(x), *map(_address, workspace),
        )  # fmt: skip
        del dense
        if given is not None and given is not y:
            y = given.copy_(y)
        return y, kept

    def group_norm_backward(
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
        activation: str | None,
        wanted: list[bool],
        eps: float = 0.0,
    ) -> tuple[Tensor | None, ...]:
        """``eps``: what the statistics hold already."""
        memory_format = _CONTIGUOUS
        if not (x.is_contiguous() and grad_y.is_contiguous()):
            memory_format = suggested_format(x)
            grad_y, x = in_format(memory_format, grad_y, x)
        grad_y, x, statistics = self._aligned(grad_y), self._aligned(x), statistics.contiguous()
        of_values = empty_gradients((weight, bias, scale, shift, bias_in), wanted[1:])
        grads = [self._empty_like(x) if wanted[0] else None, *of_values]
        sizes = group_norm_sizes(x, num_groups, memory_format)
        dense, values = channel_values(weight, bias, scale, shift, bias_in)
        workspace = self._workspace("group_norm_backward", x, *sizes)
        self._module.group_norm_backward(
            grad_y.data_ptr(), x.data_ptr(), statistics.data_ptr(), *sizes, ACTIVATION[activation], values,
            [0 if grad is None else grad.data_ptr() for grad in grads],
            *self._place(x), *map(_address, workspace),
        )  # fmt: skip
        del dense
        return tuple(grads)

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
            0 if d_x is None else d_x.data_ptr(), d_values, *self._place(x), *map(_address, workspace),
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
            [0 if grad is None else grad.data_ptr() for grad in grads], *self._place(x), *map(_address, workspace),
        )  # fmt: skip
        del held, d_held
        return tuple(grads)


def sizes_of(x: Tensor, memory_format: torch.memory_format) -> tuple[int, int, int, int]:
    """Of a tensor in its format: dtype, samples, elements of a sample, channels."""
    batch = x.shape[0]
    return DTYPE[x.dtype], batch, x.numel() // batch if batch else 0, _channels(x, memory_format)


def heads(tensor: Tensor) -> tuple[int, ...]:
    """The address and the strides of a tensor (B, heads, tokens, channels)."""
    return tensor.data_ptr(), *tensor.stride()


def repeated(mask: Tensor) -> tuple[int, ...]:
    """The same of a mask: along a dimension of one element, the same is read again."""
    return mask.data_ptr(), *(0 if n == 1 else step for n, step in zip(mask.shape, mask.stride(), strict=True))


def heads_or_none(*tensors: Tensor | None) -> list[tuple[int, ...] | None]:
    return [None if tensor is None else heads(tensor) for tensor in tensors]


def log_sums(q: Tensor) -> Tensor:
    """An uninitialised tensor for the logarithms of attention's denominators."""
    return q.new_empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


def _copy_written(results: Sequence[Tensor | None], into: Sequence[Tensor | None]) -> None:
    """What stands in the place of results is copied to them."""
    for result, written in zip(results, into, strict=True):
        if result is not None and written is not None and written is not result:
            result.copy_(written)


def attention_sizes(q: Tensor, k: Tensor) -> tuple[int, tuple[int, ...]]:
    """The dtype, and batch, heads, queries, keys, channels of a head."""
    return DTYPE[q.dtype], (*q.shape[:3], k.shape[2], q.shape[3])


ACTIVATION = {None: 0, "silu": 1}


def group_norm_sizes(x: Tensor, num_groups: int, memory_format: torch.memory_format) -> tuple[Any, ...]:
    """Of a tensor in its format: dtype, shape, groups, whether channels are last."""
    return DTYPE[x.dtype], x.shape, num_groups, memory_format is not _CONTIGUOUS


def channel_values(*values: Tensor | None) -> tuple[list[Tensor], tuple[Any, ...]]:
    """The values, dense along channels, and for each None or (address, dtype, elements from one sample to the next)."""
    dense: list[Tensor] = []
    described: list[tuple[int, int, int] | None] = []
    for value in values:
        if value is None:
            described.append(None)
            continue
        if not value.is_contiguous() and value.stride(-1) != 1:
            value = value.contiguous()
        dense.append(value)
        described.append((value.data_ptr(), DTYPE[value.dtype], 0 if value.dim() == 1 else value.stride(0)))
    return dense, tuple(described)
