"""Optimisers as models name them: which parameters descend, and with which settings. The trainer makes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from gencore.config import Config, field


@dataclass(frozen=True)
class OptimizerConfig(Config):
    """Settings of an optimiser of PyTorch's kind. A model may define its own::

        @dataclass(frozen=True)
        class NAdam(OptimizerConfig):
            kind = torch.optim.NAdam
            momentum_decay: float = field(4e-3, ge=0)

    The fields are the arguments of ``kind``, unless :meth:`arguments` says otherwise.
    """

    kind: ClassVar[type[torch.optim.Optimizer]]

    lr: float = field(1e-3, gt=0, doc="learning rate")

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of ``kind``."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


@dataclass(frozen=True)
class Adam(OptimizerConfig):
    """Adam (Kingma and Ba 2015) with decoupled weight decay (Loshchilov and Hutter 2019)."""

    kind = torch.optim.AdamW

    beta1: float = field(0.9, ge=0, lt=1)
    beta2: float = field(0.999, ge=0, lt=1)
    eps: float = field(1e-8, gt=0)
    weight_decay: float = field(0.0, ge=0)

    def arguments(self) -> dict[str, Any]:
        betas = (self.beta1, self.beta2)
        return {"lr": self.lr, "betas": betas, "eps": self.eps, "weight_decay": self.weight_decay}


@dataclass(frozen=True)
class RMSprop(OptimizerConfig):
    """RMSprop (Hinton 2012)."""

    kind = torch.optim.RMSprop

    alpha: float = field(0.99, ge=0, lt=1, doc="decay of the mean square")
    eps: float = field(1e-8, gt=0)
    momentum: float = field(0.0, ge=0, lt=1)
    weight_decay: float = field(0.0, ge=0)


@dataclass(frozen=True)
class SGD(OptimizerConfig):
    """Stochastic gradient descent, with or without momentum."""

    kind = torch.optim.SGD

    momentum: float = field(0.0, ge=0, lt=1)
    nesterov: bool = field(False, doc="look ahead by the momentum (Sutskever et al. 2013)")
    weight_decay: float = field(0.0, ge=0)

    def check(self) -> Iterable[str]:
        if self.nesterov and not self.momentum:
            yield "nesterov: must be false without momentum"


class Group(NamedTuple):
    """Parameters with settings of their own."""

    parameters: tuple[nn.Parameter, ...]
    settings: OptimizerConfig


class Optimizer:
    """Parameters and how they descend. Phases that are given the same object share its state, such as Adam's moments.

    Args:
        parameters: what descends, of each parameter once; or groups, pairs of parameters and their settings.
        settings: of all parameters that are given without any.

    Raises:
        TypeError: what are neither parameters nor pairs of parameters and settings.
        ValueError: no parameter, one of them twice, or groups whose settings are of two kinds.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | Iterable[tuple[Iterable[nn.Parameter], OptimizerConfig]],
        settings: OptimizerConfig | None = None,
    ):
        # Of a generator, such as ``model.parameters()``, nothing would be left for the second who looks.
        given: list[Any] = list(parameters)
        pairs = given if all(isinstance(each, tuple) for each in given) else [(given, settings or Adam())]
        groups = [_group(*pair) for pair in pairs]
        self.groups = tuple(group for group in groups if group.parameters)
        if not self.groups:
            raise ValueError("parameters must not be empty")
        if len({id(parameter) for parameter in self.parameters}) < len(self.parameters):
            raise ValueError("parameters must be different, and one is there twice")
        kinds = {type(group.settings) for group in self.groups}
        if len(kinds) > 1:
            raise ValueError(f"settings must be of one kind, got {', '.join(sorted(k.__name__ for k in kinds))}")

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Those of all groups, in their order."""
        return tuple(parameter for group in self.groups for parameter in group.parameters)


def _group(parameters: Iterable[nn.Parameter], settings: OptimizerConfig) -> Group:
    group = Group(tuple(parameters), settings)
    for parameter in group.parameters:
        if not isinstance(parameter, nn.Parameter):
            raise TypeError(f"parameters must be torch.nn.Parameter, got {type(parameter).__name__}")
    if not isinstance(settings, OptimizerConfig):
        raise TypeError(f"settings must be an OptimizerConfig, such as Adam, got {type(settings).__name__}")
    return group
