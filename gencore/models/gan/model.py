"""Generative adversarial networks: Goodfellow et al., "Generative Adversarial Nets" (2014), and what came of them.

A system is a choice of networks, an objective, penalties, conditions and augmentation; the presets name those that are
known.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gencore import ops
from gencore.config import ConfigError
from gencore.models._checks import check_latents
from gencore.models.base import Draw, GenerativeModel, Loss, Phase, Step
from gencore.models.gan.augmentation import Augmentation, cosine
from gencore.models.gan.config import GANConfig, WGANConfig
from gencore.models.gan.objectives import OBJECTIVES, figures
from gencore.models.gan.penalties import clip_weights, gradient_penalty, squared_gradient
from gencore.models.gan.players import Discriminator, Generator
from gencore.models.optimizers import Optimizer
from gencore.noise import Key
from gencore.spec import Batch, Conditions, DataSpec

# One stream of the key per purpose, so that no two draws of a step share noise.
STREAM_LATENTS = 0
STREAM_LABELS = 1
STREAM_BETWEEN = 2
# Folded into the key, for what the discriminator sees: within each, every dropout and every transform has a stream.
_REAL, _FAKE, _BETWEEN = (int.from_bytes(name, "big") for name in (b"real", b"fake", b"between"))
_AUGMENT = int.from_bytes(b"augment", "big")


class GAN(GenerativeModel):
    """A generator G: z ~ N(0, I) -> image, and a discriminator D: image -> logit or score.

    They play the game of the objective by Algorithm 1: ``discriminator_steps`` steps of D, then one of G. Both may be
    told the class of the images, both losses see augmented images, and D's gradient is penalised, in its own loss or
    in a phase of its own every few steps.

    Everything random is a pure function of the key, dropout too: sample ``i`` uses the noise of ``key.samples(i)``.
    With batch norm the losses depend on the whole minibatch; samples never do.
    """

    config: GANConfig | WGANConfig

    def __init__(self, config: GANConfig | WGANConfig, spec: DataSpec):
        super().__init__(config, spec)
        conditioning = config.conditioning_of(spec)
        classes = spec.first("class") if conditioning != "none" else None
        self.class_condition = "" if classes is None else classes.name
        self.num_classes = 0 if classes is None else len(classes.names)
        if classes is not None:
            self.takes = {classes.name: "optional"}
        self.objective = OBJECTIVES[config.objective]
        self.generator = Generator(config, spec.image_shape, conditioning, self.num_classes)
        self.discriminator = Discriminator(config, spec.image_shape, conditioning, self.num_classes)
        # Convolutions are quicker in this order of memory, on CPUs and on GPUs.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.augmentation = None if config.augmentation is None else Augmentation(config.augmentation)
        self._has_batch_norm = any(isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) for module in self.modules())

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(latent_size,)"""
        return (self.config.latent_size,)

    def decode(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """The generator's images, (B, C, H, W) float32 in [0, 1], for latents (B, latent_size).

        Args:
            latents: from a standard normal distribution.
            labels: of a model with classes, (B,) int64; None takes the first class for all.

        Raises:
            ValueError: latents of another shape.
        """
        check_latents(latents, self.config.latent_size)
        if labels is None and self.num_classes:
            labels = torch.zeros(len(latents), dtype=torch.int64, device=latents.device)
        images: Tensor = self.generator(latents, labels)
        return (images + 1) / 2

    def generate(self, draw: Draw) -> Tensor:
        """The images of latents drawn from the prior; see :meth:`GenerativeModel.generate`.

        An image without a class has one that is drawn from the key, each as likely as any other.
        """
        labels = self._labels(draw.conditions, draw.n, draw.key)
        return self.decode(self._latents(draw.n, draw.key), labels)

    def phases(self) -> Sequence[Phase]:
        """Algorithm 1: the discriminator, ``discriminator_steps`` times, then the generator.

        A lazy penalty is a phase of its own in between, every few steps, with the discriminator's optimiser (Karras et
        al., "Analyzing and Improving the Image Quality of StyleGAN" (2020), appendix B).
        """
        config = self.config
        optimizer = Optimizer(self.discriminator.parameters(), config.discriminator_optimizer)
        phases = [
            Phase(
                "discriminator",
                self._discriminator_loss,
                optimizer,
                repeats=config.discriminator_steps,
                after=self._after_discriminator,
            ),
            Phase(
                "generator", self._generator_loss, Optimizer(self.generator.parameters(), config.generator_optimizer)
            ),
        ]
        if config.penalty_every > 1:
            penalty = Phase(
                "penalty",
                self._penalty_loss,
                optimizer,
                every=config.penalty_every,
                batch_of="discriminator",
                after=self._clip,
            )
            phases.insert(1, penalty)
        return phases

    def _latents(self, n: int, key: Key) -> Tensor:
        return ops.normal((n, self.config.latent_size), key.stream(STREAM_LATENTS), device=self.device)

    def _labels(self, conditions: Conditions, n: int, key: Key) -> Tensor | None:
        """The classes that are given; those that are not, drawn from the key."""
        if not self.num_classes:
            return None
        # In float64, the product stays below the number of classes: uniform() is at most 1 - 2^-24.
        draws = ops.uniform((n,), key.stream(STREAM_LABELS), dtype=torch.float64, device=self.device)
        drawn = (draws * self.num_classes).long()
        given = conditions.get(self.class_condition)
        return drawn if given is None else torch.where(given < 0, drawn, given)  # type: ignore[operator, arg-type]

    def _fakes(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """Samples in [-1, 1], and their classes, which are those of the minibatch."""
        n = len(step.batch)
        is_alone = not (dist.is_available() and dist.is_initialized())
        if self.training and self._has_batch_norm and n == 1 and is_alone:
            raise ConfigError(
                self.plugin_name or "gan",
                ["train.batch_size: must be at least 2 images for each part of a minibatch with batch norm, was 1"],
            )
        labels = self._labels(step.batch.conditions, n, step.key)
        fakes: Tensor = self.generator(self._latents(n, step.key), labels)
        return fakes, labels

    def _judged(self, images: Tensor, labels: Tensor | None, key: Key, which: int) -> Tensor:
        """D's outputs (B,) for images in [-1, 1], augmented."""
        key = key.fold_in(which)
        if self.augmentation is not None:
            images = self.augmentation(images, key.fold_in(_AUGMENT))
        output: Tensor = self.discriminator(images, labels, key if self.config.dropout else None)
        return output

    def _discriminator_loss(self, step: Step) -> Loss:
        """The objective's, and the penalties unless they are lazy."""
        config = self.config
        if self.augmentation is not None:
            self.augmentation.schedule(_progress(step))
        with torch.no_grad():
            fakes, labels = self._fakes(step)
        images, is_penalised = _centred(step.batch), config.penalty_every == 1
        images.requires_grad_(is_penalised and config.r1 > 0)
        fakes.requires_grad_(is_penalised and config.r2 > 0)
        real = self._judged(images, labels, step.key, _REAL)
        fake = self._judged(fakes, labels, step.key, _FAKE)
        if self.augmentation is not None:
            self.augmentation.observe(self.objective.margins(real, fake)[0])
        loss = self.objective.discriminator(real, fake, config.label_smoothing).mean()
        metrics = figures(self.objective, real, fake)
        if self.augmentation is not None:
            metrics["augmentation"] = self.augmentation.probability.clone()
        if is_penalised:
            penalty, told = self._penalties(step, (images, real), (fakes, fake), labels)
            loss, metrics = loss + penalty, metrics | told
        return Loss(loss, metrics)

    def _penalty_loss(self, step: Step) -> Loss:
        """The lazy penalties, whose weights are as many times larger as they are rarer."""
        config = self.config
        with torch.no_grad():
            fakes, labels = self._fakes(step)
        images = _centred(step.batch).requires_grad_()
        fakes.requires_grad_()
        real = self._judged(images, labels, step.key, _REAL) if config.r1 else None
        fake = self._judged(fakes, labels, step.key, _FAKE) if config.r2 else None
        penalty, metrics = self._penalties(step, (images, real), (fakes, fake), labels)
        return Loss(penalty * config.penalty_every, metrics)

    def _penalties(
        self, step: Step, real: tuple[Tensor, Tensor | None], fake: tuple[Tensor, Tensor | None], labels: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the penalties, and the figure of each; real and fake are images with D's outputs."""
        config = self.config
        share = 1.0 if config.penalty_final == 1 else cosine(1.0, config.penalty_final, _progress(step))
        total, told = real[0].new_zeros(()), {}
        for name, gamma, (images, outputs) in (("r1", config.r1, real), ("r2", config.r2, fake)):
            if gamma and outputs is not None:
                penalty = squared_gradient(outputs, images).mean()
                total, told[name] = total + share * gamma / 2 * penalty, penalty.detach()
        if config.gradient_penalty:
            penalty = gradient_penalty(
                lambda images: self._judged(images, labels, step.key, _BETWEEN),
                real[0],
                fake[0],
                step.key.stream(STREAM_BETWEEN),
            ).mean()
            total, told["gradient_penalty"] = total + config.gradient_penalty * penalty, penalty.detach()
        return total, told

    def _generator_loss(self, step: Step) -> Loss:
        """The objective's; one of pairs judges the minibatch's images too, without a gradient."""
        if self.augmentation is not None:
            self.augmentation.schedule(_progress(step))
        fakes, labels = self._fakes(step)
        fake = self._judged(fakes, labels, step.key, _FAKE)
        real = fake.detach()
        if self.objective.is_paired:
            with torch.no_grad():
                real = self._judged(_centred(step.batch), labels, step.key, _REAL)
        return Loss(self.objective.generator(fake, real).mean(), {"fake": fake.detach().mean()})

    def _after_discriminator(self) -> None:
        self._clip()
        if self.augmentation is not None:
            self.augmentation.follow()

    def _clip(self) -> None:
        if self.config.weight_clip is not None:
            clip_weights(self.discriminator.parameters(), self.config.weight_clip)


def _progress(step: Step) -> float:
    """From 0 in the first step to 1 in the last one."""
    return step.number / max(step.total - 1, 1)


def _centred(batch: Batch) -> Tensor:
    """The images in [-1, 1], apart from any graph."""
    return batch.images.detach() * 2 - 1
