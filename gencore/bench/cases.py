"""The one table of cases. Tests run every small one at every dtype; benchmarks time those marked so, or a preset's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from gencore.bench.case import AttentionCase as AttentionCase
from gencore.bench.case import Case as Case
from gencore.bench.case import NetworkCase as NetworkCase
from gencore.bench.tables import CasesError as CasesError
from gencore.bench.tables import Table as Table
from gencore.bench.tables import read_table as read_table

SomeCase = TypeVar("SomeCase", Case, AttentionCase, NetworkCase)
_CPU, _GPU, _BOTH = ("cpu",), ("cuda",), ("cpu", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PRESETS = {
    "sd15": "Stable Diffusion 1.5: 512 x 512 pixels, two images for guidance; U-Net, VAE, sampler",
    "sdxl": "Stable Diffusion XL: 1024 x 1024 pixels, two images for guidance; U-Net, VAE, sampler",
    "ddpm-cifar10": "DDPM on CIFAR-10: 32 x 32 pixels, batches of 128; U-Net, noising, loss, sampler",
    "mnist-vae": "a VAE on MNIST: batches of 128 with 20 latents, one draw and ten",
}

_SHAPES = (
    Case((0, 4), "empty batch"),
    Case((3, 0), "empty samples"),
    Case((1, 1), "one element"),
    Case((5,), "one element per sample, no further dimension"),
    Case((9, 2), "less than a noise block per sample"),
    Case((7, 33), "odd tail, rows shorter than a vector"),
    Case((128, 20), "latents of a small VAE", timed=_CPU, presets=("mnist-vae",)),
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
_STABLE_DIFFUSION = (
    Case((1, 4, 64, 64), "one image's latents of Stable Diffusion 1.5", presets=("sd15",)),
    Case((1, 4, 128, 128), "one image's latents of SDXL", presets=("sdxl",)),
)
_CIFAR10 = (Case((128, 3, 32, 32), "a batch of CIFAR-10", presets=("ddpm-cifar10",)),)
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
    *_STABLE_DIFFUSION,
    *_CIFAR10,
)

REPARAMETERIZE = (
    *_SHAPES,
    Case((5, 6), "several draws of less than two noise blocks", draws=3),
    Case((2, 3, 5, 7), "several draws", draws=2),
    Case((2, 4, 9, 9), "several draws", layout="channels_last", draws=2),
    Case((2, 1500), "several draws of several tiles", draws=3),
    Case((128, 20), "a Monte-Carlo bound with 10 draws", draws=10, timed=_BOTH, presets=("mnist-vae",)),
    Case(_LATENTS, "latents of Stable Diffusion", timed=_BOTH),
    Case(_LATENTS, "latents of Stable Diffusion", layout="channels_last", timed=_BOTH),
    *_SIZES,
    *_LARGE,
    *_STABLE_DIFFUSION,
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
    Case((4, 1, 28, 28), "a few images of MNIST: what a call takes", timed=_BOTH),
    Case((64, 3, 64, 64), "a batch of small pictures", timed=_CPU),
    Case((64, 3, 64, 64), "a batch of small pictures", layout="channels_last", timed=_CPU),
    Case((16, 3, 256, 256), "a batch of pictures", timed=_BOTH),
    Case((256, 4, 128, 128), "64 MB of float32", timed=_GPU),
    Case((64, 16, 256, 256), "256 MB of float32", timed=_GPU),
    Case((64, 16, 256, 256), "256 MB of float32", layout="channels_last", timed=_GPU),
    *_STABLE_DIFFUSION,
    *_CIFAR10,
)


def _both(
    shape: tuple[int, ...], groups: int, why: str, timed: tuple[str, ...] = (), presets: tuple[str, ...] = ()
) -> tuple[Case, ...]:
    """A case in each of the two memory formats."""
    layout = {4: "channels_last", 5: "channels_last_3d"}[len(shape)]
    layouts = ("contiguous", layout)
    return tuple(Case(shape, why, layout=one, groups=groups, timed=timed, presets=presets) for one in layouts)


def _merged(cases: Iterable[SomeCase]) -> tuple[SomeCase, ...]:
    """Every case once, as it stands first, part of the presets of all that are like it."""
    found: dict[str, list[SomeCase]] = {}
    for case in cases:
        found.setdefault(str(case), []).append(case)
    return tuple(
        replace(alike[0], presets=tuple(dict.fromkeys(preset for case in alike for preset in case.presets)))
        for alike in found.values()
    )


# The norms' inputs by their size in pixels and their channels. tests/bench/test_cases.py holds them against diffusers.
_NORMS: Mapping[str, Sequence[tuple[str, int, Mapping[int, tuple[int, ...]]]]] = {
    "sd15": (
        ("the U-Net", 2, {64: (320, 640, 960), 32: (320, 640, 960, 1280, 1920)}),
        ("the U-Net", 2, {16: (640, 1280, 1920, 2560), 8: (1280, 2560)}),
        ("the VAE", 1, {64: (512,), 128: (256, 512), 256: (128, 256, 512), 512: (128, 256)}),
    ),
    "sdxl": (
        ("the U-Net", 2, {128: (320, 640, 960), 64: (320, 640, 960, 1280, 1920), 32: (640, 1280, 1920, 2560)}),
        ("the VAE", 1, {128: (512,), 256: (256, 512), 512: (128, 256, 512), 1024: (128, 256)}),
    ),
    "ddpm-cifar10": (
        ("the U-Net", 128, {32: (128, 256, 384), 16: (128, 256, 384, 512), 8: (256, 512), 4: (256, 512)}),
    ),
}
_NAMES = {"sd15": "Stable Diffusion 1.5", "sdxl": "SDXL", "ddpm-cifar10": "DDPM on CIFAR-10"}


def _norms_of(preset: str) -> Iterable[Case]:
    for network, batch, levels in _NORMS[preset]:
        for size, widths in levels.items():
            for channels in widths:
                why = f"{network} of {_NAMES[preset]}"
                yield from _both((batch, channels, size, size), 32, why, presets=(preset,))


GROUP_NORM = _merged(
    (
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
        *(case for preset in _NORMS for case in _norms_of(preset)),
    )
)


UPFIRDN2D = (
    Case((0, 4, 3, 3), "empty batch"),
    Case((2, 0, 3, 3), "no channels"),
    Case((1, 1, 1, 1), "one pixel"),
    Case((3, 2, 1, 5), "one row"),
    *_both((2, 3, 5, 7), 1, "odd image of fewer channels than a vector has"),
    *_both((1, 20, 6, 9), 1, "no multiple of a vector"),
    *_both((1, 2, 34, 67), 1, "rows of several vectors with an odd tail"),
    *_both((1, 35, 4, 4), 1, "the least image of a generator, blocks of channels with a tail"),
    *_both((8, 512, 4, 4), 1, "StyleGAN2's innermost images", timed=_BOTH),
    *_both((8, 128, 64, 64), 1, "StyleGAN2's layers for 64 x 64 pixels at half the width", timed=_BOTH),
    *_both((8, 3, 256, 256), 1, "pictures", timed=_BOTH),
    *_both((8, 64, 256, 256), 1, "the outer layers for 256 x 256 pixels", timed=_GPU),
)


BIAS_ACT = _merged(
    (
        Case((0, 4, 3, 3), "empty batch"),
        Case((2, 4, 0, 3), "no pixels"),
        Case((1, 1), "one element"),
        Case((9, 5), "a layer's outputs, rows shorter than a vector"),
        Case((3, 1030), "more channels than a piece of columns"),
        Case((2, 6, 5), "one spatial dimension"),
        Case((1, 3, 1100), "planes of several tiles with an odd tail"),
        Case((2, 3, 4, 5, 6), "video", layout="channels_last_3d"),
        *(
            Case(shape, why, layout=layout, timed=timed)
            for shape, why, timed in (
                ((2, 5, 6, 7), "planes of an odd number of pixels", ()),
                ((3, 7, 3, 3), "planes shorter than a vector", ()),
                ((2, 24, 8, 8), "whole vectors", ()),
                ((1, 32, 4, 4), "the least that is timed", _BOTH),
                ((16, 512, 4, 4), "the first block of StyleGAN2", _BOTH),
                ((8, 128, 64, 64), "a middle block of StyleGAN2", _BOTH),
                ((4, 64, 256, 256), "a late block of StyleGAN2", _GPU),
                ((16, 32, 1024, 1024), "its last block", _GPU),
            )
            for layout in ("contiguous", "channels_last")
        ),
        Case((64, 512), "the mapping network of StyleGAN2", timed=_BOTH),
    )
)


# (batch, heads, tokens, size), each for self-attention and, in U-Nets of latents, for the 77 tokens of a prompt.
_HEADS: Mapping[str, Sequence[tuple[int, int, int, int]]] = {
    "sd15": ((2, 8, 4096, 40), (2, 8, 1024, 80), (2, 8, 256, 160), (2, 8, 64, 160)),
    "sdxl": ((2, 10, 4096, 64), (2, 20, 1024, 64)),
}


def _attention_of(preset: str) -> Iterable[AttentionCase]:
    for batch, heads, tokens, size in _HEADS[preset]:
        for keys, what in ((tokens, "self-attention"), (77, "cross-attention")):
            why = f"{what} in the U-Net of {_NAMES[preset]}"
            yield AttentionCase(batch, heads, tokens, keys, size, why, layout="tokens", presets=(preset,))


GENERAL_ATTENTION = (
    AttentionCase(4, 8, 1024, 1024, 64, "a transformer over the tokens of an image", hidden="causal", timed=_BOTH),
    AttentionCase(4, 8, 1024, 1024, 64, "a window of tokens", hidden="mask", timed=_BOTH),
    AttentionCase(4, 8, 1024, 1024, 64, "heads that share keys", key_heads=2, timed=_BOTH),
    AttentionCase(4, 8, 1, 8192, 64, "the next token", timed=_BOTH),
    AttentionCase(4, 8, 1, 8192, 64, "the next token, heads that share keys", key_heads=2, timed=_BOTH),
)
ATTENTION = _merged(
    (
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
            AttentionCase(
                max(1, 4096 // tokens), 8, tokens, tokens, size, "self-attention", layout="tokens", timed=_GPU
            )
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
        *(case for preset in _HEADS for case in _attention_of(preset)),
    )
)


def _images(
    batch: int,
    heads: int,
    pixels: int,
    size: int,
    why: str,
    timed: tuple[str, ...] = (),
    presets: tuple[str, ...] = (),
) -> tuple[AttentionCase, ...]:
    """A case in each of the two memory formats."""
    return tuple(
        AttentionCase(batch, heads, pixels, pixels, size, why, layout=layout, timed=timed, presets=presets)
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
    *_images(1, 1, 16384, 512, "the decoder of Stable Diffusion's VAE", timed=_GPU, presets=("sdxl",)),
    *_images(1, 1, 4096, 512, "the decoder of Stable Diffusion's VAE at 512 x 512", presets=("sd15",)),
    *_images(128, 1, 256, 256, "the second level of DDPM's U-Net on CIFAR-10", presets=("ddpm-cifar10",)),
    *_images(128, 1, 16, 256, "the middle of DDPM's U-Net on CIFAR-10", presets=("ddpm-cifar10",)),
)


NETWORKS = (
    NetworkCase("ddpm-cifar10", 8, 32, "google/ddpm-cifar10-32, 35.7 M parameters", _BOTH, ("ddpm-cifar10",)),
    NetworkCase("stable-diffusion", 2, 64, "the U-Net of Stable Diffusion 1.5", _GPU, ("sd15",)),
    NetworkCase("stable-diffusion-vae", 1, 64, "its VAE's decoder, to 512 x 512 pixels", presets=("sd15",)),
    NetworkCase("stable-diffusion-vae", 1, 128, "its VAE's decoder, to 1024 x 1024 pixels", _GPU, ("sdxl",)),
)

TRAINING = (
    NetworkCase("vae", 128, 28, "the plugin's VAE on images like MNIST's", _BOTH, ("mnist-vae",)),
    NetworkCase("ddpm", 64, 28, "the plugin's diffusion model on images like MNIST's", _BOTH),
    NetworkCase("ddpm-cifar10", 8, 32, "the plugin's diffusion model with the U-Net for CIFAR-10", _CPU),
    NetworkCase("ddpm-cifar10", 128, 32, "the same with the paper's batches", _GPU, ("ddpm-cifar10",)),
)

MEANFLOW = (
    NetworkCase("unet", 16, 32, "a U-Net with attention on images like those of CIFAR-10", _BOTH),
    NetworkCase("transformer", 16, 32, "a small diffusion transformer on the same, of 256 tokens", _BOTH),
)

SAMPLING = (
    NetworkCase("ddpm-mnist", 8, 28, "images of the size of MNIST's, by the plugin's U-Net", _CPU),
    NetworkCase("ddpm-cifar10", 8, 32, "images of google/ddpm-cifar10-32", _GPU, ("ddpm-cifar10",)),
)


def small(cases: Sequence[SomeCase]) -> list[SomeCase]:
    """The cases that tests run: those that the slow reference draws in milliseconds, and that are no preset's alone."""
    return [case for case in cases if case.elements * (case.draws or 1) <= 1 << 15 and (case.timed or not case.presets)]


def timed(cases: Sequence[SomeCase], device: str) -> list[SomeCase]:
    """The cases that benchmarks time on a kind of device, "cpu" or "cuda"."""
    return [case for case in cases if device in case.timed]
