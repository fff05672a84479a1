"""The compiled CUDA kernels. Importing this loads nothing; the first tensor on a GPU does."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from gencore._torch import current_stream
from gencore.backends import cpu
from gencore.backends.compiled_attention import CompiledAttentionOps
from gencore.backends.compiled_bias_act import CompiledBiasActOps
from gencore.backends.layout import readable, writable
from gencore.backends.structs import DTYPE

# What csrc/cuda asks of the hardware: conversions to bfloat16, asynchronous copies.
_LEAST_CAPABILITY = (8, 0)


class CudaOps(CompiledAttentionOps, CompiledBiasActOps):
    def _key(self, key: Tensor, tensor: Tensor) -> Tensor:
        # The three words of a key on the CPU are arguments of the launch: nothing is copied, nothing waits.
        if key.device != tensor.device and not (key.is_cpu and key.dim() == 1):
            key = key.to(tensor.device, non_blocking=True)
        return key if key.is_contiguous() else key.contiguous()

    def _place(self, tensor: Tensor, workspace: Tensor | None = None) -> Any:
        device = tensor.get_device()
        return self._module.Place(
            device=device, stream=current_stream(device), workspace=None if workspace is None else workspace.data_ptr()
        )

    def _is_key_on_device(self, key: Tensor) -> bool:
        return not key.is_cpu

    def _is_on_device(self, table: Tensor, index: Tensor | None) -> bool:
        # A single row on the CPU is an argument of the launch.
        return index is not None or len(table) != 1 or not table.is_cpu

    def _is_aligned(self, tensor: Tensor) -> bool:
        return tensor.data_ptr() % 16 == 0

    def _workspace(self, op: str, tensor: Tensor, shape: Any) -> Tensor | None:
        nbytes = getattr(self._module, f"{op}_workspace")(DTYPE[tensor.dtype], shape)
        return torch.empty(nbytes, dtype=torch.uint8, device=tensor.device) if nbytes else None

    def _readable(self, tensor: Tensor) -> Tensor:
        return readable(tensor)

    def _writable(self, tensor: Tensor) -> Tensor:
        return writable(tensor)


@functools.cache
def load() -> CudaOps:
    """The ops. Loads the module."""
    from gencore import _cuda

    return CudaOps(_cuda)


def unavailable() -> str | None:
    """Why the kernels can serve no device at all; None if nothing is in the way."""
    if importlib.util.find_spec("gencore._cuda") is None:
        return f"this gencore has no CUDA module: {cpu.build_info()['cuda_module']}"
    if torch.version.cuda is None:
        return "the CUDA module is built, but this torch is not built with CUDA"
    if not torch.cuda.is_available():
        return "the CUDA module is built, but torch finds no GPU to use"
    return None


def refusal(device: torch.device) -> str | None:
    """Why the kernels cannot serve tensors on ``device``; None if they can."""
    if device.type != "cuda":
        return "it serves tensors on NVIDIA GPUs"
    reason = unavailable()
    if reason is not None:
        return reason
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"it needs a GPU of compute capability 8.0 or later, and {name} has {capability[0]}.{capability[1]}"
    try:
        problem = load()._module.unusable(torch.cuda.current_device() if device.index is None else device.index)
    except ImportError as error:
        return f"gencore._cuda cannot be loaded: {error}"
    return f"the CUDA module ({cpu.build_info()['cuda_module']}) cannot use it: {problem}" if problem else None
