"""What PyTorch's users write is the same mathematics as our ops, and whole models run on it."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gencore import Key, data, diffusion, nn, ops, plugins
from gencore.bench import plain
from gencore.train import TrainConfig, Trainer

KEY = Key(7)
LINEAR, COSINE = diffusion.linear(100), diffusion.cosine(100)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
formats = pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)


def normal(*shape, seed=0, dtype=torch.float64, memory_format=torch.contiguous_format):
    return ops.normal(shape, Key(seed), dtype=dtype).contiguous(memory_format=memory_format)


@pytest.fixture
def same_noise(monkeypatch):
    """PyTorch's noise is ours of KEY, so that results can be compared."""
    monkeypatch.setattr(torch, "randn_like", lambda x: ops.normal(x.shape, KEY, out=torch.empty_like(x)))


def assert_same(theirs, ours, *inputs, rtol=1e-6, atol=1e-6):
    """The same values and the same gradients, for functions that are given copies of the inputs."""
    results = []
    for function in (theirs, ours):
        leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
        y = function(*leaves)
        g = ops.normal(y.shape, Key(99), dtype=y.dtype)
        grads = torch.autograd.grad(y, leaves, g, allow_unused=True) if y.requires_grad else [None] * len(leaves)
        results.append((y.detach(), *grads))
    for their, our in zip(*results, strict=True):
        if their is None or our is None:  # a zero may be left out
            assert their is our or not bool((our if their is None else their).any())
        else:
            torch.testing.assert_close(their, our, rtol=rtol, atol=atol)
    torch.testing.assert_close(results[0][0].stride(), results[1][0].stride())


class TestDeterministic:
    @formats
    @pytest.mark.parametrize("activation", [None, "silu"])
    @pytest.mark.parametrize("given", ["", "wb", "wbs", "wbi", "si", "wbsti"])
    def test_group_norm(self, given, activation, memory_format):
        x = 2 * normal(3, 8, 4, 5, memory_format=memory_format) + 1
        names = {"w": "weight", "b": "bias", "s": "scale", "t": "shift", "i": "bias_in"}
        values = [normal(*((8,) if c in "wb" else (3, 8)), seed=ord(c)) for c in given]

        def run(function):
            def call(x, *values):
                more = dict(zip((names[c] for c in given), values, strict=True))
                return function(x, 4, eps=1e-3, activation=activation, **more)

            return call

        assert_same(run(plain.group_norm), run(ops.group_norm), x, *values)

    def test_group_norm_of_half_precision_with_float32_parameters(self):
        x, weight, bias = normal(2, 8, 6, 6, dtype=torch.bfloat16), *torch.randn(2, 8)
        out = torch.empty_like(x)
        assert plain.group_norm(x, 4, weight, bias, activation="silu", out=out) is out
        torch.testing.assert_close(out, ops.group_norm(x, 4, weight, bias, activation="silu"), rtol=2e-2, atol=2e-2)

    @pytest.mark.parametrize("scale", [None, 0.3])
    def test_attention(self, scale):
        q, k, v = normal(2, 3, 9, 8), normal(2, 3, 7, 8, seed=1), normal(2, 3, 7, 8, seed=2)
        assert_same(lambda *x: plain.attention(*x, scale=scale), lambda *x: ops.attention(*x, scale=scale), q, k, v)

    @formats
    @pytest.mark.parametrize(("heads", "scale"), [(1, None), (4, 0.3)])
    def test_spatial_attention(self, heads, scale, memory_format):
        qkv = normal(2, 24, 3, 5, dtype=torch.float32, memory_format=memory_format)
        both = [lambda x, f=f: f(x, heads, scale=scale) for f in (plain.spatial_attention, ops.spatial_attention)]
        assert_same(*both, qkv, rtol=1e-4, atol=1e-5)

    @formats
    @pytest.mark.parametrize("taps", [(4, 4), (5,), (2, 3)])
    def test_upfirdn2d(self, taps, memory_format):
        x, filter = normal(2, 3, 6, 8, memory_format=memory_format), normal(*taps, seed=1)
        for name in ("upsample2d", "downsample2d", "filter2d"):
            functions = (getattr(plain, name), getattr(ops, name))
            assert_same(*(lambda x, f, g=g: g(x, f, gain=0.3).contiguous() for g in functions), x, filter)
        for more in ({"up": (3, 1), "down": (2, 3), "padding": (5, 1, 2, 4), "flip_filter": True}, {"padding": (2, 3)}):
            pair = (lambda x, f, g=g, more=more: g(x, f, **more).contiguous() for g in (plain.upfirdn2d, ops.upfirdn2d))
            assert_same(*pair, x, filter)

    @pytest.mark.parametrize("weighting", ["simple", "snr", "min_snr", "own"])
    @pytest.mark.parametrize("parameterization", ["eps", "x0", "v", "velocity"])
    def test_denoising_loss(self, parameterization, weighting):
        x0, output, t = normal(4, 3, 5, 5), normal(4, 3, 5, 5, seed=1), torch.tensor([0, 5, 50, 99])
        options = {"parameterization": parameterization, "gamma": 3.0}
        options["weighting"] = torch.linspace(0.1, 2, 100) if weighting == "own" else weighting
        noise = ops.normal(x0.shape, KEY, dtype=x0.dtype)
        for when in (t, 42):
            assert_same(
                lambda o, x, when=when: plain.denoising_loss(o, x, when, LINEAR, noise=noise, **options),
                lambda o, x, when=when: ops.denoising_loss(o, x, when, LINEAR, KEY, **options),
                output,
                x0,
            )

    @pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
    @pytest.mark.parametrize("bound_weight", [0.0, 0.01])
    def test_denoising_loss_with_a_learned_variance(self, parameterization, bound_weight):
        x0, output = normal(5, 2, 4, 4).clamp(-1, 1), normal(5, 4, 4, 4, seed=1)
        t, noise = torch.tensor([0, 0, 3, 50, 98]), ops.normal(x0.shape, KEY, dtype=x0.dtype)
        options = {"parameterization": parameterization, "bound_weight": bound_weight, "weighting": "min_snr"}
        assert_same(
            lambda o, x: plain.denoising_loss(o, x, t, COSINE, noise=noise, **options),
            lambda o, x: ops.denoising_loss(o, x, t, COSINE, KEY, **options),
            output,
            x0,
            rtol=1e-5,
        )

    @pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
    def test_variational_bound(self, variance):
        x0, t = normal(4, 2, 4, 4).clamp(-1, 1), torch.tensor([0, 1, 50, 99])
        output = normal(4, 4 if variance == "learned_range" else 2, 4, 4, seed=1)
        noise = ops.normal(x0.shape, KEY, dtype=x0.dtype)
        theirs = plain.variational_bound(output, x0, t, LINEAR, noise=noise, variance=variance)
        ours = ops.variational_bound(output, x0, t, LINEAR, KEY, variance=variance)
        torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-6)

    def test_a_half_precision_output_of_a_float32_loss(self):
        x0, output = normal(4, 3, 5, 5, dtype=torch.float32), normal(4, 3, 5, 5, dtype=torch.bfloat16, seed=1)
        noise = ops.normal(x0.shape, KEY)
        theirs = plain.denoising_loss(output, x0, 5, LINEAR, noise=noise)
        torch.testing.assert_close(theirs, ops.denoising_loss(output, x0, 5, LINEAR, KEY))


_STEPS = {
    "ddpm": {"predict_x": 1.5, "predict_output": -0.7, "limit": 1.0, "x": 0.6, "x0": 0.4, "noise": 0.2},
    "ddim": {"predict_x": 1.5, "predict_output": -0.7, "direct": 0.3, "x0": 0.9},
    "euler": {"x": 1.0, "direct": -0.1},
    "scaled": {"predict_x": 0.5, "limit": 0.8, "x0_scale": 1.25, "x0": 1.0, "noise": 0.1},
    "noise only": {"noise": 1.0},
    "nothing": {},
    "history": {"x": 0.5, "x0": 0.3, "history0": -0.2, "history1": 0.1},
    "known": {"x": 0.5, "x0": 0.3, "noise": 0.2, "known": 0.9, "known_noise": 0.3},
    "guided": {"output": 3.0, "second": -2.0, "x": 0.5, "x0": 0.3, "predict_x": 1.1, "limit": 1.0},
    "learned": {"x": 0.5, "x0": 0.3, "noise": 1.0, "log_scale": -1.0, "log_scale_slope": 0.4},
}


@pytest.mark.usefixtures("same_noise")
class TestWithTheSameNoise:
    @formats
    @pytest.mark.parametrize("per_sample", [False, True])
    @pytest.mark.parametrize("name", _STEPS)
    def test_diffusion_step(self, name, per_sample, memory_format):
        columns = _STEPS[name]
        if per_sample:
            columns = {key: [value, 0.9 * value, 1.1 * value] for key, value in columns.items()}
        coefficients = ops.step_coefficients(**columns)
        if coefficients.dim() == 1 and per_sample:
            coefficients = coefficients.expand(3, -1)
        x = normal(3, 2, 4, 5, memory_format=memory_format)
        inputs, names = [x], []
        if name != "noise only":
            inputs.append(normal(3, 4 if name == "learned" else 2, 4, 5, seed=1, memory_format=memory_format))
        extra = {"guided": ["second"], "known": ["known"], "history": ["h0", "h1"]}.get(name, [])
        for i, more in enumerate(extra):
            inputs.append(normal(*x.shape, seed=2 + i, memory_format=memory_format))
            names.append(more)
        mask = (torch.rand(3, 1, 4, 5, generator=torch.Generator().manual_seed(0)) < 0.5).double()

        def run(function):
            def call(x, output=None, *more):
                given = dict(zip(names, more, strict=True))
                options = {key: given[key] for key in ("second", "known") if key in given}
                if "known" in given:
                    options["mask"] = mask
                history = tuple(given[key] for key in ("h0", "h1") if key in given)
                return function(x, output, coefficients, KEY, history=history, **options)

            return call

        assert_same(run(plain.diffusion_step), run(ops.diffusion_step), *inputs)

    @pytest.mark.parametrize("name", ["ddpm", "ddim", "scaled", "known", "learned", "noise only", "nothing"])
    @pytest.mark.parametrize("threshold", [None, 0.9])
    def test_diffusion_step_into_tensors(self, name, threshold):
        x = normal(3, 2, 4, 5)
        output = None if name == "noise only" else normal(3, 4 if name == "learned" else 2, 4, 5, seed=1)
        options = {"threshold": threshold if output is not None else None}
        if name == "known":
            options |= {"known": normal(*x.shape, seed=2), "mask": (normal(*x.shape, seed=3) > 0).double()}
        found = []
        for function in (plain.diffusion_step, ops.diffusion_step):
            out = x.clone()
            prediction = None if output is None else torch.empty_like(x)
            row = ops.step_coefficients(**_STEPS[name])
            result = function(out, output, row, KEY, out=out, prediction=prediction, **options)
            assert result is out
            found.append([out] if prediction is None else [out, prediction])
        for theirs, ours in zip(*found, strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("threshold", [None, 0.8])
    @pytest.mark.parametrize("rescale", [0.0, 0.7])
    @pytest.mark.parametrize("limit", [math.inf, 0.5])
    def test_guidance_with_statistics(self, threshold, rescale, limit):
        row = ops.step_coefficients(**{**_STEPS["guided"], "limit": limit})
        x, output, second = (normal(3, 2, 4, 5, seed=i) for i in range(3))
        options = {"second": second, "guidance_rescale": rescale, "threshold": threshold}
        theirs, ours = (f(x, output, row, KEY, **options) for f in (plain.diffusion_step, ops.diffusion_step))
        torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-6)

    def test_guidance_of_an_output_that_does_not_vary(self):
        row, x = ops.step_coefficients(**_STEPS["guided"]), normal(2, 1, 3, 3)
        options = {"second": torch.zeros_like(x), "guidance_rescale": 0.5}
        theirs, ours = (
            f(x, torch.zeros_like(x), row, KEY, **options) for f in (plain.diffusion_step, ops.diffusion_step)
        )
        torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("t", [torch.tensor([0, 50, 99]), 42], ids=["per sample", "one"])
    def test_add_noise(self, t):
        x0 = normal(3, 2, 4, 5)
        both = [lambda x, f=f: f(x, t, LINEAR, KEY) for f in (plain.add_noise, ops.add_noise)]
        assert_same(*both, x0)
        x_t, noise = plain.add_noise(x0, t, LINEAR, KEY, return_noise=True, out=(out := torch.empty_like(x0)))
        assert x_t is out
        torch.testing.assert_close(noise, ops.normal(x0.shape, KEY, dtype=x0.dtype))
        torch.testing.assert_close(out, both[0](x0))

    def test_reparameterize(self):
        mu, logvar = normal(4, 6), normal(4, 6, seed=1)
        both = [lambda m, v, f=f: f(m, v, KEY) for f in (plain.reparameterize, ops.reparameterize)]
        assert_same(*both, mu, logvar)
        for part in (0, 1):
            functions = plain.reparameterize_kl, ops.reparameterize_kl
            assert_same(*(lambda m, v, f=f, part=part: f(m, v, KEY)[part] for f in functions), mu, logvar)


class TestRandom:
    """By mean and deviation, to about five of their standard errors."""

    N = 200_000

    def check(self, values, mean, deviation):
        values = values.double()
        assert abs(values.mean().item() - mean) < 5 * deviation / math.sqrt(self.N)
        assert abs(values.std().item() - deviation) < 5 * deviation / math.sqrt(self.N)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_normal_and_uniform(self, dtype):
        for function, mean, deviation in ((plain.normal, 0, 1), (plain.uniform, 0.5, math.sqrt(1 / 12))):
            values = function((20, self.N // 20), KEY, dtype=dtype)
            assert values.dtype == dtype
            self.check(values, mean, deviation)
            assert not torch.equal(values, function((20, self.N // 20), KEY, dtype=dtype))
            out = torch.empty(20, self.N // 20)
            assert function(out.shape, out=out) is out
            self.check(out, mean, deviation)
            image = function((2, 3, 4, 5), memory_format=torch.channels_last)
            assert image.is_contiguous(memory_format=torch.channels_last)

    def test_draws_of_reparameterize(self):
        mu, logvar = torch.full((2, 10), 3.0), torch.full((2, 10), math.log(4.0))
        z, kl = plain.reparameterize_kl(mu, logvar, KEY, num_samples=self.N // 20)
        self.check(z, 3, 2)
        torch.testing.assert_close(kl, ops.reparameterize_kl(mu, logvar, KEY)[1])
        assert plain.reparameterize(mu, logvar, num_samples=3).shape == (3, 2, 10)


class Operators(TorchDispatchMode):
    """Counts those of ours."""

    def __init__(self):
        super().__init__()
        self.ours = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ours += func.namespace == "gencore"
        return func(*args, **(kwargs or {}))


def _trainer(name, tmp_path, **settings):
    images = data.load("digits", "train")
    plugin = plugins.MODELS.load(name)
    return Trainer(
        plugin,
        plugin.config_of(settings),
        images,
        TrainConfig(batch_size=4),
        tmp_path,
        data_name="digits",
        device="cpu",
    )


_SMALL = {"channels": [8, 8], "num_groups": 4, "attention_levels": [1]}
_MODELS = {
    "vae": ("vae", {"hidden_sizes": [8]}),
    "vae gaussian": ("vae", {"hidden_sizes": [8], "likelihood": "gaussian", "num_samples": 2}),
    "gan": ("gan", {"generator_sizes": [8], "discriminator_sizes": [8], "dropout": 0.1}),
    "ddpm": ("ddpm", {**_SMALL, "sampling": {"steps": 2}}),
    "ddpm learned": (
        "ddpm",
        {
            **_SMALL,
            "variance": "learned_range",
            "conditional": True,
            "scale_shift": True,
            "sampling": {"sampler": "dpm_solver", "steps": 3, "threshold": 0.9},
        },
    ),
}


class TestOperations:
    @pytest.mark.usefixtures("one_thread")
    @pytest.mark.parametrize("name", _MODELS)
    def test_a_model_runs_without_ours(self, name, tmp_path):
        trainer = _trainer(_MODELS[name][0], tmp_path, **_MODELS[name][1])
        assert bool(trainer.model.takes) == (name == "ddpm learned")
        conditions = {"label": torch.arange(4)} if trainer.model.takes else {}
        for run in (trainer.advance, lambda: trainer.model.sample(4, KEY, conditions)):
            with plain.operations(), Operators() as found:
                result = run()
            assert found.ours == 0
            assert result is None or (bool(result.isfinite().all()) and result.shape == (4, 1, 8, 8))
            with Operators() as found:
                run()
            assert found.ours > 0

    def test_a_network_is_the_same_function(self):
        unet = nn.UNet(in_channels=2, channels=(8, 8), num_groups=4, num_heads=2, scale_shift=True).double()
        for parameter in unet.parameters():  # it begins as zero
            torch.nn.init.normal_(parameter, std=0.2)
        for memory_format in FORMATS.values():
            x, t = normal(2, 2, 8, 8, memory_format=memory_format), torch.tensor([1.0, 50.0])
            with plain.operations(), Operators() as found:
                theirs = unet(x, t)
            assert found.ours == 0
            torch.testing.assert_close(theirs, unet(x, t), rtol=1e-6, atol=1e-6)

    def test_ours_come_back(self):
        before = {name: getattr(ops, name) for name in plain.NAMES}
        with pytest.raises(AttributeError), plain.operations():
            ops.group_norm("no tensor", plain)
        assert before == {name: getattr(ops, name) for name in plain.NAMES}
        with plain.operations():
            assert ops.uniform is plain.uniform

    def test_it_is_not_entered_twice(self):
        with plain.operations():
            with pytest.raises(RuntimeError, match="under way already"), plain.operations():
                pass
            assert ops.normal is plain.normal
        assert ops.normal is not plain.normal

    def test_every_op_that_draws_or_computes_is_replaced(self):
        assert set(plain.NAMES) == set(ops.__all__) - {"STEP_COLUMNS", "step_coefficients"}

    def test_the_noise_is_kept_for_one_loss(self):
        x0, t = normal(4, 3, 5, 5), torch.tensor([1, 2, 3, 4])
        with plain.operations():
            ops.add_noise(x0, t, LINEAR, KEY.stream(1))
            with pytest.raises(ValueError, match="noise must be given"):
                ops.denoising_loss(x0, x0, t, LINEAR, KEY)
            x_t, noise = ops.add_noise(x0, t, LINEAR, KEY, return_noise=True)
            assert ops.denoising_loss(noise, x0, t, LINEAR, Key(7)).eq(0).all()
            with pytest.raises(ValueError, match="noise must be given"):
                ops.denoising_loss(x_t, x0, t, LINEAR, KEY)
            ops.add_noise(x0, t, LINEAR, KEY.samples(3))
            assert ops.variational_bound(noise, x0, t, LINEAR, KEY.samples(3)).shape == (4,)
            ops.add_noise(x0, t, LINEAR, KEY)
        plain.add_noise(x0, t, LINEAR, KEY)
        with pytest.raises(ValueError, match="noise must be given"):
            plain.denoising_loss(x_t, x0, t, LINEAR, KEY)


def test_each_can_be_compiled():
    """As one graph; what the compiler then makes of it is not ours to test."""
    x, image, t = normal(4, 6), normal(2, 12, 4, 4, dtype=torch.float32), torch.tensor([1, 2])
    row = {"predict_x": 1.5, "predict_output": -0.7, "limit": 1.0, "x": 0.6, "x0": 0.4, "noise": 0.2}
    for function, args, options in (
        (plain.normal, ((2, 3),), {}),
        (plain.uniform, ((2, 3),), {}),
        (plain.reparameterize, (x, x), {"num_samples": 2}),
        (plain.reparameterize_kl, (x, x), {}),
        (plain.add_noise, (image, t, LINEAR), {"return_noise": True}),
        (plain.denoising_loss, (image, image, t, LINEAR), {"noise": image, "weighting": "min_snr"}),
        (plain.variational_bound, (image, image, t, LINEAR), {"noise": image}),
        (plain.step, (image, image, row), {}),
        (plain.group_norm, (image, 4), {"bias_in": image[:, :, 0, 0], "activation": "silu"}),
        (plain.bias_act, (image, image[0, :, 0, 0]), {"activation": "silu", "gain": 2.0, "clamp": 1.0}),
        (plain.attention, (image, image, image), {}),
        (plain.spatial_attention, (image, 2), {}),
    ):
        compiled = torch.compile(function, fullgraph=True, backend="eager", dynamic=False)
        want, got = (f(*args, **options) for f in (function, compiled))
        assert type(want) is type(got)
    torch.compiler.reset()
