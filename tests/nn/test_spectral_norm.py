"""Spectral norm that is right over several forwards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from gencore.nn import spectral_norm

BUFFERS = ("u", "v", "seen")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def original(layer):
    return layer.parametrizations.weight.original


def buffers(layer):
    return {name: getattr(layer.parametrizations.weight[0], name).clone() for name in BUFFERS}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def change(layer, factor=1.01):
    """An update that PyTorch's version counter does not see, like those of fused optimisers."""
    original(layer).data.mul_(factor)


def train(layer, x, optimizer, steps=1):
    """Steps with two forwards each, as a discriminator's are."""
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(x).square().mean() - layer(-2 * x).sum()).backward()
        optimizer.step()


LAYERS = {
    "linear": lambda: nn.Linear(12, 20),
    "conv": lambda: nn.Conv2d(6, 9, 3),
    "channels_last": lambda: nn.Conv2d(6, 9, 3).to(memory_format=torch.channels_last),
    "transposed": lambda: nn.ConvTranspose2d(6, 9, 4),
    "embedding": lambda: nn.Embedding(10, 7),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_sigma_becomes_the_largest_singular_value(kind):
    layer = spectral_norm(LAYERS[kind]().double())
    for _ in range(1000):
        change(layer, 1.001)
        found = layer.weight
    weight = original(layer).detach()
    matrix = (weight.transpose(0, 1) if kind == "transposed" else weight).flatten(1)
    # The error falls by (s2 / s1)^4 a step, which is at most 0.98 for these matrices.
    first, second = torch.linalg.svdvals(matrix)[:2]
    assert (second / first) ** 4 < 0.98
    torch.testing.assert_close(found, weight / first, rtol=2e-8, atol=0)  # 0.98^1000 = 1.7e-9


def test_every_forward_of_one_weight_has_the_same_sigma():
    layer = spectral_norm(nn.Conv2d(4, 8, 3))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05, fused=True)
    x = torch.randn(2, 4, 6, 6)
    previous = None
    for _ in range(3):
        train(layer, x, optimizer)
        fixed = buffers(layer)
        evaluated = layer.eval()(x)
        assert same(buffers(layer), fixed)  # evaluation mode stores nothing
        first = layer.train()(x)
        advanced = buffers(layer)
        assert not same(advanced, fixed)  # the optimiser's step was seen, though it is fused
        with torch.no_grad():
            second = layer(x)
        assert torch.equal(first, second)
        assert torch.equal(first, evaluated)
        assert torch.equal(first, layer.eval()(x))
        assert same(buffers(layer), advanced)
        layer.train()
        assert previous is None or not torch.equal(previous, first)
        previous = first


def test_a_backward_after_the_vectors_went_on_is_that_of_its_own_forward():
    layer, twin = (spectral_norm(nn.Linear(5, 7)) for _ in range(2))
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(3, 5)
    (want,) = torch.autograd.grad(twin(x).square().sum(), original(twin))
    loss = layer(x).square().sum()
    spectral_norm_of = layer.parametrizations.weight[0]
    for name in BUFFERS:  # what a later forward, a checkpoint or DDP's broadcast writes
        getattr(spectral_norm_of, name).fill_(1)
    (found,) = torch.autograd.grad(loss, original(layer))
    assert torch.equal(found, want)
    evaluated = twin.eval()(x).square().sum()
    twin.parametrizations.weight[0].u.fill_(1)
    (found,) = torch.autograd.grad(evaluated, original(twin))
    assert torch.equal(found, want)


def test_derivatives_are_those_with_constant_vectors():
    layer = spectral_norm(nn.Conv2d(3, 4, 2).double())
    layer(torch.randn(1, 3, 4, 4, dtype=torch.float64))
    u, v = buffers(layer)["u"], buffers(layer)["v"]

    def formula(weight):
        return weight / (u @ weight.flatten(1) @ v)

    def derivatives(divided, weight):
        factor = torch.linspace(-1, 2, weight.numel(), dtype=weight.dtype).view_as(weight)
        (first,) = torch.autograd.grad((divided.sin() * factor).sum(), weight, create_graph=True)
        return first, *torch.autograd.grad((first * factor).square().sum(), weight)

    weight = original(layer)
    for found, want in zip(derivatives(layer.weight, weight), derivatives(formula(weight), weight), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    change(layer, 1.0)
    assert torch.autograd.gradcheck(formula, weight)


def test_a_gradient_penalty_goes_through():
    net = nn.Sequential(spectral_norm(nn.Conv2d(1, 4, 3)), nn.Softplus(), nn.Flatten(), spectral_norm(nn.Linear(64, 1)))
    x = torch.randn(2, 1, 6, 6, requires_grad=True)
    (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    slope.square().sum().backward()
    for layer in (net[0], net[3]):
        gradient = original(layer).grad
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("forward_first", [False, True], ids=["after the step", "amid a step"])
def test_a_resumed_training_is_the_same_bit_for_bit(forward_first):
    x = torch.randn(4, 5)
    layer, resumed = spectral_norm(nn.Linear(5, 7)), spectral_norm(nn.Linear(5, 7))
    optimizer, other = (torch.optim.SGD(each.parameters(), lr=0.1) for each in (layer, resumed))
    train(layer, x, optimizer, 3)
    if forward_first:
        layer(x)
    resumed.load_state_dict(copy.deepcopy(layer.state_dict()))
    train(layer, x, optimizer, 3)
    train(resumed, x, other, 3)
    assert same(layer.state_dict(), resumed.state_dict())


def test_copies_stand_by_themselves():
    layer, x = spectral_norm(nn.Linear(5, 7)), torch.randn(4, 5)
    layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    kept = buffers(layer)
    original(twin).data.normal_()
    twin(x)
    assert same(buffers(layer), kept)
    assert torch.equal(torch.func.functional_call(twin, twin.state_dict(), (x,)), twin(x))


def test_a_moving_average_is_divided_by_its_own_sigma():
    layer, x = spectral_norm(nn.Linear(8, 8)), torch.randn(4, 8)
    average = torch.optim.swa_utils.AveragedModel(
        layer, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=False
    )
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    for _ in range(30):
        train(layer, x, optimizer)
        average.update_parameters(layer)
    sigma = torch.linalg.matrix_norm(average.module.eval().weight, 2)
    assert 1 <= sigma < 1.02  # sigma is at most the largest singular value, and near it after 30 steps


def test_ddp_broadcasts_between_two_forwards(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        layer = spectral_norm(nn.Linear(5, 7))
        twin, x = copy.deepcopy(layer), torch.randn(4, 5)
        ddp = nn.parallel.DistributedDataParallel(layer)
        train(ddp, x, torch.optim.SGD(layer.parameters(), lr=0.1), 3)
    finally:
        torch.distributed.destroy_process_group()
    train(twin, x, torch.optim.SGD(twin.parameters(), lr=0.1), 3)
    assert same(layer.state_dict(), twin.state_dict())


def test_it_compiles_to_one_graph():
    layer, x = spectral_norm(nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 5, 5)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    train(compiled, x, torch.optim.SGD(layer.parameters(), lr=0.1), 3)
    train(twin, x, torch.optim.SGD(twin.parameters(), lr=0.1), 3)
    # Fused arithmetic rounds otherwise, a few units in the last place of each of three steps.
    for name in BUFFERS[:2]:
        torch.testing.assert_close(buffers(layer)[name], buffers(twin)[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer(x), twin(x), rtol=1e-5, atol=1e-5)
    fixed = buffers(layer)
    compiled(x)
    assert same(buffers(layer), fixed)


def test_half_precision():
    layer, x = spectral_norm(nn.Linear(16, 16)), torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
        assert found.dtype == torch.bfloat16
        assert layer.weight.dtype == torch.float32
        weight = layer.weight
    assert torch.equal(layer.weight, weight)
    for dtype in (torch.bfloat16, torch.float16):
        half = spectral_norm(nn.Linear(16, 16)).to(dtype)
        for _ in range(100):
            change(half)
            first = half.weight
        assert first.dtype == dtype
        assert torch.equal(half.weight, first)
        assert torch.equal(half.eval().weight, first)
        # The vectors are rounded to half precision, of which the singular value has the square.
        assert torch.linalg.matrix_norm(first.detach().float(), 2) == pytest.approx(1, abs=torch.finfo(dtype).eps)


def test_a_weight_of_zeros_can_be_trained():
    layer = spectral_norm(nn.Linear(5, 7))
    nn.init.zeros_(original(layer))
    x = torch.randn(4, 5)
    (gradient,) = torch.autograd.grad((layer(x) - layer.bias).sum(), original(layer))
    assert torch.equal(layer(x), layer.bias.expand(4, 7))
    assert torch.equal(gradient, x.sum(0).expand(7, 5))  # that of the undivided weight
    nn.init.normal_(original(layer))
    for _ in range(100):
        change(layer)
        weight = layer.weight
    torch.testing.assert_close(torch.linalg.matrix_norm(weight, 2), torch.tensor(1.0), rtol=1e-4, atol=0)


def test_it_is_undone_and_set():
    layer = spectral_norm(nn.Linear(5, 7))
    layer.weight = torch.ones(7, 5)
    assert torch.equal(original(layer), torch.ones(7, 5))
    torch.testing.assert_close(layer.weight, torch.ones(7, 5) / 35**0.5)
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    assert type(layer) is nn.Linear
    assert torch.equal(layer.weight, torch.ones(7, 5))


def test_more_iterations_are_nearer():
    errors = []
    for iterations in (1, 20):
        torch.manual_seed(3)
        layer = spectral_norm(nn.Linear(30, 30), iterations=iterations)
        original(layer).data.normal_()
        errors.append(torch.linalg.matrix_norm(layer.weight, 2).item() - 1)
    assert 0 <= errors[1] < errors[0] / 2


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        (("weight",), {}, TypeError, "module must be a torch.nn.Module, got str"),
        ((nn.Linear(2, 3), "w"), {}, ValueError, "name must be that of a weight of Linear, got 'w'"),
        ((nn.BatchNorm2d(4),), {}, ValueError, r"the weight must have two or more dimensions, got the shape \(4,\)"),
        ((nn.Linear(2, 3),), {"iterations": 0}, ValueError, "iterations must be at least 1, got 0"),
        ((nn.Linear(2, 3),), {"iterations": 1.5}, TypeError, "iterations must be an int, got float"),
        ((nn.Linear(2, 3),), {"eps": 0}, ValueError, "eps must be a finite number above 0, got 0"),
        ((nn.Linear(2, 3),), {"dim": 2}, ValueError, "dim must be one of the weight's 2 dimensions, got 2"),
        ((spectral_norm(nn.Linear(2, 3)),), {}, ValueError, "module must have no spectral norm yet"),
    ],
)
def test_says_what_is_wrong(args, options, error, message):
    with pytest.raises(error, match=message):
        spectral_norm(*args, **options)
