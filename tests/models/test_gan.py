import math

import pytest
import torch

from gencore import Key, ops
from gencore.config import ConfigError
from gencore.data.digits import load_digits
from gencore.metrics import class_report, draw_samples, train_classifier
from gencore.models import Adam, Autoencodes, HasLatents, HasLikelihoodBound, SamplingConfig, Step
from gencore.models.gan import GAN, GANConfig, plugin
from gencore.models.gan import model as gan_model
from gencore.spec import Batch, Condition, DataSpec

SPEC = DataSpec((1, 8, 8))
LABELLED = DataSpec((1, 8, 8), (Condition("digit", "class", ("zero", "one", "two")),))


def build(spec=SPEC, seed=0, **settings):
    torch.manual_seed(seed)
    small = {"generator_sizes": (16, 24), "discriminator_sizes": (24, 16), "latent_size": 5, "embedding_size": 4}
    channels = {"generator_channels": (8, 16), "discriminator_channels": (8, 16)}
    return GAN(GANConfig(**{**small, **channels, **settings}), spec)


IMAGES = ops.uniform((6, 1, 8, 8), Key(1))
LABELS = torch.tensor([0, 2, 1, 1, 0, 2])


def step_of(seed, images=IMAGES, **times):
    return Step(Batch(images, {"digit": LABELS[: len(images)]}), Key(seed), **times)


class Constant(torch.nn.Module):
    """A discriminator with these logits for real images (first call) and fakes (later calls)."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = torch.nn.ParameterList(torch.full((6,), float(value)) for value in logits)
        self.calls = 0

    def forward(self, images, labels=None, key=None):
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
    model = build(r1=0.0, label_smoothing=smoothing)
    model.discriminator = Constant(0.7, -1.3)
    loss = model.phases()[0].loss(step_of(0))
    real, fake = 1 / (1 + math.exp(-0.7)), 1 / (1 + math.exp(1.3))
    expected = -(1 - smoothing) * math.log(real) - smoothing * math.log(1 - real) - math.log(1 - fake)
    assert loss.value.item() == pytest.approx(expected, rel=1e-6)
    assert loss.metrics["accuracy"] == 1
    assert loss.metrics["real"].item() == pytest.approx(0.7, rel=1e-6)
    assert loss.metrics["fake"].item() == pytest.approx(-1.3, rel=1e-6)


def test_the_generators_loss_is_the_objectives():
    model = build(objective="minimax")
    model.discriminator = Constant(0.4)
    loss = model.phases()[1].loss(step_of(0))
    assert loss.value.item() == pytest.approx(math.log(1 - 1 / (1 + math.exp(-0.4))), rel=1e-6)
    assert loss.metrics["fake"].item() == pytest.approx(0.4)


def test_a_generator_of_pairs_sees_the_real_images():
    model = build(objective="relativistic")
    model.discriminator = Constant(0.4, -0.3)  # the samples are judged first
    loss = model.phases()[1].loss(step_of(0)).value
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.3 - 0.4)), rel=1e-6)


@pytest.mark.parametrize(("name", "factor"), [("r1", 1.5), ("r2", 1.5), ("gradient_penalty", 3.0)])
def test_penalties_of_a_linear_discriminator(name, factor):
    model = build(discriminator_sizes=(), **{"r1": 0.0, name: 3.0})
    other = build(discriminator_sizes=(), r1=0.0)
    loss, plain = (each.phases()[0].loss(step_of(0)) for each in (model, other))
    weight = model.discriminator.head.weight
    # The logit is w x + b for images in [-1, 1], its gradient w.
    norm = weight.norm()
    penalty = (norm - 1).square() if name == "gradient_penalty" else norm.square()
    torch.testing.assert_close(loss.metrics[name], penalty.detach())
    torch.testing.assert_close(loss.value - plain.value, factor * penalty)
    (ours,) = torch.autograd.grad(loss.value, [weight])
    (data,) = torch.autograd.grad(plain.value, [other.discriminator.head.weight])
    (theirs,) = torch.autograd.grad(factor * penalty, [weight])
    torch.testing.assert_close(ours - data, theirs, rtol=1e-4, atol=1e-5)


def test_penalties_become_smaller_by_half_a_cosine():
    model = build(r1=2.0, r2=1.0, penalty_final=0.1)
    losses = [model.phases()[0].loss(step_of(0, number=number, total=101)) for number in (0, 50, 100)]
    weighed = [loss.metrics["r1"] + 0.5 * loss.metrics["r2"] for loss in losses]
    rest = losses[0].value - weighed[0]
    for loss, penalty, share in zip(losses, weighed, (1.0, 0.55, 0.1), strict=True):
        torch.testing.assert_close(loss.value, rest + share * penalty)


def test_a_lazy_penalty_is_a_phase_of_its_own():
    every = build(r1=3.0, r2=1.0, gradient_penalty=2.0)
    lazy = build(r1=3.0, r2=1.0, gradient_penalty=2.0, penalty_every=8)
    without = build(r1=0.0)
    discriminator, penalty, generator = lazy.phases()
    assert [phase.name for phase in lazy.phases()] == ["discriminator", "penalty", "generator"]
    assert (penalty.every, penalty.batch_of) == (8, "discriminator")
    assert penalty.optimizer is discriminator.optimizer
    assert (generator.every, generator.optimizer is discriminator.optimizer) == (1, False)
    plain = discriminator.loss(step_of(0)).value
    assert torch.equal(plain, without.phases()[0].loss(step_of(0)).value)
    whole, own = every.phases()[0].loss(step_of(0)), penalty.loss(step_of(0))
    torch.testing.assert_close(own.value, 8 * (whole.value - plain))
    assert own.metrics.keys() == {"r1", "r2", "gradient_penalty"}
    for name, figure in own.metrics.items():
        torch.testing.assert_close(figure, whole.metrics[name])


def test_weights_are_clipped_after_each_step_of_the_discriminator():
    model = build(r1=0.0, objective="wasserstein", weight_clip=0.01)
    for phase in model.phases():
        if phase.after is not None:
            phase.after()
    assert max(p.abs().max().item() for p in model.discriminator.parameters()) == pytest.approx(0.01)
    assert max(p.abs().max().item() for p in model.generator.parameters()) > 0.05


def test_augmented_images_are_what_the_discriminator_sees_and_what_it_says_moves_the_probability():
    augmentation = {"probability": 0.5, "images": 60, "every": 1, "target": 0.0}
    model = build(r1=0.0, augmentation=augmentation).train()
    seen = []
    model.discriminator.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    discriminator, generator = model.phases()
    loss = discriminator.loss(step_of(0))
    assert loss.metrics["augmentation"] == 0.5
    real, fake = seen
    changed = (real != 2 * IMAGES - 1).flatten(1).any(1)
    assert changed.any()
    generator.loss(step_of(0))
    assert torch.equal(seen[2], fake)  # the same key: the same sample and the same changes
    assert model.augmentation.probability == 0.5
    discriminator.after()
    assert model.augmentation.probability != 0.5
    seen.clear()
    model.eval()
    discriminator.loss(step_of(0))
    assert torch.equal(seen[0], 2 * IMAGES - 1)


def test_the_gradient_goes_through_the_augmentation_twice():
    model = build(r1=3.0, augmentation={"probability": 1.0}).train()
    loss = model.phases()[0].loss(step_of(0))
    gradients = torch.autograd.grad(loss.value, list(model.discriminator.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert loss.metrics["r1"] > 0
    model.phases()[1].loss(step_of(0)).value.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.generator.parameters())


@pytest.mark.parametrize("conditioning", ["embedding", "projection"])
def test_a_conditional_model(conditioning):
    model = build(LABELLED, conditioning=conditioning)
    assert model.takes == {"digit": "optional"}
    for phase in model.phases():
        gradients = torch.autograd.grad(phase.loss(step_of(7)).value, phase.optimizer.parameters)
        assert all(gradient.abs().max() > 0 for gradient in gradients)
    images = model.sample(6, Key(0), {"digit": LABELS})
    assert torch.equal(model.sample(6, Key(0), {"digit": LABELS}), images)
    other = model.sample(6, Key(0), {"digit": (LABELS + 1) % 3})
    assert ((images - other).abs().flatten(1).max(1).values > 1e-4).all()
    latents = ops.normal((6, 5), Key(0).stream(gan_model.STREAM_LATENTS))
    torch.testing.assert_close(model.decode(latents, LABELS), images)
    torch.testing.assert_close(model.decode(latents), model.decode(latents, torch.zeros(6, dtype=torch.int64)))


def test_images_without_a_class_have_one_that_is_drawn_from_the_key():
    model = build(LABELLED, conditioning="embedding")
    free = model.sample(300, Key(0))
    classes = torch.stack([model.sample(300, Key(0), {"digit": torch.full((300,), c)}) for c in range(3)])
    nearest = (classes - free).abs().flatten(2).max(2).values
    assert nearest.min(0).values.max() < 1e-5
    counts = nearest.argmin(0).bincount(minlength=3)
    assert (counts - 100).abs().max() < 4 * math.sqrt(300 * 2 / 9)
    mixed = torch.where(torch.arange(300) % 2 == 0, -1, 1)
    partly = model.sample(300, Key(0), {"digit": mixed})
    torch.testing.assert_close(partly[::2], free[::2])
    torch.testing.assert_close(partly[1::2], classes[1][1::2])
    torch.testing.assert_close(model.sample(7, Key(0).samples(3)), free[3:10])


@pytest.mark.parametrize("network", ["mlp", "dcgan", "resnet"])
@pytest.mark.parametrize("spec", [SPEC, LABELLED], ids=["plain", "classes"])
def test_samples_of_batch_norm_do_not_depend_on_those_they_are_made_with(network, spec):
    model = build(spec, network=network, generator_norm="batch", conditioning="auto").train()
    for seed in range(3):
        model.phases()[1].loss(step_of(seed))
    together = model.sample(7, Key(3))
    apart = torch.cat([model.sample(1, Key(3)), model.sample(6, Key(3).samples(1))])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)
    assert all(module.training for module in model.modules())
    # In training they do.
    loss, part = (model.phases()[1].loss(step_of(0, IMAGES[:n])).value for n in (6, 3))
    assert not torch.allclose(loss, part)


def test_a_batch_norm_needs_two_images():
    model = build(network="dcgan", generator_norm="batch").train()
    for phase in model.phases():
        with pytest.raises(ConfigError, match=r"train\.batch_size: must be at least 2 images .* was 1"):
            phase.loss(step_of(0, IMAGES[:1]))
    model.eval().phases()[0].loss(step_of(0, IMAGES[:1]))
    build(network="dcgan").train().phases()[0].loss(step_of(0, IMAGES[:1]))


def test_no_two_draws_of_a_step_share_noise(monkeypatch):
    """Latents, missing classes, factors, dropout and transforms of real images, of samples, and between them."""
    settings = {"dropout": 0.5, "gradient_penalty": 1.0, "conditioning": "embedding"}
    model = build(LABELLED, **settings, augmentation={"transforms": ("flip", "color")}).train()
    keys = []
    for name in ("normal", "uniform"):
        drawn = getattr(ops, name)
        monkeypatch.setattr(
            ops, name, lambda shape, key, *, drawn=drawn, **rest: keys.append(key) or drawn(shape, key, **rest)
        )
    for phase, count in zip(model.phases(), (2 + 1 + 3 * 4, 2 + 4), strict=True):
        keys.clear()
        phase.loss(step_of(0))
        assert len({tuple(key.packed.tolist()) for key in keys}) == len(keys) == count


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
    settings = {"objective": "minimax", "generator_optimizer.lr": "1e-3", "discriminator_steps": "2"}
    config = GANConfig.from_settings(settings)
    assert config.generator_optimizer.beta1 == 0.5
    assert GANConfig.from_dict(config.to_dict()) == config
    assert plugin.config is GANConfig
    model = plugin.build(config, SPEC)
    assert model.config == config
    assert model.spec == SPEC


def test_config_faults():
    with pytest.raises(ConfigError) as info:
        GANConfig(generator_sizes=(10**12,), discriminator_sizes=(64, 10**12), latent_size=10**12)
    names = ("latent_size", "generator_sizes[0]", "discriminator_sizes[1]")
    assert info.value.faults == [f"{name}: must be <= 65536, was {10**12}" for name in names]


FAULTS = {
    "generator_channels: must not be empty, was ()": {"network": "dcgan", "generator_channels": ()},
    "discriminator_channels: must be multiples of 8 for network=r3gan, but 12 is not": {
        "network": "r3gan", "generator_norm": "none", "discriminator_channels": (8, 12)
    },
    "generator_norm: must be none for network=r3gan, was layer": {"network": "r3gan"},
    "dropout: must be 0 for network=resnet, was 0.1": {"network": "resnet", "dropout": 0.1},
    "label_smoothing: must be 0 for objective=hinge, was 0.1": {"objective": "hinge", "label_smoothing": 0.1},
    "r1: must be 0 for discriminator_norm=batch, with which the gradient of an image is one of others too, was 4": {
        "discriminator_norm": "batch"
    },
    "penalty_every: must be 1 without a penalty, was 4": {"r1": 0.0, "penalty_every": 4},
    "augmentation.target: must be none for objective=wasserstein, whose scores have no sign to go by, was 0.6": {
        "objective": "wasserstein", "augmentation": {"probability": 0.1}
    },
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_settings_that_do_not_go_together(fault):
    with pytest.raises(ConfigError) as info:
        GANConfig(**FAULTS[fault])
    assert info.value.faults == [fault]


@pytest.mark.parametrize(
    ("settings", "spec", "fault"),
    [
        (
            {"network": "resnet"},
            DataSpec((1, 30, 30)),
            "network: resnet makes images whose sides are 4 to 7 times a power of two (the longer one any multiple of "
            "it), such as 28x28 or 32x32 pixels, but the data set's are 30x30",
        ),
        (
            {"conditioning": "projection"},
            DataSpec((1, 8, 8), (Condition("kind", "class", ("only",)),)),
            "conditioning: must be none or auto for images of one class, which says nothing, was projection",
        ),
        (
            {"conditioning": "embedding"},
            SPEC,
            "conditioning: must be none or auto for images of no classes, was embedding",
        ),
        (
            {"augmentation": {"target": None}},
            DataSpec((3, 8, 12)),
            "augmentation.transforms: rotate must have square images, but they are 8x12",
        ),
    ],
)
def test_settings_that_do_not_go_with_the_images(settings, spec, fault):
    assert list(GANConfig(**settings).faults_with(spec)) == [fault]


def test_one_class_is_no_condition_where_it_is_a_matter_of_choice():
    model = build(DataSpec((1, 8, 8), (Condition("kind", "class", ("only",)),)), conditioning="auto")
    assert model.takes == {}
    model.phases()[1].loss(step_of(0))


@pytest.mark.parametrize("loss", ["minimax", "non-saturating"])
def test_finds_both_modes_of_a_small_distribution(loss):
    """Half the images are (0.2, 0.8), half (0.8, 0.2), with a little noise: samples must be near each, about evenly."""
    model = build(
        DataSpec((1, 1, 2)), latent_size=2, objective=loss, r1=2.0, generator_sizes=(32, 32),
        discriminator_sizes=(32, 32),
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
    config = GANConfig(objective=loss)
    settings = TrainConfig(steps=3000, batch_size=64, average=AverageConfig(0.995))
    Trainer(plugin, config, train, settings, tmp_path, data_name="digits", device="cpu", progress=False).fit()
    report = class_report(train_classifier(train, test), draw_samples(load(tmp_path, device="cpu"), Key(0)))
    assert report.test_accuracy > 0.93
    assert report.present >= 9, report
    assert report.mean_confidence > 0.8, report
