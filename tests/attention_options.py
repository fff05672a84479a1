"""Uses of attention with options, and what it computes, in float64: for the tests of every backend."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gencore import Key
from gencore.noise import reference_uniform

KEY = Key(7).stream(3).samples(5)


class Use(NamedTuple):
    """Shapes, (B, heads, T, d), (B, heads, S, d) and the size of a value, with what the call has besides.

    ``mask``: its shape, "bool" or "float".
    """

    q: tuple[int, ...]
    k: tuple[int, ...]
    size_v: int
    mask: tuple[tuple[int, ...], str] | None = None
    causal: bool = False
    key_lengths: tuple[int, ...] | None = None
    dropout: float = 0.0
    scale: float | None = None

    def tensors(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shapes = (self.q, self.k, (*self.k[:-1], self.size_v))
        return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]

    def options(self, device: str = "cpu") -> dict[str, Any]:
        found: dict[str, Any] = {"causal": self.causal, "scale": self.scale, "dropout": self.dropout, "key": KEY}
        if self.mask is not None:
            drawn = torch.randn(self.mask[0], generator=torch.Generator().manual_seed(1))
            # Of a mask that differs from query to query, one sees none.
            hidden = drawn > (0.5 if self.mask[0][-1] > 1 else 3)
            if len(self.mask[0]) > 1 and self.mask[0][-2] > 1:
                hidden[..., -1, :] = True
            found["mask"] = ~hidden if self.mask[1] == "bool" else drawn.masked_fill(hidden, -math.inf)
        if self.key_lengths is not None:
            found["key_lengths"] = torch.tensor(self.key_lengths)
        return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in found.items()}


USES = {
    "causal": Use((2, 3, 70, 20), (2, 3, 70, 20), 20, causal=True),
    "causal, more keys": Use((1, 2, 9, 8), (1, 2, 140, 8), 8, causal=True),
    "causal, more queries": Use((1, 2, 150, 8), (1, 2, 70, 8), 8, causal=True),
    "lengths": Use((3, 2, 9, 8), (3, 2, 150, 8), 8, key_lengths=(0, 70, 150)),
    "lengths beyond": Use((2, 1, 5, 8), (2, 1, 9, 8), 8, key_lengths=(1, 99)),
    "mask of pairs": Use((2, 3, 20, 8), (2, 3, 70, 8), 8, mask=((20, 70), "bool")),
    "mask of keys": Use((2, 3, 9, 8), (2, 3, 33, 8), 8, mask=((2, 1, 1, 33), "bool")),
    "mask of everything": Use((2, 3, 9, 8), (2, 3, 70, 8), 8, mask=((2, 3, 9, 70), "float")),
    "mask of heads": Use((2, 3, 9, 8), (2, 3, 33, 8), 8, mask=((3, 9, 1), "float")),
    "shared heads": Use((2, 6, 9, 20), (2, 2, 70, 20), 20),
    "one head for all": Use((2, 5, 70, 8), (2, 1, 33, 8), 8, scale=-0.7),
    "longer values": Use((2, 2, 9, 8), (2, 2, 70, 8), 40),
    "shorter values": Use((2, 2, 70, 40), (2, 2, 9, 40), 3),
    "dropout": Use((2, 3, 9, 8), (2, 3, 71, 8), 8, dropout=0.3),
    "dropout of all": Use((1, 2, 3, 8), (1, 2, 5, 8), 8, dropout=1.0),
    "all together": Use(
        (2, 4, 70, 20), (2, 2, 133, 20), 33, ((2, 1, 70, 133), "float"), True, (50, 133), dropout=0.25, scale=0.4
    ),
    "one query": Use((2, 4, 1, 20), (2, 2, 150, 20), 33, ((2, 1, 1, 150), "bool"), False, (90, 150), dropout=0.25),
    "one head, three dimensions": Use((2, 9, 8), (2, 20, 8), 12, ((9, 20), "bool"), True, (3, 20), dropout=0.1),
    "a dimension less": Use((3, 9, 8), (2, 3, 20, 8), 8, causal=True),
}
SMALL = ("lengths beyond", "mask of heads", "shared heads", "all together", "one head, three dimensions")
# Relative to the largest value: roundings of float64 twice, some tens of float32's, and those of half results, whose
# gradients go on from a rounded result.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}


def small(use: Use) -> Use:
    """The same with few tokens, for differences of values."""
    shrink = {70: 5, 71: 7, 133: 6, 140: 6, 150: 7, 20: 4, 33: 3, 40: 2, 9: 4, 90: 4, 50: 2}

    def smaller(sizes: Any) -> Any:
        return tuple(shrink.get(size, size) for size in sizes)

    mask = None if use.mask is None else (smaller(use.mask[0]), use.mask[1])
    lengths = None if use.key_lengths is None else smaller(use.key_lengths)
    return use._replace(
        q=smaller(use.q), k=smaller(use.k), size_v=smaller((use.size_v,))[0], mask=mask, key_lengths=lengths
    )


def defined(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    key: Key = KEY,
) -> Tensor:
    """What the documentation says, in float64, over every pair of a query and a key."""
    one_head = q.dim() == k.dim() == 3
    if one_head:
        q, k, v = (x.unsqueeze(1) for x in (q, k, v))
        mask = mask if mask is None or mask.dim() < 3 else mask.unsqueeze(1)
    q, k, v = (x.expand(max(len(q) if q.dim() == 4 else 1, len(k)), *x.shape[-3:]).double() for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    k, v = (torch.stack([x[:, head // groups] for head in range(q.shape[1])], 1) for x in (k, v))
    logits = (q.shape[-1] ** -0.5 if scale is None else scale) * torch.einsum("bhtd,bhsd->bhts", q, k)
    bias = torch.zeros_like(logits).detach()
    if mask is not None:
        bias = bias.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else bias + mask
    for b, length in enumerate([] if key_lengths is None else key_lengths.tolist()):
        bias[b, :, :, length:] = -math.inf
    if causal:
        bias = bias + torch.full(logits.shape[-2:], -math.inf).triu(1)
    p = (logits + bias - (logits + bias).amax(-1, keepdim=True).clamp_min(-1e300).detach()).exp()
    p = p / p.sum(-1, keepdim=True).clamp_min(1e-300)
    if dropout:
        u = torch.from_numpy(reference_uniform(tuple(p.shape), key))
        p = torch.where(u >= dropout, p / (1 - dropout) if dropout < 1 else 0 * p, 0.0)
    out = p @ v
    return out.squeeze(1) if one_head else out


def close(got: Tensor, want: Tensor, dtype: torch.dtype, what: str = "", times: int = 1, besides: float = 0.0) -> None:
    assert got.shape == want.shape, what
    size = times * max(float(want.detach().abs().max()), 0.1) if want.numel() else 1.0
    atol = TOLERANCE[dtype] * size + besides
    torch.testing.assert_close(got.detach().cpu().double(), want.detach(), rtol=0, atol=atol)
