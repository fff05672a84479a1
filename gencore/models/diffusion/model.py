"""The denoising diffusion model: Ho, Jain and Abbeel, "Denoising Diffusion Probabilistic Models" (2020).

Equation and algorithm numbers below are of that paper. The cosine schedule and the learned variance are of Nichol and
Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (2021); guidance without a classifier of Ho and Salimans,
"Classifier-Free Diffusion Guidance" (2022).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gencore import diffusion, ops
from gencore.config import ConfigError
from gencore.models._checks import check_images, check_num_samples
from gencore.models.base import Draw, GenerativeModel, Loss, Phase, Step
from gencore.models.diffusion.config import DDPMConfig, Sampling
from gencore.models.modes import evaluating
from gencore.models.optimizers import Optimizer
from gencore.nn import UNet
from gencore.noise import Key
from gencore.spec import Batch, DataSpec

# One stream of the key per purpose, so that no two draws of a training step share noise.
STREAM_TIME = 0
STREAM_NOISE = 1
STREAM_LABELS = 2
# The bound's: the timesteps, and from the second on the noise of each.
STREAM_STRATA = 0
STREAM_BOUND = 1

_FEW_STEPS = 50
# Folded into the key of a training step: each dropout has a stream of its own.
_DROPOUT = int.from_bytes(b"dropout", "big")


class DDPM(GenerativeModel):
    """q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I) adds noise, step by step; a U-Net learns to take it away again.

    Images in [0, 1] become x_0 in [-1, 1]. The network predicts the noise, the image or the velocity of x_t at timestep
    t, from 0 (least noise) to T - 1; for a conditional model it is told the class, or that there is none.

    Everything random is a pure function of the key, dropout too: sample ``i`` of a batch uses the noise of
    ``key.samples(i)``. (Dropout is of training only: whatever mode the model is in, sampling and the bound leave
    nothing out.)
    """

    config: DDPMConfig
    sampling: Sampling

    def __init__(self, config: DDPMConfig, spec: DataSpec):
        super().__init__(config, spec)
        classes = spec.first("class") if config.conditional else None
        self.class_condition = "" if classes is None else classes.name
        if classes is not None:
            self.takes = {classes.name: "optional"}
        channels = spec.image_shape[0]
        self.unet = UNet(
            in_channels=channels,
            out_channels=2 * channels if config.variance == "learned_range" else channels,
            channels=config.channels,
            blocks_per_level=config.blocks_per_level,
            attention_levels=config.attention_levels,
            num_heads=config.num_heads,
            num_classes=spec.num_classes if config.conditional else 0,
            dropout=config.dropout,
            scale_shift=config.scale_shift,
            num_groups=config.num_groups,
        )
        # Convolutions are quicker in this order of memory, on CPUs and on GPUs.
        self.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.schedule = _make_schedule(config)
        self._times: dict[torch.device, Tensor] = {}
        self.sampling = config.sampling
        # What it refuses is refused at once, and not when samples are wanted.
        _make_sampler(config, self.schedule, config.sampling)

    def phases(self) -> Sequence[Phase]:
        """One phase: Algorithm 1."""
        return [Phase("denoise", self._loss, Optimizer(self.parameters(), self.config.optimizer))]

    def _loss(self, step: Step) -> Loss:
        """Algorithm 1: equation 14, or a loss that improves on it, for one timestep per image, drawn evenly."""
        config, batch, key = self.config, step.batch, step.key
        x0, n = _centered(batch.images), len(batch)
        # The rounded product is below T: uniform() is at most 1 - 2^-24, and the product is in float64.
        draws = ops.uniform((n,), key.stream(STREAM_TIME), dtype=torch.float64, device=x0.device)
        t = (draws * config.timesteps).long()
        x_t = ops.add_noise(x0, t, self.schedule, key.stream(STREAM_NOISE))
        dropout = key.fold_in(_DROPOUT) if config.dropout > 0 else None
        output = self._predict(x_t, t, self._told(batch, key.stream(STREAM_LABELS)), dropout)
        losses = ops.denoising_loss(
            output,
            x0,
            t,
            self.schedule,
            key.stream(STREAM_NOISE),
            parameterization=config.parameterization,
            weighting=config.weighting,
            gamma=config.gamma,
            bound_weight=config.bound_weight,
        )
        return Loss(losses.mean(), {})

    def _told(self, batch: Batch, key: Key) -> Tensor | None:
        """The labels that the network is told in training: a share of them is -1, no class (Ho and Salimans 2022)."""
        if not self.config.conditional:
            return None
        labels = batch.conditions[self.class_condition]
        assert isinstance(labels, Tensor)
        dropped = ops.uniform((len(batch),), key, device=labels.device) < self.config.label_dropout
        return torch.where(dropped, -1, labels)

    def _predict(self, x_t: Tensor, t: Tensor, labels: Tensor | None, dropout: Key | None = None) -> Tensor:
        output: Tensor = self.unet(x_t, self._times_on(x_t.device)[t], labels, dropout)
        return output.float()

    def _times_on(self, device: torch.device) -> Tensor:
        if device not in self._times:
            self._times[device] = self.schedule.times.to(device, torch.float32)
        return self._times[device]

    def generate(self, draw: Draw) -> Tensor:
        """Algorithm 2, or what ``draw.sampling`` says; see :meth:`GenerativeModel.generate`.

        Without classes a conditional model samples p(x), which guidance changes nothing of.
        """
        return self._sampled(draw)

    def fill(self, draw: Draw, images: Tensor, known: Tensor) -> Tensor:
        """What goes with the known part; see :meth:`GenerativeModel.fill`.

        At every step, the known part of x_t is replaced by the images with as much noise (Song et al., "Score-Based
        Generative Modeling through Stochastic Differential Equations" (2021b), appendix I.2; Lugmayr et al. 2022,
        equation 8). Each step is made ``sampling.resamples`` times, with noise added in between (Lugmayr et al. 2022,
        Algorithm 1).

        Raises:
            ConfigError: ``sampling`` asks for ``resamples`` of a sampler that uses earlier predictions.
        """
        faults = list(draw.sampling.faults_of_editing())
        if faults:
            raise ConfigError("sampling", faults)
        return self._sampled(draw, known=_centered(images), mask=known)

    def _sampled(self, draw: Draw, known: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        sampling = draw.sampling
        faults = list(sampling.faults_with(self.config.timesteps, self.config.conditional))
        if faults:
            raise ConfigError("sampling", faults)
        labels = draw.conditions.get(self.class_condition)
        assert labels is None or isinstance(labels, Tensor)
        guided = labels is not None and sampling.guidance_scale != 1

        def predict(x: Tensor, t: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            if not guided or labels is None:
                output: Tensor = self.unet(x, t, labels)
                return output.float()
            # With and without the class, in one call of the network.
            both = torch.cat((labels, torch.full_like(labels, -1)))
            conditional, unconditional = self.unet(torch.cat((x, x)), torch.cat((t, t)), both).float().chunk(2)
            return conditional, unconditional

        x = diffusion.sample(
            predict,
            (draw.n, *self.spec.image_shape),
            _make_sampler(self.config, self.schedule, sampling),
            draw.key,
            guidance_scale=sampling.guidance_scale if guided else None,
            guidance_rescale=sampling.guidance_rescale if guided else 0.0,
            threshold=sampling.threshold,
            known=known,
            mask=mask,
            resamples=1 if mask is None else sampling.resamples,
            device=self.device,
            memory_format=torch.channels_last,
            progress=draw.progress,
            check_finite=draw.check_finite,
        )
        return ((x + 1) / 2).clamp(0, 1).contiguous()

    @torch.no_grad()
    def log_likelihood_bound(self, batch: Batch, key: Key, num_samples: int = 1) -> Tensor:
        """The variational bound of log p(x), nats per image, (B,) float32, of 8-bit images (equations 5 and 13)::

            -KL(q(x_T | x_0) || N(0, I)) - sum over t of L_t

        of p(x), without classes. Each term takes a pass through the network. t = 0 is always computed; of the others,
        ``num_samples``, at timesteps that the key draws, which makes an unbiased estimate. With T - 1 or more, every
        timestep is computed, with one draw of the noise each. So more samples make the figure more precise; the bound
        is the same.

        The timesteps are drawn in proportion to what their terms may be, from as many equally likely parts of 1 to
        T - 1 as there are draws. A term is half the fall of log(SNR) times the error of the predicted noise (Kingma et
        al. 2021, section 5.1), which a linear denoiser brings to SNR / (1 + SNR) for pixels of variance 1.

        Predictions are not clipped: the bound is that of Algorithm 2 as it stands in the paper.

        Raises:
            TypeError: ``num_samples`` is no int, or the images are no tensor.
            ValueError: it is below 1, or the images have another shape.
        """
        num_samples, images = check_num_samples(num_samples), batch.images
        check_images(images, self.spec.image_shape)
        # The decoder's bins lie around the 256 levels.
        x0 = _centered((images.float() * 255).round() / 255)
        draws = min(num_samples, self.config.timesteps - 1)
        with evaluating(self):
            return self._bound(x0, key, draws)

    def _bound(self, x0: Tensor, key: Key, draws: int) -> Tensor:
        n, others = len(x0), self.config.timesteps - 1
        total = self._prior_divergence(x0) + self._bound_term(x0, torch.zeros(n, dtype=torch.int64), key, 0)
        shares = _likely_shares(self.schedule)
        places = ops.uniform((n, draws), key.stream(STREAM_STRATA), dtype=torch.float64)
        for draw in range(draws):
            if draws == others:
                t, weights = torch.full((n,), draw + 1), torch.ones(n, dtype=torch.float64)
            else:
                # Among all draws, timestep t is expected draws * shares[t - 1] times.
                drawn = torch.searchsorted(shares.cumsum(0), (draw + places[:, draw]) / draws, right=True)
                drawn = drawn.clamp(max=others - 1)
                t, weights = drawn + 1, 1 / (draws * shares[drawn])
            total += self._bound_term(x0, t, key, 1 + draw) * weights.to(x0.device)
        return -total.float()

    def _bound_term(self, x0: Tensor, t: Tensor, key: Key, draw: int) -> Tensor:
        """L_t in nats, (B,) float64."""
        t, noise = t.to(x0.device), key.stream(STREAM_BOUND + draw)
        output = self._predict(ops.add_noise(x0, t, self.schedule, noise), t, None)
        config = self.config
        terms = ops.variational_bound(
            output, x0, t, self.schedule, noise, parameterization=config.parameterization, variance=config.variance
        )
        return terms.double() * math.prod(x0.shape[1:])

    def _prior_divergence(self, x0: Tensor) -> Tensor:
        """KL(N(alpha_T x_0, sigma_T^2 I) || N(0, I)), (B,) float64."""
        alpha, variance = self.schedule.alpha[-1], self.schedule.sigma[-1].square()
        squares = x0.double().square().flatten(1).sum(1)
        constant = (variance - 1 - variance.log()).item() * math.prod(x0.shape[1:])
        return (alpha.square().item() * squares + constant) / 2


def _make_schedule(config: DDPMConfig) -> diffusion.Schedule:
    """The noise levels that the configuration names."""
    if config.schedule == "cosine":
        return diffusion.cosine(config.timesteps)
    # Another number of steps has as much noise in the end (Nichol and Dhariwal 2021, in their code).
    return diffusion.linear(config.timesteps, 0.1 / config.timesteps, 20 / config.timesteps)


def _make_sampler(config: DDPMConfig, schedule: diffusion.Schedule, sampling: Sampling) -> diffusion.Sampler:
    """The sampler that the settings name; a ConfigError if it refuses them."""
    name = sampling.sampler
    steps = sampling.steps or (config.timesteps if name == "ddpm" else min(_FEW_STEPS, config.timesteps))
    # From the very last step of a cosine schedule, Heun's correction multiplies errors by ten.
    spacing = sampling.spacing or ("karras" if name == "heun" else "trailing")
    make: dict[str, Callable[..., diffusion.Sampler]] = {
        "ddpm": functools.partial(diffusion.ddpm, variance=config.variance),
        # DDIM's step, with the noise that follows from the clipped x0 (Dhariwal and Nichol 2021, in their code): with
        # the network's own, guidance and clipping together lead away from images.
        "ddim": functools.partial(diffusion.ddim, eta=sampling.eta, clip_noise=True),
        "dpm_solver": diffusion.dpm_solver,
        "dpm_solver_sde": functools.partial(diffusion.dpm_solver, sde=True),
        "euler": diffusion.euler,
        "euler_ancestral": diffusion.euler_ancestral,
        "heun": functools.partial(diffusion.heun, s_churn=sampling.churn),
    }
    try:
        return make[name](
            schedule,
            steps,
            parameterization=config.parameterization,
            spacing=spacing,
            clip=1.0 if sampling.clip else None,
        )
    except ValueError as error:
        raise ConfigError("sampling", [f"{name}: {error}"]) from error


def _likely_shares(schedule: diffusion.Schedule) -> Tensor:
    """(T - 1,): how often the bound takes the timesteps from 1 on, in proportion to the size their terms may have.

    A tenth is added to SNR / (1 + SNR), so that no term that is larger than it should be weighs without measure.
    """
    snr = schedule.snr
    likely = (snr[:-1] / snr[1:]).log() * (0.1 + snr[1:] / (1 + snr[1:]))
    return likely / likely.sum()


def _centered(images: Tensor) -> Tensor:
    """[0, 1] -> [-1, 1], float32."""
    return (2 * images.float() - 1).contiguous(memory_format=torch.channels_last)
