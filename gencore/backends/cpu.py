"""The compiled CPU kernels."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import Tensor

# Before what else needs it.
try:
    from gencore import _cpu
except ImportError as error:
    raise ImportError(
        "the compiled kernels, gencore._cpu, cannot be loaded; `pip install .` builds them (in a checkout, run Python "
        "from another folder or install with `pip install -e .`)"
    ) from error

from gencore.backends.compiled_attention import CompiledAttentionOps
from gencore.backends.compiled_bias_act import CompiledBiasActOps
from gencore.backends.layout import empty_parts_of_log_sums, kept_format
from gencore.backends.structs import DTYPE, noise_shape

# Bytes from which on a new tensor's pages take long to hand out: two huge pages at least lie within.
_LARGE = 6 << 20

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
    """The SIMD level in use: "scalar", "avx2", "avx512" or "avx512_bf16"."""
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


def multiply_adds_per_second(of_bfloat16: bool) -> float:
    """Multiply-adds of float32, or of bfloat16 with sums in float32, that one core makes per second at that level."""
    return _cpu.multiply_adds_per_second(of_bfloat16)


class CpuOps(CompiledAttentionOps, CompiledBiasActOps):
    def _key(self, key: Tensor, tensor: Tensor) -> Tensor:
        return key if key.is_cpu and key.is_contiguous() else key.cpu().contiguous()

    def _words(self, key: Tensor) -> Any:
        return _cpu.NoiseKey(words=key.data_ptr(), rows=0 if key.dim() == 1 else len(key), on_device=False)

    def _place(self, tensor: Tensor, workspace: Tensor | None = None) -> int:
        return torch.get_num_threads()

    def _prepared(self, tensor: Tensor) -> Tensor:
        if tensor.nbytes >= _LARGE:
            _cpu.request_huge_pages(tensor.data_ptr(), tensor.nbytes)
        return tensor

    def _coefficients(
        self, table: Tensor, index: Tensor | None, tensor: Tensor
    ) -> tuple[tuple[Tensor, Tensor | None], Any]:
        # As they nearly always are.
        if table.is_cpu and table.is_contiguous() and (index is None or (index.is_cpu and index.is_contiguous())):
            return (table, index), _cpu.Coefficients(
                values=table.data_ptr(), rows=table.shape[0], index=None if index is None else index.data_ptr(),
                on_device=False,
            )  # fmt: skip
        return super()._coefficients(table, index, tensor)

    def denoising_loss_and_error(
        self, output: Tensor, x0: Tensor, table: Tensor, t: Tensor | None, key: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss, and prediction - target, which the gradient is a multiple of."""
        error = torch.empty_like(output, memory_format=kept_format(output, x0))
        return self.denoising_loss(output, x0, table, t, key, None, error), error

    def denoising_loss_scale(
        self, grad_loss: Tensor, error: Tensor, table: Tensor, t: Tensor | None, key: Tensor
    ) -> Tensor:
        """The gradient, in the place of what :meth:`denoising_loss_and_error` gave."""
        key, (held, coefficients) = self._key(key, error), self._coefficients(table, t, error)
        grad_loss = grad_loss.contiguous()
        self._module.denoising_loss_scale(
            grad_loss=grad_loss.data_ptr(), output=None, x0=None, noise=None, grad_output=error.data_ptr(),
            dtype=DTYPE[error.dtype], shape=noise_shape(error, kept_format(error)), learned=False, table=coefficients,
            key=self._words(key), place=self._place(error),
        )  # fmt: skip
        del held
        return error

    def _empty_log_sums(self, q: Tensor) -> Tensor:
        return empty_parts_of_log_sums(q)

    def _dense_log_sums(self, lse: Tensor) -> Tensor:
        return lse.contiguous()

    def _base(self, lse: Tensor | None) -> int | None:
        return None if lse is None or lse.dim() == 3 else lse.data_ptr() + lse.nbytes // 2

    def general_attention_mask_backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *settings_and_wanted: Any
    ) -> tuple[Tensor | None, ...]:
        """The gradients of q, k, v and of the mask."""
        *settings, wanted = settings_and_wanted
        mask: Tensor = settings[0]
        grad_mask = torch.zeros(mask.shape, dtype=lse.dtype)
        held, scale, options = self._options(q, *settings)
        grads = self.attention_backward(
            grad_out, q, k, v, out, lse, scale, wanted[:3], options=options, grad_mask=grad_mask
        )
        del held
        return *grads, grad_mask.to(mask.dtype)


ops = CpuOps(_cpu)


def refusal(device: torch.device) -> str | None:
    """Why the kernels cannot serve tensors on ``device``; None if they can."""
    return None if device.type == "cpu" else "it serves tensors on the CPU"
