"""Optimisers as models name them: their settings, and the parameters that they move."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from gencore.config import ConfigError, field
from gencore.models import SGD, Adam, Optimizer, OptimizerConfig, RMSprop


@dataclass(frozen=True)
class NAdam(OptimizerConfig):
    """One that a plugin brings itself: the fields are the arguments."""

    kind = torch.optim.NAdam

    momentum_decay: float = field(4e-3, ge=0)


def parameters(*sizes):
    return [nn.Parameter(torch.ones(size)) for size in sizes]


def made(settings, of):
    return settings.kind(of, **settings.arguments())


@pytest.mark.parametrize(
    ("settings", "kind", "arguments"),
    [
        (
            Adam(lr=0.1, beta1=0.2, beta2=0.3, eps=0.4, weight_decay=0.5),
            torch.optim.AdamW,
            {"lr": 0.1, "betas": (0.2, 0.3), "eps": 0.4, "weight_decay": 0.5},
        ),
        (
            RMSprop(lr=0.1, alpha=0.2, eps=0.3, momentum=0.4, weight_decay=0.5),
            torch.optim.RMSprop,
            {"lr": 0.1, "alpha": 0.2, "eps": 0.3, "momentum": 0.4, "weight_decay": 0.5},
        ),
        (
            SGD(lr=0.1, momentum=0.2, nesterov=True, weight_decay=0.3),
            torch.optim.SGD,
            {"lr": 0.1, "momentum": 0.2, "nesterov": True, "weight_decay": 0.3},
        ),
        (NAdam(lr=0.1, momentum_decay=0.2), torch.optim.NAdam, {"lr": 0.1, "momentum_decay": 0.2}),
    ],
)
def test_settings_are_those_of_pytorchs_optimiser(settings, kind, arguments):
    optimizer = made(settings, parameters(2))
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    assert {name: group[name] for name in arguments} == arguments
    assert settings.arguments() == arguments
    # They are settings like any other: kept by runs, and named on the command line.
    assert type(settings).from_dict(settings.to_dict()) == settings
    assert type(settings).from_settings({"lr": "0.25"}).lr == 0.25
    assert "kind" not in type(settings).setting_names()


@pytest.mark.parametrize("kind", [Adam, RMSprop, SGD, NAdam])
def test_defaults_descend(kind):
    """All of them have defaults that PyTorch takes, and that bring a parabola down."""
    (parameter,) = parameters(3)
    optimizer = made(kind(), [parameter])
    for _ in range(5):
        optimizer.zero_grad()
        parameter.square().sum().backward()
        optimizer.step()
    assert (parameter < 1).all()


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda: Adam(lr=0), "lr: must be > 0, was 0.0"),
        (lambda: Adam(beta1=1), "beta1: must be < 1, was 1.0"),
        (lambda: Adam(beta2=-1), "beta2: must be >= 0, was -1.0"),
        (lambda: Adam(eps=0), "eps: must be > 0, was 0.0"),
        (lambda: Adam(weight_decay=-1), "weight_decay: must be >= 0, was -1.0"),
        (lambda: RMSprop(alpha=1), "alpha: must be < 1, was 1.0"),
        (lambda: RMSprop(momentum=1), "momentum: must be < 1, was 1.0"),
        (lambda: SGD(momentum=1), "momentum: must be < 1, was 1.0"),
        (lambda: SGD(nesterov=True), "nesterov: must be false without momentum"),
        (lambda: NAdam(momentum_decay=-1), "momentum_decay: must be >= 0, was -1.0"),
    ],
)
def test_faults_of_settings(make, fault):
    with pytest.raises(ConfigError) as info:
        make()
    assert info.value.faults == [fault]


def test_parameters_with_the_same_settings():
    model = nn.Linear(2, 3)
    # A generator, of which nothing is left for the second who looks.
    optimizer = Optimizer(model.parameters(), Adam(lr=0.1))
    assert optimizer.parameters == (model.weight, model.bias)
    assert optimizer.parameters == (model.weight, model.bias)
    (group,) = optimizer.groups
    assert group == ((model.weight, model.bias), Adam(lr=0.1))
    assert Optimizer(model.parameters()).groups[0].settings == Adam()


def test_groups_have_settings_of_their_own():
    a, b, c = parameters(1, 2, 3)
    optimizer = Optimizer([(iter([a, b]), SGD(lr=0.1)), ([c], SGD(lr=0.2, momentum=0.9))])
    assert [group.parameters for group in optimizer.groups] == [(a, b), (c,)]
    assert [group.settings.lr for group in optimizer.groups] == [0.1, 0.2]
    assert optimizer.parameters == (a, b, c)


def test_a_group_may_be_empty_but_not_all():
    """Such as the biases of a network without any."""
    (a,) = parameters(1)
    optimizer = Optimizer([([a], Adam()), ([], Adam(weight_decay=0.1))])
    assert len(optimizer.groups) == 1
    for nothing in ([], iter(()), [([], Adam())]):
        with pytest.raises(ValueError, match=r"^parameters must not be empty$"):
            Optimizer(nothing)


def test_a_parameter_descends_once():
    a, b = parameters(1, 1)
    for twice in ([a, b, a], [([a], Adam()), ([b, a], Adam())]):
        with pytest.raises(ValueError, match=r"^parameters must be different, and one is there twice$"):
            Optimizer(twice)


def test_groups_are_of_one_kind():
    a, b = parameters(1, 1)
    with pytest.raises(ValueError, match=r"^settings must be of one kind, got Adam, SGD$"):
        Optimizer([([a], SGD()), ([b], Adam())])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: Optimizer([torch.zeros(2)]), "parameters must be torch.nn.Parameter, got Tensor"),
        (lambda p: Optimizer([p, ([nn.Parameter(p)], Adam())]), "parameters must be torch.nn.Parameter, got tuple"),
        (lambda p: Optimizer([([torch.zeros(2)], Adam())]), "parameters must be torch.nn.Parameter, got Tensor"),
        (lambda p: Optimizer({"weight": p}), "parameters must be torch.nn.Parameter, got str"),
        (lambda p: Optimizer([p], 1e-3), "settings must be an OptimizerConfig, such as Adam, got float"),
        (lambda p: Optimizer([([p], None)]), "settings must be an OptimizerConfig, such as Adam, got NoneType"),
    ],
)
def test_refuses_what_are_no_parameters_or_settings(make, message):
    with pytest.raises(TypeError) as info:
        make(*parameters(2))
    assert str(info.value) == message
