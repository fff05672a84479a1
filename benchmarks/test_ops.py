"""Every benchmark of the suite, and what a call of each op costs, under pytest-benchmark."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from gencore import Key, diffusion, ops
from gencore.backends import choice
from gencore.bench import plain
from gencore.bench.limits import Work
from gencore.bench.measure import interleave
from gencore.bench.suite.base import Comparison

KEY, SCHEDULE = Key(0), diffusion.linear()
STEP = ops.step_coefficients(x=0.5, direct=0.5)
# The arguments of each op for one sample x of four elements, whose step is t.
CALLS: dict[str, Callable[[Tensor, Tensor], dict[str, Any]]] = {
    "normal": lambda x, t: {"shape": x.shape, "key": KEY, "out": x},
    "uniform": lambda x, t: {"shape": x.shape, "key": KEY, "out": x},
    "reparameterize": lambda x, t: {"mu": x, "logvar": x, "key": KEY},
    "reparameterize_kl": lambda x, t: {"mu": x, "logvar": x, "key": KEY},
    "add_noise": lambda x, t: {"x0": x, "t": t, "schedule": SCHEDULE, "key": KEY},
    "denoising_loss": lambda x, t: {"model_output": x, "x0": x, "t": t, "schedule": SCHEDULE, "noise": x},
    "variational_bound": lambda x, t: {"model_output": x, "x0": x, "t": t, "schedule": SCHEDULE, "noise": x},
    "diffusion_step": lambda x, t: {"x": x, "output": x, "coefficients": STEP, "key": KEY},
    "group_norm": lambda x, t: {"x": x, "num_groups": 1},
    "bias_act": lambda x, t: {"x": x, "bias": x[0], "activation": "leaky_relu"},
    "attention": lambda x, t: dict.fromkeys("qkv", x.view(1, 1, 1, 4)),
    "spatial_attention": lambda x, t: {"qkv": x[:, :3, None], "num_heads": 1},
    **dict.fromkeys(
        ("upfirdn2d", "upsample2d", "downsample2d", "filter2d"),
        lambda x, t: {"x": x.view(1, 1, 2, 2), "filter": x.view(2, 2)},
    ),
}


def test_op(task, compare):
    compare(task)


@pytest.mark.parametrize("name", plain.NAMES)
def test_call_overhead(name, device, compare, request):
    """What a call costs over the compiled kernel, which is called with its addresses ready."""
    arguments = CALLS[name](torch.rand(1, 4, device=device), torch.zeros(1, dtype=torch.int64, device=device))
    if device != request.config.getoption("device"):
        pytest.skip("the emulator wants to be told of every address before a call")
    op = getattr(ops, name)

    def ours() -> Any:
        return op(**arguments)

    calls, floor = {"ours": ours}, 0.0
    with launches(torch.device(device)) as (made, held):
        held.append(ours())
    if made:
        (calls["kernel alone"],) = made
        floor = interleave({"kernel": calls["kernel alone"]})["kernel"].median
    calls["eager"] = functools.partial(getattr(plain, name), **arguments)
    # What the host takes: nobody waits for the GPU.
    compare.run(Comparison(calls, Work(), clock="cpu"), (floor, "the kernel alone"))
    del held


@contextmanager
def launches(device: torch.device) -> Iterator[tuple[list[Callable[[], Any]], list[Any]]]:
    """The calls of the compiled module meanwhile, none where Triton serves the device, and the workspaces they use."""
    made: list[Callable[[], Any]] = []
    held: list[Any] = []
    name = choice.choose(device)
    if name == "triton":
        yield made, held
        return
    backend = choice.load(name)
    module, workspace = backend._module, backend._workspace

    class Recorder:
        def __getattr__(self, name: str) -> Callable[..., Any]:
            function = getattr(module, name)

            def launched(*args: Any, **kwargs: Any) -> Any:
                if not name.endswith("_workspace"):
                    made.append(functools.partial(function, *args, **kwargs))
                return function(*args, **kwargs)

            return launched

    def kept(*args: Any) -> tuple[Tensor, ...]:
        found = workspace(*args)
        held.extend(found)
        return found

    with mock.patch.multiple(backend, _module=Recorder(), _workspace=kept):
        yield made, held
