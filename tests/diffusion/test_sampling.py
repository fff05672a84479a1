"""The sampling loop: its noise, what it blends and combines, what it shows, what it refuses."""

from __future__ import annotations

import math
import sys
from unittest import mock

import pytest
import torch
from diffusion.peers import SHAPE, doubled, model
from support import same_bits
from torch.profiler import ProfilerActivity, profile

from gencore import Key, diffusion, ops
from gencore.diffusion import sample

SCHEDULE = diffusion.linear()
# Two ways to compute a trajectory in float64: a step has 20 operations of 1e-16 each, which 1 / alpha of the first
# step, 160, and those after it magnify to less than 1e-12.
EXACT = {"rtol": 1e-11, "atol": 1e-11}
SAMPLERS = [
    diffusion.ddpm(SCHEDULE, 8, clip=1.0),
    diffusion.ddpm(SCHEDULE, 8, variance="learned_range"),
    diffusion.ddim(SCHEDULE, 8, eta=0.5),
    diffusion.euler(SCHEDULE, 8, spacing="karras"),
    diffusion.euler_ancestral(SCHEDULE, 8),
    diffusion.dpm_solver(SCHEDULE, 8, sde=True),
    diffusion.heun(diffusion.karras(8), parameterization="x0", s_churn=4.0),
    diffusion.flow_euler(diffusion.flow(), 8),
]
each_sampler = pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)


def served(sampler):
    return doubled if sampler.learned_variance else model


# --- Noise


@each_sampler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_samples_3_and_4_alone_are_those_of_a_batch_of_64(sampler, dtype):
    """Bit for bit, at every step: the noise depends on seed, sample and step only. The model is elementwise."""
    options = {"dtype": dtype, "return_trajectory": True}
    whole = sample(served(sampler), (64, 2, 4, 4), sampler, Key(7), **options)
    alone = sample(served(sampler), (2, 2, 4, 4), sampler, Key(7).samples(3), **options)
    assert same_bits(whole[:, 3:5], alone)
    picked = sample(served(sampler), (2, 2, 4, 4), sampler, Key(7).samples([40, 3]), **options)
    assert same_bits(whole[:, [40, 3]], picked)
    assert not torch.equal(whole[-1, 3], whole[-1, 4])


def test_the_noise_of_every_step():
    """A model that says nothing but zeros leaves the noise of the streams, seen one by one."""
    sampler = diffusion.ddpm(SCHEDULE, [900, 500, 20], parameterization="x0")
    states = sample(
        lambda x, t: torch.zeros_like(x), SHAPE, sampler, Key(5), dtype=torch.float64, return_trajectory=True
    )
    x = ops.normal(SHAPE, Key(5).stream(0), dtype=torch.float64)
    assert torch.equal(states[0], x)
    for call, stream in enumerate((901, 501, 21)):
        columns = dict(zip(ops.STEP_COLUMNS, sampler.rows[call].tolist(), strict=True))
        x = columns["x"] * x + columns["noise"] * ops.normal(SHAPE, Key(5).stream(stream), dtype=torch.float64)
        # Three products and two sums in float64, of 1e-16 each, of values of about 1.
        torch.testing.assert_close(states[call + 1], x, rtol=1e-14, atol=1e-15)


def test_a_key_may_be_left_out():
    sampler = diffusion.ddim(SCHEDULE, 2)
    torch.manual_seed(3)
    first, second = (sample(model, SHAPE, sampler) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(sample(model, SHAPE, sampler), first)
    assert not torch.equal(first, second)


# --- The loop


@each_sampler
def test_what_the_loop_shows_is_what_it_does(sampler):
    seen = []

    def callback(call, t, x, x0):
        seen.append((call, t, x.clone(), x0.clone()))

    plain = sample(served(sampler), SHAPE, sampler, Key(1))
    states = sample(served(sampler), SHAPE, sampler, Key(1), return_trajectory=True)
    shown = sample(served(sampler), SHAPE, sampler, Key(1), callback=callback)
    assert same_bits(plain, shown)
    assert same_bits(plain, states[-1])
    assert states.shape == (len(sampler) + 1, *SHAPE)
    assert [call for call, *_ in seen] == list(range(len(sampler)))
    assert [t for _, t, *_ in seen] == sampler.times.tolist()
    for call, _, x, x0 in seen:
        assert same_bits(x, states[call + 1])
        before = states[call]
        output = served(sampler)(before, sampler.times[call].float().expand(3))[:, :2]
        columns = dict(zip(ops.STEP_COLUMNS, sampler.rows[call].tolist(), strict=True))
        want = columns["predict_x"] * before + columns["predict_output"] * output
        want = want.clamp(-columns["limit"], columns["limit"])
        # Two products and a sum of float32, of values of up to this size.
        size = (columns["predict_x"] * before).abs().max() + (columns["predict_output"] * output).abs().max()
        assert (x0 - want).abs().max() <= 4 * 2**-24 * size


@each_sampler
def test_the_model_is_told_the_times_of_the_schedule(sampler):
    told = []

    def listening(x, t):
        assert t.dtype == torch.float32
        assert t.shape == (3,)
        assert not torch.is_grad_enabled()
        told.append(t[0].item())
        return served(sampler)(x, t)

    sample(listening, SHAPE, sampler, Key(1))
    assert told == sampler.times.float().tolist()


def test_no_tensor_is_made_between_two_calls():
    """The states and predictions have their tensors before the first call: the kernel writes over them."""
    sampler = diffusion.dpm_solver(SCHEDULE, 12)
    places, outputs = set(), [torch.zeros(SHAPE) for _ in range(12)]

    def fixed(x, t):
        places.add(x.data_ptr())
        return outputs[len(outputs) - 1]

    with mock.patch.object(torch, "empty_like", wraps=torch.empty_like) as made:
        sample(fixed, SHAPE, sampler, Key(1))
    assert len(places) == 1
    assert made.call_count == 2


def copies(calls, options, output):
    """How many tensors of the state's size are copied in a run of so many calls, by the profiler."""
    sampler = diffusion.dpm_solver(SCHEDULE, calls)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        sample(lambda x, t: output, tuple(output.shape), sampler, Key(1), **options)
    averages = seen.key_averages(group_by_input_shape=True)
    return sum(e.count for e in averages if e.key == "aten::copy_" and e.input_shapes[0] == list(output.shape))


def test_nothing_is_copied_between_calls_of_a_channels_last_network():
    shape = (3, 3, 4, 4)
    output = torch.zeros(shape).contiguous(memory_format=torch.channels_last)
    known = torch.zeros(shape).contiguous(memory_format=torch.channels_last)
    options = {"memory_format": torch.channels_last}
    assert copies(12, options, output) == copies(6, options, output)
    # The format is also that of the data that is given.
    for given in ({"start": known}, {"known": known, "mask": torch.ones(4)}):
        assert copies(12, given, output) == copies(6, given, output)
    # A contiguous state takes a copy in each call.
    assert copies(12, {}, output) >= copies(6, {}, output) + 6


@pytest.mark.parametrize("channels", [1, 3])
def test_the_memory_format_changes_nothing_but_itself(channels):
    shape, sampler = (3, channels, 4, 4), diffusion.dpm_solver(SCHEDULE, 5)
    known = torch.linspace(-1, 1, 48 * channels).reshape(shape)
    for options in ({}, {"return_trajectory": True}, {"known": known, "mask": torch.ones(4)}, {"start": known}):
        want = sample(model, shape, sampler, Key(1), **options)
        got = sample(model, shape, sampler, Key(1), memory_format=torch.channels_last, **options)
        assert torch.equal(got, want)
        state = got[-1] if "return_trajectory" in options else got
        assert state.is_contiguous(memory_format=torch.channels_last)
    assert sample(model, shape, sampler, Key(1), start=known).is_contiguous()


def test_a_model_may_give_back_what_it_got():
    sampler = diffusion.dpm_solver(SCHEDULE, 4, parameterization="v")
    want = sample(lambda x, t: x.clone(), SHAPE, sampler, Key(1))
    assert same_bits(sample(lambda x, t: x, SHAPE, sampler, Key(1)), want)
    assert same_bits(sample(lambda x, t: x[:], SHAPE, sampler, Key(1)), want)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_outputs_of_another_type_are_cast(kind):
    sampler = diffusion.ddpm(SCHEDULE, 4)
    got = sample(lambda x, t: model(x, t).to(kind), SHAPE, sampler, Key(1))
    assert got.dtype == torch.float32
    assert same_bits(got, sample(lambda x, t: model(x, t).to(kind).float(), SHAPE, sampler, Key(1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_types(dtype):
    got = sample(model, SHAPE, diffusion.ddim(SCHEDULE, 4, clip=1.0), Key(1), dtype=dtype)
    assert got.dtype == dtype
    assert got.isfinite().all()


def test_no_gradient_is_recorded():
    weight = torch.tensor(0.5, requires_grad=True)
    got = sample(lambda x, t: weight * x, SHAPE, diffusion.ddim(SCHEDULE, 4), Key(1))
    assert not got.requires_grad


def test_no_samples_are_no_samples():
    assert sample(lambda x, t: 0.1 * x, (0, 2, 4, 4), diffusion.ddpm(SCHEDULE, 3), Key(1)).shape == (0, 2, 4, 4)


# --- Guidance


@pytest.mark.parametrize("sampler", [SAMPLERS[0], SAMPLERS[2], SAMPLERS[5], SAMPLERS[6]], ids=repr)
def test_classifier_free_guidance(sampler):
    """w conditional + (1 - w) unconditional, as if the network had said that."""

    def other(x, t):
        return torch.cos(x)

    options = {"dtype": torch.float64}
    got = sample(lambda x, t: (model(x, t), other(x, t)), SHAPE, sampler, Key(2), guidance_scale=3.0, **options)
    want = sample(lambda x, t: 3 * model(x, t) - 2 * other(x, t), SHAPE, sampler, Key(2), **options)
    torch.testing.assert_close(got, want, **EXACT)


def test_guidance_rescale():
    """Lin et al. (2024), equations 15 and 16, as if the network had said that."""
    sampler, phi = diffusion.ddim(SCHEDULE, 6), 0.7

    def both(x, t):
        return model(x, t), torch.cos(x)

    def rescaled(x, t):
        conditional, unconditional = both(x, t)
        guided = 4 * conditional - 3 * unconditional
        factor = conditional.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
        return phi * factor * guided + (1 - phi) * guided

    options = {"dtype": torch.float64}
    got = sample(both, SHAPE, sampler, Key(2), guidance_scale=4.0, guidance_rescale=phi, **options)
    torch.testing.assert_close(got, sample(rescaled, SHAPE, sampler, Key(2), **options), **EXACT)


@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "velocity"])
@pytest.mark.parametrize("make", [diffusion.ddpm, diffusion.ddim, diffusion.dpm_solver, diffusion.heun])
def test_classifier_guidance(make, predicts):
    """Dhariwal and Nichol (2021), Algorithm 2: eps - w sigma grad, whatever the network predicts.

    For data N(0, 1) and y = x0 + noise of deviation s, guided sampling is that of p(x0 | y), whose network is known.
    """
    s, y = 0.5, 1.25
    sampler = make(SCHEDULE, 10, parameterization=predicts)
    level = dict(zip(sampler.times.tolist(), sampler.levels.tolist(), strict=False))

    def said(x, mean, variance, t):
        """The network of data N(mean, variance)."""
        alpha, sigma = level[t[0].item()]
        x0 = mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * mean)
        eps = (x - alpha * x0) / sigma
        return {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "velocity": eps - x0}[predicts]

    def gradient(x, t):
        # p(y | x_t) = N(alpha x, sigma^2 + s^2), as alpha^2 + sigma^2 = 1; by autograd, which the loop has switched on.
        alpha, sigma = level[t[0].item()]
        x = x.detach().requires_grad_()
        log_p = -((y - alpha * x) ** 2) / (2 * (sigma**2 + s**2))
        return torch.autograd.grad(log_p.sum(), x)[0]

    options = {"dtype": torch.float64}
    guided = sample(lambda x, t: said(x, 0.0, 1.0, t), SHAPE, sampler, Key(2), classifier=gradient, **options)
    posterior = (y / (1 + s**2), s**2 / (1 + s**2))
    want = sample(lambda x, t: said(x, *posterior, t), SHAPE, sampler, Key(2), **options)
    # As above, times the factor sigma^2 / (alpha b) of the gradient, of up to 160 at the first step.
    torch.testing.assert_close(guided, want, rtol=1e-9, atol=1e-9)
    stronger = sample(
        lambda x, t: said(x, 0.0, 1.0, t), SHAPE, sampler, Key(2), classifier=gradient, guidance_scale=2.0, **options
    )
    assert not torch.allclose(stronger, guided)


def test_thresholding():
    """Saharia et al. (2022): x0 cut at the quantile of its sample, then divided by it."""
    sampler = diffusion.ddpm(SCHEDULE, 6, parameterization="x0")

    def thresholded(x, t):
        x0 = 3 * model(x, t)
        s = torch.quantile(x0.abs().flatten(1), 0.8, dim=1).clamp(min=1.0)[:, None, None, None]
        return x0.clamp(-s, s) / s

    options = {"dtype": torch.float64}
    got = sample(lambda x, t: 3 * model(x, t), SHAPE, sampler, Key(2), threshold=0.8, **options)
    torch.testing.assert_close(got, sample(thresholded, SHAPE, sampler, Key(2), **options), **EXACT)


# --- Beginning from data, and what is known of it


@each_sampler
def test_what_is_known_stays(sampler):
    known = torch.linspace(-1, 1, 96).reshape(SHAPE)
    mask = (torch.arange(4) < 2).float().reshape(1, 1, 1, 4)
    states = sample(served(sampler), SHAPE, sampler, Key(4), known=known, mask=mask, return_trajectory=True)
    inside = mask.expand(SHAPE) == 1
    assert torch.equal(states[-1][inside], known[inside])
    # At every level the known part has that level's noise: of the stream of the step that led there.
    for state, (alpha, sigma), stream in zip(states, sampler.levels.tolist(), (0, *sampler.streams), strict=True):
        want = alpha * known + sigma * ops.normal(SHAPE, Key(4).stream(stream))
        assert (state - want)[inside].abs().max() <= 4 * 2**-24 * (1 + 8 * sigma)
    free = sample(served(sampler), SHAPE, sampler, Key(4), return_trajectory=True)
    # The model is elementwise: what is not known does not notice.
    assert same_bits(states[:, ~inside], free[:, ~inside])


def test_a_soft_mask_blends():
    sampler = diffusion.ddim(SCHEDULE, 1)
    known = torch.ones(SHAPE)
    got = sample(model, SHAPE, sampler, Key(4), known=known, mask=torch.tensor(0.25), start=known)
    states = sample(model, SHAPE, sampler, Key(4), start=known, return_trajectory=True)
    # Both begin at the same level with the same noise, known or not.
    # One step in float32 from alpha = 0.006: its 1 / alpha makes 2^-24 to 1e-5.
    torch.testing.assert_close(got, 0.25 * known + 0.75 * states[-1], rtol=1e-5, atol=1e-5)


def test_beginning_from_an_image():
    """SDEdit: noise of the level of the first step that is left, then the steps."""
    image = torch.linspace(-1, 1, 96).reshape(SHAPE)
    sampler = diffusion.ddim(SCHEDULE, diffusion.timesteps(1000, 50)[30:])
    states = sample(model, SHAPE, sampler, Key(4), start=image, return_trajectory=True)
    t = int(sampler.times[0])
    assert t == 399
    want = SCHEDULE.alpha[t] * image + SCHEDULE.sigma[t] * ops.normal(SHAPE, Key(4).stream(0))
    assert (states[0] - want).abs().max() <= 4 * 2**-24 * 6
    assert torch.equal(image, torch.linspace(-1, 1, 96).reshape(SHAPE))


@pytest.mark.parametrize("resamples", [1, 3])
def test_resampling(resamples):
    """Lugmayr et al. (2022), Algorithm 1: each step but the last again, after noise that leads back to its level."""
    sampler = diffusion.ddpm(SCHEDULE, [900, 400, 20], parameterization="x0")
    calls = []

    def counted(x, t):
        calls.append(t[0].item())
        return torch.zeros_like(x)

    got = sample(counted, SHAPE, sampler, Key(4), resamples=resamples, dtype=torch.float64)
    assert calls == [900] * resamples + [400] * resamples + [20]
    assert got.abs().max() == 0


def test_the_noise_of_a_repeated_step_is_known_by_its_number():
    """Whatever steps come before, step 400 is left, again and again, with the same noise."""
    schedule, last = SCHEDULE, {}
    real = ops.diffusion_step
    for steps in ([900, 400, 20], [400, 20]):
        keys = []

        def recorded(x, output, row, key=None, keys=keys, **options):
            keys.append(tuple(key.packed.tolist()))
            return real(x, output, row, key, **options)

        with mock.patch.object(ops, "diffusion_step", recorded):
            sample(model, SHAPE, diffusion.ddpm(schedule, steps), Key(4), resamples=3)
        assert len(set(keys)) == len(keys)
        # Three times step 400 and twice up again, then step 20.
        last[len(steps)] = keys[-6:]
    assert last[3] == last[2]


def test_resampling_keeps_the_distribution():
    """For white data every state stays white: 3 * 10^4 values, whose variance has a deviation of 0.8%."""
    sampler = diffusion.ddpm(SCHEDULE, 10, variance="fixed_large")

    def white(x, t):
        return SCHEDULE.sigma[int(t[0])] * x

    plain = sample(white, (100, 300), sampler, Key(4), dtype=torch.float64)
    got = sample(white, (100, 300), sampler, Key(4), resamples=4, dtype=torch.float64)
    variance = SCHEDULE.alphas_cumprod[99].item()
    for samples in (plain, got):
        # Five deviations: false once in two million.
        assert abs(samples.var().item() / variance - 1) < 0.04
    assert abs(torch.corrcoef(torch.stack((plain.flatten(), got.flatten())))[0, 1]) < 0.5


# --- What goes wrong


def test_nan_goes_on_to_the_samples_it_is_of():
    def broken(x, t):
        output = model(x, t)
        output[1] = math.nan if t[0] < 500 else output[1]
        return output

    sampler = diffusion.ddpm(SCHEDULE, 8, clip=1.0)
    got = sample(broken, SHAPE, sampler, Key(1))
    assert got[1].isnan().all()
    assert same_bits(got[::2], sample(model, SHAPE, sampler, Key(1))[::2])
    message = r"the model's output is not finite in call 4 of 8, at time 499"
    with pytest.raises(FloatingPointError, match=message):
        sample(broken, SHAPE, sampler, Key(1), check_finite=True)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"guidance_scale": 2.0}, "the model's unconditional output is not finite in call 0 of 4, at time 999"),
        ({"classifier": lambda x, t: x / 0}, "the classifier's gradient is not finite in call 0 of 4, at time 999"),
        ({"dtype": torch.float16}, "the state after the step is not finite in call 0 of 4, at time 999"),
    ],
    ids=["unconditional", "classifier", "state"],
)
def test_where_it_is_not_finite(broken, message):
    def said(x, t):
        if "guidance_scale" in broken:
            return model(x, t), x / 0
        return model(x, t) if "classifier" in broken else 60000 * torch.ones_like(x)

    with pytest.raises(FloatingPointError, match=message):
        sample(said, SHAPE, diffusion.dpm_solver(SCHEDULE, 4), Key(1), check_finite=True, **broken)


def test_progress(capsys, monkeypatch):
    sampler = diffusion.ddim(SCHEDULE, 3)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    got = sample(model, SHAPE, sampler, Key(1), progress=True)
    assert "3/3" in capsys.readouterr().err
    assert same_bits(got, sample(model, SHAPE, sampler, Key(1)))
    assert capsys.readouterr().err == ""
    with (
        mock.patch.dict(sys.modules, {"tqdm.auto": None}),
        pytest.raises(ModuleNotFoundError, match="a progress bar needs the package tqdm: pip install tqdm"),
    ):
        sample(model, SHAPE, sampler, Key(1), progress=True)


HALF = torch.zeros(3, 1, 4, 4)
KNOWN = {"known": torch.zeros(SHAPE), "mask": torch.ones(4)}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"sampler": SCHEDULE}, TypeError, r"sampler must be a Sampler, as ddpm\(\) and others return, got Schedule"),
        ({"key": 3}, TypeError, "key must be a gencore.Key or None, got int"),
        ({"key": Key(torch.tensor([1, 2]))}, ValueError, "key must name 3 samples"),
        ({"model": 3}, TypeError, "model must be callable, got int"),
        ({"shape": 3}, ValueError, r"shape must be the sizes of a batch, \(B, ...\), got 3"),
        ({"shape": ()}, ValueError, "shape must be the sizes of a batch"),
        ({"shape": (3, 2.0)}, ValueError, "shape must be the sizes of a batch"),
        ({"dtype": torch.int32}, TypeError, "dtype must be float32, bfloat16, float16 or float64, got torch.int32"),
        ({"known": HALF}, ValueError, "mask must be given with known, got None"),
        ({"mask": HALF}, ValueError, "known must be given with mask, got None"),
        ({**KNOWN, "known": HALF}, ValueError, r"known must have the shape of the samples, .*, got \(3, 1, 4, 4\)"),
        ({**KNOWN, "mask": torch.ones(3)}, ValueError, r"mask must have a shape that broadcasts .*, got \(3,\)"),
        ({**KNOWN, "mask": 1.0}, TypeError, "mask must be a tensor, got float"),
        ({"start": HALF}, ValueError, "start must have the shape of the samples"),
        (
            {"start": torch.zeros(SHAPE, device="meta"), "device": "cpu"},
            ValueError,
            "start must be on the device of the sam",
        ),
        ({"guidance_scale": math.nan}, ValueError, "guidance_scale must be a finite number or None, got nan"),
        ({"guidance_scale": "1"}, ValueError, "guidance_scale must be a finite number or None, got '1'"),
        (
            {"guidance_scale": 2.0},
            ValueError,
            r"model must return a pair, \(conditional, unconditional\), with guidance_scale",
        ),
        ({"guidance_rescale": 0.5}, ValueError, "guidance_rescale must be 0 without classifier-free guidance"),
        # Found before the network is called.
        ({"threshold": 2.0, "model": pytest.fail}, ValueError, "threshold must be from 0 to 1, got 2.0"),
        ({"threshold": "a", "model": pytest.fail}, TypeError, "threshold must be a number, got str"),
        (
            {"guidance_rescale": 2.0, "guidance_scale": 2.0, "model": pytest.fail},
            ValueError,
            "guidance_rescale",
        ),
        ({"classifier": 3}, TypeError, "classifier must be callable or None, got int"),
        ({"callback": 3}, TypeError, "callback must be callable or None, got int"),
        (
            {"memory_format": torch.channels_last_3d},
            ValueError,
            "memory_format must be torch.contiguous_format, or torch",
        ),
        (
            {"memory_format": torch.preserve_format},
            ValueError,
            "memory_format must be torch.contiguous_format, or torch",
        ),
        ({"memory_format": "channels_last"}, ValueError, "memory_format must be torch.contig"),
        ({"resamples": 0}, ValueError, "resamples must be at least 1, got 0"),
        ({"resamples": 2.0}, TypeError, "resamples must be an int, got float"),
        ({"resamples": 2, "sampler": SAMPLERS[5]}, ValueError, "resamples must be 1 for dpm_solver_sde_2, which uses"),
        ({"model": lambda x, t: (x, x)}, ValueError, "model must return a pair of outputs only with guidance_scale"),
        (
            {"model": lambda x, t: (x, x), "classifier": model},
            ValueError,
            "a pair of outputs only without a classifier",
        ),
        ({"model": lambda x, t: (x,), "guidance_scale": 2}, ValueError, "a tensor or a pair of tensors, got 1 values"),
        ({"model": lambda x, t: None}, TypeError, "the model's output must be a tensor, got NoneType"),
        (
            {"model": lambda x, t: x.long()},
            TypeError,
            "the model's output must be of a floating dtype, got torch.int64",
        ),
        (
            {"model": lambda x, t: x.to("meta")},
            ValueError,
            "the model's output must be on the device of x, cpu, got meta",
        ),
        (
            {"model": lambda x, t: x[:2]},
            ValueError,
            r"output must be of shape \(3, 2, 4, 4\) or \(3, 4, 4, 4\), got \(2,",
        ),
        (
            {"sampler": SAMPLERS[1]},
            ValueError,
            r"output must be of shape \(3, 4, 4, 4\), the prediction and where the variance",
        ),
        ({"classifier": lambda x, t: x[:, :1]}, ValueError, "the classifier's gradient must be of shape"),
        (
            {"model": lambda x, t: (x, x[:1]), "guidance_scale": 2},
            ValueError,
            "the model's unconditional output must be of",
        ),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(given, error, message):
    given = {"model": model, "shape": SHAPE, "sampler": diffusion.ddpm(SCHEDULE, 4), "key": Key(0), **given}
    with pytest.raises(error, match=message):
        sample(given.pop("model"), given.pop("shape"), given.pop("sampler"), given.pop("key"), **given)


def test_a_classifier_has_nothing_to_say_of_pure_noise():
    sampler = diffusion.flow_euler(diffusion.flow(), 4)
    with pytest.raises(ValueError, match=r"classifier must be None for a sampler that begins without signal"):
        sample(model, SHAPE, sampler, Key(0), classifier=model)
