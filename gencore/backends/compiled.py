"""What the compiled modules have in common: outputs are allocated, addresses and sizes are passed.

The functions of the modules take the fields of a struct of ``csrc/include/gencore`` by name, and ``place``: where to
compute. What is not there is None. ``structs.py`` makes the structs within.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gencore.backends.activations import NUMBERS as ACTIVATION
from gencore.backends.layout import (
    empty_draws,
    empty_gradients,
    in_format,
    kept_format,
    memory_format_of,
    suggested_format,
)
from gencore.backends.structs import (
    DTYPE,
    Coefficients,
    NoiseKey,
    ResampledAxis,
    addresses,
    channel_values,
    group_norm_direction,
    group_norm_shape,
    noise_shape,
)

_CONTIGUOUS = torch.contiguous_format


class CompiledOps:
    """The ops by the names that the library knows them by.

    In these methods the names keep what ``contiguous`` returns alive until the kernel has its address.
    """

    def __init__(self, module: Any):
        self._module = module

    def _key(self, key: Tensor, tensor: Tensor) -> Tensor:
        """The key where the kernel for ``tensor`` can read it."""
        raise NotImplementedError

    def _is_key_on_device(self, key: Tensor) -> bool:
        """Whether kernels read this key in the memory of a device."""
        return False

    def _words(self, key: Tensor) -> Any:
        """What kernels take of the key, which the caller holds."""
        return NoiseKey(
            words=key.data_ptr(), rows=0 if key.dim() == 1 else len(key), on_device=self._is_key_on_device(key)
        )

    def _place(self, tensor: Tensor, workspace: Tensor | None = None) -> Any:
        """Where to compute what is of ``tensor``, and the memory that a kernel wants for itself."""
        raise NotImplementedError

    def _prepared(self, tensor: Tensor) -> Tensor:
        """A new tensor, which the kernel is about to fill."""
        return tensor

    def _empty_like(self, tensor: Tensor) -> Tensor:
        return self._prepared(torch.empty_like(tensor))

    def _is_on_device(self, table: Tensor, index: Tensor | None) -> bool:
        """Whether kernels read these coefficients in the memory of a device."""
        return False

    def _coefficients(
        self, table: Tensor, index: Tensor | None, tensor: Tensor
    ) -> tuple[tuple[Tensor, Tensor | None], Any]:
        """Tensors for the caller to hold, and what the kernel for ``tensor`` takes of them."""
        on_device = self._is_on_device(table, index)
        place = tensor.device if on_device else torch.device("cpu")
        table = table.to(place, non_blocking=on_device).contiguous()
        if index is not None:
            index = index.to(place, non_blocking=on_device).contiguous()
        return (table, index), Coefficients(
            values=table.data_ptr(), rows=len(table), index=None if index is None else index.data_ptr(),
            on_device=on_device,
        )  # fmt: skip

    def _is_aligned(self, tensor: Tensor) -> bool:
        """Whether the address lets kernels read as wide as the shape does: their sums are in an order of that."""
        return True

    def _aligned(self, tensor: Tensor) -> Tensor:
        return tensor if self._is_aligned(tensor) else tensor.clone()

    def _workspace(self, op: str, tensor: Tensor, shape: Any) -> Tensor | None:
        """Memory for what a kernel hands on within the call, where it needs some."""
        return None

    def _fill(self, kernel: Any, out: Tensor, key: Tensor) -> None:
        memory_format, dense, key = _CONTIGUOUS, out, self._key(key, out)
        if not out.is_contiguous():
            memory_format = memory_format_of(out)
            if memory_format is _CONTIGUOUS:
                dense = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        kernel(
            out=dense.data_ptr(), dtype=DTYPE[dense.dtype], shape=noise_shape(dense, memory_format),
            key=self._words(key), place=self._place(out),
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
        memory_format = _CONTIGUOUS
        if not (mu.is_contiguous() and logvar.is_contiguous()):
            memory_format = memory_format_of(mu)
            mu, logvar = in_format(memory_format, mu, logvar)
        key = self._key(key, mu)
        z = self._empty_like(mu) if num_samples is None else empty_draws(mu, num_samples)
        shape = noise_shape(mu, memory_format, 1 if num_samples is None else num_samples)
        workspace = None if kl is None else self._workspace("reparameterize", mu, shape)
        self._module.reparameterize(
            mu=mu.data_ptr(), logvar=logvar.data_ptr(), z=z.data_ptr(),
            slope=None if slope is None else slope.data_ptr(), kl=None if kl is None else kl.data_ptr(),
            dtype=DTYPE[mu.dtype], shape=shape, key=self._words(key), place=self._place(mu, workspace),
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
        self._module.reparameterize_backward(
            grad_z=None if grad_z is None else grad_z.data_ptr(),
            grad_kl=None if grad_kl is None else grad_kl.data_ptr(), mu=None if mu is None else mu.data_ptr(),
            logvar=logvar.data_ptr(), grad_mu=grad_mu.data_ptr() if with_grad_mu else None,
            grad_logvar=grad_logvar.data_ptr(), dtype=DTYPE[logvar.dtype],
            shape=noise_shape(logvar, memory_format, 1 if num_samples is None else num_samples), key=self._words(key),
            place=self._place(logvar),
        )  # fmt: skip
        return grad_mu, grad_logvar

    def add_noise(
        self, x0: Tensor, table: Tensor, t: Tensor | None, key: Tensor, with_noise: bool, x_t: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """``x_t``: where to write to, with the strides of ``x0`` in its format."""
        memory_format = kept_format(x0)
        (x0,) = in_format(memory_format, x0)
        key, (held, coefficients) = self._key(key, x0), self._coefficients(table, t, x0)
        if x_t is None:
            x_t = self._empty_like(x0)
        noise = self._empty_like(x0) if with_noise else None
        self._module.add_noise(
            x0=x0.data_ptr(), x_t=x_t.data_ptr(), noise=None if noise is None else noise.data_ptr(),
            dtype=DTYPE[x0.dtype], shape=noise_shape(x0, memory_format), table=coefficients, key=self._words(key),
            place=self._place(x0),
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
        error: Tensor | None = None,
    ) -> Tensor:
        """``error``: where to write prediction - target, for backends that can."""
        memory_format = kept_format(output, x0)
        output, x0, noise = in_format(memory_format, output, x0, noise)
        shape = noise_shape(x0, memory_format)
        key, (held, coefficients) = self._key(key, x0), self._coefficients(table, t, x0)
        dtype = torch.float64 if x0.dtype == torch.float64 else torch.float32
        loss = torch.empty(x0.shape[0], dtype=dtype, device=x0.device)
        workspace = self._workspace("denoising_loss", x0, shape)
        self._module.denoising_loss(
            output=output.data_ptr(), x0=x0.data_ptr(), noise=None if noise is None else noise.data_ptr(),
            loss=loss.data_ptr(), dtype=DTYPE[x0.dtype], shape=shape, learned=output.shape != x0.shape,
            table=coefficients, key=self._words(key), error=None if error is None else error.data_ptr(),
            place=self._place(x0, workspace),
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
        key, (held, coefficients) = self._key(key, x0), self._coefficients(table, t, x0)
        grad_loss, grad_output = grad_loss.contiguous(), self._empty_like(output)
        self._module.denoising_loss_backward(
            grad_loss=grad_loss.data_ptr(), output=output.data_ptr(), x0=x0.data_ptr(),
            noise=None if noise is None else noise.data_ptr(), grad_output=grad_output.data_ptr(),
            dtype=DTYPE[x0.dtype], shape=noise_shape(x0, memory_format), learned=output.shape != x0.shape,
            table=coefficients, key=self._words(key), place=self._place(x0),
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
        x, output, second, history0, history1, known, mask = in_format(
            memory_format, x, output, second, history0, history1, known, mask
        )
        key, (held, coefficients) = self._key(key, x), self._coefficients(rows, None, x)
        if y is None:
            y = self._empty_like(x)
        self._module.diffusion_step(
            x=x.data_ptr(), output=None if output is None else output.data_ptr(),
            second=None if second is None else second.data_ptr(),
            history0=None if history0 is None else history0.data_ptr(),
            history1=None if history1 is None else history1.data_ptr(),
            known=None if known is None else known.data_ptr(), mask=None if mask is None else mask.data_ptr(),
            y=y.data_ptr(), prediction=None if prediction is None else prediction.data_ptr(), dtype=DTYPE[x.dtype],
            shape=noise_shape(x, memory_format), learned=output is not None and output.shape != x.shape,
            second_learned=second is not None and second.shape != x.shape, table=coefficients, key=self._words(key),
            place=self._place(x),
        )  # fmt: skip
        del held
        return y

    def upfirdn2d(
        self,
        x: Tensor,
        filter: Tensor,
        up: Sequence[int],
        down: Sequence[int],
        start: Sequence[int],
        size: Sequence[int],
        flip_filter: bool,
        gain: float,
    ) -> Tensor:
        memory_format = suggested_format(x)
        x, filter = x.contiguous(memory_format=memory_format), filter.contiguous()
        samples, channels, *pixels = x.shape
        shape = (samples, channels, *size)
        y = self._prepared(torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format))
        taps = filter.shape[0], filter.shape[-1]
        rows, columns = (
            ResampledAxis(size=n, out_size=made, taps=k, up=u, down=d, start=s)
            for n, made, k, u, d, s in zip(pixels, size, taps, up, down, start, strict=True)
        )
        self._module.upfirdn2d(
            x=x.data_ptr(), filter=filter.data_ptr(), y=y.data_ptr(), dtype=DTYPE[x.dtype], samples=samples,
            channels=channels, rows=rows, columns=columns, channels_last=memory_format is not _CONTIGUOUS,
            separable=filter.dim() == 1, flip=flip_filter, gain=gain, place=self._place(x),
        )  # fmt: skip
        return y

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
        shape = group_norm_shape(x, num_groups, memory_format)
        held, (weight, bias, scale, shift, bias_in) = channel_values(weight, bias, scale, shift, bias_in)
        workspace = self._workspace("group_norm", x, shape)
        self._module.group_norm(
            x=x.data_ptr(), y=y.data_ptr(), statistics=None if kept is None else kept.data_ptr(), dtype=DTYPE[x.dtype],
            shape=shape, eps=eps, activation=ACTIVATION[activation], weight=weight, bias=bias, scale=scale, shift=shift,
            bias_in=bias_in, place=self._place(x, workspace),
        )  # fmt: skip
        del held
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
        shape = group_norm_shape(x, num_groups, memory_format)
        held, (weight, bias, scale, shift, bias_in) = channel_values(weight, bias, scale, shift, bias_in)
        grad_x, grad_weight, grad_bias, grad_scale, grad_shift, grad_bias_in = addresses(grads)
        workspace = self._workspace("group_norm_backward", x, shape)
        self._module.group_norm_backward(
            grad_y=grad_y.data_ptr(), x=x.data_ptr(), statistics=statistics.data_ptr(), dtype=DTYPE[x.dtype],
            shape=shape, activation=ACTIVATION[activation], weight=weight, bias=bias, scale=scale, shift=shift,
            bias_in=bias_in, grad_x=grad_x, grad_weight=grad_weight, grad_bias=grad_bias, grad_scale=grad_scale,
            grad_shift=grad_shift, grad_bias_in=grad_bias_in, place=self._place(x, workspace),
        )  # fmt: skip
        del held
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
        held, (weight, bias, scale, shift, bias_in) = channel_values(weight, bias, scale, shift, bias_in)
        d_held, direction = group_norm_direction(d_x, d_weight, d_bias, d_scale, d_shift, d_bias_in)
        shape = group_norm_shape(x, num_groups, memory_format)
        workspace = self._workspace("group_norm_jvp", x, shape)
        self._module.group_norm_jvp(
            x=x.data_ptr(), d_y=d_y.data_ptr(), statistics=statistics.data_ptr(), dtype=DTYPE[x.dtype],
            shape=shape, activation=ACTIVATION[activation], weight=weight,
            bias=bias, scale=scale, shift=shift, bias_in=bias_in, direction=direction, place=self._place(x, workspace),
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
        held, (weight, bias, scale, shift, bias_in) = channel_values(weight, bias, scale, shift, bias_in)
        d_held, direction = group_norm_direction(d_x, d_weight, d_bias, d_scale, d_shift, d_bias_in)
        grad_grad_y, grad_x, grad_weight, grad_bias, grad_scale, grad_shift, grad_bias_in = addresses(grads)
        shape = group_norm_shape(x, num_groups, memory_format)
        workspace = self._workspace("group_norm_double_backward", x, shape)
        self._module.group_norm_double_backward(
            grad_y=grad_y.data_ptr(), x=x.data_ptr(), statistics=statistics.data_ptr(), dtype=DTYPE[x.dtype],
            shape=shape, activation=ACTIVATION[activation], weight=weight,
            bias=bias, scale=scale, shift=shift, bias_in=bias_in, direction=direction, grad_grad_y=grad_grad_y,
            grad_x=grad_x, grad_weight=grad_weight, grad_bias=grad_bias, grad_scale=grad_scale, grad_shift=grad_shift,
            grad_bias_in=grad_bias_in, place=self._place(x, workspace),
        )  # fmt: skip
        del held, d_held
        return tuple(grads)
