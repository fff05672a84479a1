"""PyTorch's own kernels for the forward pass of attention, cuDNN's and FlashAttention's, as runners beside ours.

The table of attention says where they are ahead: cuDNN's take Hopper's own instructions. They are called directly, past
the checks of ``scaled_dot_product_attention``, so what they cannot do is refused here. What is handed over has their
bits. The backward pass is always ours: theirs add with atomics.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from gencore._torch import own_kernel

_HALF = (torch.bfloat16, torch.float16)
# They read 16 bytes of a half type at a time.
_UNIT = 8
_KERNELS: dict[str, Any] = {
    "cudnn": own_kernel("_scaled_dot_product_cudnn_attention"),
    "flash": own_kernel("_scaled_dot_product_flash_attention"),
}


def _by_cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float, with_lse: bool) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _KERNELS["cudnn"](q, k, v, None, with_lse, 0.0, False, False, scale=scale)
    return out, lse


def _by_flash(q: Tensor, k: Tensor, v: Tensor, scale: float, with_lse: bool) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _KERNELS["flash"](q, k, v, 0.0, False, False, scale=scale)
    return out, lse


_OPS = {"cudnn": _by_cudnn, "flash": _by_flash}
RUNNERS = tuple(_OPS)
# A lack of memory, and the faults of other kernels, which the next call is told of.
_NOT_ITS_OWN = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))
# Calls that one of them failed in, which it is not given again, with what it said.
_failed: dict[tuple[Any, ...], str] = {}


def refusal(runner: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    """Why a runner cannot take a call with these tensors (B, heads, tokens, d); None if it can."""
    if scale <= 0:
        return "scale is not positive"
    if (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16:
        return "an address is no multiple of 16 bytes"
    reason = _refusal_of_layout(q.dtype, q.shape, k.shape, q.stride(), k.stride(), v.stride())
    if reason is None and not _is_allowed(runner, q, k, v):
        reason = "PyTorch does not allow it here"
    return _failed.get(_call(runner, q, k, v)) if reason is None and _failed else reason


@functools.lru_cache(1024)
def _refusal_of_layout(dtype: torch.dtype, q: Any, k: Any, *strides: tuple[int, ...]) -> str | None:
    """What of that does not depend on values, addresses and PyTorch's switches; of the shapes of q and of k and v."""
    if dtype not in _HALF:
        return "it serves half types"
    if q[3] % _UNIT:
        return f"the channels of a head are no multiple of {_UNIT}"
    for name, shape, stride in zip("qkv", (q, k, k), strides, strict=True):
        if 0 in shape:
            return f"{name} is empty"
        if stride[3] != 1:
            return f"the channels of {name} do not lie side by side"
        # The stride of a dimension of one element says nothing.
        steps = [stride[i] for i in range(3) if shape[i] > 1]
        if 0 in steps:
            return f"{name} is expanded"
        if any(step % _UNIT for step in steps):
            return f"a stride of {name} is no multiple of {_UNIT}"
    return None


def attention(
    runner: str, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor | None = None, with_lse: bool = True
) -> tuple[Tensor, Tensor | None] | None:
    """The kernel of that name, by a runner; None, from then on too, where it fails in such a call.

    Processes find out for themselves: a runner that fails in one of them alone gives it other bits than the rest have.
    """
    try:
        result, lse = _OPS[runner](q, k, v, scale, with_lse)
    except _NOT_ITS_OWN:
        raise
    except RuntimeError as error:
        if q.is_cuda and torch.cuda.is_current_stream_capturing():
            # The capture is lost with it.
            raise
        _failed[_call(runner, q, k, v)] = f"it failed: {str(error).strip().partition(chr(10))[0]}"
        return None
    return _put(result, q, out), lse.reshape(q.shape[:3]).contiguous() if with_lse else None


def _put(result: Tensor, like: Tensor, into: Tensor | None) -> Tensor:
    """The result in ``into``, or with the strides that an empty tensor like ``like`` has: those of our kernels."""
    if into is not None:
        return into.copy_(result)
    if result.stride() == torch.empty_like(like, device="meta").stride():
        return result
    return torch.empty_like(like).copy_(result)


def _call(runner: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    """What a runner's success depends on, but for the batch: it does not decide which bits a sample has."""
    layouts = [(tensor.shape[1:], tensor.stride()[1:]) for tensor in (q, k, v)]
    return runner, q.device, q.dtype, *layouts


def _is_allowed(runner: str, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """PyTorch's own word: its switches, the GPU, the head size."""
    if _KERNELS[runner] is None:
        return False
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)
    return _ALLOWS[runner](params, False)


_ALLOWS = {
    "cudnn": torch.backends.cuda.can_use_cudnn_attention,
    "flash": torch.backends.cuda.can_use_flash_attention,
}
