"""Which backend runs an op: the device decides, unless one is named; what cannot run says why."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from gencore.backends import cpu, cuda

Name = Literal["cpu", "cuda", "triton"]
# In the order of preference.
NAMES: tuple[Name, ...] = get_args(Name)

_named: Name | None = None


@contextmanager
def backend(name: Name) -> Iterator[None]:
    """Within this context every op runs on the backend ``name``, or raises and says why that backend cannot.

    Without it, an op takes the first backend that serves the device of its tensors. The noise is the same on each.

    Args:
        name: ``"cpu"``, the compiled kernels for the CPU; ``"cuda"``, the compiled kernels for NVIDIA GPUs;
            ``"triton"``, kernels that Triton compiles for a GPU when they are first called.

    It holds for the whole process, as PyTorch's own switches of backends do, because backward passes run in threads of
    their own. Compiled functions follow it when they run, not when they are compiled.

    Raises:
        ValueError: there is no backend of that name.
    """
    global _named
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    before, _named = _named, name
    try:
        yield
    finally:
        _named = before


def named() -> Name | None:
    """The backend that :func:`backend` names, where it is in force."""
    return _named


def refusal(name: Name, device: torch.device) -> str | None:
    """Why a backend cannot serve tensors on ``device``; None if it can."""
    if name == "cpu":
        return cpu.refusal(device)
    return cuda.refusal(device) if name == "cuda" else _refusal_of_triton(device)


def load(name: Name) -> Any:
    """The ops of a backend: attributes by the names that the library knows them by."""
    if name == "cpu":
        return cpu.ops
    return cuda.load() if name == "cuda" else _load_triton()


class NoBackend(ValueError):
    """No backend serves ``device``, or not the one that is named; the message has the reason of each."""

    def __init__(self, device: torch.device, reasons: dict[Name, str | None]):
        wanted = "no backend serves" if _named is None else f'backend("{_named}") is in force, which does not serve'
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        super().__init__(f"{wanted} tensors on {device}: {why}")
        self.device = device


def choose(device: torch.device) -> Name:
    """The backend that serves tensors on ``device``. Raises :class:`NoBackend`."""
    return _choose(_named, device)


# What a device is served by does not change while the process lives, and finding it out is slow.
@functools.cache
def _choose(only: Name | None, device: torch.device) -> Name:
    reasons: dict[Name, str | None] = {}
    for name in NAMES if only is None else (only,):
        reasons[name] = refusal(name, device)
        if reasons[name] is None:
            return name
    raise NoBackend(device, reasons)


def kernel(op: str, tensor: Tensor) -> Callable[..., Any]:
    """What runs an op on tensors where ``tensor`` is. Raises :class:`NoBackend`."""
    if _named is None and tensor.is_cpu:
        return getattr(cpu.ops, op)
    return getattr(load(_choose(_named, tensor.device)), op)


def triton_unavailable() -> str | None:
    """Why Triton's kernels can serve no device at all; None if nothing is in the way."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not _is_interpreted() and not torch.cuda.is_available():
        return "torch finds no GPU to use"
    return None


def _refusal_of_triton(device: torch.device) -> str | None:
    if device.type != ("cpu" if _is_interpreted() else "cuda"):
        return "it is interpreted, on the CPU" if _is_interpreted() else "it serves tensors on GPUs"
    reason = triton_unavailable()
    if reason is None:
        try:
            _load_triton()
        except ImportError as error:
            reason = f"triton cannot be loaded: {error}"
    return reason


@functools.cache
def _is_interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU, for tests without a GPU. It decides that at import, once."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def _load_triton() -> Any:
    from gencore.backends import triton

    return triton
