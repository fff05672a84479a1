"""What can be done with the latents of any model that has them: paths between two, changes of one dimension, means and
sums of several, and the latents that an image is nearest to."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from gencore import ops
from gencore.arguments import integer
from gencore.models._checks import check_images
from gencore.models.base import Autoencodes, GenerativeModel, HasLatents
from gencore.models.modes import evaluating
from gencore.noise import Key
from gencore.progress import Progress

PathKind = Literal["linear", "spherical"]

# Candidates that are decoded at a time.
_PIECE = 256
# Below this angle, the two paths agree to the last digits of float32.
_SMALL = 1e-3
_FORM = "expression must be names with + and - between them"


def prior(model: GenerativeModel, n: int, key: Key) -> Tensor:
    """``n`` latents of the standard normal prior, (n, \\*latent_shape) float32 on the model's device.

    Latent ``i`` is the noise of ``key.samples(i)``.

    Raises:
        TypeError: the model has no latents.
    """
    return ops.normal((n, *latent_shape(model)), key, dtype=torch.float32, device=model.device)


def latent_shape(model: GenerativeModel) -> tuple[int, ...]:
    """That of one latent.

    Raises:
        TypeError: the model has no latents.
    """
    if not isinstance(model, HasLatents):
        raise TypeError(f"model must have latents (latent_shape and decode), got {type(model).__name__}")
    return model.latent_shape


def path_between(a: Tensor, b: Tensor, steps: int, path: PathKind = "spherical") -> Tensor:
    """``steps`` latents from ``a`` to ``b``, (steps, \\*a.shape); the first is ``a``, the last ``b``.

    Args:
        a, b: of one shape.
        steps: at least 2.
        path: ``linear``: the straight line, (1 - t) a + t b. ``spherical``: the arc between their directions, with
            lengths that change evenly; a straight line between draws of a normal prior passes through shorter ones than
            the prior ever draws.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: Shoemake, "Animating Rotation with Quaternion Curves" (1985); White, "Sampling Generative Networks" (2016).
    """
    if a.shape != b.shape:
        raise ValueError(f"a and b must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    if path not in get_args(PathKind):
        raise ValueError(f'path must be "linear" or "spherical", got {path!r}')
    t = torch.linspace(0, 1, integer("steps", steps, least=2), device=a.device).reshape(-1, *[1] * a.dim())
    straight = (1 - t) * a + t * b
    if path == "linear":
        return straight
    length_a, length_b = a.norm().clamp(min=1e-12), b.norm().clamp(min=1e-12)
    along_a, along_b = a / length_a, b / length_b
    # By the half angle's tangent: the arc cosine of nearly 1 has lost its digits.
    angle = 2 * torch.atan2((along_a - along_b).norm(), (along_a + along_b).norm())
    if not _SMALL < float(angle) < math.pi - _SMALL:
        # In one direction there is no arc, in opposite ones there are many.
        return straight
    direction = (torch.sin((1 - t) * angle) * along_a + torch.sin(t * angle) * along_b) / torch.sin(angle)
    return direction * (length_a + t * (length_b - length_a))


def traversal(latent: Tensor, dimensions: Sequence[int], values: Tensor) -> Tensor:
    """The latent with one dimension changed, (dimensions, values, \\*latent.shape).

    Args:
        latent: of any shape.
        dimensions: which ones, counted in C order.
        values: (V,), what each of them becomes.

    Raises:
        ValueError: a dimension that the latent does not have.
    """
    size = latent.numel()
    for dimension in dimensions:
        if not 0 <= dimension < size:
            raise ValueError(f"dimensions must be from 0 to {size - 1}, got {dimension}")
    latents = latent.flatten().expand(len(dimensions), len(values), size).clone()
    for row, dimension in enumerate(dimensions):
        latents[row, :, dimension] = values.to(latents)
    return latents.unflatten(2, latent.shape)


def information(mean: Tensor, logvar: Tensor) -> Tensor:
    """How many nats each dimension of a code tells of its image, (D,), for means and log-variances (N, ...).

    That is the mean KL divergence from the standard normal prior.
    """
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).mean(0)


class Term(NamedTuple):
    """A part of an expression: plus or minus the mean of what the names stand for."""

    sign: int
    names: tuple[str, ...]

    def __str__(self) -> str:
        return ("" if self.sign > 0 else "- ") + ",".join(self.names)


def parsed(expression: str, known: Sequence[str] = ()) -> tuple[Term, ...]:
    """The terms of an expression such as ``3 - 1 + 7`` or ``s12,s15 - s1,s4 + s2``: names with + and - between them.

    Names with commas between them are a mean. A name of ``known`` may hold spaces, commas, + and - itself: the longest
    one that is spelled counts.

    Raises:
        ValueError: no expression of this form; the message says where it ends to be one.

    >>> parsed("a, b - c")
    (Term(sign=1, names=('a', 'b')), Term(sign=-1, names=('c',)))
    """
    spelled = sorted(map(re.escape, filter(None, known)), key=len, reverse=True)
    name = re.compile("|".join([rf"(?:{each})(?=\s*(?:[-+,]|$))" for each in spelled] + [r"[^\s,+-]+"]))
    between = re.compile(r"\s*([-+,]?)\s*")
    terms: list[Term] = []
    sign, names, place = 1, list[str](), 0
    found = between.match(expression)
    if found and found[1] in ("+", "-"):
        sign, place = (-1 if found[1] == "-" else 1), found.end()
    elif found and not found[1]:
        place = found.end()
    while True:
        spoken = name.match(expression, place)
        if spoken is None:
            raise ValueError(f"{_FORM}, got {expression!r}, without a name at {expression[place:] or 'its end'!r}")
        names.append(spoken[0])
        found = between.match(expression, spoken.end())
        assert found is not None
        place = found.end()
        if not found[1] and place < len(expression):
            raise ValueError(f"{_FORM}, got {expression!r}, without a sign at {expression[place:]!r}")
        if found[1] != ",":
            terms.append(Term(sign, tuple(names)))
            names = []
            if not found[1]:
                return tuple(terms)
            sign = -1 if found[1] == "-" else 1


def class_means(latents: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """The mean latent of each class, (num_classes, \\*latent_shape), NaN for a class without any, and their numbers.

    Args:
        latents: (N, \\*latent_shape).
        labels: (N,) int64; others than 0 to num_classes - 1 are of no class.
        num_classes: how many.
    """
    labels = labels.to(latents.device)
    sums = [latents[labels == each].double().sum(0) for each in range(num_classes)]
    counts = torch.stack([(labels == each).sum() for each in range(num_classes)])
    means = torch.stack(sums) / counts.reshape(-1, *[1] * (latents.dim() - 1))
    return means.to(latents.dtype), counts


class Projection(NamedTuple):
    """What :func:`project` finds; the distances are mean squared differences of pixels, (B,) each.

    Attributes:
        latents: (B, \\*latent_shape).
        images: what they are decoded to.
        distances: of those images from the targets.
        start: the latents that the search began with.
        start_images: what those are decoded to.
        start_distances: of those images from the targets.
    """

    latents: Tensor
    images: Tensor
    distances: Tensor
    start: Tensor
    start_images: Tensor
    start_distances: Tensor


def project(
    model: GenerativeModel,
    images: Tensor,
    key: Key,
    *,
    steps: int = 300,
    learning_rate: float = 0.05,
    candidates: int = 1024,
    progress: bool = False,
) -> Projection:
    """Searches the latents whose image is nearest to each image, by the mean squared difference of pixels.

    Each search starts with the mean of the encoder's code, if there is an encoder, else with the best of some draws of
    the prior. Adam goes on from there (Kingma and Ba 2015), with a rate that falls to 0 along a cosine. The best
    latents of all steps are taken, so that no distance is larger than that of the start. The weights stay as they are.

    Deterministic in model, images and key; each image's search is its own, so that a part of a batch gives the same up
    to the rounding of the networks' products.

    Args:
        model: has latents, and its ``decode`` can be differentiated.
        images: (B, C, H, W) in [0, 1], on the model's device.
        key: of the candidates, see :func:`prior`.
        steps: of Adam; 0 only chooses the start.
        learning_rate: the first one.
        candidates: draws to start from, without an encoder.
        progress: whether to show on stderr how far it is.

    Raises:
        TypeError, ValueError: an argument is not as above, or no gradient comes through ``decode``.

    Source: the inversion of GANs by optimisation, Zhu et al., "Generative Visual Manipulation on the Natural Image
    Manifold" (2016), section 3.2.
    """
    shape = latent_shape(model)
    assert isinstance(model, HasLatents)
    check_images(images, model.spec.image_shape)
    steps, candidates = integer("steps", steps, least=0), integer("candidates", candidates, least=1)
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate must be above 0, got {learning_rate!r}")
    with (
        evaluating(model),
        torch.enable_grad(),
        Progress(steps, name="projecting", unit="step", shown=progress) as shown,
    ):
        start = _start(model, images, candidates, key).reshape(len(images), *shape)
        latents = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([latents], lr=learning_rate)
        for step in range(steps + 1):
            decoded = model.decode(latents)
            distances = (decoded.float() - images).square().flatten(1).mean(1)
            if step == 0:
                first, before = decoded.detach(), distances.detach()
                best, nearest, least = start, first, before
            else:
                better = distances.detach() < least
                best, nearest = _chosen(better, latents, best), _chosen(better, decoded, nearest)
                least = torch.where(better, distances.detach(), least)
                shown.update(1)
            if step == steps:
                break
            if not distances.requires_grad:
                name = type(model).__name__
                raise ValueError(f"model must have a decode with a gradient, and that of {name} has none")
            # An image's update does not depend on how many there are.
            (latents.grad,) = torch.autograd.grad(distances.sum(), latents)
            optimizer.param_groups[0]["lr"] = learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.step()
    return Projection(best, nearest, least, start, first, before)


@torch.no_grad()
def _start(model: GenerativeModel, images: Tensor, candidates: int, key: Key) -> Tensor:
    if isinstance(model, Autoencodes):
        return model.encode(images)[0].float()
    assert isinstance(model, HasLatents)
    latents, scores = prior(model, candidates, key), []
    for piece in latents.split(_PIECE):
        decoded = model.decode(piece).float().flatten(1)
        # The squared distance less what is the same for all candidates.
        scores.append(decoded.square().sum(1) - 2 * images.flatten(1) @ decoded.t())
    return latents[torch.cat(scores, 1).argmin(1)]


def _chosen(which: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(which.reshape(-1, *[1] * (a.dim() - 1)), a.detach(), b)
