"""Checks that layers share. They look at tensors that torch.fx's tracer leaves for when the traced module runs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gencore.arguments import integer


@torch.fx.wrap
def check_images(name: str, images: Any, channels: int) -> None:
    """``images`` must be (N, channels, H, W)."""
    _check_tensor(name, images)
    if images.dim() != 4 or images.shape[1] != channels:
        raise ValueError(f"{name} must have the shape (N, {channels}, H, W), got {tuple(images.shape)}")


@torch.fx.wrap
def check_channels(name: str, tensor: Any) -> None:
    """``tensor`` must have samples and channels, (N, C, ...)."""
    _check_tensor(name, tensor)
    if tensor.dim() < 2:
        raise ValueError(f"{name} must have the shape (N, C, ...), got {tuple(tensor.shape)}")


@torch.fx.wrap
def check_features(name: str, tensor: Any, size: int, like: Any = None) -> None:
    """``tensor`` must be (..., size), or, with the images ``like``, (N, size) with a row for each of them."""
    _check_tensor(name, tensor)
    if like is not None and tensor.shape != (like.shape[0], size):
        raise ValueError(f"{name} must have the shape ({like.shape[0]}, {size}), got {tuple(tensor.shape)}")
    if tensor.dim() == 0 or tensor.shape[-1] != size:
        raise ValueError(f"{name} must have the shape (..., {size}), got {tuple(tensor.shape)}")


def _check_tensor(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be of a floating dtype, got {tensor.dtype}")


def number(name: str, value: Any, *, least: float = -math.inf, above: float = -math.inf) -> float:
    """``value`` as a finite float.

    Raises:
        TypeError: it is no number.
        ValueError: it is not finite, below ``least``, or not above ``above``.
    """
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    found = float(value)
    if not (math.isfinite(found) and found >= least and found > above):
        wanted = f" of at least {least:g}" if least > -math.inf else f" above {above:g}" if above > -math.inf else ""
        raise ValueError(f"{name} must be a finite number{wanted}, got {value!r}")
    return found


def odd(name: str, value: Any) -> int:
    """``value`` as an odd int of at least 1: the size of a kernel that has a middle."""
    size = integer(name, value, least=1)
    if size % 2 == 0:
        raise ValueError(f"{name} must be odd, got {size}")
    return size
