"""What PyTorch has no public name for, with what is done where a PyTorch lacks the private one."""

from __future__ import annotations

import functools
import importlib.abc
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

try:
    from torch.utils import _pytree as pytree
except ImportError:
    pytree = None  # type: ignore[assignment]
try:
    from torch.utils.data._utils.collate import default_collate_fn_map as _collations
except ImportError:
    _collations = {}

Function = TypeVar("Function", bound=Callable[..., Any])


def _no(tensor: Tensor) -> bool:
    return False


_functorch = getattr(torch._C, "_functorch", None)
is_wrapped: Callable[[Tensor], bool] = getattr(_functorch, "is_functorch_wrapped_tensor", _no)
"""Whether a transform of ``torch.func`` made it: it then has no memory of its own, and ends with the transform."""
_is_mapped: Callable[[Tensor], bool] = getattr(_functorch, "is_batchedtensor", _no)
_unwrapped: Callable[[Tensor], Tensor] | None = getattr(_functorch, "get_unwrapped", None)
is_batched_gradient: Callable[[Tensor], bool] = getattr(_functorch, "is_legacy_batchedtensor", _no)
"""Whether it is several gradients in one, as ``is_grads_batched`` and ``vectorize=True`` give them to a backward."""

_dispatch_modes: Callable[[], int]
_fake_mode: Callable[..., Any]
_without_modes: Callable[[], AbstractContextManager[Any]]
try:
    from torch._guards import detect_fake_mode as _fake_mode
    from torch.utils._python_dispatch import _disable_current_modes as _without_modes

    _dispatch_modes = torch._C._len_torch_dispatch_stack
except (AttributeError, ImportError):
    _dispatch_modes, _fake_mode, _without_modes = int, lambda *_: None, nullcontext


_lifted = torch.ops.aten.lift_fresh_copy.default


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


def register_node(cls: type, leaf: str, make: Callable[[Any], Any]) -> None:
    """Lets a class stand for the tensor that is its attribute ``leaf`` in arguments of torch.func and torch.export.

    ``make`` makes an object from what takes the tensor's place: another one, or a name, a specification, None.
    """
    if pytree is not None:
        pytree.register_pytree_node(
            cls,
            lambda value: ([getattr(value, leaf)], None),
            lambda leaves, context: make(*leaves),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
            flatten_with_keys_fn=lambda value: ([(pytree.GetAttrKey(leaf), getattr(value, leaf))], None),
        )


def register_collation(cls: type, collate: Callable[..., Any]) -> None:
    """Lets ``torch.utils.data.default_collate`` make a batch of objects of a class."""
    _collations[cls] = collate


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
