"""Whole trajectories against diffusers' schedulers, with the same model and the same noise.

In float64 throughout, all of it agrees to a few units in the last place. diffusers keeps its tables in float32, where
1 - alpha_bar has no more than three digits at the first steps: so its tables are made in float64 by its own code
(peers.in_float64), and both then run in float32, within 1e-5. One test runs diffusers as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusion.peers import SHAPE, doubled, far, in_float64, model, trajectory
from torch import Tensor

from gencore import Key, diffusion
from gencore.diffusion import Sampler

pytest.importorskip("diffusers")

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
)

KEY = Key(3).samples(5)
# Units in the last place of float64 times some hundreds of operations on each of up to 100 steps; measured 5e-15. Of
# float32: measured 5e-6.
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5}
NAMES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
BETAS = {"beta_start": 1e-4, "beta_end": 0.02}
SPACINGS = [("leading", 50), ("trailing", 50), ("linspace", 10)]
both_types = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
each_prediction = pytest.mark.parametrize("predicts", list(NAMES))


def compare(
    sampler: Sampler,
    scheduler: type,
    steps: int,
    dtype: torch.dtype,
    *,
    called: Callable[[Tensor, Tensor], Tensor] = model,
    peer_called: Callable[[Tensor, Tensor], Tensor] | None = None,
    scaled: bool = False,
    set_timesteps: dict[str, Any] | None = None,
    step: dict[str, Any] | None = None,
    threshold: float | None = None,
    **config: Any,
) -> float:
    with in_float64(scheduler):
        peer = scheduler(**config)
        peer.set_timesteps(**(set_timesteps or {"num_inference_steps": steps}))
    options = {"threshold": threshold, "return_trajectory": True}
    ours = diffusion.sample(called, SHAPE, sampler, KEY, dtype=dtype, **options)
    with in_float64(scheduler) if dtype == torch.float64 else nullcontext():
        theirs = trajectory(peer, sampler, KEY, ours[0], peer_called or called, scaled=scaled, **(step or {}))
    return far(ours, theirs)


@both_types
@each_prediction
@pytest.mark.parametrize(("spacing", "steps"), SPACINGS)
@pytest.mark.parametrize("clip", [None, 0.9])
def test_ddpm(dtype, predicts, spacing, steps, clip):
    sampler = diffusion.ddpm(diffusion.linear(), steps, parameterization=predicts, spacing=spacing, clip=clip)
    # Their noise of the last step has the variance 1e-20, if it does not end at t = 0: that of a deviation of 1e-10.
    bound = max(BOUNDS[dtype], 1e-9 if spacing == "trailing" else 0.0)
    options = {"clip_sample": clip is not None, "clip_sample_range": clip or 1.0, "prediction_type": NAMES[predicts]}
    assert compare(sampler, DDPMScheduler, steps, dtype, timestep_spacing=spacing, **options) < bound


@both_types
@each_prediction
@pytest.mark.parametrize(
    ("schedule", "config"),
    [
        (diffusion.linear(), {}),
        (diffusion.cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
        (diffusion.sigmoid(), {"beta_schedule": "sigmoid"}),
    ],
    ids=["linear", "cosine", "sigmoid"],
)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_ddpm_variances(dtype, predicts, schedule, config, variance):
    sampler = diffusion.ddpm(schedule, 25, parameterization=predicts, variance=variance, spacing="leading")
    called = doubled if variance == "learned_range" else model
    config = {**config, "variance_type": variance, "clip_sample": False, "prediction_type": NAMES[predicts]}
    assert compare(sampler, DDPMScheduler, 25, dtype, called=called, **config) < BOUNDS[dtype]


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_ddpm_over_all_steps(variance):
    sampler = diffusion.ddpm(diffusion.linear(), variance=variance, clip=1.0)
    called = doubled if variance == "learned_range" else model
    # A thousand steps, in each of which 1 - alpha_bar loses up to four digits.
    found = compare(sampler, DDPMScheduler, 1000, torch.float64, called=called, variance_type=variance)
    assert found < 1e-11


@both_types
@pytest.mark.parametrize("steps", [5, 50])
def test_ddpm_with_thresholding(dtype, steps):
    sampler = diffusion.ddpm(diffusion.linear(), steps, spacing="leading")
    config = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1e9}
    assert compare(sampler, DDPMScheduler, steps, dtype, threshold=0.9, **config) < BOUNDS[dtype]


@both_types
@each_prediction
@pytest.mark.parametrize(("spacing", "steps"), SPACINGS[:2])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [None, 0.9])
def test_ddim(dtype, predicts, spacing, steps, eta, clip):
    options = {"parameterization": predicts, "spacing": spacing}
    sampler = diffusion.ddim(diffusion.linear(), steps, eta=eta, clip=clip, **options)
    config = {"clip_sample": clip is not None, "clip_sample_range": clip or 1.0, "prediction_type": NAMES[predicts]}
    found = compare(sampler, DDIMScheduler, steps, dtype, timestep_spacing=spacing, step={"eta": eta}, **config)
    assert found < BOUNDS[dtype]


@both_types
def test_ddim_with_the_noise_of_the_clipped_prediction(dtype):
    sampler = diffusion.ddim(diffusion.linear(), 20, eta=0.5, clip=0.7, clip_noise=True, spacing="leading")
    config = {"clip_sample": True, "clip_sample_range": 0.7, "timestep_spacing": "leading"}
    step = {"eta": 0.5, "use_clipped_model_output": True}
    assert compare(sampler, DDIMScheduler, 20, dtype, step=step, **config) < BOUNDS[dtype]


@both_types
def test_ddim_from_pure_noise(dtype):
    sampler = diffusion.ddim(diffusion.zero_terminal_snr(diffusion.scaled_linear()), 20, parameterization="v")
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
    config |= {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    assert sampler.levels[0, 0] == 0
    assert compare(sampler, DDIMScheduler, 20, dtype, **config) < BOUNDS[dtype]


@both_types
@each_prediction
@pytest.mark.parametrize(("spacing", "steps"), [("leading", 20), ("trailing", 12), ("linspace", 10), ("karras", 12)])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("sde", [False, True])
def test_dpm_solver(dtype, predicts, spacing, steps, order, sde):
    options = {"parameterization": predicts, "spacing": spacing}
    sampler = diffusion.dpm_solver(diffusion.linear(), steps, order=order, sde=sde, **options)
    config = {"algorithm_type": "sde-dpmsolver++" if sde else "dpmsolver++", "solver_order": order, **BETAS}
    config |= {"use_karras_sigmas": True} if spacing == "karras" else {"timestep_spacing": spacing}
    found = compare(sampler, DPMSolverMultistepScheduler, steps, dtype, prediction_type=NAMES[predicts], **config)
    assert found < BOUNDS[dtype]


@both_types
@pytest.mark.parametrize("lower_order_final", [False, True])
@pytest.mark.parametrize("sde", [False, True])
@pytest.mark.parametrize("steps", [10, 25])
def test_dpm_solver_to_the_first_level(dtype, lower_order_final, sde, steps):
    options = {"final_zero": False, "lower_order_final": lower_order_final, "spacing": "linspace"}
    sampler = diffusion.dpm_solver(diffusion.linear(), steps, sde=sde, **options)
    config = {"final_sigmas_type": "sigma_min", "lower_order_final": lower_order_final, **BETAS}
    config["algorithm_type"] = "sde-dpmsolver++" if sde else "dpmsolver++"
    assert compare(sampler, DPMSolverMultistepScheduler, steps, dtype, **config) < BOUNDS[dtype]


@both_types
@each_prediction
@pytest.mark.parametrize(("spacing", "steps"), [("leading", 20), ("trailing", 20), ("linspace", 10), ("karras", 12)])
@pytest.mark.parametrize("clip", [None, 0.8])
def test_euler_and_heun(dtype, predicts, spacing, steps, clip):
    options = {"parameterization": predicts, "spacing": spacing, "clip": clip}
    config = {"prediction_type": NAMES[predicts], **BETAS}
    config |= {"use_karras_sigmas": True} if spacing == "karras" else {"timestep_spacing": spacing}
    if clip is None:
        sampler = diffusion.euler(diffusion.linear(), steps, **options)
        assert compare(sampler, EulerDiscreteScheduler, steps, dtype, scaled=True, **config) < BOUNDS[dtype]
    sampler = diffusion.heun(diffusion.linear(), steps, **options)
    config |= {"clip_sample": clip is not None, "clip_sample_range": clip or 1.0}
    assert len(sampler) == 2 * steps - 1
    assert compare(sampler, HeunDiscreteScheduler, steps, dtype, scaled=True, **config) < BOUNDS[dtype]


@both_types
@pytest.mark.parametrize("predicts", ["eps", "v"])
@pytest.mark.parametrize(("spacing", "steps"), SPACINGS)
def test_euler_ancestral(dtype, predicts, spacing, steps):
    sampler = diffusion.euler_ancestral(diffusion.linear(), steps, parameterization=predicts, spacing=spacing)
    config = {"timestep_spacing": spacing, "prediction_type": NAMES[predicts], **BETAS}
    assert compare(sampler, EulerAncestralDiscreteScheduler, steps, dtype, scaled=True, **config) < BOUNDS[dtype]


@both_types
def test_edm_euler(dtype):
    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        """The preconditioning of EDM, table 1, around the model."""
        sigma, data = t.to(x.dtype).reshape(-1, 1, 1, 1), 0.5
        whole = sigma**2 + data**2
        return data**2 / whole * x + sigma * data / whole.sqrt() * model(x / whole.sqrt(), t)

    # Levels that float32, in which the model is told of them, has exactly.
    sigmas = [80.0, 20.0, 5.0, 1.25, 0.5, 0.125, 0.0078125]
    schedule = diffusion.Schedule([1.0] * 7, sigmas[::-1], sigmas[::-1])
    sampler = diffusion.euler(schedule, parameterization="x0")

    class Given(EDMEulerScheduler):
        def _compute_karras_sigmas(self, ramp, *args):
            return torch.tensor(sigmas, dtype=torch.float64) if len(ramp) == 7 else super()._compute_karras_sigmas(ramp)

    Given.__module__ = EDMEulerScheduler.__module__
    found = compare(sampler, Given, 7, dtype, called=denoiser, peer_called=model, scaled=True)
    assert found < BOUNDS[dtype]


@both_types
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler(dtype, shift):
    sampler = diffusion.flow_euler(diffusion.flow(20, shift))
    given = {"sigmas": [1 - k / 20 for k in range(20)]}
    assert (
        compare(sampler, FlowMatchEulerDiscreteScheduler, 20, dtype, set_timesteps=given, shift=shift) < BOUNDS[dtype]
    )


@both_types
def test_flow_over_a_part_of_the_steps(dtype):
    sampler = diffusion.flow_euler(diffusion.flow(), 10, spacing="linspace")
    assert compare(sampler, FlowMatchEulerDiscreteScheduler, 10, dtype) < BOUNDS[dtype]
    sampler = diffusion.heun(diffusion.flow(), 10, spacing="linspace", parameterization="velocity")
    assert compare(sampler, FlowMatchHeunDiscreteScheduler, 10, dtype) < BOUNDS[dtype]


@pytest.mark.parametrize(
    ("sampler", "scheduler", "scaled"),
    [
        (diffusion.ddpm(diffusion.linear(), 50), DDPMScheduler, False),
        (diffusion.ddim(diffusion.linear(), 50), DDIMScheduler, False),
        (diffusion.dpm_solver(diffusion.linear(), 50), DPMSolverMultistepScheduler, False),
        (diffusion.heun(diffusion.linear(), 50), HeunDiscreteScheduler, True),
    ],
    ids=["ddpm", "ddim", "dpm_solver", "heun"],
)
def test_diffusers_as_it_is(sampler, scheduler, scaled):
    """With its own tables in float32: sigma at the first steps has an error of 6e-8 / (2 sigma), sigma from 0.01."""
    config = {**BETAS, "timestep_spacing": "trailing"}
    peer = scheduler(**config, **({} if scaled or scheduler is DPMSolverMultistepScheduler else {"clip_sample": False}))
    peer.set_timesteps(50)
    ours = diffusion.sample(model, SHAPE, sampler, KEY, return_trajectory=True)
    assert far(ours, trajectory(peer, sampler, KEY, ours[0], model, scaled=scaled)) < 1e-5
