"""What the ops that fill a tensor with noise share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gencore._torch import hand_over, is_overridden, is_wrapped
from gencore.arguments import as_int
from gencore.noise import Key
from gencore.ops._checks import check_device, check_elements, check_floating, check_tensor, resolve_key, rows_of
from gencore.ops._library import Layout, Op, define


def define_filling(name: str) -> Op:
    """Registers an op that fills a tensor with noise."""
    op: Op

    def batched(info: Any, in_dims: tuple[int | None, ...], out: Tensor, key: Tensor) -> tuple[None, None]:
        """Several calls of ``torch.func.vmap`` in one: a batch of all their samples, with a row of the key for each."""
        of_out, of_key = in_dims
        if of_out is None:
            raise ValueError(
                "out must be mapped over by vmap where the key is, or left out: each key has noise of its own"
            )
        out = out.movedim(of_out, 0)
        key = key.expand(info.batch_size, *key.shape) if of_key is None else key.movedim(of_key, 0)
        rows = key if key.dim() == 3 else rows_of(key, out.shape[1])
        keys, samples, *sizes = out.shape
        # Of the strides alone: other transforms and modes may be around, in which tensors have no memory to look at.
        is_view = keys == 1 or samples == 1 or out.stride(0) == samples * out.stride(1)
        flat = out.view(keys * samples, *sizes) if is_view else out.new_empty(keys * samples, *sizes)
        op(flat, rows.flatten(0, 1))
        if not is_view:
            out.copy_(flat.view(out.shape))
        return None, None

    op = define(
        f"{name}(Tensor(a!) out, Tensor key) -> ()",
        fake=lambda out, key: None,
        layouts=lambda args: [Layout({"out": 0, "key": 0}, ())],
        batched=batched,
    )
    return op


def fill(function: Callable[..., Tensor], op: Op, shape: Any, key: Any, **options: Any) -> Tensor:
    """What ``function(shape, key, **options)``, ``normal`` or ``uniform``, gives: a tensor that ``op`` has filled."""
    try:
        return _filled(op, shape, key, **options)
    except TypeError:
        # Sizes, keys and tensors may stand for what is known later only, as in ``torch.fx``.
        sizes = shape if isinstance(shape, (tuple, list)) else (shape,)
        if not is_overridden(*(given := (*sizes, key, options["out"]))):
            raise
    filled: Tensor = hand_over(function, given, shape, key, **options)
    return filled


def _filled(
    op: Op,
    shape: Sequence[int],
    key: Key | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    memory_format: torch.memory_format,
    out: Tensor | None,
) -> Tensor:
    shape, given = _checked_shape(shape), out
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
    if given is None and (torch.compiler.is_compiling() or is_wrapped(packed)):
        # Under vmap each key has a tensor of its own, which the compiler does not tell.
        out = empty_beside(packed, shape, out, memory_format)
    op(out, packed)
    return out


def empty_beside(packed: Tensor, shape: Sequence[int], like: Tensor, memory_format: torch.memory_format) -> Tensor:
    """A tensor in the transforms that the key's words are in, and otherwise as ``like`` is."""
    if memory_format is torch.contiguous_format:
        return packed.new_empty(shape, dtype=like.dtype, device=like.device)
    # Under vmap tensors have one dimension more, and no memory format.
    samples, channels, *sizes = shape
    return packed.new_empty((samples, *sizes, channels), dtype=like.dtype, device=like.device).movedim(-1, 1)


def _checked_shape(shape: Any) -> tuple[int, ...]:
    if isinstance(shape, np.ndarray) and shape.ndim == 1:
        shape = shape.tolist()
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise TypeError(f"shape must be a sequence of ints, got {type(shape).__name__}")
    if len(shape) == 0:
        raise ValueError("shape must have at least one dimension, the samples; got ()")
    elements, sizes = 1, []
    for position, given in enumerate(shape):
        size = given if type(given) is int else as_int(given)
        if size is None:
            raise TypeError(f"shape must hold ints, got {type(given).__name__} at position {position}")
        if size < 0:
            raise ValueError(f"shape must hold sizes of at least 0, got {size} at position {position}")
        if position > 0:
            elements *= size
        sizes.append(size)
    check_elements("shape", elements)
    return tuple(sizes)
