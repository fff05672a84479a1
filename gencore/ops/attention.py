"""Scaled dot-product attention as image models use it: any head size, and pixels in either memory format."""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gencore._torch import hand_over, is_overridden
from gencore.arguments import integer
from gencore.backends import choice
from gencore.noise import Key
from gencore.ops._attention import attend, attend_image, compute_image
from gencore.ops._checks import (
    FLOATING,
    Contract,
    autocast_dtype,
    check_elements,
    check_tensor,
    known_key,
    resolve_key,
)
from gencore.ops._general_attention import Settings, attend_generally, attend_unobserved

_STRIDED = torch.strided
_HALF = (torch.bfloat16, torch.float16)
# Tensors that need no view, and share no heads.
_EVERYDAY = Contract()
# All other calls whose tensors are not broadcast.
_GENERAL = Contract()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    key: Key | None = None,
) -> Tensor:
    """Attention: out_i = sum_j p_ij v_j, where p_i = softmax over j of (scale q_i . k_j), in each sample and head.

    Nothing of the size T x S is ever allocated: the softmax is taken over tiles of keys, and the gradient makes its
    probabilities again from the logarithm of each query's denominator, which is all that is kept besides the arguments
    and the result.

    Args:
        q: (B, heads, T, d), float32, bfloat16, float16 or float64; any head size d.
        k: (B, heads, S, d), of q's dtype: of T tokens for self-attention, of as many as there are for
            cross-attention. It may have fewer heads, a divisor of q's: then as many neighbouring heads of q share one.
        v: (B, heads, S, d_v), as k, with any head size d_v.
        mask: broadcasts to (B, heads, T, S). Boolean: True where query i sees key j. Or floating: it is added to
            the logits, where -2^26 and below hide a key as -inf does.
        causal: whether query i sees the keys j <= i alone.
        key_lengths: int64 (B,): sample b has the first key_lengths[b] keys alone; what follows them is never read.
            Lengths above S count as S.
        scale: by which dot products are multiplied; 1 / sqrt(d) if left out.
        dropout: the probability, 0 to 1, with which p_ij is dropped; the others are divided by 1 - dropout.
        key: what is dropped depends on; by default one drawn from torch's generator. p_ij of head h is dropped where
            :func:`uniform` of that key and of the shape (B, heads, T, S) is below ``dropout``. Not used without
            dropout.

        A query sees a key if all of mask, causal and key_lengths let it. One that sees none gets 0, and no gradient.

        Three dimensions, (B, T, d), are one head. Otherwise a dimension that a tensor lacks in front, or that is 1,
        broadcasts as in PyTorch.

        On the CPU any strides are read as they are; on GPUs those with channels or tokens side by side, such as views
        of a projection (B, T, 3 heads d) or of an image (B, 3 heads d, H, W), and others through a copy. A mask is read
        as it lies: nothing is repeated in memory for it, nor for heads that share keys.

    Under autocast, q, k and v of float32 and of the half types go through its dtype, as in PyTorch.

    Returns:
        (B, heads, T, d_v), of q's dtype, dense, its dimensions in memory in the order of q's. 0 without keys (S = 0).

    Dot products, maximum, exponentials and sums are in float32, in float64 for float64. On GPUs the probabilities of
    half types are rounded to the type before they weigh v. So they are in the forward pass in bfloat16 on processors
    with its dot product, which takes subnormal numbers for 0; elsewhere on CPUs everything is in float32. NaN and
    infinities propagate as in PyTorch: those of a key that a query does not see may reach it, as 0 times NaN is NaN,
    but not those beyond ``key_lengths``.

    The gradient is made for ``q``, ``k``, ``v`` and an additive ``mask``; it may be differentiated again, and forward
    mode works. On the CPU the second derivative and that in forward mode have kernels of their own, which allocate
    nothing of the size T x S either; so has Triton, but for calls with a mask, causal, key_lengths, dropout, shared
    heads or d_v other than d. Else, and beyond the second, PyTorch's operations compute them. The gradient of ``mask``
    has kernels on the CPU and in Triton; its own derivatives, and forward mode along it, are PyTorch's operations.

    Deterministic: the same bits for any split of the batch, and no atomics; on the CPU also for any number of threads,
    any split of the queries and any SIMD level, but for bfloat16 where there is its dot product ("avx512_bf16").
    Devices differ by rounding; what is dropped is the same on each. On GPUs a table by type, head size and tokens
    chooses between the kernels of CUDA and of Triton, and PyTorch's own for the forward pass;
    :func:`gencore.explain` says who runs a call, and :func:`gencore.backend` names one.

    Raises:
        TypeError, ValueError: an argument is not as above; the message says which.

    >>> q, k, v = torch.randn(3, 2, 4, 100, 40).unbind(0)
    >>> want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    >>> torch.allclose(attention(q, k, v, causal=True), want, atol=1e-5)
    True

    Source: Vaswani et al., "Attention Is All You Need" (2017), equation 1 and section 3.2.3; Ainslie et al., "GQA"
    (2023), for shared heads; in tiles: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), and
    Dao, "FlashAttention-2" (2023), algorithms 1 and 2.
    """
    one_head = False
    known = _EVERYDAY.known(q, k, v, scale)
    if known is not None and torch.is_autocast_enabled(q.device.type):
        known = None
    has_options = mask is not None or key_lengths is not None or causal is not False or type(dropout) is not float
    if known is not None and not (has_options or dropout):
        if known[1]:
            return attend.with_gradient(q, k, v, known[0])[0]
        return choice.kernel("attention", q)(q, k, v, known[0], None, False)[0]
    given = q, k, v, mask, key_lengths, scale, causal, dropout
    general = _GENERAL.known(*given)
    if general is not None and not torch.is_autocast_enabled(q.device.type):
        form, wants_gradient = general
        words = known_key(key, q) if form.dropout > 0 else None
        if words is not None or form.dropout == 0:
            return form(q, k, v, mask, key_lengths, words, wants_gradient)
    if is_overridden(q, k, v, mask, key_lengths, key):
        options = {"mask": mask, "causal": causal, "key_lengths": key_lengths, "scale": scale, "dropout": dropout}
        return hand_over(attention, (q, k, v, mask, key_lengths, key), q, k, v, **options, key=key)
    if known is None:
        q, k, v = (_autocast(tensor) for tensor in (q, k, v))
        q, k, v, one_head = _heads(q, k, v)
    settings = Settings(
        *_check_hiding(mask, key_lengths, q, k, one_head),
        None,
        _checked_scale(scale, q.shape[3]),
        _check_flag("causal", causal),
        _checked_dropout(dropout),
    )
    if settings.dropout > 0:
        check_elements("the probabilities (heads, T, S)", q.shape[1] * q.shape[2] * k.shape[2])
        settings = settings._replace(key=resolve_key(key, q))
    is_everyday = q.shape[1] == k.shape[1] and k.shape == v.shape
    if known is None and is_everyday:
        _EVERYDAY.remember(settings.scale, q, k, v, scale)
    if is_everyday and settings[:3] == (None, None, None) and not settings.causal:
        out = attend(q, k, v, settings.scale)[0]
    else:
        if general is None and all(_is_view(x, y, one_head) for x, y in zip((q, k, v), given[:3], strict=True)):
            shape = None if settings.mask is None else tuple(settings.mask.shape)
            _GENERAL.remember(_Form(one_head, shape, *settings[3:]), *given)
        out = attend_generally(q, k, v, settings, mask)
    return out.squeeze(1) if one_head else out


def _is_view(x: Tensor, given: Tensor, one_head: bool) -> bool:
    """Whether a tensor with heads is a given one, or that with one head, and not broadcast."""
    if one_head:
        return x.dtype == given.dtype and x.shape == (given.shape[0], 1, *given.shape[1:])
    return x.dtype == given.dtype and x.shape == given.shape


class _Form(NamedTuple):
    """What is known of calls that :data:`_GENERAL` has found right."""

    one_head: bool
    shape_of_mask: tuple[int, ...] | None
    scale: float
    causal: bool
    dropout: float

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        key_lengths: Tensor | None,
        words: Tensor | None,
        wants_gradient: bool,
    ) -> Tensor:
        if self.one_head:
            q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
        if mask is not None and self.shape_of_mask is not None and mask.shape != self.shape_of_mask:
            mask = mask.view(self.shape_of_mask)
        settings = Settings(mask, key_lengths, words, self.scale, self.causal, self.dropout)
        out = attend_unobserved(q, k, v, settings, wants_gradient)
        return out.squeeze(1) if self.one_head else out


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
    known = _OF_IMAGES.known(qkv, num_heads, scale)
    if known is not None and not torch.is_autocast_enabled(qkv.device.type):
        (num_heads, factor), wants_gradient = known
        if wants_gradient:
            return attend_image.with_gradient(qkv, num_heads, factor)[0]
        return compute_image(qkv, num_heads, factor, with_lse=False)[0]
    if is_overridden(qkv):
        return hand_over(spatial_attention, (qkv,), qkv, num_heads, scale=scale)
    qkv = _autocast(qkv)
    return attend_image(qkv, *_OF_IMAGES(qkv, num_heads, scale))[0]


def _check_image(qkv: Any, num_heads: Any, scale: Any) -> tuple[int, float]:
    """Looks at every argument; returns the heads as an int, and the scale."""
    check_tensor("qkv", qkv)
    if qkv.dim() < 2:
        raise ValueError(f"qkv must have at least two dimensions, samples and channels, got {qkv.dim()}")
    num_heads = integer("num_heads", num_heads, least=1)
    if qkv.shape[1] < 1 or qkv.shape[1] % (3 * num_heads) != 0:
        raise ValueError(
            f"qkv must have 3 x num_heads x d channels, a multiple of {3 * num_heads} and at least as many, "
            f"got {qkv.shape[1]}"
        )
    return num_heads, _checked_scale(scale, qkv.shape[1] // (3 * num_heads))


_OF_IMAGES = Contract(_check_image)


def _autocast(tensor: Any) -> Any:
    """The tensor as autocast, where it is enabled, would have PyTorch's attention take it."""
    if isinstance(tensor, Tensor) and tensor.dtype in (torch.float32, *_HALF):
        dtype = autocast_dtype(tensor.device)
        return tensor if dtype is None else tensor.to(dtype)
    return tensor


def _heads(q: Any, k: Any, v: Any) -> tuple[Tensor, Tensor, Tensor, bool]:
    """The three, which are looked at, as (B, heads, tokens, channels), and whether they came without heads.

    Views, whose first dimensions are broadcast, but that k and v may have fewer heads than q.
    """
    tensors = {"q": q, "k": k, "v": v}
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
        if tensor.dim() not in (3, 4):
            raise ValueError(
                f"{name} must have the dimensions (B, heads, tokens, d), or (B, tokens, d), got {tensor.dim()} of them"
            )
        if tensor.shape[-1] < 1:
            raise ValueError(f"{name} must have at least one channel in a head, got the shape {tuple(tensor.shape)}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {tensor.device}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k must have the head size of q, {q.shape[-1]}, got {k.shape[-1]}")
    if k.shape[-2] != v.shape[-2]:
        raise ValueError(f"v must have as many tokens as k, {k.shape[-2]}, got {v.shape[-2]}")
    one_head = q.dim() == k.dim() == v.dim() == 3
    if not q.dim() == k.dim() == v.dim() == 4:
        q, k, v = (x if x.dim() == 4 else x.unsqueeze(1 if one_head else 0) for x in (q, k, v))
    if q.shape[:2] == k.shape[:2] == v.shape[:2]:
        return q, k, v, one_head
    batch = _broadcast("the batch", (q.shape[0], k.shape[0], v.shape[0]))
    shared = _broadcast("the heads of k and v", (k.shape[1], v.shape[1]))
    heads = shared if q.shape[1] == 1 else q.shape[1]
    if heads != shared and (heads == 0 or shared == 0 or heads % shared):
        raise ValueError(f"k must have as many heads as q, {heads}, or a divisor of them, got {shared}")
    q, k, v = (
        x.expand(batch, count, *x.shape[2:]) if x.shape[:2] != (batch, count) else x
        for x, count in ((q, heads), (k, shared), (v, shared))
    )
    return q, k, v, one_head


def _broadcast(what: str, sizes: tuple[int, ...]) -> int:
    """What the sizes of a dimension, those of q, k and v or of the last two, are broadcast to."""
    size = next((size for size in sizes if size != 1), 1)
    if any(other not in (1, size) for other in sizes):
        names = ("q", "k", "v")[-len(sizes) :]
        got = ", ".join(f"{other} of {name}" for other, name in zip(sizes, names, strict=True))
        raise ValueError(f"{what} must have one size, or 1 where it is to be broadcast, got {got}")
    return size


def _check_hiding(
    mask: Any, key_lengths: Any, q: Tensor, k: Tensor, one_head: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The mask with four dimensions, and the lengths."""
    shape = (*q.shape[:3], k.shape[2])
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a tensor or None, got {type(mask).__name__}")
        if mask.is_nested or mask.layout is not _STRIDED:
            raise ValueError("mask must be a dense (strided) tensor")
        if mask.dtype is not torch.bool and mask.dtype not in FLOATING:
            raise TypeError(f"mask must be of torch.bool or a floating dtype, got {mask.dtype}")
        if mask.device != q.device:
            raise ValueError(f"mask must be on the device of q, {q.device}, got {mask.device}")
        wanted = shape[:1] + shape[2:] if one_head else shape
        if mask.dim() > len(wanted) or any(
            size not in (1, other) for size, other in zip(mask.shape[::-1], wanted[::-1], strict=False)
        ):
            raise ValueError(f"mask must broadcast to {tuple(wanted)}, got the shape {tuple(mask.shape)}")
        mask = mask.view((1,) * (len(wanted) - mask.dim()) + tuple(mask.shape)) if mask.dim() < len(wanted) else mask
        mask = mask.unsqueeze(1) if one_head else mask
    if key_lengths is not None:
        if not isinstance(key_lengths, Tensor):
            raise TypeError(f"key_lengths must be an int64 tensor or None, got {type(key_lengths).__name__}")
        if key_lengths.dtype != torch.int64:
            raise TypeError(f"key_lengths must be of torch.int64, got {key_lengths.dtype}")
        if key_lengths.shape != shape[:1]:
            raise ValueError(f"key_lengths must have the shape ({shape[0]},), got {tuple(key_lengths.shape)}")
        if key_lengths.device != q.device:
            raise ValueError(f"key_lengths must be on the device of q, {q.device}, got {key_lengths.device}")
    return mask, key_lengths


def _check_flag(name: str, flag: Any) -> bool:
    if not isinstance(flag, bool):
        raise TypeError(f"{name} must be True or False, got {type(flag).__name__}")
    return flag


def _checked_dropout(dropout: Any) -> float:
    if isinstance(dropout, bool) or not isinstance(dropout, numbers.Real):
        raise TypeError(f"dropout must be a number, got {type(dropout).__name__}")
    probability = float(dropout)
    if not 0 <= probability <= 1:
        raise ValueError(f"dropout must be from 0 to 1, got {dropout}")
    return probability


def _checked_scale(scale: Any, size: int) -> float:
    if scale is None:
        return 1 / math.sqrt(size)
    if isinstance(scale, bool) or not isinstance(scale, (numbers.Real, torch.SymFloat)):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    if not isinstance(scale, torch.SymFloat) and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    return scale if isinstance(scale, torch.SymFloat) else float(scale)  # type: ignore[return-value]
