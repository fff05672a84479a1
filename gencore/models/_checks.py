"""Checks that several models share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gencore.arguments import integer
from gencore.spec import Condition, Conditions, DataSpec


def check_latents(latents: Tensor, size: int) -> None:
    """Raises ValueError unless ``latents`` are of shape (B, size)."""
    if latents.dim() != 2 or latents.shape[1] != size:
        raise ValueError(f"latents must be of shape (B, {size}), got {tuple(latents.shape)}")


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


def check_conditions(
    conditions: Conditions, n: int, spec: DataSpec, takes: Mapping[str, str], device: torch.device
) -> dict[str, Tensor | Sequence[str]]:
    """The conditions of ``n`` images, on the device.

    Args:
        takes: those that a model takes, by name, each "required" or "optional".

    Raises:
        TypeError, ValueError: one that the model does not take or needs and lacks, of another dtype, shape or number,
            or a class that there is not; -1, no class, is one where the condition is optional.
    """
    for name in conditions:
        if name not in takes:
            known = f"takes {' and '.join(takes)} alone" if takes else "takes none"
            raise ValueError(f"conditions must not hold {name!r}: this model {known}")
    checked = {}
    for name, need in takes.items():
        if name in conditions:
            checked[name] = _checked_condition(conditions[name], n, spec[name], need == "optional", device)
        elif need == "required":
            raise ValueError(f"conditions must hold {name!r} ({_WANTED[spec[name].kind]}): this model needs it")
    return checked


_WANTED = {"class": "classes", "image": "images", "text": "strings"}


def _checked_condition(
    values: Any, n: int, condition: Condition, has_none: bool, device: torch.device
) -> Tensor | Sequence[str]:
    name = f"conditions[{condition.name!r}]"
    if condition.kind == "text":
        if isinstance(values, str) or not isinstance(values, Sequence) or any(not isinstance(v, str) for v in values):
            raise TypeError(f"{name} must be a sequence of strings, got {type(values).__name__}")
        if len(values) != n:
            raise ValueError(f"{name} must hold {n} strings, got {len(values)}")
        return tuple(values)
    _check_tensor(name, values)
    if condition.kind == "image":
        shape = (n, *(condition.shape or ()))
        if not values.is_floating_point():
            raise TypeError(f"{name} must be of a floating dtype, got {values.dtype}")
        if values.shape != shape:
            raise ValueError(f"{name} must be of shape {shape}, got {tuple(values.shape)}")
        return values.to(device)
    if values.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {values.dtype}")
    if values.shape != (n,):
        raise ValueError(f"{name} must be of shape ({n},), got {tuple(values.shape)}")
    low, high = (int(values.min()), int(values.max())) if n else (0, 0)
    least, classes = -1 if has_none else 0, len(condition.names)
    if low < least or high >= classes:
        none = ", or -1 for no class" if has_none else ""
        raise ValueError(f"{name} must be from 0 to {classes - 1}{none}, got {low} to {high}")
    return values.to(device)


def check_num_samples(num_samples: int) -> int:
    """``num_samples`` as an int; raises TypeError or ValueError unless it is one of at least 1."""
    return integer("num_samples", num_samples, least=1)


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
