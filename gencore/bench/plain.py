"""What users of PyTorch write instead of our ops, in plain eager PyTorch: the "before" of every comparison.

The functions have the names, the signatures and the mathematics of those of :mod:`gencore.ops`, and no faults of ours:
they are written as a good user would write them, with views where PyTorch has views and with what it has fused. They
draw from torch's generator instead of a key, store the noise that is needed twice, and do not check their arguments.
:func:`operations` puts them in the place of our ops, so that whole models run on them.

All but :func:`diffusion_step`, whose coefficients are looked at to leave out what is 0, are made for ``torch.compile``;
compile :func:`step` in its place. So are :func:`denoising_loss` and :func:`variational_bound` if they are given their
noise.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gencore import ops
from gencore._ops import OPS
from gencore.noise import Key
from gencore.schedule import Parameterization, Schedule, Variance, Weighting

# The noise that operations() keeps from add_noise to the loss, as every training loop of PyTorch does: (key, noise).
_kept: list[tuple[Any, Tensor]] = []
_is_keeping = False
_replacing = threading.Lock()


def normal(
    shape: Sequence[int],
    key: Key | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`gencore.ops.normal`."""
    if out is not None:
        return out.normal_()
    if memory_format is torch.contiguous_format:
        return torch.randn(tuple(shape), dtype=dtype, device=device)
    return torch.empty(tuple(shape), dtype=dtype, device=device, memory_format=memory_format).normal_()


def uniform(
    shape: Sequence[int],
    key: Key | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`gencore.ops.uniform`."""
    if out is not None:
        return out.uniform_()
    if memory_format is torch.contiguous_format:
        return torch.rand(tuple(shape), dtype=dtype, device=device)
    return torch.empty(tuple(shape), dtype=dtype, device=device, memory_format=memory_format).uniform_()


def reparameterize(
    mu: Tensor,
    logvar: Tensor,
    key: Key | None = None,
    *,
    num_samples: int | None = None,
    save_noise: bool = True,
) -> Tensor:
    """:func:`gencore.ops.reparameterize`, whose noise autograd always keeps here."""
    if num_samples is None:
        eps = torch.randn_like(mu)
    else:
        eps = torch.randn((num_samples, *mu.shape), dtype=mu.dtype, device=mu.device)
    return mu + torch.exp(0.5 * logvar) * eps


def reparameterize_kl(
    mu: Tensor, logvar: Tensor, key: Key | None = None, *, num_samples: int | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`gencore.ops.reparameterize_kl`."""
    terms = mu.square() + logvar.exp() - 1 - logvar
    kl = 0.5 * _flat(terms).sum(1, dtype=_wide(mu))
    return reparameterize(mu, logvar, num_samples=num_samples), kl


def add_noise(
    x0: Tensor,
    t: Tensor | int,
    schedule: Schedule,
    key: Key | None = None,
    *,
    return_noise: bool = False,
    out: Tensor | None = None,
) -> Any:
    """:func:`gencore.ops.add_noise`. Under :func:`operations` the noise is kept for the loss of the same key."""
    alpha, sigma = _rows(schedule.add_noise_table(x0.device), t, x0, x0.dtype)
    noise = torch.randn_like(x0)
    signal = alpha * x0
    x_t = signal + sigma * noise if out is None else torch.add(signal, sigma * noise, out=out)
    if _is_keeping and key is not None:
        _kept[:] = [(key.packed.tolist(), noise)]
    return (x_t, noise) if return_noise else x_t


def denoising_loss(
    model_output: Tensor,
    x0: Tensor,
    t: Tensor | int,
    schedule: Schedule,
    key: Key | None = None,
    *,
    parameterization: Parameterization = "eps",
    weighting: Weighting | Tensor = "simple",
    gamma: float = 5.0,
    bound_weight: float = 0.001,
    noise: Tensor | None = None,
) -> Tensor:
    """:func:`gencore.ops.denoising_loss`.

    Args:
        noise: that of x_t; by default what :func:`add_noise` drew for the key, which only :func:`operations` keeps.

    Raises:
        ValueError: there is no such noise.
    """
    noise = _noise_of(key) if noise is None else noise
    if model_output.shape == x0.shape and isinstance(weighting, str) and weighting == "simple":
        target = _target(parameterization, x0, t, schedule, noise)
        return _mean(F.mse_loss(_widened(model_output), _widened(target), reduction="none"))
    learned = model_output.shape != x0.shape
    variance: Variance | None = "learned_range" if learned else None
    of_bound = float(bound_weight) * len(schedule) / math.log(2) if learned else 0.0
    table = schedule.loss_table(x0.device, parameterization, weighting, gamma, variance, of_bound)
    rows = _rows(table, t, x0, _wide(x0))
    prediction = model_output.chunk(2, dim=1)[0] if learned else model_output
    target = _target(parameterization, x0, t, schedule, noise)
    loss = _mean(rows[2] * F.mse_loss(_widened(prediction), _widened(target), reduction="none"))
    return loss + of_bound * _bound(model_output, x0, target, rows) if of_bound else loss


def variational_bound(
    model_output: Tensor,
    x0: Tensor,
    t: Tensor | int,
    schedule: Schedule,
    key: Key | None = None,
    *,
    parameterization: Parameterization = "eps",
    variance: Variance = "fixed_small",
    noise: Tensor | None = None,
) -> Tensor:
    """:func:`gencore.ops.variational_bound`; ``noise`` as for :func:`denoising_loss`."""
    noise = _noise_of(key) if noise is None else noise
    table = schedule.loss_table(x0.device, parameterization, None, 1.0, variance, 1.0)
    target = _target(parameterization, x0, t, schedule, noise)
    return _bound(model_output, x0, target, _rows(table, t, x0, _wide(x0)))


def _target(parameterization: Parameterization, x0: Tensor, t: Tensor | int, schedule: Schedule, eps: Tensor) -> Tensor:
    """What the network shall predict."""
    if parameterization == "eps":
        return eps
    if parameterization == "x0":
        return x0
    if parameterization == "velocity":
        return eps - x0
    alpha, sigma = _rows(schedule.add_noise_table(x0.device), t, x0, x0.dtype)
    return alpha * eps - sigma * x0


def _bound(output: Tensor, x0: Tensor, target: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """L_t, as the code of Nichol and Dhariwal (2021) has it: both of its forms, and then the one that it is at t."""
    *_, moved, middle, half_range, true = rows
    output, x0, target = (_widened(tensor) for tensor in (output, x0, target))
    prediction, log_variance = output, middle
    if output.shape != x0.shape:
        prediction, place = output.chunk(2, dim=1)
        log_variance = middle + half_range * place
    # From the mean of the posterior to that of the model, which learns nothing from this.
    shift = (moved * (prediction - target)).detach()
    first = torch.isneginf(true)
    gap = log_variance - torch.where(first, 0.0, true)
    kl = 0.5 * (-1 + gap + torch.exp(-gap) + shift.square() * torch.exp(-log_variance))
    return _mean(torch.where(first, _decoder_nll(x0.detach(), shift, log_variance), kl))


def _decoder_nll(x0: Tensor, shift: Tensor, log_variance: Tensor) -> Tensor:
    """-log p(x0 | x1) of 8-bit data in [-1, 1], for a mean of x0 + shift (Ho et al. 2020, equation 13)."""
    inverse = torch.exp(-0.5 * log_variance)
    # The bins are as wide to either side, and a normal distribution is symmetric: the tail that loses no digits.
    far = shift.abs()
    near_edge, far_edge = (1 / 255 - far) * inverse, (-1 / 255 - far) * inverse
    inner = torch.special.ndtr(near_edge) - torch.special.ndtr(far_edge)
    lowest = torch.special.ndtr((1 / 255 - shift) * inverse)
    highest = torch.special.ndtr((1 / 255 + shift) * inverse)
    probability = torch.where(x0 < -0.999, lowest, torch.where(x0 > 0.999, highest, inner))
    return -probability.clamp(min=1e-12).log()


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
    """:func:`gencore.ops.diffusion_step`: :func:`step` with the columns that the coefficients have."""
    columns: dict[str, Any]
    if coefficients.dim() == 1:
        # A sampler of PyTorch has numbers, and a line of code for every term that it has.
        columns = dict(zip(ops.STEP_COLUMNS, coefficients.tolist(), strict=True))
    else:
        rows = coefficients.to(x.device, x.dtype).reshape(-1, len(ops.STEP_COLUMNS), *[1] * (x.dim() - 1))
        columns = dict(zip(ops.STEP_COLUMNS, rows.unbind(1), strict=True))
    return step(
        x,
        output,
        columns,
        second=second,
        history=history,
        known=known,
        mask=mask,
        guidance_rescale=guidance_rescale,
        threshold=threshold,
        prediction=prediction,
        out=out,
    )


def step(
    x: Tensor,
    output: Tensor | None,
    columns: Mapping[str, Any],
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
    """A sampler's step, for :func:`diffusion_step`.

    Args:
        columns: of ``ops.STEP_COLUMNS`` those that there are, as numbers, or as tensors that broadcast to ``x``. What
            is left out has its default of :func:`gencore.ops.step_coefficients`, and no operation.
        x, output, second, history, known, mask, guidance_rescale, threshold, prediction, out: as there.
    """
    of_noise = columns.get("noise", 0.0)
    terms = [(columns.get("x", 0.0), x)]
    if output is not None:
        learned = output.shape != x.shape
        conditional, place = output.chunk(2, dim=1) if learned else (output, None)
        guided = _guided(conditional, second, columns, x, guidance_rescale)
        terms.append((columns.get("direct", 0.0), guided))
        if prediction is not None or not _is(columns.get("x0", 0.0), 0.0):
            x0 = _predicted(x, guided, columns, threshold, prediction)
            terms.append((columns.get("x0", 0.0), x0))
        if place is not None and not _is(of_noise, 0.0):
            log_scale = columns.get("log_scale_slope", 0.0) * place + columns.get("log_scale", 0.0)
            of_noise = of_noise * torch.exp(log_scale)
    terms += [(columns.get(f"history{i}", 0.0), earlier) for i, earlier in enumerate(history)]
    of_known_noise = columns.get("known_noise", 0.0) if mask is not None else 0.0
    if not (_is(of_noise, 0.0) and _is(of_known_noise, 0.0)):
        noise = torch.randn_like(x)
        terms.append((of_noise, noise))
    y = _sum(terms, x, None if mask is not None else out)
    if known is None or mask is None:
        return y
    of_known = [(columns.get("known", 1.0), known)]
    if not _is(of_known_noise, 0.0):
        of_known.append((of_known_noise, noise))
    blended = (y, _sum(of_known, x, None), mask)
    return torch.lerp(*blended) if out is None else torch.lerp(*blended, out=out)


def _guided(
    conditional: Tensor, second: Tensor | None, columns: Mapping[str, Any], x: Tensor, rescale: float
) -> Tensor:
    guided = _times(columns.get("output", 1.0), conditional)
    if second is not None and not _is(of_second := columns.get("second", 0.0), 0.0):
        guided = guided + _times(of_second, second if second.shape == x.shape else second.chunk(2, dim=1)[0])
    if not rescale:
        return guided
    # As diffusers' rescale_noise_cfg, but that an output that does not vary leaves no NaN.
    with torch.no_grad():
        dims = list(range(1, x.dim()))
        ratio = conditional.std(dims, correction=0, keepdim=True) / guided.std(dims, correction=0, keepdim=True)
        factor = rescale * ratio.nan_to_num(1.0, 1.0) + (1 - rescale)
    return guided * factor


def _predicted(
    x: Tensor, guided: Tensor, columns: Mapping[str, Any], threshold: float | None, out: Tensor | None
) -> Tensor:
    """The prediction of x0, in ``out`` if there is one."""
    limit, scale = columns.get("limit", math.inf), columns.get("x0_scale", 1.0)
    cuts = threshold is not None or not _is(limit, math.inf)
    scales = threshold is not None or not _is(scale, 1.0)
    terms = [(columns.get("predict_x", 0.0), x), (columns.get("predict_output", 1.0), guided)]
    x0 = _sum(terms, x, None if cuts or scales else out)
    if threshold is not None:
        # As diffusers' _threshold_sample.
        with torch.no_grad():
            size = torch.quantile(_flat(_widened(x0)).abs(), threshold, dim=1).view(-1, *[1] * (x.dim() - 1))
            if isinstance(limit, Tensor):
                limit = torch.where(limit.isinf(), 1.0, limit)
            elif limit == math.inf:
                limit = 1.0
            cut = size.clamp(min=limit)
            scale, limit = (scale * limit / cut).to(x.dtype), cut.to(x.dtype)
    if cuts:
        x0 = torch.clamp(x0, -limit, limit, out=None if scales else out)
    return torch.mul(x0, scale, out=out) if scales else x0


def _sum(terms: Sequence[tuple[Any, Tensor]], like: Tensor, out: Tensor | None) -> Tensor:
    """The sum of the products, but of those with 0."""
    kept = [pair for pair in terms if not _is(pair[0], 0.0)]
    if not kept:
        return torch.zeros_like(like) if out is None else out.zero_()
    total = _times(*kept[0])
    if len(kept) == 1:
        return total if out is None else out.copy_(total)
    for pair in kept[1:-1]:
        total = total + _times(*pair)
    last = _times(*kept[-1])
    return total + last if out is None else torch.add(total, last, out=out)


def _times(factor: Any, tensor: Tensor) -> Tensor:
    return tensor if _is(factor, 1.0) else factor * tensor


def _is(value: Any, number: float) -> bool:
    """Whether it is known to be that number without a look at a tensor."""
    return not isinstance(value, Tensor) and value == number


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    bias_in: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`gencore.ops.group_norm`."""
    if bias_in is not None:
        x = x + _along(bias_in, x)
    if weight is None or weight.dtype == x.dtype:
        y = F.group_norm(x, num_groups, weight, bias, eps)
    else:
        # The GroupNorm32 of Dhariwal and Nichol's code.
        y = F.group_norm(x.float(), num_groups, weight.float(), None if bias is None else bias.float(), eps).to(x.dtype)
    if scale is not None:
        y = y * (1 + _along(scale, y))
    if shift is not None:
        y = y + _along(shift, y)
    if activation == "silu":
        y = F.silu(y)
    return y if out is None else out.copy_(y)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "elu": F.elu, "selu": F.selu,
    "softplus": F.softplus, "silu": F.silu, "gelu": F.gelu,
}  # fmt: skip


def bias_act(
    x: Tensor,
    bias: Tensor | None = None,
    activation: str = "linear",
    *,
    slope: float = 0.2,
    gain: float = 1.0,
    clamp: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`gencore.ops.bias_act`."""
    y = x if bias is None else x + bias.to(x.dtype).reshape(-1, *[1] * (x.dim() - 2))
    if activation == "leaky_relu":
        y = F.leaky_relu(y, slope)
    elif activation != "linear":
        y = _ACTIVATIONS[activation](y)
    if not _is(gain, 1):
        y = y * gain
    if clamp is not None:
        y = y.clamp(-clamp, clamp)
    if out is not None:
        return out.copy_(y)
    return y.clone() if y is x else y


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """:func:`gencore.ops.attention`."""
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def spatial_attention(qkv: Tensor, num_heads: int, *, scale: float | None = None) -> Tensor:
    """:func:`gencore.ops.spatial_attention`: of a channels_last image views, of another dense heads.

    PyTorch's fused kernels do not take heads whose channels are not side by side.
    """
    heads = qkv.flatten(2).unflatten(1, (3, num_heads, -1)).transpose(-1, -2)
    q, k, v = (heads if heads.stride(-1) == 1 else heads.contiguous()).unbind(1)
    mixed = F.scaled_dot_product_attention(q, k, v, scale=scale)
    # Dense in the order in which they are to be: a view of what the fused kernels give, in channels_last.
    pixels = mixed.transpose(1, 2).flatten(2).transpose(1, 2)
    if heads.stride(-1) != 1:
        pixels = pixels.contiguous()
    return pixels.unflatten(2, qkv.shape[2:])


def upfirdn2d(
    x: Tensor,
    filter: Tensor,
    up: int | Sequence[int] = 1,
    down: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    *,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """:func:`gencore.ops.upfirdn2d`: zeros inserted, padding, and a convolution of each channel by itself."""
    (up_y, up_x), stride, sides = _two(up), _two(down), padding
    if isinstance(padding, int) or len(padding) == 2:
        sides = [side for side in _two(padding) for _ in range(2)]
    n, c, h, w = x.shape
    if up_y * up_x > 1:
        x = F.pad(x.reshape(n, c, h, 1, w, 1), (0, up_x - 1, 0, 0, 0, up_y - 1)).reshape(n, c, h * up_y, w * up_x)
    top, bottom, left, right = sides  # type: ignore[misc]
    x = F.pad(x, (left, right, top, bottom))
    weight = (filter if flip_filter else filter.flip(tuple(range(filter.dim())))).to(x.dtype)
    if filter.dim() == 2:
        weight = (weight * gain).expand(c, 1, -1, -1)
        return F.conv2d(x, weight, stride=stride, groups=c)
    rows, columns = weight[:, None].expand(c, 1, -1, -1), (weight * gain)[None, :].expand(c, 1, -1, -1)
    return F.conv2d(F.conv2d(x, rows, stride=(stride[0], 1), groups=c), columns, stride=(1, stride[1]), groups=c)


def upsample2d(
    x: Tensor, filter: Tensor, factor: int | Sequence[int] = 2, *, flip_filter: bool = False, gain: float = 1.0
) -> Tensor:
    """:func:`gencore.ops.upsample2d`."""
    rate = _two(factor)
    taps = filter.shape[0], filter.shape[-1]
    padding = [side for n, up in zip(taps, rate, strict=True) for side in ((n + up - 1) // 2, (n - up) // 2)]
    return upfirdn2d(x, filter, rate, 1, padding, flip_filter=flip_filter, gain=gain * math.prod(rate))


def downsample2d(
    x: Tensor, filter: Tensor, factor: int | Sequence[int] = 2, *, flip_filter: bool = False, gain: float = 1.0
) -> Tensor:
    """:func:`gencore.ops.downsample2d`."""
    taps = filter.shape[0], filter.shape[-1]
    padding = [side for n, by in zip(taps, _two(factor), strict=True) for side in ((n - by + 1) // 2, (n - by) // 2)]
    return upfirdn2d(x, filter, 1, factor, padding, flip_filter=flip_filter, gain=gain)


def filter2d(x: Tensor, filter: Tensor, *, flip_filter: bool = False, gain: float = 1.0) -> Tensor:
    """:func:`gencore.ops.filter2d`."""
    padding = [side for n in (filter.shape[0], filter.shape[-1]) for side in (n // 2, (n - 1) // 2)]
    return upfirdn2d(x, filter, 1, 1, padding, flip_filter=flip_filter, gain=gain)


def _two(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


_FUNCTIONS: dict[str, Callable[..., Any]] = {name: globals()[name] for op in OPS for name in op.functions}


# Of the ops that there is a plain function for.
NAMES = tuple(_FUNCTIONS)


@contextlib.contextmanager
def operations() -> Iterator[None]:
    """Everything that calls ``ops.name(...)`` calls these functions meanwhile, in all threads.

    What imported an op by its name keeps ours. Noise is then that of torch's generator, whatever the keys; the noise of
    :func:`add_noise` is kept for the one loss of the same key that follows.

    Raises:
        RuntimeError: it is under way already, here or in another thread.
    """
    global _is_keeping
    if not _replacing.acquire(blocking=False):
        raise RuntimeError("plain.operations() is under way already, and cannot be entered again")
    ours = {name: getattr(ops, name) for name in NAMES}
    try:
        _is_keeping = True
        for name, function in _FUNCTIONS.items():
            setattr(ops, name, function)
        yield
    finally:
        for name, function in ours.items():
            setattr(ops, name, function)
        _is_keeping = False
        _kept.clear()
        _replacing.release()


def _noise_of(key: Key | None) -> Tensor:
    if key is not None and _kept and _kept[0][0] == key.packed.tolist():
        return _kept.pop()[1]
    raise ValueError(
        "noise must be given: plain noise cannot be made again, and none is kept of this key. Under "
        "plain.operations() the last add_noise is, for one loss"
    )


def _rows(table: Tensor, t: Tensor | int, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The columns at ``t``, one value per sample, or one for all, shaped to be multiplied with ``x``."""
    at = table[t] if isinstance(t, Tensor) else table[t : t + 1]
    return at.to(dtype).reshape(-1, table.shape[1], *[1] * (x.dim() - 1)).unbind(1)


def _along(values: Tensor, x: Tensor) -> Tensor:
    """(N, C), shaped and typed to be added to x (N, C, ...)."""
    return values.to(x.dtype).reshape(*values.shape, *[1] * (x.dim() - 2))


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _widened(x: Tensor) -> Tensor:
    return x.to(_wide(x))


def _flat(x: Tensor) -> Tensor:
    """(B, elements)."""
    return x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)


def _mean(x: Tensor) -> Tensor:
    """Of each sample."""
    return _flat(x).mean(1)
