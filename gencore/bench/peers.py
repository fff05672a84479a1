"""What our ops are held against: the same mathematics as users of PyTorch run it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """The function through torch.compile, for the shapes it is called with."""
    return torch.compile(function, fullgraph=True, dynamic=False, options=options or None)


def eager_and_compiled(function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """A PyTorch function as its users run it: eager, compiled, and compiled with eager's generator."""
    return {
        "eager": function,
        "compile": compiled(function),
        "compile, fallback RNG": compiled(function, fallback_random=True),
    }
