"""Fused reparameterized sampling: the noise is made in the kernel, and made again for the gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gencore._torch import hand_over, is_overridden
from gencore.arguments import integer
from gencore.backends import choice
from gencore.backends.layout import empty_draws, memory_format_of
from gencore.backends.reference import reparameterize as reference
from gencore.noise import Key
from gencore.ops._checks import Contract, check_elements, check_same, check_tensor, known_key, resolve_key
from gencore.ops._library import Layout, define, widened
from gencore.ops.normal import normals_for


def _fake(mu: Tensor, logvar: Tensor, key: Tensor, num_samples: int | None = None) -> Tensor:
    return empty_draws(mu, num_samples)


def _fake_kl(mu: Tensor, logvar: Tensor, key: Tensor, num_samples: int | None = None) -> tuple[Tensor, Tensor]:
    kl = mu.new_empty(mu.shape[0], dtype=torch.float64 if mu.dtype == torch.float64 else torch.float32)
    return empty_draws(mu, num_samples), kl


def _fake_slope(mu: Tensor, logvar: Tensor, key: Tensor, num_samples: int | None = None) -> tuple[Tensor, Tensor]:
    return empty_draws(mu, num_samples), empty_draws(mu, num_samples)


def _fake_backward(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    mu: Tensor | None,
    logvar: Tensor,
    key: Tensor,
    num_samples: int | None,
    with_grad_mu: bool,
) -> tuple[Tensor, Tensor]:
    grad_logvar = torch.empty_like(logvar, memory_format=memory_format_of(logvar))
    return torch.empty_like(grad_logvar) if with_grad_mu else logvar.new_empty(0), grad_logvar


_OF_SAMPLES = {"mu": 0, "logvar": 0, "key": 0}


def _layouts(args: Mapping[str, Any]) -> list[Layout]:
    # Several draws come before the samples.
    return [Layout(_OF_SAMPLES, (0 if args["num_samples"] is None else 1, 0))]


def _layouts_slope(args: Mapping[str, Any]) -> list[Layout]:
    of_z = 0 if args["num_samples"] is None else 1
    return [Layout(_OF_SAMPLES, (of_z, of_z))]


def _layouts_backward(args: Mapping[str, Any]) -> list[Layout]:
    of_z = 0 if args["num_samples"] is None else 1
    return [Layout({**_OF_SAMPLES, "grad_z": of_z, "grad_kl": 0}, (0, 0))]


def _eps(mu: Tensor, key: Tensor, num_samples: int | None) -> Tensor:
    """The noise of the draws, which each takes whole blocks of four elements of."""
    if num_samples is None:
        return normals_for(mu, key, mu.shape, memory_format_of(mu))
    elements = math.prod(mu.shape[1:])
    shape = mu.shape[0], num_samples, (elements + 3) // 4 * 4
    eps = normals_for(mu, key, shape, torch.contiguous_format)[..., :elements]
    return eps.transpose(0, 1).reshape(num_samples, *mu.shape)


def _definition(mu: Tensor, logvar: Tensor, key: Tensor, num_samples: int | None = None) -> Tensor:
    return reference.sample(widened(mu), widened(logvar), _eps(mu, key, num_samples)).to(mu.dtype)


def _definition_kl(mu: Tensor, logvar: Tensor, key: Tensor, num_samples: int | None = None) -> tuple[Tensor, Tensor]:
    return _definition(mu, logvar, key, num_samples), reference.divergence(widened(mu), widened(logvar))


def _definition_slope(mu: Tensor, logvar: Tensor, key: Tensor, num_samples: int | None = None) -> tuple[Tensor, Tensor]:
    eps, deviation = _eps(mu, key, num_samples), torch.exp(widened(logvar) / 2)
    return (widened(mu) + deviation * eps).to(mu.dtype), (deviation / 2 * eps).to(mu.dtype)


def _definition_backward(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    mu: Tensor | None,
    logvar: Tensor,
    key: Tensor,
    num_samples: int | None,
    with_grad_mu: bool,
) -> tuple[Tensor | None, Tensor]:
    grad_mu: Tensor | None = None
    grad_logvar = torch.zeros_like(widened(logvar))
    if grad_z is not None:
        of_z = widened(grad_z) * (_eps(logvar, key, num_samples) * torch.exp(widened(logvar) / 2) / 2)
        grad_logvar = grad_logvar + (of_z if num_samples is None else of_z.sum(0))
        grad_mu = widened(grad_z) if num_samples is None else widened(grad_z).sum(0)
    if grad_kl is not None and mu is not None:
        of_kl = grad_kl.reshape(-1, *[1] * (logvar.dim() - 1))
        grad_logvar = grad_logvar + of_kl * (torch.exp(widened(logvar)) - 1) / 2
        grad_mu = of_kl * widened(mu) if grad_mu is None else grad_mu + of_kl * widened(mu)
    of_mu = grad_mu.to(logvar.dtype) if with_grad_mu and grad_mu is not None else None
    return of_mu, grad_logvar.to(logvar.dtype)


_reparameterize_backward = define(
    "reparameterize_backward(Tensor? grad_z, Tensor? grad_kl, Tensor? mu, Tensor logvar, Tensor key, "
    "SymInt? num_samples, bool with_grad_mu) -> (Tensor, Tensor)",
    fake=_fake_backward,
    definition=_definition_backward,
    layouts=_layouts_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, logvar, key, ctx.num_samples = inputs
    if ctx.needs_input_grad[1]:
        ctx.save_for_backward(logvar, key)


def _backward(ctx: Any, grad_z: Tensor) -> tuple[Tensor | None, ...]:
    grad_mu, grad_logvar = None, None
    several = ctx.num_samples is not None
    if ctx.needs_input_grad[1]:
        logvar, key = ctx.saved_tensors
        grad_mu, grad_logvar = _reparameterize_backward(grad_z, None, None, logvar, key, ctx.num_samples, several)
    elif several:
        grad_mu = grad_z.sum(0)
    # One draw per sample passes its gradient to mu as it is.
    return grad_mu if several else grad_z, grad_logvar, None, None


def _setup_context_kl(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    mu, logvar, key, ctx.num_samples = inputs
    ctx.save_for_backward(mu, logvar, key)
    ctx.set_materialize_grads(False)


def _backward_kl(ctx: Any, grad_z: Tensor | None, grad_kl: Tensor | None) -> tuple[Tensor | None, ...]:
    mu, logvar, key = ctx.saved_tensors
    if grad_z is None and grad_kl is None:
        return None, None, None, None
    grad_mu, grad_logvar = _reparameterize_backward(grad_z, grad_kl, mu, logvar, key, ctx.num_samples, True)
    return grad_mu, grad_logvar, None, None


def _setup_context_slope(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.several = inputs[3] is not None
    ctx.set_materialize_grads(False)
    if ctx.needs_input_grad[1]:
        ctx.save_for_backward(output[1])


def _backward_slope(ctx: Any, grad_z: Tensor | None, grad_slope: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_logvar = None
    if ctx.needs_input_grad[1]:
        (slope,) = ctx.saved_tensors
        # The slope is differentiated where the gradient is: its own is half of itself.
        factor = grad_z if grad_slope is None else (grad_slope / 2 if grad_z is None else grad_z + grad_slope / 2)
        grad_logvar = None if factor is None else factor * slope
    if ctx.several:
        grad_z, grad_logvar = (None if grad is None else grad.sum(0) for grad in (grad_z, grad_logvar))
    return grad_z, grad_logvar, None, None


_ARGUMENTS = "(Tensor mu, Tensor logvar, Tensor key, SymInt? num_samples=None)"

_reparameterize = define(
    f"reparameterize{_ARGUMENTS} -> Tensor",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    layouts=_layouts,
    definition=_definition,
)
_reparameterize_and_slope = define(
    f"reparameterize_and_slope{_ARGUMENTS} -> (Tensor, Tensor)",
    fake=_fake_slope,
    setup_context=_setup_context_slope,
    backward=_backward_slope,
    layouts=_layouts_slope,
    definition=_definition_slope,
)
_reparameterize_kl = define(
    f"reparameterize_kl{_ARGUMENTS} -> (Tensor, Tensor)",
    fake=_fake_kl,
    setup_context=_setup_context_kl,
    backward=_backward_kl,
    layouts=_layouts,
    definition=_definition_kl,
)


def _check(mu: Any, logvar: Any, num_samples: Any) -> int | None:
    """Looks at the arguments of both ops but the key; returns num_samples as an int or None."""
    check_tensor("mu", mu)
    check_same("logvar", logvar, "mu", mu)
    draws = 1
    if num_samples is not None:
        draws = num_samples = integer("num_samples", num_samples, least=1, what="an int or None")
    check_elements("mu, times num_samples,", draws * ((math.prod(mu.shape[1:]) + 3) // 4 * 4))
    checked: int | None = num_samples
    return checked


_CONTRACT = Contract(_check)


def reparameterize(
    mu: Tensor,
    logvar: Tensor,
    key: Key | None = None,
    *,
    num_samples: int | None = None,
    save_noise: bool = False,
) -> Tensor:
    """Samples z = mu + exp(logvar / 2) * eps, eps standard normal noise, in one pass over memory.

    Args:
        mu: (B, ...), float32, bfloat16, float16 or float64: the means.
        logvar: the same shape and dtype: the logarithms of the variances.
        key: what eps depends on; by default one drawn from torch's generator.
        num_samples: several draws per input: z is then (num_samples, B, ...). Draw s takes the elements from
            4 s ceil(n / 4) on, n the elements of an input, so that more draws begin with the same ones.
        save_noise: keep eps * exp(logvar / 2) / 2, as large as z, for the gradient instead of ``logvar`` and the key.
            The gradient is then a product, which is faster on CPUs; in bfloat16 it is rounded twice. In float16, whose
            range is too small for it, nothing is kept.

    Returns:
        z: mu's shape, dtype and memory format (contiguous or channels_last). The arithmetic is in float32, for float64
        inputs in float64; eps is never rounded to a half type. NaN and infinities propagate as in PyTorch.

    The gradient is made in one pass too. eps is made again in it, so that only ``logvar`` is kept for it, unless
    ``save_noise`` says otherwise:
    d/dmu = sum over draws of grad_z, d/dlogvar = sum over draws of grad_z * eps * exp(logvar / 2) / 2.

    Deterministic: the same bits for any number of threads, any split of the batch, and on any SIMD level.

    Raises:
        TypeError, ValueError: an argument is not as above; the message says which.

    >>> mu, logvar = torch.zeros(4, 2), torch.zeros(4, 2)
    >>> from gencore.ops import normal
    >>> torch.equal(reparameterize(mu, logvar, Key(0)), normal((4, 2), Key(0)))
    True

    Source: Kingma and Welling, "Auto-Encoding Variational Bayes" (2014), section 2.4.
    """
    known = _CONTRACT.known(mu, logvar, num_samples) if save_noise is False else None
    if known is not None and (packed := known_key(key, mu)) is not None:
        if known[1]:
            return _reparameterize.with_gradient(mu, logvar, packed, num_samples)
        return choice.kernel("reparameterize", mu)(mu, logvar, packed, num_samples)
    if is_overridden(mu, logvar, key):
        options = {"num_samples": num_samples, "save_noise": save_noise}
        return hand_over(reparameterize, (mu, logvar, key), mu, logvar, key, **options)
    if not isinstance(save_noise, bool):
        raise TypeError(f"save_noise must be True or False, got {type(save_noise).__name__}")
    num_samples = _CONTRACT(mu, logvar, num_samples)
    args = mu, logvar, resolve_key(key, mu), num_samples
    # Small derivatives would leave the range of float16.
    if save_noise and mu.dtype != torch.float16 and torch.is_grad_enabled() and logvar.requires_grad:
        return _reparameterize_and_slope(*args)[0]
    return _reparameterize(*args)


def reparameterize_kl(
    mu: Tensor, logvar: Tensor, key: Key | None = None, *, num_samples: int | None = None
) -> tuple[Tensor, Tensor]:
    """Samples z as :func:`reparameterize` does, and gives the KL divergence from the standard normal, in one pass.

    kl_b = 1/2 sum_i (mu_i^2 + exp(logvar_i) - 1 - logvar_i), over the elements i of sample b.

    Args:
        mu, logvar, key, num_samples: as for :func:`reparameterize`.

    Returns:
        (z, kl): z as :func:`reparameterize` returns it; kl (B,) in nats, float32 (float64 for float64 inputs), summed
        in float32 and float64 in an order that depends on shapes and memory format alone.

    Raises:
        TypeError, ValueError: an argument is not as above; the message says which.

    Source: Kingma and Welling, "Auto-Encoding Variational Bayes" (2014), equation 10 and appendix B.
    """
    known = _CONTRACT.known(mu, logvar, num_samples)
    if known is not None and (packed := known_key(key, mu)) is not None:
        if known[1]:
            return _reparameterize_kl.with_gradient(mu, logvar, packed, num_samples)
        return choice.kernel("reparameterize_kl", mu)(mu, logvar, packed, num_samples)
    if is_overridden(mu, logvar, key):
        return hand_over(reparameterize_kl, (mu, logvar, key), mu, logvar, key, num_samples=num_samples)
    num_samples = _CONTRACT(mu, logvar, num_samples)
    return _reparameterize_kl(mu, logvar, resolve_key(key, mu), num_samples)
