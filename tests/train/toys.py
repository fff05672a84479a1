"""Plugins for the tests of the trainer alone: phases and optimisers of every kind, nested parts, data read lazily."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from gencore.config import field
from gencore.data import DataError, DatasetPlugin, ImageDataset, NamedDataset, Split
from gencore.models.base import Draw, GenerativeModel, Loss, ModelConfig, ModelPlugin, Phase, Step
from gencore.models.optimizers import SGD, Adam, Optimizer, OptimizerConfig, RMSprop
from gencore.noise import Key, reference_normal
from gencore.spec import Batch, Dataset, DataSpec


@dataclass(frozen=True)
class NAdam(OptimizerConfig):
    """An optimiser that a plugin names."""

    kind = torch.optim.NAdam

    momentum_decay: float = field(4e-3, ge=0)


@dataclass(frozen=True)
class Adafactor(OptimizerConfig):
    """One whose state is smaller than its parameters."""

    kind = torch.optim.Adafactor


@dataclass(frozen=True)
class PhasesConfig(ModelConfig):
    every: int = field(2, ge=1, doc="of the phase that takes the batch of another")


class ToyPhases(GenerativeModel):
    """Four phases: two share an optimiser and a batch, one has groups with settings of their own."""

    config: PhasesConfig

    def __init__(self, config: PhasesConfig, spec: DataSpec):
        super().__init__(config, spec)
        pixels = spec.image_shape[0] * spec.image_shape[1] * spec.image_shape[2]
        self.mean, self.spread = nn.Parameter(torch.zeros(pixels)), nn.Parameter(torch.ones(pixels))
        self.critic = nn.Linear(pixels, 1)
        self.table = nn.Linear(pixels, pixels)

    def phases(self) -> Sequence[Phase]:
        shared = Optimizer([self.mean, self.spread], SGD(lr=1e-2, momentum=0.9))
        weights, biases = RMSprop(lr=1e-2), RMSprop(lr=1e-3, momentum=0.5)
        groups = Optimizer([((self.critic.weight,), weights), ((self.critic.bias,), biases)])
        return [
            Phase("mean", self._mean_loss, shared),
            Phase("spread", self._spread_loss, shared, every=self.config.every, batch_of="mean"),
            Phase("critic", self._critic_loss, groups, repeats=2),
            Phase("table", self._table_loss, Optimizer(self.table.parameters(), NAdam(lr=1e-3))),
        ]

    def _mean_loss(self, step: Step) -> Loss:
        return Loss((step.batch.images.flatten(1) - self.mean).square().mean())

    def _spread_loss(self, step: Step) -> Loss:
        return Loss((step.batch.images.flatten(1) - self._drawn(len(step.batch), step.key)).square().mean())

    def _critic_loss(self, step: Step) -> Loss:
        fake = self._drawn(len(step.batch), step.key).detach()
        real_score, fake_score = self.critic(step.batch.images.flatten(1)), self.critic(fake)
        return Loss((1 - real_score).square().mean() + fake_score.square().mean(), {"score": real_score.mean()})

    def _table_loss(self, step: Step) -> Loss:
        images = step.batch.images.flatten(1)
        return Loss((self.table(images) - images).square().mean())

    def _drawn(self, n: int, key: Key) -> Tensor:
        return self.mean + self.spread * noise(n, len(self.mean), key)

    def generate(self, draw: Draw) -> Tensor:
        return self._drawn(draw.n, draw.key).clamp(0, 1).reshape(-1, *self.spec.image_shape)


def noise(n: int, size: int, key: Key) -> Tensor:
    """(n, size), row ``i`` that of ``key.samples(i)``."""
    return torch.from_numpy(reference_normal((n, size), key))


@dataclass(frozen=True)
class NestedConfig(ModelConfig):
    second: str = field("", doc="folder of a run of toy-stage")


class ToyNested(GenerativeModel):
    """A third stage: what the second one draws, made brighter."""

    config: NestedConfig
    second: GenerativeModel

    def __init__(self, config: NestedConfig, spec: DataSpec):
        super().__init__(config, spec)
        self.gain = nn.Parameter(torch.ones(()))

    def start(self, load_run: Callable[[Path | str], GenerativeModel], data: Dataset) -> None:
        self.adopt("second", load_run(self.config.second))

    def phases(self) -> Sequence[Phase]:
        return [Phase("gain", self._loss, Optimizer([self.gain], Adam(lr=1e-2)))]

    def _loss(self, step: Step) -> Loss:
        made = self.second.generate(Draw(len(step.batch), step.key)) * self.gain
        return Loss((made.mean() - step.batch.images.mean()).square())

    def generate(self, draw: Draw) -> Tensor:
        return (self.second.generate(draw) * self.gain).clamp(0, 1)


class OddError(DataError):
    """An error that is written to another process and cannot be read there."""

    def __init__(self, name: str, number: int):
        super().__init__(f"{name} has {number}")


class LazyBars(NamedDataset):
    """The bars with all that is random in data: mirrored, with a text, and with an image of another domain each.

    A process that reads ahead fails, by this fault, at a minibatch that holds the image ``bad``.
    """

    workers = True

    def __init__(self, split: Split = "train", bad: int = -1, fault: str = ""):
        import gencore_toy

        images, labels = gencore_toy.bars_of(None, split, "lazy-bars")
        texts = [f"bar {label}" for label in labels.tolist()]
        # Not the same left to right, so that it shows which are mirrored.
        images[:, :, 0] //= 2
        self.held = ImageDataset(
            "lazy-bars",
            split,
            images,
            labels,
            gencore_toy.NAMES,
            conditions={"text": texts},
            unpaired={"source": 255 - images[:7]},
            flip=True,
        )
        self.bad, self.fault = bad, fault
        super().__init__("lazy-bars", split, self.held.spec)

    def __len__(self) -> int:
        return len(self.held)

    def batch(self, indices: Tensor, key: Key | None = None) -> Batch:
        if self.bad in indices.tolist() and get_worker_info() is not None:
            self.fail()
        return self.held.batch(indices, key)

    def fail(self) -> None:
        if self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "gone":
            os._exit(3)
        if self.fault == "memory":
            raise MemoryError
        if self.fault == "exit":
            raise SystemExit("enough")
        if self.fault == "odd":
            raise OddError("bars.zip", self.bad)
        if self.fault == "local":

            class LocalError(DataError):
                pass

            raise LocalError("bars.zip: image 9 is damaged")
        if self.fault == "attribute":
            error = DataError("bars.zip: image 9 is damaged", ["9"])
            error.reader = lambda: None  # type: ignore[attr-defined]
            raise error
        raise DataError("bars.zip: image 9 is damaged", ["9.png"]) from OSError("short")


def load_lazy(path: object, split: Split) -> LazyBars:
    return LazyBars(split)


phases = ModelPlugin("toy-phases", "toy", PhasesConfig, ToyPhases, "phases of every kind for tests")
nested = ModelPlugin("toy-nested", "toy", NestedConfig, ToyNested, "a third stage for tests")
lazy_bars = DatasetPlugin("lazy-bars", cast(Callable[..., Dataset], load_lazy), summary="bars that are read lazily")
