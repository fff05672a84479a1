"""One step of any sampler: everything between two calls of the network, in one pass over memory."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gencore._torch import beside, hand_over, is_overridden, lifted
from gencore.backends import choice
from gencore.backends.layout import kept_format
from gencore.backends.reference import diffusion_step as reference
from gencore.noise import Key
from gencore.ops._checks import (
    Contract,
    check_dense,
    check_elements_of,
    check_out,
    check_same,
    check_tensor,
    known_key,
    resolve_key,
)
from gencore.ops._coefficients import along_samples, widened
from gencore.ops._library import Layout, Out, define
from gencore.ops._library import widened as wide
from gencore.ops.denoising_loss import check_prediction
from gencore.ops.normal import fill_with_normals, normals_for

_DEFAULTS = {
    "output": 1.0, "second": 0.0, "predict_x": 0.0, "predict_output": 1.0, "limit": math.inf, "x0_scale": 1.0,
    "x": 0.0, "direct": 0.0, "x0": 0.0, "history0": 0.0, "history1": 0.0,
    "noise": 0.0, "log_scale": 0.0, "log_scale_slope": 0.0, "known": 1.0, "known_noise": 0.0,
}  # fmt: skip
STEP_COLUMNS = tuple(_DEFAULTS)
_ONE_ROW = (len(STEP_COLUMNS),)
_OUTPUT, _SECOND, _PREDICT_X, _PREDICT_OUTPUT, _LIMIT, _X0_SCALE = range(6)


def step_coefficients(**columns: float | Sequence[float] | Tensor) -> Tensor:
    """The coefficients of :func:`diffusion_step`, by name: float64 on the CPU.

    Args:
        columns: any of ``STEP_COLUMNS``, each a number, or a sequence or tensor of N. Left out, ``output``,
            ``predict_output``, ``x0_scale`` and ``known`` are 1, ``limit`` is infinite, the others are 0.

    Returns:
        (16,), or (N, 16) if any column has N values.

    Raises:
        TypeError, ValueError: a column of another name, or that is no number; columns of different lengths.

    >>> step_coefficients(x=0.5, x0=0.5).shape, step_coefficients(x=[0.1, 0.2, 0.3], x0=0.5).shape
    (torch.Size([16]), torch.Size([3, 16]))
    """
    unknown = [name for name in columns if name not in _DEFAULTS]
    if unknown:
        raise TypeError(f"columns must be of {', '.join(STEP_COLUMNS)}, got {unknown[0]}")
    values: list[Tensor] = []
    length: int | None = None
    for name, default in _DEFAULTS.items():
        try:
            value = torch.as_tensor(columns.get(name, default), dtype=torch.float64, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{name} must be a number or several, got {type(columns[name]).__name__}") from error
        if value.dim() > 1 or (value.dim() == 1 and length is not None and len(value) != length):
            wanted = "a number or one-dimensional" if length is None else f"a number or {length} of them"
            raise ValueError(f"{name} must be {wanted}, got shape {tuple(value.shape)}")
        length = len(value) if value.dim() == 1 else length
        values.append(value)
    if length is None:
        return torch.stack(values)
    return torch.stack([value.expand(length) for value in values], 1)


def _fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=kept_format(x))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, predicted, second, _, _, _, mask, rows, key = inputs
    ctx.save_for_backward(x, predicted, second, mask, rows, key)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient, of PyTorch's own operations: steps are differentiated through rarely."""
    x, output, second, mask, rows, key = ctx.saved_tensors
    dtype, wanted = x.dtype, ctx.needs_input_grad
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    x, grad = x.to(kind), grad.to(kind)
    columns = [along_samples(column, x) for column in beside(rows.to(x.device), x).unbind(1)]
    of_output, of_second, predict_x, predict_output, limit, x0_scale, of_x, direct, of_x0 = columns[:9]
    of_history0, of_history1, of_noise, log_scale, log_scale_slope, of_known, _ = columns[9:]
    grad_y = grad if mask is None else grad * (1 - mask.to(kind))
    grad_x, grad_output, grad_second = of_x * grad_y, None, None
    if output is not None:
        learned = output.shape != x.shape
        prediction, place = output.to(kind).chunk(2, 1) if learned else (output.to(kind), None)
        guided = of_output * prediction
        if second is not None:
            guided = guided + of_second * (second if second.shape == x.shape else second[:, : x.shape[1]]).to(kind)
        inside = (predict_x * x + predict_output * guided).abs() <= limit
        to_x0 = torch.where(inside, x0_scale * of_x0 * grad_y, torch.zeros_like(grad_y))
        to_guided = direct * grad_y + predict_output * to_x0
        grad_x = grad_x + predict_x * to_x0
        grad_output = of_output * to_guided
        if place is not None:
            noise = fill_with_normals(torch.empty_like(x), key)
            scale = of_noise * torch.exp(log_scale + log_scale_slope * place)
            # Where no noise is added none is scaled, however large the scale.
            scale = torch.where(of_noise == 0, torch.zeros_like(scale), scale)
            to_place = grad_y * scale * log_scale_slope * noise
            grad_output = torch.cat((grad_output, to_place), 1)
        if second is not None:
            grad_second = of_second * to_guided
            if second.shape != x.shape:
                grad_second = torch.cat((grad_second, torch.zeros_like(grad_second)), 1)
    grads = (
        grad_x, grad_output, grad_second, of_history0 * grad_y, of_history1 * grad_y,
        None if mask is None else grad * mask.to(kind) * of_known,
    )  # fmt: skip
    passed = [
        grad.to(dtype) if want and grad is not None else None for grad, want in zip(grads, wanted[:6], strict=True)
    ]
    return (*passed, None, None, None)


def _definition(x: Tensor, *args: Any) -> Tensor:
    output, second, history0, history1, known, mask, rows, key = args
    noise = normals_for(x, key, x.shape, kept_format(x))
    y, _ = reference.diffusion_step(
        wide(x), wide(output), wide(second), wide(history0), wide(history1), wide(known), wide(mask),
        beside(rows.to(x.device), x), noise,
    )  # fmt: skip
    return y.to(x.dtype)


_diffusion_step = define(
    "diffusion_step(Tensor x, Tensor? output, Tensor? second, Tensor? history0, Tensor? history1, Tensor? known, "
    "Tensor? mask, Tensor rows, Tensor key) -> Tensor",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    layouts=lambda args: [Layout(dict.fromkeys(args, 0), (0,))],
    definition=_definition,
    out=Out(kept_format, ("out", "prediction?")),
)


def diffusion_step(
    x: Tensor,
    output: Tensor | None,
    coefficients: Tensor,
    key: Key | None = None,
    *,
    second: Tensor | None = None,
    history: Sequence[Tensor] = (),
    known: Tensor | None = None,
    mask: Tensor | None = None,
    guidance_rescale: float = 0.0,
    threshold: float | None = None,
    prediction: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One step of a sampler in one pass over memory: everything between two calls of the network.

    With the names of ``STEP_COLUMNS`` for the coefficients (``c.``) of each sample, and eps the noise of ``key``::

        g  = c.output * output + c.second * second
        x0 = c.x0_scale * clamp(c.predict_x * x + c.predict_output * g, -c.limit, c.limit)
        y  = c.x * x + c.direct * g + c.x0 * x0 + c.history0 * history[0] + c.history1 * history[1]
             + c.noise * exp(c.log_scale + c.log_scale_slope * v) * eps
        y  = mask * (c.known * known + c.known_noise * eps) + (1 - mask) * y

    What is not given is left out. The samplers of :mod:`gencore.diffusion` compute such coefficients; each is nothing
    but a table of them.

    Args:
        x: (B, ...), float32, bfloat16, float16 or float64: the state.
        output: what the network said of ``x``, of x's shape and dtype; with twice the channels (dimension 1), the
            second half is v, on which the scale of the noise depends. None for a step that only adds noise.
        coefficients: (16,) or one row per sample, (B, 16), float64, on the CPU or on x's device, as
            :func:`step_coefficients` makes them. On the device they may change between replays of a captured graph.
        key: what eps depends on, ``ops.normal(x.shape, key)``; by default one drawn from torch's generator, also for a
            step without noise. Where ``noise`` and ``known_noise`` of a sample are 0, its eps is not made.
        second: another output of the network, or the gradient of a classifier, as ``output`` (a v in it is not read).
            Where ``x`` is float32, both may be of a half type, as under autocast: they are converted first.
        history: up to two earlier predictions or states, like ``x``.
        known, mask: what some of the picture shall be, like ``x``, and where: 1 where it is known, 0 where not; the
            mask may have any shape that broadcasts to x's; one of x's own shape need not be expanded first.
        guidance_rescale: phi: g is multiplied with phi std(output) / std(g) + 1 - phi, standard deviations over the
            elements of a sample (Lin et al. 2024, equations 15 and 16).
        threshold: p: instead of at ``limit``, x0 is cut at s, the larger of the p-quantile of its sample's |x0| and
            ``limit`` (1 if that is infinite), and multiplied with limit / s (Saharia et al. 2022, section 2.3).
        prediction: a tensor like ``x``, apart from all others, that x0 is written to.
        out: a tensor like ``x`` to write to instead of a new one, with any strides; it may be ``x`` itself.

    ``guidance_rescale`` and ``threshold`` need numbers of the whole sample first: PyTorch's operations find them.

    Returns:
        y: x's shape, dtype and memory format (contiguous or channels_last). The arithmetic is in float32, for float64
        inputs in float64, with coefficients rounded once; y is rounded once. NaN propagates.

    There is a gradient for every tensor but ``mask`` and ``coefficients`` (the latter's by-products of
    ``guidance_rescale`` and ``threshold`` count as constants), unless ``out`` or ``prediction`` is given.

    Deterministic: the same bits for any number of threads, any split of the batch, and on any backend.

    Raises:
        TypeError, ValueError: an argument is not as above; the message says which, and nothing is written.

    >>> x, eps = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    >>> euler = step_coefficients(x=1.0, direct=-0.1)  # x + (s' - s) velocity
    >>> torch.allclose(diffusion_step(x, eps, euler, Key(0)), x - 0.1 * eps)
    True

    Source: Ho et al. (2020), Algorithm 2; Song et al., "Denoising Diffusion Implicit Models" (2021), equation 12; Lu et
    al., "DPM-Solver++" (2022), Algorithm 2; Karras et al. (2022), Algorithm 2, are all of this form.
    """
    if (
        threshold is None
        and prediction is None
        and out is None
        and type(guidance_rescale) in (int, float)
        and guidance_rescale == 0
        and type(history) is tuple
        and (found := _CONTRACT.known(x, output, coefficients, second, known, mask, *history)) is not None
        and not found[1]
        and (packed := known_key(key, x)) is not None
    ):
        rows = coefficients if coefficients.dim() == 2 else coefficients.unsqueeze(0)
        history0, history1 = (*history, None, None)[:2]
        mask = mask if mask is None else mask.expand(x.shape)
        return choice.kernel("diffusion_step", x)(x, output, second, history0, history1, known, mask, rows, packed)
    several = history if isinstance(history, (tuple, list)) else (history,)
    relevant = (x, output, coefficients, key, second, *several, known, mask, prediction, out)
    if is_overridden(*relevant):
        options: dict[str, Any] = {
            "second": second, "history": history, "known": known, "mask": mask, "guidance_rescale": guidance_rescale,
            "threshold": threshold, "prediction": prediction, "out": out,
        }  # fmt: skip
        return hand_over(diffusion_step, relevant, x, output, coefficients, key, **options)
    output, second = (widened(tensor, x) for tensor in (output, second))
    if isinstance(history, Tensor) or not isinstance(history, Sequence):
        raise TypeError(f"history must be a sequence of tensors, got {type(history).__name__}")
    _CONTRACT(x, output, coefficients, second, known, mask, *history)
    history0, history1 = (*history, None, None)[:2]
    mask = mask if mask is None else mask.expand(x.shape)
    rows = lifted(coefficients)
    rows = rows if rows.dim() == 2 else rows.unsqueeze(0)
    phi = _check_number("guidance_rescale", guidance_rescale)
    if phi != 0 or threshold is not None:
        if output is None:
            raise ValueError("output must be given with guidance_rescale or threshold, got None")
        quantile = None if threshold is None else _check_number("threshold", threshold)
        rows = _with_statistics(x, output, second, rows, phi, quantile)
    tensors = (x, output, second, history0, history1, known, mask)
    if out is None and prediction is None:
        return _diffusion_step(*tensors, rows, resolve_key(key, x))
    names = dict(zip(("output", "second", "history[0]", "history[1]", "known", "mask"), tensors[1:], strict=True))
    if prediction is not None:
        if output is None:
            raise ValueError("output must be given where prediction is to be written, got None")
        check_out(prediction, "x", x, names, own_name="prediction", may_be_x=False)
    if out is None:
        out = torch.empty_like(x, memory_format=kept_format(x))
    check_out(out, "x", x, {**names, "prediction": prediction})
    _diffusion_step.into(*tensors, rows, resolve_key(key, x), out, prediction)
    return out


def _check(x: Any, output: Any, coefficients: Any, second: Any, known: Any, mask: Any, *history: Any) -> None:
    """Looks at every tensor."""
    check_tensor("x", x)
    check_elements_of("x", x)
    if output is not None:
        check_prediction("output", output, "x", x)
    if second is not None:
        if output is None:
            raise ValueError("output must be given with second, got None")
        check_prediction("second", second, "x", x)
    _check_coefficients(coefficients, x)
    if len(history) > 2:
        raise ValueError(f"history must hold at most two tensors, got {len(history)}")
    for i, earlier in enumerate(history):
        check_same(f"history[{i}]", earlier, "x", x)
    if (known is None) != (mask is None):
        missing, there = ("known", "mask") if known is None else ("mask", "known")
        raise ValueError(f"{missing} must be given with {there}, got None")
    if known is not None:
        check_same("known", known, "x", x)
        _check_mask(mask, x)


_CONTRACT = Contract(_check)


def _check_mask(mask: Any, x: Tensor) -> None:
    check_tensor("mask", mask)
    if mask.requires_grad and torch.is_grad_enabled():
        raise ValueError("mask must not require a gradient: it has none")
    try:
        whole = mask.expand(x.shape)
    except RuntimeError:
        raise ValueError(
            f"mask must have a shape that broadcasts to that of x, {tuple(x.shape)}, got {tuple(mask.shape)}"
        ) from None
    check_same("mask", whole, "x", x)


def _check_coefficients(coefficients: Any, x: Tensor) -> None:
    if not isinstance(coefficients, Tensor):
        raise TypeError(
            f"coefficients must be a tensor, got {type(coefficients).__name__}; step_coefficients makes one"
        )
    check_dense("coefficients", coefficients)
    if coefficients.dtype != torch.float64:
        raise TypeError(f"coefficients must be of torch.float64, got {coefficients.dtype}")
    columns = len(STEP_COLUMNS)
    if coefficients.shape != (columns,) and coefficients.shape != (x.shape[0], columns):
        raise ValueError(
            f"coefficients must be of shape ({columns},), or ({x.shape[0]}, {columns}) with a row per sample, got "
            f"{tuple(coefficients.shape)}"
        )
    if not (coefficients.is_cpu or coefficients.device == x.device):
        raise ValueError(f"coefficients must be on the CPU or on {x.device}, got {coefficients.device}")
    if coefficients.requires_grad and torch.is_grad_enabled():
        raise ValueError("coefficients must not require a gradient: they have none")


def _check_number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    number = float(value)
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must be from 0 to 1, got {value}")
    return number


@torch.no_grad()
def _with_statistics(
    x: Tensor, output: Tensor, second: Tensor | None, rows: Tensor, phi: float, quantile: float | None
) -> Tensor:
    """The rows with what ``guidance_rescale`` and ``threshold`` ask for, one per sample, on x's device."""
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = beside(rows.to(x.device), x).expand(x.shape[0], -1).clone()
    if x.numel() == 0:
        return rows

    def flat(tensor: Tensor) -> Tensor:
        return (tensor if tensor.shape == x.shape else tensor[:, : x.shape[1]]).to(kind).reshape(x.shape[0], -1)

    columns = rows.to(kind)[:, :, None].unbind(1)
    of_prediction = flat(output)
    guided = columns[_OUTPUT] * of_prediction
    if second is not None:
        guided = guided + columns[_SECOND] * flat(second)
    if phi != 0:
        ratio = of_prediction.std(1, correction=0) / guided.std(1, correction=0)
        # What does not vary cannot be brought to another deviation.
        factor = phi * torch.where(ratio.isfinite(), ratio, torch.ones_like(ratio)) + (1 - phi)
        rows[:, _OUTPUT] *= factor
        rows[:, _SECOND] *= factor
        guided = guided * factor[:, None]
    if quantile is not None:
        sizes = (columns[_PREDICT_X] * flat(x) + columns[_PREDICT_OUTPUT] * guided).abs()
        limit = rows[:, _LIMIT]
        limit = torch.where(limit.isinf(), torch.ones_like(limit), limit)
        cut = torch.maximum(_quantile(sizes, quantile).to(limit.dtype), limit)
        rows[:, _LIMIT] = cut
        rows[:, _X0_SCALE] *= limit / cut
    return rows


def _quantile(values: Tensor, p: float) -> Tensor:
    """The p-quantile of each row, interpolated linearly; torch.quantile takes no more than 2^24 elements."""
    n = values.shape[1]
    place = p * (n - 1)
    below = min(math.floor(place), n - 1)
    largest = values.topk(n - below, dim=1).values
    low, high = largest[:, -1], largest[:, -2] if n - below > 1 else largest[:, -1]
    return torch.lerp(low, high, place - below)
