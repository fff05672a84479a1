"""The contract between a generative model and everything that trains, samples and measures it.

A model plugin is a :class:`ModelPlugin`: data, and one way to build the model. What it builds is a
:class:`GenerativeModel`: an ``nn.Module`` that *says* how it is trained (:meth:`GenerativeModel.phases`)
and how it samples, and leaves the doing to the one trainer and the one command line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from gencore.config import Config, field
from gencore.noise import Key

Family = Literal["vae", "gan", "diffusion", "autoregressive", "other"]


@dataclass(frozen=True)
class ModelConfig(Config):
    """What every model's configuration starts with; the trainer fills both fields from the data set."""

    image_shape: tuple[int, int, int] = field(
        (1, 8, 8), ge=1, doc="channels, height, width of one image", offered=False
    )
    num_classes: int = field(0, ge=0, doc="number of classes of the data set; 0 if it has no labels", offered=False)


class Batch(NamedTuple):
    """One minibatch: ``images`` (B, C, H, W) float32 in [0, 1]; ``labels`` (B,) int64, or None without classes."""

    images: Tensor
    labels: Tensor | None


class Loss(NamedTuple):
    """What a phase's loss function returns: the scalar to minimise and named scalars to log."""

    value: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class Adam(Config):
    """Settings of the Adam optimiser of one phase (Kingma and Ba 2015; decoupled weight decay)."""

    lr: float = field(1e-3, gt=0)
    beta1: float = field(0.9, ge=0, lt=1)
    beta2: float = field(0.999, ge=0, lt=1)
    eps: float = field(1e-8, gt=0)
    weight_decay: float = field(0.0, ge=0)


@dataclass(frozen=True)
class Phase:
    """One part of a training algorithm: these parameters descend this loss, ``repeats`` times per step.

    Each repetition draws its own minibatch and its own key, as in Algorithm 1 of Goodfellow et al. (2014),
    where the discriminator takes k steps before each of the generator's.
    """

    name: str
    parameters: Sequence[nn.Parameter]
    loss: Callable[[Batch, Key], Loss]
    optimizer: Adam = dataclasses.field(default_factory=Adam)
    repeats: int = 1

    def __post_init__(self) -> None:
        # Of a generator, such as ``model.parameters()``, nothing would be left for the second who looks.
        object.__setattr__(self, "parameters", tuple(self.parameters))


class GenerativeModel(nn.Module):
    """Base class of every model: an ``nn.Module`` that describes its training and can sample.

    Everything random is a pure function of the ``key`` that is passed in. Samples of one key are the same
    for any batch split, up to the rounding of the networks' matrix products: sample ``i`` uses the noise of
    ``key.samples(i)``.
    """

    config: ModelConfig
    # The name of the plugin that built it, which errors name; empty for a model that was built by itself.
    plugin_name: str = ""
    # Whether ``sample`` takes labels.
    conditional: bool = False
    # How ``sample`` works, for a model that offers a choice: a Config whose every field has a default. Another of its
    # type may be put in its place, by ``gencore sample --set`` for instance; what the model cannot do is a ConfigError.
    sampling: Config | None = None
    # Whether ``sample`` shows a bar while it works, if it takes long.
    progress: bool = False
    # Whether ``sample`` is to stop where it meets a NaN or infinity, by a FloatingPointError that says where; looking
    # costs a little, and a model may leave it to who takes the samples.
    check_finite: bool = False

    def phases(self) -> Sequence[Phase]:
        """The training algorithm, in the order in which the phases run within a step."""
        raise NotImplementedError

    def sample(self, n: int, key: Key, labels: Tensor | None = None) -> Tensor:
        """``n`` images (n, C, H, W), float32 in [0, 1], on the model's device."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the model's parameters live."""
        return next(self.parameters()).device


def checked_images(images: Any, count: int, config: ModelConfig) -> Tensor:
    """What a model returned as ``count`` images, float32 on the CPU.

    Raises:
        TypeError: it is no tensor of a floating dtype.
        ValueError: it has another shape.
    """
    if not isinstance(images, Tensor) or images.layout is not torch.strided or images.is_nested:
        kind = type(images).__name__ if not isinstance(images, Tensor) else "one of another layout"
        raise TypeError(f"it must return a dense tensor, got {kind}")
    shape = (count, *config.image_shape)
    if images.shape != shape:
        raise ValueError(f"it must return images of shape {shape}, got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"it must return images of a floating dtype, got {images.dtype}")
    return images.detach().float().cpu()


@runtime_checkable
class HasLatents(Protocol):
    """A model that decodes latents drawn from a standard normal prior of shape ``latent_shape``."""

    @property
    def latent_shape(self) -> tuple[int, ...]: ...

    def decode(self, latents: Tensor) -> Tensor: ...


@runtime_checkable
class Autoencodes(HasLatents, Protocol):
    """A model whose latents are a code of images: ``encode`` gives (mean, logvar), ``decode`` the expected image."""

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]: ...


@runtime_checkable
class HasLikelihoodBound(Protocol):
    """A model with a lower bound of log p(x): nats per image (B,).

    More ``num_samples`` make it tighter, or, where each draw is an unbiased estimate of the same bound, more precise.
    """

    def log_likelihood_bound(self, images: Tensor, key: Key, num_samples: int = 1) -> Tensor: ...


@runtime_checkable
class Edits(Protocol):
    """A model that fills in what is missing of images.

    ``edit(images, known, key, labels=None)`` gives images (B, C, H, W) in [0, 1] that are ``images`` where ``known`` is
    1, bit for bit, and the model's where it is 0; ``known`` broadcasts to the images. Image ``i`` uses the noise of
    ``key.samples(i)``; ``labels`` are classes to fill with, if the model is conditional.
    """

    def edit(self, images: Tensor, known: Tensor, key: Key, labels: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True)
class ModelPlugin:
    """What an entry point of the group ``gencore.models`` names: how a model is called, configured and built."""

    name: str
    family: Family
    config: type[ModelConfig]
    build: Callable[[Any], GenerativeModel]
    summary: str = ""
