"""Checks that several models share."""

from __future__ import annotations

from torch import Tensor


def check_latents(latents: Tensor, size: int) -> None:
    """Raises ValueError unless ``latents`` are of shape (B, size)."""
    if latents.dim() != 2 or latents.shape[1] != size:
        raise ValueError(f"latents must be of shape (B, {size}), got {tuple(latents.shape)}")


def check_unconditional(labels: Tensor | None) -> None:
    """Raises ValueError for labels: the model cannot sample a class that is asked for."""
    if labels is not None:
        raise ValueError("labels must be None: this model is not conditional on classes")
