"""Runs diffusers' schedulers beside our samplers: the same model, the same noise, in float32 or all in float64."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from gencore import Key, ops
from gencore.diffusion import Sampler

SHAPE = (3, 2, 4, 4)


class _Wide:
    """torch or NumPy whose float32 is float64."""

    def __init__(self, module: Any):
        self._module = module
        self.float32 = module.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@contextmanager
def in_float64(scheduler: type) -> Iterator[None]:
    """Makes a class of diffusers compute its tables and steps in float64, by its own formulas.

    It says float32 wherever it makes a table or a step. Its module finds float64 under that name here, and float64 is
    torch's default type. Nothing else of it is changed.
    """
    module = sys.modules[scheduler.__module__]
    names = {"torch": _Wide(torch), "np": _Wide(np)}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch.multiple(module, **{name: wide for name, wide in names.items() if hasattr(module, name)}):
            yield
    finally:
        torch.set_default_dtype(before)


def model(x: Tensor, t: Tensor) -> Tensor:
    """Not linear in x, different at every time and channel, and never far from 1."""
    place = torch.linspace(-1, 1, x[0].numel(), dtype=x.dtype).reshape(x.shape[1:])
    time = t.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1)) / 300
    return 0.8 * torch.tanh(0.4 * x + place + torch.sin(time))


def doubled(x: Tensor, t: Tensor) -> Tensor:
    """A model that also says how large the noise is."""
    return torch.cat((model(x, t), torch.sin(3 * x) * 0.9), dim=1)


def trajectory(
    scheduler: Any,
    sampler: Sampler,
    key: Key,
    first: Tensor,
    called: Callable[[Tensor, Tensor], Tensor],
    *,
    scaled: bool = False,
    **options: Any,
) -> list[Tensor]:
    """The states of diffusers' scheduler, whose timesteps were set, from ``first`` with the noise of our streams.

    With ``scaled``, the scheduler keeps x / alpha, as for EDM: ``first`` and the states returned are multiplied with
    our alpha.
    """
    module = sys.modules[type(scheduler).__module__]
    alphas = sampler.levels[:, 0].tolist()
    assert len(scheduler.timesteps) == len(sampler)
    x = first / alphas[0] if scaled else first
    states = [first]
    for call, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t) if scaled else x
        output = called(seen, sampler.times[call].to(torch.float32).expand(len(x)))
        noise = ops.normal(first.shape, key.stream(sampler.streams[call]), dtype=first.dtype)

        def ours(*_: Any, noise: Tensor = noise, **__: Any) -> Tensor:
            return noise

        with mock.patch.object(module, "randn_tensor", ours, create=True):
            x = scheduler.step(output, t, x, **options).prev_sample
        states.append(x * alphas[call + 1] if scaled else x)
    return states


def far(ours: Tensor, theirs: list[Tensor]) -> float:
    """The largest difference of a state of two trajectories, relative to that state's largest value."""
    assert len(ours) == len(theirs)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True))
