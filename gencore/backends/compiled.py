"""What the compiled modules have in common: outputs are allocated, addresses and sizes are passed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gencore.backends.layout import empty_draws, in_format, memory_format_of

_DTYPE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_CONTIGUOUS = torch.contiguous_format


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

    def _place(self, tensor: Tensor, key: Tensor) -> tuple[int, ...]:
        """The last arguments of every op: where the key is and where to compute."""
        raise NotImplementedError

    def _workspace(self, mu: Tensor, *sizes: int) -> Tensor | None:
        """Memory for the sums of kl, where the kernel needs some."""
        return None

    def _fill(self, kernel: Any, out: Tensor, key: Tensor) -> None:
        memory_format, dense, key = _CONTIGUOUS, out, self._key(key, out)
        if not out.is_contiguous():
            memory_format = memory_format_of(out)
            if memory_format is _CONTIGUOUS:
                dense = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        batch, channels = dense.shape[0], _channels(dense, memory_format)
        kernel(
            dense.data_ptr(), _DTYPE[dense.dtype], batch, dense.numel() // batch if batch else 0, channels,
            key.data_ptr(), 0 if key.dim() == 1 else batch, *self._place(out, key),
        )  # fmt: skip
        if dense is not out:
            out.copy_(dense)
        # Autograd must know that what it may have saved was written over.
        torch.autograd.graph.increment_version(out)

    def normal_(self, out: Tensor, key: Tensor) -> None:
        self._fill(self._module.normal, out, key)

    def uniform_(self, out: Tensor, key: Tensor) -> None:
        self._fill(self._module.uniform, out, key)

    def reparameterize(
        self, mu: Tensor, logvar: Tensor, key: Tensor, num_samples: int | None = None, kl: Tensor | None = None
    ) -> Tensor:
        memory_format, channels = _CONTIGUOUS, 0
        if not (mu.is_contiguous() and logvar.is_contiguous()):
            memory_format = memory_format_of(mu)
            mu, logvar = in_format(memory_format, mu, logvar)
            channels = _channels(mu, memory_format)
        key = self._key(key, mu)
        z = torch.empty_like(mu) if num_samples is None else empty_draws(mu, num_samples)
        batch, place, kl_address = mu.shape[0], self._place(mu, key), 0
        sizes = (
            _DTYPE[mu.dtype], batch, 1 if num_samples is None else num_samples, mu.numel() // batch if batch else 0,
            channels,
        )  # fmt: skip
        if kl is not None:
            kl_address, workspace = kl.data_ptr(), self._workspace(mu, *sizes)
            if workspace is not None:
                place = (*place, workspace.data_ptr())
        self._module.reparameterize(
            mu.data_ptr(), logvar.data_ptr(), z.data_ptr(), kl_address, *sizes,
            key.data_ptr(), 0 if key.dim() == 1 else batch, *place,
        )  # fmt: skip
        return z

    def reparameterize_kl(
        self, mu: Tensor, logvar: Tensor, key: Tensor, num_samples: int | None = None
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if mu.dtype == torch.float64 else torch.float32
        kl = torch.empty(mu.shape[0], dtype=dtype, device=mu.device)
        return self.reparameterize(mu, logvar, key, num_samples, kl), kl

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
        grad_logvar = torch.empty_like(logvar)
        grad_mu = torch.empty_like(logvar) if with_grad_mu else logvar.new_empty(0)
        batch, channels = logvar.shape[0], _channels(logvar, memory_format)
        self._module.reparameterize_backward(
            0 if grad_z is None else grad_z.data_ptr(), 0 if grad_kl is None else grad_kl.data_ptr(),
            0 if mu is None else mu.data_ptr(), logvar.data_ptr(), grad_mu.data_ptr() if with_grad_mu else 0,
            grad_logvar.data_ptr(), _DTYPE[logvar.dtype], batch, 1 if num_samples is None else num_samples,
            logvar.numel() // batch if batch else 0, channels, key.data_ptr(), 0 if key.dim() == 1 else batch,
            *self._place(logvar, key),
        )  # fmt: skip
        return grad_mu, grad_logvar
