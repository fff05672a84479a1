"""Attention with masks, lengths, shared heads and dropout by Triton's kernels, on every path they can take.

tests/ops has what is true of all backends.
"""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import pytest
import torch
from support import same_bits
from torch import Tensor

from gencore import Key
from gencore.backends.reference import attention as reference
from gencore.noise import reference_uniform
from gencore.ops import _general_attention as definitions

pytest.importorskip("triton")

from gencore.backends import triton as kernels
from gencore.backends.triton import _attention_seen as seen
from gencore.backends.triton._tiles import halves

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = (
    "_general_attention",
    "_general_attention_backward",
    "_general_attention_tangent",
    "_general_attention_double_backward",
)
MODULES = [sys.modules[f"gencore.backends.triton.{name}"] for name in NAMES]
KEY = Key(7).stream(3).samples(5)
# Relative to the largest value: half types round probabilities and their derivatives, then results, to 8 and 11 bits.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}


class Use(NamedTuple):
    """``mask``: the shape of one, boolean or of the type that it is to have."""

    heads: int
    key_heads: int
    queries: int
    keys: int
    size: int
    size_v: int
    mask: tuple[tuple[int, ...], torch.dtype] | None = None
    causal: bool = False
    key_lengths: tuple[int, ...] | None = None
    dropout: float = 0.0
    batch: int = 1

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """q, k, v and the gradient of the result."""
        generator = torch.Generator().manual_seed(0)

        def draw(heads: int, tokens: int, size: int) -> Tensor:
            drawn = torch.randn(self.batch, heads, tokens, size, generator=generator, dtype=torch.float64)
            return drawn.to(DEVICE, dtype)

        of_heads = ((self.heads, self.queries, self.size), (self.key_heads, self.keys, self.size))
        return (*(draw(*x) for x in of_heads), draw(self.key_heads, self.keys, self.size_v), draw(
            self.heads, self.queries, self.size_v
        ))  # fmt: skip

    def settings(self, scale: float = 0.3) -> tuple[Any, ...]:
        mask = lengths = None
        if self.mask is not None:
            drawn = torch.randn(self.mask[0], generator=torch.Generator().manual_seed(1))
            drawn = drawn.masked_fill(drawn > 0.7, -math.inf)
            mask = (drawn > -math.inf if self.mask[1] == torch.bool else drawn.to(self.mask[1])).to(DEVICE)
            mask = mask.view((1,) * (4 - mask.dim()) + mask.shape)
        if self.key_lengths is not None:
            lengths = torch.tensor(self.key_lengths, device=DEVICE)
        return mask, lengths, KEY.packed if self.dropout else None, scale, self.causal, self.dropout


def results(tensors: tuple[Tensor, ...], settings: tuple[Any, ...]) -> tuple[Tensor, ...]:
    *heads, grad_out = tensors
    out, lse = kernels.general_attention(*heads, *settings)
    return out, lse.sum(0), *kernels.general_attention_backward(grad_out, *heads, out, lse, *settings, [True] * 3)


def check(use: Use, dtype: torch.dtype) -> None:
    tensors, settings = use.tensors(dtype), use.settings()
    *exact, grad_out = (x.cpu().double().requires_grad_() for x in tensors)
    mask, lengths, _, scale, causal, dropout = (x.cpu() if isinstance(x, Tensor) else x for x in settings)
    kept = None
    if dropout:
        u = torch.from_numpy(reference_uniform((use.batch, use.heads, use.queries, use.keys), KEY))
        kept = (u >= dropout).double() / (1 - dropout)
    out, lse = reference.attention(*exact, scale, reference.Options(mask, lengths, causal, kept))
    want = (out, lse, *torch.autograd.grad(out, exact, grad_out))
    for name, a, b in zip(("out", "lse", "q", "k", "v"), results(tensors, settings), want, strict=True):
        assert a.dtype == (dtype if name != "lse" or dtype == torch.float64 else torch.float32)
        size = float(b.detach()[b.isfinite()].abs().max())
        atol = TOLERANCE[dtype] * max(size, 0.1)
        torch.testing.assert_close(a.cpu().double(), b.detach(), rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


PATHS = {
    "one tile of queries sees several of keys": (torch.float32, Use(2, 1, 40, 70, 20, 20, causal=True)),
    "several tiles of queries": (torch.float16, Use(1, 1, 150, 33, 20, 64, causal=True)),
    "mask of pairs": (torch.bfloat16, Use(2, 2, 33, 70, 40, 40, ((33, 70), torch.bool))),
    "mask of the type": (torch.float16, Use(1, 1, 20, 40, 80, 16, ((1, 20, 40), torch.float16))),
    "wide heads": (torch.bfloat16, Use(2, 1, 9, 40, 160, 40, causal=True)),
    "in chunks, values in parts": (torch.bfloat16, Use(1, 1, 9, 40, 320, 512, ((9, 40), torch.float32))),
    "float64 in parts": (torch.float64, Use(2, 1, 20, 40, 8, 80, ((20, 40), torch.float64), dropout=0.2)),
    "rows within blocks of noise": (torch.bfloat16, Use(2, 2, 20, 39, 16, 16, dropout=0.3)),
    "rows of whole blocks": (torch.bfloat16, Use(2, 2, 20, 40, 16, 16, dropout=0.3)),
    "all together": (
        torch.bfloat16,
        Use(4, 2, 40, 75, 40, 24, ((2, 1, 40, 75), torch.float32), True, (40, 75), 0.25, 2),
    ),
}


@pytest.mark.parametrize(("dtype", "use"), PATHS.values(), ids=PATHS.keys())
def test_definition(dtype, use):
    check(use, dtype)


@pytest.mark.parametrize("has_warpgroups", [True, False])
@pytest.mark.parametrize("sizes", [(40, 160), (160, 20)], ids=str)
def test_definition_on_either_kind_of_gpu(sizes, has_warpgroups, monkeypatch):
    for module in MODULES:
        monkeypatch.setattr(module, "has_warpgroups", lambda tensor: has_warpgroups)
    check(Use(2, 1, 20, 40, *sizes, causal=True), torch.bfloat16)


def further(use: Use, dtype: torch.dtype) -> None:
    """In forward mode and of second order, against the definition in float64."""
    (*heads, g), settings = use.tensors(dtype), use.settings()
    direction = [x.cos() for x in heads]
    out, lse = kernels.general_attention(*heads, *settings)
    got = kernels.general_attention_jvp(*heads, out, lse, *direction, *settings)
    grads = kernels.general_attention_double_backward(g, *heads, out, lse, *direction, *settings, [True] * 4)
    exact = [x.cpu().double() for x in (*heads, *direction)]
    mask, *others = (x.cpu() if isinstance(x, Tensor) else x for x in settings)
    mask = None if mask is None else mask.expand(use.batch, use.heads, use.queries, use.keys)
    want = [
        *definitions._definition_jvp(*exact[:3], None, None, *exact[3:], mask, *others),
        *definitions._definition_double_backward(
            g.cpu().double(), *exact[:3], None, None, *exact[3:], mask, *others, [True] * 4
        ),
    ]
    for a, b in zip((*got, *grads), want, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=0, atol=TOLERANCE[dtype] * max(float(b.abs().max()), 0.1))


FURTHER = {
    "in chunks, values in parts": (torch.bfloat16, Use(1, 1, 9, 20, 160, 150, ((9, 20), torch.bool))),
    "float64 in parts": (torch.float64, Use(2, 1, 20, 40, 8, 80, ((20, 40), torch.float64), causal=True)),
    "several tiles of queries": (torch.float16, Use(1, 1, 150, 33, 20, 24, causal=True)),
    "rows within blocks of noise": (torch.bfloat16, Use(1, 1, 10, 15, 16, 16, dropout=0.3)),
}


@pytest.mark.parametrize(("dtype", "use"), FURTHER.values(), ids=FURTHER.keys())
def test_further_derivatives(dtype, use):
    further(use, dtype)


def test_further_derivatives_on_gpus_without_warpgroups(monkeypatch):
    for module in MODULES:
        monkeypatch.setattr(module, "has_warpgroups", lambda tensor: False)
    further(Use(2, 1, 20, 40, 40, 70, causal=True), torch.bfloat16)


def test_masks_are_read_as_they_lie(monkeypatch):
    use = Use(2, 2, 20, 33, 16, 16, batch=2)
    tensors, (_, *settings) = use.tensors(torch.float32), use.settings()
    for shape in ((2, 2, 20, 33), (2, 1, 1, 33), (1, 2, 20, 1), (1, 1, 20, 33), (1, 1, 1, 1)):
        for dtype in (torch.bool, torch.float32):
            mask = use._replace(mask=(shape, dtype)).settings()[0]
            want = results(tensors, (mask.expand(2, 2, 20, 33).contiguous(), *settings))
            turned = mask.transpose(2, 3).contiguous().transpose(2, 3)
            apart = torch.stack((mask, mask), -1)[..., 0]
            for given in (mask, turned, apart, mask.expand(2, 2, 20, 33)):
                for got, one in zip(results(tensors, (given, *settings)), want, strict=True):
                    assert same_bits(got, one)
            if shape == (2, 2, 20, 33):
                with monkeypatch.context() as patched:
                    patched.setattr(seen, "LONGEST", 1 << 31)
                    for got, one in zip(results(tensors, (turned, *settings)), want, strict=True):
                        assert same_bits(got, one)


def test_bits_depend_on_neither_batch_nor_heads(monkeypatch):
    use = Use(4, 2, 20, 37, 16, 24, None, True, (37, 20), 0.25, 2)
    tensors, settings = use.tensors(torch.bfloat16), list(use.settings())
    every = results(tensors, tuple(settings))
    some = [x[1:] for x in tensors], settings.copy()
    some[1][1:3] = settings[1][1:], KEY.samples(6).packed
    for got, want in zip(results(*some), every, strict=True):
        assert same_bits(got, want[1:])
    # The first heads come first in the noise of a sample.
    few = [x[:, : x.shape[1] // 2] for x in tensors]
    for got, want in zip(results(few, tuple(settings)), every, strict=True):
        assert same_bits(got, want[:, : want.shape[1] // 2])
    with monkeypatch.context() as patched:
        patched.setattr(seen, "key_arguments", lambda key, tensor: (halves(key.to(tensor.device)), 0, 0, 0, False))
        for got, want in zip(results(tensors, tuple(settings)), every, strict=True):
            assert same_bits(got, want)


def test_what_is_wanted():
    use = PATHS["all together"][1]
    (*heads, grad_out), settings = use.tensors(torch.bfloat16), use.settings()
    out, _, *every = results((*heads, grad_out), settings)
    _, lse = kernels.general_attention(*heads, *settings)
    again, none = kernels.general_attention(*heads, *settings, with_lse=False)
    assert none is None
    assert same_bits(again, out)
    for number in range(3):
        wanted = [i == number for i in range(3)]
        grads = kernels.general_attention_backward(grad_out, *heads, out, lse, *settings, wanted)
        for got, want, is_wanted in zip(grads, every, wanted, strict=True):
            assert same_bits(got, want) if is_wanted else got is None


@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (2, 0, 3, 3), (2, 2, 0, 3), (2, 2, 3, 0)], ids=str)
def test_nothing_to_do(shape):
    batch, heads, queries, keys = shape
    use = Use(heads, heads, queries, keys, 4, 6, causal=True, batch=batch)
    out, lse, *grads = results(use.tensors(torch.float32), use.settings())
    assert out.shape == (batch, heads, queries, 6)
    assert torch.equal(lse, torch.full_like(lse, -math.inf))
    for zero in (out, *grads):
        assert torch.equal(zero, torch.zeros_like(zero))
