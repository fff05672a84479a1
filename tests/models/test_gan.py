import math

import pytest
import torch

from gencore import Key, ops
from gencore.config import ConfigError
from gencore.data.digits import load_digits
from gencore.metrics import class_report, draw_samples, train_classifier
from gencore.models import Adam, Autoencodes, HasLatents, HasLikelihoodBound, SamplingConfig, Step
from gencore.models.gan import GAN, GANConfig, plugin
from gencore.spec import Batch, DataSpec

SPEC = DataSpec((1, 8, 8))


def build(spec=SPEC, seed=0, **settings):
    torch.manual_seed(seed)
    settings = {"generator_sizes": (16, 24), "discriminator_sizes": (24, 16), "latent_size": 5} | settings
    return GAN(GANConfig(**settings), spec)


IMAGES = ops.uniform((6, 1, 8, 8), Key(1))


def step_of(seed, images=IMAGES):
    return Step(Batch(images), Key(seed))


class Constant(torch.nn.Module):
    """A discriminator with these logits for real images (first call) and fakes (later calls)."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = torch.nn.ParameterList(torch.full((6,), float(value)) for value in logits)
        self.calls = 0

    def forward(self, images, key=None):
        self.calls += 1
        return self.logits[min(self.calls, len(self.logits)) - 1]


def test_shapes_and_protocols():
    model = build(DataSpec((3, 6, 7)))
    images = model.sample(4, Key(0))
    assert images.shape == (4, 3, 6, 7)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert not images.requires_grad
    assert model.decode(torch.zeros(2, 5)).shape == (2, 3, 6, 7)
    assert model.latent_shape == (5,)
    assert isinstance(model, HasLatents)
    assert not isinstance(model, Autoencodes)
    assert not isinstance(model, HasLikelihoodBound)


def test_samples_do_not_depend_on_the_batch_or_the_mode():
    model = build()
    together = model.sample(7, Key(3))
    apart = torch.cat([model.sample(3, Key(3)), model.eval().sample(4, Key(3).samples(3))])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.sample(7, Key(3)), together)
    assert not torch.allclose(model.sample(7, Key(4)), together)


def test_phases_are_algorithm_1():
    model = build(discriminator_steps=3)
    discriminator, generator = model.phases()
    assert (discriminator.name, discriminator.repeats) == ("discriminator", 3)
    assert (generator.name, generator.repeats) == ("generator", 1)
    assert [id(p) for p in discriminator.optimizer.parameters] == [id(p) for p in model.discriminator.parameters()]
    assert [id(p) for p in generator.optimizer.parameters] == [id(p) for p in model.generator.parameters()]
    for phase in (discriminator, generator):
        assert (phase.every, phase.batch_of) == (1, None)
        assert [group.settings for group in phase.optimizer.groups] == [Adam(lr=5e-4, beta1=0.5)]
    other = build(generator_optimizer=Adam(lr=1.0)).phases()
    assert [phase.optimizer.groups[0].settings.lr for phase in other] == [5e-4, 1.0]


@pytest.mark.parametrize("phase", [0, 1])
def test_losses_are_functions_of_the_key_alone_and_train_every_parameter(phase):
    model = build()
    phase = model.phases()[phase]
    before = torch.get_rng_state()
    loss = phase.loss(step_of(7))
    assert torch.equal(loss.value, phase.loss(step_of(7)).value)
    assert not torch.equal(loss.value, phase.loss(step_of(8)).value)
    assert torch.equal(torch.get_rng_state(), before)
    assert not IMAGES.requires_grad
    gradients = torch.autograd.grad(loss.value, phase.optimizer.parameters)
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("phase", [0, 1])
def test_trains_in_bfloat16_with_a_float32_loss(phase):
    phase = build().phases()[phase]
    exact = phase.loss(step_of(7)).value
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = phase.loss(step_of(7)).value
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0.02)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, phase.optimizer.parameters))


def test_discriminator_step_leaves_the_generator_alone():
    model = build()
    model.phases()[0].loss(step_of(7)).value.backward()
    assert all(parameter.grad is None for parameter in model.generator.parameters())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_discriminator_loss_is_equation_1(smoothing):
    model = build(gradient_penalty=0.0, label_smoothing=smoothing)
    model.discriminator = Constant(0.7, -1.3)
    loss = model.phases()[0].loss(step_of(0))
    real, fake = 1 / (1 + math.exp(-0.7)), 1 / (1 + math.exp(1.3))
    expected = -(1 - smoothing) * math.log(real) - smoothing * math.log(1 - real) - math.log(1 - fake)
    assert loss.value.item() == pytest.approx(expected, rel=1e-6)
    assert loss.metrics["accuracy"] == 1
    assert loss.metrics["real"].item() == pytest.approx(real, rel=1e-6)
    assert loss.metrics["fake"].item() == pytest.approx(fake, rel=1e-6)


@pytest.mark.parametrize(("name", "sign"), [("minimax", -1), ("non-saturating", 1)])
@pytest.mark.parametrize("logit", [0.4, -200.0, 200.0])
def test_generator_losses(name, sign, logit):
    model = build(loss=name)
    model.discriminator = Constant(logit)
    loss = model.phases()[1].loss(step_of(0)).value
    # log(1 - D) = -log(1 + e^l) for minimax, -log D = log(1 + e^-l) for the other; exact where sigmoid is 0 or 1.
    exponent = -sign * logit
    softplus = max(exponent, 0.0) + math.log1p(math.exp(-abs(exponent)))
    assert loss.item() == pytest.approx(sign * softplus, rel=1e-6)
    # Down either loss is up the logit; minimax saturates where D is sure that the image is not real.
    loss.backward()
    gradient = model.discriminator.logits[0].grad.sum().item()
    assert gradient == pytest.approx(-1 / (1 + math.exp(-exponent)) if exponent > -700 else 0.0, rel=1e-5, abs=1e-12)


def test_gradient_penalty_of_a_linear_discriminator():
    model = build(discriminator_sizes=(), dropout=0.0, gradient_penalty=3.0)
    weight = model.discriminator.head.weight
    with_penalty = model.phases()[0].loss(step_of(0))
    without = build(discriminator_sizes=(), dropout=0.0, gradient_penalty=0.0)
    without.load_state_dict(model.state_dict())
    # The logit is w (2 x - 1) + b, its gradient 2 w.
    penalty = 4 * weight.square().sum()
    torch.testing.assert_close(with_penalty.metrics["gradient_penalty"], penalty.detach())
    plain = without.phases()[0].loss(step_of(0)).value
    torch.testing.assert_close(with_penalty.value - plain, 1.5 * penalty)
    (gradient,) = torch.autograd.grad(with_penalty.value - plain.detach(), [weight])
    (gradient_plain,) = torch.autograd.grad(plain, [without.discriminator.head.weight])
    torch.testing.assert_close(gradient - gradient_plain, 12 * weight.detach())


def test_dropout_is_a_function_of_the_key():
    """Every layer has a dropout with noise of its own; see the tests of :class:`gencore.nn.Dropout`."""
    model = build(dropout=0.3)
    logits = model.discriminator(IMAGES, Key(0))
    assert torch.equal(logits, model.discriminator(IMAGES, Key(0)))
    torch.testing.assert_close(logits[2:], model.discriminator(IMAGES[2:], Key(0).samples(2)))
    assert not torch.allclose(logits, model.discriminator(IMAGES, Key(1)))
    assert not torch.allclose(logits, model.discriminator(IMAGES))
    dropouts = model.discriminator.dropouts
    assert [(dropout.p, dropout.stream) for dropout in dropouts] == [(0.3, 0), (0.3, 1)]


def test_no_two_draws_of_a_step_share_noise(monkeypatch):
    """Real and fake images drop different units, and neither is the noise of the latents."""
    model = build(dropout=0.5)
    keys, forward, normal = [], model.discriminator.forward, ops.normal
    monkeypatch.setattr(ops, "normal", lambda shape, key, **rest: keys.append(key) or normal(shape, key, **rest))
    model.discriminator.forward = lambda images, key=None: keys.append(key) or forward(images, key)
    for phase in model.phases():
        keys.clear()
        phase.loss(step_of(0))
        packed = {tuple(key.packed.tolist()) for key in keys}
        assert len(packed) == len(keys) == {"discriminator": 3, "generator": 2}[phase.name]


def test_evaluating_the_discriminator_drops_nothing():
    model = build(dropout=0.9)
    whole = model.discriminator(IMAGES)
    assert torch.equal(model.discriminator(IMAGES), whole)
    assert torch.equal(model.eval().discriminator(IMAGES, Key(0)), whole)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.decode(torch.zeros(2, 4)), r"latents must be of shape \(B, 5\), got \(2, 4\)"),
        (lambda m: m.sample(2, Key(0), {"label": torch.zeros(2)}), "must not hold 'label': this model takes none"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call(build())


def test_there_is_no_choice_of_sampling():
    assert build().sampling is None
    with pytest.raises(TypeError, match="sampling must be None, got SamplingConfig"):
        build().sample(2, Key(0), sampling=SamplingConfig())


def test_config_round_trip():
    config = GANConfig.from_settings({"loss": "minimax", "generator_optimizer.lr": "1e-3", "discriminator_steps": "2"})
    assert config.generator_optimizer.beta1 == 0.5
    assert GANConfig.from_dict(config.to_dict()) == config
    assert plugin.config is GANConfig
    model = plugin.build(config, SPEC)
    assert model.config == config
    assert model.spec == SPEC


def test_config_faults():
    with pytest.raises(ConfigError) as info:
        GANConfig(generator_sizes=(10**12,), discriminator_sizes=(64, 10**12), latent_size=10**12)
    names = ("generator_sizes[0]", "discriminator_sizes[1]", "latent_size")
    assert info.value.faults == [f"{name}: must be <= 65536, was {10**12}" for name in names]


@pytest.mark.parametrize("loss", ["minimax", "non-saturating"])
def test_finds_both_modes_of_a_small_distribution(loss):
    """Half the images are (0.2, 0.8), half (0.8, 0.2), with a little noise: samples must be near each, about evenly."""
    model = build(
        DataSpec((1, 1, 2)), latent_size=2, loss=loss, dropout=0.0, generator_sizes=(32, 32),
        discriminator_sizes=(32, 32), gradient_penalty=0.5,
    )  # fmt: skip
    optimizers = [torch.optim.Adam(p.optimizer.parameters, lr=2e-3, betas=(0.5, 0.999)) for p in model.phases()]
    modes = torch.tensor([[0.2, 0.8], [0.8, 0.2]])
    for step in range(500):
        key = Key(0).fold_in(step)
        images = modes[torch.arange(128) % 2] + 0.02 * ops.normal((128, 2), key.stream(9))
        for index, (phase, optimizer) in enumerate(zip(model.phases(), optimizers, strict=True)):
            loss = phase.loss(Step(Batch(images.reshape(-1, 1, 1, 2)), key.fold_in(index))).value
            optimizer.zero_grad()
            loss.backward(inputs=list(phase.optimizer.parameters))
            optimizer.step()
    distances = torch.cdist(model.sample(400, Key(1)).flatten(1), modes)
    near = (distances < 0.2).float().mean(0)
    assert near.min() > 0.25, near
    assert near.sum() > 0.75, near


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["minimax", "non-saturating"])
def test_samples_show_the_classes_of_digits(one_thread, tmp_path, loss):
    """With the settings of docs/training.md, whose run showed 10 of 10."""
    pytest.importorskip("safetensors")
    from gencore.train import AverageConfig, TrainConfig, Trainer, load

    train, test = load_digits(None, "train"), load_digits(None, "test")
    config = GANConfig(loss=loss)
    settings = TrainConfig(steps=3000, batch_size=64, average=AverageConfig(0.995))
    Trainer(plugin, config, train, settings, tmp_path, data_name="digits", device="cpu", progress=False).fit()
    report = class_report(train_classifier(train, test), draw_samples(load(tmp_path, device="cpu"), Key(0)))
    assert report.test_accuracy > 0.93
    assert report.present >= 9, report
    assert report.mean_confidence > 0.8, report
