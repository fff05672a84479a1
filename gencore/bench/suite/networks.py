"""Whole networks: ours and its peer with the same weights, in the formats and the ways that users run them.

The peer is diffusers' network where that is installed; ours are then its weights in our modules, or, for networks with
transformer blocks, which we have no modules of, diffusers' own network on our kernels. Without diffusers the peer is
our network on PyTorch's operations, those of :mod:`gencore.bench.plain`.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gencore import nn
from gencore.bench import peers, plain
from gencore.bench.cases import NetworkCase
from gencore.bench.suite.base import HALF, TOLERANCES
from gencore.integrations.diffusers import accelerate
from gencore.nn.convert import unet_from_diffusers
from gencore.nn.residual import ResidualBlock, Upsample

Module = torch.nn.Module
# google/ddpm-cifar10-32, of 35.7 million parameters, as diffusers and as we name what it is made of.
CIFAR10: Mapping[str, Any] = {
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "downsample_padding": 0,
    "norm_eps": 1e-6,
}
# That of the plugin ddpm, for images like MNIST's.
_MNIST: Mapping[str, Any] = {
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D",) * 3,
    "up_block_types": ("UpBlock2D",) * 3,
    "layers_per_block": 1,
    "attention_head_dim": None,
    "norm_num_groups": 8,
}
_OUR_MNIST: Mapping[str, Any] = {"channels": (32, 64, 64), "num_groups": 8, "blocks_per_level": 1}
_OUR_CIFAR10: Mapping[str, Any] = {
    "channels": (128, 256, 256, 256),
    "attention_levels": (1,),
    "asymmetric_downsampling": True,
    "norm_eps": 1e-6,
}
# The U-Net of Stable Diffusion 1.5. Where ours stands for it, it has self-attention alone where transformer blocks are.
STABLE_DIFFUSION: Mapping[str, Any] = {"attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64}
_OUR_STABLE_DIFFUSION: Mapping[str, Any] = {
    "channels": (320, 640, 1280, 1280),
    "attention_levels": (0, 1, 2),
    "num_heads": 8,
}
# Its autoencoder.
AUTOENCODER: Mapping[str, Any] = {
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
# Of the same kinds, and small: to see a benchmark run.
_SMALL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
_SMALL_STABLE_DIFFUSION = {
    **_SMALL,
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "attention_head_dim": 2,
}
_SMALL_AUTOENCODER = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
_OUR_SMALL = {"channels": (8, 16), "num_groups": 4, "blocks_per_level": 1}
_PROMPT = (77, 768)


class Decoder(Module):
    """Of the size of the autoencoder of Stable Diffusion, and of our blocks, whose embedding is 0 here."""

    def __init__(self, channels: Sequence[int], blocks: int, groups: int) -> None:
        super().__init__()
        width = channels[-1]
        self.conv_in = torch.nn.Conv2d(4, width, 3, padding=1)
        self.attention = nn.SpatialSelfAttention(width, num_groups=groups)
        self.middle = torch.nn.ModuleList(ResidualBlock(width, width, 1, num_groups=groups) for _ in range(2))
        levels = []
        for level, wanted in reversed(list(enumerate(channels))):
            up: list[Module] = [ResidualBlock(width, wanted, 1, num_groups=groups)]
            up += [ResidualBlock(wanted, wanted, 1, num_groups=groups) for _ in range(blocks - 1)]
            levels.append(torch.nn.ModuleList([*up, *([Upsample(wanted)] if level else [])]))
            width = wanted
        self.levels = torch.nn.ModuleList(levels)
        self.norm_out = nn.GroupNorm(groups, width, activation="silu")
        self.conv_out = torch.nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        embedding = x.new_zeros(x.shape[0], 1)
        x = self.middle[0](self.conv_in(x), embedding)
        x = self.middle[1](self.attention(x), embedding)
        for blocks in self.levels:
            for block in blocks:  # type: ignore[attr-defined]
                if isinstance(block, Upsample):
                    x = block(x, torch.Size([2 * side for side in x.shape[2:]]))
                else:
                    x = block(x, embedding)
        output: Tensor = self.conv_out(self.norm_out(x))
        return output


class Pair(NamedTuple):
    """Ours and its peer, in evaluation mode.

    Attributes:
        ours: of our modules, or diffusers' on our kernels.
        peer: diffusers', or again ours, to be run on PyTorch's operations.
        accelerated: diffusers' on our kernels, where ``ours`` is another network.
        inputs: for both.
    """

    ours: Module
    peer: Module
    accelerated: Module | None
    inputs: tuple[Tensor, ...]

    @property
    def is_plain(self) -> bool:
        return self.peer is self.ours


class Candidate(NamedTuple):
    """A network, what is called with its inputs, itself or compiled, and whether that is on PyTorch's operations."""

    model: Module
    run: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    is_plain: bool = False

    def __call__(self) -> Tensor:
        return self.called(*self.inputs)

    def called(self, *inputs: Any) -> Tensor:
        with on_operations(self.is_plain):
            output = self.run(*inputs)
        first: Tensor = output if isinstance(output, Tensor) else output[0]
        return first


@contextlib.contextmanager
def on_operations(is_plain: bool) -> Iterator[None]:
    """PyTorch's in the place of ours, if ``is_plain``."""
    with plain.operations() if is_plain else contextlib.nullcontext():
        yield


def pair(case: NetworkCase, device: str) -> Pair:
    """The networks of a case in float32 on the device."""
    there = importlib.util.find_spec("diffusers") is not None
    diffusers: Any = importlib.import_module("diffusers") if there else None
    torch.manual_seed(0)
    with torch.device(device):
        ours, peer, inputs = _MAKERS[case.name](diffusers, case)
    if peer is None:
        fill_zeros(ours)
        return Pair(ours.eval(), ours, None, inputs)
    accelerated = _accelerated(peer)
    if ours is None:
        return Pair(accelerated.eval(), peer.eval(), None, inputs)
    return Pair(ours.eval(), peer.eval(), accelerated.eval(), inputs)


def _mnist(diffusers: Any, case: NetworkCase) -> tuple[Any, Any, tuple[Tensor, ...]]:
    inputs = torch.randn(case.batch, 1, case.size, case.size), torch.randint(1000, (case.batch,))
    if diffusers is None:
        return nn.UNet(in_channels=1, **{**_OUR_MNIST, **(_OUR_SMALL if case.small else {})}), None, inputs
    theirs = diffusers.UNet2DModel(**{**_MNIST, **(_SMALL if case.small else {})})
    return unet_from_diffusers(theirs), theirs, inputs


def _cifar10(diffusers: Any, case: NetworkCase) -> tuple[Any, Any, tuple[Tensor, ...]]:
    inputs = torch.randn(case.batch, 3, case.size, case.size), torch.randint(1000, (case.batch,))
    if diffusers is None:
        return nn.UNet(in_channels=3, **{**_OUR_CIFAR10, **(_OUR_SMALL if case.small else {})}), None, inputs
    theirs = diffusers.UNet2DModel(**{**CIFAR10, **(_SMALL if case.small else {})})
    return unet_from_diffusers(theirs), theirs, inputs


def _stable_diffusion(diffusers: Any, case: NetworkCase) -> tuple[Any, Any, tuple[Tensor, ...]]:
    inputs = torch.randn(case.batch, 4, case.size, case.size), torch.randint(1000, (case.batch,))
    if diffusers is None:
        settings = {**_OUR_SMALL, "attention_levels": (1,)} if case.small else _OUR_STABLE_DIFFUSION
        return nn.UNet(in_channels=4, **settings), None, inputs
    config = {**STABLE_DIFFUSION, **(_SMALL_STABLE_DIFFUSION if case.small else {})}
    return None, diffusers.UNet2DConditionModel(**config), (*inputs, torch.randn(case.batch, *_PROMPT))


def _autoencoder(diffusers: Any, case: NetworkCase) -> tuple[Any, Any, tuple[Tensor, ...]]:
    inputs = (torch.randn(case.batch, 4, case.size, case.size),)
    if diffusers is None:
        return Decoder(*(((8, 16), 2, 4) if case.small else ((128, 256, 512, 512), 3, 32))), None, inputs
    return (
        None,
        diffusers.AutoencoderKL(**{**AUTOENCODER, **(_SMALL_AUTOENCODER if case.small else {})}).decoder,
        inputs,
    )


_MAKERS: Mapping[str, Callable[[Any, NetworkCase], tuple[Any, Any, tuple[Tensor, ...]]]] = {
    "ddpm-mnist": _mnist,
    "ddpm-cifar10": _cifar10,
    "stable-diffusion": _stable_diffusion,
    "stable-diffusion-vae": _autoencoder,
}


def _accelerated(model: Module) -> Module:
    found = copy.deepcopy(model)
    accelerate(found)
    return found


@torch.no_grad()
def fill_zeros(model: Module) -> None:
    """Makes weights that begin as zero small ones, so that there is something to compare."""
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            parameter.normal_(std=parameter[0].numel() ** -0.5)


def candidates(networks: Pair, dtype: torch.dtype) -> dict[str, Candidate]:
    """Every way to run the networks; ours are channels_last where nothing else is said."""
    last, first = torch.channels_last, torch.contiguous_format
    ours, peer, is_plain = networks.ours, networks.peer, networks.is_plain
    name = "eager" if is_plain else "diffusers"
    found = {
        "ours": _candidate(ours, networks.inputs, dtype, last),
        "ours, contiguous": _candidate(ours, networks.inputs, dtype, first),
        "ours, compiled": _candidate(ours, networks.inputs, dtype, last, compiles=True),
    }
    if networks.accelerated is not None:
        found["ours, in diffusers"] = _candidate(networks.accelerated, networks.inputs, dtype, last)
    return found | {
        name: _candidate(peer, networks.inputs, dtype, first, is_plain),
        f"{name}, channels_last": _candidate(peer, networks.inputs, dtype, last, is_plain),
        "compile" if is_plain else "diffusers, compile": _candidate(
            peer, networks.inputs, dtype, last, is_plain, compiles=True
        ),
    }


def _candidate(
    model: Module,
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    layout: torch.memory_format,
    is_plain: bool = False,
    compiles: bool = False,
) -> Candidate:
    made: Any = copy.deepcopy(model)
    to(made, dtype)
    made.to(memory_format=layout)
    given = tuple(_moved(x, dtype, layout) for x in inputs)
    return Candidate(made, peers.compiled(made) if compiles else made, given, is_plain)


def to(model: Module, *place: Any) -> Module:
    """As ``model.to``, past that of diffusers, which warns of types that only what it loads from files has."""
    return Module.to(model, *place)


def _moved(x: Tensor, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    if not x.is_floating_point():
        return x
    return x.to(dtype).to(memory_format=layout) if x.dim() == 4 else x.to(dtype)


def definition(networks: Pair, dtype: torch.dtype, wide: torch.dtype | None = None) -> Candidate:
    """The peer, on PyTorch's operations, with the first image and the weights as ``dtype`` has them.

    In float64, or for a half type in float32: next to its rounding that is exact, and much quicker.
    """
    wide = wide or (torch.float32 if dtype in HALF else torch.float64)
    found = _candidate(networks.peer, networks.inputs, dtype, torch.contiguous_format, networks.is_plain)
    inputs = tuple(_moved(x[:1], wide, torch.contiguous_format) for x in found.inputs)
    return Candidate(to(found.model, wide), found.run, inputs, networks.is_plain)


def tolerance(dtype: torch.dtype, device: str) -> float:
    """That of an op: roundings on the way average out. cuDNN takes TF32 for float32, of ten bits after the first."""
    return 1e-2 if (dtype, device) == (torch.float32, "cuda") else TOLERANCES[dtype]


def products(networks: Pair, backward: bool = False) -> int:
    """Operations in products of matrices and convolutions, counted with tensors that have no memory."""
    like = _candidate(networks.peer, networks.inputs, torch.float32, torch.contiguous_format, networks.is_plain)
    model = to(like.model, "meta")
    counted = Candidate(model, model, tuple(x.to("meta") for x in like.inputs), networks.is_plain)
    counter = FlopCounterMode(display=False)
    # Only of the plain formula does the counter see every product.
    with torch.set_grad_enabled(backward), sdpa_kernel(SDPBackend.MATH), counter:
        output = counted()
        if backward:
            output.square().mean().backward()
    total: int = counter.get_total_flops()
    return total


def weights_nbytes(candidate: Candidate) -> int:
    return sum(parameter.nbytes for parameter in candidate.model.parameters())
