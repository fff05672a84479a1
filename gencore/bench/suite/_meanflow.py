"""A training step of MeanFlow: a network's derivative in forward mode, and then the gradient for its weights.

The network u predicts the mean velocity between two times r <= t of a path z_t = (1 - t) x + t eps (Geng, Deng, Bai,
Kolter and He, "Mean Flows for One-step Generative Modeling" (2025), algorithm 1). What it is to be, with v = eps - x:

    target = v - (t - r) d/dt u(z, r, t),  the derivative along (v, 0, 1), and the loss |u - stopgrad(target)|^2

The time it is told is t - r alone, which is one of the paper's choices (table 1c).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gencore import nn as our_nn
from gencore import ops
from gencore.bench import peers
from gencore.bench.cases import NetworkCase
from gencore.bench.limits import Work
from gencore.bench.suite import networks
from gencore.bench.suite.base import HALF, Call, Comparison, largest_error
from gencore.nn.embedding import TimeEmbedding

# Networks of diffusion models count their time to so many.
_TIMES = 1000


class Block(nn.Module):
    """Of a diffusion transformer: attention and two linear layers, each told the time by scale, shift and gate."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(size, 6 * size)
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.wide, self.narrow = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        rows = self.modulation(F.silu(embedding)).unsqueeze(1).chunk(6, dim=2)
        q, k, v = self.qkv(_modulated(x, *rows[:2])).unflatten(2, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        x = x + rows[2] * self.out(ops.attention(q, k, v).transpose(1, 2).flatten(2))
        return x + rows[5] * self.narrow(F.gelu(self.wide(_modulated(x, *rows[3:5])), approximate="tanh"))


def _modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


class Transformer(nn.Module):
    """A small DiT (Peebles and Xie 2023): patches of 2 x 2 pixels as tokens."""

    def __init__(self, channels: int, size: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.side = size // 2
        self.embedding = TimeEmbedding(width, width)
        self.places = nn.Parameter(torch.randn(self.side**2, width) * 0.02)
        self.enter, self.leave = nn.Linear(4 * channels, width), nn.Linear(width, 4 * channels)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        embedding = self.embedding(t)
        tokens = self.enter(F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)) + self.places
        for block in self.blocks:
            tokens = block(tokens, embedding)
        return F.pixel_shuffle(self.leave(tokens).transpose(1, 2).unflatten(2, (self.side, self.side)), 2)


def _network(case: NetworkCase) -> nn.Module:
    if case.name == "transformer":
        width, depth, heads = (16, 1, 2) if case.small else (256, 6, 4)
        return Transformer(3, case.size, width, depth, heads)
    settings: dict[str, Any] = {"channels": (8, 16), "num_groups": 4} if case.small else {"channels": (64, 128, 128)}
    # Attention at the second level, as in the networks for CIFAR-10.
    return our_nn.UNet(in_channels=3, attention_levels=(1,), blocks_per_level=1, **settings)


def _loss(network: Callable[..., Tensor], z: Tensor, v: Tensor, r: Tensor, t: Tensor) -> Tensor:
    def u(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return network(z, _TIMES * (t - r))

    directions = v, torch.zeros_like(r), torch.ones_like(t)
    mean, change = torch.func.jvp(u, (z, r, t), directions)  # type: ignore[misc]
    target = v - (t - r)[:, None, None, None] * change
    return (mean - target.detach()).square().mean()


def _step(model: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype, is_plain: bool, compiles: bool) -> Call:
    """The loss and its gradient for every weight."""
    weights = list(model.parameters())
    loss = peers.compiled(_loss) if compiles else _loss

    def step() -> Any:
        # PyTorch's fused attention has no forward mode.
        with networks.on_operations(is_plain), sdpa_kernel(SDPBackend.MATH):
            with torch.autocast(inputs[0].device.type, dtype, enabled=dtype in HALF):
                value = loss(model, *inputs)
            return value.detach(), *torch.autograd.grad(value, weights)

    return step


def training_step(case: NetworkCase, dtype: torch.dtype, device: str) -> Comparison:
    torch.manual_seed(0)
    model = _network(case)
    networks.fill_zeros(model)
    z, v = torch.randn(2, case.batch, 3, case.size, case.size).unbind()
    t, r = torch.rand(2, case.batch).sort(dim=0, descending=True).values.unbind()
    if dtype == torch.float64:
        model, z, v, t, r = model.double(), *(x.double() for x in (z, v, t, r))
    model, inputs = model.to(device), tuple(x.to(device) for x in (z, v, r, t))

    def step(is_plain: bool = False, compiles: bool = False) -> Call:
        return _step(copy.deepcopy(model), inputs, dtype, is_plain, compiles)

    @functools.lru_cache(maxsize=1)
    def expected() -> Any:
        wide = tuple(x.double() for x in inputs)
        return _step(copy.deepcopy(model).double(), wide, torch.float64, is_plain=True, compiles=False)()

    counter = FlopCounterMode(display=False)
    with counter:
        step(is_plain=True)()
    count = counter.get_total_flops()
    return Comparison(
        {
            "ours": step(),
            "eager": step(is_plain=True),
            "compile": step(is_plain=True, compiles=True),
            "ours, compiled": step(compiles=True),
        },
        Work(nbytes=3 * sum(x.nbytes for x in model.parameters()) + 2 * z.nbytes, products=count, flops=count),
        largest_error(expected),
        # Every tensor by its own largest value, and gradients of biases are what is left of large sums.
        10 * networks.tolerance(dtype, device),
    )
