"""Definition of :func:`gencore.ops.attention` and :func:`gencore.ops.spatial_attention`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Options(NamedTuple):
    """Who sees whom, and what is dropped.

    ``mask`` broadcasts to (B, heads, T, S): boolean, True where a query sees a key, or added to the logits.
    ``key_lengths`` (B,): a sample has so many keys. ``causal``: query t sees the keys up to t. ``kept`` (B, heads, T,
    S) multiplies the probabilities: 0 or 1 / (1 - dropout).
    """

    mask: Tensor | None = None
    key_lengths: Tensor | None = None
    causal: bool = False
    kept: Tensor | None = None

    @property
    def hides(self) -> bool:
        """Whether there may be queries that see no key."""
        return self.mask is not None or self.key_lengths is not None or self.causal


PLAIN = Options()
# What is added to a logit hides a key, as minus infinity does, from here down: of such a logit float32 keeps no digit.
_LEAST_BIAS = -(2.0**26)


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, options: Options = PLAIN
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v, and the logarithm of the softmax's denominator."""
    k, v = (_for_queries(x, q, options) for x in (k, v))
    p, lse = _probabilities(q, k, scale, options)
    return _weights(p, options) @ v, lse


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    scale: float,
    options: Options = PLAIN,
) -> tuple[Tensor, Tensor]:
    """The derivative of both results along dq, dk, dv, each 0 where it is None."""
    k, v = (_for_queries(x, q, options) for x in (k, v))
    dk, dv = (None if x is None else _for_queries(x, q, options) for x in (dk, dv))
    p, _ = _probabilities(q, k, scale, options)
    t = torch.zeros_like(p)
    if dq is not None:
        t = t + scale * (dq @ k.transpose(-1, -2))
    if dk is not None:
        t = t + scale * (q @ dk.transpose(-1, -2))
    d_lse = (p * t).sum(-1)
    weights = _weights(p, options)
    d_out = (weights * (t - d_lse.unsqueeze(-1))) @ v
    if dv is not None:
        d_out = d_out + weights @ dv
    return d_out, d_lse


def spatial_attention(qkv: Tensor, num_heads: int, scale: float | None = None) -> Tensor:
    """Attention among the pixels of each sample; the channels are those of q, of k and of v, each head after head."""
    q, k, v = qkv.flatten(2).unflatten(1, (3, num_heads, -1)).transpose(-1, -2).unbind(1)
    out, _ = attention(q, k, v, scale)
    return out.transpose(-1, -2).reshape(qkv.shape[0], -1, *qkv.shape[2:])


def _probabilities(q: Tensor, k: Tensor, scale: float | None, options: Options) -> tuple[Tensor, Tensor]:
    """The softmax, 0 for queries that see no key, and the logarithm of its denominator."""
    logits = (1 / math.sqrt(q.shape[-1]) if scale is None else scale) * (q @ k.transpose(-1, -2))
    if not options.hides:
        return torch.softmax(logits, -1), torch.logsumexp(logits, -1)
    mask = options.mask
    if mask is not None:
        hides = ~mask if mask.dtype is torch.bool else mask <= _LEAST_BIAS
        logits = logits if mask.dtype is torch.bool else logits + mask.to(logits.dtype)
        logits = torch.where(hides, -math.inf, logits)
    if options.causal:
        queries, keys = (torch.arange(size, device=q.device) for size in logits.shape[-2:])
        logits = torch.where(keys <= queries.unsqueeze(-1), logits, -math.inf)
    if options.key_lengths is not None:
        logits = torch.where(_is_inside(k, options.key_lengths).transpose(-1, -2), logits, -math.inf)
    sees_none = (logits == -math.inf).all(-1, keepdim=True)
    logits = torch.where(sees_none, 0.0, logits)
    p = torch.where(sees_none, 0.0, torch.softmax(logits, -1))
    return p, torch.where(sees_none.squeeze(-1), -math.inf, torch.logsumexp(logits, -1))


def _weights(p: Tensor, options: Options) -> Tensor:
    return p if options.kept is None else p * options.kept


def _for_queries(x: Tensor, q: Tensor, options: Options) -> Tensor:
    """Keys or values, one for each head of the queries; 0 beyond the length of their sample."""
    if options.key_lengths is not None:
        x = torch.where(_is_inside(x, options.key_lengths), x, 0.0)
    heads = q.shape[-3]
    return x if x.shape[-3] == heads else x.repeat_interleave(heads // x.shape[-3], -3)


def _is_inside(x: Tensor, key_lengths: Tensor) -> Tensor:
    """(B, 1, S, 1): whether a token is there."""
    return (torch.arange(x.shape[-2], device=x.device) < key_lengths.unsqueeze(-1))[:, None, :, None]
