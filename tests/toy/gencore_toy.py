"""Plugins for the tests of trainer and command line: small, quick, with every feature that a checkpoint must carry."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gencore.config import field
from gencore.data import DataError, DatasetPlugin, ImageDataset
from gencore.models.base import Adam, Batch, GenerativeModel, Loss, ModelConfig, ModelPlugin, Phase
from gencore.noise import Key, reference_normal


@dataclass(frozen=True)
class ToyConfig(ModelConfig):
    hidden: int = field(16, ge=1, doc="units")
    latent: int = field(3, ge=1, doc="size of the code")
    lr: float = field(1e-2, gt=0, doc="learning rate")
    explode_at: int = field(-1, doc="draw of the data at which the critic's loss becomes NaN; -1: never")


def normal(n: int, size: int, key: Key) -> Tensor:
    return torch.from_numpy(reference_normal((n, size), key))


class Toy(GenerativeModel):
    """A variational autoencoder with batch norm and dropout, and a critic with a phase of its own."""

    def __init__(self, config: ToyConfig):
        super().__init__()
        self.config: ToyConfig = config
        pixels = config.image_shape[0] * config.image_shape[1] * config.image_shape[2]
        self.encoder = nn.Sequential(
            nn.Linear(pixels, config.hidden), nn.BatchNorm1d(config.hidden), nn.ReLU(), nn.Dropout(0.1),
            nn.Linear(config.hidden, 2 * config.latent),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(config.latent, config.hidden), nn.ReLU(), nn.Linear(config.hidden, pixels)
        )
        self.critic = nn.Linear(pixels, 1)
        self.draws = 0

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return (self.config.latent,)

    def phases(self) -> Sequence[Phase]:
        autoencoder = [*self.encoder.parameters(), *self.decoder.parameters()]
        adam = Adam(lr=self.config.lr)
        return [
            Phase("critic", list(self.critic.parameters()), self._critic_loss, adam, repeats=2),
            Phase("autoencoder", autoencoder, self._autoencoder_loss, adam),
        ]

    def _critic_loss(self, batch: Batch, key: Key) -> Loss:
        fake = self.sample(len(batch.images), key)
        score = self.critic(batch.images.flatten(1)).mean() - self.critic(fake.flatten(1)).mean()
        self.draws += 1
        if self.draws == self.config.explode_at:
            score = score * float("nan")
        return Loss(score.square(), {"score": score})

    def _autoencoder_loss(self, batch: Batch, key: Key) -> Loss:
        bound, rate = self._bound(batch.images, key)
        return Loss(-bound.mean(), {"rate": rate.mean()})

    def _bound(self, images: Tensor, key: Key) -> tuple[Tensor, Tensor]:
        mu, logvar = self.encode(images)
        z = mu + (logvar / 2).exp() * normal(len(mu), self.config.latent, key)
        logits = self.decoder(z)
        rate = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)
        distortion = F.binary_cross_entropy_with_logits(logits, images.flatten(1), reduction="none").sum(1)
        return -distortion - rate, rate

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.encoder(images.flatten(1)).chunk(2, dim=1)
        return mu, logvar

    def decode(self, latents: Tensor) -> Tensor:
        return torch.sigmoid(self.decoder(latents)).reshape(-1, *self.config.image_shape)

    def log_likelihood_bound(self, images: Tensor, key: Key, num_samples: int = 1) -> Tensor:
        bounds = torch.stack([self._bound(images, key.stream(s))[0] for s in range(num_samples)])
        return torch.logsumexp(bounds, 0) - torch.log(torch.tensor(float(num_samples)))

    @torch.no_grad()
    def sample(self, n: int, key: Key, labels: Tensor | None = None) -> Tensor:
        return self.decode(normal(n, self.config.latent, key))


class ToySampler(GenerativeModel):
    """A model that can do nothing but sample, with classes."""

    conditional = True

    def __init__(self, config: ToyConfig):
        super().__init__()
        self.config: ToyConfig = config
        self.mean = nn.Parameter(torch.zeros(config.image_shape))

    def phases(self) -> Sequence[Phase]:
        return [Phase("mean", [self.mean], self._loss, Adam(lr=self.config.lr))]

    def _loss(self, batch: Batch, key: Key) -> Loss:
        return Loss((batch.images - self.mean).square().mean(), {})

    @torch.no_grad()
    def sample(self, n: int, key: Key, labels: Tensor | None = None) -> Tensor:
        size = self.mean.numel()
        noise = normal(n, size, key).reshape(n, *self.config.image_shape)
        shift = 0 if labels is None else 0.1 * labels[:, None, None, None]
        return (self.mean + 0.05 * noise + shift).clamp(0, 1)


def load_bars(path: object, split: str) -> ImageDataset:
    """Images with one bright row or column: 8 classes; 60 to train, 40 darker ones to test."""
    if path is not None:
        raise DataError(f"data set bars takes no path, got {path}")
    count, brightest = (60, 255) if split == "train" else (40, 200)
    images = torch.zeros(count, 1, 4, 4, dtype=torch.uint8)
    labels = torch.arange(count) % 8
    for i, label in enumerate(labels.tolist()):
        if label < 4:
            images[i, 0, label] = brightest - i
        else:
            images[i, 0, :, label - 4] = brightest - i
    if os.environ.get("GENCORE_TOY_NO_LABELS"):
        return ImageDataset("bars", split, images)
    return ImageDataset("bars", split, images, labels, [f"bar{i}" for i in range(8)])


toy = ModelPlugin("toy", "vae", ToyConfig, Toy, "an autoencoder for tests")
toy_sampler = ModelPlugin("toy-sampler", "gan", ToyConfig, ToySampler, "a sampler for tests")
bars = DatasetPlugin("bars", load_bars, summary="bars for tests")
