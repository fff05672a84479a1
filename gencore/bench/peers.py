"""What our ops are held against: the same mathematics as users of PyTorch run it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """The function through torch.compile, for the shapes it is called with."""
    return torch.compile(function, fullgraph=True, dynamic=False, options=options or None)


def eager_and_compiled(function: Callable[..., Any], device: str = "cpu") -> dict[str, Callable[..., Any]]:
    """A PyTorch function as its users run it: eager, compiled, and on the CPU also compiled with eager's generator.

    There the compiler's own generator is slow enough to have nobody use it; on GPUs it is the fast one.
    """
    peers = {"eager": function, "compile": compiled(function)}
    return peers | ({"compile, fallback RNG": compiled(function, fallback_random=True)} if device == "cpu" else {})


def diffusers_scheduler(name: str, device: str, steps: int | None = None) -> Any:
    """diffusers' scheduler of that name with its default betas, those of DDPM; None where it is not installed."""
    try:
        import diffusers
    except ImportError:
        return None
    scheduler = getattr(diffusers, name)()
    if steps is not None:
        scheduler.set_timesteps(steps, device=device)
    return scheduler
