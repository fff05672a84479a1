"""Plugins for the tests of trainer and command line: small, quick, with every feature that a checkpoint must carry."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gencore.config import ConfigError, field
from gencore.data import DataError, DatasetPlugin, ImageDataset
from gencore.models.base import Draw, GenerativeModel, Loss, ModelConfig, ModelPlugin, Phase, Step
from gencore.models.optimizers import Adam, Optimizer
from gencore.noise import Key, reference_normal
from gencore.spec import Batch, Dataset, DataSpec


@dataclass(frozen=True)
class ToyConfig(ModelConfig):
    hidden: int = field(16, ge=1, doc="units")
    latent: int = field(3, ge=1, doc="size of the code")
    lr: float = field(1e-2, gt=0, doc="learning rate")
    dropout: float = field(0.1, ge=0, lt=1, doc="share of units; drawn from torch's generator, unlike all other noise")
    batch_norm: bool = field(True, doc="normalize over the batch")
    explode_at: int = field(-1, doc="draw of the data at which the critic's loss becomes NaN; -1: never")


def normal(n: int, size: int, key: Key) -> Tensor:
    """(n, size) noise, row ``i`` that of ``key.samples(i)``."""
    return torch.from_numpy(reference_normal((n, size), key))


def pixels_of(spec: DataSpec) -> int:
    channels, height, width = spec.image_shape
    return channels * height * width


class Toy(GenerativeModel):
    """A variational autoencoder with batch norm and dropout, and a critic with a phase of its own."""

    config: ToyConfig

    def __init__(self, config: ToyConfig, spec: DataSpec):
        super().__init__(config, spec)
        pixels = pixels_of(spec)
        self.encoder = nn.Sequential(
            nn.Linear(pixels, config.hidden),
            nn.BatchNorm1d(config.hidden) if config.batch_norm else nn.Identity(),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, 2 * config.latent),
        )
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
            Phase("critic", self._critic_loss, Optimizer(self.critic.parameters(), adam), repeats=2),
            Phase("autoencoder", self._autoencoder_loss, Optimizer(autoencoder, adam)),
        ]

    def _critic_loss(self, step: Step) -> Loss:
        with torch.no_grad():
            fake = self._drawn(len(step.batch), step.key)
        real_score, fake_score = self.critic(step.batch.images.flatten(1)), self.critic(fake.flatten(1))
        loss = (1 - real_score).square().mean() + fake_score.square().mean()
        self.draws += self.training
        if self.draws == self.config.explode_at:
            loss = loss * float("nan")
        return Loss(loss, {"score": (real_score - fake_score).mean()})

    def _autoencoder_loss(self, step: Step) -> Loss:
        bound, rate = self._bound(step.batch.images, step.key)
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
        return torch.sigmoid(self.decoder(latents)).reshape(-1, *self.spec.image_shape)

    def log_likelihood_bound(self, batch: Batch, key: Key, num_samples: int = 1) -> Tensor:
        bounds = torch.stack([self._bound(batch.images, key.stream(s))[0] for s in range(num_samples)])
        return torch.logsumexp(bounds, 0) - torch.log(torch.tensor(float(num_samples)))

    def generate(self, draw: Draw) -> Tensor:
        return self._drawn(draw.n, draw.key)

    def _drawn(self, n: int, key: Key) -> Tensor:
        return self.decode(normal(n, self.config.latent, key))


class ToySampler(GenerativeModel):
    """A model that can do nothing but sample, with classes if there are any: each is brighter than the one before."""

    config: ToyConfig

    def __init__(self, config: ToyConfig, spec: DataSpec):
        super().__init__(config, spec)
        self.takes = {"label": "optional"} if "label" in spec else {}
        self.mean = nn.Parameter(torch.zeros(spec.image_shape))

    def phases(self) -> Sequence[Phase]:
        return [Phase("mean", self._loss, Optimizer([self.mean], Adam(lr=self.config.lr)))]

    def _loss(self, step: Step) -> Loss:
        return Loss((step.batch.images - self.mean).square().mean())

    def generate(self, draw: Draw) -> Tensor:
        noise = normal(draw.n, pixels_of(self.spec), draw.key).reshape(-1, *self.spec.image_shape)
        labels = draw.conditions.get("label")
        # No class, -1, is as dark as the first.
        shift = 0.1 * labels.clamp(min=0)[:, None, None, None] if isinstance(labels, Tensor) else 0
        return (self.mean + 0.05 * noise + shift).clamp(0, 1)


@dataclass(frozen=True)
class TranslatorConfig(ToyConfig):
    def faults_with(self, spec: DataSpec) -> Iterable[str]:
        if "source" not in spec:
            yield "source: must be given by the data set, as toy-pairs does"


class ToyTranslator(GenerativeModel):
    """A model that makes an image of another one."""

    config: TranslatorConfig
    takes = {"source": "required"}  # noqa: RUF012

    def __init__(self, config: TranslatorConfig, spec: DataSpec):
        super().__init__(config, spec)
        channels, height, width = spec["source"].shape or spec.image_shape
        self.network = nn.Linear(channels * height * width, pixels_of(spec))

    def phases(self) -> Sequence[Phase]:
        return [Phase("network", self._loss, Optimizer(self.network.parameters(), Adam(lr=self.config.lr)))]

    def _loss(self, step: Step) -> Loss:
        made = self._made(cast(Tensor, step.batch.conditions["source"]))
        return Loss((step.batch.images - made).square().mean())

    def _made(self, source: Tensor) -> Tensor:
        return torch.sigmoid(self.network(source.flatten(1))).reshape(-1, *self.spec.image_shape)

    def generate(self, draw: Draw) -> Tensor:
        noise = normal(draw.n, pixels_of(self.spec), draw.key).reshape(-1, *self.spec.image_shape)
        return (self._made(cast(Tensor, draw.conditions["source"])) + 0.02 * noise).clamp(0, 1)


class ToyCaptions(GenerativeModel):
    """A model that makes an image of a text, whose bytes it looks up."""

    config: ToyConfig
    takes = {"text": "required"}  # noqa: RUF012

    def __init__(self, config: ToyConfig, spec: DataSpec):
        super().__init__(config, spec)
        self.bytes = nn.EmbeddingBag(256, config.hidden)
        self.network = nn.Linear(config.hidden, pixels_of(spec))

    def phases(self) -> Sequence[Phase]:
        return [Phase("text", self._loss, Optimizer(self.parameters(), Adam(lr=self.config.lr)))]

    def _loss(self, step: Step) -> Loss:
        made = self._made(cast(Sequence[str], step.batch.conditions["text"]))
        return Loss((step.batch.images - made).square().mean())

    def _made(self, texts: Sequence[str]) -> Tensor:
        # An empty text has no bytes, of which the mean is 0.
        coded = [text.encode() for text in texts]
        offsets = torch.tensor([0, *(len(text) for text in coded)]).cumsum(0)[:-1]
        of_texts = self.bytes(torch.tensor(list(b"".join(coded)), dtype=torch.int64), offsets)
        return torch.sigmoid(self.network(of_texts)).reshape(-1, *self.spec.image_shape)

    def generate(self, draw: Draw) -> Tensor:
        noise = normal(draw.n, pixels_of(self.spec), draw.key).reshape(-1, *self.spec.image_shape)
        return (self._made(cast(Sequence[str], draw.conditions["text"])) + 0.02 * noise).clamp(0, 1)


@dataclass(frozen=True)
class StageConfig(ModelConfig):
    first: str = field("", doc="folder of a run of toy, whose codes are learned")
    lr: float = field(1e-2, gt=0, doc="learning rate")


class ToyStage(GenerativeModel):
    """A second stage: learns where the codes of a trained autoencoder lie, in units of their scale."""

    config: StageConfig
    first: Toy
    scale: Tensor

    def __init__(self, config: StageConfig, spec: DataSpec):
        super().__init__(config, spec)
        self.register_buffer("scale", torch.ones(()))

    def start(self, load_run: Callable[[Path | str], GenerativeModel], data: Dataset) -> None:
        if not self.config.first:
            raise ConfigError("toy-stage", ["first: must be the folder of a run of toy, was ''"])
        self.adopt("first", load_run(self.config.first))
        with torch.no_grad():
            images = data.batch(torch.arange(len(data))).images.to(self.device)
            self.scale.copy_(self.first.encode(images)[0].std())

    def on_adopt(self, name: str, part: GenerativeModel) -> None:
        self.center = nn.Parameter(torch.zeros(cast(Toy, part).latent_shape, device=part.device))

    def phases(self) -> Sequence[Phase]:
        return [Phase("codes", self._loss, Optimizer([self.center], Adam(lr=self.config.lr)))]

    def _loss(self, step: Step) -> Loss:
        codes = self.first.encode(step.batch.images)[0] / self.scale
        return Loss((codes - self.center).square().mean())

    def generate(self, draw: Draw) -> Tensor:
        noise = normal(draw.n, len(self.center), draw.key)
        return self.first.decode((self.center + noise) * self.scale)


class ToyMean(GenerativeModel):
    """A model that is whole once the data are measured: there is nothing to train."""

    config: ToyConfig

    def __init__(self, config: ToyConfig, spec: DataSpec):
        super().__init__(config, spec)
        self.register_buffer("mean", torch.zeros(spec.image_shape))

    def start(self, load_run: Callable[[Path | str], GenerativeModel], data: Dataset) -> None:
        self.mean.copy_(data.batch(torch.arange(len(data))).images.mean(0))

    def phases(self) -> Sequence[Phase]:
        return []

    def generate(self, draw: Draw) -> Tensor:
        noise = normal(draw.n, pixels_of(self.spec), draw.key).reshape(-1, *self.spec.image_shape)
        return (self.mean + 0.05 * noise).clamp(0, 1)


def load_bars(path: object, split: str) -> ImageDataset:
    """Images with one bright row or column: 8 classes; 60 to train, 40 darker ones to test."""
    images, labels = bars_of(path, split, "bars")
    if os.environ.get("GENCORE_TOY_NO_LABELS"):
        return ImageDataset("bars", split, images)
    return ImageDataset("bars", split, images, labels, NAMES)


def load_pairs(path: object, split: str) -> ImageDataset:
    """The bars, each beside its negative."""
    images, labels = bars_of(path, split, "toy-pairs")
    return ImageDataset("toy-pairs", split, images, labels, NAMES, conditions={"source": 255 - images})


def load_texts(path: object, split: str) -> ImageDataset:
    """The bars, each with a text: ``row 2``, ``column 0``."""
    images, labels = bars_of(path, split, "toy-texts")
    texts = [f"{'row' if label < 4 else 'column'} {label % 4}" for label in labels.tolist()]
    return ImageDataset("toy-texts", split, images, conditions={"text": texts})


NAMES = [f"bar{i}" for i in range(8)]


def bars_of(path: object, split: str, name: str) -> tuple[Tensor, Tensor]:
    if path is not None:
        raise DataError(f"data set {name} takes no path, got {path}")
    count, brightest = (60, 255) if split == "train" else (40, 200)
    images = torch.zeros(count, 1, 4, 4, dtype=torch.uint8)
    labels = torch.arange(count) % 8
    for i, label in enumerate(labels.tolist()):
        if label < 4:
            images[i, 0, label] = brightest - i
        else:
            images[i, 0, :, label - 4] = brightest - i
    return images, labels


toy = ModelPlugin("toy", "vae", ToyConfig, Toy, "an autoencoder for tests")
toy_sampler = ModelPlugin("toy-sampler", "gan", ToyConfig, ToySampler, "a sampler for tests")
toy_translator = ModelPlugin("toy-translator", "translation", TranslatorConfig, ToyTranslator, "a translator for tests")
toy_captions = ModelPlugin("toy-captions", "text", ToyConfig, ToyCaptions, "a model with texts for tests")
toy_stage = ModelPlugin("toy-stage", "stages", StageConfig, ToyStage, "a second stage for tests")
toy_mean = ModelPlugin("toy-mean", "mean", ToyConfig, ToyMean, "a model without training for tests")
bars = DatasetPlugin("bars", load_bars, summary="bars for tests")
toy_pairs = DatasetPlugin("toy-pairs", load_pairs, summary="pairs of bars for tests")
toy_texts = DatasetPlugin("toy-texts", load_texts, summary="bars with texts for tests")
