"""Which backend would run a call, and why not the others."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gencore.backends import choice, cpu, handover
from gencore.backends.layout import has_rows, memory_format_of, suggested_format

# Of these only the channels must lie side by side.
_PER_CHANNEL = ("weight", "bias", "scale", "shift", "bias_in")


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found out. Printed, it is a few lines of text.

    Attributes:
        op: its name.
        device: where its tensors are.
        chosen: the backend that would run it; None if none can.
        reasons: for every other backend, why it would not run.
        notes: what the call does besides, such as copies of its arguments.
    """

    op: str
    device: str
    chosen: choice.Name | None
    reasons: dict[choice.Name, str]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        chosen: str = self.chosen or "no backend, it would raise"
        if self.chosen == "cpu":
            chosen += f", {cpu.simd_level()} on up to {torch.get_num_threads()} threads"
        lines = [f"{self.op} on {self.device}: {chosen}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines + [f"  {note}" for note in self.notes])


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Tells which backend would run ``op(*args, **kwargs)``, and why the others would not.

    The arguments are checked as in the call, and a tensor that the call would fill is allocated, but nothing is
    computed or written, and torch's generators are as before.

    Args:
        op: a function of :mod:`gencore.ops`, or one that calls a single op.

    Raises:
        TypeError, ValueError: as the call would, for anything but the lack of a backend.
        ValueError: ``op`` calls no op of gencore.

    >>> print(explain(normal, (64, 1000)))  # doctest: +SKIP
    normal on cpu: cpu, avx512 on up to 2 threads
      not cuda: it serves tensors on NVIDIA GPUs
      not triton: it serves tensors on GPUs
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with _FirstOp():
                op(*args, **kwargs)
        except _Found as found:
            return _explanation(found.op, found.arguments)
        except choice.NoBackend as error:
            # An argument is where no backend serves it, so it was refused before any op.
            return _explanation(getattr(op, "__name__", str(op)), {}, error.device)
    raise ValueError(f"op must be a function that calls an op of gencore, got {op!r}")


class _Found(Exception):
    def __init__(self, op: str, arguments: dict[str, Any]):
        self.op, self.arguments = op, arguments


class _FirstOp(TorchDispatchMode):
    """Ends the first call of one of our ops before it begins."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "gencore":
            names = (argument.name for argument in func._schema.arguments)
            raise _Found(func._schema.name.partition("::")[2].rstrip("_"), dict(zip(names, args, strict=False)))
        return func(*args, **(kwargs or {}))


def _explanation(op: str, arguments: dict[str, Any], device: torch.device | None = None) -> Explanation:
    """``device``: where there are no arguments."""
    tensors = {name: argument for name, argument in arguments.items() if isinstance(argument, Tensor)}
    if device is None:
        device = next(iter(tensors.values())).device
    chosen: choice.Name | None
    try:
        chosen = choice.choose(device)
    except choice.NoBackend:
        chosen = None
    reasons = {}
    for name in choice.NAMES:
        if name != chosen:
            reason = choice.refusal(name, device)
            reasons[name] = reason or ("it comes later" if choice.named() is None else f'backend("{choice.named()}")')
    notes = []
    for argument, tensor in tensors.items():
        if argument == "key":
            if tensor.dim() == 2 and tensor.device != device:
                notes.append(f"key has a row per sample on {tensor.device} and is copied to {device}")
        elif argument in _PER_CHANNEL and tensor.stride(-1) == 1:
            continue
        elif op == "attention":
            if chosen != "cpu" and not has_rows(tensor):
                notes.append(
                    f"{argument} has neither its channels nor its tokens side by side, so it goes through a copy"
                )
        elif memory_format_of(tensor) is torch.contiguous_format and not tensor.is_contiguous():
            notes.append(f"{argument} is neither contiguous nor channels_last, so it goes through a copy that is")
    row = _handed_over(op, arguments, device) if chosen == "cuda" else None
    if row is not None:
        notes.append(f"forward, it is handed over to cuDNN: {row.why}")
    return Explanation(op, str(device), chosen, reasons, tuple(notes))


def _handed_over(op: str, arguments: dict[str, Any], device: torch.device) -> handover.Row | None:
    if op == "attention":
        return handover.row_of(*(arguments[name] for name in ("q", "k", "v", "scale")))
    if op == "spatial_attention" and arguments["scale"] > 0:
        qkv, size = arguments["qkv"], arguments["qkv"].shape[1] // (3 * arguments["num_heads"])
        pixels = math.prod(qkv.shape[2:])
        # As they are when they reach the kernel.
        channels_adjoin = suggested_format(qkv) is not torch.contiguous_format
        capability = handover.capability_of(device)
        return handover.takes_over(capability, qkv.dtype, size, pixels, pixels, channels_adjoin)
    return None
