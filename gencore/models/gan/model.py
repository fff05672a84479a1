"""The generative adversarial network: Goodfellow et al., "Generative Adversarial Nets", NIPS 2014 (arXiv 1406.2661)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gencore import ops
from gencore.models._checks import check_latents
from gencore.models.base import Draw, GenerativeModel, Loss, Phase, Step
from gencore.models.gan.config import GANConfig
from gencore.models.gan.networks import MLPDiscriminator, MLPGenerator
from gencore.models.optimizers import Optimizer
from gencore.noise import Key
from gencore.spec import DataSpec

# One stream of the key per purpose, so that no two draws of a step share noise.
STREAM_LATENTS = 0
# Folded into the key: within each, every dropout has a stream of its own.
_DROPOUT_REAL, _DROPOUT_FAKE = int.from_bytes(b"real", "big"), int.from_bytes(b"fake", "big")


class GAN(GenerativeModel):
    """A generator G: z ~ N(0, I) -> image, and a discriminator D: image -> logit l, D(x) = sigmoid(l(x)).

    They play the minimax game of equation 1::

        min_G max_D  E_x[log D(x)] + E_z[log(1 - D(G(z)))]

    by Algorithm 1: ``discriminator_steps`` steps of D, then one of G. Losses are written with softplus of the logits,
    log D = -softplus(-l) and log(1 - D) = -softplus(l), which neither overflow nor lose digits.

    Everything random is a pure function of the key, dropout too: sample ``i`` uses the noise of ``key.samples(i)``.
    """

    config: GANConfig

    def __init__(self, config: GANConfig, spec: DataSpec):
        super().__init__(config, spec)
        self.generator = MLPGenerator(config.latent_size, config.generator_sizes, spec.image_shape)
        self.discriminator = MLPDiscriminator(spec.image_shape, config.discriminator_sizes, config.dropout)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(latent_size,)"""
        return (self.config.latent_size,)

    def decode(self, latents: Tensor) -> Tensor:
        """The generator's images, (B, C, H, W) float32 in [0, 1], for latents (B, latent_size).

        Raises:
            ValueError: latents of another shape.
        """
        check_latents(latents, self.config.latent_size)
        images: Tensor = self.generator(latents)
        return images

    def generate(self, draw: Draw) -> Tensor:
        """The images of latents drawn from the prior; see :meth:`GenerativeModel.generate`."""
        return self._generate(draw.n, draw.key)

    def phases(self) -> Sequence[Phase]:
        """Algorithm 1: the discriminator, ``discriminator_steps`` times, then the generator."""
        config = self.config
        return [
            Phase(
                "discriminator",
                self._discriminator_loss,
                Optimizer(self.discriminator.parameters(), config.discriminator_optimizer),
                repeats=config.discriminator_steps,
            ),
            Phase(
                "generator", self._generator_loss, Optimizer(self.generator.parameters(), config.generator_optimizer)
            ),
        ]

    def _generate(self, n: int, key: Key) -> Tensor:
        latents = ops.normal((n, self.config.latent_size), key.stream(STREAM_LATENTS), device=self.device)
        images: Tensor = self.generator(latents)
        return images

    def _discriminator_loss(self, step: Step) -> Loss:
        """-E_x[log D(x)] - E_z[log(1 - D(G(z)))], with one-sided label smoothing and the R1 penalty if asked for.

        Smoothing replaces the first term by the cross-entropy with target 1 - s (Salimans et al. 2016, section 3.4).
        R1 adds gamma / 2 E_x |grad_x l(x)|^2 (Mescheder et al. 2018, equation 9), which keeps D from running away from
        G, and with it the training from oscillating.
        """
        config, images, key = self.config, step.batch.images, step.key
        with torch.no_grad():
            fakes = self._generate(len(images), key)
        images = images.detach().requires_grad_(config.gradient_penalty > 0)
        real = self.discriminator(images, key.fold_in(_DROPOUT_REAL))
        fake = self.discriminator(fakes, key.fold_in(_DROPOUT_FAKE))
        # softplus(-l) + s l is the cross-entropy with target 1 - s.
        loss = (F.softplus(-real) + config.label_smoothing * real).mean() + F.softplus(fake).mean()
        metrics = {
            "accuracy": ((real > 0).float().mean() + (fake < 0).float().mean()) / 2,
            "real": torch.sigmoid(real.detach()).mean(),
            "fake": torch.sigmoid(fake.detach()).mean(),
        }
        if config.gradient_penalty > 0:
            (gradient,) = torch.autograd.grad(real.sum(), images, create_graph=True)
            penalty = gradient.float().square().flatten(1).sum(1).mean()
            metrics["gradient_penalty"] = penalty.detach()
            loss = loss + config.gradient_penalty / 2 * penalty
        return Loss(loss, metrics)

    def _generator_loss(self, step: Step) -> Loss:
        """Minimax: E_z[log(1 - D(G(z)))]. Non-saturating (section 3, last paragraph): -E_z[log D(G(z))].

        The second has the same fixed point, and a gradient early on, when D tells every image of G from a real one.
        """
        fakes = self._generate(len(step.batch), step.key)
        logits = self.discriminator(fakes, step.key.fold_in(_DROPOUT_FAKE))
        loss = -F.softplus(logits) if self.config.loss == "minimax" else F.softplus(-logits)
        return Loss(loss.mean(), {"fooled": (logits > 0).float().mean()})
