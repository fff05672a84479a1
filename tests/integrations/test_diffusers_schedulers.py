"""Steps of diffusers' schedulers as one op of ours: the same numbers, the same draws of noise."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch

from gencore.integrations.diffusers import accelerate

diffusers = pytest.importorskip("diffusers")


def normals(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SCHEDULERS = [
    *(
        (diffusers.DDPMScheduler, {"variance_type": variance}, {})
        for variance in ("fixed_small", "fixed_small_log", "fixed_large")
    ),
    (diffusers.DDPMScheduler, {"clip_sample": False, "timestep_spacing": "trailing"}, {}),
    (diffusers.DDIMScheduler, {}, {}),
    (diffusers.DDIMScheduler, {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample_range": 0.7}, {"eta": 0.6}),
    (diffusers.DDIMScheduler, {}, {"eta": 1.0, "use_clipped_model_output": True}),
]


def network(x, t):
    return 0.8 * torch.tanh(0.4 * x + torch.sin(t / 300))


@pytest.mark.parametrize(("kind", "config", "options"), SCHEDULERS, ids=lambda value: getattr(value, "__name__", None))
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_trajectories_are_equal(kind, config, options, prediction):
    theirs = kind(prediction_type=prediction, **config)
    theirs.set_timesteps(20)
    ours = copy.deepcopy(theirs)
    acceleration = accelerate(ours)
    assert [part.name for part in acceleration.explain().replaced] == ["scheduler"]
    runs = []
    for scheduler in (theirs, ours):
        generator, x, seen = torch.Generator().manual_seed(3), normals(2, 3, 4, 4), []
        for t in scheduler.timesteps:
            step = scheduler.step(network(x, t), t, x, generator=generator, **options)
            x = step.prev_sample
            seen += [x, step.pred_original_sample]
        runs.append((seen, generator.get_state()))
    (want, their_state), (got, our_state) = runs
    assert torch.equal(our_state, their_state)
    for of_theirs, of_ours in zip(want, got, strict=True):
        bound = 1e-5 * max(1, of_theirs.abs().max().item())
        torch.testing.assert_close(of_ours, of_theirs, rtol=0, atol=bound)


@pytest.mark.parametrize(("kind", "config", "options"), SCHEDULERS, ids=lambda value: getattr(value, "__name__", None))
def test_each_of_a_thousand_steps_is_equal(kind, config, options):
    """Where 1 - alpha_bar has but three digits: steps with more of them would be others."""
    theirs = kind(**{**config, "steps_offset": 0})
    if kind is diffusers.DDIMScheduler:
        theirs.set_timesteps(1000)
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    for t in [*range(12), *range(12, 1000, 53), 998, 999]:
        x, output = normals(2, 3, 4, 4, seed=t), normals(2, 3, 4, 4, seed=t + 1)
        want, got = (
            scheduler.step(output, t, x, generator=torch.Generator().manual_seed(t), **options)
            for scheduler in (theirs, ours)
        )
        for name in ("prev_sample", "pred_original_sample"):
            bound = 1e-5 * max(1, want[name].abs().max().item())
            torch.testing.assert_close(got[name], want[name], rtol=0, atol=bound)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("zero_snr", [True, False])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("thresholding", [True, False])
@pytest.mark.parametrize("kind", [diffusers.DDPMScheduler, diffusers.DDIMScheduler])
def test_every_setting_gives_what_diffusers_gives(kind, clip, prediction, zero_snr, spacing, thresholding):
    """NaN and infinities too: of noise alone (``rescale_betas_zero_snr``), x0 is a division by zero."""
    config = {
        "clip_sample": clip,
        "prediction_type": prediction,
        "rescale_betas_zero_snr": zero_snr,
        "timestep_spacing": spacing,
        "thresholding": thresholding,
    }
    if kind is diffusers.DDPMScheduler:
        variances = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")
        options = [({"variance_type": variance}, {}) for variance in variances]
    else:
        options = [
            ({"set_alpha_to_one": to_one}, {"eta": eta, "use_clipped_model_output": clipped})
            for to_one in (True, False)
            for eta in (0.0, 0.5)
            for clipped in (True, False)
        ]
    for more, given in options:
        theirs = kind(**config, **more)
        theirs.set_timesteps(5)
        ours = copy.deepcopy(theirs)
        accelerate(ours)
        channels = 6 if str(more.get("variance_type")).startswith("learned") else 3
        for t in theirs.timesteps[[0, 1, -1]]:
            x, output = normals(2, 3, 4, 4, seed=int(t)), normals(2, channels, 4, 4, seed=int(t) + 1)
            x[0, 0, 0, 0] = output[0, 0, 0, 0]
            want, got = (
                scheduler.step(output, t, x, generator=torch.Generator().manual_seed(3), **given)
                for scheduler in (theirs, ours)
            )
            for name in ("prev_sample", "pred_original_sample"):
                finite = want[name][want[name].isfinite()]
                bound = 1e-5 * max(1, finite.abs().max().item() if finite.numel() else 1)
                torch.testing.assert_close(
                    got[name], want[name], rtol=0, atol=bound, equal_nan=True, msg=f"{more}, {t}"
                )


def test_whoever_wrapped_a_step_calls_diffusers_own_when_it_is_undone():
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(10)
    x, output = normals(2, 3, 4, 4), normals(2, 3, 4, 4, seed=2)
    want = scheduler.step(output, 500, x).prev_sample
    acceleration = accelerate(scheduler)
    ours = scheduler.step
    scheduler.step = lambda *args: ours(*args)
    acceleration.undo()
    assert torch.equal(scheduler.step(output, 500, x).prev_sample, want)


def test_timesteps_of_ones_own():
    theirs = diffusers.DDPMScheduler()
    theirs.set_timesteps(timesteps=[900, 333, 7])
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    x, output = normals(2, 3, 4, 4), normals(2, 3, 4, 4, seed=2)
    for t in theirs.timesteps:
        want, got = (
            scheduler.step(output, t, x, generator=torch.Generator().manual_seed(0)).prev_sample
            for scheduler in (theirs, ours)
        )
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_a_step_keeps_its_signature_and_its_results():
    scheduler = diffusers.DDIMScheduler()
    signature, attributes = inspect.signature(scheduler.step), set(vars(scheduler))
    scheduler.set_timesteps(10)
    x, output = normals(2, 3, 4, 4), normals(2, 3, 4, 4, seed=2)
    noise = normals(2, 3, 4, 4, seed=3)
    calls = (
        lambda: scheduler.step(output, 500, x),
        lambda: scheduler.step(output, torch.tensor(500), x, return_dict=False),
        lambda: scheduler.step(output, 500, x, 0.5, False, None, noise),
        lambda: scheduler.step(output.double(), 500, x.double(), eta=0.5, variance_noise=noise.double()),
        lambda: scheduler.step(output.bfloat16(), 500, x.bfloat16()),
        lambda: scheduler.step(output.bfloat16(), 500, x),
        lambda: scheduler.step(*(t.to(memory_format=torch.channels_last) for t in (output,)), 500, x),
    )
    want = [call() for call in calls]
    acceleration = accelerate(scheduler)
    assert inspect.signature(scheduler.step) == signature
    state = torch.get_rng_state()
    got = [call() for call in calls]
    assert torch.equal(torch.get_rng_state(), state)
    for ours, theirs in zip(got, want, strict=True):
        assert type(ours) is type(theirs)
        of_ours, of_theirs = (of if isinstance(of, tuple) else of.to_tuple() for of in (ours, theirs))
        for a, b in zip(of_ours, of_theirs, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5 if a.dtype != torch.bfloat16 else 0.1)
    acceleration.undo()
    assert set(vars(scheduler)) == attributes | {"timesteps"}
    assert torch.equal(scheduler.step(output, 500, x).prev_sample, want[0].prev_sample)


def test_a_step_that_is_not_ours_to_take_is_theirs():
    scheduler = diffusers.DDIMScheduler()
    accelerate(scheduler)
    x, output = normals(2, 3, 4, 4), normals(2, 3, 4, 4, seed=2)
    with pytest.raises(ValueError, match="run 'set_timesteps'"):
        scheduler.step(output, 500, x)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="Cannot pass both generator and variance_noise"):
        scheduler.step(output, 500, x, eta=0.5, generator=torch.Generator(), variance_noise=x)
    # A gradient through the step, which the op has only if it does not return x0 too.
    output.requires_grad_()
    scheduler.step(output, 500, x).prev_sample.sum().backward()
    assert output.grad.abs().min() > 0


def test_a_copied_or_stored_scheduler_is_its_own():
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(10)
    want = scheduler.step(normals(1, 3, 2, 2), 500, normals(1, 3, 2, 2)).prev_sample
    accelerate(scheduler)
    other = copy.deepcopy(scheduler)
    other.alphas_cumprod = other.alphas_cumprod * 0.5
    assert not torch.allclose(other.step(normals(1, 3, 2, 2), 500, normals(1, 3, 2, 2)).prev_sample, want)
    again = pickle.loads(pickle.dumps(scheduler))
    torch.testing.assert_close(again.step(normals(1, 3, 2, 2), 500, normals(1, 3, 2, 2)).prev_sample, want)
    assert again.step.__func__ is scheduler.step.__func__
    assert again.step.__self__ is again
    accelerate(again).undo()
    assert torch.equal(again.step(normals(1, 3, 2, 2), 500, normals(1, 3, 2, 2)).prev_sample, want)
    assert "step" not in vars(again)
    assert type(scheduler).from_config(scheduler.config).step.__func__ is diffusers.DDIMScheduler.step


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: diffusers.DDPMScheduler(thresholding=True), "its thresholding takes a number of the whole sample"),
        (lambda: diffusers.DDPMScheduler(variance_type="learned_range"), "its variance_type is learned_range, not"),
        (lambda: diffusers.DDPMScheduler(variance_type="fixed_large_log"), "its variance_type is fixed_large_log"),
        (lambda: diffusers.DDIMScheduler(prediction_type="else"), "its prediction_type is else, not epsilon"),
        (diffusers.PNDMScheduler, "only DDPMScheduler and DDIMScheduler are served"),
    ],
)
def test_schedulers_that_are_left_alone(make, reason):
    scheduler = make()
    explanation = accelerate(scheduler).explain()
    assert explanation.replaced == ()
    assert reason in explanation.kept[0].what
    assert "step" not in vars(scheduler)


def test_a_scheduler_is_accelerated_once():
    scheduler = diffusers.DDPMScheduler()
    first = accelerate(scheduler)
    second = accelerate(scheduler)
    assert [part.what for part in second.explain().kept] == ["it runs on gencore's kernels already"]
    first.undo()
    assert "step" not in vars(scheduler)
    scheduler.step = scheduler.step
    assert accelerate(scheduler).explain().kept[0].what == "it has a step of its own"
