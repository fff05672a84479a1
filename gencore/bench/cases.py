"""The one table of cases. Tests run every case at every dtype; benchmarks time those marked so."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

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

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        layout = "" if self.layout == "contiguous" else f"-{self.layout}"
        draws = "" if self.draws is None else f"-{self.draws}draws"
        groups = "" if self.groups == 1 else f"-{self.groups}groups"
        return f"{size}{layout}{draws}{groups}"


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


def small(cases: tuple[Case, ...]) -> list[Case]:
    """The cases that tests run: those that the slow reference draws in milliseconds."""
    return [case for case in cases if case.elements * (case.draws or 1) <= 1 << 15]


def timed(cases: tuple[Case, ...], device: str) -> list[Case]:
    """The cases that benchmarks time on a kind of device, "cpu" or "cuda"."""
    return [case for case in cases if device in case.timed]
