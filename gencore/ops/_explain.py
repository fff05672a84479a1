"""Which backend would run a call, and why not the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gencore._ops import OPS
from gencore.backends import choice, cpu, dispatch
from gencore.backends.layout import has_rows, memory_format_of, suggested_format
from gencore.ops._attention import heads_of
from gencore.ops._library import explaining, optional_kernel

# Of these only the channels must lie side by side.
_PER_CHANNEL = ("weight", "bias", "scale", "shift", "bias_in")
# Of the definition, where no backend has a kernel.
_OPERATIONS = "PyTorch's operations"
# With any strides.
_AS_THEY_LIE = (("general_attention", "mask"), ("general_attention", "key_lengths"))


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found out. Printed, it is a few lines of text.

    Attributes:
        op: its name.
        device: where its tensors are.
        chosen: what would run it: a backend, or "cudnn" or "flash", PyTorch's own kernels for attention, or "PyTorch's
            operations", where the backend has no kernel for such a call; None if nothing can.
        source: on a GPU, what the choice rests on: "measured on" which one and when, or "not measured". None elsewhere,
            and where a backend is named.
        reasons: for every other backend, why it would not run.
        notes: what the call does besides, such as copies of its arguments.
    """

    op: str
    device: str
    chosen: str | None
    source: str | None
    reasons: dict[str, str]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        chosen: str = self.chosen or "no backend, it would raise"
        if self.chosen == "cpu":
            chosen += f", {cpu.simd_level()} on up to {torch.get_num_threads()} threads"
        if self.source is not None:
            chosen += f", {self.source}"
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
            with _FirstOp(), explaining():
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


class _FirstOp(TorchFunctionMode):
    """Ends the first call of one of our ops before it begins."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "namespace", None) == "gencore":
            names = (argument.name for argument in func._schema.arguments)
            raise _Found(func._schema.name.partition("::")[2].rstrip("_"), dict(zip(names, args, strict=False)))
        return func(*args, **(kwargs or {}))


def _explanation(op: str, arguments: dict[str, Any], device: torch.device | None = None) -> Explanation:
    """``device``: where there are no arguments."""
    tensors = {name: argument for name, argument in arguments.items() if isinstance(argument, Tensor)}
    if device is None:
        device = next(iter(tensors.values())).device
    chosen: str | None
    try:
        chosen = choice.choose(device)
    except choice.NoBackend:
        chosen = None
    source: str | None = None
    reasons: dict[str, str] = {}
    notes: list[str] = []
    optional = optional_kernel(op) if tensors and chosen is not None else None
    runner = None if optional is None else choice.runner_of(optional, device)
    if chosen is not None and optional is not None and (runner is None or optional not in dispatch.KERNELS):
        if runner != chosen:
            reasons = {chosen: "it has no kernel for it"}
        chosen = runner or _OPERATIONS
    elif arguments and chosen in ("cuda", "triton") and choice.named() is None:
        chosen, source, reasons, notes = _by_table(op, arguments, device)
    for name in choice.NAMES:
        if name != chosen:
            reason = choice.refusal(name, device)
            if reason is None:
                reason = "it comes later" if choice.named() is None else f'backend("{choice.named()}")'
            reasons.setdefault(name, reason)
    # The backends in their order, then PyTorch's kernels.
    reasons = {name: reasons[name] for name in dict.fromkeys((*choice.NAMES, *reasons)) if name in reasons}
    for argument, tensor in tensors.items():
        if argument == "key":
            if tensor.dim() == 2 and tensor.device != device:
                notes.append(f"key has a row per sample on {tensor.device} and is copied to {device}")
        elif (argument in _PER_CHANNEL and tensor.stride(-1) == 1) or (op, argument) in _AS_THEY_LIE:
            continue
        elif op in ("attention", "general_attention"):
            if chosen in ("cuda", "triton") and not has_rows(tensor):
                notes.append(
                    f"{argument} has neither its channels nor its tokens side by side, so it goes through a copy"
                )
        elif memory_format_of(tensor) is torch.contiguous_format and not tensor.is_contiguous():
            notes.append(f"{argument} is neither contiguous nor channels_last, so it goes through a copy that is")
    return Explanation(op, str(device), chosen, source, reasons, tuple(notes))


# The kernels of functions, and those of the gradients of kernels.
_KERNELS = {name: kernel for op in OPS for name, kernel in op.functions.items()}
_GRADIENTS = {
    kernel.name: gradient.name
    for op in OPS
    for gradient in op.kernels
    for kernel in op.kernels
    if kernel.direction == "forward" and gradient.direction == "backward" and kernel.table == gradient.table
}


def _by_table(
    op: str, arguments: dict[str, Any], device: torch.device
) -> tuple[str | None, str, dict[str, str], list[str]]:
    """Who runs a call on a GPU, what that rests on, why others do not, and notes on who makes its derivatives, if those
    are others."""
    op = op.removesuffix("_out")
    kernel = _KERNELS.get(op, op.removeprefix("spatial_"))
    args = tuple(arguments.values())
    if op.startswith("spatial_"):
        args = (None,) * dispatch.KERNELS[kernel].main + _heads(arguments)
    runner, source, refused = choice.dispatched(kernel, device).explained(*args)
    if source != "not measured":
        refused |= {name: f"the table has it after {runner}" for name in ("cuda", "triton") if name not in refused}
        refused = {name: reason for name, reason in refused.items() if name != runner}
    gradient, notes = _GRADIENTS.get(kernel), []
    if gradient is not None:
        main = dispatch.KERNELS[kernel].main
        of_gradient = (None,) * dispatch.KERNELS[gradient].main + args[main:]
        behind, why, _ = choice.dispatched(gradient, device).explained(*of_gradient)
        if (behind, why) != (runner, source):
            notes.append(f"its gradient: {behind}, {why}")
    further = f"{kernel}_jvp"
    if further in dispatch.KERNELS:
        behind, why, _ = choice.dispatched(further, device).explained(*args)
        if (behind, why) != (runner, source):
            notes.append(f"its second derivative and forward mode: {behind}, {why}")
    elif optional_kernel(further) is not None and (last := choice.runner_of(further, device)) != runner:
        notes.append(f"its second derivative and forward mode: {last or _OPERATIONS}")
    return runner, source, refused, notes


def _heads(arguments: dict[str, Any]) -> tuple[Any, ...]:
    """What the kernel of attention is given of an image: q, k, v without their values, and the scale."""
    qkv = arguments["qkv"]
    memory_format = suggested_format(qkv)
    like = torch.empty_like(qkv, device="meta", memory_format=memory_format)
    return *heads_of(like, 3, arguments["num_heads"], memory_format), arguments["scale"]
