"""Checks that several models share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gencore.arguments import integer


def check_latents(latents: Tensor, size: int) -> None:
    """Raises ValueError unless ``latents`` are of shape (B, size)."""
    if latents.dim() != 2 or latents.shape[1] != size:
        raise ValueError(f"latents must be of shape (B, {size}), got {tuple(latents.shape)}")


def check_unconditional(labels: Tensor | None) -> None:
    """Raises ValueError for labels: the model cannot sample a class that is asked for."""
    if labels is not None:
        raise ValueError("labels must be None: this model is not conditional on classes")


def check_images(images: Tensor, shape: tuple[int, int, int]) -> None:
    """Raises TypeError or ValueError unless ``images`` are a tensor of shape (B, *shape)."""
    _check_tensor("images", images)
    if images.dim() != 4 or images.shape[1:] != shape:
        raise ValueError(f"images must be of shape (B, {', '.join(map(str, shape))}), got {tuple(images.shape)}")


def check_known(known: Tensor, images: Tensor) -> None:
    """Raises TypeError or ValueError unless ``known`` broadcasts to ``images`` and is 0 or 1 everywhere."""
    _check_tensor("known", known)
    try:
        fits = torch.broadcast_shapes(known.shape, images.shape) == images.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"known must broadcast to the images {tuple(images.shape)}, got shape {tuple(known.shape)}")
    if not bool(((known == 0) | (known == 1)).all()):
        raise ValueError("known must be 1 where an image is kept and 0 where it is filled, and has other values")


def check_labels(labels: Tensor, n: int, num_classes: int) -> None:
    """Raises TypeError or ValueError unless ``labels`` are int64 (n,), from -1 (no class) to ``num_classes`` - 1."""
    _check_tensor("labels", labels)
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    if labels.shape != (n,):
        raise ValueError(f"labels must be of shape ({n},), got {tuple(labels.shape)}")
    low, high = (int(labels.min()), int(labels.max())) if n else (0, 0)
    if low < -1 or high >= num_classes:
        raise ValueError(f"labels must be from 0 to {num_classes - 1}, or -1 for no class, got {low} to {high}")


def check_num_samples(num_samples: int) -> int:
    """``num_samples`` as an int; raises TypeError or ValueError unless it is one of at least 1."""
    return integer("num_samples", num_samples, least=1)


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
