"""What PyTorch has no public name for, with what is done where a PyTorch lacks the private one."""

from __future__ import annotations

import functools
import importlib.abc
import pkgutil
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

Function = TypeVar("Function", bound=Callable[..., Any])

PRIVATE: list[str] = []
"""The names that this module takes, for the test that takes each of them away."""
_missing: set[str] = set()


def _find(name: str, otherwise: Any = None) -> Any:
    """What torch has under a private name; ``otherwise`` where it has none."""
    try:
        return pkgutil.resolve_name(f"torch.{name}")
    except (AttributeError, ImportError):
        _missing.add(name)
        return otherwise


def _private(name: str, otherwise: Any = None) -> Any:
    """:func:`_find`, while this is imported."""
    PRIVATE.append(name)
    return _find(name, otherwise)


def _no(tensor: Tensor) -> bool:
    return False


_register_node: Any = _private("utils._pytree.register_pytree_node")
_key_of: Any = _private("utils._pytree.GetAttrKey")
_collations: dict[Any, Any] = _private("utils.data._utils.collate.default_collate_fn_map", {})

is_wrapped: Callable[[Tensor], bool] = _private("_C._functorch.is_functorch_wrapped_tensor", _no)
"""Whether a transform of ``torch.func`` made it: it then has no memory of its own, and ends with the transform."""
_is_mapped: Callable[[Tensor], bool] = _private("_C._functorch.is_batchedtensor", _no)
_unwrapped: Callable[[Tensor], Tensor] | None = _private("_C._functorch.get_unwrapped")
unwrapped: Callable[[Any], Any] = _private("_functorch.utils.unwrap_dead_wrappers", lambda args: args)
"""The arguments without what transforms of ``torch.func`` that are over left around them."""
is_batched_gradient: Callable[[Tensor], bool] = _private("_C._functorch.is_legacy_batchedtensor", _no)
"""Whether it is several gradients in one, as ``is_grads_batched`` and ``vectorize=True`` give them to a backward."""

_fake_mode: Callable[..., Any] = _private("_guards.detect_fake_mode", lambda *_: None)
_without_modes: Callable[[], AbstractContextManager[Any]] = _private(
    "utils._python_dispatch._disable_current_modes", nullcontext
)
_lifted = torch.ops.aten.lift_fresh_copy.default

current_stream: Callable[[int], int] = _private(
    "_C._cuda_getCurrentRawStream", lambda device: torch.cuda.current_stream(device).cuda_stream
)
"""The raw stream that a CUDA device's kernels are launched on; the public name takes ten times as long."""

has_global_hook: Callable[[], bool] = _private("nn.modules.module._has_any_global_hook", lambda: True)
"""Whether hooks see the calls of all modules."""
function_modes: Callable[[], list[Any]] = _private("overrides._get_current_function_mode_stack", lambda: [None])
"""The modes of ``torch.overrides`` that are on; one that nobody knows where PyTorch does not tell."""

# What observes calls. Two of these names are variables of their modules, which are read at every call.
_first = len(PRIVATE)
_transforms: Callable[[], Any] = _private("_C._functorch.peek_interpreter_stack", lambda: None)
_levels: Callable[[], Any] = _private("_C._functorch.get_interpreter_stack", lambda: None)
_FORWARD = _private("_C._functorch.TransformType.Jvp")
_REVERSE = _private("_C._functorch.TransformType.Grad")
_forward_ad: Any = torch.autograd.forward_ad
_private("autograd.forward_ad._current_level")
_SEES_TRANSFORMS = _missing.isdisjoint(PRIVATE[_first:])
_dispatch_modes: Callable[[], int] = _private("_C._len_torch_dispatch_stack", int)
_function_modes: Callable[[], int] = _private("_C._len_torch_function_stack", int)
_tracing_state: Callable[[], Any] = _private("_C._get_tracing_state", lambda: None)
_profiler: Any = torch.autograd.profiler
_private("autograd.profiler._is_profiler_enabled")
_SEES_ALL = _missing.isdisjoint(PRIVATE[_first:])
_is_compiling = torch.compiler.is_compiling


def is_unobserved() -> bool:
    """Whether nothing stands between a call on plain tensors and its kernel: then the kernel is called directly.

    The dispatcher costs two microseconds, as much as a small kernel. It is needed by whatever looks at ops or changes
    what they mean: the compiler, modes (fake tensors, tracing, counters), vmap and other transforms, forward-mode
    differentiation, the profiler. Where a PyTorch does not tell of one of them, every call takes the dispatcher.
    """
    return _SEES_ALL and not (
        _is_compiling()
        or _dispatch_modes()
        or _function_modes()
        or _transforms() is not None
        or _forward_ad._current_level >= 0
        or _profiler._is_profiler_enabled
        or _tracing_state() is not None
    )


def quick_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """The ``apply`` of a Function without its look for transforms, which are known not to be there: three microseconds.

    Only where :func:`is_unobserved`.
    """
    apply: Callable[..., Any] = getattr(super(torch.autograd.Function, function), "apply", function.apply)
    return apply


def is_traced() -> bool:
    """Whether a mode is on that sees the operations on tensors, and may write them down."""
    return _dispatch_modes() > 0


def is_faking() -> bool:
    """Whether a mode is on in which tensors have no values, as exporters and shape inference enter it."""
    return _dispatch_modes() > 0 and _fake_mode() is not None


def is_fake(tensor: Tensor) -> bool:
    """Whether it is a tensor without values of such a mode."""
    return type(tensor).__name__ in ("FakeTensor", "FunctionalTensor") and _fake_mode([tensor]) is not None


def lifted(tensor: Tensor) -> Tensor:
    """A tensor of known values as the mode that is on would have made it, fake or traced; itself where none is on."""
    if torch.compiler.is_compiling() or not is_faking() or is_fake(tensor):
        return tensor
    return _lifted(tensor)


def has_values(tensor: Tensor) -> bool:
    """Whether the values can be looked at: not on the meta device, in fake tensors, and inside ``vmap``."""
    while is_wrapped(tensor):
        if _is_mapped(tensor) or _unwrapped is None:
            return False
        tensor = _unwrapped(tensor)
    return not (tensor.is_meta or is_fake(tensor))


def is_overridden(*args: Any) -> bool:
    """Whether an argument says itself what functions do with it, as the proxies of ``torch.fx`` and many subclasses of
    tensors do: then the function is handed to it.

    Modes do not count: they see the operations that a function is made of.
    """
    return has_torch_function_variadic(*args) and any(
        getattr(type(arg), "__torch_function__", _NOT_OVERRIDDEN) is not _NOT_OVERRIDDEN and type(arg) is not Tensor
        for arg in args
    )


def hand_over(function: Callable[..., Any], relevant: Sequence[Any], *args: Any, **options: Any) -> Any:
    """What ``function(*args, **options)`` is, by the word of those of the ``relevant`` arguments that have one."""
    return handle_torch_function(function, relevant, *args, **options)


_NOT_OVERRIDDEN = torch.nn.Parameter.__torch_function__


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor, whose module is not imported to find that out."""
    return hasattr(tensor, "device_mesh")


def beside(tensor: Tensor, other: Any) -> Tensor:
    """The tensor for an operation with ``other``: where that is a DTensor, as one that every process has whole."""
    if not is_distributed(other) or is_distributed(tensor):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = other.device_mesh
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def without_modes() -> AbstractContextManager[Any]:
    """Within it, tensors are real whatever mode is on."""
    # The modes' own modules take a second to import.
    return _without_modes() if _dispatch_modes() else nullcontext()


def on_cpu(function: Function) -> Function:
    """Lets a function that makes tensors of known values make real ones on the CPU.

    So it does under ``torch.device("meta")``, where models are built without memory, under any other default device,
    and in a mode of fake tensors.
    """

    @functools.wraps(function)
    def computed(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        with without_modes(), torch.device("cpu"):
            return function(*args, **kwargs)

    return computed  # type: ignore[return-value]


def compiled_as_constant(function: Function) -> Function:
    """Lets the compiler take what a function answers as it is.

    That is ``torch.compiler.assume_constant_result`` without the import of the compiler, which takes a second. A
    PyTorch that knows another mark looks into the function.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@compiled_as_constant
def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation is under way, as far as can be told."""
    return _SEES_TRANSFORMS and (_transforms() is not None or _forward_ad._current_level >= 0)


@compiled_as_constant
def is_forward_mode() -> bool:
    """Whether derivatives are being computed forwards: by ``torch.func.jvp`` or ``torch.autograd.forward_ad``.

    The compiler is told at the place that it looks at, where a guard at the beginning of a function would be wrong.
    """
    return _SEES_TRANSFORMS and _forward_ad._current_level >= 0


def is_differentiated_forward() -> bool:
    """:func:`is_forward_mode`, by a variable that the compiler guards."""
    level: int = getattr(_forward_ad, "_current_level", -1)
    return level >= 0


@compiled_as_constant
def transforms() -> tuple[int, int, int]:
    """How many transforms of ``torch.func`` are under way: in forward mode, in reverse mode, and others."""
    kinds = [level.key() for level in _levels() or ()]
    forward, reverse = kinds.count(_FORWARD), kinds.count(_REVERSE)
    return forward, reverse, len(kinds) - forward - reverse


def has_tangents(args: Sequence[Any]) -> bool:
    """Whether derivatives of an argument are computed forwards, as far as can be told.

    The rule of an op's ``jvp`` is given tensors without tangents while forward mode is on. Only the tangents of the
    innermost transform are seen, and not those of tensors that are mapped over.
    """
    if not is_forward_mode():
        return False
    levels = _levels()
    if levels and levels[-1].key() != _FORWARD:
        return True
    try:
        return any(_forward_ad.unpack_dual(arg).tangent is not None for arg in args if isinstance(arg, Tensor))
    except RuntimeError:
        return True


def register_node(cls: type, leaf: str, make: Callable[[Any], Any]) -> None:
    """Lets a class stand for the tensor that is its attribute ``leaf`` in arguments of torch.func and torch.export.

    ``make`` makes an object from what takes the tensor's place: another one, or a name, a specification, None.
    """
    if _register_node is not None and _key_of is not None:
        _register_node(
            cls,
            lambda value: ([getattr(value, leaf)], None),
            lambda leaves, context: make(*leaves),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
            flatten_with_keys_fn=lambda value: ([(_key_of(leaf), getattr(value, leaf))], None),
        )


def register_collation(cls: type, collate: Callable[..., Any]) -> None:
    """Lets ``torch.utils.data.default_collate`` make a batch of objects of a class."""
    _collations[cls] = collate


def own_kernel(name: str) -> Callable[..., Any] | None:
    """A kernel of PyTorch's own by the name that its operations call it by; None where there is none."""
    packet = getattr(torch.ops.aten, name, None)
    return None if packet is None else packet.default


def fresh_compiler_cache() -> AbstractContextManager[Any]:
    """Within it, nothing that was compiled before is found again. Imports the compiler."""
    # Its name before torch 2.9 and after.
    found = _find("_inductor.utils.fresh_cache") or _find("_inductor.utils.fresh_inductor_cache", nullcontext)
    cache: AbstractContextManager[Any] = found()
    return cache


def register_loading(names: Sequence[Any]) -> None:
    """Lets ``torch.load(weights_only=True)`` read what these classes and functions make of plain data."""
    torch.serialization.add_safe_globals(list(names))


class _Import(importlib.abc.MetaPathFinder):
    """Finds one module as the finders after it do, and calls a function once that has been imported.

    It stays where it is: a module that is looked for need not be imported then, and other threads may be going over
    the finders.
    """

    def __init__(self, name: str, function: Callable[[], None]):
        self.name, self._function = name, function
        self._is_called = False

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.name or self._is_called:
            return None
        finders = list(sys.meta_path)
        for finder in finders[finders.index(self) + 1 :] if self in finders else ():
            spec = finder.find_spec(name, path, target) if hasattr(finder, "find_spec") else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self.call)
                return spec
        return None

    def call(self) -> None:
        if not self._is_called:
            self._is_called = True
            self._function()


class _Loader(importlib.abc.Loader):
    """Loads a module as another loader does, which may be that of many modules, and then calls a function."""

    def __init__(self, loader: Any, function: Callable[[], None]):
        self._loader, self._function = loader, function

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self).get("_loader"), name)

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._function()


def when_imported(name: str, function: Callable[[], None]) -> None:
    """Calls a function once a module is there, now or when somebody imports it: who does not, does not wait for it."""
    if name in sys.modules:
        function()
    else:
        sys.meta_path.insert(0, _Import(name, function))
