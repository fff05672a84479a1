"""The contract between a generative model and everything that trains, samples and measures it.

A model plugin is a :class:`ModelPlugin`: data, and one way to build the model. What it builds is a
:class:`GenerativeModel`: an ``nn.Module`` that *says* how it is trained (:meth:`GenerativeModel.phases`)
and how it generates, and leaves the doing to the one trainer and the one command line.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from gencore.arguments import integer
from gencore.config import Config, merged
from gencore.models._checks import check_conditions, check_images, check_known
from gencore.models.modes import evaluating
from gencore.models.optimizers import Optimizer
from gencore.noise import Key
from gencore.spec import Batch, Conditions, Dataset, DataSpec

# Whether a model can do without a condition.
Need = Literal["required", "optional"]

NO_CONDITIONS: Conditions = MappingProxyType({})


@dataclass(frozen=True)
class ModelConfig(Config):
    """Base class of models' configurations."""

    def faults_with(self, spec: DataSpec) -> Iterable[str]:
        """What does not go with images of this kind, a line each."""
        return ()


@dataclass(frozen=True)
class SamplingConfig(Config):
    """Base class of the settings of sampling; every field has a default."""

    # Those that have an effect on samples with conditions only. The command line refuses them without any.
    of_conditions: ClassVar[tuple[str, ...]] = ()


class Step(NamedTuple):
    """What a phase's loss is computed from.

    Attributes:
        batch: the minibatch, on the model's device.
        key: all noise of this loss comes from it; image ``i`` of the batch uses ``key.samples(i)``.
        number: the finished steps of the run; where the loss is measured on test images, those before the last one.
        total: the steps that the run is to have.
    """

    batch: Batch
    key: Key
    number: int = 0
    total: int = 1


class Loss(NamedTuple):
    """What a phase's loss function returns: the scalar to minimise and named scalars to log.

    Both are means over the images of the batch: those of a larger batch are the means of those of its parts. The
    metrics have the same names at every step.
    """

    value: Tensor
    metrics: Mapping[str, Tensor] = MappingProxyType({})


@dataclass(frozen=True)
class Phase:
    """One part of a training algorithm: the parameters of an optimiser descend a loss.

    Attributes:
        name: distinct within the model.
        loss: what to minimise.
        optimizer: by which; phases may share one.
        repeats: times within a step; each draws a minibatch and a key of its own, as in Algorithm 1 of Goodfellow et
            al. (2014), where the discriminator takes k steps before each of the generator's.
        every: steps from one of this phase to the next, beginning with the first; so a penalty can be lazy (Karras et
            al. 2020).
        batch_of: an earlier phase of the step whose last minibatch this one takes, instead of drawing its own. Its
            noise is its own all the same.
        after: called after each step of the optimiser, where there is something that no gradient does, such as cutting
            weights off. All processes call it together.
    """

    name: str
    loss: Callable[[Step], Loss]
    optimizer: Optimizer
    repeats: int = 1
    every: int = 1
    batch_of: str | None = None
    after: Callable[[], None] | None = None


class Draw(NamedTuple):
    """What :meth:`GenerativeModel.generate` makes images from; checked, and on the model's device.

    Attributes:
        n: how many images.
        key: all noise comes from it; image ``i`` uses ``key.samples(i)``.
        conditions: those of the images, of the names that the model takes.
        sampling: how to sample, of the type of :attr:`GenerativeModel.sampling`; None for a model without a choice.
        progress: whether to show on stderr how far it is, if it takes long.
        check_finite: whether to stop where a NaN or an infinity is met, by a FloatingPointError that says where;
            looking costs a little, and a model may leave it to who takes the samples.
    """

    n: int
    key: Key
    conditions: Conditions = NO_CONDITIONS
    sampling: Any = None
    progress: bool = False
    check_finite: bool = False


class GenerativeModel(nn.Module):
    """Base class of every model: an ``nn.Module`` that describes its training and can generate images.

    Everything random is a pure function of the ``key`` that is passed in. Samples of one key are the same
    for any batch split, up to the rounding of the networks' matrix products: sample ``i`` uses the noise of
    ``key.samples(i)``.

    Attributes:
        config: its configuration.
        spec: what the data set gives that it is trained on.
        takes: the conditions of ``spec`` that it uses, by name, and whether it can do without each.
        sampling: how it samples where nothing else is asked for; None for a model without a choice.
        plugin_name: of the plugin that built it, which errors name; empty for a model that was built by itself.
    """

    config: ModelConfig
    spec: DataSpec
    takes: Mapping[str, Need] = MappingProxyType({})
    sampling: SamplingConfig | None = None
    plugin_name: str = ""
    _adopted: tuple[str, ...] = ()

    def __init__(self, config: ModelConfig, spec: DataSpec):
        super().__init__()
        self.config = config
        self.spec = spec

    def phases(self) -> Sequence[Phase]:
        """The training algorithm, in the order in which the phases run within a step. Called after :meth:`start`.

        A model that is whole after :meth:`start` has none.
        """
        raise NotImplementedError

    def generate(self, draw: Draw) -> Tensor:
        """``draw.n`` images (n, C, H, W) in [0, 1]: what :meth:`sample` returns once its arguments are checked.

        Called in evaluation mode and without gradients. A model that cannot generate leaves it out.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot generate images")

    def fill(self, draw: Draw, images: Tensor, known: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] that go with what is known: what :meth:`edit` puts where ``known`` is 0.

        Called in evaluation mode and without gradients. ``known`` is of the images' dtype and broadcasts to them. A
        model that cannot edit leaves it out.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot edit images")

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(*arguments)``: what wraps a module's forward, such as FSDP, sees so what a model computes."""
        return function(*arguments)

    def start(self, load_run: Callable[[Path | str], GenerativeModel], data: Dataset) -> None:
        """Called once, when a new run begins, before its first step; the model is on its device.

        Here a model takes what it needs of another run (by :meth:`adopt`) and measures what it needs of the data. What
        it keeps in parameters and buffers is kept in its checkpoints, and the other run is not needed again.

        Args:
            load_run: gives the trained model of a run's folder.
            data: the training images.
        """

    def adopt(self, name: str, part: GenerativeModel) -> None:
        """Takes a trained model as the frozen submodule ``name``, for :meth:`start` to call.

        Raises:
            TypeError: ``part`` is no model.
            ValueError: no plugin built it, so that it could not be built again when a checkpoint is loaded.
        """
        if not isinstance(part, GenerativeModel):
            raise TypeError(f"part must be a GenerativeModel, got {type(part).__name__}")
        if not part.plugin_name:
            raise ValueError(
                f"part must be the model of a plugin, got a {type(part).__name__} that was built by itself"
            )
        device = part.device
        self.add_module(name, freeze(part))
        self._adopted = (*self._adopted, name)
        self.on_adopt(name, part)
        self.to(device)

    def on_adopt(self, name: str, part: GenerativeModel) -> None:
        """Called with each part that is adopted: here a model builds the networks that depend on it.

        When a checkpoint is loaded, it is called with a model of the same configuration whose weights are yet to come.
        """

    @torch.no_grad()
    def sample(
        self,
        n: int,
        key: Key,
        conditions: Conditions = NO_CONDITIONS,
        *,
        sampling: SamplingConfig | None = None,
        progress: bool = False,
        check_finite: bool = False,
    ) -> Tensor:
        """``n`` images (n, C, H, W), float32 in [0, 1], on the model's device.

        Args:
            n: how many.
            key: image ``i`` uses the noise of ``key.samples(i)``.
            conditions: by name: the class of each image, (n,) int64, where -1 stands for none if the model can do
                without; images (n, C, H, W) in [0, 1]; or n strings.
            sampling: how, in place of :attr:`sampling`.
            progress, check_finite: as in :class:`Draw`.

        Raises:
            TypeError, ValueError: no such ``n`` or ``key``; conditions that the model does not take, that it needs and
                that are missing, or of another dtype, shape or number; ``sampling`` of another type than the model's.
            ConfigError: settings of sampling that the model cannot do.
        """
        draw = self._checked(n, key, conditions, sampling, progress, check_finite)
        with evaluating(self):
            return self.generate(draw)

    @torch.no_grad()
    def edit(
        self,
        images: Tensor,
        known: Tensor,
        key: Key,
        conditions: Conditions = NO_CONDITIONS,
        *,
        sampling: SamplingConfig | None = None,
        progress: bool = False,
        check_finite: bool = False,
    ) -> Tensor:
        """Images (B, C, H, W) in [0, 1]: ``images`` where ``known`` is 1, bit for bit, and the model's where it is 0.

        Args:
            images: (B, C, H, W) in [0, 1], on the model's device.
            known: 0 or 1; broadcasts to the images.
            key: image ``i`` uses the noise of ``key.samples(i)``.
            conditions, sampling, progress, check_finite: as for :meth:`sample`.

        Raises:
            TypeError, ValueError: images of another shape, a ``known`` that does not broadcast to them or holds
                anything but 0 and 1, or as :meth:`sample`.
            ConfigError: settings of sampling that the model cannot edit by.
        """
        check_images(images, self.spec.image_shape)
        check_known(known, images)
        draw = self._checked(len(images), key, conditions, sampling, progress, check_finite)
        with evaluating(self):
            return torch.where(known.bool(), images, self.fill(draw, images, known.to(images.dtype)))

    def _checked(
        self,
        n: int,
        key: Key,
        conditions: Conditions,
        sampling: SamplingConfig | None,
        progress: bool,
        check_finite: bool,
    ) -> Draw:
        """What was asked for, checked."""
        n = integer("n", n, least=0)
        if not isinstance(key, Key):
            raise TypeError(f"key must be a gencore.Key, got {type(key).__name__}; gencore.Key(seed) makes one")
        if sampling is not None and type(sampling) is not type(self.sampling):
            wanted = "None" if self.sampling is None else f"a {type(self.sampling).__name__}"
            raise TypeError(f"sampling must be {wanted}, got {type(sampling).__name__}")
        checked = check_conditions(conditions, n, self.spec, self.takes, self.device)
        return Draw(n, key, checked, self.sampling if sampling is None else sampling, progress, check_finite)

    def train(self, mode: bool = True) -> GenerativeModel:
        """:meth:`torch.nn.Module.train`; frozen parts stay in evaluation mode."""
        super().train(mode)
        for module in self.modules():
            if is_frozen(module):
                nn.Module.train(module, False)
        return self

    @property
    def can_sample(self) -> bool:
        """Whether it generates images."""
        return type(self).generate is not GenerativeModel.generate

    @property
    def can_edit(self) -> bool:
        """Whether it fills in what is missing of images."""
        return type(self).fill is not GenerativeModel.fill

    @property
    def device(self) -> torch.device:
        """Where the model's parameters and buffers live; the CPU if it has none."""
        tensor = next(itertools.chain(self.parameters(), self.buffers()), None)
        return torch.device("cpu") if tensor is None else tensor.device


def freeze(module: nn.Module) -> Any:
    """Takes a module out of the training: no gradients, evaluation mode, no moving average. Returns it."""
    module._gencore_frozen = True  # type: ignore[assignment]
    return nn.Module.train(module.requires_grad_(False), False)


def is_frozen(module: nn.Module) -> bool:
    """Whether :func:`freeze` was called with the module."""
    return getattr(module, "_gencore_frozen", False)


def parts_of(model: GenerativeModel) -> dict[str, GenerativeModel]:
    """The models that a model has adopted, by name."""
    return {name: getattr(model, name) for name in model._adopted}


def checked_images(images: Any, count: int, spec: DataSpec) -> Tensor:
    """What a model returned as ``count`` images, float32 on the CPU.

    Raises:
        TypeError: it is no tensor of a floating dtype.
        ValueError: it has another shape.
    """
    if not isinstance(images, Tensor) or images.layout is not torch.strided or images.is_nested:
        kind = type(images).__name__ if not isinstance(images, Tensor) else "one of another layout"
        raise TypeError(f"it must return a dense tensor, got {kind}")
    shape = (count, *spec.image_shape)
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
    """A model with a lower bound of log p(x), or of log p(x | conditions): nats per image (B,).

    More ``num_samples`` make it tighter, or, where each draw is an unbiased estimate of the same bound, more precise.
    """

    def log_likelihood_bound(self, batch: Batch, key: Key, num_samples: int = 1) -> Tensor: ...


@dataclass(frozen=True)
class ModelPlugin:
    """What an entry point of the group ``gencore.models`` names: how a model is called, configured and built.

    Attributes:
        name: by which it is trained.
        family: what it is listed under, such as "vae" or "flow": a free word.
        config: its settings.
        build: makes the model, as ``build(config, spec)``.
        summary: one line.
        preset_of: the plugin that it is a preset of; None for one of its own.
        defaults: the settings in which it differs from ``config``'s defaults, as :meth:`Config.to_dict` has them.
        train: the same of the trainer's settings, which a run may override like any default.
    """

    name: str
    family: str
    config: type[ModelConfig]
    build: Callable[[Any, DataSpec], GenerativeModel]
    summary: str = ""
    preset_of: str | None = None
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    train: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def preset(
        self, name: str, summary: str, *, train: Mapping[str, Any] = MappingProxyType({}), **defaults: Any
    ) -> ModelPlugin:
        """This plugin under a name of its own, with other defaults: a known system of the family.

        >>> from gencore.models.vae import plugin
        >>> plugin.preset("beta-vae", "VAE with a heavier KL term", beta=4.0).config_of({}).beta
        4.0
        """
        return dataclasses.replace(
            self,
            name=name,
            summary=summary,
            preset_of=self.preset_of or self.name,
            defaults=merged(self.defaults, defaults),
            train=merged(self.train, train),
        )

    def config_of(self, settings: Mapping[str, Any]) -> Any:
        """The configuration with these settings, on top of the plugin's defaults.

        Raises:
            ConfigError: with every fault.
        """
        return self.config.from_dict(merged(self.defaults, settings))
