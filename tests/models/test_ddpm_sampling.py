"""Samples of the diffusion model, and what it fills in."""

import math

import pytest
import torch
from models.small_ddpm import FAST, Chain, build, of

from gencore import Key, diffusion, ops
from gencore.models.diffusion import Sampling

SAMPLERS = ["ddpm", "ddim", "dpm_solver", "dpm_solver_sde", "euler", "euler_ancestral", "heun"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_do_not_depend_on_the_batch_or_the_mode(sampler):
    # With dropout, which is of training alone.
    model = build(
        conditional=True, parameterization="v", schedule="cosine", dropout=0.5,
        sampling=Sampling(sampler=sampler, steps=4, guidance_scale=2.0),
    )  # fmt: skip
    labels = torch.arange(7)
    together = model.sample(7, Key(3), of(labels))
    apart = [model.sample(3, Key(3), of(labels[:3])), model.eval().sample(4, Key(3).samples(3), of(labels[3:]))]
    # Rounding in the order of a convolution's sums, some 1e-6, passed on by four steps.
    torch.testing.assert_close(together, torch.cat(apart), rtol=0, atol=1e-4)
    assert torch.equal(model.eval().sample(7, Key(3), of(labels)), together)
    assert not torch.allclose(model.sample(7, Key(4), of(labels)), together, atol=1e-2)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_sampling_is_algorithm_2(variance):
    model = build(variance=variance, schedule="cosine", timesteps=10, sampling=Sampling(clip=False))
    chain, key = Chain(model.config), Key(5)
    x = ops.normal((3, 1, 8, 8), key.stream(0)).double()
    with torch.no_grad():
        for step in reversed(range(10)):
            t = torch.full((3,), step)
            output = model.unet(x.float(), t.float()).double()
            predicted = chain.x0(model.config, x, output[:, :1], t)
            beta, bar, before = chain.betas[step], chain.bar[step], chain.bar_before[step]
            x = (before.sqrt() * beta * predicted + (1 - beta).sqrt() * (1 - before) * x) / (1 - bar)
            if step > 0:
                small = chain.small[step]
                spread = {"fixed_small": small, "fixed_large": beta}.get(variance)
                if spread is None:
                    share = (output[:, 1:] + 1) / 2
                    spread = (share * beta.log() + (1 - share) * small.log()).exp()
                x = x + spread.sqrt() * ops.normal((3, 1, 8, 8), key.stream(1 + step)).double()
    expected = ((x + 1) / 2).clamp(0, 1)
    # The chain is in float32: ten steps whose 1 / alpha is up to 30 at the first.
    torch.testing.assert_close(model.sample(3, key).double(), expected, rtol=0, atol=1e-3)
    assert 0.1 < expected.std() < 0.5


def test_guidance_combines_both_predictions():
    model = build(conditional=True, sampling=Sampling(sampler="ddim", steps=5, guidance_scale=3.0, clip=False))
    labels = torch.tensor([1, 1, 7])

    def guided(x, t):
        with_class, without = model.unet(x, t, labels), model.unet(x, t, torch.full((3,), -1))
        return without + 3.0 * (with_class - without)

    sampler = diffusion.ddim(model.schedule, 5)
    expected = (diffusion.sample(guided, (3, 1, 8, 8), sampler, Key(2)) + 1) / 2
    # The network on 6 images instead of 3: rounding as above, times the guidance of 3.
    torch.testing.assert_close(model.sample(3, Key(2), of(labels)), expected.clamp(0, 1), rtol=0, atol=1e-4)
    assert not torch.allclose(model.sample(3, Key(2), of(labels.flip(0))), expected.clamp(0, 1), atol=1e-3)


def test_no_labels_is_no_class_whatever_the_guidance():
    model = build(conditional=True, sampling=FAST)
    plain = model.sample(3, Key(2))
    none = torch.full((3,), -1)
    assert torch.equal(model.sample(3, Key(2), of(none)), plain)
    guided = Sampling(sampler="ddim", steps=6, guidance_scale=4.0)
    assert torch.equal(model.sample(3, Key(2), sampling=guided), plain)
    # And so it is of the images with -1 beside others; guidance only rounds there.
    some = model.sample(3, Key(2), of(torch.tensor([-1, 4, -1])), sampling=guided)
    torch.testing.assert_close(some[::2], plain[::2], rtol=0, atol=1e-4)
    assert not torch.allclose(some[1], plain[1], atol=1e-3)


def test_guidance_calls_the_network_once_a_step():
    model = build(conditional=True)
    calls = []
    model.unet.register_forward_pre_hook(lambda module, arguments: calls.append(len(arguments[0])))
    labels = of(torch.arange(3))
    model.sample(3, Key(0), labels, sampling=Sampling(sampler="ddim", steps=5, guidance_scale=2.0))
    assert calls == [6] * 5
    calls.clear()
    model.sample(3, Key(0), labels, sampling=Sampling(sampler="ddim", steps=5))
    assert calls == [3] * 5


def test_a_bar_is_shown_when_asked_for(monkeypatch):
    shown = []
    real = diffusion.sample

    def spy(*arguments, progress=False, **options):
        shown.append(progress)
        return real(*arguments, **options)

    monkeypatch.setattr(diffusion, "sample", spy)
    model = build(sampling=FAST)
    model.sample(1, Key(0))
    model.sample(1, Key(0), progress=True)
    images, known = torch.zeros(1, 1, 8, 8), torch.zeros(1)
    model.edit(images, known, Key(0))
    model.edit(images, known, Key(0), progress=True)
    assert shown == [False, True] * 2


def test_what_is_not_finite_is_told_when_asked_for():
    model = build(sampling=FAST)
    with torch.no_grad():
        model.unet.conv_in.bias.fill_(math.nan)
    assert model.sample(2, Key(0)).isnan().all()
    message = r"the model's output is not finite in call 0 of 6, at time 999"
    with pytest.raises(FloatingPointError, match=message):
        model.sample(2, Key(0), check_finite=True)
    with pytest.raises(FloatingPointError, match=message):
        model.edit(torch.zeros(2, 1, 8, 8), torch.zeros(1), Key(0), check_finite=True)


def test_the_network_is_given_images_in_its_own_format():
    """Three channels, so that the formats differ: nothing is copied between two calls."""
    model, seen = build(3, 8, 8, conditional=True), []

    def listening(module, arguments, output):
        seen.append((arguments[0].stride(), output.stride()))

    model.unet.register_forward_hook(listening)
    for guidance_scale in (1.0, 2.0):
        sampling = Sampling(sampler="dpm_solver", steps=5, guidance_scale=guidance_scale)
        seen.clear()
        assert model.sample(2, Key(0), of(torch.arange(2)), sampling=sampling).is_contiguous()
        assert seen == [((192, 1, 24, 3),) * 2] * 5


def test_edit_keeps_what_is_known():
    model = build(conditional=True, sampling=Sampling(sampler="ddpm", steps=5))
    # Numbers that do not survive 2 x - 1 and back.
    images = ops.uniform((6, 1, 8, 8), Key(1)) ** 3
    assert not torch.equal(((2 * images - 1) + 1) / 2, images)
    known = (ops.uniform((1, 1, 8, 8), Key(2)) < 0.6).float()
    labels = torch.arange(6)
    whole = model.edit(images, known, Key(3), of(labels))
    where = known.bool().expand_as(images)
    assert torch.equal(whole[where], images[where])
    assert not torch.isclose(whole[~where], images[~where]).all()
    assert torch.equal(whole, model.edit(images, known.bool(), Key(3), of(labels)))
    assert not torch.allclose(whole, model.edit(images, known, Key(4), of(labels)))
    apart = [
        model.edit(images[:2], known, Key(3), of(labels[:2])),
        model.edit(images[2:], known, Key(3).samples(2), of(labels[2:])),
    ]
    # Rounding in the order of a convolution's sums, some 1e-6, passed on by five steps.
    torch.testing.assert_close(whole, torch.cat(apart), rtol=0, atol=1e-4)
    assert not torch.allclose(whole, model.edit(images, known, Key(3), of(labels.flip(0))))
    often = Sampling(sampler="ddpm", steps=5, resamples=3)
    again = model.edit(images, known, Key(3), of(labels), sampling=often)
    assert torch.equal(again[where], images[where])
    assert not torch.allclose(again, whole)
    assert torch.equal(model.edit(images, torch.ones(1), Key(3)), images)


def test_what_is_filled_in_depends_on_what_is_known():
    model = build(schedule="cosine", timesteps=30)
    known = torch.zeros(1, 1, 8, 8)
    known[..., :4] = 1
    dark = model.edit(torch.zeros(2, 1, 8, 8), known, Key(0))
    bright = model.edit(torch.ones(2, 1, 8, 8), known, Key(0))
    assert not torch.allclose(dark[..., 4:], bright[..., 4:], atol=1e-3)


def test_ddim_goes_on_with_the_noise_of_the_clipped_image():
    """Without clipping it is DDIM as it stands; with it, x' = alpha' x0 + sigma' eps(x, x0) for the clipped x0."""
    model = build(schedule="cosine", parameterization="v")
    for clip in (False, True):
        ours = model.sample(3, Key(0), sampling=Sampling(sampler="ddim", steps=5, clip=clip))
        for sampler, same in ((diffusion.ddim, not clip), (diffusion.euler, True)):
            chosen = sampler(model.schedule, 5, parameterization="v", clip=1.0 if clip else None)
            x = diffusion.sample(lambda x, t: model.unet(x, t), (3, 1, 8, 8), chosen, Key(0))
            # The same arithmetic but for the memory format: rounding of 1e-6, passed on by five steps.
            assert torch.allclose(((x + 1) / 2).clamp(0, 1), ours, rtol=0, atol=1e-4) == same, (clip, sampler)
