"""Resampling with a filter: zeros inserted, padding or crops, a FIR filter, every n-th pixel kept, in one pass."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gencore._torch import hand_over, is_forward_mode, is_overridden, is_transformed
from gencore.arguments import as_int
from gencore.backends import choice
from gencore.backends.layout import suggested_format
from gencore.backends.reference import upfirdn2d as reference
from gencore.ops._checks import Contract, check_tensor
from gencore.ops._library import Layout, define, widened

# Pixels along an axis, padding included: what kernels count in 32 bits.
_MOST = 1 << 28
_AXES = ("height", "width")


def _fake(x: Tensor, filter: Tensor, up: Any, down: Any, start: Any, size: Sequence[int], *_: Any) -> Tensor:
    shape = (*x.shape[:2], *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=suggested_format(x))


def _definition(x: Tensor, filter: Tensor, *args: Any) -> Tensor:
    y: Tensor = reference.upfirdn2d(widened(x), filter, *args).to(x.dtype)
    return y.contiguous(memory_format=suggested_format(x))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, filter, ctx.up, ctx.down, ctx.start, size, ctx.flip_filter, ctx.gain = inputs
    ctx.settings = ctx.up, ctx.down, ctx.start, size, ctx.flip_filter, ctx.gain
    ctx.size = x.shape[2:]
    # The filter alone has a use for x.
    keeps_x = ctx.needs_input_grad[1] or is_transformed() or is_forward_mode()
    ctx.save_for_backward(filter, x if keeps_x else None)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    """That for x is this op with its factors exchanged, as a matrix is transposed."""
    filter, x = ctx.saved_tensors
    grad_x = grad_filter = None
    if ctx.needs_input_grad[0]:
        taps = (len(filter), filter.shape[-1])
        start = [n - 1 - before for n, before in zip(taps, ctx.start, strict=True)]
        grad_x = _upfirdn2d(grad_y, filter, ctx.down, ctx.up, start, list(ctx.size), not ctx.flip_filter, ctx.gain)
    if ctx.needs_input_grad[1]:
        grad_filter = reference.filter_gradient(
            widened(grad_y), widened(x), filter, ctx.up, ctx.down, ctx.start, ctx.flip_filter, ctx.gain
        )
    return grad_x, grad_filter, None, None, None, None, None, None


def _jvp(ctx: Any, d_x: Tensor | None, d_filter: Tensor | None, *_: Any) -> Tensor:
    filter, x = ctx.saved_tensors
    changes = []
    if d_x is not None:
        changes.append(_upfirdn2d(d_x, filter, *ctx.settings))
    if d_filter is not None and filter.dim() == 2:
        changes.append(_upfirdn2d(x, d_filter, *ctx.settings))
    elif d_filter is not None:
        outer = torch.outer(d_filter, filter)
        changes.append(_upfirdn2d(x, outer + outer.T, *ctx.settings))
    return changes[0] if len(changes) == 1 else changes[0] + changes[1]


_upfirdn2d = define(
    "upfirdn2d(Tensor x, Tensor filter, SymInt[] up, SymInt[] down, SymInt[] start, SymInt[] size, bool flip_filter, "
    "float gain) -> Tensor",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    jvp=_jvp,
    definition=_definition,
    layouts=lambda args: [Layout({"x": dim}, (dim,)) for dim in (0, 1)],
)


def upfirdn2d(
    x: Tensor,
    filter: Tensor,
    up: int | Sequence[int] = 1,
    down: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    *,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """Upsamples, filters and downsamples images, in one pass over memory.

    Behind every pixel come up - 1 zeros, in both dimensions; then zeros are put around the image, or, where the padding
    is negative, pixels are cropped; the result is convolved with the filter, where all of it fits in; every down-th
    pixel is kept and multiplied by the gain:

    y[n, c, i, j] = gain sum_k,l filter[K - 1 - k, L - 1 - l] padded[n, c, i down + k, j down + l]

    Args:
        x: (N, C, H, W), float32, bfloat16, float16 or float64.
        filter: (K, L), or (K,) for the separable filter that is its outer product with itself; float32 or of ``x``'s
            dtype. A separable filter costs 2 K instead of K K multiplications, as a (K,) one alone.
        up, down: an int of at least 1, or a pair (height, width).
        padding: zeros around the image, in pixels after upsampling, negative ones crop: an int for all four sides, a
            pair (height, width), or (top, bottom, left, right).
        flip_filter: whether it is a correlation with the filter, not a convolution, which turns it around.
        gain: a factor for the result, such as up * up, which keeps the brightness of an image when it is upsampled by a
            filter whose sum is 1.

    Returns:
        y: (N, C, (H up + padding - K) // down + 1, (W up + padding - L) // down + 1), with ``x``'s dtype and memory
        format (contiguous or channels_last). Sums are in float32, for float64 inputs in float64; y is rounded once.

    No product with an inserted zero is made, and nothing of the upsampled image's size is stored. The gradient for
    ``x`` is this op again, with ``up`` and ``down`` exchanged, so derivatives of any order and forward mode are kernels
    too. The gradient for a filter that learns is a sum by PyTorch's operations, which take the memory of the upsampled
    image. NaN and infinities propagate, those of the filter to unknown pixels.

    Deterministic: the same bits for any number of threads, any split of the batch, both memory formats and, but for
    float64, any backend; so is the filter's gradient for any number of threads.

    Raises:
        TypeError, ValueError: an argument is not as above; the message says which.

    >>> x, f = torch.ones(1, 1, 4, 4), torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    >>> upfirdn2d(x, f, up=2, padding=(2, 1, 2, 1), gain=4)[0, 0, 3, 3:5]
    tensor([1., 1.])

    Source: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN" (2020), appendix B; Zhang, "Making
    Convolutional Networks Shift-Invariant Again" (2019).
    """
    known = _CONTRACT.known(x, filter, flip_filter, gain, *_flat(up), *_flat(down), *_flat(padding))
    if known is None:
        if is_overridden(x, filter, gain):
            options = {"flip_filter": flip_filter, "gain": gain}
            return hand_over(upfirdn2d, (x, filter, gain), x, filter, up, down, padding, **options)
        settings = _check(x, filter, up, down, padding, flip_filter, gain)
        _CONTRACT.remember(settings, x, filter, flip_filter, gain, *_flat(up), *_flat(down), *_flat(padding))
        return _upfirdn2d(x, _wide(filter, x), *settings)
    settings, wants_gradient = known
    run = _upfirdn2d.with_gradient if wants_gradient else choice.kernel("upfirdn2d", x)
    return run(x, _wide(filter, x), *settings)


def upsample2d(
    x: Tensor, filter: Tensor, factor: int | Sequence[int] = 2, *, flip_filter: bool = False, gain: float = 1.0
) -> Tensor:
    """Upsamples images by ``factor``: :func:`upfirdn2d` to (N, C, H factor, W factor), centred.

    The brightness stays where the filter's sum is 1: the gain is multiplied by the factor of both dimensions.

    Args:
        x, filter, flip_filter, gain: as of :func:`upfirdn2d`.
        factor: an int of at least 1, or a pair (height, width).

    The middle of what a pixel becomes is that of the pixel, or, where the filter's taps and the factor are not both
    even or both odd, half a pixel behind it.

    >>> upsample2d(torch.ones(1, 3, 8, 8), torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8).shape
    torch.Size([1, 3, 16, 16])
    """
    if is_overridden(x, filter, gain):
        return hand_over(upsample2d, (x, filter, gain), x, filter, factor, flip_filter=flip_filter, gain=gain)
    rate = _pair("factor", factor)
    # Together taps - 1; the middle tap of an output's is the middle of the zeros that belong to a pixel.
    padding = [side for n, up in zip(_taps(filter), rate, strict=True) for side in ((n + up - 1) // 2, (n - up) // 2)]
    gain = _number("gain", gain) * rate[0] * rate[1]
    return upfirdn2d(x, filter, rate, 1, padding, flip_filter=flip_filter, gain=gain)


def downsample2d(
    x: Tensor, filter: Tensor, factor: int | Sequence[int] = 2, *, flip_filter: bool = False, gain: float = 1.0
) -> Tensor:
    """Downsamples images by ``factor``: :func:`upfirdn2d` to (N, C, H // factor, W // factor), centred.

    Args:
        x, filter, flip_filter, gain: as of :func:`upfirdn2d`.
        factor: an int of at least 1, or a pair (height, width).

    The middle of the pixels that a pixel is made of is that of the ``factor`` pixels that it takes the place of, or,
    where the filter's taps and the factor are not both even or both odd, half a pixel before it.

    >>> downsample2d(torch.ones(1, 3, 8, 8), torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8).shape
    torch.Size([1, 3, 4, 4])
    """
    if is_overridden(x, filter, gain):
        return hand_over(downsample2d, (x, filter, gain), x, filter, factor, flip_filter=flip_filter, gain=gain)
    rate = _pair("factor", factor)
    padding = [side for n, by in zip(_taps(filter), rate, strict=True) for side in ((n - by + 1) // 2, (n - by) // 2)]
    return upfirdn2d(x, filter, 1, rate, padding, flip_filter=flip_filter, gain=gain)


def filter2d(x: Tensor, filter: Tensor, *, flip_filter: bool = False, gain: float = 1.0) -> Tensor:
    """Filters images, whose size stays: :func:`upfirdn2d` with the padding for that, centred.

    Args:
        x, filter, flip_filter, gain: as of :func:`upfirdn2d`. An even number of taps moves the image by half a pixel.

    >>> filter2d(torch.ones(1, 3, 8, 8), torch.tensor([1.0, 2.0, 1.0]) / 4).shape
    torch.Size([1, 3, 8, 8])
    """
    if is_overridden(x, filter, gain):
        return hand_over(filter2d, (x, filter, gain), x, filter, flip_filter=flip_filter, gain=gain)
    padding = [side for n in _taps(filter) for side in (n // 2, (n - 1) // 2)]
    return upfirdn2d(x, filter, 1, 1, padding, flip_filter=flip_filter, gain=gain)


def _flat(value: Any) -> tuple[Any, ...]:
    """What the contract remembers of an int or a few: no two of them, one after another, are alike."""
    return (len(value), *value) if type(value) is tuple or type(value) is list else (-1, value)


def _wide(filter: Tensor, x: Tensor) -> Tensor:
    """The filter in the type of the sums."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return filter if filter.dtype == dtype else filter.to(dtype)


def _check(x: Any, filter: Any, up: Any, down: Any, padding: Any, flip_filter: Any, gain: Any) -> tuple[Any, ...]:
    """Looks at every argument; returns those of the op behind the tensors."""
    check_tensor("x", x)
    if x.dim() != 4:
        raise ValueError(f"x must have the shape (N, C, H, W), got {tuple(x.shape)}")
    taps = _taps(filter)
    check_tensor("filter", filter)
    if filter.dtype != x.dtype and filter.dtype != torch.float32:
        allowed = str(x.dtype) + ("" if x.dtype == torch.float32 else " or torch.float32")
        raise TypeError(f"filter must have the dtype {allowed} for such an x, got {filter.dtype}")
    if filter.device != x.device:
        raise ValueError(f"filter must be on the device of x, {x.device}, got {filter.device}")
    up, down, sides = _pair("up", up), _pair("down", down), _sides(padding)
    if not isinstance(flip_filter, bool):
        raise TypeError(f"flip_filter must be a bool, got {type(flip_filter).__name__}")
    size = []
    for axis, (name, n) in enumerate(zip(_AXES, x.shape[2:], strict=True)):
        if n == 0:
            raise ValueError(f"x must have a pixel at least, got {tuple(x.shape)}")
        before, behind = sides[2 * axis : 2 * axis + 2]
        padded = n * up[axis] + before + behind
        if padded < taps[axis]:
            raise ValueError(
                f"padding must leave the image as large as the filter at least: its {name} is {padded}, of {n} pixels "
                f"times {up[axis]} with {before} and {behind}, and the filter has {taps[axis]} taps"
            )
        if max(padded, abs(before), abs(behind), down[axis]) >= _MOST:
            raise ValueError(f"the {name} of the padded image must be below 2^28, got {padded}")
        size.append((padded - taps[axis]) // down[axis] + 1)
    return up, down, [sides[0], sides[2]], size, flip_filter, _number("gain", gain)


_CONTRACT = Contract()


def _taps(filter: Any) -> tuple[int, int]:
    if not isinstance(filter, Tensor):
        raise TypeError(f"filter must be a tensor, got {type(filter).__name__}")
    if filter.dim() not in (1, 2) or 0 in filter.shape:
        raise ValueError(f"filter must have the shape (K,) or (K, L), one tap at least, got {tuple(filter.shape)}")
    return filter.shape[0], filter.shape[-1]


def _ints(name: str, value: Any, what: str, lengths: Sequence[int]) -> list[int]:
    """``value``, an int or so many."""
    one = as_int(value)
    if one is not None:
        return [one]
    given = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else None
    numbers = [] if given is None else [as_int(number) for number in given]
    if given is None or any(number is None for number in numbers):
        held = type(value).__name__ if given is None else f"{value!r}"
        raise TypeError(f"{name} must be {what}, got {held}")
    if len(numbers) not in lengths:
        raise ValueError(f"{name} must be {what}, got {len(numbers)}")
    return numbers  # type: ignore[return-value]


def _pair(name: str, value: Any) -> list[int]:
    numbers = _ints(name, value, "an int or two, of height and width", (2,))
    if min(numbers) < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return [numbers[0], numbers[-1]]


def _sides(padding: Any) -> list[int]:
    """Those of top, bottom, left and right."""
    what = "an int, two of height and width, or four of top, bottom, left and right"
    numbers = _ints("padding", padding, what, (2, 4))
    return {1: numbers * 4, 2: [*numbers[:1] * 2, *numbers[1:] * 2], 4: numbers}[len(numbers)]


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return value if isinstance(value, torch.SymFloat) else float(value)  # type: ignore[return-value]
