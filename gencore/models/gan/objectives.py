"""What the two players minimise, by name in :data:`OBJECTIVES`.

D(x) stands for the discriminator's output, a logit or a score without bounds, l for softplus(-t) = -log sigmoid(t).
Every loss is one of each image, (B,), so that minibatches may be split; a loss of pairs is of image ``i`` and sample
``i``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F


class Objective:
    """Base class of objectives.

    Attributes:
        is_probabilistic: whether sigmoid(D(x)) is the probability of a real image, whose target can be smoothed.
        is_paired: whether the generator's loss sees real images too.
        has_sides: whether the sign of :meth:`margins` says what the discriminator takes an image for.
    """

    is_probabilistic = False
    is_paired = False
    has_sides = True

    def discriminator(self, real: Tensor, fake: Tensor, smoothing: float = 0.0) -> Tensor:
        """The discriminator's loss (B,), for its outputs (B,) for real images and for samples."""
        raise NotImplementedError

    def generator(self, fake: Tensor, real: Tensor) -> Tensor:
        """The generator's loss (B,); ``real`` is looked at by objectives of pairs alone."""
        raise NotImplementedError

    def margins(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """How far real images and samples are on their own side; negative on the other one."""
        return real, -fake


class Minimax(Objective):
    """Goodfellow et al. (2014), equation 1.

    Discriminator: l(D(x)) + l(-D(G(z))), that is -log D - log(1 - D); generator: -l(-D(G(z))) = log(1 - D(G(z))).
    With smoothing s, the target for real images is 1 - s (Salimans et al. 2016, section 3.4).
    """

    is_probabilistic = True

    def discriminator(self, real: Tensor, fake: Tensor, smoothing: float = 0.0) -> Tensor:
        # softplus(-t) + s t is the cross-entropy with target 1 - s.
        loss = F.softplus(-real) + F.softplus(fake)
        return loss + smoothing * real if smoothing else loss

    def generator(self, fake: Tensor, real: Tensor) -> Tensor:
        return -F.softplus(fake)


class NonSaturating(Minimax):
    """Goodfellow et al. (2014), section 3, last paragraph: the generator's loss is l(D(G(z))) = -log D(G(z)).

    The fixed point is minimax's, and there is a gradient early on, when D tells every sample from a real image.
    """

    def generator(self, fake: Tensor, real: Tensor) -> Tensor:
        return F.softplus(-fake)


class LeastSquares(Objective):
    """Mao et al. (2017), equation 9.

    Discriminator: (D(x) - 1)^2 / 2 + D(G(z))^2 / 2; generator: (D(G(z)) - 1)^2 / 2.
    """

    def discriminator(self, real: Tensor, fake: Tensor, smoothing: float = 0.0) -> Tensor:
        return ((real - 1).square() + fake.square()) / 2

    def generator(self, fake: Tensor, real: Tensor) -> Tensor:
        return (fake - 1).square() / 2

    def margins(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        return real - 0.5, 0.5 - fake


class Wasserstein(Objective):
    """Arjovsky et al. (2017), equation 2: D is a critic, and its loss is minus an estimate of the distance.

    Critic: D(G(z)) - D(x); generator: -D(G(z)). A constant added to D changes nothing, so that D has no sides. The
    estimate means something for a D that is Lipschitz: by clipping, a gradient penalty or spectral norm.
    """

    has_sides = False

    def discriminator(self, real: Tensor, fake: Tensor, smoothing: float = 0.0) -> Tensor:
        return fake - real

    def generator(self, fake: Tensor, real: Tensor) -> Tensor:
        return -fake


class Hinge(Objective):
    """Lim and Ye (2017); Miyato et al. (2018), equations 16 and 17.

    Discriminator: max(0, 1 - D(x)) + max(0, 1 + D(G(z))); generator: -D(G(z)).
    """

    def discriminator(self, real: Tensor, fake: Tensor, smoothing: float = 0.0) -> Tensor:
        return F.relu(1 - real) + F.relu(1 + fake)

    def generator(self, fake: Tensor, real: Tensor) -> Tensor:
        return -fake


class Relativistic(Objective):
    """Relativistic pairing: Jolicoeur-Martineau (2019); Huang et al. (2024), equation 2.

    Discriminator: l(D(x) - D(G(z))); generator: l(D(G(z)) - D(x)). A sample is judged against a real image, so that D
    cannot put all samples on one side of a single boundary, the landscape in which modes are dropped.
    """

    is_paired = True

    def discriminator(self, real: Tensor, fake: Tensor, smoothing: float = 0.0) -> Tensor:
        return F.softplus(fake - real)

    def generator(self, fake: Tensor, real: Tensor) -> Tensor:
        return F.softplus(real - fake)

    def margins(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        return real - fake, real - fake


OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {
        "minimax": Minimax(),
        "non-saturating": NonSaturating(),
        "least-squares": LeastSquares(),
        "wasserstein": Wasserstein(),
        "hinge": Hinge(),
        "relativistic": Relativistic(),
    }
)


@torch.no_grad()
def figures(objective: Objective, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """What is logged of a discriminator's outputs (B,): their means, and the share that is on its side if there are
    sides."""
    found = {"real": real.mean(), "fake": fake.mean()}
    if objective.has_sides:
        sides = [(margin > 0).float().mean() for margin in objective.margins(real, fake)]
        found["accuracy"] = (sides[0] + sides[1]) / 2
    return found
