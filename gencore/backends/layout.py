"""The memory formats that kernels read and write as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def memory_format_of(tensor: Tensor) -> torch.memory_format:
    """The format an op keeps: channels_last (4-d) or channels_last_3d (5-d) if the tensor has it, else contiguous.

    A tensor that is in both formats, such as one with a single channel or a single pixel, counts as contiguous.
    """
    if not tensor.is_contiguous():
        if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if tensor.dim() == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def suggested_format(tensor: Tensor) -> torch.memory_format:
    """The format to bring a tensor to, and to keep: that of :func:`memory_format_of`, and for a part of a larger tensor
    the larger one's, as its strides tell."""
    memory_format = memory_format_of(tensor)
    if memory_format is torch.contiguous_format and tensor.dim() in (4, 5) and not tensor.is_contiguous():
        shape, stride = tensor.shape, tensor.stride()
        least = 1
        for axis in (1, *range(tensor.dim() - 1, 1, -1), 0):
            if stride[axis] < least:
                return memory_format
            least = stride[axis] * shape[axis]
        return torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
    return memory_format


def kept_format(tensor: Tensor, like: Tensor | None = None) -> torch.memory_format:
    """:func:`suggested_format`, of a tensor that may hold several for each of the channels of ``like`` (itself).

    Where these are one channel, it is contiguous: kernels cannot tell the formats of such a tensor apart.
    """
    if tensor.dim() < 4 or tensor.is_contiguous() or (tensor if like is None else like).shape[1] == 1:
        return torch.contiguous_format
    return suggested_format(tensor)


def empty_with_channels(like: Tensor, channels: int) -> Tensor:
    """An uninitialised tensor like ``like`` but for the last dimension, dense, its dimensions in the same order."""
    if channels == like.shape[-1]:
        return torch.empty_like(like)
    order = list(range(like.dim()))
    if 0 not in like.stride():  # An expanded dimension has no place in memory.
        order.sort(key=like.stride, reverse=True)
    shape = (*like.shape[:-1], channels)
    dense = like.new_empty([shape[dim] for dim in order])
    return dense.permute([order.index(dim) for dim in range(like.dim())])


def log_sums(q: Tensor) -> Tensor:
    """An uninitialised tensor for the logarithms of attention's denominators."""
    return q.new_empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


def empty_parts_of_log_sums(q: Tensor) -> Tensor:
    """For the logarithms of attention's denominators, in two parts whose sum they are: the second may be a logit."""
    return q.new_empty((2, *q.shape[:3]), dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


def empty_draws(like: Tensor, num_samples: int | None) -> Tensor:
    """An uninitialised tensor like ``like`` in its kept format, or one of ``(num_samples, *like.shape)``."""
    memory_format = memory_format_of(like)
    if num_samples is None:
        return torch.empty_like(like, memory_format=memory_format)
    shape = (num_samples * like.shape[0], *like.shape[1:])
    flat = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)
    return flat.view(num_samples, *like.shape)


def in_format(memory_format: torch.memory_format, *tensors: Tensor | None) -> list[Any]:
    """The tensors in a memory format, each itself if it has that format already; None stays None."""
    if memory_format is torch.contiguous_format:
        # Asking costs a third of what contiguous() does.
        return [tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous() for tensor in tensors]
    return [None if tensor is None else tensor.contiguous(memory_format=memory_format) for tensor in tensors]


def has_rows(tensor: Tensor) -> bool:
    """Whether a tensor (B, heads, tokens, channels) has its channels or its tokens side by side.

    The stride of a dimension of one element says nothing.
    """
    tokens, channels = tensor.shape[2:]
    return tensor.stride(3) == 1 or tensor.stride(2) == 1 or channels == 1 or tokens == 1


def readable(tensor: Tensor) -> Tensor:
    """The tensor (B, heads, tokens, channels), or a copy of which the channels lie side by side."""
    return tensor if has_rows(tensor) else tensor.contiguous()


def writable(tensor: Tensor) -> Tensor:
    """The tensor, or in its place one that kernels of attention can write to, to be copied."""
    return tensor if has_rows(tensor) else torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def empty_gradients(values: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor | None]:
    """A contiguous tensor for the gradient of each value that is there and wants one, None for the others."""
    return [
        torch.empty_like(value, memory_format=torch.contiguous_format) if want and value is not None else None
        for value, want in zip(values, wanted, strict=True)
    ]


def planes_of(x: Tensor, memory_format: torch.memory_format) -> tuple[int, int, int]:
    """Of a tensor in its format: it is so many times so many channels of so many elements side by side."""
    channels = x.shape[1] if x.dim() > 1 else 1
    outer = x.shape[0] if memory_format is torch.contiguous_format else x.numel() // max(channels, 1)
    return outer, channels, x.numel() // max(outer * channels, 1)


def channel_sums(x: Tensor) -> Tensor:
    """An uninitialised tensor for a sum over each channel."""
    return x.new_empty(x.shape[1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
