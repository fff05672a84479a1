"""The contract that ops share: what is wrong with an argument is said before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from gencore._torch import (
    compiled_as_constant,
    is_batched_gradient,
    is_distributed,
    is_fake,
    is_faking,
    is_wrapped,
    lifted,
)
from gencore.backends import choice
from gencore.noise import MAX_ELEMENTS_PER_SAMPLE, Key
from gencore.ops._library import PLAIN_TYPES, is_unobserved

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_STRIDED = torch.strided
_NONE: Mapping[str, Tensor | None] = MappingProxyType({})


class Contract:
    """What an op asks of its arguments, and what calls that were found right before need not be asked again.

    ``check(*args)`` raises where an argument is wrong. What it answers depends on the forms of arguments alone: types,
    shapes, dtypes, layouts and devices of tensors, and other arguments themselves. Without a check, :meth:`remember` is
    told what was found right. A type stands for any value of it, where the check looks no further.
    """

    def __init__(self, check: Callable[..., Any] = lambda *args: None):
        self._check = check
        self._known: dict[tuple[Any, ...], Any] = {}

    def __call__(self, *args: Any) -> Any:
        """What the check answers, or raises."""
        return self.remember(self._check(*args), *args)

    def remember(self, answer: Any, *args: Any) -> Any:
        """The answer for arguments that were found right."""
        forms: list[Any] = []
        self.known(*args, unknown=forms)
        if forms and all(not isinstance(arg, Tensor) or _has_kernel(arg) for arg in args):
            if len(self._known) >= _MOST:
                del self._known[next(iter(self._known))]  # The oldest.
            self._known[forms[0]] = answer
        return answer

    def known(self, *args: Any, unknown: list[Any] | None = None) -> tuple[Any, bool] | None:
        """The answer, and whether a gradient is wanted, if the kernel can be called as it is: nearly always.

        That is: nothing observes the call, tensors are plain ones on the CPU or on one GPU, and arguments of such forms
        passed the check before; a microsecond or two tell. None for everything else, which is then looked at argument
        by argument, to be served or to be told what is wrong. ``unknown`` is given the form of such arguments.
        """
        if not is_unobserved():
            return None
        form: list[Any] = []
        requires_grad = False
        try:
            for arg in args:
                if arg is None:
                    form.append(None)
                elif (kind := type(arg)) is Tensor or kind is _Parameter:
                    # Views with a negative bit, and tensors without memory, which only the dispatcher knows to serve.
                    if arg.is_neg() or is_batched_gradient(arg) or is_wrapped(arg):
                        return None
                    form += (arg.dtype, arg.shape, arg.layout)
                    if not arg.is_cpu:
                        form.append(arg.device)
                    if arg.requires_grad:
                        requires_grad = True
                elif kind in _VALUES:
                    form += (kind, arg)
                else:
                    return None
        except RuntimeError:  # A nested tensor has no shape.
            return None
        answer = self._known.get(key := tuple(form), _UNKNOWN)
        if answer is _UNKNOWN:
            if unknown is not None:
                unknown.append(key)
            return None
        return answer, requires_grad and torch.is_grad_enabled()


_UNKNOWN = object()
# Forms that a contract remembers.
_MOST = 4096
_VALUES = frozenset((int, float, str, bool, type))
_Parameter = torch.nn.Parameter


def _has_kernel(tensor: Tensor) -> bool:
    return (tensor.is_cpu or tensor.is_cuda) and tensor.layout is torch.strided


def is_plain_key(key: Any) -> bool:
    """Whether it is a key, or none is given, and not what stands for one while something is traced."""
    return key is None or type(key) is Key


def known_key(key: Any, tensor: Tensor) -> Tensor | None:
    """The words of a key that serves a batch as it is, as nearly every one does; None for other keys."""
    if key is None:
        refuse_capture(tensor)
        return Key.from_generator().packed
    if type(key) is Key and (packed := key.packed).is_cpu and packed.dim() == 1:
        return packed
    return None


def check_floating(name: str, dtype: Any) -> None:
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} must be a torch.dtype, got {type(dtype).__name__}")
    if dtype not in FLOATING:
        names = ", ".join(str(d).removeprefix("torch.") for d in FLOATING)
        raise TypeError(f"{name} must be one of {names}, got {str(dtype).removeprefix('torch.')}")


def check_dense(name: str, tensor: Tensor) -> None:
    if tensor.is_nested or tensor.layout is not torch.strided:
        layout = "a nested tensor" if tensor.is_nested else f"one of layout {tensor.layout}"
        raise ValueError(f"{name} must be a dense (strided) tensor, got {layout}")


def check_tensor(name: str, tensor: Any) -> None:
    """``tensor`` must be a floating-point tensor with samples in its first dimension, on a device with kernels."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    check_dense(name, tensor)
    check_floating(f"dtype of {name}", tensor.dtype)
    if tensor.dim() == 0:
        raise ValueError(f"{name} must have at least one dimension, the samples; got a scalar")
    check_device(f"the device of {name}", tensor.device)


def check_device(name: str, device: torch.device) -> None:
    """A backend must serve ``device``; for the compiler's tensors, and others without data, none has to be here."""
    if device.type == "meta" or torch.compiler.is_compiling():
        return
    try:
        choice.choose(device)
    except choice.NoBackend as error:
        if is_faking():
            return
        error.args = (f"{name} must be one that a backend serves; {error}",)
        raise


_served: dict[torch.device, bool] = {}


@compiled_as_constant
def is_served(device: torch.device) -> bool:
    """Whether a backend has kernels for tensors on ``device``: without one, ops raise. It is found out once."""
    if device not in _served:
        _served[device] = any(choice.refusal(name, device) is None for name in choice.NAMES)
    return _served[device]


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast on such devices; None where it is not enabled, or unknown as on the meta device."""
    if device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def check_same(name: str, tensor: Any, other_name: str, other: Tensor) -> None:
    """``tensor`` must agree with ``other``, which was checked, in shape, dtype and device."""
    check_tensor(name, tensor)
    if tensor.shape != other.shape:
        raise ValueError(f"{name} must have the shape of {other_name}, {tuple(other.shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name}, {other.dtype}, got {tensor.dtype}")
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {tensor.device}")


def check_channel_values(name: str, value: Any, x: Tensor, shape: tuple[int, ...], letters: str) -> None:
    """Values of the channels of ``x``, which was checked: of that shape, of ``x``'s dtype or float32; or None."""
    if value is None:
        return
    if isinstance(value, Tensor) and not value.is_nested and value.shape != shape:
        raise ValueError(f"{name} must have the shape ({letters}) of x, {shape}, got {tuple(value.shape)}")
    check_tensor(name, value)
    if value.dtype != x.dtype and (value.dtype != torch.float32 or x.dtype == torch.float64):
        allowed = str(x.dtype) + ("" if x.dtype in (torch.float32, torch.float64) else " or torch.float32")
        raise TypeError(f"{name} must have the dtype {allowed} for such an x, got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {value.device}")


def resolve_key(key: Key | None, tensor: Tensor) -> Tensor:
    """The key's words for the samples of ``tensor``; without a key, one from torch's generator."""
    if key is None:
        if is_distributed(tensor):
            raise ValueError(
                "key must be given for a DTensor, got None: torch's generator may differ from process to process"
            )
        refuse_capture(tensor)
        return _for_capture(Key.from_generator().packed, tensor)
    if not isinstance(key, Key):
        raise TypeError(f"key must be a gencore.Key or None, got {type(key).__name__}; gencore.Key(seed) makes one")
    packed = lifted(key.packed)
    if packed.dim() == 2 and packed.shape[0] != tensor.shape[0]:
        raise ValueError(
            f"key must name {tensor.shape[0]} samples, one per row of the batch, but names {packed.shape[0]}"
        )
    device = tensor.device
    if not packed.is_cpu and packed.device != device:
        places = "on the CPU" if device.type == "cpu" else f"on the CPU or on {device}"
        raise ValueError(f"key must be {places}, got {packed.device}; key.to(device) moves it")
    return _for_capture(packed, tensor)


def rows_of(key: Tensor, samples: int) -> Tensor:
    """The words of a key with a row for each of so many samples; of several keys along the first dimensions."""
    rows = key.unsqueeze(-2).expand(*key.shape[:-1], samples, 3).clone()
    rows[..., 2] += torch.arange(samples, device=key.device)
    return rows


def refuse_capture(tensor: Tensor) -> None:
    """Without a key the noise comes from a generator on the CPU, which a captured graph would not draw from again."""
    if torch.compiler.is_compiling() or not tensor.is_cuda or not torch.cuda.is_initialized():
        return
    if torch.cuda.is_current_stream_capturing():
        raise ValueError(
            "key must be given where a CUDA graph is captured, got None: every replay would repeat one noise. Make a "
            "Key from a seed tensor on the device, inside the capture"
        )


def _for_capture(packed: Tensor, tensor: Tensor) -> Tensor:
    """The words, on a GPU if a compiled function is to read them there.

    The compiler may capture a graph of ops whose outputs are on a GPU though they read tensors on the CPU, and the
    values of these would be frozen in it. A copy to the GPU it leaves outside.
    """
    if torch.compiler.is_compiling() and tensor.is_cuda and packed.is_cpu:
        return packed.to(tensor.device)
    return packed


def check_elements_of(name: str, tensor: Tensor) -> None:
    """Each sample of ``tensor`` must have no more elements than there are noise values."""
    check_elements(name, math.prod(tensor.shape[1:]))


def check_out(
    out: Any,
    name: str,
    x: Tensor,
    others: Mapping[str, Tensor | None] = _NONE,
    *,
    own_name: str = "out",
    may_be_x: bool = True,
) -> None:
    """``out`` must be like ``x``, which is called ``name``: ``x`` itself, or apart from it and ``others`` in memory."""
    if not _is_like(out, x):
        check_same(own_name, out, name, x)
    tensors = {name: x, **others}
    with_grad, is_plain = torch.is_grad_enabled(), True
    for tensor in (out, *tensors.values()):
        if tensor is not None:
            if with_grad and tensor.requires_grad:
                raise ValueError(
                    f"{own_name} must be left out where a gradient is wanted: what it would need may be written over"
                )
            is_plain = is_plain and type(tensor) in PLAIN_TYPES
    if not is_plain or torch.compiler.is_compiling() or is_fake(out) or is_wrapped(out):  # It has no memory.
        return
    if not out.is_contiguous() and _may_overlap(out):
        raise ValueError(f"{own_name} must not have several elements in one place, as an expanded tensor has")
    if out.is_meta:  # It has no memory.
        return
    memory = out.untyped_storage().data_ptr()
    for other_name, tensor in tensors.items():
        if tensor is not None and tensor.untyped_storage().data_ptr() == memory and _share(out, tensor):
            if may_be_x and tensor is x and out.data_ptr() == x.data_ptr() and out.stride() == x.stride():
                continue
            itself = f"be {name} itself or " if may_be_x else ""
            raise ValueError(f"{own_name} must {itself}lie apart from {other_name} in memory; they may overlap")


def _is_like(a: Any, b: Tensor) -> bool:
    """Whether :func:`check_same` finds a plain tensor to be like ``b``, which was checked: a microsecond tells."""
    return (
        type(a) in PLAIN_TYPES
        and a.dtype is b.dtype
        and a.layout is _STRIDED
        and not a.is_nested
        and a.device == b.device
        and a.shape == b.shape
    )


def _may_overlap(tensor: Tensor) -> bool:
    """Whether a tensor may have several elements in one place. None has where the steps along each dimension go beyond
    all that those along shorter-stepped ones reach, as in any part or permutation of a dense tensor."""
    reach = 0
    for step, n in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if n > 1:
            if step <= reach:
                return tensor.numel() > 0
            reach += (n - 1) * step
    return False


def _share(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors may have elements in one place."""
    (a_first, a_end), (b_first, b_end) = _extent(a), _extent(b)
    return a_first < b_end and b_first < a_end


def _extent(tensor: Tensor) -> tuple[int, int]:
    first, size = tensor.data_ptr(), tensor.element_size()
    if tensor.numel() == 0:
        return first, first
    steps = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (steps + 1) * size


def check_elements(name: str, elements: int | torch.SymInt) -> None:
    if elements > MAX_ELEMENTS_PER_SAMPLE:
        raise ValueError(f"{name} must have at most 2^34 elements per sample, got {elements}")
