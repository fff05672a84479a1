"""The training loss of diffusion models: its target is made in the kernel, noise and all, and never stored."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from gencore._torch import hand_over, is_batched_gradient, is_overridden
from gencore.backends import choice
from gencore.backends.layout import kept_format
from gencore.backends.reference import denoising_loss as reference
from gencore.noise import Key
from gencore.ops._checks import (
    Contract,
    check_elements_of,
    check_same,
    check_tensor,
    is_plain_key,
    known_key,
    resolve_key,
)
from gencore.ops._coefficients import check_schedule, check_steps, column_of, form_of_steps, rows_at, rows_of, widened
from gencore.ops._library import Layout, define, is_unobserved, pull_back, run_kernel
from gencore.ops._library import widened as wide
from gencore.ops.normal import normals_for
from gencore.schedule import Parameterization, Schedule, Variance, Weighting


def _fake(output: Tensor, x0: Tensor, table: Tensor, t: Tensor | None, key: Tensor, noise: Tensor | None) -> Tensor:
    return x0.new_empty(x0.shape[0], dtype=torch.float64 if x0.dtype == torch.float64 else torch.float32)


def _fake_backward(
    grad_loss: Tensor,
    output: Tensor,
    x0: Tensor,
    table: Tensor,
    t: Tensor | None,
    key: Tensor,
    noise: Tensor | None,
) -> Tensor:
    return torch.empty_like(output, memory_format=kept_format(output, x0))


def _layouts(args: Any) -> list[Layout]:
    return [Layout(dict.fromkeys(("output", "x0", "t", "key", "noise", "grad_loss"), 0), (0,))]


def _definition(
    output: Tensor, x0: Tensor, table: Tensor, t: Tensor | None, key: Tensor, noise: Tensor | None
) -> Tensor:
    eps = normals_for(x0, key, x0.shape, kept_format(x0)) if noise is None else wide(noise)
    return reference.denoising_loss(wide(output), wide(x0), rows_of(table, t, x0), eps)


def _definition_backward(grad_loss: Tensor, output: Tensor, *others: Any) -> Tensor:
    return pull_back(lambda output: _definition(output, *others), (output,), grad_loss)[0]


# Given the noise, the key is not used.
_ARGUMENTS = "Tensor output, Tensor x0, Tensor table, Tensor? t, Tensor key, Tensor? noise"
_denoising_loss_backward = define(
    f"denoising_loss_backward(Tensor grad_loss, {_ARGUMENTS}) -> Tensor",
    fake=_fake_backward,
    definition=_definition_backward,
    layouts=_layouts,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _keeping_error(
    output: Tensor, x0: Tensor, table: Tensor, t: Tensor | None, *key_and_noise: Any
) -> tuple[Tensor, Tensor | None]:
    """The loss, and what its gradient is a multiple of, so that noise is made once.

    On CPUs making it takes longer than writing and reading as much. The gradient will be in its place.
    """
    key, noise = key_and_noise
    if noise is None and output.shape == x0.shape and choice.has_kernel("denoising_loss_and_error", x0):
        loss, error = run_kernel("denoising_loss_and_error", (output, x0, table, t, key))
        return loss, error
    return run_kernel("denoising_loss", (output, x0, table, t, key, noise)), None


def _backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    output, x0, table, t, key, noise, *kept = ctx.saved_tensors
    error = kept[0] if kept and not ctx.__dict__.get("is_error_scaled") else None
    alone = is_unobserved() and type(grad_loss) is Tensor and not is_batched_gradient(grad_loss)
    has_scale = error is not None and choice.has_kernel("denoising_loss_scale", x0)
    if has_scale and alone and not torch.is_grad_enabled():
        ctx.is_error_scaled = True
        grad_output = choice.kernel("denoising_loss_scale", x0)(grad_loss, error, table, t, key)
    else:
        # The second time, or where it will itself be differentiated.
        grad_output = _denoising_loss_backward(grad_loss, output, x0, table, t, key, noise)
    # The target holds x0 of_x0 times, and the noise of_noise times.
    of_target: list[Tensor | None] = [None, None]
    for column, tensor, place in ((0, x0, 1), (1, noise, 5)):
        if ctx.needs_input_grad[place]:
            of_prediction = grad_output if output.shape == x0.shape else grad_output[:, : x0.shape[1]]
            of_target[column] = (-column_of(table, t, column, x0) * of_prediction).to(tensor.dtype)
    return grad_output if ctx.needs_input_grad[0] else None, of_target[0], None, None, None, of_target[1]


_denoising_loss = define(
    f"denoising_loss({_ARGUMENTS}) -> Tensor",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    layouts=_layouts,
    definition=_definition,
    keeping=_keeping_error,
)
# In the place of a key, where the noise is given.
_NO_KEY = Key(0)


def denoising_loss(
    model_output: Tensor,
    x0: Tensor,
    t: Tensor | int,
    schedule: Schedule,
    key: Key | None = None,
    *,
    noise: Tensor | None = None,
    parameterization: Parameterization = "eps",
    weighting: Weighting | Tensor = "simple",
    gamma: float = 5.0,
    bound_weight: float = 0.001,
) -> Tensor:
    """The loss of each sample: loss_b = w_t mean_i (output_i - target_i)^2, in one pass; its gradient in another.

    The target is made in the kernel, of ``x0`` and the noise that :func:`add_noise` drew with the same ``key``: no
    tensor of its size is kept or allocated. On the CPU the forward pass leaves the gradient, but for a factor, where it
    will be, if one is wanted; elsewhere the backward pass makes the noise again.

    Args:
        model_output: what a network said of x_t, x0's shape and dtype (where that is float32, a half type is converted
            first, as under autocast). With twice the channels (dimension 1) it says
            the variance too: its second half v places the log variance of p(x_{t-1} | x_t) between the posterior's and
            beta's, linearly from v = -1 to 1 (Nichol and Dhariwal 2021, equation 15).
        x0: (B, ...), float32, bfloat16, float16 or float64: the data.
        t: (B,), int64 or int32, 0 <= t < T: the step of each sample; or an int for all of them.
        schedule: has the levels of its T steps, as those of :mod:`gencore.diffusion` have.
        key: the one that x_t was made with; left out where ``noise`` is given.
        noise: eps, like ``x0``: what ``add_noise(..., return_noise=True)`` gave, where it is at hand. Reading it is
            faster than making it again on CPUs.
        parameterization: what the network predicts, ``"eps"``, ``"x0"``, ``"v"`` or ``"velocity"``;
            :meth:`gencore.schedule.Schedule.prediction` defines them.
        weighting: ``"simple"`` (w = 1), ``"snr"``, ``"min_snr"``, or a tensor (T,) of weights;
            :meth:`gencore.schedule.Schedule.weight` defines them.
        gamma: where ``"min_snr"`` cuts.
        bound_weight: lambda, for an output with a variance: to the loss is added lambda T L_t, L_t the term of the
            variational bound in bits per dimension (Nichol and Dhariwal 2021, equation 16, as its authors compute it);
            it has a gradient for the variance only. Where t = 0, L_t is -log p(x0 | x1) of 8-bit data in [-1, 1].

    Returns:
        (B,), float32 (float64 for float64 inputs): accumulated in float32 and float64 in an order that depends on
        shapes and memory format alone.

    The gradient is for ``model_output`` and, as far as the target's part goes, ``x0`` and ``noise``.

    Deterministic: the same bits for any number of threads, any split of the batch, and on any SIMD level; no atomics.
    In half types, a gradient on the CPU that is taken once, with nothing looking on, goes on from the rounded error of
    the forward pass: it may differ by a unit in the last place from one that is computed again.

    Raises:
        TypeError, ValueError: an argument is not as above; the message says which. The values of a ``t`` on a GPU are
            not waited for: the loss of a sample whose t is out of range becomes NaN.

    >>> from gencore import diffusion, ops
    >>> x0, t, key = torch.zeros(4, 1, 8, 8), torch.tensor([0, 10, 500, 999]), Key(0)
    >>> x_t, eps = ops.add_noise(x0, t, diffusion.linear(), key, return_noise=True)
    >>> bool((denoising_loss(eps, x0, t, diffusion.linear(), key) == 0).all())
    True

    Source: Ho et al., "Denoising Diffusion Probabilistic Models" (2020), equation 14 and Algorithm 1; Salimans and Ho
    (2022) for v; Hang et al. (2023) for min_snr; Nichol and Dhariwal (2021) for the variance.
    """
    known = None
    if type(weighting) is str and type(schedule) is Schedule and _is_plain_source(key, noise):
        known = _CONTRACT.known(model_output, x0, form_of_steps(t), noise)
    if known is None:
        tensors = (model_output, x0, t, schedule, key)
        if is_overridden(*tensors, noise, weighting):
            options = {"noise": noise, "parameterization": parameterization, "weighting": weighting, "gamma": gamma}
            relevant = (*tensors, noise, weighting)
            return hand_over(denoising_loss, relevant, *tensors, **options, bound_weight=bound_weight)
        model_output = widened(model_output, x0)
        _check_source(schedule, key, noise)
        _check(model_output, x0, t, noise)
        _CONTRACT.remember(None, model_output, x0, form_of_steps(t), noise)
    _check_weight(bound_weight)
    variance: Variance | None = None
    weight = 0.0
    if model_output.shape != x0.shape:
        variance, weight = "learned_range", float(bound_weight) * len(schedule) / math.log(2)
    table = schedule.loss_table(x0.device, parameterization, weighting, gamma, variance, weight)
    return _loss(known, model_output, x0, t, table, key, noise)


def variational_bound(
    model_output: Tensor,
    x0: Tensor,
    t: Tensor | int,
    schedule: Schedule,
    key: Key | None = None,
    *,
    noise: Tensor | None = None,
    parameterization: Parameterization = "eps",
    variance: Variance = "fixed_small",
) -> Tensor:
    """The term L_t of the variational bound of -log p(x0), in nats per dimension, of each sample, in one pass.

    For t >= 1 it is KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)); for t = 0, -log p(x0 | x1) of 8-bit data in [-1, 1],
    whose level k is 2 k / 255 - 1 (Ho et al. 2020, equations 5 and 13). Their sum over t, with the divergence of x_T
    from the standard normal, bounds -log p(x0) from above.

    Args:
        model_output, x0, t, schedule, key, noise, parameterization: as for :func:`denoising_loss`; the schedule is
            variance-preserving.
        variance: that of p(x_{t-1} | x_t): ``"fixed_small"``, the posterior's; ``"fixed_large"``, beta_t;
            ``"learned_range"``, for a ``model_output`` of twice the channels.

    Returns:
        (B,), float32 (float64 for float64 inputs), with a gradient for the second half of ``model_output`` only.

    Raises:
        TypeError, ValueError: an argument is not as above; the message says which.
    """
    known = None
    if type(schedule) is Schedule and _is_plain_source(key, noise):
        known = _CONTRACT.known(model_output, x0, form_of_steps(t), noise)
    if known is None:
        tensors = (model_output, x0, t, schedule, key)
        if is_overridden(*tensors, noise):
            options = {"noise": noise, "parameterization": parameterization, "variance": variance}
            return hand_over(variational_bound, (*tensors, noise), *tensors, **options)
        model_output = widened(model_output, x0)
        _check_source(schedule, key, noise)
        _check(model_output, x0, t, noise)
        _CONTRACT.remember(None, model_output, x0, form_of_steps(t), noise)
    if (variance == "learned_range") != (model_output.shape != x0.shape):
        raise ValueError(
            "variance must be learned_range for a model_output of twice the channels of x0, and only for such, got "
            f"{variance!r} with shapes {tuple(model_output.shape)} and {tuple(x0.shape)}"
        )
    table = schedule.loss_table(x0.device, parameterization, None, 1.0, variance, 1.0)
    return _loss(known, model_output, x0, t, table, key, noise)


def _loss(
    known: tuple[Any, bool] | None,
    output: Tensor,
    x0: Tensor,
    t: Tensor | int,
    table: Tensor,
    key: Key | None,
    noise: Tensor | None,
) -> Tensor:
    """The op on arguments that are right; ``known``: what the contract knows of them."""
    rows, index = rows_at(t, table)
    key = _NO_KEY if key is None else key
    loss: Tensor
    if known is not None and (packed := known_key(key, x0)) is not None:
        run = _denoising_loss.with_gradient if known[1] else choice.kernel("denoising_loss", x0)
        loss = run(output, x0, rows, index, packed, noise)
    else:
        loss = _denoising_loss(output, x0, rows, index, resolve_key(key, x0), noise)
    return loss


def _is_plain_source(key: Any, noise: Any) -> bool:
    return (key is None) is (noise is not None) and is_plain_key(key)


def _check_source(schedule: Any, key: Any, noise: Any) -> None:
    """Looks at what is no tensor, and at where the noise comes from."""
    if noise is None and not isinstance(key, Key):
        raise TypeError(
            f"key must be the gencore.Key that x_t was made with, unless noise is given, got {type(key).__name__}"
        )
    if noise is not None and key is not None:
        raise ValueError(f"key must be None where noise is given, got {key!r}")
    check_schedule(schedule)


def _check_weight(bound_weight: Any) -> None:
    if isinstance(bound_weight, bool) or not isinstance(bound_weight, numbers.Real):
        raise TypeError(f"bound_weight must be a number, got {type(bound_weight).__name__}")
    if not 0 <= bound_weight < math.inf:  # type: ignore[operator]
        raise ValueError(f"bound_weight must be at least 0 and finite, got {bound_weight}")


def _check(output: Any, x0: Any, t: Any, noise: Any) -> None:
    check_tensor("x0", x0)
    if noise is not None:
        check_same("noise", noise, "x0", x0)
    check_elements_of("x0", x0)
    check_prediction("model_output", output, "x0", x0)
    check_steps(t, x0)


_CONTRACT = Contract()


def check_prediction(name: str, output: Any, x_name: str, x: Tensor) -> None:
    """``output`` must be like ``x``, or have twice its channels and else be like it."""
    if isinstance(output, Tensor) and not output.is_nested and output.shape != x.shape:
        shape = (x.shape[0], 2 * x.shape[1], *x.shape[2:]) if x.dim() > 1 else None
        if output.shape != shape:
            also = "" if shape is None else f", or {tuple(shape)} with a variance"
            raise ValueError(
                f"{name} must have the shape of {x_name}, {tuple(x.shape)}{also}, got {tuple(output.shape)}"
            )
        check_tensor(name, output)
        output = output[:, : x.shape[1]]
    check_same(name, output, x_name, x)
