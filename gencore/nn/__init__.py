"""Modules on top of :mod:`gencore.ops`, with the state dicts of PyTorch's own."""

from gencore.nn.group_norm import GroupNorm as GroupNorm

__all__ = ["GroupNorm"]
