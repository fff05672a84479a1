"""What the ops that fill a tensor with noise share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gencore.noise import Key
from gencore.ops._checks import check_device, check_elements, check_floating, check_tensor, resolve_key
from gencore.ops._library import Op


def fill(
    op: Op,
    shape: Sequence[int],
    key: Key | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    memory_format: torch.memory_format,
    out: Tensor | None,
) -> Tensor:
    shape = _checked_shape(shape)
    if out is None:
        dtype = torch.get_default_dtype() if dtype is None else dtype
        check_floating("dtype", dtype)
        if device is not None:
            check_device("device", torch.device(device))
        ranks = {torch.contiguous_format: None, torch.channels_last: 4, torch.channels_last_3d: 5}
        if memory_format not in ranks:
            raise ValueError(
                f"memory_format must be contiguous_format, channels_last or channels_last_3d, got {memory_format}"
            )
        if ranks[memory_format] not in (None, len(shape)):
            raise ValueError(f"memory_format {memory_format} needs {ranks[memory_format]} dimensions, got {len(shape)}")
        out = torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)
        check_device("torch's default device", out.device)
    else:
        check_tensor("out", out)
        if out.shape != torch.Size(shape):
            raise ValueError(f"out must have the shape {tuple(shape)}, got {tuple(out.shape)}")
        if out.requires_grad and torch.is_grad_enabled():
            raise ValueError("out must not require a gradient: noise is written over it")
        if dtype is not None and dtype != out.dtype:
            raise ValueError(f"dtype must be left out or be that of out, {out.dtype}, got {dtype}")
        if device is not None and torch.device(device) != out.device:
            raise ValueError(f"device must be left out or be that of out, {out.device}, got {device}")
        if memory_format is not torch.contiguous_format:
            raise ValueError(f"memory_format must be left out when out is given, got {memory_format}")
    packed = resolve_key(key, out)
    if not torch.compiler.is_compiling() and out.is_neg():
        # The sign of such a view is a bit of the tensor, which the dispatcher cannot resolve for an op without result.
        dense = torch.empty(shape, dtype=out.dtype, device=out.device)
        op(dense, packed)
        out.copy_(dense)
    else:
        op(out, packed)
    return out


def _checked_shape(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise TypeError(f"shape must be a sequence of ints, got {type(shape).__name__}")
    if len(shape) == 0:
        raise ValueError("shape must have at least one dimension, the samples; got ()")
    elements: int | torch.SymInt = 1
    for position, size in enumerate(shape):
        if isinstance(size, bool) or not isinstance(size, (int, np.integer, torch.SymInt)):
            raise TypeError(f"shape must hold ints, got {type(size).__name__} at position {position}")
        if size < 0:
            raise ValueError(f"shape must hold sizes of at least 0, got {size} at position {position}")
        if position > 0:
            elements *= size
    check_elements("shape", elements)
    return tuple(shape)
