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

from gencore.backends import cpu, cuda, dispatch, handover
from gencore.backends.dispatch import Runner

Name = Literal["cpu", "cuda", "triton"]
# In the order of preference.
NAMES: tuple[Name, ...] = get_args(Name)

_named: Name | None = None


@contextmanager
def backend(name: Name) -> Iterator[None]:
    """Within this context every op runs on the backend ``name``, or raises and says why that backend cannot.

    Without it, an op takes a backend that serves the device of its tensors: where several do, the fastest for such a
    call, as far as is known (:func:`gencore.explain` says which). The noise is the same on each.

    Args:
        name: ``"cpu"``, the compiled kernels for the CPU; ``"cuda"``, the compiled kernels for NVIDIA GPUs;
            ``"triton"``, kernels that Triton compiles for a GPU when they are first called. Nothing is handed over to
            PyTorch's own kernels.

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


_pinned: Runner | None = None


@contextmanager
def handed_to(runner: Runner) -> Iterator[None]:
    """Within this context attention's forward pass on GPUs is run by PyTorch's kernels of that name, or raises.

    Benchmarks time it so: as a call would take that the table hands over.
    """
    global _pinned
    before, _pinned = _pinned, runner
    try:
        yield
    finally:
        _pinned = before


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
    """The first backend that serves tensors on ``device``. Raises :class:`NoBackend`."""
    return _choose(_named, device)


# What a device is served by does not change while the process lives, and finding it out is slow.
@functools.cache
def _choose(only: Name | None, device: torch.device) -> Name:
    reasons: dict[Name, str | None] = {}
    for name in NAMES if only is None else (only,):
        reasons[name] = _refusal(name, device)
        if reasons[name] is None:
            return name
    raise NoBackend(device, reasons)


@functools.cache
def _refusal(name: Name, device: torch.device) -> str | None:
    return refusal(name, device)


@functools.cache
def _choose_with(op: str, only: Name | None, device: torch.device) -> Name:
    """The first backend that serves ``device`` and has a kernel of that name; if none has, the first that serves it."""
    chosen = _choose(only, device)
    names = NAMES if only is None else (only,)
    return next((name for name in names if _refusal(name, device) is None and hasattr(load(name), op)), chosen)


def kernel(op: str, tensor: Tensor) -> Callable[..., Any]:
    """What runs an op on tensors where ``tensor`` is. Raises :class:`NoBackend`, or AttributeError where no backend
    that serves them has such a kernel."""
    if _named is None:
        if tensor.is_cpu:
            return getattr(cpu.ops, op)
        if dispatch.has_table(op):
            return dispatched(op, tensor.device)
    return getattr(load(_choose_with(op, _named, tensor.device)), op)


def has_kernel(op: str, tensor: Tensor) -> bool:
    """Whether a backend where ``tensor`` is has a kernel of its own for an op that others do without."""
    return runner_of(op, tensor.device) is not None


def runner_of(op: str, device: torch.device) -> Name | None:
    """The backend that runs an op that some do without; None where none on ``device`` has it. Raises
    :class:`NoBackend`."""
    chosen = _choose_with(op, _named, device)
    return chosen if hasattr(load(chosen), op) else None


@functools.cache
def dispatched(op: str, device: torch.device) -> Dispatched:
    """An op that has a table, on ``device``."""
    return Dispatched(op, device)


class Dispatched:
    """A kernel by whichever of several runners is the fastest for a call, as far as is known.

    A call goes through the runners in the order of its row in the table, then through the backends in theirs, to the
    first that takes it. Raises :class:`NoBackend` where none does.
    """

    def __init__(self, op: str, device: torch.device):
        self._op, self._device, self._capability = op, device, dispatch.capability_of(device)

    def __call__(self, *args: Any, **options: Any) -> Any:
        for runner in self._order(args):
            reason = self._refusal(runner, args)
            if reason is not None:
                if runner == _pinned:
                    raise ValueError(f"{runner} cannot run it: {reason}")
                continue
            if runner != "cudnn" and runner != "flash":
                return getattr(load(runner), self._op)(*args, **options)
            done = handover.attention(runner, *args)
            if done is not None:
                return done
        raise NoBackend(self._device, {name: _refusal(name, self._device) for name in NAMES})

    def explained(self, *args: Any) -> tuple[str | None, str, dict[str, str]]:
        """Who would run a call, what that rests on, and of those before it in the order why they would not."""
        entry = dispatch.entry_of_call(self._op, self._capability, args)
        source = "not measured" if entry is None else entry.source
        refused: dict[str, str] = {}
        for runner in self._order(args):
            reason = self._refusal(runner, args)
            if reason is None:
                return runner, source, refused
            refused[runner] = reason
        return None, source, refused

    def _order(self, args: tuple[Any, ...]) -> tuple[Runner | Name, ...]:
        if _pinned is not None and self._op == "attention":
            return (_pinned, *NAMES)
        row = dispatch.row_of(self._op, self._capability, args)
        return NAMES if row is None else (*row.order, *NAMES)

    def _refusal(self, runner: Runner | Name, args: tuple[Any, ...]) -> str | None:
        if runner == "cudnn" or runner == "flash":
            return handover.refusal(runner, *args[:4])
        return _refusal(runner, self._device)


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
