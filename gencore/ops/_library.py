"""How an op enters PyTorch's dispatcher, written once.

Every op is a ``torch.library`` op with a schema, a fake and the CPU kernel. An op that has a gradient has a second
overload, ``autograd``: the Python autograd layer costs several microseconds even when no gradient is wanted, so public
functions call it only when an input needs one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("gencore", "DEF")

_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transforms = torch._C._functorch.peek_interpreter_stack


def is_unobserved() -> bool:
    """Whether nothing stands between a call on plain CPU tensors and its kernel: then the kernel is called directly.

    The dispatcher costs two microseconds, as much as a small kernel. It is needed by whatever looks at ops or changes
    what they mean: the compiler, modes (fake tensors, tracing, counters), vmap and other transforms, the profiler.
    """
    return not (
        torch.compiler.is_compiling()
        or _dispatch_modes()
        or _function_modes()
        or _transforms() is not None
        or torch.autograd.profiler._is_profiler_enabled
        or torch._C._get_tracing_state() is not None
    )


def define(
    signature: str,
    *,
    fake: Callable[..., Any],
    cpu: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> tuple[Any, Any]:
    """Registers an op; returns its plain overload and the one with a gradient (the same one if it has none).

    Args:
        signature: the schema, such as ``"normal_(Tensor(a!) out, Tensor key) -> ()"``.
        fake: gives outputs of the right shapes, dtypes and strides for inputs without data.
        cpu: the kernel for CPU tensors.
        setup_context, backward: the autograd formula, as :func:`torch.library.register_autograd` takes it.
    """
    name, arguments = signature.split("(", 1)
    overloads = ("",) if backward is None else ("", ".autograd")
    for overload in overloads:
        # Kernels take any strides, but the fake derives the output's from the input's, so they must be the same ones.
        _library.define(f"{name}{overload}({arguments}", tags=(torch.Tag.needs_exact_strides,))
        _library.impl(f"{name}{overload}", cpu, "CPU")
        torch.library.register_fake(f"gencore::{name}{overload}", fake, lib=_library)
    op = getattr(torch.ops.gencore, name)
    if backward is None:
        return op.default, op.default
    torch.library.register_autograd(f"gencore::{name}.autograd", backward, setup_context=setup_context, lib=_library)
    return op.default, op.autograd


def refuse_second_derivative(ctx: Any, *grads: Any) -> Any:
    """The ``backward`` of an op that is itself a gradient."""
    raise RuntimeError(
        "gencore ops have a first derivative only: their noise is made again for the gradient, and there is no "
        "gradient of that. Compute this gradient without create_graph=True, or in plain PyTorch from ops.normal"
    )
