"""Steps of diffusers' schedulers as one op, with the coefficients that diffusers computes."""

from __future__ import annotations

import functools
import inspect
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.schedulers import scheduling_ddim, scheduling_ddpm
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from gencore import ops
from gencore._torch import is_differentiated_forward
from gencore.integrations.diffusers.originals import original
from gencore.integrations.diffusers.parts import ALREADY, Left, Part, Replacement
from gencore.noise import Key

# For a step whose noise is a tensor: a key of its own would be a draw of torch's generator.
_NO_NOISE = Key(0)
_PREDICTIONS = ("epsilon", "sample", "v_prediction")
_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large")
# What our steps stand in for. Whoever puts something else in these places means it to run.
_METHODS = {
    kind: {
        name: original(kind, name)
        for name in ("step", "_get_variance", "_threshold_sample", "previous_timestep")
        if hasattr(kind, name)
    }
    for kind in (DDPMScheduler, DDIMScheduler)
}


def is_scheduler(target: Any) -> bool:
    return isinstance(target, SchedulerMixin)


def replacements(name: str, scheduler: Any) -> Iterator[Replacement]:
    """Replaces the step of a scheduler, and tells what was done."""
    reason = _replace(scheduler)
    yield _Replaced(name, scheduler) if reason is None else Left(Part(name, type(scheduler).__name__, reason))


def _replace(scheduler: Any) -> str | None:
    """Gives a scheduler our step. Returns why not, if it was not done."""
    kind = type(scheduler)
    if "step" not in vars(scheduler):
        if kind not in _STEPS:
            return f"only {' and '.join(known.__name__ for known in _STEPS)} are served"
        if (reason := _refuse(scheduler)) is not None:
            return reason
        scheduler.step = Step(scheduler)
    elif not isinstance(scheduler.step, Step):
        return "it has a step of its own"
    elif scheduler.step in _held:
        return ALREADY
    _held.add(scheduler.step)
    return None


class Step:
    """The method ``step`` of one scheduler. A method of Python would be the class's own again behind a pickle."""

    def __init__(self, scheduler: Any):
        self.__self__ = scheduler
        self.is_undone = False

    @property
    def __func__(self) -> Callable[..., Any]:
        kind = type(self.__self__)
        return kind.step if self.is_undone else _STEPS[kind]

    @property
    def __signature__(self) -> inspect.Signature:
        """Pipelines look at it for what they may pass."""
        return inspect.signature(type(self.__self__).step.__get__(self.__self__))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__func__(self.__self__, *args, **kwargs)


# What an Acceleration can undo. The step of a copy is not in here until the copy is accelerated itself.
_held: weakref.WeakSet[Step] = weakref.WeakSet()


class _Replaced:
    """A scheduler that was given a step of ours."""

    def __init__(self, name: str, scheduler: Any):
        self.name, self.scheduler, self.step = name, scheduler, scheduler.step

    def told(self) -> tuple[Part, bool]:
        reason = _refuse(self.scheduler)
        what = "diffusion_step, with the noise that diffusers draws" if reason is None else reason
        return Part(self.name, type(self.scheduler).__name__, what), reason is None

    def undo(self) -> None:
        # Whoever wrapped it meanwhile calls diffusers' own through it.
        self.step.is_undone = True
        _held.discard(self.step)
        if vars(self.scheduler).get("step") is self.step:
            del self.scheduler.step


def _refuse(scheduler: Any) -> str | None:
    for name, method in _METHODS[type(scheduler)].items():
        # Where the step of its own is not ours, ours is not asked.
        if getattr(type(scheduler), name) is not method or (name != "step" and name in vars(scheduler)):
            return f"its {name} was replaced"
    config = scheduler.config
    if config.thresholding:
        return "its thresholding takes a number of the whole sample"
    if config.prediction_type not in _PREDICTIONS:
        return f"its prediction_type is {config.prediction_type}, not {', '.join(_PREDICTIONS)}"
    if isinstance(scheduler, DDPMScheduler) and scheduler.variance_type not in _VARIANCES:
        return f"its variance_type is {scheduler.variance_type}, not {', '.join(_VARIANCES)}"
    return None


@functools.wraps(DDPMScheduler.step)
def _ddpm_step(
    self: Any,
    model_output: Tensor,
    timestep: Any,
    sample: Tensor,
    generator: Any = None,
    return_dict: bool = True,
) -> Any:
    alpha_bar = _served_level(self, model_output, timestep, sample)
    if alpha_bar is None:
        return DDPMScheduler.step(self, model_output, timestep, sample, generator, return_dict)
    before = self.previous_timestep(timestep)
    alpha_bar_before = self.alphas_cumprod[before] if before >= 0 else self.one
    is_noisy = bool(timestep > 0)
    row = _ddpm_row(alpha_bar, float(alpha_bar_before), *_settings(self), self.variance_type if is_noisy else None)
    noise: tuple[Tensor, ...] = ()
    if is_noisy:
        drawn = scheduling_ddpm.randn_tensor(
            model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
        )
        noise = (drawn,)
    return _step(row, model_output, sample, noise, scheduling_ddpm.DDPMSchedulerOutput if return_dict else None)


@functools.wraps(DDIMScheduler.step)
def _ddim_step(
    self: Any,
    model_output: Tensor,
    timestep: Any,
    sample: Tensor,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    generator: Any = None,
    variance_noise: Tensor | None = None,
    return_dict: bool = True,
) -> Any:
    if (
        self.num_inference_steps is None
        or (eta > 0 and variance_noise is not None and generator is not None)
        or (alpha_bar := _served_level(self, model_output, timestep, sample)) is None
    ):
        options = (eta, use_clipped_model_output, generator, variance_noise, return_dict)
        return DDIMScheduler.step(self, model_output, timestep, sample, *options)
    before = timestep - self.config.num_train_timesteps // self.num_inference_steps
    alpha_bar_before = self.alphas_cumprod[before] if before >= 0 else self.final_alpha_cumprod
    row = _ddim_row(alpha_bar, float(alpha_bar_before), *_settings(self), float(eta), bool(use_clipped_model_output))
    noise: tuple[Tensor, ...] = ()
    if eta > 0:
        if variance_noise is None:
            variance_noise = scheduling_ddim.randn_tensor(
                model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
            )
        noise = (variance_noise.to(sample.dtype).expand(sample.shape),)
    return _step(row, model_output, sample, noise, scheduling_ddim.DDIMSchedulerOutput if return_dict else None)


_STEPS: dict[type, Callable[..., Any]] = {DDPMScheduler: _ddpm_step, DDIMScheduler: _ddim_step}


def _served_level(scheduler: Any, output: Any, timestep: Any, sample: Any) -> float | None:
    """alpha_bar of a step that the op takes: of tensors that are alike, on a device with kernels, without a gradient.

    None where alpha_bar is 0 and the network predicts the noise: diffusers' x0, a difference divided by 0, is then an
    infinity that is clipped, and the op's, a difference of infinities, would be no number.
    """
    if not (
        isinstance(output, Tensor)
        and isinstance(sample, Tensor)
        and (output.shape, output.dtype, output.device) == (sample.shape, sample.dtype, sample.device)
        and (sample.is_cpu or (sample.is_cuda and ops.is_served(sample.device)))
        and sample.is_floating_point()
        and not (torch.is_grad_enabled() and (output.requires_grad or sample.requires_grad))
        and not is_differentiated_forward()
        and (not isinstance(timestep, Tensor) or timestep.dim() == 0)
        and _refuse(scheduler) is None
    ):
        return None
    # Once: each of these waits for a GPU where the table is on one.
    alpha_bar = float(scheduler.alphas_cumprod[timestep])
    return None if scheduler.config.prediction_type == "epsilon" and alpha_bar == 0 else alpha_bar


def _settings(scheduler: Any) -> tuple[torch.dtype, str, float]:
    config = scheduler.config
    return (
        scheduler.alphas_cumprod.dtype,
        config.prediction_type,
        float(config.clip_sample_range) if config.clip_sample else math.inf,
    )


def _step(row: Tensor, output: Tensor, sample: Tensor, noise: tuple[Tensor, ...], kind: Any) -> Any:
    prediction = torch.empty_like(sample)
    x = ops.diffusion_step(sample, output, row, _NO_NOISE, history=noise, prediction=prediction)
    return (x, prediction) if kind is None else kind(prev_sample=x, pred_original_sample=prediction)


# The scalars below are computed as diffusers does it, in the type of the scheduler's table, which is float32: with more
# digits than 1 - alpha_bar has there at the first steps, it would be another step.


@functools.lru_cache(maxsize=4096)
def _ddpm_row(
    of_now: float, of_before: float, dtype: torch.dtype, predicts: str, limit: float, variance_type: str | None
) -> Tensor:
    """Ho et al. (2020), equation 7."""
    alpha_bar, alpha_bar_before = torch.tensor(of_now, dtype=dtype), torch.tensor(of_before, dtype=dtype)
    beta_bar, beta_bar_before = 1 - alpha_bar, 1 - alpha_bar_before
    alpha = alpha_bar / alpha_bar_before
    beta = 1 - alpha
    deviation = torch.zeros_like(beta)
    if variance_type == "fixed_large":
        deviation = beta**0.5
    elif variance_type is not None:
        deviation = torch.clamp(beta_bar_before / beta_bar * beta, min=1e-20) ** 0.5
    return ops.step_coefficients(
        **_prediction(alpha_bar, beta_bar, predicts),
        limit=limit,
        x=float(alpha**0.5 * beta_bar_before / beta_bar),
        x0=float(alpha_bar_before**0.5 * beta / beta_bar),
        history0=float(deviation),
    )


@functools.lru_cache(maxsize=4096)
def _ddim_row(
    of_now: float, of_before: float, dtype: torch.dtype, predicts: str, limit: float, eta: float, clips_noise: bool
) -> Tensor:
    """Song et al., "Denoising Diffusion Implicit Models" (2021), equations 12 and 16."""
    alpha_bar, alpha_bar_before = torch.tensor(of_now, dtype=dtype), torch.tensor(of_before, dtype=dtype)
    beta_bar = 1 - alpha_bar
    variance = (1 - alpha_bar_before) / beta_bar * (1 - alpha_bar / alpha_bar_before)
    deviation = eta * variance**0.5
    stays = float((1 - alpha_bar_before - deviation**2) ** 0.5)
    signal, noise = float(alpha_bar**0.5), float(beta_bar**0.5)
    columns = {"x0": float(alpha_bar_before**0.5)}
    # eps, which stays, is what the network said, or follows from it before x0 is clipped, or after.
    if clips_noise:
        columns["x"] = stays / noise
        columns["x0"] -= stays * signal / noise
    elif predicts == "epsilon":
        columns["direct"] = stays
    elif predicts == "sample":
        columns["x"], columns["direct"] = stays / noise, -stays * signal / noise
    else:
        columns["x"], columns["direct"] = stays * noise, stays * signal
    predicted = _prediction(alpha_bar, beta_bar, predicts)
    return ops.step_coefficients(**predicted, limit=limit, history0=float(deviation), **columns)


def _prediction(alpha_bar: Tensor, beta_bar: Tensor, predicts: str) -> dict[str, float]:
    signal, noise = float(alpha_bar**0.5), float(beta_bar**0.5)
    if predicts == "sample":
        return {}
    if predicts == "v_prediction":
        return {"predict_x": signal, "predict_output": -noise}
    return {"predict_x": 1 / signal, "predict_output": -noise / signal}
