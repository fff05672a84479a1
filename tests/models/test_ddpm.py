import math

import pytest
import torch
from models.small_ddpm import FAST, SMALL, Chain, bound, build, images_for, loss_of, of
from torch import nn

from gencore import Key, ops
from gencore.data.digits import load_digits
from gencore.models import HasLatents, HasLikelihoodBound, Step
from gencore.models.diffusion import DDPM, DDPMConfig, Sampling, improved_ddpm, plugin
from gencore.models.diffusion import model as ddpm_model
from gencore.models.diffusion.model import STREAM_LABELS, STREAM_NOISE, STREAM_TIME
from gencore.spec import Batch, Condition, DataSpec


def test_shapes_and_protocols():
    model = build(3, 6, 7, sampling=FAST)
    images = model.sample(4, Key(0))
    assert images.shape == (4, 3, 6, 7)
    assert images.dtype == torch.float32
    assert images.is_contiguous()
    assert not images.requires_grad
    assert images.min() >= 0
    assert images.max() <= 1
    assert model.can_edit
    assert isinstance(model, HasLikelihoodBound)
    assert not isinstance(model, HasLatents)
    (phase,) = model.phases()
    assert {id(p) for p in phase.optimizer.parameters} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
@pytest.mark.parametrize("weighting", ["simple", "snr", "min_snr"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_loss_is_algorithm_1(parameterization, weighting, schedule):
    model = build(
        2, 6, 6, parameterization=parameterization, weighting=weighting, schedule=schedule, gamma=3.0, timesteps=40
    )
    images, key, chain = images_for(model), Key(7), Chain(model.config)
    loss = loss_of(model, images, key)
    t = (ops.uniform((6,), key.stream(STREAM_TIME)).double() * 40).long()
    assert len(t.unique()) > 3
    x0, eps = 2 * images.double() - 1, ops.normal(images.shape, key.stream(STREAM_NOISE)).double()
    bar = chain.at(chain.bar, t, x0)
    x_t = bar.sqrt() * x0 + (1 - bar).sqrt() * eps
    output = model.unet(x_t.float(), t.float()).double()
    predicted = chain.x0(model.config, x_t, output, t)
    snr = bar / (1 - bar)
    if weighting == "simple":
        target = {"eps": eps, "x0": x0, "v": bar.sqrt() * eps - (1 - bar).sqrt() * x0}[parameterization]
        expected = (output - target).square()
    else:
        expected = (snr if weighting == "snr" else snr.clamp(max=3.0)) * (predicted - x0).square()
    expected = expected.mean()
    # x_t is rounded to float32 once, and the network's products differ in order: some 1e-6 relative in its output.
    assert loss.value.item() == pytest.approx(expected.item(), rel=1e-4)
    last = model.unet.conv_out.weight
    ours, theirs = (torch.autograd.grad(value, [last])[0] for value in (loss.value, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_hybrid_loss_of_a_learned_variance(parameterization):
    model = build(
        parameterization=parameterization, variance="learned_range", schedule="cosine", timesteps=12, bound_weight=0.02
    )
    images, key, chain = images_for(model, 24), Key(3), Chain(model.config)
    loss = loss_of(model, images, key)
    t = (ops.uniform((24,), key.stream(STREAM_TIME)).double() * 12).long()
    assert (t == 0).any()
    x0, eps = 2 * images.double() - 1, ops.normal(images.shape, key.stream(STREAM_NOISE)).double()
    bar = chain.at(chain.bar, t, x0)
    x_t = bar.sqrt() * x0 + (1 - bar).sqrt() * eps
    output = model.unet(x_t.float(), t.float()).double()
    target = eps if parameterization == "eps" else bar.sqrt() * eps - (1 - bar).sqrt() * x0
    simple = (output[:, :1] - target).square().flatten(1).mean(1)
    terms = torch.stack(
        [
            chain.term(model.config, x0[i : i + 1], x_t[i : i + 1], output[i : i + 1], t[i : i + 1]).mean()
            for i in range(24)
        ]
    )
    expected = (simple + 0.02 * 12 * terms / math.log(2)).mean()
    # As above; the exponential of the variance's logarithm multiplies relative errors by its size, up to 10.
    assert loss.value.item() == pytest.approx(expected.item(), rel=1e-3)
    last = model.unet.conv_out.weight
    ours, theirs = (torch.autograd.grad(value, [last])[0] for value in (loss.value, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3 * theirs.abs().max().item())
    assert theirs[1].abs().max() > 0, "the variance must have a gradient"


def test_loss_is_a_function_of_the_key_alone_and_trains_every_parameter():
    model = build(conditional=True, attention_levels=(0,), variance="learned_range", schedule="cosine", dropout=0.2)
    images, labels, before = images_for(model), torch.arange(6), torch.get_rng_state()
    loss = loss_of(model, images, Key(7), labels).value
    assert torch.equal(loss, loss_of(model, images, Key(7), labels).value)
    assert not torch.equal(loss, loss_of(model, images, Key(8), labels).value)
    assert torch.equal(torch.get_rng_state(), before)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_loss_does_not_depend_on_the_batch(dropout):
    model = build(conditional=True, dropout=dropout)
    images, labels, key = images_for(model), torch.arange(6), Key(7)
    whole = loss_of(model, images, key, labels).value
    parts = [loss_of(model, images[s], key.samples(s.start), labels[s]).value for s in (slice(0, 2), slice(2, 6))]
    # Means of some hundred float32 numbers in another order, behind convolutions in another order.
    torch.testing.assert_close(whole, (2 * parts[0] + 4 * parts[1]) / 6, rtol=1e-5, atol=1e-6)


def test_trains_in_bfloat16_with_a_float32_loss():
    model = build(variance="learned_range", schedule="cosine")
    exact = loss_of(model, images_for(model), Key(7)).value
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, images_for(model), Key(7)).value
    assert loss.dtype == torch.float32
    # bfloat16 rounds by 2^-9 in each of some ten layers, which add up to a few percent at most.
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.02)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, list(model.parameters())))


def test_labels_are_dropped_by_the_key():
    model = build(conditional=True, label_dropout=0.3)
    labels, seen = torch.arange(2000) % 10, []
    unet, model.unet = model.unet, Recorder(seen)
    images = torch.zeros(2000, 1, 8, 8)
    loss_of(model, images, Key(7), labels)
    loss_of(model, images[500:], Key(7).samples(500), labels[500:])
    model.unet = unet
    dropped = seen[0] == -1
    assert torch.equal(seen[0][~dropped], labels[~dropped])
    assert torch.equal(seen[1], seen[0][500:])
    assert torch.equal(dropped, ops.uniform((2000,), Key(7).stream(STREAM_LABELS)) < 0.3)
    # Five standard deviations of a share of 2000.
    assert dropped.double().mean().item() == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / 2000))
    with pytest.raises(KeyError, match="label"):
        loss_of(model, images, Key(7))


class Recorder(nn.Module):
    """A network that says nothing, and keeps the labels it is told."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x, t, labels=None, key=None):
        self.seen.append(labels)
        return torch.zeros_like(x)


def test_every_purpose_has_a_stream_of_its_own():
    assert len({STREAM_TIME, STREAM_NOISE, STREAM_LABELS}) == 3
    assert ddpm_model.STREAM_STRATA < ddpm_model.STREAM_BOUND


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_the_whole_bound_is_the_sum_of_its_terms(variance, parameterization):
    model = build(2, 4, 4, variance=variance, parameterization=parameterization, schedule="cosine", timesteps=8)
    images, key, chain = images_for(model), Key(5), Chain(model.config)
    images[0, 0, 0, :2] = torch.tensor([0.0, 1.0])  # the outermost bins
    x0 = 2 * images.double() - 1
    variance_T, mean_T = 1 - chain.bar[-1], chain.bar[-1].sqrt() * x0
    total = (variance_T + mean_T.square() - 1 - variance_T.log()).flatten(1).sum(1) / 2
    for step in range(8):
        t = torch.full((6,), step)
        eps = ops.normal(images.shape, key.stream(1 + step)).double()
        x_t = chain.bar[step].sqrt() * x0 + (1 - chain.bar[step]).sqrt() * eps
        with torch.no_grad():
            output = model.unet(x_t.float(), t.float()).double()
        total += chain.term(model.config, x0, x_t, output, t).flatten(1).sum(1)
    for num_samples in (7, 8, 1000):
        found = bound(model, images, key, num_samples)
        assert found.dtype == torch.float32
        # Terms in float32; their squares are of differences that cancel two digits.
        torch.testing.assert_close(found.double(), -total, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("num_samples", [1, 2, 5])
def test_fewer_terms_are_an_unbiased_estimate(num_samples):
    model = build(1, 4, 4, schedule="cosine", timesteps=12)
    images = images_for(model, 1).expand(1500, -1, -1, -1)
    whole = bound(model, images, Key(1), 12).double()
    some = bound(model, images, Key(2), num_samples).double()
    error = math.sqrt((whole.var() + some.var()).item() / 1500)
    # Four standard errors: by chance once in 16,000 seeds.
    assert abs((some.mean() - whole.mean()).item()) < 4 * error
    assert error < 0.1 * abs(whole.mean().item())


def test_bound_does_not_depend_on_the_batch():
    model = build(conditional=True)
    images, key = images_for(model), Key(5)
    for num_samples in (1, 7):
        together = bound(model, images, key, num_samples)
        apart = [
            bound(model, images[:2], key, num_samples),
            bound(model, images[2:], key.samples(2), num_samples),
        ]
        # Terms in float32 that are sums over pixels of hundreds of nats, each with the rounding of the network, 1e-6.
        torch.testing.assert_close(together, torch.cat(apart), rtol=1e-4, atol=1e-2)


def test_nothing_is_left_out_after_training():
    model = build(dropout=0.5, sampling=FAST)
    assert model.training
    images, known = images_for(model), torch.zeros(1)
    found = []
    for training in (True, False):
        model.train(training)
        edited, nats = model.edit(images, known, Key(0)), bound(model, images, Key(0))
        found.append((model.sample(2, Key(0)), edited, nats))
        assert all(module.training == training for module in model.modules())
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    # In training, it is.
    assert not torch.equal(loss_of(model.train(), images, Key(0)).value, loss_of(model.eval(), images, Key(0)).value)


def test_no_images_have_no_bounds():
    model = build(3, 4, 4)
    found = bound(model, torch.zeros(0, 3, 4, 4), Key(0), 3)
    assert (found.shape, found.dtype) == ((0,), torch.float32)
    assert model.edit(torch.zeros(0, 3, 4, 4), torch.zeros(1), Key(0)).shape == (0, 3, 4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.sample(2, Key(0), of(torch.zeros(2).long())), "must not hold 'label': this model takes none"),
        (lambda m: m.edit(torch.zeros(2, 1, 8, 9), torch.ones(1), Key(0)), r"images must be of shape \(B, 1, 8, 8\)"),
        (lambda m: m.edit(torch.zeros(2, 1, 8, 8), torch.ones(3, 1, 1, 1), Key(0)), "known must broadcast"),
        (lambda m: m.edit(torch.zeros(2, 1, 8, 8), torch.full((1,), 0.5), Key(0)), "known must be 1 where an image"),
        (lambda m: bound(m, torch.zeros(2, 1, 8, 8), Key(0), 0), "num_samples must be at least 1, got 0"),
        (lambda m: bound(m, torch.zeros(2, 3, 8, 8), Key(0)), r"images must be of shape \(B, 1, 8, 8\)"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call(build(sampling=FAST))


def test_refuses_what_is_no_tensor():
    model, images = build(conditional=True, sampling=FAST), torch.zeros(2, 1, 8, 8)
    for call, name in (
        (lambda: model.sample(2, Key(0), of([1, 2])), r"conditions\['label'\]"),
        (lambda: model.edit([[1.0]], torch.ones(1), Key(0)), "images"),
        (lambda: model.edit(images, 1, Key(0)), "known"),
        (lambda: bound(model, None, Key(0)), "images"),
    ):
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got"):
            call()


def test_refuses_labels():
    model = build(conditional=True, sampling=FAST)
    images, known, name = torch.zeros(2, 1, 8, 8), torch.zeros(1), r"conditions\['label'\]"
    for call in (
        lambda labels: model.sample(2, Key(0), of(labels)),
        lambda labels: model.edit(images, known, Key(0), of(labels)),
    ):
        with pytest.raises(TypeError, match=rf"{name} must be int64, got torch.float32"):
            call(torch.zeros(2))
        with pytest.raises(ValueError, match=rf"{name} must be of shape \(2,\), got \(3,\)"):
            call(torch.zeros(3, dtype=torch.int64))
        for wrong in (10, -2):
            with pytest.raises(ValueError, match=rf"{name} must be from 0 to 9, or -1 for no class, got .*{wrong}"):
                call(torch.tensor([0, wrong]))


def test_the_class_is_that_of_the_data_set_whatever_it_is_called():
    spec = DataSpec((1, 8, 8), (Condition("caption", "text"), Condition("breed", "class", ("cat", "dog"))))
    torch.manual_seed(0)
    model = DDPM(DDPMConfig(**SMALL, conditional=True, sampling=FAST), spec)
    assert model.takes == {"breed": "optional"}
    breeds, images, seen = torch.tensor([0, 1]), images_for(model, 2), []
    loss = model.phases()[0].loss
    told = Batch(images, {"caption": ("a", "b"), "breed": breeds})
    assert loss(Step(told, Key(0))).value.isfinite()
    model.unet.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[2]))
    model.sample(2, Key(0), {"breed": breeds})
    assert torch.equal(seen[0], breeds)
    with pytest.raises(ValueError, match="conditions must not hold 'caption': this model takes breed alone"):
        model.sample(2, Key(0), {"caption": ("a", "b")})
    unconditional = DDPM(DDPMConfig(**SMALL), spec)
    assert unconditional.takes == {}


def test_improved_ddpm_is_a_preset():
    assert improved_ddpm.preset_of == plugin.name == "ddpm"
    config = improved_ddpm.config_of({**SMALL, "sampling": {"steps": 3}})
    assert (config.schedule, config.variance, config.scale_shift) == ("cosine", "learned_range", True)
    assert improved_ddpm.config_of({"schedule": "linear"}).schedule == "linear"
    model = improved_ddpm.build(config, DataSpec((3, 8, 8)))
    assert model.sample(2, Key(0)).shape == (2, 3, 8, 8)


def test_a_short_training_gets_better(one_thread):
    torch.manual_seed(0)
    data = load_digits(None, "train")
    model = DDPM(DDPMConfig(**SMALL, parameterization="v", schedule="cosine"), data.spec)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)

    def held_out():
        images = load_digits(None, "test").batch(torch.arange(256)).images
        with torch.no_grad():
            return loss_of(model, images, Key(9)).value.item()

    # At first the network says 0, and v has a mean square of about 1.
    assert held_out() > 0.8
    for step in range(80):
        key = Key(0).fold_in(step)
        rows = (ops.uniform((64,), key.stream(9)) * len(data)).long()
        loss = loss_of(model, data.batch(rows).images, key).value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert held_out() < 0.42


def test_a_resumed_run_has_the_same_bits(one_thread, tmp_path):
    """Weights that lie channels_last in memory, as those of no other model do."""
    pytest.importorskip("safetensors")
    from gencore.train import AverageConfig, TrainConfig, Trainer, load

    data = load_digits(None, "train")
    config = DDPMConfig(**SMALL, conditional=True, dropout=0.1)

    def fit(out, steps, **options):
        settings = TrainConfig(steps=steps, batch_size=8, average=AverageConfig(0.9))
        trainer = Trainer(plugin, config, data, settings, out, data_name="digits", device="cpu", progress=False)
        trainer.fit(**options)

    fit(tmp_path / "whole", 6)
    fit(tmp_path / "parts", 3)
    fit(tmp_path / "parts", 6, resume=True)
    for ema in (False, True):
        whole, parts = (load(tmp_path / name, ema=ema, device="cpu").state_dict() for name in ("whole", "parts"))
        for name, tensor in whole.items():
            assert torch.equal(tensor, parts[name]), name
    assert any(p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous() for p in whole.values())


@pytest.mark.slow
def test_samples_show_the_classes_that_are_asked_for(one_thread, tmp_path):
    """A minute of training on digits; a run of this kind had 98% of them right."""
    pytest.importorskip("safetensors")
    from gencore.metrics import class_report, conditional_accuracy, draw_samples, train_classifier
    from gencore.train import AverageConfig, TrainConfig, Trainer, load

    train, test = load_digits(None, "train"), load_digits(None, "test")
    config = DDPMConfig.from_dict(
        {
            "channels": (16, 32),
            "conditional": True,
            "parameterization": "v",
            "schedule": "cosine",
            "optimizer": {"lr": 2e-3},
        }
    )
    settings = TrainConfig(steps=1500, batch_size=64, average=AverageConfig(0.995), schedule="cosine", warmup=50)
    Trainer(plugin, config, train, settings, tmp_path, data_name="digits", device="cpu", progress=False).fit()
    model, classifier = load(tmp_path, device="cpu"), train_classifier(train, test)
    sampling = Sampling(sampler="ddim", steps=25)
    labels = torch.arange(500) % 10
    samples = draw_samples(model, Key(0), n=500, conditions={"label": labels}, sampling=sampling)
    assert conditional_accuracy(classifier, samples, labels) > 0.9
    assert class_report(classifier, samples).confident > 0.8
    assert class_report(classifier, draw_samples(model, Key(1), n=500, sampling=sampling)).present == 10
