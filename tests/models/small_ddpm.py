"""A small diffusion model for tests, and its formulas once more."""

import itertools
import math

import torch

from gencore import Key, ops
from gencore.models import Step
from gencore.models.diffusion import DDPM, DDPMConfig, Sampling
from gencore.spec import Batch, Condition, DataSpec

SMALL = {"channels": (8, 16), "num_groups": 4}
FAST = Sampling(sampler="ddim", steps=6)


def spec_of(*image_shape):
    return DataSpec(image_shape, (Condition("label", "class", tuple("0123456789")),))


def build(*image_shape, seed=0, **settings):
    """A small model whose every parameter matters: those that begin as zero are drawn here."""
    torch.manual_seed(seed)
    model = DDPM(DDPMConfig(**{**SMALL, **settings}), spec_of(*(image_shape or (1, 8, 8))))
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model


def images_for(model, n=6, seed=1):
    levels = (ops.uniform((n, *model.spec.image_shape), Key(seed)) * 256).floor()
    return levels / 255


def of(labels):
    """The conditions of images of these classes; none where labels are None."""
    return {} if labels is None else {"label": labels}


def loss_of(model, images, key, labels=None):
    return model.phases()[0].loss(Step(Batch(images, of(labels)), key))


def bound(model, images, key, *num_samples):
    return model.log_likelihood_bound(Batch(images), key, *num_samples)


# The formulas once more, in float64 and by another way: from betas, as in Ho et al. (2020).


class Chain:
    def __init__(self, config):
        steps = config.timesteps
        if config.schedule == "linear":
            betas = torch.linspace(1e-4 * 1000 / steps, 0.02 * 1000 / steps, steps, dtype=torch.float64)
        else:
            f = [math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(steps + 1)]
            betas = torch.tensor([min(1 - b / a, 0.999) for a, b in itertools.pairwise(f)], dtype=torch.float64)
        self.betas = betas
        self.bar = torch.cumprod(1 - betas, 0)
        self.bar_before = torch.cat((torch.ones(1, dtype=torch.float64), self.bar[:-1]))
        self.small = betas * (1 - self.bar_before) / (1 - self.bar)

    def at(self, values, t, like):
        return values[t].reshape(-1, *[1] * (like.dim() - 1))

    def x0(self, config, x_t, prediction, t):
        bar = self.at(self.bar, t, x_t)
        if config.parameterization == "eps":
            return (x_t - (1 - bar).sqrt() * prediction) / bar.sqrt()
        if config.parameterization == "x0":
            return prediction
        return bar.sqrt() * x_t - (1 - bar).sqrt() * prediction

    def term(self, config, x0, x_t, output, t):
        """L_t in nats of each element, for t equal in the whole batch."""
        channels = x0.shape[1]
        predicted = self.x0(config, x_t, output[:, :channels], t)
        of_x0 = self.at(self.bar_before.sqrt() * self.betas / (1 - self.bar), t, x0)
        of_x_t = self.at((1 - self.betas).sqrt() * (1 - self.bar_before) / (1 - self.bar), t, x0)
        true, mean = of_x0 * x0 + of_x_t * x_t, of_x0 * predicted + of_x_t * x_t
        # The posterior's variance is 0 at t = 0: that of t = 1 stands there.
        low = torch.cat((self.small[1:2], self.small[1:])).log()
        high = {"fixed_small": low, "fixed_large": torch.cat((self.small[1:2], self.betas[1:])).log()}.get(
            config.variance, self.betas.log()
        )
        log_variance = self.at(high, t, x0).expand_as(x0)
        if config.variance == "learned_range":
            share = (output[:, channels:] + 1) / 2
            log_variance = share * self.at(high, t, x0) + (1 - share) * self.at(low, t, x0)
            mean = mean.detach()
        if int(t[0]) > 0:
            log_true = self.at(low, t, x0)
            ratio = (log_true - log_variance).exp()
            return (log_variance - log_true + ratio + (true - mean).square() / log_variance.exp() - 1) / 2
        normal = torch.distributions.Normal(mean, (log_variance / 2).exp())
        above = torch.where(x0 > 0.999, torch.ones_like(x0), normal.cdf(x0 + 1 / 255))
        below = torch.where(x0 < -0.999, torch.zeros_like(x0), normal.cdf(x0 - 1 / 255))
        return -(above - below).clamp(min=1e-12).log()
