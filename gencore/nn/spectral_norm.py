"""Spectral normalization: a weight divided by its largest singular value."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gencore.arguments import integer
from gencore.nn._checks import number
from gencore.nn._precision import widened, without_autocast

Module = TypeVar("Module", bound=nn.Module)

# Those whose weight has the outputs in its second dimension.
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def spectral_norm(
    module: Module, name: str = "weight", *, iterations: int = 1, eps: float = 1e-12, dim: int | None = None
) -> Module:
    """Divides a module's weight by its largest singular value sigma, in every forward: the Lipschitz constant is 1.

    The weight is taken as a matrix W of the outputs by all else. Power iteration carries two vectors along, the
    stored u and v::

        v = W^T u / |W^T u|,  u = W v / |W v|,  sigma = u^T W v

    It advances once where the weight has changed since it last did, and not otherwise. So every forward of one weight
    has the same sigma: of real and of generated images, in training and in evaluation mode, under gradient
    checkpointing, and after a resumed checkpoint, which holds the vectors and what they belong to. What counts is the
    weight's bits: fused optimisers and ``weight.data`` do not count PyTorch's version up. The vectors are stored in
    training mode only.

    The gradient goes through sigma with u and v as constants (equation 10 of the paper), any number of times. A forward
    never writes what an earlier one left for its backward. Sigma is computed in float32 at least, whatever autocast
    says.

    PyTorch's ``torch.nn.utils.parametrizations.spectral_norm`` advances in every forward in training mode, so that two
    forwards of a step see two weights, and has one sigma for training and another for evaluation.

    Args:
        module: with a weight of two or more dimensions: linear, convolution, transposed convolution, embedding. It is
            changed in place, as :mod:`torch.nn.utils.parametrize` does: ``module.weight`` is the divided weight,
            ``module.parametrizations.weight.original`` the trained parameter. ``parametrize.remove_parametrizations``
            undoes it.
        name: of the weight.
        iterations: of the power iteration where the weight has changed. One is enough for the small steps of training.
        eps: a weight whose sigma is not above it, such as one of zeros, is left as it is.
        dim: the dimension of the outputs; left out, 1 for PyTorch's transposed convolutions and 0 for others.

    Returns:
        The module.

    Raises:
        TypeError: ``module`` is no module, ``iterations`` or ``dim`` no int.
        ValueError: there is no such weight or it has one dimension, it has a spectral norm already, or ``iterations``,
            ``eps`` or ``dim`` is out of range.

    Deterministic: u starts from torch's generator; all else follows from the weights, so that processes with the same
    weights have the same sigma. A convolution's own norm can be larger than that of its matrix, by its kernel's extent.

    >>> layer = spectral_norm(nn.Linear(20, 40))
    >>> for _ in range(50):
    ...     with torch.no_grad():
    ...         layer.parametrizations.weight.original.mul_(1.01)
    ...     weight = layer.weight
    >>> torch.linalg.matrix_norm(weight, 2).allclose(torch.tensor(1.0), atol=1e-2)
    True

    Source: Miyato et al., "Spectral Normalization for Generative Adversarial Networks" (2018), section 2.1, equations 8
    to 10, and algorithm 1.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"name must be that of a weight of {type(module).__name__}, got {name!r}")
    if parametrize.is_parametrized(module, name) and any(
        isinstance(each, SpectralNorm)
        for each in module.parametrizations[name]  # type: ignore[index]
    ):
        raise ValueError(f"module must have no spectral norm yet, but {name!r} of it has")
    if dim is None:
        dim = 1 if isinstance(module, _TRANSPOSED) else 0
    norm = SpectralNorm(weight, iterations=iterations, eps=eps, dim=dim)
    parametrize.register_parametrization(module, name, norm, unsafe=True)
    return module


class SpectralNorm(nn.Module):
    """The parametrization that :func:`spectral_norm` registers: W -> W / sigma(W).

    Args:
        weight: of two or more dimensions, which the vectors start from.
        iterations, eps, dim: as :func:`spectral_norm` has them.
    """

    u: Tensor
    v: Tensor
    seen: Tensor

    def __init__(self, weight: Tensor, *, iterations: int = 1, eps: float = 1e-12, dim: int = 0) -> None:
        super().__init__()
        if weight.dim() < 2:
            raise ValueError(f"the weight must have two or more dimensions, got the shape {tuple(weight.shape)}")
        dim = integer("dim", dim)
        if not -weight.dim() <= dim < weight.dim():
            raise ValueError(f"dim must be one of the weight's {weight.dim()} dimensions, got {dim}")
        self.iterations, self.eps, self.dim = (
            integer("iterations", iterations, least=1),
            number("eps", eps, above=0),
            dim,
        )
        with torch.no_grad():
            matrix = self._matrix(weight)
            self.register_buffer("u", _unit(torch.randn_like(matrix[:, 0]), self.eps))
            self.register_buffer("v", torch.zeros_like(matrix[0]))
            # What the vectors belong to: nothing yet, as no weight but of zeros has these sums.
            self.register_buffer("seen", torch.zeros_like(_sums_of_bits(matrix)))
            # The first forward has a good sigma already.
            self.u.copy_(self._advanced(matrix, self.u, _FIRST_ITERATIONS)[0])

    def forward(self, weight: Tensor) -> Tensor:
        """(...) -> (...), the weight divided by sigma."""
        with without_autocast(weight):
            matrix = self._matrix(weight)
            with torch.no_grad():
                u, v = self._vectors(matrix.detach())
            sigma = torch.dot(u, torch.mv(matrix, v))
            # A weight of zeros would have gradients without bound.
            return (widened(weight) / torch.where(sigma > self.eps, sigma, 1)).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What ``module.weight = weight`` sets: the undivided weight."""
        return weight

    def _vectors(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the matrix, as new tensors, which the backward finds as they are when the buffers have gone on."""
        sums = _sums_of_bits(matrix)
        # A look at the answer would wait for a GPU and break a compiled graph; the products are small beside the layer.
        is_new = (sums != self.seen).any() | (self.v == 0).all()
        new_u, new_v = self._advanced(matrix, self.u.to(matrix.dtype), self.iterations)
        u, v = torch.where(is_new, new_u.to(self.u.dtype), self.u), torch.where(is_new, new_v.to(self.v.dtype), self.v)
        if self.training:
            self.u.copy_(u)
            self.v.copy_(v)
            self.seen.copy_(sums)
        # What a module in half precision stores is no longer of length 1; every forward has the same of it.
        return _unit(u.to(matrix.dtype), self.eps), _unit(v.to(matrix.dtype), self.eps)

    def _advanced(self, matrix: Tensor, u: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
        """The vectors after some steps of the power iteration."""
        for _ in range(iterations):
            v = _unit(torch.mv(matrix.t(), u), self.eps)
            product = torch.mv(matrix, v)
            # A weight of zeros has no direction: u waits for one that has.
            u = torch.where(product.norm() > self.eps, _unit(product, self.eps), u)
        return u, v

    def _matrix(self, weight: Tensor) -> Tensor:
        """(outputs, all else), float32 or float64."""
        return widened(weight.movedim(self.dim, 0).flatten(1)).contiguous()

    def extra_repr(self) -> str:
        return f"iterations={self.iterations}, eps={self.eps}, dim={self.dim}"


# So many steps bring a random u near a matrix's first singular vector.
_FIRST_ITERATIONS = 15


def _unit(vector: Tensor, eps: float) -> Tensor:
    return vector / vector.norm().clamp(min=eps)


def _sums_of_bits(matrix: Tensor) -> Tensor:
    """A sum for every row, of its values' bits as integers modulo 2^32: what tells a matrix from a changed one.

    Sums of integers are exact in any order. Where a change is missed, the power iteration rests for one step.
    """
    return matrix.view(torch.int32).sum(1, dtype=torch.int32)
