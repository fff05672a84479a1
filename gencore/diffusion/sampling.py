"""The loop that calls a network and a step kernel by turns."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gencore import ops
from gencore.arguments import as_int, integer
from gencore.diffusion.sampler import Sampler, check_number
from gencore.noise import Key
from gencore.progress import Progress

Model = Callable[[Tensor, Tensor], "Tensor | tuple[Tensor, Tensor]"]
Classifier = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[int, float, Tensor, Tensor], None]

_RESAMPLING = 0x5265_5061_696E_74  # "RePaint"
_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_OUTPUT, _SECOND, _PREDICT_OUTPUT = (ops.STEP_COLUMNS.index(name) for name in ("output", "second", "predict_output"))


def sample(
    model: Model,
    shape: Sequence[int],
    sampler: Sampler,
    key: Key | None = None,
    *,
    guidance_scale: float | None = None,
    guidance_rescale: float = 0.0,
    threshold: float | None = None,
    classifier: Classifier | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    resamples: int = 1,
    start: Tensor | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format | None = None,
    progress: bool = False,
    callback: Callback | None = None,
    return_trajectory: bool = False,
    check_finite: bool = False,
) -> Tensor:
    """Samples of a diffusion or flow model: from noise to data, one fused kernel after every call of the network.

    Args:
        model: called as ``model(x, t)`` with the state x, of ``shape``, and t, (B,) float32, the schedule's time; gives
            what the sampler's parameterization says, of x's shape, or with twice the channels if it also says
            how large the noise is (``learned_range``; other samplers ignore that half). For classifier-free guidance, a
            pair: with the condition and without. x is written over by the next step: it must not be kept or changed.
        shape: (B, ...) of the samples.
        sampler: what :func:`ddpm`, :func:`ddim` and the others return.
        key: what all noise depends on; by default one drawn from torch's generator. The initial noise is that of
            stream 0, the noise added when leaving step t of the schedule that of stream 1 + t, whatever other
            steps are taken; ``spacing="karras"`` numbers its own steps, from 0, instead of t. :func:`heun`'s second
            calls add 2^31 to that.
        guidance_scale: w: with a pair, the prediction is w conditional + (1 - w) unconditional (Ho and Salimans 2022,
            whose w is one less); with a ``classifier``, its gradient is multiplied with it, by default 1.
        guidance_rescale: phi from 0 to 1: how far the guided prediction is brought back to the deviation of the
            conditional one (Lin et al. 2024, equations 15 and 16).
        threshold: p: dynamic thresholding at the p-quantile of |x0| (Saharia et al. 2022), instead of the sampler's
            ``clip``, which is then the range that the data is in, 1 by default.
        classifier: called as ``classifier(x, t)``, with gradients enabled, gives grad_x log p(y | x_t): the noise that
            the model predicts is moved by -w sigma times that (Dhariwal and Nichol 2021, Algorithm 2), for any sampler.
        known, mask: inpainting: the data that is known, of ``shape``, and where, 1 where it is known; the mask may have
            any shape that broadcasts. After each step the known part, with noise of the new level, takes its place.
        resamples: how often each step but the last is made, with noise added again in between, so that what is filled
            in agrees with what is known (Lugmayr et al. 2022, Algorithm 1); for samplers that use no earlier
            prediction.
        start: data to begin from instead of nothing, of ``shape``: it gets noise of the first level (Meng et al. 2022,
            SDEdit). Give the sampler the last steps only, such as ``timesteps(len(schedule), 50)[25:]``.
        device, dtype: of the samples; by default the device of ``known``, of ``start``, or torch's default one.
        memory_format: of the state, which the network is given and should answer in: nothing is copied between two
            calls then. By default that of ``known`` or ``start``, else contiguous; ``torch.channels_last`` for a
            network in that format.
        progress: show on stderr how far it is: a bar on a terminal, which needs tqdm; elsewhere a line at times.
        callback: called as ``callback(call, t, x, x0)`` after each step, with the new state and the prediction of x0
            that led to it; both are written over later.
        return_trajectory: return all states instead of the last one.
        check_finite: stop where the network's output or the state is not finite. Looking waits for a GPU at every step.
            By default NaN goes on to the samples.

    Returns:
        (B, ...): the samples; or, for ``return_trajectory``, (1 + calls, B, ...): the initial state and that after each
        call. No gradient is recorded.

    Sample i of a batch depends on no other sample, if the model keeps them apart: with ``key.samples(i)`` it is the
    same alone.

    Raises:
        TypeError, ValueError: an argument, or what the model gives, is not as above; the message says which.
        FloatingPointError: ``check_finite`` found a value that is not finite; the message names the call and the time.
        ModuleNotFoundError: ``progress`` on a terminal without tqdm.

    >>> from gencore import Key
    >>> from gencore.diffusion import ddim, linear
    >>> sample(lambda x, t: 0.1 * x, (4, 3, 8, 8), ddim(linear(), 10), Key(0)).shape
    torch.Size([4, 3, 8, 8])
    """
    if not isinstance(sampler, Sampler):
        raise TypeError(f"sampler must be a Sampler, as ddpm() and others return, got {type(sampler).__name__}")
    if key is None:
        key = Key.from_generator()
    elif not isinstance(key, Key):
        raise TypeError(f"key must be a gencore.Key or None, got {type(key).__name__}; gencore.Key(seed) makes one")
    if not callable(model):
        raise TypeError(f"model must be callable, got {type(model).__name__}")
    for name, function in (("classifier", classifier), ("callback", callback)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be callable or None, got {type(function).__name__}")
    size = _checked_shape(shape)
    if dtype not in _FLOATING:
        raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    place = _device(device, known, start)
    layout = _memory_format(memory_format, size, known, start)
    if (known is None) != (mask is None):
        missing, there = ("known", "mask") if known is None else ("mask", "known")
        raise ValueError(f"{missing} must be given with {there}, got None")
    if known is not None:
        # Expanded, and brought to one format, once and not by every step.
        known = _like("known", known, size, place, dtype).contiguous(memory_format=layout)
        mask = _like("mask", mask, size, place, dtype, broadcast=True).contiguous(memory_format=layout)
    if start is not None:
        start = _like("start", start, size, place, dtype)
    repeats = _check_resamples(resamples, sampler)
    _check_share("guidance_rescale", guidance_rescale)
    if threshold is not None:
        _check_share("threshold", threshold)
    rows = _guided(sampler, guidance_scale, guidance_rescale, classifier)
    with torch.no_grad():
        count = 1 + len(sampler) if return_trajectory else 1
        room = torch.empty((count * size[0], *size[1:]), device=place, dtype=dtype, memory_format=layout)
        states = room.view(count, *size) if return_trajectory else None
        x = _initial(sampler, key, start, known, mask, room if states is None else states[0])
        outputs = _Outputs(model, classifier, guidance_scale, sampler, check_finite)
        uses = sampler.uses_history
        buffers = [torch.empty_like(x) for _ in range(2)] if any(uses) else []
        shown = torch.empty_like(x) if callback is not None and not buffers else None
        times = sampler.times.to(torch.float32).to(place)
        keys = [key.stream(stream) for stream in sampler.streams]
        earlier: tuple[Tensor, ...] = ()
        for call in _progress(len(sampler), progress):
            t = times[call].expand(size[0])
            last = call == len(sampler) - 1
            # A prediction that the next step takes, or that the callback is shown, has a tensor; others are not stored.
            kept = bool(buffers) and (callback is not None or (not last and uses[call + 1]))
            prediction = buffers[call % 2] if kept else shown
            history = earlier if uses[call] else ()
            for again in range(1 if last else repeats):
                if again:
                    anew = _again(key, sampler.streams[call], 2 * again - 1)
                    x = ops.diffusion_step(x, None, _back_up(sampler, call), anew, out=x)
                output, second = outputs(x, t, call)
                x = ops.diffusion_step(
                    x,
                    output,
                    rows[call],
                    _again(key, sampler.streams[call], 2 * again) if again else keys[call],
                    second=second,
                    history=history,
                    known=known,
                    mask=mask,
                    guidance_rescale=guidance_rescale,
                    threshold=threshold,
                    prediction=prediction,
                    out=x if states is None or again else states[call + 1],
                )
            if check_finite:
                _check_finite("the state after the step", x, sampler, call)
            if prediction is not None:
                earlier = (prediction,)
                if callback is not None:
                    callback(call, sampler.times[call].item(), x, prediction)
    return x if states is None else states


class _Outputs:
    """Calls the model and the classifier, and checks what they give."""

    def __init__(
        self,
        model: Model,
        classifier: Classifier | None,
        guidance_scale: float | None,
        sampler: Sampler,
        check_finite: bool,
    ):
        self.model, self.classifier, self.sampler, self.check_finite = model, classifier, sampler, check_finite
        self.paired = guidance_scale is not None and classifier is None

    def __call__(self, x: Tensor, t: Tensor, call: int) -> tuple[Tensor, Tensor | None]:
        given = self.model(x, t)
        second: Any = None
        if isinstance(given, (tuple, list)):
            if not self.paired:
                other = "without a classifier, which" if self.classifier is not None else "with guidance_scale, which"
                raise ValueError(f"model must return a pair of outputs only {other} says how to combine them")
            if len(given) != 2:
                raise ValueError(f"model must return a tensor or a pair of tensors, got {len(given)} values")
            given, second = given
        elif self.paired:
            raise ValueError(
                "model must return a pair, (conditional, unconditional), with guidance_scale and no classifier; got "
                f"{type(given).__name__}"
            )
        twice = (x.shape[0], 2 * x.shape[1], *x.shape[2:]) if x.dim() > 1 else x.shape
        output = self._checked("the model's output", given, x, call, (x.shape, twice))
        if self.sampler.learned_variance and output.shape != twice:
            raise ValueError(
                f"the model's output must be of shape {tuple(twice)}, the prediction and where the variance lies, for "
                f"variance learned_range; got {tuple(output.shape)}"
            )
        if second is not None:
            second = self._checked("the model's unconditional output", second, x, call, (x.shape, twice))
        elif self.classifier is not None:
            with torch.enable_grad():
                second = self.classifier(x, t)
            second = self._checked("the classifier's gradient", second, x, call, (x.shape,))
        return output, second

    def _checked(self, name: str, value: Any, x: Tensor, call: int, shapes: tuple[tuple[int, ...], ...]) -> Tensor:
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.shape not in shapes:
            wanted = " or ".join(str(tuple(shape)) for shape in shapes)
            raise ValueError(f"{name} must be of shape {wanted}, got {tuple(value.shape)}")
        if value.dtype not in _FLOATING:
            raise TypeError(f"{name} must be of a floating dtype, got {value.dtype}")
        if value.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {value.device}")
        if self.check_finite:
            _check_finite(name, value, self.sampler, call)
        if value.dtype != x.dtype:
            return value.to(x.dtype)
        # A model may give back its input or a view of it, which the step writes over.
        return value.clone() if value.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() else value


def _guided(sampler: Sampler, scale: float | None, rescale: float, classifier: Classifier | None) -> tuple[Tensor, ...]:
    """The rows of the steps, with what guidance makes of the output."""
    if scale is not None and not (isinstance(scale, numbers.Real) and math.isfinite(scale)):
        raise ValueError(f"guidance_scale must be a finite number or None, got {scale!r}")
    if rescale and (scale is None or classifier is not None):
        raise ValueError("guidance_rescale must be 0 without classifier-free guidance (guidance_scale and a pair)")
    rows = sampler.rows.clone()
    if classifier is not None:
        alpha, sigma = sampler.levels[:-1].unbind(1)
        if bool((alpha == 0).any()):
            raise ValueError("classifier must be None for a sampler that begins without signal (alpha = 0)")
        # eps - w sigma gradient is x0 + w sigma^2 / alpha gradient; the output is that times predict_output.
        weight = 1.0 if scale is None else float(scale)
        rows[:, _SECOND] = weight * sigma.square() / (alpha * rows[:, _PREDICT_OUTPUT])
    elif scale is not None:
        rows[:, _OUTPUT], rows[:, _SECOND] = float(scale), 1 - float(scale)
    return rows.unbind(0)


def _initial(
    sampler: Sampler, key: Key, start: Tensor | None, known: Tensor | None, mask: Tensor | None, out: Tensor
) -> Tensor:
    """Noise of the first level, around ``start`` and what is known."""
    alpha, sigma = sampler.levels[0].tolist()
    scale, noise = (0.0, sampler.initial_scale) if start is None else (alpha, sigma)
    row = ops.step_coefficients(x=scale, noise=noise, known=alpha, known_noise=sigma)
    origin = out.zero_() if start is None else start
    return ops.diffusion_step(origin, None, row, key.stream(0), known=known, mask=mask, out=out)


def _back_up(sampler: Sampler, call: int) -> Tensor:
    """The row that takes the state after a call back to the level before it, by the chain's own noise."""
    (alpha, sigma), (alpha_after, sigma_after) = sampler.levels[call : call + 2].tolist()
    scale = alpha / alpha_after
    return ops.step_coefficients(x=scale, noise=math.sqrt(max(sigma**2 - (scale * sigma_after) ** 2, 0.0)))


def _again(key: Key, stream: int, use: int) -> Key:
    """Noise of a step that is made again, apart from all other noise, also that of a key's own ``fold_in(1)``."""
    return key.fold_in(_RESAMPLING).fold_in(use).stream(stream)


def _check_share(name: str, value: Any) -> None:
    check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be from 0 to 1, got {value}")


def _check_resamples(resamples: Any, sampler: Sampler) -> int:
    resamples = integer("resamples", resamples, least=1)
    if resamples > 1 and any(sampler.uses_history):
        raise ValueError(f"resamples must be 1 for {sampler.name}, which uses earlier predictions, got {resamples}")
    return resamples


def _check_finite(name: str, value: Tensor, sampler: Sampler, call: int) -> None:
    if not bool(torch.isfinite(value).all()):
        raise FloatingPointError(
            f"{name} is not finite in call {call} of {len(sampler)}, at time {sampler.times[call].item():g}"
        )


def _checked_shape(shape: Any) -> tuple[int, ...]:
    given = shape if isinstance(shape, Sequence) and not isinstance(shape, str) else ()
    sizes = tuple(size for size in map(as_int, given) if size is not None and size >= 0)
    if not sizes or len(sizes) != len(given):
        raise ValueError(f"shape must be the sizes of a batch, (B, ...), got {shape!r}")
    return sizes


def _device(device: torch.device | str | None, known: Any, start: Any) -> torch.device:
    if device is None:
        device = next((tensor.device for tensor in (known, start) if isinstance(tensor, Tensor)), None)
    # A tensor knows its device by number, where "cuda" alone is the current one.
    return torch.empty(0, device=device).device


def _memory_format(given: Any, size: tuple[int, ...], known: Any, start: Any) -> torch.memory_format:
    """The one asked for, or else that of the data, if it is one that the kernels keep."""
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(size))
    if given is None:
        if channels_last is not None:
            for tensor in (known, start):
                fits = isinstance(tensor, Tensor) and tensor.shape == size and not tensor.is_contiguous()
                if fits and tensor.is_contiguous(memory_format=channels_last):
                    return channels_last
        return torch.contiguous_format
    if not isinstance(given, torch.memory_format) or given not in (torch.contiguous_format, channels_last):
        raise ValueError(
            "memory_format must be torch.contiguous_format, or torch.channels_last for samples of 4 dimensions and "
            f"torch.channels_last_3d for 5, got {given} for {len(size)}"
        )
    return given


def _like(
    name: str, value: Any, size: tuple[int, ...], device: torch.device, dtype: torch.dtype, *, broadcast: bool = False
) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.device != device:
        raise ValueError(f"{name} must be on the device of the samples, {device}, got {value.device}")
    if broadcast:
        try:
            value = value.expand(size)
        except RuntimeError:
            raise ValueError(
                f"{name} must have a shape that broadcasts to that of the samples, {size}, got {tuple(value.shape)}"
            ) from None
    elif value.shape != size:
        raise ValueError(f"{name} must have the shape of the samples, {size}, got {tuple(value.shape)}")
    return value.detach().to(dtype)


def _progress(calls: int, shown: bool) -> Iterator[int]:
    with Progress(calls, name="sampling", unit="call", shown=shown) as progress:
        for call in range(calls):
            yield call
            progress.update()
