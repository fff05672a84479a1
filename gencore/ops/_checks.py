"""The contract that ops share: what is wrong with an argument is said before anything is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gencore.noise import MAX_ELEMENTS_PER_SAMPLE, Key

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FLOATING = frozenset(FLOATING)
_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))


def is_plain(tensor: Any, other: Any, key: Any) -> bool:
    """Whether this is the everyday call, which needs no further check: it costs half a microsecond to find out.

    Two plain CPU tensors of one floating dtype and shape, of fewer than 2^31 elements, and a key for the whole batch.
    Whatever is not is looked at argument by argument, to be served or to be told what is wrong.
    """
    return (
        type(tensor) in _PLAIN_TYPES
        and type(other) in _PLAIN_TYPES
        and type(key) is Key
        and tensor.dtype is other.dtype
        and tensor.dtype in _FLOATING
        and tensor.shape == other.shape
        and tensor.is_cpu
        and other.is_cpu
        and tensor.dim() > 0
        and tensor.numel() < 1 << 31
        and key.packed.dim() == 1
        and key.packed.is_cpu
        and not tensor.is_neg()
        and not other.is_neg()
    )


def check_floating(name: str, dtype: Any) -> None:
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} must be a torch.dtype, got {type(dtype).__name__}")
    if dtype not in FLOATING:
        names = ", ".join(str(d).removeprefix("torch.") for d in FLOATING)
        raise TypeError(f"{name} must be one of {names}, got {str(dtype).removeprefix('torch.')}")


def check_tensor(name: str, tensor: Any) -> None:
    """``tensor`` must be a floating-point tensor with samples in its first dimension, on a device with kernels."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    check_floating(f"dtype of {name}", tensor.dtype)
    if tensor.dim() == 0:
        raise ValueError(f"{name} must have at least one dimension, the samples; got a scalar")
    check_device(name, tensor.device)


def check_device(name: str, device: torch.device) -> None:
    if device.type not in ("cpu", "meta"):
        raise ValueError(f"{name} must be on the CPU: this version of gencore has CPU kernels only, got {device}")


def check_same(name: str, tensor: Any, other_name: str, other: Tensor) -> None:
    """``tensor`` must agree with ``other``, which was checked, in shape, dtype and device."""
    check_tensor(name, tensor)
    if tensor.shape != other.shape:
        raise ValueError(f"{name} must have the shape of {other_name}, {tuple(other.shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name}, {other.dtype}, got {tensor.dtype}")
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {tensor.device}")


def resolve_key(key: Key | None, samples: int, device: torch.device) -> Tensor:
    """The key's words for a batch of ``samples`` on ``device``; without a key, one from torch's generator."""
    if key is None:
        return Key.from_generator().packed
    if not isinstance(key, Key):
        raise TypeError(f"key must be a gencore.Key or None, got {type(key).__name__}; gencore.Key(seed) makes one")
    packed = key.packed
    if packed.dim() == 2 and packed.shape[0] != samples:
        raise ValueError(f"key must name {samples} samples, one per row of the batch, but names {packed.shape[0]}")
    if packed.device.type != "cpu" and packed.device != device:
        raise ValueError(f"key must be on the CPU or on {device}, got {packed.device}; key.to(device) moves it")
    return packed


def check_elements(name: str, elements: int | torch.SymInt) -> None:
    if elements > MAX_ELEMENTS_PER_SAMPLE:
        raise ValueError(f"{name} must have at most 2^34 elements per sample, got {elements}")
