"""Augmentation of what the discriminator sees, real images and samples alike, so that few images suffice.

Adaptive discriminator augmentation (ADA): Karras et al., "Training Generative Adversarial Networks with Limited Data"
(2020). The transforms of color, translation and cutout: Zhao et al., "Differentiable Augmentation for Data-Efficient
GAN Training" (2020).

A transform is applied to an image with a probability p, and what it does is a pure function of the key, image by image.
Each is linear in the images, so that it can be differentiated any number of times. Below p = 0.8 or so the samples do
not take over the transforms (Karras et al., section 2.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from gencore import ops
from gencore.config import Config, field
from gencore.noise import Key

Transform = Literal["flip", "rotate", "translate", "color", "cutout"]

# Shares of the image's side: the largest shift, and the side of what is cut out (Zhao et al., section 4.1).
_SHIFT, _CUTOUT = 1 / 8, 1 / 2


@dataclass(frozen=True)
class AugmentationConfig(Config):
    """Settings of :class:`Augmentation`."""

    transforms: tuple[Transform, ...] = field(
        ("flip", "rotate", "translate", "color", "cutout"), doc="what may be done to images"
    )
    probability: float = field(0.0, ge=0, le=1, doc="of each transform, at the start")
    target: float | None = field(
        0.6, gt=-1, lt=1, doc="the probability moves until the mean sign of D(real) is this; none: it does not"
    )
    images: int = field(500_000, ge=1, doc="images over which it moves from 0 to 1, at the quickest")
    every: int = field(4, ge=1, doc="minibatches between two moves")
    final: float | None = field(
        None, ge=0, le=1, doc="target=none: the probability at the end, by half a cosine; none: constant"
    )

    def check(self) -> Iterable[str]:
        if not self.transforms:
            yield "transforms: must not be empty, was ()"
        if len(set(self.transforms)) < len(self.transforms):
            yield f"transforms: must be different, was {self.transforms}"
        if self.final is not None and self.target is not None:
            yield f"final: must be none with a target, which moves the probability, was {self.final}"


def flip(images: Tensor, draws: Tensor) -> Tensor:
    """Half of the images mirrored, left to right."""
    return torch.where(_column(draws, 0) < 0.5, images.flip(3), images)


def rotate(images: Tensor, draws: Tensor) -> Tensor:
    """Square images turned by 0, 90, 180 or 270 degrees."""
    quarter = _column(draws, 0) * 4
    turned = images
    for turns in (1, 2, 3):
        turned = torch.where((quarter >= turns) & (quarter < turns + 1), images.rot90(turns, (2, 3)), turned)
    return turned


def translate(images: Tensor, draws: Tensor) -> Tensor:
    """Shifted by whole pixels, an eighth of the side at most, with zeros where the image is not."""
    padded = F.pad(images, (1, 1, 1, 1))
    for column, dim in ((0, 2), (1, 3)):
        size = images.shape[dim]
        most = math.floor(size * _SHIFT + 0.5)
        shift = (draws[:, column] * (2 * most + 1)).floor().long() - most
        # Row 0 and the last one are zeros, those of all that lies outside.
        index = (torch.arange(size + 2, device=images.device) - shift[:, None]).clamp(0, size + 1)
        shape = [1, 1, 1, 1]
        shape[0], shape[dim] = len(images), size + 2
        padded = padded.gather(dim, index.reshape(shape).expand_as(padded))
    return padded[:, :, 1:-1, 1:-1]


def color(images: Tensor, draws: Tensor) -> Tensor:
    """Brightness + [-1/2, 1/2), saturation x [0, 2), contrast x [1/2, 3/2)."""
    images = images + _column(draws, 0).to(images.dtype) - 0.5
    gray = images.mean(1, keepdim=True)
    images = gray + (images - gray) * (2 * _column(draws, 1)).to(images.dtype)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * (_column(draws, 2) + 0.5).to(images.dtype)


def cutout(images: Tensor, draws: Tensor) -> Tensor:
    """A square of half the side is zero, anywhere, so far as it lies in the image."""
    outside = torch.zeros((), dtype=torch.bool, device=images.device)
    for column, dim in ((0, 2), (1, 3)):
        size = images.shape[dim]
        length = math.floor(size * _CUTOUT + 0.5)
        middle = (_column(draws, column) * (size + 1 - length % 2)).floor()
        shape = [1, 1, 1, 1]
        shape[dim] = size
        offset = torch.arange(size, device=images.device).reshape(shape) - middle + length // 2
        outside = outside | (offset < 0) | (offset >= length)
    return images * outside.to(images.dtype)


# In the order in which they are applied.
_TRANSFORMS: Mapping[Transform, tuple[int, Callable[[Tensor, Tensor], Tensor]]] = MappingProxyType(
    {
        "flip": (0, flip),
        "rotate": (1, rotate),
        "translate": (2, translate),
        "color": (3, color),
        "cutout": (4, cutout),
    }
)


def augmented(images: Tensor, probability: Tensor | float, key: Key, transforms: Sequence[Transform]) -> Tensor:
    """``images`` (B, C, H, W) in [-1, 1], each with each of the transforms with this probability, independently.

    Image ``i`` is changed as ``key.samples(i)`` says, in streams 0 to 4.
    """
    for name, (stream, transform) in _TRANSFORMS.items():
        if name in transforms:
            # In float64, a product with a small whole number stays below that number.
            draws = ops.uniform((len(images), 4), key.stream(stream), dtype=torch.float64, device=images.device)
            images = torch.where(_column(draws, 3) < probability, transform(images, draws), images)
    return images


def _column(draws: Tensor, column: int) -> Tensor:
    return draws[:, column].reshape(-1, 1, 1, 1)


class Augmentation(nn.Module):
    """The transforms with their probability p, which follows the discriminator.

    Overfitting shows in r_t = E[sign(D(real))] (Karras et al. 2020, equation 1): 0 without any, 1 if D knows every
    training image. Every few minibatches, p goes up if r_t is above the target and down if below, by so much that it
    moves from 0 to 1 in a given number of images. What it follows is a state of the run: it is in the checkpoints, and
    is that of all processes together.
    """

    probability: Tensor
    signs: Tensor
    minibatches: Tensor
    pending: Tensor

    def __init__(self, config: AugmentationConfig):
        super().__init__()
        self.config = config
        self.register_buffer("probability", torch.tensor(config.probability))
        # The sum of the signs and their number, and the minibatches since the last move.
        self.register_buffer("signs", torch.zeros(2))
        self.register_buffer("minibatches", torch.zeros((), dtype=torch.int64))
        # Of the minibatch under way, in this process alone; it is empty whenever a checkpoint is written.
        self.register_buffer("pending", torch.zeros(2), persistent=False)

    def forward(self, images: Tensor, key: Key) -> Tensor:
        """The images with the transforms, (B, C, H, W) in [-1, 1]; in evaluation mode, as they are."""
        return augmented(images, self.probability, key, self.config.transforms) if self.training else images

    @torch.no_grad()
    def schedule(self, progress: float) -> None:
        """Sets p for ``progress`` of the training, from 0 to 1, if there is a schedule."""
        if self.training and self.config.final is not None:
            self.probability.fill_(cosine(self.config.probability, self.config.final, progress))

    @torch.no_grad()
    def observe(self, margins: Tensor) -> None:
        """Counts the signs of D(real), (B,), of a part of a minibatch."""
        if self.training and self.config.target is not None:
            self.pending += torch.stack((margins.sign().float().sum(), self.pending.new_tensor(len(margins))))

    @torch.no_grad()
    def follow(self) -> None:
        """Ends a minibatch; moves p if it is time. All processes call it together."""
        config = self.config
        if config.target is None:
            return
        if dist.is_available() and dist.is_initialized():
            # Whole numbers: the sum is the same in any order.
            dist.all_reduce(self.pending)
        self.signs += self.pending
        self.pending.zero_()
        self.minibatches += 1
        if int(self.minibatches) < config.every:
            return
        signs, seen = self.signs.unbind()
        move = (signs / seen.clamp(min=1) - config.target).sign() * seen / config.images
        self.probability.add_(move).clamp_(0, 1)
        self.signs.zero_()
        self.minibatches.zero_()


def cosine(first: float, last: float, progress: float) -> float:
    """From ``first`` to ``last`` by half a cosine, as ``progress`` goes from 0 to 1."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
