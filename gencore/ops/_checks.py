"""The contract that ops share: what is wrong with an argument is said before anything is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gencore.noise import MAX_ELEMENTS_PER_SAMPLE, Key

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FLOATING = frozenset(FLOATING)


def is_plain_pair(a: Any, b: Any) -> bool:
    """Whether these are CPU tensors of one floating dtype and shape, with fewer than 2^31 elements.

    That is the everyday call, which half a microsecond finds to be in order. Every other is looked at argument by
    argument, to be served or to be told what is wrong.
    """
    return (
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and a.dtype is b.dtype
        and a.dtype in _FLOATING
        and a.layout is b.layout is torch.strided
        and not (a.is_nested or b.is_nested)
        and a.shape == b.shape
        and a.is_cpu
        and b.is_cpu
        and a.dim() > 0
        and a.numel() < 1 << 31
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
    if tensor.is_nested or tensor.layout is not torch.strided:
        layout = "a nested tensor" if tensor.is_nested else f"one of layout {tensor.layout}"
        raise ValueError(f"{name} must be a dense (strided) tensor, got {layout}")
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
        places = "on the CPU" if device.type == "cpu" else f"on the CPU or on {device}"
        raise ValueError(f"key must be {places}, got {packed.device}; key.to(device) moves it")
    return packed


def check_elements(name: str, elements: int | torch.SymInt) -> None:
    if elements > MAX_ELEMENTS_PER_SAMPLE:
        raise ValueError(f"{name} must have at most 2^34 elements per sample, got {elements}")
