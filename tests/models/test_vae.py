import math
import os

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

from gencore import Key, ops
from gencore.config import ConfigError
from gencore.data.digits import load_digits
from gencore.data.mnist import load_mnist
from gencore.metrics import likelihood_bound
from gencore.models import Autoencodes, HasLatents, HasLikelihoodBound, SamplingConfig, Step
from gencore.models.vae import VAE, VAEConfig, beta_vae, plugin
from gencore.models.vae import model as vae_model
from gencore.models.vae.model import STREAM_OBSERVE
from gencore.spec import Batch, Condition, DataSpec

SPEC = DataSpec((1, 8, 8))
# Those of other images.
SPECS = {"conv": DataSpec((2, 7, 9)), "predicted": DataSpec((3, 8, 8))}
CONFIGS = {
    "mlp": VAEConfig(hidden_sizes=(24,), latent_size=4),
    "conv": VAEConfig(network="conv", hidden_sizes=(8, 6), latent_size=4),
    "shared": VAEConfig(hidden_sizes=(24,), latent_size=4, likelihood="gaussian"),
    "pixel": VAEConfig(hidden_sizes=(24,), latent_size=4, likelihood="gaussian", variance="pixel"),
    "predicted": VAEConfig(
        network="conv", hidden_sizes=(8,), latent_size=4, likelihood="gaussian", variance="predicted"
    ),
    "samples": VAEConfig(hidden_sizes=(24,), latent_size=4, num_samples=3, binarize="threshold"),
}


def build(config, spec=SPEC, seed=0):
    torch.manual_seed(seed)
    return VAE(config, spec)


def images_for(model, n=6, seed=1):
    return ops.uniform((n, *model.spec.image_shape), Key(seed))


def bound(model, images, key, *num_samples):
    return model.log_likelihood_bound(Batch(images), key, *num_samples)


@pytest.fixture(params=CONFIGS)
def model(request):
    return build(CONFIGS[request.param], SPECS.get(request.param, SPEC))


def test_shapes_and_protocols(model):
    images = images_for(model)
    mu, logvar = model.encode(images)
    assert mu.shape == logvar.shape == (6, 4)
    decoded = model.decode(mu)
    assert decoded.shape == images.shape
    samples = model.sample(5, Key(0))
    assert samples.shape == (5, *model.spec.image_shape)
    for x in (decoded, samples):
        assert x.dtype == torch.float32
        assert x.min() >= 0
        assert x.max() <= 1
    assert model.latent_shape == (4,)
    assert not samples.requires_grad
    assert model.can_sample
    assert model.takes == {}
    for protocol in (Autoencodes, HasLatents, HasLikelihoodBound):
        assert isinstance(model, protocol)


def test_samples_do_not_depend_on_the_batch(model):
    together = model.sample(7, Key(3))
    apart = torch.cat([model.sample(3, Key(3)), model.sample(4, Key(3).samples(3))])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.sample(7, Key(3)), together)
    assert not torch.allclose(model.sample(7, Key(4)), together)


def test_every_purpose_has_a_stream_of_its_own():
    numbers = [value for name, value in vars(vae_model).items() if name.startswith("STREAM_")]
    assert len(set(numbers)) == len(numbers) == 3


@pytest.mark.parametrize("num_samples", [1, np.int64(2), 23])
def test_bound_does_not_depend_on_the_batch(model, num_samples):
    images, key = images_for(model), Key(5)
    together = bound(model, images, key, num_samples)
    apart = [
        bound(model, images[:2], key, num_samples),
        bound(model, images[2:], key.samples(2), num_samples),
    ]
    assert together.shape == (6,)
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-5, atol=1e-4)


def test_loss_is_minus_the_bound_and_trains_every_parameter(model):
    images, key = images_for(model), Key(5)
    before = torch.get_rng_state()
    (phase,) = model.phases()
    loss = phase.loss(Step(Batch(images), key))
    assert torch.equal(torch.get_rng_state(), before), "noise must come from the key alone"
    if model.config.num_samples == 1:
        torch.testing.assert_close(-loss.value, bound(model, images, key).mean(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(loss.metrics["elbo"], loss.metrics["log_likelihood"] - loss.metrics["kl"])
    loss.value.backward()
    assert {id(p) for p in phase.optimizer.parameters} == {id(p) for p in model.parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_trains_in_bfloat16_with_a_float32_loss(model):
    (phase,) = model.phases()
    step = Step(Batch(images_for(model)), Key(5))
    exact = phase.loss(step).value
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = phase.loss(step).value
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0.1)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in phase.optimizer.parameters)


def test_beta_weighs_the_kl():
    config = CONFIGS["mlp"]
    losses = {}
    for beta in (0.0, 1.0, 4.0):
        model = build(VAEConfig(**{**vars(config), "beta": beta}))
        losses[beta] = model.phases()[0].loss(Step(Batch(images_for(model)), Key(0)))
    kl = losses[0.0].metrics["kl"]
    torch.testing.assert_close(losses[4.0].value - losses[1.0].value, 3 * kl)
    torch.testing.assert_close(losses[0.0].value, -losses[0.0].metrics["log_likelihood"])


def test_gaussian_bound_is_exact_with_the_exact_posterior():
    """Linear encoder and decoder: the model is probabilistic PCA, whose evidence and posterior are known."""
    config = VAEConfig(hidden_sizes=(), latent_size=2, likelihood="gaussian")
    model = build(config, DataSpec((1, 2, 3)))
    variance = 0.04
    weight = torch.zeros(6, 2)
    weight[:3, 0], weight[3:, 1] = torch.tensor([0.3, -0.2, 0.1]), torch.tensor([0.2, 0.2, -0.4])
    bias = torch.linspace(-0.2, 0.2, 6)
    precision = weight.square().sum(0) / variance + 1  # diagonal, as the columns are orthogonal
    with torch.no_grad():
        decoder, encoder = model.decoder.layers[0], model.encoder.layers[0]
        decoder.weight.copy_(weight)
        decoder.bias.copy_(bias)
        floor = -math.log(12 * 256**2)
        model.likelihood.logvar.fill_(floor + math.log(math.expm1(math.log(variance) - floor)))
        # The encoder sees 2 y - 1, the decoder's mean is W z + b + 1/2.
        to_mean = weight.T / (variance * precision[:, None])
        encoder.weight.copy_(torch.cat((to_mean / 2, torch.zeros(2, 6))))
        encoder.bias.copy_(torch.cat((-to_mean @ bias, -precision.log())))
    images, key = images_for(model, 16), Key(2)
    y = model.likelihood.observe(images, key.stream(STREAM_OBSERVE))
    assert ((y >= 0) & (y < 1)).all()
    covariance = weight @ weight.T + variance * torch.eye(6)
    exact = MultivariateNormal(bias.double() + 0.5, covariance.double()).log_prob(y.flatten(1).double())
    exact = exact - 6 * math.log(256)
    # With q(z|x) = p(z|x) every importance weight is p(x): the bound is exact for any draws.
    for num_samples in (2, 25):
        found = bound(model, images, key, num_samples)
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-4)
    keys = [key.fold_in(i) for i in range(400)]
    draws = torch.stack([bound(model, images[:1], k) for k in keys])
    ys = torch.cat([model.likelihood.observe(images[:1], k.stream(STREAM_OBSERVE)) for k in keys])
    evidence = MultivariateNormal(bias.double() + 0.5, covariance.double()).log_prob(ys.flatten(1).double())
    gap = draws.flatten() - (evidence - 6 * math.log(256))
    assert abs(gap.mean()) < 4 * gap.std() / 20, "on average, the bound with the exact posterior is the evidence"


def binary_evidence(model, images):
    """log p(x) of a model with one latent dimension, by quadrature."""
    z = torch.linspace(-9, 9, 4001)
    log_prior = -0.5 * z.square() - 0.5 * math.log(2 * math.pi) + math.log(18 / 4000)
    with torch.no_grad():
        log_likelihood = model._log_likelihood(images, z[:, None, None].expand(-1, len(images), 1))
    return (log_likelihood + log_prior[:, None]).double().logsumexp(0)


def test_bernoulli_bounds_approach_the_evidence_from_below():
    model = build(VAEConfig(hidden_sizes=(8,), latent_size=1, binarize="none"), DataSpec((1, 2, 2)))
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.mul_(4)
    images = torch.tensor([[(i >> bit) & 1 for bit in range(4)] for i in range(16)]).float().reshape(16, 1, 2, 2)
    exact = binary_evidence(model, images)
    assert exact.exp().sum().item() == pytest.approx(1, abs=1e-5), "a distribution of the 16 binary images"

    def mean_bound(k, repeats):
        draws = [bound(model, images, Key(i), k) for i in range(repeats)]
        return torch.stack(draws).double().mean(0)

    one, ten, many = mean_bound(1, 400), mean_bound(10, 100), mean_bound(4000, 2)
    assert (one < exact + 0.05).all()
    assert one.mean() < ten.mean() - 0.01
    assert ten.mean() < exact.mean()
    torch.testing.assert_close(many, exact, rtol=0, atol=0.05)


@pytest.mark.parametrize("variance", ["shared", "pixel", "predicted"])
@pytest.mark.parametrize("logvar", [-40.0, -10.0, -6.0])
def test_gaussian_nats_are_those_of_eight_bit_images(variance, logvar):
    """exp(bound) over all 256 levels sums to at most 1, however small a variance was learned."""
    config = VAEConfig(hidden_sizes=(), latent_size=1, likelihood="gaussian", variance=variance)
    model = build(config, DataSpec((1, 1, 1)))
    levels = (torch.arange(256) / 255).reshape(256, 1, 1, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.likelihood.logvar.fill_(logvar)
        model.decoder.layers[0].bias[0] = 0.002  # the middle of a level
    bounds = torch.stack([bound(model, levels, Key(i)) for i in range(200)]).double().mean(0)
    total = bounds.exp().sum().item()
    assert total <= 1.0
    assert total > (0.8 if logvar < -9 else 0.95)


def test_log_prob_of_bernoulli_is_stable_and_exact():
    model = build(CONFIGS["mlp"])
    observed = torch.tensor([1.0, 0.0, 1.0, 0.0]).reshape(1, 1, 2, 2)
    outputs = torch.tensor([2.0, 2.0, -300.0, 300.0]).reshape(1, 1, 2, 2)
    expected = -math.log1p(math.exp(-2)) - math.log1p(math.exp(2)) - 300 - 300
    assert model.likelihood.log_prob(observed, outputs).item() == pytest.approx(expected, rel=1e-6)


def test_stochastic_binarization_draws_gray_values_as_probabilities():
    model = build(CONFIGS["mlp"])
    gray = torch.tensor([0.0, 0.25, 0.5, 1.0]).reshape(1, 1, 2, 2).expand(20000, 1, 2, 2)
    binary = model.likelihood.observe(gray, Key(0))
    assert set(binary.unique().tolist()) == {0.0, 1.0}
    mean = binary.mean(0).flatten()
    assert mean[0] == 0
    assert mean[3] == 1
    torch.testing.assert_close(mean[1:3], torch.tensor([0.25, 0.5]), rtol=0, atol=0.015)
    assert torch.equal(binary, model.likelihood.observe(gray, Key(0)))


def test_dequantised_pixels_stay_within_their_level(monkeypatch):
    model = build(CONFIGS["shared"])
    levels = torch.arange(256).reshape(1, 1, 16, 16)
    # 2^-24 below 1 is the largest value of uniform(); beside 255, float32 cannot tell it from 1.
    for noise in (0.0, 0.5, 1 - 2**-24):
        monkeypatch.setattr(ops, "uniform", lambda shape, key, noise=noise, **options: torch.full(shape, noise))
        observed = model.likelihood.observe(levels / 255, Key(0))
        assert torch.equal((observed.double() * 256).floor().long(), levels)


@pytest.mark.parametrize("name", ["mlp", "samples", "shared"])
def test_encode_sees_the_mean_of_what_training_sees(name):
    model = build(CONFIGS[name])
    images = (images_for(model, 2) * 255).round() / 255
    seen = []
    model.encoder.register_forward_pre_hook(lambda module, arguments: seen.append((arguments[0] + 1) / 2))
    model.encode(images)
    drawn = torch.stack([model.likelihood.observe(images, Key(i)) for i in range(2000)]).double()
    # Bernoulli draws have a standard deviation of 1/2 at most, the mean of 2000 of 0.011; 128 pixels beyond 5 of these:
    # with probability below 1e-4.
    torch.testing.assert_close(seen[0].double(), drawn.mean(0), rtol=0, atol=0.056)
    if name == "samples":
        assert torch.equal(seen[0], drawn[0].float())


def test_gray_images_have_no_bernoulli_bound():
    model = build(VAEConfig(hidden_sizes=(8,), latent_size=2, binarize="none"))
    with pytest.raises(ValueError, match="needs binary images, but the images are gray: set binarize=stochastic"):
        bound(model, images_for(model), Key(0))
    bound(model, images_for(model).round(), Key(0))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.encode(torch.zeros(2, 1, 8, 9)), ValueError, r"images must be of shape \(B, 1, 8, 8\), got \(2, "),
        (lambda m: m.decode(torch.zeros(2, 5)), ValueError, r"latents must be of shape \(B, 4\), got \(2, 5\)"),
        (lambda m: m.sample(2, Key(0), {"label": torch.zeros(2)}), ValueError, "'label': this model takes none"),
        (lambda m: m.sample(2, Key(0), sampling=SamplingConfig()), TypeError, "sampling must be None, got Sampling"),
        (lambda m: bound(m, torch.zeros(2, 1, 8, 8), Key(0), 0), ValueError, "at least 1, got 0"),
        (lambda m: bound(m, torch.zeros(2, 1, 8, 8), Key(0), 2.0), TypeError, "must be an int"),
        (lambda m: bound(m, torch.zeros(8, 8), Key(0)), ValueError, "images must be of shape"),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call(build(CONFIGS["mlp"]))


def test_config_faults():
    deep = VAEConfig(network="conv", hidden_sizes=(8, 8, 8, 8))
    assert list(deep.faults_with(DataSpec((3, 16, 8)))) == [
        "hidden_sizes: must have at most 3 levels for images of 8 pixels, was 4"
    ]
    assert list(deep.faults_with(DataSpec((3, 16, 16)))) == []
    with pytest.raises(ConfigError) as info:
        VAEConfig(hidden_sizes=(64, 10**12), latent_size=10**12)
    assert info.value.faults == [
        f"{name}: must be <= 65536, was {10**12}" for name in ("hidden_sizes[1]", "latent_size")
    ]
    with pytest.raises(ConfigError, match="must not be empty for network='conv'"):
        VAEConfig(network="conv", hidden_sizes=())
    config = VAEConfig.from_settings({"likelihood": "gaussian", "optimizer.lr": "1e-4", "hidden_sizes": "64,32"})
    assert VAEConfig.from_dict(config.to_dict()) == config


def test_beta_vae_is_a_preset():
    assert beta_vae.preset_of == plugin.name == "vae"
    assert beta_vae.config_of({"latent_size": 3}) == VAEConfig(latent_size=3, beta=4.0)
    assert beta_vae.config_of({"beta": 2}).beta == 2
    assert isinstance(beta_vae.build(beta_vae.config_of({}), SPEC), VAE)


def test_a_data_set_with_classes_changes_nothing():
    """It has no use for classes, and refuses to be asked for one."""
    spec = DataSpec((1, 8, 8), (Condition("label", "class", ("a", "b")),))
    model, plain = build(CONFIGS["mlp"], spec), build(CONFIGS["mlp"])
    assert torch.equal(model.sample(3, Key(0)), plain.sample(3, Key(0)))
    labelled = Batch(images_for(model), {"label": torch.zeros(6, dtype=torch.int64)})
    assert torch.equal(model.log_likelihood_bound(labelled, Key(0)), bound(plain, labelled.images, Key(0)))
    with pytest.raises(ValueError, match="conditions must not hold 'label': this model takes none"):
        model.sample(3, Key(0), labelled.part(0, 3).conditions)


def test_learns_digits():
    assert plugin.config is VAEConfig
    train, test = load_digits(None, "train"), load_digits(None, "test")
    model = plugin.build(VAEConfig(hidden_sizes=(128,), latent_size=12), train.spec)
    (phase,) = model.phases()
    adam = torch.optim.Adam(phase.optimizer.parameters, lr=3e-3)
    for step in range(200):
        indices = torch.arange(step * 128, step * 128 + 128) % len(train)
        loss = phase.loss(Step(train.batch(indices), Key(0).fold_in(step)))
        adam.zero_grad()
        loss.value.backward()
        adam.step()
    images = test.batch(torch.arange(len(test))).images
    bounds = [bound(model, images, Key(0), k).mean().item() for k in (1, 50)]
    # A model of independent pixels has -34.7 nats on these images.
    assert bounds[0] > -28
    assert bounds[0] < bounds[1]


@pytest.mark.slow
@pytest.mark.skipif("GENCORE_DATA" not in os.environ, reason="GENCORE_DATA is not set: no MNIST files")
def test_bound_of_binarized_mnist(one_thread, tmp_path):
    """With the settings of docs/training.md and a quarter of the steps, whose run reached 91.9 and 89.2 nats."""
    pytest.importorskip("safetensors")
    from gencore.train import AverageConfig, TrainConfig, Trainer, load

    train, test = load_mnist(None, "train"), load_mnist(None, "test")
    settings = TrainConfig(steps=5000, average=AverageConfig(0.999), schedule="cosine")
    Trainer(plugin, VAEConfig(), train, settings, tmp_path, data_name="mnist", device="cpu", progress=False).fit()
    model = load(tmp_path, device="cpu")
    # The mean over 2000 images has a standard error of 0.6 nats; the bounds are of the same images, and 3 nats apart.
    one, fifty = (-likelihood_bound(model, test, Key(0), num_samples=k, limit=2000).nats for k in (1, 50))
    assert fifty < one <= 100
