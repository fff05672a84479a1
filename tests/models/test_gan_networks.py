import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

from gencore import Key, ops
from gencore.models.gan.config import GANConfig
from gencore.models.gan.networks.levels import halvings, size_fault
from gencore.models.gan.networks.resnet import ResNetDiscriminator, ResNetGenerator
from gencore.models.gan.penalties import squared_gradient
from gencore.models.gan.players import Discriminator, Generator

NETWORKS = ("mlp", "dcgan", "resnet", "r3gan")


def config_of(network, **settings):
    norms = {"generator_norm": "none", "discriminator_norm": "none"} if network == "r3gan" else {}
    small = {"generator_channels": (8, 16), "discriminator_channels": (8, 16), "latent_size": 6}
    sizes = {"generator_sizes": (9,), "discriminator_sizes": (9, 7)}
    return GANConfig(**{"network": network, **small, **sizes, **norms, "embedding_size": 3, **settings})


def players(network, shape, conditioning="none", classes=0, seed=0, **settings):
    torch.manual_seed(seed)
    config = config_of(network, **settings)
    return Generator(config, shape, conditioning, classes), Discriminator(config, shape, conditioning, classes)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (2, 24, 40)])
def test_shapes(network, shape):
    generator, discriminator = players(network, shape)
    images = generator(ops.normal((2, 6), Key(0)))
    assert images.shape == (2, *shape)
    assert images.abs().max() <= 1
    assert images.dtype == torch.float32
    assert discriminator(images).shape == (2,)


@pytest.mark.parametrize(
    ("side", "times"), [(8, 1), (14, 1), (16, 2), (28, 2), (32, 3), (48, 3), (64, 4), (96, 4), (256, 6)]
)
def test_images_are_halved_until_few_pixels_are_left(side, times):
    assert halvings(side, side) == times
    assert 4 <= side >> times <= 7
    assert halvings(side, 2 * side) == halvings(2 * side, side) == times


def test_other_sizes_cannot_be_halved():
    assert [halvings(*size) for size in ((30, 30), (7, 7), (4, 4), (32, 36), (15, 16))] == [None] * 5


def test_other_sizes_are_refused_with_those_that_would_do():
    assert size_fault("dcgan", 32, 64) is None
    assert "such as 28x28 or 32x32 pixels, but the data set's are 30x30" in size_fault("dcgan", 30, 30)
    assert "such as 8x8 pixels, but" in size_fault("dcgan", 5, 5)
    with pytest.raises(ValueError, match="such as 32x32 or 40x40"):
        players("resnet", (1, 33, 36))


def test_dcgan_follows_the_guidelines():
    config = config_of("dcgan", generator_norm="batch", discriminator_norm="batch", r1=0.0)
    generator = Generator(config, (3, 32, 32), "none", 0).body
    discriminator = Discriminator(config, (3, 32, 32), "none", 0).body
    kinds = [type(module) for player in (generator, discriminator) for module in player.modules()]
    assert not any("Pool" in kind.__name__ or "Upsample" in kind.__name__ for kind in kinds)
    strided = [m for m in generator.modules() if isinstance(m, torch.nn.ConvTranspose2d)]
    strided += [m for m in discriminator.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(strided) == 6
    assert {module.stride for module in strided} == {(2, 2)}
    assert kinds.count(torch.nn.Linear) == 1  # the projection; none is hidden
    # Behind all layers but the generator's last and the discriminator's first, which alone have biases.
    assert kinds.count(torch.nn.BatchNorm2d) == 3 + 2
    assert [module.bias is not None for module in strided] == [False, False, True, True, False, False]
    weights = torch.cat([module.weight.flatten() for module in strided])
    assert weights.std().item() == pytest.approx(0.02, rel=0.02)


def test_a_resnet_is_that_of_the_tables():
    """By the papers' order, in which the shortcut convolves what was doubled or not yet pooled."""
    torch.manual_seed(0)
    config = config_of("resnet")
    generator = Generator(config, (1, 16, 16), "none", 0).body
    assert isinstance(generator, ResNetGenerator)
    hidden = ops.normal((2, 16, 4, 4), Key(0))
    block = generator.blocks[0]
    up = F.interpolate(F.relu(block.norm1(hidden)), scale_factor=2)
    expected = block.conv2(F.relu(block.norm2(block.conv1(up)))) + block.shortcut(F.interpolate(hidden, scale_factor=2))
    torch.testing.assert_close(block(hidden, None), expected)
    discriminator = Discriminator(config, (1, 16, 16), "none", 0).body
    assert isinstance(discriminator, ResNetDiscriminator)
    first, second, last = discriminator.blocks
    images = ops.normal((2, 1, 16, 16), Key(1))
    pooled = F.avg_pool2d(first.conv2(F.relu(first.conv1(images))), 2) + first.shortcut(F.avg_pool2d(images, 2))
    torch.testing.assert_close(first(images), pooled)
    hidden = second.conv2(F.relu(second.conv1(F.relu(pooled)))) + second.shortcut(pooled)
    torch.testing.assert_close(second(pooled), hidden)
    torch.testing.assert_close(last(hidden), hidden + last.conv2(F.relu(last.conv1(F.relu(hidden)))))
    torch.testing.assert_close(discriminator(images), F.relu(last(hidden)).sum((2, 3)))


def test_r3gan_begins_as_the_network_without_its_branches_and_normalizes_nothing():
    for player in players("r3gan", (1, 32, 32), blocks_per_level=3):
        kinds = {type(module).__name__ for module in player.modules()}
        assert not any("Norm" in kind and kind != "Norm" for kind in kinds)
        x = ops.normal((4, 6), Key(0)) if isinstance(player, Generator) else ops.normal((4, 1, 32, 32), Key(0))
        whole = player(x)
        for level in player.body.levels:
            for i in range(len(level)):
                assert level[i].grouped.groups == level[i].grouped.in_channels // 16
                level[i] = torch.nn.Identity()
        assert torch.equal(player(x), whole)


def test_r3gans_signal_keeps_its_size_through_the_generator():
    generator = players("r3gan", (3, 64, 64), latent_size=64, generator_channels=(32, 64))[0].body
    std = generator(ops.normal((64, 64), Key(0))).std().item()
    assert 0.4 < std < 1.2  # bilinear doubling takes a little each time


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("conditioning", ["embedding", "projection"])
def test_both_players_are_told_the_class(network, conditioning):
    norms = {} if network == "r3gan" else {"generator_norm": "batch"}
    generator, discriminator = players(network, (1, 16, 16), conditioning, 3, **norms)
    with torch.no_grad():
        for parameter in (*generator.parameters(), *discriminator.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    latents, labels = ops.normal((3, 6), Key(0)), torch.arange(3)
    images = generator.eval()(latents, labels)
    assert not torch.allclose(generator(latents, labels.flip(0))[[0, 2]], images[[0, 2]], atol=1e-4)
    torch.testing.assert_close(generator(latents, labels.flip(0))[1], images[1])
    output = discriminator(images, labels)
    assert not torch.allclose(discriminator(images, labels.flip(0))[[0, 2]], output[[0, 2]], atol=1e-5)


def test_projection_is_an_inner_product_with_the_features():
    _, discriminator = players("dcgan", (1, 16, 16), "projection", 3)
    images, labels = ops.normal((3, 1, 16, 16), Key(0)), torch.tensor([2, 0, 1])
    features = discriminator.body(images)
    expected = (features * (discriminator.head.weight + discriminator.projection.weight[labels])).sum(1)
    torch.testing.assert_close(discriminator(images, labels), expected + discriminator.head.bias)


def test_projection_goes_to_batch_norms_where_there_are_some():
    for network, norm, in_norms in (("dcgan", "batch", True), ("resnet", "batch", True), ("resnet", "layer", False)):
        generator = players(network, (1, 16, 16), "projection", 3, generator_norm=norm)[0]
        assert (generator.labels is None) == in_norms


@pytest.mark.parametrize("network", ["mlp", "dcgan"])
def test_dropout_is_a_function_of_the_key(network):
    _, discriminator = players(network, (1, 8, 8), dropout=0.3)
    images = ops.normal((6, 1, 8, 8), Key(5))
    logits = discriminator(images, key=Key(0))
    assert torch.equal(logits, discriminator(images, key=Key(0)))
    torch.testing.assert_close(logits[2:], discriminator(images[2:], key=Key(0).samples(2)))
    assert not torch.allclose(logits, discriminator(images, key=Key(1)))
    assert not torch.allclose(logits, discriminator(images))
    assert torch.equal(discriminator.eval()(images, key=Key(0)), discriminator(images))
    streams = [dropout.stream for dropout in discriminator.body.dropouts]
    assert streams == list(range(len(streams)))


@pytest.mark.parametrize(
    ("network", "settings"),
    [
        ("mlp", {"discriminator_norm": "layer"}),
        ("dcgan", {"discriminator_norm": "layer"}),
        ("resnet", {"discriminator_norm": "layer"}),
        ("resnet", {"spectral_norm": True}),
        ("r3gan", {}),
    ],
)
def test_the_penalty_has_the_derivative_that_finite_differences_have(network, settings):
    """In float64, along a random direction in the space of all weights."""
    _, discriminator = players(network, (1, 8, 8), **settings)
    discriminator = discriminator.double().eval()
    for module in discriminator.modules():
        if hasattr(module, "iterations"):
            module.iterations = 500  # sigma's derivative is exact where the power iteration has arrived
    images = ops.normal((3, 1, 8, 8), Key(5), dtype=torch.float64)
    torch.manual_seed(1)
    weights = {
        name: (p.detach() + 0.1 * torch.randn_like(p)).requires_grad_() for name, p in discriminator.named_parameters()
    }
    direction = {name: torch.randn_like(p) for name, p in weights.items()}

    def penalty(step):
        x = images.clone().requires_grad_()
        moved = {name: p + step * direction[name] for name, p in weights.items()}
        (gradient,) = torch.autograd.grad(
            functional_call(discriminator, moved, (x,)).double().sum(), x, create_graph=True
        )
        return gradient.square().flatten(1).sum(1).mean(), x, moved

    value, *_ = penalty(0.0)
    gradients = torch.autograd.grad(value, weights.values(), allow_unused=True)
    ours = sum((g * direction[name]).sum().item() for name, g in zip(weights, gradients, strict=True) if g is not None)
    theirs = (penalty(1e-6)[0] - penalty(-1e-6)[0]).item() / 2e-6
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert abs(ours) > 1e-3
    x = images.clone().requires_grad_()
    ours = squared_gradient(functional_call(discriminator, weights, (x,)), x).mean().item()
    assert ours == pytest.approx(value.item(), rel=1e-4)
