"""Scaled dot-product attention as image models use it: any head size, and pixels in either memory format."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from gencore._torch import hand_over, is_overridden
from gencore.arguments import integer
from gencore.backends import choice
from gencore.ops._attention import attend, attend_image, compute_image
from gencore.ops._checks import FLOATING, autocast_dtype, check_tensor
from gencore.ops._library import PLAIN_TYPES, is_unobserved

_STRIDED = torch.strided
_HALF = (torch.bfloat16, torch.float16)


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """Attention: out_i = sum_j p_ij v_j, where p_i = softmax over j of (scale q_i . k_j), in each sample and head.

    Nothing of the size T x S is ever allocated: the softmax is taken over tiles of keys, and the gradient makes its
    probabilities again from the logarithm of each query's denominator, which is all that is kept besides the arguments
    and the result.

    Args:
        q: (B, heads, T, d), float32, bfloat16, float16 or float64; any head size d.
        k, v: (B, heads, S, d), of q's dtype: of T tokens for self-attention, of as many as there are for
            cross-attention.
        scale: by which dot products are multiplied; 1 / sqrt(d) if left out.

        On the CPU any strides are read as they are; on GPUs those with channels or tokens side by side, such as views
        of a projection (B, T, 3 heads d) or of an image (B, 3 heads d, H, W), and others through a copy.

    Under autocast, arguments of float32 and of the half types go through its dtype, as in PyTorch.

    Returns:
        (B, heads, T, d), of q's dtype, dense, its dimensions in memory in the order of q's. 0 without keys (S = 0).

    Dot products, maximum, exponentials and sums are in float32, in float64 for float64. On GPUs the probabilities of
    half types are rounded to the type before they weigh v. So they are in the forward pass in bfloat16 on processors
    with its dot product, which takes subnormal numbers for 0; elsewhere on CPUs everything is in float32. NaN and
    infinities propagate as in PyTorch.

    The gradient is made for ``q``, ``k`` and ``v``; it may be differentiated again, and forward mode works. On the CPU
    the second derivative and that in forward mode have kernels of their own, which allocate nothing of the size T x S
    either; on GPUs, and beyond the second, PyTorch's operations compute them.

    Deterministic: the same bits for any split of the batch, and no atomics; on the CPU also for any number of threads,
    any split of the queries and any SIMD level, but for bfloat16 where there is its dot product ("avx512_bf16").
    Devices differ by rounding. On GPUs a table by type, head size and tokens chooses between the kernels of CUDA and of
    Triton, and PyTorch's own for the forward pass; :func:`gencore.explain` says who runs a call, and
    :func:`gencore.backend` names one.

    Raises:
        TypeError, ValueError: an argument is not as above; the message says which.

    >>> q, k, v = torch.randn(3, 2, 4, 100, 40).unbind(0)
    >>> want = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    >>> torch.allclose(attention(q, k, v), want, atol=1e-5)
    True

    Source: Vaswani et al., "Attention Is All You Need" (2017), equation 1; in tiles: Milakov and Gimelshein, "Online
    normalizer calculation for softmax" (2018), and Dao, "FlashAttention-2" (2023), algorithms 1 and 2.
    """
    tensors = (q, k, v)
    wants_gradient = _wants_gradient_if_everyday(q, k, v, scale)
    if wants_gradient is None:
        if is_overridden(*tensors):
            return hand_over(attention, tensors, *tensors, scale=scale)
        tensors = tuple(_autocast(tensor) for tensor in tensors)
        scale = _check(*tensors, scale)
    elif scale is None:
        scale = 1 / math.sqrt(q.shape[3])
    if wants_gradient is False:
        return choice.kernel("attention", q)(*tensors, scale, None, False)[0]
    if wants_gradient:
        return attend.with_gradient(*tensors, scale)[0]
    return attend(*tensors, scale)[0]


def spatial_attention(qkv: Tensor, num_heads: int, *, scale: float | None = None) -> Tensor:
    """Self-attention among the pixels of each sample, with q, k and v as a convolution leaves them: :func:`attention`.

    Args:
        qkv: (N, 3 C, H, W), or with any spatial dimensions; contiguous or channels_last. Its channels are the C of q,
            then those of k and of v, each head after head.
        num_heads: a divisor of C; a head has d = C / num_heads channels.
        scale: by which dot products are multiplied; 1 / sqrt(d) if left out.

    Returns:
        (N, C, H, W), of qkv's dtype and memory format. Nothing is permuted on the way, in either format.

    Dtypes, accuracy, gradient, determinism, autocast: as :func:`attention`. Other strides than those of the two formats
    go through a copy.

    Raises:
        TypeError, ValueError: an argument is not as above; the message says which.

    >>> qkv = torch.randn(2, 3 * 64, 8, 8)
    >>> q, k, v = qkv.view(2, 3, 4, 16, 64).transpose(-1, -2).unbind(1)
    >>> want = attention(q, k, v).transpose(-1, -2).reshape(2, 64, 8, 8)
    >>> torch.equal(spatial_attention(qkv, 4), want)
    True

    Source: Ho et al., "Denoising Diffusion Probabilistic Models" (2020), appendix B; Wang et al., "Non-local Neural
    Networks" (2018), figure 2.
    """
    if (
        is_unobserved()
        and type(qkv) in PLAIN_TYPES
        and qkv.dtype in FLOATING
        and qkv.layout is _STRIDED
        and (qkv.is_cpu or qkv.is_cuda)
        and not qkv.is_neg()
        and not qkv.is_nested
        and type(num_heads) is int
        and num_heads >= 1
        and qkv.dim() >= 2
        and qkv.shape[1] >= 3 * num_heads
        and qkv.shape[1] % (3 * num_heads) == 0
        and (scale is None or (type(scale) is float and math.isfinite(scale)))
        and not torch.is_autocast_enabled(qkv.device.type)
    ):
        if scale is None:
            scale = 1 / math.sqrt(qkv.shape[1] // (3 * num_heads))
        if qkv.requires_grad and torch.is_grad_enabled():
            return attend_image.with_gradient(qkv, num_heads, scale)[0]
        return compute_image(qkv, num_heads, scale, with_lse=False)[0]
    if is_overridden(qkv):
        return hand_over(spatial_attention, (qkv,), qkv, num_heads, scale=scale)
    qkv = _autocast(qkv)
    check_tensor("qkv", qkv)
    if qkv.dim() < 2:
        raise ValueError(f"qkv must have at least two dimensions, samples and channels, got {qkv.dim()}")
    num_heads = integer("num_heads", num_heads, least=1)
    if qkv.shape[1] < 1 or qkv.shape[1] % (3 * num_heads) != 0:
        raise ValueError(
            f"qkv must have 3 x num_heads x d channels, a multiple of {3 * num_heads} and at least as many, "
            f"got {qkv.shape[1]}"
        )
    return attend_image(qkv, num_heads, _checked_scale(scale, qkv.shape[1] // (3 * num_heads)))[0]


def _wants_gradient_if_everyday(q: Any, k: Any, v: Any, scale: Any) -> bool | None:
    """Whether a gradient is wanted, if the kernel can be called as it is; a microsecond tells. Else None.

    It can if nothing observes the call and the arguments are right, and plain tensors on the CPU or on one GPU. What is
    not so is then looked at argument by argument, to be served or to be told what is wrong.
    """
    if not (
        is_unobserved()
        and type(q) in PLAIN_TYPES
        and type(k) in PLAIN_TYPES
        and type(v) in PLAIN_TYPES
        and (dtype := q.dtype) in FLOATING
        and k.dtype is v.dtype is dtype
        and q.layout is k.layout is v.layout is _STRIDED
        and ((q.is_cpu and k.is_cpu and v.is_cpu) or (q.is_cuda and q.device == k.device == v.device))
        and not (q.is_neg() or k.is_neg() or v.is_neg())
        and (scale is None or (type(scale) is float and math.isfinite(scale)))
        and not torch.is_autocast_enabled(q.device.type)
    ):
        return None
    try:
        shape, other = q.shape, k.shape
        if not (len(shape) == len(other) == 4 and other == v.shape and shape[3] == other[3] >= 1):
            return None
        if shape[:2] != other[:2]:
            return None
    except RuntimeError:  # A nested tensor has no shape.
        return None
    return (q.requires_grad or k.requires_grad or v.requires_grad) and torch.is_grad_enabled()


def _autocast(tensor: Any) -> Any:
    """The tensor as autocast, where it is enabled, would have PyTorch's attention take it."""
    if isinstance(tensor, Tensor) and tensor.dtype in (torch.float32, *_HALF):
        dtype = autocast_dtype(tensor.device)
        return tensor if dtype is None else tensor.to(dtype)
    return tensor


def _check(q: Any, k: Any, v: Any, scale: Any) -> float:
    """Looks at every argument; returns the scale."""
    check_tensor("q", q)
    if q.dim() != 4:
        raise ValueError(f"q must have the four dimensions (B, heads, tokens, d), got {q.dim()}")
    if q.shape[3] < 1:
        raise ValueError(f"q must have at least one channel in a head, got the shape {tuple(q.shape)}")
    for name, tensor in (("k", k), ("v", v)):
        check_tensor(name, tensor)
        if tensor.dim() != 4 or tensor.shape[:2] != q.shape[:2] or tensor.shape[3] != q.shape[3]:
            batch, heads, _, size = q.shape
            raise ValueError(
                f"{name} must have the shape ({batch}, {heads}, tokens, {size}), that of q but for the tokens, "
                f"got {tuple(tensor.shape)}"
            )
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {tensor.device}")
    if k.shape[2] != v.shape[2]:
        raise ValueError(f"v must have as many tokens as k, {k.shape[2]}, got {v.shape[2]}")
    return _checked_scale(scale, q.shape[3])


def _checked_scale(scale: Any, size: int) -> float:
    if scale is None:
        return 1 / math.sqrt(size)
    if isinstance(scale, bool) or not isinstance(scale, (numbers.Real, torch.SymFloat)):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    if not isinstance(scale, torch.SymFloat) and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    return scale if isinstance(scale, torch.SymFloat) else float(scale)  # type: ignore[return-value]
