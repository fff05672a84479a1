"""The one table of cases. Tests run every case at every dtype; benchmarks time those marked so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

_CPU, _GPU, _BOTH = ("cpu",), ("cuda",), ("cpu", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}


@dataclass(frozen=True)
class Case:
    """One shape that an op must serve.

    Attributes:
        shape: of the op's main tensor; the first dimension numbers the samples.
        why: what the case is there for.
        layout: the memory format.
        draws: how many draws per input; None where the op draws once and adds no dimension.
        groups: of channels, for ops that have them.
        timed: the kinds of device that benchmarks time it on.
    """

    shape: tuple[int, ...]
    why: str
    layout: str = "contiguous"
    draws: int | None = None
    groups: int = 1
    timed: tuple[str, ...] = ()

    @property
    def memory_format(self) -> torch.memory_format:
        return _FORMATS[self.layout]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def shrunk(self) -> Case:
        """The same at a size that takes no time."""
        return replace(self, shape=tuple(min(size, 8) for size in self.shape), groups=min(self.groups, 4))

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        layout = "" if self.layout == "contiguous" else f"-{self.layout}"
        draws = "" if self.draws is None else f"-{self.draws}draws"
        groups = "" if self.groups == 1 else f"-{self.groups}groups"
        return f"{size}{layout}{draws}{groups}"


@dataclass(frozen=True)
class AttentionCase:
    """One problem that attention must solve.

    Attributes:
        batch, heads, queries, keys, size: queries and keys are tokens; a head has ``size`` channels.
        why: what the case is there for.
        layout: "heads", dense tensors (B, heads, tokens, size); "tokens", views of what a linear layer leaves, (B,
            tokens, 3, heads, size), or of two such where there are other keys than queries; "contiguous" or
            "channels_last", an image (B, 3 heads size, H, W) in that format.
        timed: the kinds of device that benchmarks time it on.
    """

    batch: int
    heads: int
    queries: int
    keys: int
    size: int
    why: str
    layout: str = "heads"
    timed: tuple[str, ...] = ()

    draws: ClassVar[None] = None

    @property
    def elements(self) -> int:
        """Of the longer ones of the op's tensors."""
        return self.batch * self.heads * max(self.queries, self.keys) * self.size

    @property
    def flops(self) -> int:
        """Multiplications and additions of one product of queries by keys; the forward pass takes two, and the backward
        pass five, one of which makes the probabilities again."""
        return 2 * self.batch * self.heads * self.queries * self.keys * self.size

    @property
    def memory_format(self) -> torch.memory_format:
        """Of an image."""
        return _FORMATS[self.layout]

    @property
    def image(self) -> tuple[int, int, int, int]:
        """The shape of q, k and v as one image, as near to a square as the number of tokens has it."""
        near = math.isqrt(self.queries)
        height = next((n for n in range(near, 0, -1) if self.queries % n == 0), 1)
        return self.batch, 3 * self.heads * self.size, height, self.queries // height

    def tensors(
        self, dtype: torch.dtype, device: str = "cpu", generator: torch.Generator | None = None
    ) -> list[Tensor]:
        """Standard normal q, k and v, or the one image that holds them. ``generator`` is one of the CPU."""

        def normal(*shape: int) -> Tensor:
            if generator is None:
                return torch.randn(shape, dtype=dtype, device=device)
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

        of_queries = (self.batch, self.heads, self.queries, self.size)
        of_keys = (self.batch, self.heads, self.keys, self.size)
        if self.layout == "heads":
            return [normal(*of_queries), normal(*of_keys), normal(*of_keys)]
        if self.layout != "tokens":
            return [normal(*self.image).contiguous(memory_format=self.memory_format)]
        if self.queries == self.keys:
            parts = normal(self.batch, self.queries, 3, self.heads, self.size).transpose(1, 3).unbind(2)
        else:
            query = normal(self.batch, self.queries, self.heads, self.size).transpose(1, 2)
            parts = (query, *normal(self.batch, self.keys, 2, self.heads, self.size).transpose(1, 3).unbind(2))
        return list(parts)

    def shrunk(self) -> AttentionCase:
        """The same at a size that takes no time."""
        return replace(
            self,
            batch=min(self.batch, 1),
            heads=min(self.heads, 2),
            queries=min(self.queries, 8),
            keys=min(self.keys, 8),
            size=min(self.size, 64),
        )

    def __str__(self) -> str:
        tokens = f"{self.queries}" if self.queries == self.keys else f"{self.queries}by{self.keys}"
        return f"{self.batch}x{self.heads}x{tokens}x{self.size}-{self.layout}"


AnyCase = TypeVar("AnyCase", Case, AttentionCase)

_SHAPES = (
    Case((0, 4), "empty batch"),
    Case((3, 0), "empty samples"),
    Case((1, 1), "one element"),
    Case((5,), "one element per sample, no further dimension"),
    Case((9, 2), "less than a noise block per sample"),
    Case((7, 33), "odd tail, rows shorter than a vector"),
    Case((128, 20), "latents of a small VAE", timed=_CPU),
    Case((3, 1021), "a prime just below a tile"),
    Case((2, 5003), "rows of several tiles with an odd tail"),
    Case((2, 3, 5, 7), "odd image"),
    Case((2, 4, 9, 9), "odd image", layout="channels_last"),
    Case((3, 5, 16, 16), "more pixels than a run, odd number of channels", layout="channels_last"),
    Case((1, 1100, 3, 3), "more channels than a tile", layout="channels_last"),
    Case((2, 3, 4, 5, 6), "odd video", layout="channels_last_3d"),
)
_LATENTS = (64, 4, 64, 64)
_SIZES = (
    Case((16, 1 << 10), "the least a GPU is timed at", timed=_GPU),
    Case((16, 1 << 14), "smaller than a GPU's cache", timed=_GPU),
    Case((16, 1 << 18), "about a GPU's cache", timed=_GPU),
)
_LARGE = (
    Case((64, 16, 256, 256), "256 MB of float32", timed=_GPU),
    Case((64, 16, 256, 256), "256 MB of float32", layout="channels_last", timed=_GPU),
)

NOISE = (
    *_SHAPES,
    Case((1, 2560), "as many values as the smallest timed batch", timed=_CPU),
    Case(_LATENTS, "latents of Stable Diffusion", timed=_BOTH),
    Case(_LATENTS, "latents of Stable Diffusion", layout="channels_last", timed=_BOTH),
    Case((4, 1 << 20), "4 M values", timed=_CPU),
    *_SIZES,
    *_LARGE,
)

REPARAMETERIZE = (
    *_SHAPES,
    Case((5, 6), "several draws of less than two noise blocks", draws=3),
    Case((2, 3, 5, 7), "several draws", draws=2),
    Case((2, 4, 9, 9), "several draws", layout="channels_last", draws=2),
    Case((2, 1500), "several draws of several tiles", draws=3),
    Case((128, 20), "a Monte-Carlo bound with 10 draws", draws=10, timed=_BOTH),
    Case(_LATENTS, "latents of Stable Diffusion", timed=_BOTH),
    Case(_LATENTS, "latents of Stable Diffusion", layout="channels_last", timed=_BOTH),
    *_SIZES,
    *_LARGE,
)


# Of three ops, each with tests and benchmarks of its own: a short table keeps these within their time.
DIFFUSION = (
    Case((0, 4), "empty batch"),
    Case((3, 0), "empty samples"),
    Case((1, 1), "one element"),
    Case((5,), "one element per sample, no further dimension"),
    Case((7, 33), "odd tail, rows shorter than a vector"),
    Case((2, 5003), "rows of several tiles with an odd tail"),
    Case((2, 3, 5, 7), "odd image"),
    Case((2, 4, 9, 9), "odd image", layout="channels_last"),
    Case((3, 5, 16, 16), "more pixels than a run, odd number of channels", layout="channels_last"),
    Case((2, 3, 4, 5, 6), "odd video", layout="channels_last_3d"),
    Case((4, 1, 28, 28), "a few images of MNIST", timed=_CPU),
    Case((64, 3, 64, 64), "a batch of small pictures", timed=_CPU),
    Case((64, 3, 64, 64), "a batch of small pictures", layout="channels_last", timed=_CPU),
    Case((16, 3, 256, 256), "a batch of pictures", timed=_BOTH),
    Case((256, 4, 128, 128), "64 MB of float32", timed=_GPU),
    Case((64, 16, 256, 256), "256 MB of float32", timed=_GPU),
    Case((64, 16, 256, 256), "256 MB of float32", layout="channels_last", timed=_GPU),
)


def _both(shape: tuple[int, ...], groups: int, why: str, timed: tuple[str, ...] = ()) -> tuple[Case, ...]:
    """A case in each of the two memory formats."""
    layout = {4: "channels_last", 5: "channels_last_3d"}[len(shape)]
    return tuple(Case(shape, why, layout=one, groups=groups, timed=timed) for one in ("contiguous", layout))


GROUP_NORM = (
    Case((0, 4, 3, 3), "empty batch", groups=2),
    Case((2, 4, 0, 3), "no pixels", groups=2),
    Case((1, 1, 1, 1), "one element"),
    Case((3, 6), "no spatial dimension", groups=3),
    Case((2, 32, 1, 1), "one pixel", groups=8),
    Case((2, 6, 5), "one spatial dimension", groups=3),
    *_both((2, 6, 5, 7), 3, "odd image"),
    *_both((3, 5, 4, 4), 5, "as many groups as channels: instance norm"),
    *_both((2, 7, 9, 9), 1, "one group: layer norm; a prime number of channels"),
    *_both((2, 20, 8, 8), 2, "ten channels per group: no multiple of a vector"),
    *_both((2, 48, 3, 5), 3, "vectors of channels in one group"),
    *_both((2, 4, 3, 4, 5), 2, "video"),
    *_both((1, 3, 90, 100), 1, "groups of many pieces"),
    *_both((1, 2, 110, 111), 2, "planes of several pieces with an odd tail"),
    *_both((1, 1030, 3, 3), 2, "more channels than a tile, each of few pixels"),
    *_both((1, 32, 4, 4), 32, "the least that is timed", timed=_BOTH),
    *_both((1, 320, 8, 8), 32, "the middle of a small U-Net", timed=_BOTH),
    *_both((64, 64, 28, 28), 32, "a batch of small images", timed=_CPU),
    *_both((4, 320, 64, 64), 32, "Stable Diffusion's U-Net, outermost", timed=_BOTH),
    *_both((4, 640, 32, 32), 32, "Stable Diffusion's U-Net, second level", timed=_BOTH),
    *_both((4, 1280, 16, 16), 32, "Stable Diffusion's U-Net, third level", timed=_GPU),
    *_both((4, 1280, 8, 8), 32, "Stable Diffusion's U-Net, innermost", timed=_GPU),
    *_both((2, 320, 128, 128), 32, "SDXL's U-Net, outermost", timed=_GPU),
    *_both((2, 1280, 32, 32), 32, "SDXL's U-Net, innermost", timed=_GPU),
    *_both((1, 512, 128, 128), 32, "the decoder of Stable Diffusion's VAE, innermost", timed=_BOTH),
    *_both((1, 256, 512, 512), 32, "the same, in the middle", timed=_GPU),
    *_both((1, 128, 1024, 1024), 32, "the decoder of SDXL's VAE, outermost: no group fits on a chip", timed=_GPU),
)


ATTENTION = (
    AttentionCase(0, 2, 5, 5, 8, "empty batch"),
    AttentionCase(2, 0, 5, 5, 8, "no heads"),
    AttentionCase(2, 2, 0, 5, 8, "no queries"),
    AttentionCase(2, 2, 5, 0, 8, "no keys"),
    AttentionCase(1, 1, 1, 1, 1, "one element"),
    AttentionCase(2, 3, 1, 1, 8, "one token"),
    AttentionCase(2, 1, 7, 5, 1, "heads of one channel"),
    AttentionCase(1, 2, 9, 9, 3, "heads shorter than a vector"),
    AttentionCase(1, 1, 33, 33, 20, "heads of no multiple of 8 channels"),
    AttentionCase(2, 2, 17, 17, 8, "short heads", layout="tokens"),
    AttentionCase(1, 2, 33, 33, 32, "a token more than a small tile"),
    AttentionCase(2, 2, 16, 16, 40, "Stable Diffusion's shortest heads", layout="tokens"),
    AttentionCase(1, 1, 130, 130, 40, "two tiles and an odd tail", layout="tokens"),
    AttentionCase(1, 2, 65, 65, 64, "a token more than a tile", layout="tokens"),
    AttentionCase(1, 1, 77, 77, 80, "an odd number of tokens"),
    AttentionCase(1, 2, 20, 77, 40, "cross-attention to the tokens of a prompt", layout="tokens"),
    AttentionCase(1, 1, 1, 130, 64, "one query", layout="tokens"),
    AttentionCase(1, 1, 130, 1, 32, "one key"),
    AttentionCase(1, 1, 150, 11, 20, "more queries than keys"),
    AttentionCase(1, 1, 12, 12, 128, "heads of a power of two", layout="tokens"),
    AttentionCase(1, 1, 33, 40, 160, "Stable Diffusion's longest heads"),
    AttentionCase(1, 1, 17, 17, 512, "the one head of a VAE's decoder", layout="tokens"),
    AttentionCase(4, 8, 1024, 1024, 40, "Stable Diffusion's U-Net on 256 x 256 pixels", timed=_CPU),
    AttentionCase(4, 8, 1024, 1024, 40, "the same as a linear layer leaves it", layout="tokens", timed=_BOTH),
    AttentionCase(1, 8, 4096, 4096, 40, "Stable Diffusion's U-Net, outermost", timed=_CPU),
    AttentionCase(1, 8, 4096, 4096, 40, "the same as a linear layer leaves it", layout="tokens", timed=_BOTH),
    AttentionCase(16, 4, 256, 256, 64, "a batch of small images", timed=_CPU),
    AttentionCase(16, 4, 256, 256, 64, "the same as a linear layer leaves it", layout="tokens", timed=_CPU),
    AttentionCase(16, 1, 256, 256, 256, "DDPM's one head", timed=_CPU),
    AttentionCase(16, 1, 256, 256, 256, "the same as a linear layer leaves it", layout="tokens", timed=_CPU),
    *(
        AttentionCase(max(1, 4096 // tokens), 8, tokens, tokens, size, "self-attention", layout="tokens", timed=_GPU)
        for size in (40, 64, 80, 128, 160)
        for tokens in (256, 1024, 4096)
        if size != 40 or tokens == 256
    ),
    *(
        AttentionCase(max(1, 4096 // tokens), 1, tokens, tokens, 512, "a VAE's middle", layout="tokens", timed=_GPU)
        for tokens in (256, 1024, 4096, 16384)
    ),
    AttentionCase(1, 8, 16384, 16384, 40, "Stable Diffusion's U-Net at 1024 x 1024", layout="tokens", timed=_GPU),
    AttentionCase(1, 10, 16384, 16384, 64, "heads of a power of two, many tokens", layout="tokens", timed=_GPU),
    AttentionCase(4, 8, 1024, 1024, 80, "dense heads", timed=_GPU),
    AttentionCase(2, 8, 4096, 77, 40, "Stable Diffusion's cross-attention, outermost", layout="tokens", timed=_GPU),
    AttentionCase(2, 8, 1024, 77, 80, "the same, second level", layout="tokens", timed=_GPU),
    AttentionCase(2, 8, 256, 77, 160, "the same, third level", layout="tokens", timed=_GPU),
)


def _images(
    batch: int, heads: int, pixels: int, size: int, why: str, timed: tuple[str, ...] = ()
) -> tuple[AttentionCase, ...]:
    """A case in each of the two memory formats."""
    return tuple(
        AttentionCase(batch, heads, pixels, pixels, size, why, layout=layout, timed=timed)
        for layout in ("contiguous", "channels_last")
    )


SPATIAL_ATTENTION = (
    AttentionCase(0, 2, 6, 6, 8, "empty batch", layout="contiguous"),
    AttentionCase(2, 2, 0, 0, 8, "no pixels", layout="contiguous"),
    AttentionCase(2, 1, 1, 1, 1, "one pixel of one channel", layout="contiguous"),
    *_images(2, 2, 1, 8, "one pixel"),
    *_images(2, 1, 35, 1, "heads of one channel"),
    *_images(1, 2, 9, 20, "heads of no multiple of 8 channels"),
    *_images(2, 2, 35, 8, "odd image"),
    *_images(1, 1, 130, 40, "two tiles and an odd tail"),
    *_images(1, 1, 16, 160, "long heads"),
    *_images(4, 8, 1024, 40, "Stable Diffusion's U-Net on 256 x 256 pixels", timed=_CPU),
    *_images(2, 8, 4096, 40, "Stable Diffusion's U-Net, outermost", timed=_GPU),
    *_images(2, 8, 1024, 80, "Stable Diffusion's U-Net, second level", timed=_GPU),
    *_images(1, 1, 16384, 512, "the decoder of Stable Diffusion's VAE", timed=_GPU),
)


def small(cases: Sequence[AnyCase]) -> list[AnyCase]:
    """The cases that tests run: those that the slow reference draws in milliseconds."""
    return [case for case in cases if case.elements * (case.draws or 1) <= 1 << 15]


def timed(cases: Sequence[AnyCase], device: str) -> list[AnyCase]:
    """The cases that benchmarks time on a kind of device, "cpu" or "cuda"."""
    return [case for case in cases if device in case.timed]
