"""Where the CUDA backend hands the forward pass of attention over to cuDNN, through PyTorch, and why.

Our kernels multiply by ``mma.sync``, from which Hopper's tensor cores get two thirds of what they can do; its own
instructions for tiles in shared memory get the rest. cuDNN's kernels take them, so it is ahead where the time goes into
products: at long sequences, with the head sizes that it is made for. Where a head would be padded, and where a call is
short, ours are.

The rows of :data:`TABLE` rest on published figures: Shah et al., "FlashAttention-3" (2024), figure 5, has cuDNN well
ahead of FlashAttention-2, which is built as our kernels are, on an H100 in these sizes. They stand until
`make gpu-check` has measured them; ``benchmarks/test_attention.py`` times every backend of PyTorch's.

What is handed over gets cuDNN's bits. The backward pass is always ours: cuDNN's adds with atomics.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

_cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention.default


class Row(NamedTuple):
    """Calls that are handed over: on GPUs of at least this compute capability, with more than ``tokens`` queries and
    keys, where the channels of each tensor lie side by side."""

    capability: tuple[int, int]
    dtypes: tuple[torch.dtype, ...]
    sizes: tuple[int, ...]
    tokens: int
    why: str


TABLE = (
    Row(
        (9, 0),
        (torch.bfloat16, torch.float16),
        (64, 128),
        1024,
        "at 64 or 128 channels and more than 1,024 tokens, Hopper's own instructions are ahead of mma.sync",
    ),
)
_FEWEST = min(row.tokens for row in TABLE)


def takes_over(
    capability: tuple[int, int], dtype: torch.dtype, size: int, queries: int, keys: int, channels_adjoin: bool
) -> Row | None:
    """The row of :data:`TABLE` that a call is in; None if our kernels run it."""
    for row in TABLE:
        if (
            capability >= row.capability
            and dtype in row.dtypes
            and size in row.sizes
            and min(queries, keys) > row.tokens
            and channels_adjoin
        ):
            return row
    return None


def row_of(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Row | None:
    """The row for these tensors (B, heads, tokens, d)."""
    # A call that is not long is told in a fraction of a microsecond.
    queries, keys = q.shape[2], k.shape[2]
    if queries <= _FEWEST or keys <= _FEWEST or scale <= 0:
        return None
    channels_adjoin = q.stride(3) == k.stride(3) == v.stride(3) == 1
    return takes_over(capability_of(q.device), q.dtype, q.shape[3], queries, keys, channels_adjoin)


def capability_of(device: torch.device) -> tuple[int, int]:
    """(0, 0) where cuDNN does not serve."""
    return _capability(device.index) if device.type == "cuda" else (0, 0)


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    if torch.version.hip is not None or not torch.backends.cudnn.is_available():
        return 0, 0
    return torch.cuda.get_device_capability(index)


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor | None, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """The op of that name, by cuDNN."""
    result, lse, *_ = _cudnn(q, k, v, None, with_lse, 0.0, False, False, scale=scale)
    return _put(result, q, out), lse.reshape(q.shape[:3]).contiguous() if with_lse else None


def _put(result: Tensor, like: Tensor, into: Tensor | None) -> Tensor:
    """The result in ``into``, or with the strides that an empty tensor like ``like`` has: those of our kernels."""
    if into is not None:
        return into.copy_(result)
    if result.stride() == torch.empty_like(like, device="meta").stride():
        return result
    return torch.empty_like(like).copy_(result)
