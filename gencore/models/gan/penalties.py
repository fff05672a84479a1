"""Penalties on the discriminator's gradient with respect to images, and clipping of its weights.

Each penalty is one of each image, (B,), and can be differentiated with respect to the discriminator's weights. Its
scale is that of the images given, which the papers have in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from gencore import ops
from gencore.noise import Key

# Below it a norm counts as zero: the derivative of the root has no end there.
_TINY = 1e-12


def squared_gradient(outputs: Tensor, images: Tensor) -> Tensor:
    """|grad_x D(x)|^2 of each image (B,): R1 on real images, R2 on samples (Mescheder et al. 2018, equations 9 and 10).

    Args:
        outputs: D(x), (B,), each of its own image alone.
        images: x, (B, C, H, W), which require a gradient.
    """
    (gradient,) = torch.autograd.grad(outputs.sum(), images, create_graph=True)
    return gradient.float().square().flatten(1).sum(1)


def gradient_penalty(judge: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, key: Key) -> Tensor:
    """(|grad D(x^)| - 1)^2 of each pair (B,), at x^ = u x + (1 - u) G(z) (Gulrajani et al. 2017, equation 3).

    Args:
        judge: D.
        real, fake: images (B, C, H, W); no gradient goes to them.
        key: u in [0, 1) of pair ``i`` is that of ``key.samples(i)``.
    """
    u = ops.uniform((len(real), 1, 1, 1), key, device=real.device)
    between = torch.lerp(fake.detach(), real.detach(), u.to(real.dtype)).requires_grad_()
    norm = (squared_gradient(judge(between), between) + _TINY).sqrt()
    return (norm - 1).square()


@torch.no_grad()
def clip_weights(parameters: Iterable[nn.Parameter], most: float) -> None:
    """Cuts every weight to [-most, most] in place (Arjovsky et al. 2017, Algorithm 1)."""
    for parameter in parameters:
        parameter.clamp_(-most, most)
