"""The compiled CPU kernels: allocates outputs, passes addresses, sizes and the number of threads."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import Tensor

from gencore.backends.layout import empty_draws, memory_format_of

try:
    from gencore import _cpu
except ImportError as error:
    raise ImportError(
        "the compiled kernels, gencore._cpu, cannot be loaded; `pip install .` builds them (in a checkout, run Python "
        "from another folder or install with `pip install -e .`)"
    ) from error

_DTYPE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_CONTIGUOUS = torch.contiguous_format

_wanted = os.environ.get("GENCORE_SIMD", "")
if _wanted not in ("", _cpu.simd_level()):
    warnings.warn(
        f"GENCORE_SIMD must be one of {', '.join(_cpu.build_info()['simd_supported'])} here, got {_wanted!r}; "
        f"the kernels run at {_cpu.simd_level()}",
        RuntimeWarning,
        stacklevel=2,
    )


def build_info() -> dict[str, Any]:
    """How the module was built: version, compiler, SIMD levels compiled and supported, OpenMP version (0: none)."""
    return _cpu.build_info()


def openmp_address() -> int:
    """The address of ``omp_get_max_threads`` in the OpenMP runtime of the kernels; 0 if they were built without one."""
    return _cpu.openmp_address()


def simd_level() -> str:
    """The SIMD level in use: "scalar", "avx2" or "avx512"."""
    return _cpu.simd_level()


def set_simd_level(level: str) -> None:
    """Changes the SIMD level for the whole process. Raises ValueError if it is not compiled or not supported."""
    _cpu.set_simd_level(level)


def multiplications_per_second() -> float:
    """Products of 32-bit integers into 64 bits that one core makes per second at the SIMD level in use."""
    return _cpu.multiplications_per_second()


def vector_instructions_per_second() -> float:
    """Vector instructions of the simplest kind that one core issues per second at the SIMD level in use."""
    return _cpu.vector_instructions_per_second()


def _channels(tensor: Tensor, memory_format: torch.memory_format) -> int:
    """The channels of a channels-last tensor; 0 says that elements lie in logical order."""
    return 0 if memory_format is _CONTIGUOUS else tensor.shape[1]


def _fill(kernel: Any, out: Tensor, key: Tensor) -> None:
    memory_format, dense, key = _CONTIGUOUS, out, key.contiguous()
    if not out.is_contiguous():
        memory_format = memory_format_of(out)
        if memory_format is _CONTIGUOUS:
            dense = torch.empty(out.shape, dtype=out.dtype, device="cpu")
    batch, channels = dense.shape[0], _channels(dense, memory_format)
    kernel(
        dense.data_ptr(), _DTYPE[dense.dtype], batch, dense.numel() // batch if batch else 0, channels,
        key.data_ptr(), 0 if key.dim() == 1 else batch, torch.get_num_threads(),
    )  # fmt: skip
    if dense is not out:
        out.copy_(dense)
    # Autograd must know that what it may have saved was written over.
    torch.autograd.graph.increment_version(out)


def normal_(out: Tensor, key: Tensor) -> None:
    _fill(_cpu.normal, out, key)


def uniform_(out: Tensor, key: Tensor) -> None:
    _fill(_cpu.uniform, out, key)


def reparameterize(
    mu: Tensor, logvar: Tensor, key: Tensor, num_samples: int | None = None, kl: Tensor | None = None
) -> Tensor:
    memory_format, channels = _CONTIGUOUS, 0
    if not (mu.is_contiguous() and logvar.is_contiguous()):
        memory_format = memory_format_of(mu)
        # The names keep what `contiguous` returns alive until the kernel has run.
        mu = mu.contiguous(memory_format=memory_format)
        logvar = logvar.contiguous(memory_format=memory_format)
        channels = _channels(mu, memory_format)
    if not key.is_contiguous():
        key = key.contiguous()
    z = torch.empty_like(mu) if num_samples is None else empty_draws(mu, num_samples)
    batch = mu.shape[0]
    _cpu.reparameterize(
        mu.data_ptr(), logvar.data_ptr(), z.data_ptr(), 0 if kl is None else kl.data_ptr(), _DTYPE[mu.dtype],
        batch, 1 if num_samples is None else num_samples, mu.numel() // batch if batch else 0, channels,
        key.data_ptr(), 0 if key.dim() == 1 else batch, torch.get_num_threads(),
    )  # fmt: skip
    return z


def reparameterize_kl(mu: Tensor, logvar: Tensor, key: Tensor, num_samples: int | None = None) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if mu.dtype == torch.float64 else torch.float32
    kl = torch.empty(mu.shape[0], dtype=dtype, device="cpu")
    return reparameterize(mu, logvar, key, num_samples, kl), kl


def reparameterize_backward(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    mu: Tensor | None,
    logvar: Tensor,
    key: Tensor,
    num_samples: int | None,
    with_grad_mu: bool,
) -> tuple[Tensor, Tensor]:
    memory_format = memory_format_of(logvar)
    logvar, key = logvar.contiguous(memory_format=memory_format), key.contiguous()
    if mu is not None:
        mu = mu.contiguous(memory_format=memory_format)
    if grad_z is not None:
        flat = grad_z if num_samples is None else grad_z.flatten(0, 1)
        grad_z = flat.contiguous(memory_format=memory_format)
    if grad_kl is not None:
        grad_kl = grad_kl.contiguous()
    grad_logvar = torch.empty_like(logvar)
    grad_mu = torch.empty_like(logvar) if with_grad_mu else logvar.new_empty(0)
    batch, channels = logvar.shape[0], _channels(logvar, memory_format)
    _cpu.reparameterize_backward(
        0 if grad_z is None else grad_z.data_ptr(), 0 if grad_kl is None else grad_kl.data_ptr(),
        0 if mu is None else mu.data_ptr(), logvar.data_ptr(), grad_mu.data_ptr() if with_grad_mu else 0,
        grad_logvar.data_ptr(), _DTYPE[logvar.dtype], batch, 1 if num_samples is None else num_samples,
        logvar.numel() // batch if batch else 0, channels, key.data_ptr(), 0 if key.dim() == 1 else batch,
        torch.get_num_threads(),
    )  # fmt: skip
    return grad_mu, grad_logvar
